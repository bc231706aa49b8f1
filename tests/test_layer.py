"""GunnLayer against one module per unit: values, gradients and norm state in float64, for every norm it admits."""
import copy
import functools
import math
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm.layers
import torch
import torch.nn as nn
import torch.nn.utils.prune
from reference import ReferenceLayer, randomise
from timm.layers.norm_act import FrozenBatchNormAct2d
from torch.testing import assert_close

import timm_gunn.layer
from timm_gunn import GunnLayer, unstack_model
from timm_gunn.layer import Bottleneck

# n, p, k, m
SIZES = [(12, 3, 2, 1), (12, 4, 1, 2), (8, 8, 3, 1), (10, 1, 2, 2), (6, 2, 2, 3)]


@pytest.fixture(autouse=True, params=['fused', 'composite'])
def path(request, monkeypatch):
    """Everything here holds for both ways of computing an ordered layer."""
    if request.param == 'composite':
        monkeypatch.setattr(timm_gunn.layer, 'obstacle', lambda layer, x: 'the composite is meant')


class OtherFrozenBatchNorm2d(nn.Module):
    """A frozen norm of some other library: buffers of the usual names, arithmetic of its own."""

    def __init__(self, num_features):
        super().__init__()
        for name, value in dict(weight=1., bias=0., running_mean=0., running_var=1.).items():
            self.register_buffer(name, torch.full((num_features,), value))

    def forward(self, x):
        scale = (self.weight / (self.running_var + 1e-5).sqrt())[:, None, None]
        return (x - self.running_mean[:, None, None]) * scale + self.bias[:, None, None]


def to_frozen(norm):
    def convert(module):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                new = norm(child.num_features).to(child.weight)
                new.load_state_dict({k: v for k, v in child.state_dict().items() if k != 'num_batches_tracked'})
                setattr(module, name, new)
            else:
                convert(child)
        return module
    return convert


def set_norms(**attributes):
    def convert(module):
        for m in module.modules():
            if isinstance(m, nn.BatchNorm2d):
                for k, v in attributes.items():
                    setattr(m, k, v)
        return module
    return convert


# How a user's code may change the norms of a finished layer.
CONVERSIONS = {
    'plain': lambda m: m,
    'momentum': set_norms(momentum=0.3, eps=1e-3),
    'cumulative': set_norms(momentum=None),
    'batch statistics only': set_norms(track_running_stats=False),
    'frozen by timm': timm.layers.freeze_batch_norm_2d,
    'unfrozen by timm': lambda m: timm.layers.unfreeze_batch_norm_2d(timm.layers.freeze_batch_norm_2d(m)).double(),
    "timm's frozen norm": to_frozen(functools.partial(FrozenBatchNormAct2d, apply_act=False)),
    'frozen by another library': to_frozen(OtherFrozenBatchNorm2d),
    'synchronised': nn.SyncBatchNorm.convert_sync_batchnorm,
    'synchronised by timm': timm.layers.convert_sync_batchnorm,
    'split': lambda m: timm.layers.convert_splitbn_model(m, 2).double(),
}


def make_pair(size=(12, 3, 2, 1), conversion=CONVERSIONS['plain'], norm=nn.BatchNorm2d, **kwargs):
    """A GunnLayer with random norm parameters and statistics, and the reference with the same, in float64."""
    torch.manual_seed(0)
    layer = GunnLayer(*size, norm_layer=norm, **kwargs).double()
    randomise(layer)
    ref = ReferenceLayer(*size, norm=norm, **kwargs).double()
    ref.load_stacked(layer.state_dict())
    return conversion(layer).double(), conversion(ref).double()


