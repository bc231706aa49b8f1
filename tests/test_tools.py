"""The plain form of networks, and what other people's tools do with them."""
import copy
import functools
import logging
import warnings

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.utils.prune
from networks import SMALL, small
from reference import randomise
from safetensors.torch import load_file, save_model
from test_layer import CONVERSIONS, make_pair
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from timm_gunn import GunnLayer, unstack_model

ORDERED = [name for name in SMALL if not name.startswith('sunn')]


def network(name, **kwargs):
    """A small network in its plain form, in eval mode."""
    return unstack_model(randomise(small(name, **kwargs))).eval()


def step(model, x):
    """Output and gradient of the input for a random loss, twice."""
    results = []
    for seed in range(2):
        model.zero_grad()
        x = x.detach().requires_grad_()
        y = model(x)
        torch.manual_seed(seed)
        (y * torch.randn_like(y)).sum().backward()
        results += [y.detach(), x.grad]
    return results


def assert_same_steps(model, plain, x):
    """Outputs, gradients and statistics of two steps, in float64; the plain form's go back as its weights would."""
    assert_close(step(plain, x), step(model, x))
    again, grads = copy.deepcopy(model), {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
    assert again.load_state_dict(plain.state_dict()) == ([], [])
    assert_close(dict(again.state_dict()), dict(model.state_dict()))
    with torch.no_grad():
        again.load_state_dict({**plain.state_dict(), **grads})
    for (name, p), q in zip(again.named_parameters(), model.parameters(), strict=True):
        if q.grad is not None:
            assert_close(p.detach(), q.grad, msg=f'gradient of {name}')


@pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
@pytest.mark.parametrize('name', SMALL)
def test_plain_networks(name, training):
    model = randomise(small(name, dtype=torch.float64)).train(training)
    before = copy.deepcopy(model)
    plain = unstack_model(model)
    assert_close(dict(model.state_dict()), dict(before.state_dict()), rtol=0, atol=0)
    assert any(isinstance(m, GunnLayer) for m in plain.modules()) == (name not in ORDERED)
    assert_same_steps(model, plain, torch.randn(2, 3, 32, 32, dtype=torch.float64))


@pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
@pytest.mark.parametrize('conversion', [*CONVERSIONS, 'folded'])
def test_plain_layers(conversion, training):
    """Of two bottlenecks and a projection, with norms of every class, which the units keep."""
    convert = timm.utils.reparameterize_model if conversion == 'folded' else CONVERSIONS[conversion]
    layer, _ = make_pair((12, 3, 2, 2), shortcut=True)
    layer = convert(layer).double().train(training)
    plain = unstack_model(layer)
    kinds = [{type(m) for m in model.modules() if 'Norm' in type(m).__name__} - {type(layer.proj)}
             for model in (layer, plain)]
    assert kinds[0] == kinds[1]
    assert_same_steps(layer, plain, torch.randn(4, 12, 3, 3, dtype=torch.float64))


@pytest.mark.parametrize('options', [
    dict(residual=False), dict(dilation=2), dict(act_layer='gelu'), dict(act_layer=nn.PReLU)],
    ids=str)
def test_plain_layers_with_options(options):
    layer = GunnLayer(12, 3, 3, 2, **options).double()
    assert_same_steps(layer, unstack_model(layer), torch.randn(2, 12, 5, 4, dtype=torch.float64))


def test_what_the_plain_form_keeps():
    """Frozen parameters, modes, formats, and the very model if asked to; a layer that is shared stays so."""
    shared = GunnLayer(12, 3).to(memory_format=torch.channels_last)
    shared.bottlenecks[0].conv1.conv.weight.requires_grad_(False)
    shared.bottlenecks[0].conv2.bn.eval()
    model = nn.Sequential(shared, nn.Sequential(nn.Identity(), shared), GunnLayer(6, 1))
    plain = unstack_model(model, inplace=True)
    assert plain is model
    assert plain[0] is plain[1][1]
    assert type(plain[2]) is GunnLayer  # has no order
    assert {n for n, p in plain.named_parameters() if not p.requires_grad} == {
        f'0.units.{i}.bottlenecks.0.conv1.conv.weight' for i in range(3)}
    assert [n for n, m in plain.named_modules() if not m.training] == [
        f'0.units.{i}.bottlenecks.0.conv2.bn' for i in range(3)]
    assert plain[0].units[1].bottlenecks[0].conv2.conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_what_users_have_done_to_a_layer_in_the_plain_form():
    """Hooks and modules go over; what the plain form would leave out is an error."""
    class Doubled(GunnLayer):
        def forward(self, x):
            return 2 * super().forward(x)

    layer, x, grads = GunnLayer(12, 3).eval(), torch.randn(2, 12, 4, 4, requires_grad=True), []
    layer.age = nn.Linear(12, 1)
    layer.register_forward_hook(lambda module, args, y: 2 * y)
    layer.register_full_backward_hook(lambda *_: grads.append(1))
    plain = unstack_model(layer)
    assert_close(plain(x), layer(x), rtol=1e-4, atol=1e-5)
    plain(x).sum().backward()
    assert grads == [1]
    assert plain.age.weight.shape == (1, 12)
    layer.bottlenecks[0].conv1.conv.register_forward_hook(lambda *_: grads.append(2))
    with warnings.catch_warnings():
        warnings.simplefilter('error')  # the plain form calls them: nothing to warn of
        assert unstack_model(layer, inplace=True) is layer
    layer(x)
    assert grads == [1, 2, 2, 2]
    layer = GunnLayer(12, 3)
    replaced = [GunnLayer(12, 3), GunnLayer(12, 3)]
    replaced[0].forward = replaced[1]._call_impl = lambda x: x
    for odd in (Doubled(12, 3), torch.compile(layer, backend='eager'), *replaced):
        with pytest.raises(TypeError, match=r'GunnLayer itself, got a (Doubled|GunnLayer) that is'):
            unstack_model(nn.Sequential(odd))


def test_plain_weights_of_modules_that_share_one():
    layer = GunnLayer(12, 3, depth=2)
    layer.bottlenecks[1].conv2.conv.weight = layer.bottlenecks[0].conv2.conv.weight
    before = layer.bottlenecks[0].conv2.conv.weight.detach().clone()
    state = unstack_model(layer).state_dict()
    nn.init.zeros_(layer.bottlenecks[0].conv2.conv.weight)
    layer.load_state_dict(state)
    assert_close(layer.bottlenecks[0].conv2.conv.weight, before, rtol=0, atol=0)


@pytest.mark.parametrize('kwargs', [{}, dict(out_indices=(1, 3), output_stride=8)], ids=str)
def test_plain_backbones(kwargs):
    model = randomise(small('gunn18', features_only=True, **kwargs)).eval()
    plain, x = unstack_model(model), torch.randn(2, 3, 64, 64)
    assert_close(plain(x), model(x), rtol=1e-4, atol=1e-4)
    assert plain.feature_info.reduction() == model.feature_info.reduction()
    inside = unstack_model(nn.ModuleDict(dict(encoder=model)))
    assert_close(inside['encoder'](x), plain(x))


def test_plain_weights_are_loaded_by_timm(tmp_path, caplog):
    """By their file, into a classifier and a backbone, also out of a larger network; nothing is missed."""
    source = randomise(small('gunn18'))
    state = {f'backbone.{k}': v for k, v in unstack_model(source).state_dict().items()}
    torch.save(state, tmp_path / 'plain.pth')
    caplog.set_level(logging.INFO, 'timm')
    for kwargs in ({}, dict(features_only=True)):
        model = small('gunn18', pretrained=True, pretrained_cfg_overlay=dict(
            file=str(tmp_path / 'plain.pth'), num_classes=1000), **kwargs)
        assert_close(dict(model.state_dict()), {k: source.state_dict()[k] for k in model.state_dict()})
    assert 'Loaded' in caplog.text
    assert 'stage' not in caplog.text  # no key is missing or unexpected
    del state['backbone.stage1.layer.units.1.bottlenecks.0.conv1.conv.weight']
    model = small('gunn18')
    with pytest.raises(RuntimeError, match=r'size mismatch for stage1\.layer\.bottlenecks\.0\.conv1\.conv\.weight'):
        model.load_state_dict({k.removeprefix('backbone.'): v for k, v in state.items()})


def test_activations_that_share_a_parameter_in_safetensors(tmp_path):
    """As of any network: save_model writes it once."""
    layers = [GunnLayer(12, 3, act_layer=nn.PReLU) for _ in range(2)]
    layers[0].bottlenecks[0].act1.weight.data.fill_(0.5)
    save_model(unstack_model(layers[0]), tmp_path / 'plain.safetensors')
    layers[1].load_state_dict(load_file(tmp_path / 'plain.safetensors'))
    assert_close(*[dict(layer.state_dict()) for layer in layers], rtol=0, atol=0)


def test_plain_form_is_initialised_as_the_stacked_one():
    torch.manual_seed(0)
    plain = unstack_model(timm.create_model('gunn15'))
    plain.init_weights()
    unit = plain.stage2.layer.units[0].bottlenecks[0]
    for conv, fan_in in ((unit.conv1.conv, 300), (unit.conv2.conv, 9 * 24), (unit.conv3.conv, 24)):
        assert conv.weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.1)


