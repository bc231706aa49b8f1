"""The GUNN layer: a grouped residual bottleneck whose segments are updated one after the other.

The N channels of the state are cut into P equal segments of o = N / P channels. Segment by segment, in order,

    y_i = x_i + U_i(y_1, ..., y_{i-1}, x_i, ..., x_P)    i = 1 ... P    (Eq. 4 and 5 of the paper)

where the update unit U_i reads all N channels of the current state and writes only segment i. SUNN, the baseline of
the paper, is the same layer with every unit reading x: y = x + U(x). The order is thus all that differs, and the code
says so: the parameters of the P units are stacked into the modules of a grouped (ResNeXt-like) bottleneck, which SUNN
runs as they are and GUNN runs one slice at a time. Both have the same state dict.

`GunnLayer._forward_ordered` is the order as it is written above, and the reference. Where it can, the layer runs the
operator of fused.py instead, which computes the same from the same parameters in less time and memory.

Paper: `Gradually Updated Neural Networks for Large-Scale Image Recognition` - https://arxiv.org/abs/1711.09280
"""
import logging
import warnings
from itertools import chain
from typing import Dict, List, Optional, Tuple, Type, Union

import torch
import torch.autograd.forward_ad as fwAD
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import DropPath, create_act_layer, get_norm_layer
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import fuse_conv_bn_weights
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .fused import ordered_update

__all__ = ['Bottleneck', 'ConvNorm', 'GunnLayer']

_logger = logging.getLogger(__name__)


