"""The fused operator against one module per unit and against the layer's own composite of modules."""
import copy
import logging
import os
import random

import pytest
import timm
import torch
import torch.nn as nn
from networks import composite_of, saved_bytes
from test_layer import assert_same, make_pair
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import timm_gunn.convs
import timm_gunn.ops
import timm_gunn.ordered
from timm_gunn import Gunn, GunnLayer, unstack_model
from timm_gunn.checks import obstacle

INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'  # in the process of test_triton_norm.py
FORMATS = {'contiguous': torch.contiguous_format, 'channels_last': torch.channels_last}


def make_layer(*size, **kwargs):
    """A layer with random norm parameters."""
    layer = GunnLayer(*size, **kwargs)
    for p in layer.parameters():
        if p.ndim == 1:
            nn.init.uniform_(p, 0.5, 1.5)
    return layer


def run(layer, x, w=None, **autocast):
    """Output, gradient of the input and gradients of the parameters for the loss (w * layer(x)).sum()."""
    layer.zero_grad()
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    with torch.autocast(x.device.type, **autocast) if autocast else torch.enable_grad():
        y = layer(x)
    (y * (torch.ones_like(y) if w is None else w)).sum().backward()
    return [y.detach(), x.grad, *[p.grad for p in layer.parameters()]]


def both_paths(layer, *args, **kwargs):
    return run(layer, *args, **kwargs), run(composite_of(layer), *args, **kwargs)


def set_blocks(monkeypatch, columns):
    for name in ('FORWARD_BLOCK', 'BACKWARD_BLOCK', 'CUDA_BLOCK'):
        monkeypatch.setattr(timm_gunn.ordered, name, columns)


@pytest.fixture(params=['library', 'aligned', *(['triton'] if INTERPRETED else [])])
def norm_kernels(request, monkeypatch):
    """All implementations of the norms, and the columns that are added on CUDA devices, on the CPU."""
    if request.param == 'triton':
        from timm_gunn.triton_norm import TritonNorm
        monkeypatch.setattr(timm_gunn.convs, 'norm_class', lambda weight: TritonNorm)
    if request.param != 'library':
        monkeypatch.setitem(timm_gunn.ordered.ALIGNED, 'cpu', 8)


@pytest.mark.parametrize('seed', range(40))
def test_random_layers(seed, norm_kernels, monkeypatch):
    rng = random.Random(seed)
    segments = rng.choice([2, 3, 5, 8])
    width = rng.choice([1, 2, 4, 5])
    size = segments * width, segments, rng.choice([1, 2, 3]), rng.choice([1, 1, 2, 3])
    # Enough rows for the convolutions in place of products, and for wide rows, in every fourth.
    shape = (2, 22, 27) if seed % 4 == 0 else (rng.choice([1, 2, 3]), rng.choice([2, 3, 6]), rng.choice([1, 4, 5]))
    options = dict(
        shortcut=rng.random() < 0.4, residual=rng.random() < 0.7, dilation=rng.choice([1, 1, 2]))
    set_blocks(monkeypatch, rng.randint(1, segments) * width)
    layer, ref = make_pair(size, **options)
    training = rng.random() < 0.7
    layer.train(training)
    ref.train(training)
    x = torch.randn(shape[0], size[0], *shape[1:], dtype=torch.float64)
    x = x.contiguous(memory_format=rng.choice(list(FORMATS.values())))
    assert obstacle(layer, x) is None
    assert_same(layer, ref, x)


def test_drop_path(norm_kernels, monkeypatch):
    torch.manual_seed(0)
    layer = make_layer(12, 3, shortcut=True).double()
    drop_scale = 2.0 * torch.tensor([[0, 1, 1], [1, 0, 1], [1, 1, 0]])[:, :, None, None]
    monkeypatch.setattr(GunnLayer, '_drop_scale', lambda self, x: drop_scale.to(x.dtype))
    x, w = torch.randn(2, 3, 12, 4, 5, dtype=torch.float64)
    for fused, composite in zip(*both_paths(layer, x, w), strict=True):
        assert_close(fused, composite)


@pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
@pytest.mark.parametrize(('shortcut', 'kind'), [
    (True, ''), (False, ''), (True, 'folded'), (False, 'drop path'), (False, 'channels_last bfloat16'),
    (True, 'blocks of one')])
def test_opcheck(shortcut, kind, training, monkeypatch):
    if kind == 'blocks of one':
        set_blocks(monkeypatch, 1)
    layer = make_layer(6, 3, 2, shortcut=shortcut).train(training)
    if kind == 'folded':
        layer = timm.utils.reparameterize_model(layer)
    params = [t for c in layer._conv_norms() for t in c.fused_params()]
    params = [t.detach().clone().requires_grad_(t.requires_grad) for t in params]
    x = torch.randn(2, 6, 4, 3)
    if kind == 'channels_last bfloat16':
        x = x.contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    n = len(params) // 5
    drop_scale = torch.tensor([[0.0, 2.0, 1.0], [1.0, 1.0, 0.0]]) if kind == 'drop path' else None
    args = x, params, drop_scale, [1e-5] * n, 3, 1, True, torch.bfloat16 if 'bfloat16' in kind else torch.float32
    torch.library.opcheck(timm_gunn.ops.ordered_update, (*args, True))
    no_grad = x.detach(), [t.detach() for t in params], torch.ones(2, 3), *args[3:], False
    torch.library.opcheck(timm_gunn.ops.ordered_update, no_grad)

    y, stats, saved = timm_gunn.ops.ordered_update(*args, True)
    detach = lambda ts: [t.detach() for t in ts]  # noqa: E731
    needs = [True] + [k % 5 < 3 and t.numel() > 0 for k, t in enumerate(params)]
    tensors = torch.randn_like(x), x.detach(), y.detach(), detach(saved), detach(params), detach(stats), drop_scale
    torch.library.opcheck(timm_gunn.ops.ordered_update_backward, (*tensors, needs, *args[3:]))


LOW_PRECISION = {
    'autocast bfloat16': (torch.float32, torch.bfloat16), 'autocast float16': (torch.float32, torch.float16),
    'bfloat16': (torch.bfloat16, None)}


def low_precision_errors(layer, x, w, param_dtype, autocast):
    """Root mean square errors of both paths against float64, for the output and every gradient."""
    exact = run(copy.deepcopy(layer).double(), x.double(), w.double())
    kwargs = dict(dtype=autocast) if autocast else {}
    paths = both_paths(layer.to(param_dtype), x.to(autocast or param_dtype), w.to(autocast or param_dtype), **kwargs)
    return [[(a.double() - b).square().mean().sqrt().item() for a, b in zip(p, exact, strict=True)] for p in paths]


@pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
@pytest.mark.parametrize('residual', [True, False])
@pytest.mark.parametrize('kind', LOW_PRECISION)
def test_low_precision_is_as_precise_as_the_composite(device, kind, residual, training, monkeypatch):
    """No error above twice the composite's, in blocks of several segments.

    There are enough values for the errors not to hang on a few that are rounded to the other side of a ReLU.
    """
    set_blocks(monkeypatch, 12)
    torch.manual_seed(0)
    layer = make_layer(64, 16, 2, residual=residual, shortcut=True)
    layer(2 * torch.randn(8, 64, 8, 8))  # statistics that are near those of x, but others
    layer.train(training).to(device)
    x, w = torch.randn(2, 16, 64, 16, 16).bfloat16().float().to(device)
    fused, composite = low_precision_errors(layer, x, w, *LOW_PRECISION[kind])
    for name, f, c in zip(['y', 'x', *dict(layer.named_parameters())], fused, composite, strict=True):
        assert f <= 2 * c + 1e-9, f'{name}: error {f:.3g}, composite {c:.3g}'


