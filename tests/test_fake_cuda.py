"""The branch of the operator for CUDA devices, on tensors that claim to be there: devices, dtypes, no host involved."""
import pytest
import torch
from test_fused import make_layer
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import timm_gunn.convs
import timm_gunn.ops


@pytest.fixture(autouse=True)
def fake_kernels(monkeypatch):
    """PyTorch has no fake kernel of the batch's statistics; Triton kernels take no fake tensors at all."""
    monkeypatch.setattr(timm_gunn.convs, 'has_triton_package', lambda: False)
    library = torch.library.Library('aten', 'IMPL', 'Meta')

    def statistics(h, mean, variance, momentum):
        dtype = torch.float32 if h.dtype.itemsize == 2 else h.dtype
        return [h.new_empty(h.shape[1], dtype=dtype) for _ in range(2)]

    library.impl('batch_norm_update_stats', statistics)
    yield
    library._destroy()


class NoHost(TorchDispatchMode):
    """Refuses tensors of the host and whatever waits for a value from the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket not in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero), func
        out = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves([args, kwargs, out]):
            assert not isinstance(t, torch.Tensor) or t.device.type == 'cuda', func
        return out


def described(value):
    return [(t.device.type, t.dtype, t.shape, t.stride()) for t in torch.utils._pytree.tree_leaves(value)]


@pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
@pytest.mark.parametrize('options', [
    dict(), dict(shortcut=True), dict(depth=2, residual=False), dict(depth=2, shortcut=True, drop_path=0.1)], ids=str)
@pytest.mark.parametrize(('x_dtype', 'param_dtype', 'dtype'), [
    (torch.float32, torch.float32, torch.float32), (torch.float32, torch.float32, torch.bfloat16),
    (torch.float16, torch.float32, torch.float16), (torch.bfloat16, torch.bfloat16, torch.bfloat16)])
def test_operator(x_dtype, param_dtype, dtype, options, training):
    """Outputs and gradients are on the device, in the dtypes, shapes and strides that the fake kernels promise."""
    layer = make_layer(24, 6, **options).train(training)
    params = [t.detach().to(param_dtype) for c in layer._conv_norms() for t in c.fused_params()]
    forward, backward = timm_gunn.ops.ordered_update, timm_gunn.ops.ordered_update_backward
    with FakeTensorMode() as mode:
        params = [torch.empty_like(mode.from_tensor(t), device='cuda') for t in params]
        x = torch.empty(4, 24, 6, 5, device='cuda', dtype=x_dtype).to(memory_format=torch.channels_last)
        drop_scale = torch.empty(4, 6, device='cuda') if layer.drop_path.drop_prob else None
        config = drop_scale, [1e-5] * (len(params) // 5), 6, 1, layer.residual, dtype
        with NoHost():
            for keep in (False, True):
                y, stats, saved = outputs = forward._init_fn(x, params, *config, keep)
                assert described(outputs) == described(forward._abstract_fn(x, params, *config, keep))
            assert [t.numel() > 0 for t in stats] == [training] * len(stats)
            needs = [True, *[True, True, True, False, False] * len(config[1])]
            args = torch.empty_like(y), x, y, saved, params, stats, drop_scale, needs, *config[1:]
            assert described(backward._init_fn(*args)) == described(backward._abstract_fn(*args))
