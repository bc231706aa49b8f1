"""The norms' Triton kernels against plain arithmetic: on a CUDA device, and by Triton's interpreter on any machine."""
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip('triton')
INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'
DEVICE = 'cpu' if INTERPRETED else 'cuda'
compiled = (lambda test: test) if INTERPRETED else pytest.mark.gpu
EPS = 1e-3
# Widths that fill no vector, rows that fill no block, more rows than all programs take at once, and more programs than
# are added up at once.
SIZES = [(1, 1), (7, 12), (300, 1), (257, 20), (130, 40), (20, 700)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Every size meets every dtype, and every dtype all four kinds of a norm: Triton's interpreter is slow.
CASES = [
    (DTYPES[(i + 2 * batch + relu) % 4], size, batch, relu, (i + batch) % 2 == 1)
    for i, size in enumerate(SIZES) for batch in (False, True) for relu in (False, True)]


@pytest.mark.skipif(INTERPRETED, reason='is what this test runs')
def test_interpreted():
    """Triton must be imported with its interpreter on, hence in a process of its own."""
    layers = os.path.join(os.path.dirname(__file__), 'test_fused.py')
    tests = [__file__, f'{layers}::test_interpreted_layer_is_as_precise_as_the_composite',
             f'{layers}::test_drop_path[triton]',
             *[f'{layers}::test_random_layers[triton-{seed}]' for seed in (1, 5, 23)]]
    process = subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-x', '-p', 'no:cacheprovider', *tests],
        env={**os.environ, 'TRITON_INTERPRET': '1'}, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """Programs that take several blocks each, of fewer numbers, without large matrices."""
    from timm_gunn import triton_norm
    torch.manual_seed(0)
    if INTERPRETED:
        monkeypatch.setattr(triton_norm, 'PASS', (5, 512, 4))
        monkeypatch.setattr(triton_norm, 'SUM', (12, 512, 8))


def make(dtype, rows, channels, sliced=False):
    """A matrix whose columns differ in mean and scale; `sliced` makes it columns of a wider one."""
    t = torch.randn(rows, 3 * channels, dtype=torch.float64)
    t = t * torch.linspace(0.5, 2, 3 * channels) + torch.linspace(-3, 3, 3 * channels)
    t = t.to(DEVICE, dtype)[:, channels:2 * channels]
    return t if sliced else t.contiguous()


def make_norm(dtype, rows, channels, batch):
    """Two units' norms."""
    from timm_gunn.aten_norm import Params
    from timm_gunn.triton_norm import TritonNorm
    stats = torch.float64 if dtype == torch.float64 else torch.float32
    gamma, beta, mean, variance = (torch.rand(4, 2 * channels, dtype=stats) + 0.5).to(DEVICE).unbind()
    gamma[::3] *= -1
    empty = gamma.new_empty(0)
    params = Params(gamma, gamma, beta, *((empty, empty) if batch else (mean, variance)))
    return TritonNorm(params, EPS, batch, rows, 2, dtype)


def linear(norm, h):
    """Unit 1's norm of a float64 matrix in plain arithmetic, its factor and term, mean and variance."""
    factor, term, *stats = (t.double() for t in norm.vectors[1])
    factor, term = factor.requires_grad_(), term.requires_grad_()
    stats = (h.mean(0), h.var(0, correction=0)) if norm.batch_stats else stats
    return (h - stats[0]) / (stats[1] + EPS).sqrt() * factor + term, factor, term, *stats


def assert_near(value, exact, dtype):
    """Within the rounding of `dtype`, and some of what is computed in."""
    assert value.dtype == dtype
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    allowed = torch.finfo(dtype).eps * exact.abs() + 64 * eps * (1 + exact.abs().max())
    error = (value.double() - exact).abs()
    assert (error <= allowed).all(), f'{(error / allowed).max():.3g} times what is allowed'


@compiled
@pytest.mark.parametrize(('dtype', 'size', 'batch', 'relu', 'sliced'), CASES, ids=str)
def test_values_statistics_and_gradients(dtype, size, batch, relu, sliced):
    h, first, grad = (make(dtype, *size, s) for s in (sliced, sliced, not sliced))
    norm = make_norm(dtype, *size, batch)
    if batch:
        norm.measure(0, first)
        norm.measure(1, h)
    exact_h = h.double().requires_grad_()
    z, factor, term, mean, variance = linear(norm, exact_h)
    if batch:
        for measured, exact in zip(norm.vectors[1][2:], (mean, variance), strict=True):
            assert_near(measured, exact, norm.empty.dtype)

    a = (norm.activate if relu else norm.apply)(1, h)
    assert_near(a, z.relu() if relu else z, dtype)

    # Where z is nearly 0, the activation decides.
    z.backward(grad.double() * (a > 0) if relu else grad.double())
    before = grad.clone()
    out = torch.full_like(h, 9)
    grad_h = norm.backward(1, grad, h, a if relu else None, out)
    assert_near(grad_h, exact_h.grad, dtype)
    assert torch.equal(grad, before)
    largest = (factor.grad.abs().max() + size[0]).item()
    assert_near(norm.grad_gamma[1] / largest, factor.grad / largest, norm.empty.dtype)
    assert_near(norm.grad_beta[1] / largest, term.grad / largest, norm.empty.dtype)


@compiled
@pytest.mark.parametrize('relu', [False, True], ids=['linear', 'relu'])
def test_frozen_norm_needs_no_sums(relu):
    h, grad = make(torch.float32, 130, 20), make(torch.float32, 130, 20)
    norm = make_norm(torch.float32, 130, 20, False)
    norm.affine_needed = False
    exact_h = h.double().requires_grad_()
    a = norm.activate(1, h) if relu else None
    linear(norm, exact_h)[0].backward(grad.double() * (a > 0) if relu else grad.double())
    grad_h = norm.backward(1, grad, h if relu else None, a)
    assert_near(grad_h, exact_h.grad, torch.float32)
    assert torch.cat(norm.grad_gamma + norm.grad_beta).numel() == 0


@compiled
@pytest.mark.parametrize('dtypes', [
    (torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32), (torch.float16, torch.float32)], ids=str)
@pytest.mark.parametrize('two', [False, True], ids=['one', 'two'])
@pytest.mark.parametrize('add', [False, True], ids=['in place of', 'added to'])
def test_update_of_the_state(add, two, dtypes):
    """What is written to the segment, to the rounded state where there is one, and the change of that."""
    dtype, out_dtype = dtypes
    h, t, state, change = (make(dtype, 130, columns)[:, :20] for columns in (20, 40, 50, 70))
    norm, other = make_norm(dtype, 130, 20, False), make_norm(dtype, 130, 20, False)
    exact = linear(norm, h.double())[0].detach()
    if two:
        exact += linear(other, t.double())[0].detach()
    segment = make(out_dtype, 130, 20, True)
    state = segment if dtype == out_dtype else state.copy_(segment)
    expected_change = exact if add else exact - state.double()
    if add:
        exact = exact + segment.double()
    norm.update(1, h, segment, (other, t) if two else None, add=add, state=None if state is segment else state,
                change=change)
    assert_near(segment, exact, out_dtype)
    assert_near(state, exact, dtype)
    assert_near(change, expected_change, dtype)
