"""What keeps an ordered layer from the fused operator, or from running slices of its modules."""
import warnings
from typing import Iterable, List, Optional

import torch
import torch.autograd.forward_ad as fwAD
import torch.nn as nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from . import norms

PLAIN_FORM = 'make plain modules of its units first, with timm_gunn.unstack_model(model).'
_DTYPES = torch.float64, torch.float32, torch.float16, torch.bfloat16


def obstacle(layer: nn.Module, x: torch.Tensor) -> Optional[str]:
    """What keeps the operator from doing what a GunnLayer's modules would do, None if nothing does."""
    # As is_exporting(), which compilations take to be true before torch 2.14.
    if torch.jit.is_tracing() or torch.compiler._is_exporting_flag:
        return 'a trace or export takes the operations one by one'
    if not torch.compiler.is_compiling() and (_transformed() or is_in_torch_dispatch_mode(False)):
        return 'torch.func, forward-mode derivatives and dispatch modes need the operations one by one'
    dtype = compute_dtype(x)
    if x.device.type not in ('cpu', 'cuda', 'meta') or dtype not in _DTYPES or x.dtype not in (dtype, torch.float32):
        return f'an input of {x.dtype} on {x.device}, computed in {dtype}'
    if nn.modules.module._has_any_global_hook():
        return 'global module hooks'
    for act in (a for b in layer.bottlenecks for a in (b.act1, b.act2)):
        if type(act) is not nn.ReLU or _is_replaced(act) or _has_hooks(act):
            return f'activation {type(act).__name__}, or one with hooks'
    values, dilation = x.numel() // layer.channels, layer.bottlenecks[0].conv2.conv.dilation[0]
    for k, c in enumerate(layer._conv_norms()):
        conv, weight = c.conv, c.conv.weight
        size, d = (3, dilation) if k % 3 == 1 else (1, conv.dilation[0])
        settings = conv.kernel_size, conv.stride, conv.padding, conv.dilation
        if settings != ((size, size), (1, 1), (d * (size // 2),) * 2, (d, d)):
            return f'convolution {conv}'
        if weight.device != x.device or compute_dtype(weight) != dtype:
            return f'an input of {x.dtype} on {x.device}, weights of {weight.dtype} on {weight.device}'
        known = norms.is_batch_norm2d(c.bn) or norms.is_torchvision_frozen(c.bn)
        if type(c.bn) is not nn.Identity and (conv.bias is not None or not known):
            return f'norm {type(c.bn).__name__}, convolution with{"out" if conv.bias is None else ""} bias'
        if values <= 1 and norms.takes_batch_stats(c.bn):
            return 'statistics of a single value'
    return 'an empty input' if values == 0 else None


def check_slices(layer: nn.Module, warn: bool = True) -> None:
    """Raise TypeError where a module does more than its slices would; warn of hooks."""
    sliced = [layer.bottlenecks, *layer.bottlenecks]
    odd = _others(layer.bottlenecks) or _others(convs := layer._conv_norms())
    if not odd:
        sliced += [m for c in convs for m in (c, c.conv, c.bn)]
        odd = [f'a {type(m).__name__} whose forward is replaced' for m in sliced if _is_replaced(m)]
        for c in convs:
            conv, bn, channels = c.conv, c.bn, c.unit_chs * layer.segments
            if type(conv) is not nn.Conv2d:
                odd.append(f'a {type(c).__name__} of {type(conv).__name__}')
            elif conv.padding_mode != 'zeros' or conv.out_channels != channels or not norms.owns_weight(conv):
                odd.append(f'{conv} of {", ".join(conv._parameters)}')
            elif not ((norms.is_batch_norm2d(bn) and bn.num_features == channels) or norms.has_slices(bn, channels)):
                odd.append(f'{type(bn).__name__} of {", ".join(name for name, _ in bn.named_parameters())}')
    if odd:
        raise TypeError(
            f'GunnLayer: an ordered layer runs slices of its modules, which cannot stand for {odd[0]}; {PLAIN_FORM}')
    if warn and not torch.jit.is_tracing() and any(map(_has_hooks, sliced)):
        _warn_of_hooks()


@torch.compiler.assume_constant_result  # compilations warn once
def _warn_of_hooks() -> None:
    warnings.warn(
        'GunnLayer: hooks on convolutions and norms are not called, since an ordered layer runs slices of '
        f'them; {PLAIN_FORM}', stacklevel=1)


def _others(modules: Iterable[nn.Module]) -> List[str]:
    """Modules of other classes than the package's, which may do something else in their forward."""
    return [f'a {type(m).__name__}' for m in modules if type(m).__module__ != 'timm_gunn.layer']


def _is_replaced(module: nn.Module) -> bool:
    return 'forward' in module.__dict__ or '_call_impl' in module.__dict__  # the latter by nncf


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks)


def _transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is at work. Neither says so by a public function."""
    stack = getattr(torch._C._functorch, 'peek_interpreter_stack', lambda: None)
    return stack() is not None or getattr(fwAD, '_current_level', -1) >= 0


def compute_dtype(t: torch.Tensor) -> torch.dtype:
    """Dtype that a convolution computes in with t as input or weight: autocast's, where it is on, but for float64."""
    device = t.device.type
    # A device without autocast has none to ask for.
    autocasts = device in ('cpu', 'cuda') and torch.is_autocast_enabled(device) and t.dtype != torch.float64
    return torch.get_autocast_dtype(device) if autocasts else t.dtype