def test_plain_form_drops_updates_of_samples_and_segments():
    torch.manual_seed(0)
    plain = unstack_model(GunnLayer(12, 3, drop_path=0.25))
    x = torch.randn(1000, 12, 2, 2)
    dropped = (plain(x) == x).unflatten(1, (3, 4)).flatten(2).all(-1)
    assert dropped.float().mean(0).tolist() == pytest.approx([0.25] * 3, abs=0.05)
    assert (dropped[:, 0] & dropped[:, 1]).float().mean().item() == pytest.approx(0.0625, abs=0.03)
    assert not (plain.eval()(x) == x).flatten(1).all(1).any()


# --- Tools ---

def leaf_calls(model, x):
    """What counters by hooks see: calls of each module with parameters, FLOPs of convolutions, parameters."""
    calls, flops = {}, []

    def hook(module, args, y):
        calls[module] += 1
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            flops.append(2 * y.numel() * module.weight[0].numel())

    for m in model.modules():
        if m._parameters:
            calls[m] = 0
            m.register_forward_hook(hook)
    model(x)
    return set(calls.values()), sum(flops), sum(p.numel() for m in calls for p in m.parameters(recurse=False))


class Convolutions(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.convolution.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize('name', ['gunn18', 'gunn24', 'sunn18'])
def test_counting(name):
    """By operations, as ptflops does; and by hooks in the plain form, as thop, torchinfo and torchsummary do.

    Every leaf once, and FLOPs and parameters in full.
    """
    model = timm.create_model(name, device='meta').eval()
    x = torch.randn(1, 3, *[224 if '18' in name else 32] * 2, device='meta')
    with FlopCounterMode(display=False) as counter:
        model(x)
    with Convolutions() as convolutions:
        model(x)
    plain = unstack_model(model)
    assert convolutions.count == sum(isinstance(m, nn.Conv2d) for m in plain.modules())
    calls, flops, params = leaf_calls(plain, x)
    assert calls == {1}
    assert flops == counter.get_total_flops()
    assert params == sum(p.numel() for p in model.parameters())
    if name == 'gunn18':
        assert params == 28_909_736
        assert flops / 2e9 == pytest.approx(7.75, abs=0.005)


@pytest.mark.parametrize('name', ['gunn15', 'gunn18', 'sunn18'])
def test_symbolic_trace(name):
    """By torch.fx alone, to the last convolution."""
    model = network(name)
    graph = torch.fx.symbolic_trace(model)
    x = torch.randn(2, 3, 64, 64)
    assert_close(graph(x), model(x))
    called = [n.target for n in graph.graph.nodes if n.op == 'call_module']
    for conv in (n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)):
        assert called.count(conv) == 1, conv