@pytest.mark.skipif(not INTERPRETED, reason='in the process of test_triton_norm.py')
def test_interpreted_layer_is_as_precise_as_the_composite(monkeypatch):
    """Triton's interpreter cuts bfloat16 off where devices round, which doubles errors."""
    from timm_gunn.triton_norm import TritonNorm
    monkeypatch.setattr(timm_gunn.convs, 'norm_class', lambda weight: TritonNorm)
    set_blocks(monkeypatch, 12)
    torch.manual_seed(0)
    layer = make_layer(16, 4, shortcut=True)
    x, w = torch.randn(2, 8, 16, 16, 16)  # float32: the rounded state is another matrix
    exact = run(copy.deepcopy(layer).double(), x.double(), w.double())
    fused, composite = both_paths(layer, x, w, dtype=torch.bfloat16)
    for name, f, c, e in zip(['y', 'x', *dict(layer.named_parameters())], fused, composite, exact, strict=True):
        assert (f - e).norm() <= 4 * (c - e).norm() + 1e-9, name


@pytest.mark.parametrize('block', [1, 12])
@pytest.mark.parametrize('kind', [*LOW_PRECISION, 'float32'])
def test_inference_is_as_precise_as_the_composite(device, kind, block, monkeypatch):
    """Norms with given statistics become a part of the weights; means of several deviations are no harm."""
    set_blocks(monkeypatch, block)
    torch.manual_seed(0)
    layer = make_layer(64, 16, 2, shortcut=True, dilation=2)
    layer(5 + 2 * torch.randn(8, 64, 8, 8))
    layer.eval().to(device)
    param_dtype, autocast = LOW_PRECISION.get(kind, (torch.float32, None))
    x = (5 + torch.randn(16, 64, 16, 16)).bfloat16().float().to(device)
    with torch.no_grad():
        exact = copy.deepcopy(layer).double()(x.double())
        with torch.autocast(x.device.type, autocast, enabled=autocast is not None):
            fused, composite = (
                (m(x.to(autocast or param_dtype)).double() - exact).square().mean().sqrt().item()
                for m in (layer.to(param_dtype), composite_of(layer)))
    assert fused <= 2 * composite


@pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
@pytest.mark.parametrize('residual', [True, False])
def test_float32(device, residual, training, norm_kernels):
    torch.manual_seed(0)
    layer = make_layer(64, 16, 2, residual=residual, shortcut=True)
    layer(2 * torch.randn(8, 64, 8, 8))
    layer.train(training).to(device)
    x, w = torch.randn(2, 4, 64, 16, 16).to(device)
    exact = run(copy.deepcopy(layer).double(), x.double(), w.double())
    for name, f, e in zip(['y', 'x', *dict(layer.named_parameters())], run(layer, x, w), exact, strict=True):
        assert (f - e).norm() < 1e-5 * e.norm(), name


@pytest.mark.parametrize('kind', [*LOW_PRECISION, 'float32'])
def test_large_inputs_do_not_blur_gradients_of_small_updates(device, kind):
    """Without residual, y may be far smaller than x; a unit's weights have met it in the columns before its segment."""
    torch.manual_seed(0)
    layer = make_layer(64, 16, 2, residual=False)
    hidden, width = 8, 4
    param_dtype, autocast = LOW_PRECISION.get(kind, (torch.float32, None))
    x, w = torch.randn(2, 8, 64, 16, 16).bfloat16().float()
    layer, x, w = layer.to(device), 100 * x.to(device), w.to(device)
    met = torch.ones(16, 16, device=device).tril(-1).repeat_interleave(hidden, 0).repeat_interleave(width, 1).bool()
    exact, *paths = (
        grads[2].flatten(1)[met].double() for grads in [
            run(copy.deepcopy(layer).double(), x.double(), w.double()),
            *both_paths(layer.to(param_dtype), x.to(param_dtype), w.to(autocast or param_dtype),
                        **(dict(dtype=autocast) if autocast else {}))])
    fused, composite = ((grad - exact).norm() / exact.norm() for grad in paths)
    assert fused <= 2 * composite, f'error {fused:.3g}, composite {composite:.3g}'


