"""What only a CUDA device can show: statistics of the norms, CUDA graphs, compilation and scaled gradients there."""
import copy

import pytest
import torch
import torch.nn.functional as F
from networks import composite_of, small
from test_fused import LOW_PRECISION, make_layer
from torch.testing import assert_close

pytestmark = pytest.mark.gpu
DEVICE = 'cuda'


@pytest.mark.parametrize('kind', [*LOW_PRECISION, 'float32'])
def test_statistics_are_as_precise_as_those_of_the_composite(kind):
    param_dtype, autocast = LOW_PRECISION.get(kind, (torch.float32, None))
    torch.manual_seed(0)
    exact = make_layer(64, 16, 2, 2, shortcut=True).to(DEVICE).double()
    layer = copy.deepcopy(exact).to(param_dtype)
    layers = exact, layer, composite_of(layer)
    for _ in range(2):
        x = 3 + torch.randn(16, 64, 16, 16, device=DEVICE).bfloat16()
        for m, dtype in zip(layers, (torch.float64, *[autocast or param_dtype] * 2), strict=True):
            with torch.autocast(DEVICE, autocast, enabled=autocast is not None and m is not exact):
                m(x.to(dtype))
    for name, e in exact.named_buffers():
        fused, composite = ((dict(m.named_buffers())[name].double() - e).norm() for m in layers[1:])
        assert fused <= 2 * composite + 1e-6 * e.double().norm(), name


def make_step(model, x, target, autocast=None):
    """Forward and backward pass of a network, in memory that stays where it is."""
    def step():
        model.zero_grad()
        with torch.autocast(DEVICE, autocast, enabled=autocast is not None):
            loss = F.cross_entropy(model(x), target)
        loss.backward()
        return loss.detach()
    return step


def train(model, batches, step, x, optimizer):
    """Losses of the steps on the batches, which are copied into x."""
    losses = []
    for batch in batches:
        x.copy_(batch)
        losses.append(step().clone())
        optimizer.step()
    return torch.stack(losses)


@pytest.mark.parametrize('autocast', [None, torch.bfloat16])
def test_train_step_in_a_cuda_graph(autocast):
    """Five steps of SGD, replayed, are those without capture: losses, parameters and statistics."""
    model = small('gunn15').to(DEVICE)
    expected, state = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    batches = torch.randn(5, 8, 3, 16, 16, device=DEVICE)
    x, target = torch.empty_like(batches[0]), torch.arange(8, device=DEVICE)
    step = make_step(model, x.zero_(), target, autocast)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph, stream=stream):  # the stream of the gradients that are accumulated
        captured = step()
    model.load_state_dict(state)  # warm-up has moved the running statistics

    def replay():
        graph.replay()
        return captured

    losses = [
        train(m, batches, s, x, torch.optim.SGD(m.parameters(), 0.05, momentum=0.9))
        for m, s in ((model, replay), (expected, make_step(expected, x, target, autocast)))]
    tolerance = dict(rtol=1e-3, atol=1e-4) if autocast is None else dict(rtol=0.05, atol=0.02)
    assert_close(*losses, **tolerance)
    assert len(losses[0].unique()) == 5
    assert_close(model.state_dict(), expected.state_dict(), **tolerance)


def test_network_of_graphed_callables():
    model = small('gunn18').to(DEVICE)
    expected, state = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    x, other = torch.randn(2, 4, 3, 64, 64, device=DEVICE)
    target = torch.arange(4, device=DEVICE)
    captured = torch.cuda.make_graphed_callables(model, (x,))
    model.load_state_dict(state)
    assert_close(*(make_step(m, other, target)() for m in (captured, expected)), rtol=1e-4, atol=1e-5)
    for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert (p.grad - q.grad).norm() <= 1e-3 * q.grad.norm() + 1e-6, name


def test_compiled_network():
    """Training and inference, in CUDA graphs that PyTorch captures by itself."""
    torch._dynamo.reset()
    model = small('gunn15').to(DEVICE)
    expected = copy.deepcopy(model)
    compiled = torch.compile(model, mode='reduce-overhead', fullgraph=True)
    x, target = torch.randn(8, 3, 16, 16, device=DEVICE), torch.arange(8, device=DEVICE)
    losses = [
        train(m, [x] * 5, make_step(m, x.clone(), target), x.clone(), torch.optim.SGD(m.parameters(), 0.05))
        for m in (compiled, expected)]
    assert_close(*losses, rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        assert_close(compiled.eval()(x), expected.eval()(x), rtol=1e-2, atol=1e-2)


def test_training_with_scaled_gradients_of_float16():
    """Losses of ten steps fall, and are those of the composite; the scale is not lowered on the way."""
    model = small('gunn15').to(DEVICE)
    x, target = torch.randn(16, 3, 16, 16, device=DEVICE), torch.arange(16, device=DEVICE) % 10
    losses = []
    for m in (model, composite_of(model)):
        optimizer = torch.optim.SGD(m.parameters(), 0.1, momentum=0.9)
        scaler = torch.amp.GradScaler(DEVICE, 2.0 ** 10)
        losses.append([])
        for _ in range(10):
            optimizer.zero_grad()
            with torch.autocast(DEVICE, torch.float16):
                loss = F.cross_entropy(m(x), target)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses[-1].append(loss.item())
        assert scaler.get_scale() == 2.0 ** 10
        assert losses[-1][-1] < 0.85 * losses[-1][0]
    assert_close(*losses, rtol=0.05, atol=0.02)