def assert_same(layer, ref, x, steps=2):
    """Outputs, gradients of the input and of all parameters, and buffers agree over some steps and one in no_grad."""
    w = torch.randn_like(x)
    for _ in range(steps):
        x_pt, x_ref = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, y_ref = layer(x_pt), ref(x_ref)
        (y * w).sum().backward()
        (y_ref * w).sum().backward()
        assert_close(y, y_ref, rtol=1e-10, atol=1e-10)
        assert_close(x_pt.grad, x_ref.grad, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        assert_close(layer(x), ref(x), rtol=1e-10, atol=1e-10)
    for name, p in layer.named_parameters():
        if p.grad is None:  # an auxiliary norm in eval mode
            assert all(dict(u.named_parameters())[name].grad is None for u in ref.members)
        else:
            assert_close(p.grad, ref.stacked(name, lambda t: t.grad), rtol=1e-9, atol=1e-9, msg=f'gradient of {name}')
    for name, b in layer.named_buffers():
        assert_close(b, ref.stacked(name), rtol=1e-10, atol=1e-10, msg=f'buffer {name}')


@pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
@pytest.mark.parametrize('options', [
    dict(), dict(shortcut=True), dict(residual=False), dict(ordered=False), dict(ordered=False, shortcut=True),
    dict(dilation=2), dict(shortcut=True, residual=False),
], ids=lambda o: '-'.join(f'{k}={v}' for k, v in o.items()) or 'default')
@pytest.mark.parametrize('size', SIZES, ids=str)
def test_equals_separate_units(size, options, training):
    layer, ref = make_pair(size, **options)
    layer.train(training)
    ref.train(training)
    assert_same(layer, ref, torch.randn(3, size[0], 5, 4, dtype=torch.float64))


@pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
@pytest.mark.parametrize('ordered', [True, False], ids=['gunn', 'sunn'])
@pytest.mark.parametrize('conversion', CONVERSIONS)
def test_norms_equal_separate_norms(conversion, ordered, training):
    layer, ref = make_pair((12, 3, 2, 2), CONVERSIONS[conversion], ordered=ordered, shortcut=True)
    layer.train(training)
    ref.train(training)
    assert_same(layer, ref, torch.randn(4, 12, 3, 3, dtype=torch.float64), steps=3)


@pytest.mark.parametrize('kwargs', [
    dict(affine=False), dict(track_running_stats=False), dict(affine=False, track_running_stats=False)], ids=str)
def test_norms_without_parameters_or_statistics(kwargs):
    def norm(channels, **dd):
        return nn.BatchNorm2d(channels, **kwargs, **dd)

    layer, ref = make_pair(norm=norm)
    assert_same(layer, ref, torch.randn(3, 12, 3, 3, dtype=torch.float64))


def test_norms_frozen_mid_training():
    """Norms in eval mode inside a layer in train mode, as detection code sets them."""
    layer, ref = make_pair()
    for module in (layer, ref):
        for m in module.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.eval()
    assert_same(layer, ref, torch.randn(1, 12, 3, 3, dtype=torch.float64))


@pytest.mark.parametrize('norm', [
    'groupnorm', 'layernorm2d', nn.InstanceNorm2d, lambda c, **dd: nn.GroupNorm(2, c, **dd),
    lambda c, **dd: nn.InstanceNorm2d(c, affine=True, track_running_stats=True, **dd), nn.BatchNorm1d, nn.BatchNorm3d,
    lambda c, **dd: nn.LazyBatchNorm2d(**dd)])
@pytest.mark.parametrize('ordered', [True, False])
def test_unsupported_norm(norm, ordered):
    with pytest.raises(TypeError, match=r'norm of the BatchNorm family, got (Group|Layer|Instance|(Lazy)?Batch)Norm'):
        GunnLayer(64, 2, ordered=ordered, norm_layer=norm)


class OddNorm(OtherFrozenBatchNorm2d):
    def __init__(self, num_features):
        super().__init__(num_features)
        self.mixing = nn.Parameter(torch.eye(num_features))


class OddBottleneck(Bottleneck):
    pass


def replace_forward(module):
    module.forward = lambda x: x
    return module


def replace_call(module):
    module._call_impl = lambda x: x
    return module


def to_mkldnn(module):
    from torch.utils import mkldnn  # warns that torch.jit is deprecated
    return mkldnn.to_mkldnn(module)


def prune(module):
    return nn.utils.prune.random_unstructured(module, 'weight', 0.5)


# What a user's code may do to a module of an ordered layer, and what is then run no more.
CHANGES = {
    'other norm': ('conv2.bn', lambda m: nn.GroupNorm(2, 24), 'GroupNorm'),
    'odd norm': ('conv2.bn', lambda m: OddNorm(24), 'OddNorm of mixing'),
    'parametrised norm': ('conv2.bn', nn.utils.parametrizations.weight_norm, 'ParametrizedBatchNorm2d'),
    'pruned norm': ('conv2.bn', prune, 'BatchNorm2d of bias, weight_orig'),
    'norm with another forward': ('conv2.bn', replace_forward, 'a BatchNorm2d whose forward is replaced'),
    'wrapped convolution': ('conv1.conv', nn.Sequential, 'a ConvNorm of Sequential'),
    'subclass': ('conv1.conv', lambda m: timm.layers.StdConv2d(12, 24, 1), 'StdConv2d'),
    'scripted convolution': ('conv1.conv', torch.jit.script, 'RecursiveScriptModule'),
    'mkldnn convolution': ('conv1.conv', to_mkldnn, 'MkldnnConv2d'),
    'parametrised convolution': ('conv1.conv', nn.utils.parametrizations.weight_norm, 'ParametrizedConv2d'),
    'padding': ('conv2.conv', lambda m: nn.Conv2d(24, 24, 3, padding=1, padding_mode='reflect', groups=3), 'reflect'),
    'pruned convolution': ('conv2.conv', prune, 'weight_orig'),
    'spectral norm': ('conv2.conv', nn.utils.spectral_norm, 'weight_orig'),
    'weight norm': ('conv2.conv', nn.utils.weight_norm, 'weight_g'),
    'convolution with another forward': ('conv1.conv', replace_forward, 'a Conv2d whose forward is replaced'),
    'convolution with another call, as by nncf': ('conv1.conv', replace_call, 'a Conv2d whose forward is replaced'),
    'bottleneck with another forward': ('', replace_forward, 'a Bottleneck whose forward is replaced'),
    'other bottleneck': ('', lambda m: OddBottleneck(12, 24, 3), 'OddBottleneck'),
    'wrapped bottleneck': ('', nn.Sequential, 'a Sequential'),
    'wrapped convolution and norm': ('conv3', nn.Sequential, 'a Sequential'),
    'wider convolution': ('conv1.conv', lambda m: nn.Conv2d(12, 30, 1), r'Conv2d\(12, 30'),
    'wider norm': ('conv1.bn', lambda m: nn.BatchNorm2d(30), 'BatchNorm2d'),
}


def change(module, where, how):
    parent, _, name = where.rpartition('.')
    parent = module.get_submodule(parent)
    setattr(parent, name, how(parent.get_submodule(name)))


@pytest.mark.parametrize('name', CHANGES)
@pytest.mark.filterwarnings('ignore:.*weight_norm. is deprecated', 'ignore:.*torch.jit')
def test_modules_that_are_more_than_their_slices(name):
    """One error, which names the plain form."""
    where, how, what = CHANGES[name]
    layer = GunnLayer(12, 3)
    change(layer, f'bottlenecks.0.{where}'.strip('.'), how)
    for run in (layer, unstack_model, torch.jit.script):
        with pytest.raises(TypeError, match=rf'slices.* cannot stand for .*{what}.*timm_gunn\.unstack_model\(model\)'):
            run(torch.randn(2, 12, 3, 3) if run is layer else layer)


@pytest.mark.parametrize('hook', [
    lambda conv: nn.utils.prune.l1_unstructured(conv, 'weight', 0.5), nn.utils.spectral_norm, nn.utils.weight_norm])
@pytest.mark.filterwarnings('ignore:.*weight_norm. is deprecated')
def test_weights_made_by_a_hook_without_an_order(hook):
    """The modules run as they are, and are left with their norms."""
    layer, x = GunnLayer(12, 3, ordered=False), torch.randn(2, 12, 3, 3)
    conv = layer.bottlenecks[0].conv2.conv
    hook(conv)
    layer(x).sum().backward()
    assert list(conv.parameters())
    assert all(p.grad is not None for p in conv.parameters())
    y = layer.eval()(x)
    assert_close(timm.utils.reparameterize_model(layer, inplace=True)(x), y)


@pytest.mark.parametrize('module', ['bottlenecks.0', 'bottlenecks.0.conv1', 'bottlenecks.0.conv2.conv', 'proj.bn'])
def test_hooks_that_cannot_run(module):
    """A warning, since most only look on, as those of fvcore do; their results are the same."""
    torch.manual_seed(0)
    layer, x = GunnLayer(12, 3, shortcut=True), torch.randn(2, 12, 3, 3)
    y = layer(x)
    handle = layer.get_submodule(module).register_forward_hook(lambda *_: None)
    torch._dynamo.reset()
    for run in (layer, torch.compile(layer, backend='eager', fullgraph=True)):
        with pytest.warns(UserWarning, match=r'hooks .* are not called.*timm_gunn\.unstack_model'):
            assert_close(run(x), y)
    handle.remove()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        layer(x)


def test_norms_that_do_not_count_batches():
    """As torch allows."""
    for momentum in (0.1, None):
        layer, ref = (set_norms(num_batches_tracked=None, momentum=momentum)(m) for m in make_pair())
        assert_same(layer, ref, torch.randn(3, 12, 3, 3, dtype=torch.float64))


def test_norms_with_counters_of_others():
    """As thop registers them, for the time of its counting."""
    layer, ref = make_pair(conversion=CONVERSIONS['synchronised'])
    x = torch.randn(3, 12, 3, 3, dtype=torch.float64)
    y = ref(x)
    for norm in layer.modules():
        if isinstance(norm, nn.SyncBatchNorm):
            norm.register_buffer('total_ops', torch.zeros(1))
    assert_close(layer(x), y)


@pytest.mark.parametrize(('args', 'kwargs', 'message'), [
    ((12, 5), {}, "divisible.*'channels': 12, 'segments': 5"),
    ((0, 1), {}, "at least 1.*'channels': 0"),
    ((12, 0), {}, "at least 1.*'segments': 0"),
    ((12, -3), {}, "at least 1.*'segments': -3"),
    ((12, 3, 0), {}, "at least 1.*'expansion': 0"),
    ((12, 3, 2, 0), {}, "at least 1.*'depth': 0"),
    ((12, 3), dict(dilation=0), "at least 1.*'dilation': 0"),
    ((12, 3), dict(drop_path=1.0), r'drop_path must be in \[0, 1\).*got 1.0'),
    ((12, 3), dict(drop_path=0.1, residual=False), '0 with residual=False.*got 0.1'),
])
def test_bad_arguments(args, kwargs, message):
    with pytest.raises(ValueError, match=message):
        GunnLayer(*args, **kwargs)


@pytest.mark.parametrize('channels', [11, 13, 24])
def test_wrong_channel_count(channels):
    with pytest.raises(ValueError, match=rf'expected an input \(B, 12, H, W\), got \[2, {channels}, 4, 4\]'):
        GunnLayer(12, 3)(torch.randn(2, channels, 4, 4))
    with pytest.raises(ValueError, match=r'\(B, 12, H, W\), got \[12, 4, 4\]'):
        GunnLayer(12, 3)(torch.randn(12, 4, 4))
    for layer in (GunnLayer(12, 3, ordered=False), unstack_model(GunnLayer(12, 3))):  # their convolutions say so
        with pytest.raises(RuntimeError, match='12 channels'):
            layer(torch.randn(2, channels, 4, 4))


@pytest.mark.filterwarnings('ignore:.*torch.jit')
def test_torchscript():
    layer = GunnLayer(12, 3, drop_path=0.5, shortcut=True)
    scripted = torch.jit.script(copy.deepcopy(layer))
    x = torch.randn(50, 12, 2, 2)
    dropped = (scripted(x) == x).view(50, 3, 4, 4).all(-1).all(-1)
    assert 0.3 < dropped.float().mean() < 0.7
    layer.load_state_dict(scripted.state_dict())
    assert_close(scripted.eval()(x), layer.eval()(x), rtol=1e-4, atol=1e-5)
    for conversion in ('frozen by timm', 'split', 'synchronised'):
        with pytest.raises(TypeError, match=r'TorchScript takes nn\.BatchNorm2d alone'):
            torch.jit.script(CONVERSIONS[conversion](copy.deepcopy(layer)))
    with pytest.raises(TypeError, match=r'TorchScript takes nn\.BatchNorm2d alone.*BatchNormAct2d'):
        torch.jit.script(GunnLayer(12, 3, norm_layer=timm.layers.BatchNormAct2d))
    layer.proj.bn.track_running_stats = False
    with pytest.raises(TypeError, match=r'TorchScript takes nn\.BatchNorm2d alone.*track_running_stats=False'):
        torch.jit.script(layer)


@pytest.mark.parametrize('conversion', ['frozen by timm', 'split', 'synchronised', 'batch statistics only'])
@pytest.mark.filterwarnings('ignore:.*torch.jit', 'ignore::torch.jit.TracerWarning')
def test_norms_in_traces_and_threads(conversion):
    """No norm is changed on the way, not even for the time of a call."""
    torch.manual_seed(0)
    layer, x = CONVERSIONS[conversion](GunnLayer(12, 3).double()).eval(), torch.randn(2, 12, 4, 4, dtype=torch.float64)
    y = layer(x)
    assert_close(torch.jit.trace(layer, x)(x), y)
    with ThreadPoolExecutor(4) as pool:
        for z in pool.map(layer, [x] * 40):
            assert_close(z, y)


def test_symbolic_trace_of_the_layer_itself():
    with pytest.raises(TypeError, match=r'as a part of another module, or unstack_model\(it\)'):
        torch.fx.symbolic_trace(GunnLayer(12, 3))


def test_the_order_is_all_that_differs():
    gunn, sunn = GunnLayer(12, 3).eval(), GunnLayer(12, 3, ordered=False).eval()
    gunn.load_state_dict(sunn.state_dict(), strict=True)
    sunn.load_state_dict(gunn.state_dict(), strict=True)
    x = torch.randn(2, 12, 5, 5)
    y, z = gunn(x), sunn(x)
    assert_close(y[:, :4], z[:, :4])  # the first unit reads x in both
    assert not torch.allclose(y[:, 4:8], z[:, 4:8])
    assert not torch.allclose(y[:, 8:], z[:, 8:])
    gunn.ordered = False
    assert_close(gunn(x), z, rtol=0, atol=0)


@pytest.mark.parametrize('shortcut', [True, False])
def test_initialisation_at_fan_in_scale(shortcut):
    torch.manual_seed(0)
    layer = GunnLayer(256, 4, 2, 2, shortcut=shortcut)  # o = 64, e = 128
    fan_in = {
        'bottlenecks.0.conv1': 256, 'bottlenecks.1.conv1': 64, 'conv2': 9 * 128, 'conv3': 128, 'proj': 256}
    convs = {n.removesuffix('.conv'): m for n, m in layer.named_modules() if isinstance(m, nn.Conv2d)}
    assert len(convs) == 6 + shortcut
    for name, conv in convs.items():
        expected = math.sqrt(2 / next(v for k, v in fan_in.items() if name.endswith(k)))
        assert conv.weight.std().item() == pytest.approx(expected, rel=0.03), name
        assert conv.weight.mean().item() == pytest.approx(0, abs=0.03 * expected), name
        assert conv.bias is None
    for norm in layer.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for name, t in norm.state_dict().items():
                assert (t == (name in ('weight', 'running_var'))).all(), name


@pytest.mark.parametrize('convert', [lambda m: m.eval(), timm.layers.freeze_batch_norm_2d])
def test_fresh_layer_with_fixed_statistics_is_well_scaled(convert):
    """At the scale of the paper's code it would overflow: a unit's convolutions amplify, and each reads the last's."""
    torch.manual_seed(0)
    y = convert(GunnLayer(2000, 50))(torch.randn(1, 2000, 4, 4))
    assert 1 < y.std().item() < 10


@pytest.mark.parametrize('ordered', [True, False])
def test_drop_path_drops_updates_of_samples_and_segments(ordered):
    torch.manual_seed(0)
    layer = GunnLayer(12, 3, ordered=ordered, drop_path=0.25)
    same = GunnLayer(12, 3, ordered=ordered)
    same.load_state_dict(layer.state_dict())
    x = torch.randn(1000, 12, 2, 2)
    update = (layer(x) - x).unflatten(1, (3, 4)).flatten(2)  # sample, segment, values
    dropped = (update == 0).all(-1)
    assert not (update[~dropped] == 0).any()
    assert dropped.float().mean(0).tolist() == pytest.approx([0.25] * 3, abs=0.05)
    # Segments are dropped independently of each other.
    assert (dropped[:, 0] & dropped[:, 1]).float().mean().item() == pytest.approx(0.0625, abs=0.03)
    # What is kept is scaled, so that the first unit's expected update is that of the layer without dropping.
    kept = ~dropped[:, 0]
    assert_close(update[kept, 0] * 0.75, (same(x) - x)[:, :4].flatten(1)[kept], rtol=1e-4, atol=1e-5)
    same.load_state_dict(layer.state_dict())
    expected = same.eval()(x)
    assert_close(layer.eval()(x), expected)
    layer.drop_path.train()  # samples of networks in eval mode
    assert (layer(x) == x).any()
    layer.drop_path = nn.Identity()
    assert_close(layer(x), expected)


def low_precision_errors(layer, ref, x, run):
    """Largest errors of layer and reference, as `run` computes them, against the reference in float64."""
    exact = copy.deepcopy(ref).double()(x.double())
    return [(run(m, x).double() - exact).abs().max().item() for m in (layer, ref)]


@pytest.mark.parametrize('ordered', [True, False])
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(('device', 'dtype'), [
    ('cpu', torch.float32), ('cpu', torch.bfloat16), pytest.param('cuda', torch.bfloat16, marks=pytest.mark.gpu),
    pytest.param('cuda', torch.float16, marks=pytest.mark.gpu)])
def test_dtype_and_memory_format_are_kept(ordered, memory_format, device, dtype):
    layer, ref = make_pair((16, 4, 2, 2), ordered=ordered, shortcut=True)
    layer, ref = layer.to(device, dtype, memory_format=memory_format), ref.to(device, dtype)
    x = torch.randn(4, 16, 6, 6, device=device, dtype=dtype).to(memory_format=memory_format)
    y = layer(x)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=memory_format)
    error, error_ref = low_precision_errors(layer, ref, x, lambda m, x: m(x))
    assert error <= 2 * error_ref + 1e-6