def test_float32_input_under_autocast_keeps_its_residual():
    torch.manual_seed(0)
    layer = make_layer(64, 16)
    x, w = torch.randn(2, 8, 64, 16, 16)
    exact = run(copy.deepcopy(layer).double(), x.double(), w.double())
    fused, composite = both_paths(layer, x, w, dtype=torch.bfloat16)
    assert fused[0].dtype == fused[1].dtype == torch.float32
    for f, c, e in zip(fused, composite, exact, strict=True):
        assert (f - e).square().mean() <= 4 * (c - e).square().mean()


def test_float32_input_under_autocast_keeps_the_scale_of_its_updates(monkeypatch):
    """Kept updates are scaled by 1 / 0.9, which bfloat16 rounds by 0.17 %, for all updates alike."""
    torch.manual_seed(0)
    layer = make_layer(64, 16, drop_path=0.1)
    x = torch.randn(8, 64, 8, 8)
    monkeypatch.setattr(layer, '_drop_scale', lambda x: torch.full((8, 16, 1, 1), 1 / 0.9, dtype=x.dtype))
    with torch.autocast('cpu', torch.bfloat16):
        update = layer(x) - x
    monkeypatch.setattr(layer, '_drop_scale', lambda x: None)
    exact = layer.double()(x.double()) - x
    # The first segment has the same input on both sides, so that nothing but its own rounding lies between them.
    update, exact = update[:, :4].double(), exact[:, :4] / 0.9
    assert abs((update * exact).sum() / exact.square().sum() - 1) < 5e-4


def test_statistics_of_a_step_in_eval_mode_outlive_a_step_in_training_mode():
    torch.manual_seed(0)
    layer = make_layer(12, 3, 2, shortcut=True).double().eval()
    x, later = torch.randn(2, 3, 12, 4, 4, dtype=torch.float64)
    expected = run(layer, x)[1:]
    layer.zero_grad(set_to_none=True)
    x.requires_grad_()
    y = layer(x).sum()
    with torch.no_grad():
        layer.train()(1 + 2 * later)
    y.backward()
    assert_close([x.grad, *[p.grad for p in layer.parameters()]], expected)


@pytest.mark.parametrize('residual', [True, False])
@pytest.mark.parametrize('input_dtype', [torch.float32, torch.bfloat16])
def test_dtype_under_autocast_is_that_of_the_composite(input_dtype, residual):
    x = torch.randn(2, 12, 4, 4, dtype=input_dtype)
    fused, composite = both_paths(make_layer(12, 3, residual=residual), x, dtype=torch.bfloat16)
    for f, c in zip(fused, composite, strict=True):
        assert f.dtype == c.dtype


def test_dilated_bfloat16():
    """Sizes for which torch's gradient of the weight is NaN in channels-last memory (CPU, torch 2.15)."""
    torch.manual_seed(0)
    layer = make_layer(40, 4, dilation=2)
    x, w = torch.randn(2, 1, 40, 32, 48).bfloat16().float()
    fused, composite = low_precision_errors(layer, x, w, torch.bfloat16, None)
    for name, f, c in zip(['y', 'x', *dict(layer.named_parameters())], fused, composite, strict=True):
        assert f <= 2 * c + 1e-9, f'{name}: error {f:.3g}, composite {c:.3g}'


@pytest.mark.parametrize('of_weights', FORMATS)
@pytest.mark.parametrize('of_input', FORMATS)
def test_gradients_have_the_strides_of_their_tensors(of_input, of_weights):
    layer = make_layer(12, 3).to(memory_format=FORMATS[of_weights])
    x = torch.randn(2, 12, 5, 4).contiguous(memory_format=FORMATS[of_input]).requires_grad_()
    tensors = {'x': x, **dict(layer.named_parameters())}
    # As the operator gives them: .grad would have these strides whatever it gave.
    grads = torch.autograd.grad(layer(x).sum(), list(tensors.values()))
    for (name, t), grad in zip(tensors.items(), grads, strict=True):
        assert grad.stride() == t.stride(), name


