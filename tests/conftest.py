"""One thread per process where there are several, and the markers of timm's own tests (tests/test_timm_contract.py)."""
import os

if 'PYTEST_XDIST_WORKER' in os.environ:
    os.environ.setdefault('OMP_NUM_THREADS', '1')  # before torch is imported, and for the processes that tests start

TIMM_MARKERS = (
    'base', 'cfg', 'cfg_nonstd', 'torchscript', 'features', 'fxforward', 'fxbackward', 'forward', 'backward', 'timeout')


def pytest_configure(config):
    for marker in TIMM_MARKERS:
        config.addinivalue_line('markers', f'{marker}: a marker of the tests that timm ships')