@pytest.mark.parametrize('name', ['gunn15', 'gunn15_nores', 'sunn15'])
@pytest.mark.filterwarnings('ignore')  # torch.ao is deprecated in favour of torchao
def test_fx_quantization(name):
    fx = pytest.importorskip('torch.ao.quantization.quantize_fx', reason='this torch is without FX quantization')
    model, x = network(name), torch.randn(4, 3, 32, 32)
    mapping = torch.ao.quantization.get_default_qconfig_mapping('x86')
    if name in ORDERED:
        with pytest.warns(UserWarning, match='an ordered layer is not quantised; make plain modules'):
            fx.prepare_fx(small(name).eval(), mapping, (x,))
    prepared = fx.prepare_fx(model, mapping, (x,))
    prepared(x)
    quantized = fx.convert_fx(prepared)
    kinds = [type(m).__module__ for m in quantized.modules()]
    assert not [m for m in quantized.modules() if type(m) is nn.Conv2d]
    assert sum('quantized.modules.conv' in k or 'intrinsic.quantized' in k for k in kinds) == sum(
        isinstance(m, nn.Conv2d) for m in model.modules())
    assert (quantized(x) - model(x)).norm() < 0.2 * model(x).norm()


@pytest.mark.parametrize('name', ['gunn15', 'gunn18', 'sunn15'])
@pytest.mark.filterwarnings('ignore')  # of the exporter's own making
def test_onnx_has_constant_weights_without_norms(name, tmp_path):
    """By the default exporter; what onnxruntime makes int8 of it, every convolution's weight, runs."""
    import onnx
    from onnxruntime import InferenceSession
    from onnxruntime.quantization import CalibrationDataReader, quantize_static
    sizes = dict(channels=(8, 12, 16, 20)[:4 if '18' in name else 3], segments=(2, 3, 2, 1)[:4 if '18' in name else 3])
    model = network(name, **sizes)
    x, path = torch.randn(2, 3, 64, 64), str(tmp_path / 'model.onnx')
    torch.onnx.export(model, (x,), path, input_names=['x'], verbose=False)
    graph = onnx.load(path).graph
    constants = {t.name for t in graph.initializer}
    convs = [n for n in graph.node if n.op_type == 'Conv']
    assert len(convs) == sum(isinstance(m, nn.Conv2d) for m in model.modules())
    assert all(t in constants for n in convs for t in n.input[1:])
    assert {n.op_type for n in graph.node} <= {
        'Conv', 'Relu', 'Add', 'Concat', 'Split', 'AveragePool', 'MaxPool', 'ReduceMean', 'GlobalAveragePool',
        'Reshape', 'Flatten', 'Gemm'}
    y, = InferenceSession(path).run(None, {'x': x.numpy()})
    assert (torch.from_numpy(y) - model(x)).norm() < 1e-5 * model(x).norm()

    class Reader(CalibrationDataReader):
        data = iter([{'x': x.numpy()}])

        def get_next(self):
            return next(self.data, None)

    quantize_static(path, path + '.int8', Reader())
    quantized = onnx.load(path + '.int8').graph
    kinds = {t.name: t.data_type for t in quantized.initializer}
    scaled = {n.output[0]: n.input[0] for n in quantized.node if n.op_type == 'DequantizeLinear'}
    weights = [scaled[n.input[1]] for n in quantized.node if n.op_type == 'Conv']
    assert len(weights) == len(convs)
    assert {kinds[w] for w in weights} == {onnx.TensorProto.INT8}
    y, = InferenceSession(path + '.int8').run(None, {'x': x.numpy()})
    assert (torch.from_numpy(y) - model(x)).norm() < 0.2 * model(x).norm()