def test_fifty_steps_of_training():
    """Both paths, from one seed, stay together over momentum, running statistics and stochastic depth."""
    torch.manual_seed(0)
    model = Gunn((12, 16), (3, 4), layout='cifar', shortcut=True, num_classes=4, drop_path_rate=0.2).double()
    data = [(torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.randint(4, (4,))) for _ in range(50)]

    def train(model):
        torch.manual_seed(1)
        optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9, nesterov=True)
        losses = []
        for x, t in data:
            loss = nn.functional.cross_entropy(model(x), t)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    composite = composite_of(model)
    losses = train(model)
    assert_close(losses, train(composite), rtol=1e-8, atol=1e-8)
    assert_close(model.state_dict(), composite.state_dict(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize('trained', ['input', 'conv1', 'conv2', 'conv3', 'proj', 'bn', 'conv'])
def test_frozen_parameters(trained):
    """Whatever is frozen has no gradient, and the rest of the gradients is what it is without freezing."""
    torch.manual_seed(0)
    layer = make_layer(12, 4, 2, shortcut=True).double()
    x = torch.randn(2, 12, 3, 3, dtype=torch.float64)
    expected = dict(zip(['y', 'x', *dict(layer.named_parameters())], run(layer, x), strict=True))
    layer.zero_grad()
    for name, p in layer.named_parameters():
        p.requires_grad_(trained in name.split('.'))
    x.requires_grad_(trained == 'input')
    layer(x).sum().backward()
    for name, t in [('x', x), *layer.named_parameters()]:
        if t.requires_grad:
            assert_close(t.grad, expected[name])
        else:
            assert t.grad is None, name


class Products(TorchDispatchMode):
    """Counts the multiplications of matrix products and of gradients of convolutions."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name in ('aten::mm', 'aten::addmm', 'aten::addmm_'):
            a, b = args[-2:]
            self.count += a.shape[0] * a.shape[1] * b.shape[1]
        elif name == 'aten::convolution_backward':
            grad, _, weight = args[:3]
            self.count += grad.numel() // grad.shape[1] * weight.numel() * sum(args[-1][:2])
        return func(*args, **(kwargs or {}))


def backward_products(layer, x):
    """Multiplications of the fused backward pass, seen from inside of the operator."""
    params = [t for c in layer._conv_norms() for t in c.fused_params()]
    needs = [t.requires_grad for t in [x, *params]]
    config = None, [1e-5] * (len(params) // 5), layer.segments, 1, layer.residual, x.dtype
    x, params = x.detach(), [t.detach() for t in params]
    y, stats, saved = timm_gunn.ordered.OrderedLayer(x, params, [], *config).forward(x, True)
    with Products() as products:
        timm_gunn.ordered.OrderedLayer(x, params, stats, *config).backward(torch.ones_like(y), x, y, saved, needs)
    return products.count


def test_no_work_for_gradients_nobody_asked_for(monkeypatch):
    set_blocks(monkeypatch, 1)
    layer = make_layer(32, 4)
    x = torch.randn(2, 32, 6, 6, requires_grad=True)
    conv1, conv2, conv3 = (72 * v for v in (32 * 64, 9 * 64 * 16, 64 * 8))
    # For the input and the weight of each convolution; and conv3 once more, for its output.
    assert backward_products(layer, x) == 2 * conv1 + 2 * conv2 + 3 * conv3
    # Without that of x, what units send to segments before theirs is left: 6 of 16 pairs.
    assert backward_products(layer, x.detach()) == (1 + 6 / 16) * conv1 + 2 * conv2 + 3 * conv3
    for p in layer.parameters():
        p.requires_grad_(False)
    assert backward_products(layer, x) == conv1 + conv2 + 2 * conv3


@pytest.mark.parametrize('norm_trained', [True, False])
def test_no_work_for_gradients_of_frozen_bottlenecks(norm_trained, norm_kernels, monkeypatch):
    """With fixed statistics, outputs of the last convolutions are wanted for the gradients of the norms' gammas."""
    set_blocks(monkeypatch, 1)
    layer = make_layer(32, 4, 2, 2).eval()
    for name, p in layer.named_parameters():
        p.requires_grad_(norm_trained and 'bn' in name)
    x = torch.randn(2, 32, 6, 6, requires_grad=True)
    conv1, inner, conv2, conv3 = (72 * v for v in (32 * 64, 8 * 64, 9 * 64 * 16, 64 * 8))
    # For the inputs, once each; conv3 of both bottlenecks again.
    assert backward_products(layer, x) == conv1 + inner + 2 * conv2 + 2 * conv3 * (1 + norm_trained)


def test_double_backward_is_an_error():
    x = torch.randn(2, 6, 3, 3, requires_grad=True)
    layer = make_layer(6, 3)
    with pytest.raises(RuntimeError, match=r'no second derivative.*fused=False'):
        torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    layer.fused = False
    grad, = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    grad.square().sum().backward()
    assert x.grad.abs().sum() > 0


def test_function_transforms_take_the_composite_path():
    layer = make_layer(6, 3).double().eval()
    x, v = torch.randn(2, 2, 6, 3, 3, dtype=torch.float64).unbind()
    expected = run(layer, x)[1]
    assert_close(torch.func.grad(lambda x: layer(x).sum())(x), expected)
    _, tangent = torch.func.jvp(layer, (x,), (v,))
    assert_close(tangent.sum(), (expected * v).sum())
    assert_close(torch.func.vmap(layer)(x[:, None]), layer(x)[:, None])


def test_the_reason_for_the_composite_path_is_logged(caplog):
    x = torch.randn(2, 6, 3, 3)
    layer = GunnLayer(6, 3)
    with caplog.at_level(logging.DEBUG, 'timm_gunn.layer'):
        layer(x)
        assert not caplog.messages
        GunnLayer(6, 3, act_layer='gelu')(x)
        nn.SyncBatchNorm.convert_sync_batchnorm(layer).eval()(x)
    assert caplog.messages == [
        'GunnLayer: not fused, activation GELU, or one with hooks.',
        'GunnLayer: not fused, norm SyncBatchNorm, convolution without bias.']


def test_one_value_per_channel_is_the_error_of_batch_norm():
    with pytest.raises(ValueError, match='more than 1 value per channel'):
        GunnLayer(6, 3)(torch.randn(1, 6, 1, 1))
    # Eval mode takes a single value, and what is kept of it is no view of another output of the operator.
    layer, x = make_layer(6, 3).eval(), torch.randn(1, 6, 1, 1)
    for fused, composite in zip(*both_paths(layer, x), strict=True):
        assert_close(fused, composite)


no_fused_compilation = pytest.mark.skipif(
    torch.__version__.startswith('2.8.'), reason='torch 2.8 takes every compilation for an export: composite path')


@no_fused_compilation
@pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
def test_compiles_to_one_graph_that_does_not_grow_with_segments(training):
    """One operator per layer and direction; only the matrices that it keeps are more with more segments."""
    def compiled_nodes(segments):
        torch.manual_seed(0)
        layer = make_layer(24, segments).double().train(training)
        x = torch.randn(2, 24, 4, 4, dtype=torch.float64)
        graphs = []

        def count(graph, _):
            calls = [str(n.target) for n in graph.graph.nodes if n.op == 'call_function']
            assert sum(name.startswith('timm_gunn.') for name in calls) == 1
            graphs.append(sum('getitem' not in name and 'detach' not in name for name in calls))
            return make_boxed_func(graph)

        from functorch.compile import make_boxed_func
        from torch._dynamo.backends.common import aot_autograd
        torch._dynamo.reset()
        compiled = torch.compile(layer, backend=aot_autograd(fw_compiler=count), fullgraph=True)
        expected = copy.deepcopy(layer)
        for a, b in zip(run(compiled, x), run(expected, x), strict=True):
            assert_close(a, b)
        for a, b in zip(layer.buffers(), expected.buffers(), strict=True):
            assert_close(a, b)
        assert len(graphs) == 2
        return graphs

    assert compiled_nodes(4) == compiled_nodes(12)


@no_fused_compilation
def test_compiles_with_dynamic_sizes():
    torch.manual_seed(0)
    layer = make_layer(24, 4).double()
    expected = copy.deepcopy(layer)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend='aot_eager', fullgraph=True, dynamic=True)
    for shape in ((2, 24, 4, 6), (3, 24, 5, 7), (1, 24, 9, 2)):
        x = torch.randn(shape, dtype=torch.float64)
        with torch._dynamo.config.patch(error_on_recompile=shape[0] == 3):
            for a, b in zip(run(compiled, x), run(expected, x), strict=True):
                assert_close(a, b)


@no_fused_compilation
@pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
def test_compiles_under_autocast(training):
    torch.manual_seed(0)
    layer, x = make_layer(24, 4).train(training), torch.randn(2, 24, 4, 4)
    expected = copy.deepcopy(layer)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend='aot_eager', fullgraph=True)
    for a, b in zip(run(compiled, x, dtype=torch.bfloat16), run(expected, x, dtype=torch.bfloat16), strict=True):
        assert_close(a, b)
    assert_close(layer.state_dict(), expected.state_dict())


