"""Markers of timm's own tests, which tests/test_timm_contract.py runs for the models of this package."""

TIMM_MARKERS = (
    'base', 'cfg', 'cfg_nonstd', 'torchscript', 'features', 'fxforward', 'fxbackward', 'forward', 'backward', 'timeout')


def pytest_configure(config):
    for marker in TIMM_MARKERS:
        config.addinivalue_line('markers', f'{marker}: a marker of the tests that timm ships')