@pytest.mark.filterwarnings('ignore:.*torch.jit')
def test_other_exports_of_the_plain_form():
    """Scripted, traced, exported and compiled, in one graph of convolutions with parameters as they are."""
    model, x = network('gunn15'), torch.randn(2, 3, 32, 32)
    exported = torch.export.export(model, (x,), dynamic_shapes=[{0: torch.export.Dim.DYNAMIC}])
    state = dict(model.state_dict())
    convs = [n for n in exported.graph.nodes if 'conv2d' in str(n.target)]
    assert {exported.graph_signature.inputs_to_parameters[n.args[1].name] for n in convs} == {
        k for k, v in state.items() if v.ndim == 4}
    compiled = torch.compile(model, backend='aot_eager', fullgraph=True)
    for form in (exported.module(), torch.jit.script(model), torch.jit.trace(model, x), compiled):
        assert_close(form(x), model(x), rtol=1e-4, atol=1e-4)


MODIFICATIONS = {
    'structured pruning': (
        lambda conv: nn.utils.prune.ln_structured(conv, 'weight', 0.5, 2, 0),
        lambda conv: nn.utils.prune.remove(conv, 'weight')),
    'weight norm': (
        nn.utils.parametrizations.weight_norm, lambda c: nn.utils.parametrize.remove_parametrizations(c, 'weight')),
}