def mib_per_image(model, size=224):
    x = torch.randn(2, 3, size, size).contiguous(memory_format=torch.channels_last)
    return saved_bytes(model.to(memory_format=torch.channels_last), x) / 2 / 2 ** 20


def test_saved_memory_of_gunn18():
    gunn18, sunn18 = timm.create_model('gunn18'), timm.create_model('sunn18')
    fused = mib_per_image(gunn18)
    assert fused < 75
    assert fused < mib_per_image(sunn18)


def test_the_switch():
    """The argument reaches every layer, and a layer obeys its attribute; the paths differ in what they save."""
    for fused in (True, False):
        model = Gunn((12, 16), (3, 4), layout='cifar', num_classes=4, fused=fused)
        assert [m.fused for m in model.modules() if isinstance(m, GunnLayer)] == [fused] * 2
    x = torch.randn(2, 12, 16, 16)
    layer = GunnLayer(12, 3)
    fused = saved_bytes(layer, x)
    layer.fused = False
    assert fused < saved_bytes(layer, x) / 2


def operands(layer, x):
    """What the layer calls ordered_update with, for a forward pass with gradients."""
    convs = layer._conv_norms()
    return (x, [t for c in convs for t in c.fused_params()], None, [1e-5] * len(convs), layer.segments, 1, True,
            x.dtype, True)