@pytest.mark.parametrize(('device', 'dtype'), [
    ('cpu', torch.bfloat16), pytest.param('cuda', torch.bfloat16, marks=pytest.mark.gpu),
    pytest.param('cuda', torch.float16, marks=pytest.mark.gpu)])
@pytest.mark.parametrize('ordered', [True, False])
def test_autocast(ordered, device, dtype):
    layer, ref = make_pair((16, 4, 2, 2), ordered=ordered, shortcut=True)
    layer, ref = layer.float().to(device), ref.float().to(device)
    x = torch.randn(4, 16, 6, 6, device=device)

    def run(module, x):
        with torch.autocast(device, dtype):
            return module(x)

    error, error_ref = low_precision_errors(layer, ref, x, run)
    assert 1e-4 < error <= 2 * error_ref  # below, it would not have run in low precision
    run(layer, x).float().square().sum().backward()
    assert {p.grad.dtype for p in layer.parameters()} == {torch.float32}


@pytest.mark.parametrize('act', ['gelu', nn.SiLU, nn.PReLU])
def test_act_layer(act):
    layer = GunnLayer(12, 3, act_layer=act)
    kind = type(layer.bottlenecks[0].act1)
    assert not isinstance(layer.bottlenecks[0].act1, nn.ReLU)
    ref = ReferenceLayer(12, 3, act=kind if kind is not timm.layers.GELU else nn.GELU)
    ref.load_state_dict(
        {f'members.{i}.{k.replace("act1", "act")}': v.chunk(3)[i] if v.ndim and 'act' not in k else v
         for i in range(3) for k, v in layer.state_dict().items() if 'act2' not in k})
    x = torch.randn(2, 12, 4, 4)
    assert_close(layer(x), ref(x), rtol=1e-4, atol=1e-5)