@pytest.mark.parametrize('kind', MODIFICATIONS)
def test_modified_convolutions(kind):
    """Of all convolutions; they train, and what they have become goes back into the stacked network."""
    modify, settle = MODIFICATIONS[kind]
    model, x = network('gunn15'), torch.randn(2, 3, 32, 32)
    before = model(x)
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    for conv in convs:
        modify(conv)
    changed = model(x)
    assert torch.allclose(changed, before, rtol=1e-3) == (kind == 'weight norm')
    changed.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    for conv in convs:
        settle(conv)
    assert_close(model(x), changed)
    stacked = small('gunn15').eval()
    stacked.load_state_dict(model.state_dict())
    assert_close(stacked(x), changed, rtol=1e-3, atol=1e-4)


def test_replaced_convolutions():
    """As low-rank adapters and quantisers wrap them, module by module."""

    class Wrapped(nn.Module):
        def __init__(self, conv):
            super().__init__()
            self.conv, self.down, self.up = conv, nn.Conv2d(
                conv.in_channels, 2, conv.kernel_size, conv.stride, conv.padding, bias=False), nn.Conv2d(
                2, conv.out_channels, 1, bias=False)
            nn.init.zeros_(self.up.weight)

        def forward(self, x):
            return self.conv(x) + self.up(self.down(x))

    model, x = network('gunn15'), torch.randn(2, 3, 32, 32)
    before = model(x)
    for path, conv in [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]:
        model.set_submodule(path, Wrapped(conv))
    assert_close(model(x), before)
    model(x).sum().backward()
    assert all(m.up.weight.grad is not None for m in model.modules() if isinstance(m, Wrapped))


def offload(module):
    """As accelerate does it, replace forward by one for whose time alone the tensors are there."""
    tensors, forward = [*module.parameters(), *module.buffers()], module.forward
    kept = [t.data for t in tensors]

    def run(x):
        for t, data in zip(tensors, kept, strict=True):
            t.data = data
        y = forward(x)
        for t in tensors:
            t.data = t.new_empty(0)
        return y

    module.forward = run


@pytest.mark.parametrize('stacked', [False, True])
def test_offloading(stacked):
    """Module by module in the plain form, layers as a whole in the stacked one."""
    model = randomise(small('gunn15')).eval() if stacked else network('gunn15')
    x = torch.randn(2, 3, 32, 32)
    expected = model(x)
    offloaded = [m for m in model.modules() if (isinstance(m, GunnLayer) if stacked else m._parameters)]
    for m in offloaded:
        offload(m)
    with torch.no_grad():
        assert_close(model(x), expected)
    assert sum(p.numel() for m in offloaded for p in m.parameters()) == 0