def test_flop_counter_sees_the_operator():
    """torch's counter counts the operator as the modules of the composite, which the layer is under its hooks."""
    layer, x = make_layer(12, 3, shortcut=True), torch.randn(2, 12, 5, 5, requires_grad=True)
    counts = []
    for run in (lambda: layer(x), lambda: timm_gunn.ops.ordered_update(*operands(layer, x))[0]):
        with FlopCounterMode(display=False) as counter:
            run().sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


# --- Where modules do more than the operator knows of, it steps aside ---

def double(module, *args):
    return tuple(2 * t for t in args[-1]) if isinstance(args[-1], tuple) else 2 * args[-1]


class HalfReLU(nn.ReLU):
    def forward(self, x):
        return super().forward(x) / 2


def change_convs(*names, **settings):
    def change(layer):
        for name in names:
            conv = layer.get_submodule(name).conv
            for k, v in settings.items():
                setattr(conv, k, v)
    return change


def act(change):
    return lambda layer: change(layer.bottlenecks[1].act1)


CONV2 = 'bottlenecks.0.conv2', 'bottlenecks.1.conv2'
CHANGES = {
    'forward hook': act(lambda m: m.register_forward_hook(double)),
    'forward pre-hook': act(lambda m: m.register_forward_pre_hook(double)),
    'backward hook': act(lambda m: m.register_full_backward_hook(lambda m, grads, _: (2 * grads[0],))),
    'backward pre-hook': act(lambda m: m.register_full_backward_pre_hook(double)),
    'another forward': act(lambda m: setattr(m, 'forward', lambda x: x.relu() / 2)),
    'another call': act(lambda m: setattr(m, '_call_impl', lambda x: x.relu() / 2)),
    'subclass': lambda layer: setattr(layer.bottlenecks[1], 'act1', HalfReLU()),
    'dilation of one': change_convs(CONV2[1], dilation=(2, 2), padding=(2, 2)),
    'dilation of the first': change_convs(CONV2[0], dilation=(2, 2), padding=(2, 2)),
    'dilation of one direction': change_convs(*CONV2, dilation=(1, 2), padding=(1, 2)),
    'padding as a word': change_convs(*CONV2, dilation=(3, 3), padding='same'),
}


