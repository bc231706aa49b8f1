"""The registered networks beyond timm's own contract (tests/test_timm_contract.py): the paper's facts, and training."""
import argparse
import copy
import io
import logging
import math
import re
import warnings

import pytest
import timm
import timm.utils
import torch
import torch._dynamo.config
import torch.nn as nn
from networks import CIFAR, IMAGENET, KINDS, MODELS, SMALL, composite_of, saved_bytes, small, tiny
from reference import randomise
from safetensors.torch import load_file
from timm.models import group_parameters
from torch.testing import assert_close

from timm_gunn import GunnLayer, gunn
from timm_gunn.verify import known_weights


def assert_same_output(actual, expected):
    """Equal to float32 rounding, on the scale of the whole output: single logits may cancel to nearly zero."""
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(('name', 'params'), [
    ('gunn15.c10', 1_585_746), ('gunn15.c100', 1_618_236),  # Section 5.2
    ('gunn24.c10', 29_534_106), ('gunn24.c100', 29_631_396),
    ('gunn18.in1k', 28_909_736), ('wide_gunn18.in1k', 45_624_936),  # Section 5.3
    ('gunn15_nores.c10', 1_585_746), ('sunn15.c100', 1_618_236), ('sunn24', 29_534_106), ('sunn18', 28_909_736),
])
def test_parameter_counts(name, params):
    assert sum(p.numel() for p in timm.create_model(name, device='meta').parameters()) == params