class GunnLayer(nn.Module):
    """Update the channels of a feature map segment by segment (GUNN) or all at once (SUNN).

    Maps (B, N, H, W) to (B, N, H, W) in any floating dtype and either memory format. Fused layers keep their output
    for the backward pass: what follows must not change it in place, nn.ReLU() rather than nn.ReLU(inplace=True).

    Source: Section 3.2, Eq. 4 and 5; the update units are those of Section 5.1, Figure 4.
    """

    def __init__(
            self,
            channels: int,
            segments: int,
            expansion: int = 2,
            depth: int = 1,
            *,
            ordered: bool = True,
            residual: bool = True,
            shortcut: bool = False,
            dilation: int = 1,
            drop_path: float = 0.0,
            fused: bool = True,
            act_layer: Union[str, Type[nn.Module]] = nn.ReLU,
            norm_layer: Union[str, Type[nn.Module]] = nn.BatchNorm2d,
            device=None,
            dtype=None,
    ):
        """
        Args:
            channels: Number of channels N of the input and of the output.
            segments: Number of segments P. Must divide N.
            expansion: Expansion K, a unit has K * N / P hidden channels.
            depth: Number M of stacked bottlenecks per unit.
            ordered: Update the segments in order (GUNN) if True, all from the input (SUNN) if False.
            residual: Add each segment's input to its update (Eq. 5). False is the paper's "NoRes" ablation.
            shortcut: Add a projection of the unit's input (1x1 conv, norm) to the unit, around all M bottlenecks.
            dilation: Dilation of the 3x3 convolutions.
            drop_path: Probability of dropping a unit's update, per sample and segment (stochastic depth).
            fused: Run ordered updates as one operator wherever that is possible; the attribute can be set at any time.
                The reasons against it go to the debug log of this module.
            act_layer: Activation of the bottlenecks.
            norm_layer: Norm of the BatchNorm family, one that treats each channel by itself.

        Raises:
            ValueError: If a size is below 1, P does not divide N, or drop_path is given without a residual.
            TypeError: If norm_layer is not of the BatchNorm family.
        """
        super().__init__()
        sizes = dict(channels=channels, segments=segments, expansion=expansion, depth=depth, dilation=dilation)
        if min(sizes.values()) < 1 or channels % segments:
            raise ValueError(f'GunnLayer: sizes must be at least 1, channels divisible by segments, got {sizes}.')
        if not 0.0 <= drop_path < 1.0 or (drop_path and not residual):
            raise ValueError(
                f'GunnLayer: drop_path must be in [0, 1), and 0 with residual=False, got {drop_path!r}.')
        self.channels = channels
        self.segments = segments
        self.ordered = ordered
        self.residual = residual
        self.fused = fused
        # None is left out: the frozen norms of torchvision know neither argument.
        dd = {k: v for k, v in dict(device=device, dtype=dtype).items() if v is not None}
        hidden_chs = expansion * channels
        self.bottlenecks = nn.Sequential(*[
            Bottleneck(
                channels, hidden_chs, segments,
                # The first bottleneck of a unit reads every channel, those stacked on it only their own unit's.
                in_groups=1 if i == 0 else segments,
                dilation=dilation, act_layer=act_layer, norm_layer=norm_layer, **dd,
            ) for i in range(depth)
        ])
        self.proj = ConvNorm(channels, channels, segments, norm_layer=norm_layer, **dd) if shortcut else None
        self.drop_path = DropPath(drop_path)
        self.has_drop_path = drop_path > 0
        self.reset_parameters()

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """Draw every convolution from N(0, sqrt(2 / fan_in)); reset its norm."""
        for m in self.modules():
            if isinstance(m, ConvNorm):
                m.reset_parameters()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Update x, (B, N, H, W). Ordered, raises ValueError for any other shape."""
        if not self.ordered or self.segments == 1:
            return self._forward_simultaneous(x)
        if not torch.jit.is_scripting():  # noqa: SIM102 (a joint condition would be compiled whole)
            if isinstance(x, torch.fx.Proxy):
                return self._as_leaf(x)
        if x.ndim != 4 or x.shape[1] != self.channels:
            raise ValueError(f'GunnLayer: expected an input (B, {self.channels}, H, W), got {list(x.shape)}.')
        if not torch.jit.is_scripting():
            self.check_slices()
            if self._can_fuse(x):
                return self._forward_fused(x)
        return self._forward_ordered(x)

    def _forward_simultaneous(self, x: torch.Tensor) -> torch.Tensor:
        update = self.bottlenecks(x)
        if self.proj is not None:
            update = self.proj(x) + update
        kept = self._kept(x)
        if kept is not None:
            update = update * kept.repeat_interleave(self.channels // self.segments, 1)
        return x + update if self.residual else update

    def _forward_ordered(self, x: torch.Tensor) -> torch.Tensor:
        width = self.channels // self.segments
        state = [x[:, i * width:(i + 1) * width] for i in range(self.segments)]
        kept = self._kept(x)
        for i in range(self.segments):
            s = torch.cat(state, 1)  # y_1 ... y_{i-1}, x_i ... x_P
            update = s
            for bottleneck in self.bottlenecks:
                update = bottleneck.forward_unit(update, i)
            if self.proj is not None:
                update = self.proj.forward_unit(s, i) + update
            if kept is not None:
                update = update * kept[:, i:i + 1]
            state[i] = state[i] + update if self.residual else update
        return torch.cat(state, 1)

    def _forward_fused(self, x: torch.Tensor) -> torch.Tensor:
        convs = self._conv_norms()
        params = [t for c in convs for t in c.fused_params()]
        kept, dtype = self._kept(x), _compute_dtype(x)
        if not self.residual:  # nothing of x but what the convolutions read
            x = x.to(dtype)
        y, stats, _ = ordered_update(
            x, params, None if kept is None else kept.flatten(1),
            [getattr(c.bn, 'eps', 0.0) for c in convs], self.segments, self.bottlenecks[0].conv2.conv.dilation[0],
            self.residual, dtype,
            torch.is_grad_enabled() and (x.requires_grad or any(t.requires_grad for t in params)))
        count = x.shape[0] * x.shape[2] * x.shape[3]
        for c, mean, variance in zip(convs, stats[::2], stats[1::2], strict=True):
            if mean.numel():
                update_running_stats(c.bn, mean, variance, count)
        return y

    def _conv_norms(self) -> 'List[ConvNorm]':
        """In the order of ordered_update's parameters."""
        convs = [c for b in self.bottlenecks for c in (b.conv1, b.conv2, b.conv3)]
        return convs if self.proj is None else convs + [self.proj]

    def _can_fuse(self, x: torch.Tensor) -> bool:
        if not self.fused:
            return False
        reason = self._obstacle(x)
        if reason is not None and not torch.compiler.is_compiling():
            _logger.debug('GunnLayer: not fused, %s.', reason)
        return reason is None

    def _obstacle(self, x: torch.Tensor) -> Optional[str]:
        """What keeps the fused operator from doing what the modules would do, None if nothing does."""
        # What is_exporting() returns. Before torch 2.14, it is taken to be true in every compilation.
        if torch.jit.is_tracing() or torch.compiler._is_exporting_flag:
            return 'a trace or export takes the operations one by one'
        if not torch.compiler.is_compiling() and (_transformed() or is_in_torch_dispatch_mode(False)):
            return 'torch.func, forward-mode derivatives and dispatch modes need the operations one by one'
        if x.device.type not in ('cpu', 'cuda', 'meta'):
            return f'device {x.device.type}'
        dtype = _compute_dtype(x)
        if dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            return f'dtype {dtype}'
        if x.dtype not in (dtype, torch.float32):
            return f'an input of {x.dtype} under autocast to {dtype}'
        autocast = _autocasts(x)
        if nn.modules.module._has_any_global_hook():
            return 'global module hooks'
        for act in (a for b in self.bottlenecks for a in (b.act1, b.act2)):
            if type(act) is not nn.ReLU or 'forward' in act.__dict__ or _has_hooks(act):
                return f'activation {type(act).__name__}, or one with hooks'
        count, dilation = x.shape[0] * x.shape[2] * x.shape[3], self.bottlenecks[0].conv2.conv.dilation[0]
        for k, c in enumerate(self._conv_norms()):
            conv, weight = c.conv, c.conv.weight
            size, d = (3, dilation) if k % 3 == 1 else (1, conv.dilation[0])
            settings = conv.kernel_size, conv.stride, conv.padding, conv.dilation
            if settings != ((size, size), (1, 1), (d * (size // 2),) * 2, (d, d)):
                return f'convolution {conv}'
            if weight.dtype != dtype and (not autocast or weight.dtype == torch.float64):
                return f'an input of {x.dtype} and weights of {weight.dtype}'
            if weight.device != x.device:
                return f'an input on {x.device} and weights on {weight.device}'
            known = is_plain(c.bn) or _is_torchvision_frozen(c.bn)
            if type(c.bn) is not nn.Identity and (conv.bias is not None or not known):
                return f'norm {type(c.bn).__name__}, convolution with{"out" if conv.bias is None else ""} bias'
            if count <= 1 and takes_batch_stats(c.bn):
                return 'statistics of a single value'
        return 'an empty input' if count == 0 else None

    @torch.jit.ignore
    def check_slices(self) -> None:
        """Raise TypeError if the slices that an ordered layer runs are not all there is to a module; warn of hooks."""
        convs = self._conv_norms()
        sliced = [self.bottlenecks, *self.bottlenecks, *(m for c in convs for m in (c, c.conv, c.bn))]
        odd = [f'a {type(m).__name__} whose forward is replaced' for m in sliced
               for name in ('forward', '_call_impl') if name in m.__dict__]  # the latter by nncf
        odd += [type(b).__name__ for b in self.bottlenecks if type(b) is not Bottleneck]
        odd += [what for what in map(_unsliceable, convs) if what]
        if odd:
            raise TypeError(
                f'GunnLayer: an ordered layer runs slices of its modules, which cannot stand for {odd[0]}; '
                'make plain modules of its units first, with timm_gunn.unstack_model(model).')
        if any(map(_has_hooks, sliced)) and not torch.jit.is_tracing() and not torch.compiler.is_compiling():
            warnings.warn(
                'GunnLayer: hooks on convolutions and norms are not called, since an ordered layer runs slices of '
                'them; make plain modules of its units first, with timm_gunn.unstack_model(model).', stacklevel=1)

    def _kept(self, x: torch.Tensor) -> Optional[torch.Tensor]:
        """Scale of each sample's and segment's update under stochastic depth, (B, P, 1, 1), or None if all are kept."""
        if not self.has_drop_path or not self.training:
            return None
        kept = self.drop_path(x.new_ones((x.shape[0] * self.segments, 1, 1, 1)))
        return kept.view(-1, self.segments, 1, 1)

    @torch.jit.ignore
    def _as_leaf(self, x: torch.fx.Proxy) -> torch.fx.Proxy:
        """Stay one node in a symbolic trace, which would turn slices of running statistics into constants."""
        if x.tracer.root is self:
            raise TypeError('GunnLayer: torch.fx can trace a layer as a part of another module, or unstack_model(it).')
        return x.tracer.create_proxy('call_module', x.tracer.path_of_module(self), (x,), {})

    def _load_from_state_dict(self, state_dict: Dict[str, torch.Tensor], prefix: str, *args) -> None:
        self.stack_units(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    @torch.jit.ignore
    def stack_units(self, state_dict: Dict[str, torch.Tensor], prefix: str) -> None:
        """Make weights of this layer, in place, of those of the plain form that unstack_model gives it."""
        for name, own in chain(self.named_parameters(), self.named_buffers()):
            keys = [f'{prefix}units.{i}.{name}' for i in range(self.segments)]
            units = [state_dict.pop(key) for key in keys if key in state_dict]
            if units:  # counters, and parameters of an activation, are the same in all units
                stacked = own.ndim > 0 and len(own) > len(units[0])
                state_dict[prefix + name] = torch.cat(units) if stacked else units[0]

    def __prepare_scriptable__(self) -> 'GunnLayer':
        """Called by torch.jit.script. Raises TypeError for norms whose own forward it would leave out."""
        for m in self.modules():
            if isinstance(m, ConvNorm) and type(m.bn) not in (nn.BatchNorm2d, nn.Identity):
                raise TypeError(f'GunnLayer: TorchScript takes nn.BatchNorm2d alone as norm, got {type(m.bn)}.')
        return self

    def extra_repr(self) -> str:
        return f'{self.channels}, segments={self.segments}, ordered={self.ordered}, residual={self.residual}'


class Bottleneck(nn.Module):
    """The bottlenecks of P update units: 1x1, norm, act, 3x3, norm, act, 1x1, norm. No act closes it (Section 5.1)."""

    def __init__(
            self,
            channels: int,
            hidden_chs: int,
            segments: int,
            in_groups: int = 1,
            dilation: int = 1,
            act_layer: Union[str, Type[nn.Module]] = nn.ReLU,
            norm_layer: Union[str, Type[nn.Module]] = nn.BatchNorm2d,
            **dd,
    ):
        super().__init__()
        kwargs = dict(norm_layer=norm_layer, **dd)
        self.conv1 = ConvNorm(channels, hidden_chs, segments, groups=in_groups, **kwargs)
        self.act1 = create_act_layer(act_layer, inplace=True)
        self.conv2 = ConvNorm(hidden_chs, hidden_chs, segments, 3, groups=segments, dilation=dilation, **kwargs)
        self.act2 = create_act_layer(act_layer, inplace=True)
        self.conv3 = ConvNorm(hidden_chs, channels, segments, groups=segments, **kwargs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """All units: (B, N, H, W) to (B, N, H, W)."""
        x = self.act1(self.conv1(x))
        x = self.act2(self.conv2(x))
        return self.conv3(x)

    def forward_unit(self, x: torch.Tensor, unit: int) -> torch.Tensor:
        """One unit: (B, N or o, H, W) to (B, o, H, W)."""
        x = self.act1(self.conv1.forward_unit(x, unit))
        x = self.act2(self.conv2.forward_unit(x, unit))
        return self.conv3.forward_unit(x, unit)


class ConvNorm(nn.Module):
    """A convolution and its norm for P units, stacked along the output channels.

    Unit i owns rows i * R to (i + 1) * R, R = out_chs / P, of every parameter and running statistic.
    """

    def __init__(
            self,
            in_chs: int,
            out_chs: int,
            segments: int,
            kernel_size: int = 1,
            groups: int = 1,
            dilation: int = 1,
            norm_layer: Union[str, Type[nn.Module]] = nn.BatchNorm2d,
            **dd,
    ):
        super().__init__()
        self.rows = out_chs // segments
        self.conv = nn.Conv2d(
            in_chs, out_chs, kernel_size, padding=dilation * (kernel_size // 2), dilation=dilation,
            groups=groups, bias=False, **dd)
        self.bn = get_norm_layer(norm_layer)(out_chs, **dd)
        if not _has_slices(self.bn, out_chs):
            raise TypeError(f'GunnLayer: expected a norm of the BatchNorm family, got {type(self.bn).__name__}.')

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """Draw the convolution at fan-in scale, N(0, sqrt(2 / fan_in)), and reset the norm.

        The paper's code takes a unit's fan-out instead. A unit reads many channels and writes few, so that its weights
        are large and learn slowly at first.
        """
        nn.init.kaiming_normal_(self.conv.weight, nonlinearity='relu')
        reset_norm(self.bn)

    @torch.jit.ignore
    def reparameterize(self) -> None:
        """Fold the norm into the convolution, for inference; timm.utils.reparameterize_model calls this."""
        fold_norm(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """All units: (B, in_chs, H, W) to (B, out_chs, H, W)."""
        return self.bn(self.conv(x))

    def forward_unit(self, x: torch.Tensor, unit: int) -> torch.Tensor:
        """One unit: (B, in_chs / groups, H, W) to (B, out_chs / P, H, W)."""
        start, stop = unit * self.rows, (unit + 1) * self.rows
        x = F.conv2d(
            x, self.conv.weight[start:stop], _rows(self.conv.bias, start, stop),
            self.conv.stride, self.conv.padding, self.conv.dilation)
        if torch.jit.is_scripting():
            return self._batch_norm_unit(x, start, stop) if hasattr(self.bn, 'running_mean') else x
        return self._batch_norm_unit(x, start, stop) if is_plain(self.bn) else norm_unit(self.bn, x, start, stop)

    def _batch_norm_unit(self, x: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """What nn.BatchNorm2d does, on channels [start, stop) of the norm."""
        norm = self.bn
        tracked = norm.num_batches_tracked
        factor = 0.0 if norm.momentum is None else norm.momentum
        if norm.training and norm.running_mean is not None and tracked is not None:
            if norm.momentum is None:  # cumulative average over this and all earlier steps
                factor = 1.0 / (float(tracked) + 1.0)
            if stop == self.conv.out_channels:
                tracked.add_(1)
        return F.batch_norm(
            x, _rows(norm.running_mean, start, stop), _rows(norm.running_var, start, stop),
            _rows(norm.weight, start, stop), _rows(norm.bias, start, stop),
            norm.training or norm.running_mean is None, factor, norm.eps)

    def fused_params(self) -> Tuple[torch.Tensor, ...]:
        """Weight of the convolution, weight, bias, mean and variance of the norm, as ordered_update takes them."""
        weight, norm = self.conv.weight, self.bn
        none = weight.new_empty(0)
        if type(norm) is nn.Identity:
            return weight, none, none if self.conv.bias is None else self.conv.bias, none, none
        gamma = weight.new_ones(weight.shape[0]) if norm.weight is None else norm.weight
        beta = weight.new_zeros(weight.shape[0]) if norm.bias is None else norm.bias
        if takes_batch_stats(norm):
            return weight, gamma, beta, none, none
        return weight, gamma, beta, norm.running_mean, norm.running_var


def _owns_weight(module: nn.Module) -> bool:
    """Whether a module's weight is its parameter, or a view of a flat one, and not made of others by a hook.

    Pruning and the older spectral_norm and weight_norm leave such others; hooks that only look on, as of those who
    count operations, leave none.
    """
    return module._parameters.keys() <= {'weight', 'bias'}


def _unsliceable(c: ConvNorm) -> Optional[str]:
    """What a slice of a convolution and its norm leaves out, None if nothing."""
    conv, norm = c.conv, c.bn
    if type(c) is not ConvNorm or type(conv) is not nn.Conv2d:
        return f'a {type(c).__name__} of {type(conv).__name__}'
    if conv.padding_mode != 'zeros' or not _owns_weight(conv):
        return f'{conv} of {", ".join(conv._parameters)}'
    if is_plain(norm) or _has_slices(norm, conv.out_channels):
        return None
    return f'{type(norm).__name__} of {", ".join(name for name, _ in norm.named_parameters())}'


def _has_slices(norm: nn.Module, channels: int) -> bool:
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
    plain = type(norm) in (nn.BatchNorm2d, nn.SyncBatchNorm) or _is_torchvision_frozen(norm)
    owned = _owns_weight(conv) and _owns_weight(norm)
    if type(conv) is not nn.Conv2d or not plain or not owned or norm.running_mean is None:
        return
    conv.weight, conv.bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
    conv.bias.requires_grad_(conv.weight.requires_grad)
    module.bn = nn.Identity()


def is_plain(norm: nn.Module) -> bool:
    """Whether a norm is an nn.BatchNorm2d, no subclass, with its weight and the statistics that it tracks its own."""
    return (
        type(norm) is nn.BatchNorm2d and norm.track_running_stats == (norm.running_mean is not None)
        and _owns_weight(norm))


def _is_torchvision_frozen(norm: nn.Module) -> bool:
    return type(norm).__name__ == 'FrozenBatchNorm2d' and type(norm).__module__.startswith('torchvision.')


def takes_batch_stats(norm: nn.Module) -> bool:
    """Whether a plain BatchNorm normalises with the statistics of the batch; False for norms without statistics."""
    return isinstance(norm, nn.BatchNorm2d) and (norm.training or norm.running_mean is None)


@torch.no_grad()
def update_running_stats(norm: nn.BatchNorm2d, mean: torch.Tensor, variance: torch.Tensor, count: int) -> None:
    """Do to the running statistics what nn.BatchNorm2d does, given the batch's mean and biased variance."""
    if not norm.training or norm.running_mean is None:
        return
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
    # Statistics are views, so that in-place updates reach the module; counters are copies for all units but the last.
    tensors = list(chain(norm.named_parameters(), norm.named_buffers()))
    last = stop == max([t.numel() for _, t in tensors], default=stop)
    sliced = {
        name: t[start:stop] if t.numel() > 1 else t if last else t.clone() for name, t in tensors}
    return torch.func.functional_call(norm, sliced, (x,))


def _rows(t: Optional[torch.Tensor], start: int, stop: int) -> Optional[torch.Tensor]:
    return None if t is None else t[start:stop]


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks)


def _transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is at work. Neither says so by a public function."""
    stack = getattr(torch._C._functorch, 'peek_interpreter_stack', lambda: None)
    return stack() is not None or getattr(fwAD, '_current_level', -1) >= 0


def _autocasts(x: torch.Tensor) -> bool:
    # A device without autocast has none to ask for.
    return x.device.type in ('cpu', 'cuda') and torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64


def _compute_dtype(x: torch.Tensor) -> torch.dtype:
    """Dtype that convolutions of x compute in."""
    return torch.get_autocast_dtype(x.device.type) if _autocasts(x) else x.dtype