@pytest.mark.parametrize('name', CHANGES)
def test_modules_that_are_changed(name):
    """Output and gradients are those of one module per unit, changed in the same way, and differ from before."""
    torch.manual_seed(0)
    layer = make_layer(12, 3, 2, 2).double().eval()  # norms of the batch would undo the factors
    for b in layer.bottlenecks:
        b.act1.inplace = False  # as torch demands of modules with backward hooks
    x, w = torch.randn(2, 2, 12, 6, 5, dtype=torch.float64)
    before, plain = run(layer, x, w), unstack_model(layer)
    for module in (layer, *(unit for unit in plain.units)):
        CHANGES[name](module)
    y, dx, *grads = run(layer, x, w)
    y_ref, dx_ref, *_ = run(plain, x, w)
    assert_close((y, dx), (y_ref, dx_ref))
    assert not torch.allclose(dx, before[1])
    layer.load_state_dict({k: v.grad for k, v in plain.named_parameters()}, strict=False)
    assert_close(dict(zip([n for n, _ in layer.named_parameters()], grads, strict=True)),
                 {n: p.detach() for n, p in layer.named_parameters()})


@pytest.mark.parametrize('same', [True, False])
def test_settings_that_the_operator_knows(same):
    """Dilation that all 3x3 convolutions share, and eps, momentum and mode of any single norm, as set by users."""
    layer = make_layer(12, 3, 2, 2).double()
    if same:
        change_convs(*CONV2, dilation=(2, 2), padding=(2, 2))(layer)
        change_convs('bottlenecks.0.conv1', dilation=(2, 2))(layer)  # as smp sets it for every convolution of a stage
    else:
        layer.bottlenecks[0].conv1.bn.eps, layer.bottlenecks[1].conv2.bn.momentum = 0.5, 0.9
        layer.bottlenecks[1].conv3.bn.eval()
    x = torch.randn(2, 12, 6, 5, dtype=torch.float64)
    assert obstacle(layer, x) is None
    composite = composite_of(layer)
    for f, c in zip(run(layer, x), run(composite, x), strict=True):
        assert_close(f, c)
    assert_close(layer.state_dict(), composite.state_dict())


@pytest.mark.parametrize('settings', [
    dict(stride=(2, 2)), dict(groups=2, weight=nn.Parameter(torch.randn(24, 12, 3, 3)))], ids=['stride', 'groups'])
def test_settings_that_do_not_fit(settings):
    """Are an error of torch, as with one module per unit."""
    layer = make_layer(12, 3)
    change_convs(CONV2[0], **settings)(layer)
    with pytest.raises(RuntimeError, match=r'must match the size|8 channels'):
        layer(torch.randn(2, 12, 6, 5))


def test_global_hooks_are_called():
    """As of tools that follow every module there is; each activation is called by every unit."""
    layer, calls = GunnLayer(12, 3), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: calls.append(type(module)))
    try:
        layer(torch.randn(2, 12, 3, 3))
    finally:
        handle.remove()
    assert calls.count(nn.ReLU) == 2 * 3


@pytest.mark.parametrize('kept', [True, False])
def test_saved_tensors_are_tensors(kept):
    """As torchviz expects, which draws them."""
    layer = make_layer(12, 3, drop_path=0.5 * kept)
    y = layer(torch.randn(2, 12, 3, 3, requires_grad=True))
    node = y.grad_fn
    while not type(node).__name__.startswith('Generated'):
        node = node.next_functions[0][0]
    assert len(node.saved_tensors) > 10
    assert all(isinstance(t, torch.Tensor) for t in node.saved_tensors)
