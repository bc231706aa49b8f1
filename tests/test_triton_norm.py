"""The norms' Triton kernels against plain arithmetic: on a CUDA device, and by Triton's interpreter on any machine."""
import os
import subprocess
import sys

import pytest
import torch
from torch.testing import assert_close

pytest.importorskip('triton')
INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'
DEVICE = 'cpu' if INTERPRETED else 'cuda'
compiled = [] if INTERPRETED else [
    pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')]
EPS = 1e-3


@pytest.mark.skipif(INTERPRETED, reason='is what this test runs')
def test_interpreted():
    """Triton must be imported with its interpreter on, hence in a process of its own."""
    process = subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-x', '-p', 'no:cacheprovider', __file__,
         os.path.join(os.path.dirname(__file__), 'test_fused.py'), '-k', 'triton'],
        env={**os.environ, 'TRITON_INTERPRET': '1'}, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr


def make(dtype, rows, channels, *, sliced, seed=0):
    """A matrix whose columns differ in mean and scale; `sliced` makes it columns of a wider one."""
    generator = torch.Generator().manual_seed(seed)
    t = torch.randn(rows, 3 * channels, generator=generator, dtype=torch.float64)
    t = t * torch.linspace(0.5, 2, 3 * channels) + torch.linspace(-3, 3, 3 * channels)
    t = t.to(DEVICE, dtype)[:, channels:2 * channels]
    return t if sliced else t.contiguous()


def make_norm(dtype, rows, channels, batch, segments=2):
    from timm_gunn.triton_norm import TritonNorm
    stats = dict(dtype=torch.float64 if dtype == torch.float64 else torch.float32, device=DEVICE)
    gamma, beta, mean, variance = torch.rand(4, segments * channels, **stats) + 0.5
    gamma[::3] *= -1
    empty = gamma.new_empty(0)
    return TritonNorm(gamma, beta, *((empty, empty) if batch else (mean, variance)), EPS, batch, rows, segments, dtype)


def reference(norm, h, relu):
    """In float64, with statistics of its own."""
    vectors = [t[1].double() for t in (norm.gammas, norm.betas)]
    if norm.batch:
        stats = h.mean(0), h.var(0, correction=0)
    else:
        stats = norm.means[1].double(), norm.variances[1].double()
    vectors = [t.detach().requires_grad_() for t in vectors]
    z = (h - stats[0]) / (stats[1] + EPS).sqrt() * vectors[0] + vectors[1]
    return z.relu() if relu else z, vectors, stats


def tolerances(dtype):
    eps = torch.finfo(dtype).eps
    return dict(rtol=4 * eps, atol=4 * eps) if dtype.itemsize > 2 else dict(rtol=eps, atol=eps)


SIZES = [(1, 1), (7, 12), (300, 1), (130, 20), (1000, 24), (257, 40), (33, 80), (100, 100), (3, 3000)]


@pytest.mark.parametrize('sliced', [False, True], ids=['whole', 'sliced'])
@pytest.mark.parametrize('relu', [False, True], ids=['linear', 'relu'])
@pytest.mark.parametrize('batch', [True, False], ids=['batch', 'given'])
@pytest.mark.parametrize('size', SIZES, ids=str)
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
class TestTritonKernels:
    pytestmark = compiled

    def test_values_statistics_and_gradients(self, dtype, size, batch, relu, sliced):
        torch.manual_seed(0)
        h, grad, other = (make(dtype, *size, sliced=sliced, seed=k) for k in range(3))
        norm = make_norm(dtype, *size, batch)
        if batch:
            norm.measure(other)
            norm.measure(h)
        exact_h = h.double().requires_grad_()
        expected, vectors, stats = reference(norm, exact_h, relu)
        close = tolerances(dtype)
        sums = tolerances(torch.float64 if dtype == torch.float64 else torch.float32)
        if batch:
            assert_close(torch.stack([norm.means[1], norm.variances[1]]).double(), torch.stack(stats), **sums)
        out = torch.full_like(grad, 9)
        a = (norm.activate if relu else norm.apply)(1, h, out)
        assert a is out
        scale = expected.abs().max().item() + 1
        assert_close(a.double(), expected, rtol=close['rtol'], atol=4 * sums['atol'] * scale * 10)
