"""Norms of the BatchNorm family: which ones are admitted, and what they do to a slice of their channels."""
import copy
from itertools import chain
from typing import Callable, Optional

import torch
import torch.nn as nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import fuse_conv_bn_weights


def owns_weight(module: nn.Module) -> bool:
    """Whether a module's weight is its parameter, or a view of a flat one, and not made of others by a hook.

    Pruning and the older spectral_norm and weight_norm add parameters such as weight_orig. Hooks that only count add
    none.
    """
    return module._parameters.keys() <= {'weight', 'bias'}


def has_slices(norm: nn.Module, channels: int) -> bool:
    """Whether norm treats each of its channels by itself, so that a slice of it is a norm again.

    Admitted are torch's BatchNorm and SyncBatchNorm with their subclasses, modules of any library that keep
    running_mean and running_var (frozen BatchNorms), and the Identity that a folded norm leaves behind; but no pruned
    or parametrised ones, no shards of FSDP, and no tensors of other shapes.
    """
    others = (
        nn.modules.instancenorm._InstanceNorm, nn.modules.lazy.LazyModuleMixin, nn.BatchNorm1d, nn.BatchNorm3d)
    params, buffers = dict(norm.named_parameters()), dict(norm.named_buffers())
    owned = all(name.rpartition('.')[2] in ('weight', 'bias') for name in params)
    known = owned if isinstance(norm, _BatchNorm) else {'running_mean', 'running_var'} <= buffers.keys()
    return type(norm) is nn.Identity or (known and not isinstance(norm, others) and all(
        (t.shape == (channels,) or t.numel() == 1) and not hasattr(t, 'to_local')
        for t in (*params.values(), *buffers.values())))


def reset_norm(norm: nn.Module) -> None:
    """Set weight and running variance 1, all else 0 in a norm of any admitted class."""
    with torch.no_grad():
        for name, t in chain(norm.named_parameters(), norm.named_buffers()):
            t.fill_(name.rpartition('.')[2] in ('weight', 'running_var'))


def fold_norm(module: nn.Module) -> None:
    """Replace module.bn by what it does to module.conv with its running statistics: a scale of the weight and a bias.

    Norms of other classes or without running statistics, and weights that are made of others, are left as they are.
    """
    conv, norm = module.conv, module.bn
    plain = type(norm) in (nn.BatchNorm2d, nn.SyncBatchNorm) or is_torchvision_frozen(norm)
    owned = owns_weight(conv) and owns_weight(norm)
    if type(conv) is not nn.Conv2d or not plain or not owned or norm.running_mean is None:
        return
    conv.weight, conv.bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
    conv.bias.requires_grad_(conv.weight.requires_grad)
    module.bn = nn.Identity()


def is_batch_norm2d(norm: nn.Module) -> bool:
    """Whether a norm is an nn.BatchNorm2d itself, owns its weight, and has the running statistics that it tracks."""
    return (
        type(norm) is nn.BatchNorm2d and norm.track_running_stats == (norm.running_mean is not None)
        and owns_weight(norm))


def is_torchvision_frozen(norm: nn.Module) -> bool:
    """Whether a norm is a FrozenBatchNorm2d of torchvision's, which need not be installed."""
    return type(norm).__name__ == 'FrozenBatchNorm2d' and type(norm).__module__.startswith('torchvision.')


def takes_batch_stats(norm: nn.Module) -> bool:
    """Whether a norm takes its statistics from the batch; frozen norms and nn.Identity never do."""
    return isinstance(norm, nn.BatchNorm2d) and (norm.training or norm.running_mean is None)


@torch.no_grad()
def update_running_stats(norm: nn.BatchNorm2d, mean: torch.Tensor, variance: torch.Tensor, count: int) -> None:
    """Do to the running statistics what nn.BatchNorm2d does, given the batch's mean and biased variance."""
    momentum, tracked = norm.momentum, norm.num_batches_tracked
    if tracked is not None:
        tracked.add_(1)
    if momentum is None:  # cumulative average over this and all earlier steps
        momentum = 0.0 if tracked is None else 1.0 / tracked.to(mean.dtype)
    for running, batch in ((norm.running_mean, mean), (norm.running_var, variance * (count / (count - 1)))):
        running.copy_(torch.lerp(running.to(batch.dtype), batch, momentum))


def norm_unit(norm: nn.Module, x: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Apply channels [start, stop) of a norm to x, (B, stop - start, H, W), as a norm of those channels alone would.

    The units of a layer are normalised in order, each once per step: the one that holds the norm's last channel
    advances num_batches_tracked.
    """
    last = stop == max([t.numel() for t in chain(norm.parameters(), norm.buffers())], default=stop)

    def part(t: torch.Tensor) -> torch.Tensor:
        # Statistics are views, so that in-place updates reach the module; counters are copied for all but the last.
        return t[start:stop] if t.numel() > 1 else t if last else t.clone()

    if torch.compiler.is_compiling():  # takes no copies of modules
        parts = {name: part(t) for name, t in chain(norm.named_parameters(), norm.named_buffers())}
        return torch.func.functional_call(norm, parts, (x,))
    return _with_tensors(norm, part)(x)


def _with_tensors(module: nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> nn.Module:
    """A copy with changed tensors, where functional_call would change the module itself for all threads."""
    new = copy.copy(module)
    for kind in ('_parameters', '_buffers'):
        new.__dict__[kind] = {k: None if t is None else change(t) for k, t in module.__dict__[kind].items()}
    new.__dict__['_modules'] = {name: _with_tensors(m, change) for name, m in module.named_children()}
    return new


def cut(t: Optional[torch.Tensor], start: int, stop: int) -> Optional[torch.Tensor]:
    """Slice of a tensor, or None of none."""
    return None if t is None else t[start:stop]