@pytest.mark.parametrize('name', ['gunn15', 'sunn15'])
def test_selective_checkpointing(name):
    """Gradients are those of a step without; stages of ours do not count a batch twice."""
    policies = {
        'products': lambda ctx, op, *args, **kwargs: CheckpointPolicy.MUST_SAVE
        if 'conv' in str(op) else CheckpointPolicy.PREFER_RECOMPUTE,
        'listed': [torch.ops.aten.mm.default, torch.ops.aten.clone.default]}
    for policy in policies.values():
        model = small(name).double()
        other, x = copy.deepcopy(model), torch.randn(2, 3, 32, 32, dtype=torch.float64)
        y = checkpoint(model, x, use_reentrant=False, context_fn=functools.partial(
            create_selective_checkpoint_contexts, policy))
        y.square().sum().backward()
        other(x).square().sum().backward()
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            assert_close(p.grad, q.grad)
        assert_close(dict(model.stage2.named_buffers()), dict(other.stage2.named_buffers()))


@pytest.mark.parametrize('name', ['gunn15', 'gunn18', 'sunn15'])
def test_scripting_a_folded_network(name):
    """As validate.py --reparam --torchscript does."""
    model, x = randomise(small(name)).eval(), torch.randn(2, 3, 32, 32)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # torch.jit is deprecated
        scripted = torch.jit.script(timm.utils.reparameterize_model(model))
    assert (scripted(x) - model(x)).norm() < 1e-4 * model(x).norm()


@pytest.fixture
def process_group():
    torch.distributed.init_process_group('gloo', store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize('kind', [nn.BatchNorm2d, nn.Conv2d, GunnLayer], ids=lambda c: c.__name__)
def test_fully_shard(process_group, kind):
    """Layers as a whole, and anything in the plain form; of stacked convolutions and norms an error says so."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    model = small('gunn15', dtype=torch.float64)
    x, mesh = torch.randn(2, 3, 16, 16, dtype=torch.float64), init_device_mesh('cpu', (1,))
    expected = step(copy.deepcopy(model), x)
    for sharded in (model, unstack_model(model)):
        for m in [*sharded.modules()]:
            if isinstance(m, kind):
                fully_shard(m, mesh=mesh)
        if sharded is model and kind is not GunnLayer:
            with pytest.raises(TypeError, match=rf'cannot stand for .*FSDP{kind.__name__}.*unstack_model'):
                sharded(x)
        else:
            assert_close(step(sharded, x), expected)


@pytest.mark.parametrize('name', ['gunn15', 'gunn15 stacked', 'sunn15'])
@pytest.mark.filterwarnings('ignore')  # FSDP1 is deprecated
def test_fsdp1(process_group, name):
    """Layers as a whole; with MixedPrecision, which wraps every norm, the plain form alone."""
    from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy
    model = randomise(small('gunn15')).eval() if 'stacked' in name else network(name)
    x = torch.randn(2, 3, 32, 32)
    for precision in (None, MixedPrecision(*[torch.bfloat16] * 3)):
        sharded = FullyShardedDataParallel(
            copy.deepcopy(model), auto_wrap_policy=ModuleWrapPolicy({GunnLayer, nn.Sequential}),
            mixed_precision=precision, device_id=torch.device('cpu'), use_orig_params=True)
        if precision and 'stacked' in name:
            with pytest.raises(TypeError, match=r'cannot stand for .*FullySharded.*unstack_model'):
                sharded(x)
        else:
            y = sharded(x)
            assert (y - model(x)).norm() < (0.05 if precision else 1e-6) * y.norm()
            y.sum().backward()
            assert all(p.grad is not None for p in sharded.parameters())
