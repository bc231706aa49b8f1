"""timm's own model tests, from the source distribution of the installed timm, run for every network of this package.

Those tests choose their models by list_models(), by a list of timm's module names, or by literal names. Here all three
are replaced by the networks of this package, so that none is left out for not being part of timm.
"""
import importlib.util
from functools import partial, wraps
from unittest import mock

import pytest
import timm
from fetch_timm_tests import folder_of_timm_tests
from networks import MODELS, SMALL
from packaging.version import Version


def _list_models(filter='', module='', pretrained=False, exclude_filters='', name_matches_cfg=False, include_tags=None):
    """timm.list_models among our models; a restriction to some of timm's own modules is dropped."""
    if filter and not any(name in str(filter) for name in ('gunn', 'sunn')):
        return []  # tests for particular families of timm
    return timm.models.list_models(
        filter, 'gunn', pretrained, exclude_filters, name_matches_cfg=name_matches_cfg, include_tags=include_tags)


# Tests with literal model names that state what any model owes; the others with literal names are about one family.
LITERAL = {
    'test_reset_classifier_keeps_pool': {},
    'test_features_only_grad_checkpointing_backward': {},
    'test_feature_getter_stage_ends_torchscript': {},
    'test_prune_intermediate_layers_params_used': {},
    'test_features_only_feature_cls_class': {},
    'test_forward_after_prune_intermediate_layers': {},
    'test_prune_intermediate_layers_last_feature': dict(stop_early_final=True),
    'test_prune_to_stem_feature': {},
    'test_head_hidden_size': dict(model_kwargs={}),
    'test_model_init_weights_after_to_empty': dict(kwargs={}),
}


def _load():
    path = folder_of_timm_tests() / 'test_models.py'
    if not path.exists():
        pytest.skip(f'no {path}: fetch it with python tests/fetch_timm_tests.py', allow_module_level=True)
    spec = importlib.util.spec_from_file_location('timm_test_models', path)
    module = importlib.util.module_from_spec(spec)
    with mock.patch('timm.list_models', _list_models), mock.patch('timm.list_pretrained', return_value=[]):
        spec.loader.exec_module(module)
    return module


def _parameters_over_models(test):
    """The parametrisation of a test that runs over our models, None for any other test."""
    for mark in getattr(test, 'pytestmark', []):
        if mark.name == 'parametrize' and mark.args[0] == 'model_name' and mark.args[1] \
                and timm.models.get_arch_name(mark.args[1][0]) in MODELS:
            return mark
    return None


# Tests that leave no room for rounding between the fused operator and what TorchScript runs.
EXACT = ('test_feature_getter_stage_ends_torchscript',)

# Tests over all models that run each several times.
COSTLY = ('test_prune_intermediate_layers_contract',)

# Networks that are wider versions of others: they are whole in the tests named here, and narrow in all others.
WIDE = 'gunn24', 'sunn24', 'wide_gunn18'
WHOLE = 'test_model_forward', 'test_model_default_cfgs'


def _over_our_models(test, **kwargs):
    """A test with literal names, or a costly one, for narrow versions of our models."""
    create_model = partial(_create_narrow_model, fused=test.__name__ not in EXACT)

    @pytest.mark.parametrize('model_name', MODELS)
    def run(model_name):
        with mock.patch.object(_timm_tests, 'create_model', create_model):
            test(model_name, **kwargs)
    return run


def _with_narrow_models(test):
    """A test over all models, for narrow versions of the wide ones."""
    def create_model(name, **kwargs):
        return (_create_narrow_model if name in WIDE else timm.create_model)(name, **kwargs)

    @wraps(test)
    def run(*args, **kwargs):
        with mock.patch.object(_timm_tests, 'create_model', create_model):
            test(*args, **kwargs)
    return run


def _create_narrow_model(name, **kwargs):
    """timm.create_model of a few segments: these tests are about structure, and many run a network several times."""
    segments = SMALL[name]['segments']
    return timm.create_model(name, **{**dict(channels=(24, 32, 40, 48)[:len(segments)], segments=segments), **kwargs})


_timm_tests = _load()
cfg_device = getattr(_timm_tests, 'cfg_device', None)  # a fixture of some of them
for _name, _test in list(vars(_timm_tests).items()):
    if _name in LITERAL or _name in COSTLY:
        globals()[_name] = _over_our_models(_test, **LITERAL.get(_name, {}))
    elif _name.startswith('test_') and _parameters_over_models(_test):
        globals()[_name] = _test if _name in WHOLE else _with_narrow_models(_test)


if hasattr(_timm_tests, 'test_model_features_output_stride'):  # not in older versions
    # It asserts a largest reduction of output_stride, which the CIFAR networks (4) never reach.
    @pytest.mark.parametrize('output_stride', [8, 16])
    @pytest.mark.parametrize('model_name', [m for m in MODELS if '18' in m])
    def test_model_features_output_stride(model_name, output_stride):
        _timm_tests.test_model_features_output_stride(model_name, output_stride)


def test_nothing_is_left_out():
    """Each of timm's tests that are about any model runs for all of ours."""
    for name in ('test_model_forward', 'test_model_backward', 'test_model_default_cfgs', 'test_model_forward_features',
                 'test_model_forward_intermediates', 'test_model_forward_intermediates_features',
                 'test_model_forward_torchscript', 'test_model_forward_fx', 'test_model_backward_fx'):
        assert {timm.models.get_arch_name(m) for m in _parameters_over_models(globals()[name]).args[1]} == set(MODELS)
    if Version(timm.__version__) >= Version('1.0.31'):  # older ones lack some
        assert {*LITERAL, *COSTLY} <= vars(_timm_tests).keys()
