"""What all tests share: import paths, threads, the device fixture and the `gpu` mark, exact products on a GPU."""
import os
import sys
from pathlib import Path

import pytest

# Compiled graphs that are kept between runs call the operator with the arguments that it had then.
os.environ.setdefault('TORCHINDUCTOR_FORCE_DISABLE_CACHES', '1')
if 'PYTEST_XDIST_WORKER' in os.environ:
    os.environ.setdefault('OMP_NUM_THREADS', '1')  # before torch is imported, and for the processes that tests start

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'examples')]  # weights.publish, and the examples as they import each other

TIMM_MARKERS = (  # of the tests that timm ships, see test_timm_contract.py
    'base', 'cfg', 'cfg_nonstd', 'torchscript', 'features', 'fxforward', 'fxbackward', 'forward', 'backward', 'timeout')


def pytest_configure(config):
    _keep_builtins()
    for marker in TIMM_MARKERS:
        config.addinivalue_line('markers', f'{marker}: a marker of the tests that timm ships')


def _keep_builtins():
    """TorchScript knows builtins by their address, also those that a first compilation drops (quantized_decomposed's).

    It takes what comes to lie there for a builtin, and fails. So keep them all.
    """
    from torch.jit import _builtins
    register, kept = _builtins._register_builtin, []
    _builtins._register_builtin = lambda function, op: (kept.append(function), register(function, op))


def pytest_runtest_setup(item):
    import torch
    if item.get_closest_marker('gpu') and not torch.cuda.is_available():
        pytest.skip('needs a CUDA device')


@pytest.fixture(params=['cpu', pytest.param('cuda', marks=pytest.mark.gpu)])
def device(request):
    return request.param


@pytest.fixture(autouse=True)
def exact_products(monkeypatch):
    """CUDA convolutions of float32 round to TF32 unless told otherwise."""
    import torch
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)