@pytest.mark.parametrize('name', timm.list_models(module='gunn', include_tags=True))
def test_pretrained_configs(name):
    cfg = timm.get_pretrained_cfg(name)
    assert (cfg.license, cfg.paper_ids) == ('apache-2.0', 'arXiv:1711.09280')
    assert cfg.origin_url == 'https://github.com/joe-siyuan-qiao/GUNN'
    assert not cfg.url
    assert not cfg.hf_hub_id or re.fullmatch(r'[\w.-]+/[\w.-]+@[0-9a-f]{40}', cfg.hf_hub_id)  # pinned
    size, classes, mean, std = {
        'c10': (32, 10, (125.3, 123.0, 113.9), (63.0, 62.1, 66.7)),
        'c100': (32, 100, (129.3, 124.1, 112.4), (68.2, 65.4, 70.4)),
        'tiny_in': (64, 200, (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
        'in1k': (224, 1000, (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
    }[name.split('.')[1]]
    assert len(set(cfg.label_names or range(classes))) == classes
    assert bool(cfg.label_names) == (cfg.tag != 'in1k')
    assert (cfg.input_size, cfg.num_classes) == ((3, size, size), classes)
    assert [255 * m for m in cfg.mean] == pytest.approx(mean)
    assert [255 * s for s in cfg.std] == pytest.approx(std)
    model = timm.create_model(name, device='meta')
    assert model.num_classes == classes
    assert model.get_classifier().out_features == classes
    # What an evaluation does to an image: shorter side 256 and the central 224, or nothing at all.
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    resize, crop = transform.transforms[:2]
    assert (resize.size, crop.size) == ((256, (224, 224)) if size == 224 else (size, (size, size)))
    assert resize.interpolation.value == 'bicubic'


def test_default_tags():
    assert {m: timm.get_pretrained_cfg(m).tag for m in MODELS} == {
        m: 'in1k' if m in IMAGENET else 'c10' for m in MODELS}


def test_pretrained_without_a_tag(caplog):
    """The best weights that there are, said once; without pretrained, the default of the paper."""
    gunn._find_weights.cache_clear()
    for _ in range(2):
        model = timm.create_model('gunn18', pretrained=True)
        assert (model.pretrained_cfg['tag'], model.num_classes) == ('tiny_in', 200)
        assert model.pretrained_cfg['label_descriptions']['n01443537'] == 'goldfish, Carassius auratus'
        assert model.pretrained_cfg['label_names'][0] == 'n01443537'
    assert caplog.text.count('no gunn18.in1k weights yet, pretrained=True loads gunn18.tiny_in') == 1
    model = timm.create_model('gunn18')
    assert (model.pretrained_cfg['tag'], model.num_classes) == ('in1k', 1000)
    model = timm.create_model('gunn18', pretrained=True, pretrained_cfg_overlay=dict(input_size=(3, 128, 128)))
    assert (model.pretrained_cfg['tag'], model.pretrained_cfg['input_size']) == ('tiny_in', (3, 128, 128))
    maps = timm.create_model('gunn18', pretrained=True, features_only=True).state_dict()
    expected = timm.create_model('gunn18.tiny_in', pretrained=True).state_dict()
    assert_close(maps, {k: v for k, v in expected.items() if k in maps}, rtol=0, atol=0)


@pytest.mark.parametrize('features_only', [False, True])
@pytest.mark.parametrize('name', [
    name for name in timm.list_models(module='gunn', include_tags=True) if name not in known_weights()])
def test_no_weights_yet(name, features_only):
    assert not timm.is_model_pretrained(name)
    with pytest.raises(RuntimeError, match='No pretrained weights exist'):
        timm.create_model(name, pretrained=True, features_only=features_only)


@pytest.mark.parametrize('name', [name for name in known_weights() if timm.get_pretrained_cfg(name).file])
def test_shipped_weights(name, monkeypatch):
    """They load strictly and without a network, under the full name and the short one where the tag is the default."""
    def no_network(*args, **kwargs):
        raise AssertionError('reached for the network')

    monkeypatch.setattr('socket.socket.connect', no_network)
    cfg = timm.get_pretrained_cfg(name)
    assert name in timm.list_pretrained('*unn*')
    assert timm.is_model_pretrained(name)
    state = load_file(cfg.file)
    names = [name] + ([cfg.architecture] if timm.get_pretrained_cfg(cfg.architecture).tag == cfg.tag else [])
    for n in names:
        model = timm.create_model(n, pretrained=True)
        for key, t in model.state_dict().items():
            assert t.dtype == torch.float32 or key.endswith('tracked')
            assert_close(t, state[key].to(t.dtype), rtol=0, atol=0)
    assert all(t.isfinite().all() for t in state.values())
    assert {t.dtype for t in state.values() if t.ndim > 1} == {torch.float16}


@pytest.mark.parametrize(('kwargs', 'error', 'message'), [
    (dict(output_stride=4), AssertionError, 'output_stride must be 8, 16 or 32, got 4'),
    (dict(layout='mnist'), AssertionError, "layout must be 'imagenet' or 'cifar', got 'mnist'"),
    (dict(segments=(3, 4)), AssertionError, 'must go by stage'),
    (dict(segments=(10, 20, 30, 40)), ValueError, "divisible by segments.*'channels': 1600, 'segments': 30"),
    (dict(norm_layer='groupnorm1'), TypeError, 'BatchNorm family, got GroupNorm1'),
    (dict(widht=3), TypeError, 'widht'),
])
def test_bad_arguments(kwargs, error, message):
    with pytest.raises(error, match=message):
        timm.create_model('gunn18', **kwargs)


@pytest.mark.parametrize(('layout', 'stages', 'reductions'), [
    ('imagenet', 2, [2, 4, 8]), ('imagenet', 5, [2, 4, 8, 16, 32, 32]), ('cifar', 1, [1])])
def test_features_of_other_numbers_of_stages(layout, stages, reductions):
    model = timm.create_model(
        'gunn18', layout=layout, channels=(12,) * stages, segments=(3,) * stages, output_stride=32, features_only=True)
    maps = model(torch.randn(2, 3, 128, 128))
    assert [128 // m.shape[-1] for m in maps] == model.feature_info.reduction() == reductions


@pytest.mark.parametrize('kwargs', [
    dict(in_chans=1), dict(in_chans=5), dict(num_classes=7), dict(num_classes=0), dict(features_only=True)], ids=str)
@pytest.mark.parametrize('name', ['gunn15', 'gunn18'])
def test_weights_are_adapted(name, kwargs, tmp_path):
    """Weights from a file go into other numbers of input channels and classes and into feature extractors."""
    source = randomise(small(name))
    torch.save(source.state_dict(), tmp_path / 'weights.pth')
    model = small(name, pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / 'weights.pth')), **kwargs)
    state = source.state_dict()
    changed = {k for k, v in model.state_dict().items() if v.shape != state[k].shape or not torch.equal(v, state[k])}
    assert changed == {
        'in_chans': {'stem.conv.weight'}, 'num_classes': {'head.fc.weight', 'head.fc.bias'}, 'features_only': set(),
    }[next(iter(kwargs))] & set(model.state_dict())
    if kwargs == dict(in_chans=1):
        assert_close(model.stem.conv.weight, source.stem.conv.weight.sum(1, keepdim=True))


@pytest.mark.parametrize('prefix', ['module.', 'backbone.', 'encoder.model.'])
@pytest.mark.parametrize('kwargs', [dict(features_only=True), dict(num_classes=0)], ids=str)
@pytest.mark.parametrize('name', SMALL)
def test_weights_of_a_backbone_inside_another_network(name, kwargs, prefix, tmp_path):
    source = randomise(small(name))
    state = {f'{prefix}{k}': v for k, v in source.state_dict().items()}
    torch.save({'state_dict': {**state, 'decoder.weight': torch.ones(1)}}, tmp_path / 'weights.pth')
    overlay = dict(file=str(tmp_path / 'weights.pth'))
    model = small(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)
    assert_close(dict(model.state_dict()), {k: source.state_dict()[k] for k in model.state_dict()}, rtol=0, atol=0)


@pytest.mark.parametrize('name', SMALL)
def test_checkpoint_of_train_as_a_backbone(name, tmp_path):
    """By the class that timm's train.py writes it with. timm takes the averaged weights where there are some."""
    source = small(name)
    ema = timm.utils.ModelEmaV3(randomise(copy.deepcopy(source)))
    optimizer = torch.optim.SGD(source.parameters(), lr=0.1)
    saver = timm.utils.CheckpointSaver(
        source, optimizer, args=argparse.Namespace(model=name), model_ema=ema, checkpoint_dir=str(tmp_path))
    saver.save_checkpoint(epoch=0)
    model = small(name, features_only=True, pretrained=True, pretrained_cfg_overlay=dict(
        file=str(tmp_path / 'last.pth.tar')))
    averaged = ema.module.state_dict()
    assert_close(dict(model.state_dict()), {k: averaged[k] for k in model.state_dict()}, rtol=0, atol=0)
    assert not torch.equal(averaged['stage1.bn.weight'], source.state_dict()['stage1.bn.weight'])


@pytest.mark.parametrize(('keys', 'message'), [
    (['conv1.weight'], r"'stem.conv.weight' with or without a prefix, got \['conv1.weight'\]"),
    (['a.stem.conv.weight', 'b.stem.conv.weight'], r"one network.*, got \['a.', 'b.'\]"),
    (['mystem.conv.weight'], r"got \['mystem.conv.weight'\]")])
def test_weights_that_are_not_there(keys, message, tmp_path):
    """An error, where timm itself would leave the network as it is."""
    torch.save(dict.fromkeys(keys, torch.ones(1)), tmp_path / 'weights.pth')
    with pytest.raises(ValueError, match=message):
        small('gunn18', pretrained=True, features_only=True,
              pretrained_cfg_overlay=dict(file=str(tmp_path / 'weights.pth')))


def test_weights_that_end_early(tmp_path, caplog):
    """Of a network that was pruned: timm's log names the stages that are left as they are."""
    source = small('gunn18')
    source.prune_intermediate_layers((0, 1, 2))
    torch.save(source.state_dict(), tmp_path / 'weights.pth')
    overlay = dict(file=str(tmp_path / 'weights.pth'))
    with caplog.at_level(logging.INFO, 'timm'):
        small('gunn18', pretrained=True, features_only=True, pretrained_cfg_overlay=overlay)
    assert re.search(r'Missing keys \(stage3\.', caplog.text)


@pytest.mark.parametrize('name', SMALL)
def test_weights_of_a_backbone_in_a_classifier(name, tmp_path, caplog):
    """What no map of features needs, the last convolution of the CIFAR networks and the classifier, stays as it is."""
    backbone = randomise(small(name, features_only=True))
    torch.save({f'encoder.{k}': v for k, v in backbone.state_dict().items()}, tmp_path / 'weights.pth')
    overlay = dict(file=str(tmp_path / 'weights.pth'), num_classes=-1)
    with caplog.at_level(logging.INFO, 'timm'):
        model = small(name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=5)
    missing = re.search(r'Missing keys \((.*)\)', caplog.text)[1].split(', ')
    assert {k.split('.')[0] for k in missing} == ({'head'} if name in IMAGENET else {'final_conv', 'head'})
    expected = backbone.state_dict()
    assert_close({k: v for k, v in model.state_dict().items() if k in expected}, dict(expected))


@pytest.mark.parametrize('name', SMALL)
def test_reset_classifier(name, tmp_path):
    """Without pooling, a map of features comes out, or one of logits, whose mean is what pooling gives."""
    model = small(name)
    x = torch.randn(2, 3, 64, 96)
    expected = model.eval().forward_features(x)
    model.reset_classifier(0, global_pool='')
    assert_close(model(x), expected, rtol=0, atol=0)
    assert model(x).ndim == 4
    model.reset_classifier(5, global_pool='')
    assert model(x).shape == (2, 5, *expected.shape[2:])
    assert model.head.fc.bias.abs().max() == 0
    assert model.head.fc.weight.abs().max() <= model.num_features ** -0.5  # as a linear layer starts

    model = small(name).eval()
    model.reset_classifier(7)
    assert model(x).shape == (2, 7)
    assert model.head.global_pool.pool_type == 'avg'
    torch.save(model.state_dict(), tmp_path / 'weights.pth')
    unpooled = small(name, num_classes=7, global_pool='', pretrained=True, pretrained_cfg_overlay=dict(
        file=str(tmp_path / 'weights.pth'), num_classes=7)).eval()
    assert_close(unpooled(x).mean((2, 3)), model(x))


@pytest.mark.parametrize('name', ['gunn15', 'gunn18'])
def test_initialisation(name):
    torch.manual_seed(0)
    model = timm.create_model(name)
    checked = 0
    for conv_name, conv in model.named_modules():
        if not isinstance(conv, nn.Conv2d):
            continue
        chs = conv.in_channels // conv.groups if '.layer.' in conv_name else conv.out_channels
        expected = math.sqrt(2 / (conv.kernel_size[0] ** 2 * chs))
        assert conv.weight.std().item() == pytest.approx(expected, rel=0.05), conv_name
        checked += 1
    assert checked == {'gunn15': 4 * 3 + 5, 'gunn18': 3 * 4 + 5}[name]
    assert (model.head.fc.bias == 0).all()


@pytest.mark.parametrize('context', [True, False])
@pytest.mark.parametrize('name', SMALL)
def test_init_weights_after_meta(name, context):
    if context:
        with torch.device('meta'):
            model = small(name).double().to_empty(device='cpu')
    else:
        model = small(name, device='meta', dtype=torch.float64).to_empty(device='cpu')
    for t in [*model.parameters(), *model.buffers()]:
        t.data.fill_(float('nan') if t.is_floating_point() else -1)
    model.init_weights()
    expected = small(name, dtype=torch.float64).state_dict()
    for key, value in model.state_dict().items():
        if (value.ndim == 1 and 'fc' not in key) or value.ndim == 0:
            assert_close(value, expected[key], msg=key)
        assert torch.isfinite(value).all(), key
    assert torch.isfinite(model.eval()(torch.randn(1, 3, 64, 64, dtype=torch.float64))).all()


def test_assigned_float16_weights():
    """They keep their dtype, as torch says; then float() makes a network that runs."""
    source = randomise(small('gunn15')).eval()
    state = {k: v.half() if v.ndim > 1 else v for k, v in source.state_dict().items()}  # as in the published files
    model = small('gunn15', device='meta').eval()
    model.load_state_dict(state, assign=True)
    source.load_state_dict(state)
    x = torch.randn(1, 3, 32, 32)
    assert_close(model.float()(x), source(x), rtol=0, atol=0)


# --- Feature maps ---

@pytest.mark.parametrize('output_stride', [8, 16, 32])
@pytest.mark.parametrize('name', MODELS)
def test_feature_info(name, output_stride):
    """Of the CIFAR networks, too, whose maps any output stride allows."""
    info = timm.create_model(name, device='meta', features_only=True, output_stride=output_stride).feature_info
    imagenet = name in IMAGENET
    assert info.reduction() == ([min(r, output_stride) for r in (2, 4, 8, 16, 32)] if imagenet else [1, 2, 4])
    assert info.module_name() == ['stem'] * imagenet + [f'stage{i}' for i in range(1, 4 + imagenet)]


@pytest.mark.parametrize('size', [(64, 96), (33, 50), (17, 33), (1, 1), (2, 3)], ids=str)
@pytest.mark.parametrize('name', SMALL)
def test_feature_maps_of_any_input_size(name, size):
    model = small(name, features_only=True).eval()
    maps = model(torch.randn(1, 3, *size))
    for fmap, chs, r in zip(maps, model.feature_info.channels(), model.feature_info.reduction(), strict=True):
        assert fmap.shape == (1, chs, math.ceil(size[0] / r), math.ceil(size[1] / r))
    assert small(name).eval()(torch.randn(1, 3, *size)).shape[0] == 1


@pytest.mark.parametrize('out_indices', [(0,), (1, 3), (2,), (4,), (-1,), (-2, -1), 3, (0, 4)], ids=str)
def test_out_indices(out_indices):
    model = small('gunn18', features_only=True, out_indices=out_indices).eval()
    full = small('gunn18', features_only=True).eval()
    x = torch.randn(1, 3, 64, 64)
    expected = full(x)
    expected = expected[-out_indices:] if isinstance(out_indices, int) else [expected[i] for i in out_indices]
    assert_close(model(x), expected)


def test_maps_of_a_pruned_network():
    """What is left counts: the last map is the last of it, and one beyond is an error."""
    model, x = small('gunn18').eval(), torch.randn(1, 3, 64, 64)
    expected = model.forward_intermediates(x, [1], intermediates_only=True)
    model.prune_intermediate_layers([0, 1])
    assert_close(model.forward_intermediates(x, 1, intermediates_only=True), expected, rtol=0, atol=0)
    with pytest.raises(AssertionError, match='out of range'):
        model.forward_intermediates(x, [4])


@pytest.mark.parametrize('size', [(128, 192), (48, 75), (80, 33)], ids=str)
@pytest.mark.parametrize('output_stride', [8, 16])
@pytest.mark.parametrize('name', IMAGENET)
def test_dilated_network_contains_the_strided_one(name, output_stride, size):
    """Outputs of the dilated network at every (32 / output_stride)-th pixel are those of the strided network."""
    strided = randomise(small(name, features_only=True, dtype=torch.float64)).eval()
    dilated = small(name, features_only=True, dtype=torch.float64, output_stride=output_stride).eval()
    dilated.load_state_dict(strided.state_dict(), strict=True)
    x = torch.randn(1, 3, *size, dtype=torch.float64)
    for y, z, r in zip(strided(x), dilated(x), (2, 4, 8, 16, 32), strict=True):
        step = max(r // output_stride, 1)
        assert z.shape[-2:] == tuple(math.ceil(s / (r // step)) for s in size)
        assert_close(z[..., ::step, ::step], y)


@pytest.mark.parametrize('name', SMALL)
def test_features_are_the_children_in_order(name):
    """As torchvision's IntermediateLayerGetter, and much code like it, assumes."""
    from torchvision.models._utils import IntermediateLayerGetter
    model = randomise(small(name)).eval()
    x = torch.randn(1, 3, 64, 64)
    names = [info['module'] for info in model.feature_info]
    maps = IntermediateLayerGetter(model, {n: n for n in names})(x)
    expected = model.forward_intermediates(x, intermediates_only=True)
    assert_close(list(maps.values()), expected, rtol=0, atol=0)


@pytest.mark.filterwarnings('ignore:.*torch.jit')
@pytest.mark.parametrize('name', ['gunn15', 'gunn18'])
def test_what_users_attach_is_not_run(name):
    """Nor does it matter when a stage was set. As of any network of timm; scripted, too."""
    model, x = small(name).eval(), torch.randn(1, 3, 64, 64)
    expected = model(x), model.forward_intermediates(x)
    again = model.stage2
    del model.stage2
    model.age, model.act = nn.Linear(model.num_features, 1), nn.Sigmoid()
    model.losses = nn.ModuleDict(dict(kd=nn.KLDivLoss(), ce=nn.CrossEntropyLoss()))
    model.stage2 = again
    assert_close((model(x), model.forward_intermediates(x)), expected, rtol=0, atol=0)
    del model.age, model.losses
    assert_close(torch.jit.script(model)(x), expected[0], rtol=1e-4, atol=1e-5)


def test_stages_are_what_their_names_say():
    """Also where one has another name, too, or stands in two places, or is gone."""
    model = small('gunn15', channels=(12,) * 3, segments=(3,) * 3).eval()
    model.stage3 = model.stage2
    calls, stage, x = [], model.stage2, torch.randn(1, 3, 64, 64)
    expected = model(x)
    stage.register_forward_hook(lambda *_: calls.append(1))
    model.kept = stage
    del model.stage2
    with pytest.raises(AttributeError, match='stage2'):
        model(x)
    model.stage2 = stage
    calls.clear()
    assert_close(model(x), expected, rtol=0, atol=0)
    assert len(calls) == 2


@pytest.mark.parametrize('name', SMALL)
def test_returned_maps_are_not_changed_afterwards(name):
    model = small(name)
    seen = {}
    for child_name, child in model.named_children():
        child.register_forward_hook(lambda m, i, out, n=child_name: seen.update({n: (out, out.detach().clone())}))
    model(torch.randn(2, 3, 64, 64))
    for child_name, (out, then) in seen.items():
        assert torch.equal(out, then), child_name


@pytest.mark.parametrize('name', MODELS)
def test_group_matcher(name):
    model = timm.create_model(name, device='meta')
    fine = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    coarse = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    stages = len(model.feature_names) - (name in IMAGENET)
    assert coarse['stem.conv.weight'] == fine['stem.conv.weight'] == 0
    for i in range(1, stages + 1):
        assert coarse[f'stage{i}.conv.weight'] == coarse[f'stage{i}.layer.bottlenecks.0.conv1.conv.weight'] == i
        assert fine[f'stage{i}.conv.weight'] == fine[f'stage{i}.bn.bias'] == 2 * i - 1
        assert fine[f'stage{i}.layer.bottlenecks.0.conv1.conv.weight'] == 2 * i
    if name in CIFAR:
        assert (coarse['final_conv.conv.weight'], fine['final_conv.conv.weight']) == (stages, 2 * stages)
    assert (coarse['head.fc.weight'], fine['head.fc.weight']) == (stages + 1, 2 * stages + 1)


# --- Training ---

def train_step(model, x):
    out = model(x)
    sum(o.square().mean() for o in (out if isinstance(out, list) else [out])).backward()
    return {n: p.grad for n, p in model.named_parameters()}, dict(model.named_buffers())


@pytest.mark.parametrize('reentrant', [False, True])
@pytest.mark.parametrize('features_only', [False, True])
@pytest.mark.parametrize('name', ['gunn18', 'sunn18', 'gunn15'])
def test_grad_checkpointing(name, features_only, reentrant):
    """Gradients and running statistics come out as they do without."""
    model = small(name, features_only=features_only, dtype=torch.float64, drop_path_rate=0.2).train()
    other = copy.deepcopy(model)
    other.set_grad_checkpointing()
    x = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    timm.layers.set_reentrant_ckpt(reentrant)
    try:
        for _ in range(2):
            torch.manual_seed(1)
            grads, buffers = train_step(model, x)
            torch.manual_seed(1)
            grads_ckpt, buffers_ckpt = train_step(other, x)
    finally:
        timm.layers.set_reentrant_ckpt(False)
    assert_close(grads_ckpt, grads)
    assert_close(buffers_ckpt, buffers)
    assert int(buffers_ckpt['stage2.layer.bottlenecks.0.conv1.bn.num_batches_tracked']) == 2


@pytest.mark.parametrize('features_only', [False, True])
@pytest.mark.parametrize(('name', 'kwargs', 'factor'), [
    ('gunn18', dict(fused=False), 5), ('sunn18', {}, 5), ('gunn15', dict(fused=False), 5),
    # The operator has less to spare: it does not keep what can be computed again anyway.
    ('gunn18', {}, 3), ('gunn15', {}, 3)])
def test_grad_checkpointing_keeps_less(name, kwargs, factor, features_only):
    model = timm.create_model(name, features_only=features_only, **kwargs)
    x = torch.randn(1, 3, 64, 64)
    plain = saved_bytes(model, x)
    model.set_grad_checkpointing()
    assert saved_bytes(model, x) < plain / factor
    model.set_grad_checkpointing(False)
    assert saved_bytes(model, x) == plain


@pytest.mark.parametrize('convert', [
    timm.layers.freeze_batch_norm_2d, timm.layers.convert_sync_batchnorm,
    nn.SyncBatchNorm.convert_sync_batchnorm, timm.layers.convert_splitbn_model], ids=lambda f: f.__name__)
@pytest.mark.parametrize('name', SMALL)
def test_converted_networks(name, convert):
    """In eval mode, and in train mode of the frozen one, nothing changes; every network still trains."""
    model = randomise(small(name)).eval()
    x = torch.randn(4, 3, 64, 64)
    expected = model(x)
    converted = convert(copy.deepcopy(model)).eval()
    assert_same_output(converted(x), expected)
    converted.train()
    if convert is timm.layers.freeze_batch_norm_2d:
        assert_same_output(converted(x[:1]), expected[:1])
    grads, _ = train_step(converted, x)
    assert all(g is not None and torch.isfinite(g).all() for g in grads.values())


@pytest.mark.parametrize('name', SMALL)
def test_freezing_the_first_stages(name):
    """By timm's helper: nothing in them changes in a step of training, and all else does."""
    model = randomise(small(name)).train()
    timm.utils.freeze(model, ['stem', 'stage1'])
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    train_step(model, torch.randn(2, 3, 64, 64))
    optimizer.step()
    frozen = {k for k in before if k.startswith(('stem.', 'stage1.'))}
    assert frozen
    same = {k for k, v in model.state_dict().items() if torch.equal(v, before[k])}
    # But for biases before another norm, whose gradients are rounding, everything else is trained.
    assert {k for k in same if not k.endswith('bn.bias')} == {k for k in frozen if not k.endswith('bn.bias')}
    assert same >= frozen


def test_drop_path_rises_with_depth():
    model = timm.create_model('gunn18', drop_path_rate=0.3, device='meta')
    rates = [getattr(m.drop_path, 'drop_prob', 0.) for m in model.modules() if isinstance(m, GunnLayer)]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3])


@pytest.mark.parametrize('name', KINDS)
def test_pure_bfloat16_channels_last(name):
    """Maps and gradients are no further from float64 than twice the composite's; a classifier trains, too."""
    model = small(name, features_only=True, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    # With few images the last maps are normalised over a handful of samples: the ratio is then the processor's luck.
    x = torch.randn(16, 3, 64, 64, dtype=torch.bfloat16).to(memory_format=torch.channels_last)

    def results(model, x):
        maps = model(x)
        grads, _ = train_step(model, x)
        return maps[-1], torch.cat([g.flatten() for g in grads.values()])

    exact = results(copy.deepcopy(model).double(), x.double())
    for fused, composite, e in zip(results(model, x), results(composite_of(model), x), exact, strict=True):
        assert fused.dtype == torch.bfloat16
        assert (fused - e).norm() <= 2 * (composite - e).norm()
    assert (results(model, x)[0] - exact[0]).norm() <= 0.3 * exact[0].norm()
    grads, _ = train_step(small(name, dtype=torch.bfloat16).to(memory_format=torch.channels_last), x)
    assert all(g.dtype == torch.bfloat16 and torch.isfinite(g).all() for g in grads.values())


@pytest.mark.parametrize('name', SMALL)
def test_copies(name):
    model, x = randomise(small(name)).eval(), torch.randn(1, 3, 32, 32)
    buffer = io.BytesIO()
    torch.save(model, buffer)  # the network as an object, that is pickled
    buffer.seek(0)
    with torch.serialization.safe_globals([*{type(m) for m in model.modules()}]):
        loaded = torch.load(buffer, weights_only=True)
    for copied in (copy.deepcopy(model), loaded):
        assert_close(copied(x), model(x), rtol=0, atol=0)


# --- Compilers and exporters ---

def assert_same_training(model, other, x):
    """Two steps of both, in float64: the same gradients, buffers, and output."""
    for _ in range(2):
        grads, buffers = train_step(model, x)
        grads_other, buffers_other = train_step(other, x)
    assert_close({k.removeprefix('_orig_mod.'): v for k, v in grads_other.items()}, grads)
    assert_close({k.removeprefix('_orig_mod.'): v for k, v in buffers_other.items()}, buffers)
    assert_close(other(x), model(x))


@pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
@pytest.mark.parametrize('name', ['gunn15', 'sunn15', 'gunn18'])
def test_compile(name, training):
    model = randomise(tiny(name, dtype=torch.float64)).train(training)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, dynamic=False, backend='aot_eager')
    assert_same_training(model, compiled, torch.randn(2, 3, 32, 32, dtype=torch.float64))


@pytest.mark.skipif(torch.__version__.startswith('2.8.'), reason='torch 2.8 compiles anew for odd sizes')
@pytest.mark.parametrize('name', ['gunn24', 'gunn18'])
def test_compile_with_dynamic_sizes(name):
    """One graph for images of any size, odd ones too."""
    model = randomise(tiny(name, dtype=torch.float64)).eval()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend='aot_eager')
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True), torch.no_grad():
        for size in ((64, 96), (75, 33), (50, 51)):
            x = torch.randn(2, 3, *size, dtype=torch.float64)
            assert_close(compiled(x), model(x))


def test_compile_with_inductor():
    model = randomise(tiny('gunn15', channels=(6,), segments=(3,), dtype=torch.float64))
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, dynamic=False)
    assert_same_training(model, compiled, torch.randn(2, 3, 16, 16, dtype=torch.float64))


@pytest.mark.skipif(
    torch.__version__.startswith('2.8.'), reason='compiled code of torch 2.8 updates BN twice under checkpointing')
def test_compile_with_grad_checkpointing():
    model = tiny('gunn18', dtype=torch.float64)
    other = copy.deepcopy(model)
    other.set_grad_checkpointing()
    compiled = torch.compile(other, backend='aot_eager')
    assert_same_training(model, compiled, torch.randn(2, 3, 64, 64, dtype=torch.float64))


@pytest.mark.parametrize('name', SMALL)
def test_torchscript(name):
    model = randomise(small(name))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # torch.jit is deprecated
        scripted = torch.jit.script(copy.deepcopy(model))
        traced = torch.jit.trace(copy.deepcopy(model).eval(), torch.randn(1, 3, 32, 32))
    model = composite_of(model)  # what TorchScript takes of it, so that the rounding is the same
    x = torch.randn(2, 3, 40, 32)
    assert_close(traced(x), copy.deepcopy(model).eval()(x), rtol=1e-4, atol=1e-5)
    grads, buffers = train_step(model, x)
    grads_scripted, buffers_scripted = train_step(scripted, x)
    assert_close(grads_scripted, grads, rtol=1e-4, atol=1e-5)
    assert_close(buffers_scripted, buffers, rtol=1e-4, atol=1e-5)
    assert_close(scripted.eval()(x), model.eval()(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', ['gunn15', 'gunn18'])
def test_fx_of_torchvision(name):
    """Extraction by a tracer that knows nothing of timm's leaf modules, in both modes."""
    from torchvision.models.feature_extraction import create_feature_extractor
    model = randomise(small(name))
    traced = copy.deepcopy(model)
    extractor = create_feature_extractor(traced, ['stage2.layer', 'head'])
    assert_close(dict(traced.named_buffers()), dict(model.named_buffers()))  # tracing is no training step
    assert set(extractor.state_dict()) == set(model.state_dict())
    model, extractor = model.double(), extractor.double()
    for training in (False, True, True, False):
        model.train(training)
        extractor.train(training)
        x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
        assert_close(extractor(x)['head'], model(x))
    assert_close(dict(extractor.named_buffers()), dict(model.named_buffers()))


# One of each kind as a network, and two as backbones.
EXPORTED = [*((name, {}) for name in KINDS), ('gunn15', dict(features_only=True)),
            ('gunn18', dict(features_only=True, output_stride=16))]


def assert_same_outputs(actual, expected):
    for a, e in zip(actual, expected if isinstance(expected, list) else [expected], strict=True):
        assert_same_output(a, e)


@pytest.mark.parametrize(('name', 'kwargs'), EXPORTED)
def test_export_with_dynamic_shapes(name, kwargs):
    model = randomise(tiny(name, **kwargs)).eval()
    exported = torch.export.export(
        model, (torch.randn(2, 3, 64, 96),), dynamic_shapes={'x': dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)})
    for shape in [(2, 3, 64, 96), (1, 3, 75, 33)]:
        x = torch.randn(*shape)
        out = exported.module()(x)
        assert_same_outputs(out if isinstance(out, list) else [out], model(x))


@pytest.mark.parametrize(('name', 'kwargs', 'by'), [  # dynamo is slow
    *((*e, 'torchscript') for e in EXPORTED), *((*e, 'dynamo') for e in (EXPORTED[0], EXPORTED[-1]))])
def test_onnx(name, kwargs, by, tmp_path):
    import onnxruntime
    model = randomise(tiny(name, **kwargs)).eval()
    path = str(tmp_path / 'model.onnx')
    axes = {0: 'b', 2: 'h', 3: 'w'}
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of the exporter's own making
        torch.onnx.export(
            model, (torch.randn(2, 3, 64, 96),), path, dynamo=by == 'dynamo', input_names=['x'],
            **(dict(dynamic_shapes={'x': dict.fromkeys(axes, torch.export.Dim.DYNAMIC)}) if by == 'dynamo'
               else dict(dynamic_axes={'x': axes})))
    session = onnxruntime.InferenceSession(path)
    for shape in [(2, 3, 64, 96), (1, 3, 75, 33)]:
        x = torch.randn(*shape)
        outputs = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        assert_same_outputs(map(torch.from_numpy, outputs), model(x))


@pytest.mark.parametrize('fused', [True, False], ids=['fused', 'composite'])
@pytest.mark.parametrize(
    'convert', [lambda m: m, timm.layers.freeze_batch_norm_2d, nn.SyncBatchNorm.convert_sync_batchnorm],
    ids=['plain', 'frozen', 'synchronised'])
@pytest.mark.parametrize('name', SMALL)
def test_reparameterize(name, convert, fused):
    """timm's folding leaves no norm and the same outputs, and the model that was given as it was."""
    model = convert(randomise(small(name, fused=fused))).double().eval()
    before = copy.deepcopy(model.state_dict())
    folded = timm.utils.reparameterize_model(model)
    assert_close(model.state_dict(), before)
    assert not any('running_mean' in k for k in folded.state_dict())
    x = torch.randn(2, 3, 40, 32, dtype=torch.float64)
    assert_close(folded(x), model(x), rtol=1e-9, atol=1e-9)
    assert_close(folded.train()(x), model(x), rtol=1e-9, atol=1e-9)  # nothing depends on the mode any more


def test_reparameterized_network_can_be_trained():
    folded = timm.utils.reparameterize_model(randomise(small('gunn15'))).double()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected, _ = train_step(composite_of(folded), x)
    assert_close(train_step(folded, x)[0], expected, rtol=1e-8, atol=1e-8)


def test_reparameterize_leaves_what_it_cannot_fold():
    model = timm.layers.convert_splitbn_model(small('gunn15', norm_layer='batchnorm2d'), 2).eval()
    folded = timm.utils.reparameterize_model(model)
    x = torch.randn(2, 3, 32, 32)
    assert_close(folded(x), model(x))
    assert folded.state_dict().keys() == model.state_dict().keys()
