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
from numbers import Integral
from typing import Dict, List, Optional, Tuple, Type, Union

import torch
import torch.autograd.forward_ad as fwAD
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import DropPath, create_act_layer, get_norm_layer
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from .fused import folded, ordered_update

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
            TypeError: If norm_layer is not of the BatchNorm family, or a layer is None.
        """
        super().__init__()
        for name, value in dict(
                channels=channels, segments=segments, expansion=expansion, depth=depth, dilation=dilation).items():
            if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
                raise ValueError(f'GunnLayer: {name} must be an integer of at least 1, got {value!r}.')
        if channels % segments:
            raise ValueError(f'GunnLayer: channels must be divisible by segments, got {channels} and {segments}.')
        check_options('GunnLayer', residual, act_layer, norm_layer, drop_path=drop_path)

        # Plain ints: those of NumPy are none to TorchScript.
        channels, segments, expansion, depth, dilation = map(int, (channels, segments, expansion, depth, dilation))
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
        """Update x, (B, N, H, W). Raises ValueError for any other shape."""
        if not torch.jit.is_scripting():  # noqa: SIM102 (a joint condition would be compiled whole)
            if isinstance(x, torch.fx.Proxy):
                return self._trace(x)
        if x.ndim != 4 or x.shape[1] != self.channels:
            raise ValueError(
                f'GunnLayer: expected an input of {self.channels} channels, (B, {self.channels}, H, W), '
                f'got {list(x.shape)}.')
        if self.ordered and self.segments > 1:
            if not torch.jit.is_scripting():
                self.check_slices()
                if self._can_fuse(x):
                    return self._forward_fused(x)
            return self._forward_ordered(x)
        return self._forward_simultaneous(x)

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
            [getattr(c.bn, 'eps', 0.0) for c in convs], self.segments, self._dilation(),
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
        if torch.jit.is_tracing() or torch.compiler.is_exporting():
            return 'a trace or export takes the operations one by one'
        if not torch.compiler.is_compiling() and _transformed():
            return 'torch.func and forward-mode derivatives need the operations one by one'
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
        for bottleneck in self.bottlenecks:
            for act in (bottleneck.act1, bottleneck.act2):
                if type(act) is not nn.ReLU or 'forward' in act.__dict__ or _has_hooks(act):
                    return f'activation {type(act).__name__}, or one with hooks'
        count, dilation = x.shape[0] * x.shape[2] * x.shape[3], self._dilation()
        for k, c in enumerate(self._conv_norms()):
            size, d = (3, dilation) if k % 3 == 1 else (1, c.conv.dilation[0])
            geometry = dict(kernel_size=size, stride=1, padding=d * (size // 2), dilation=d)
            if any(getattr(c.conv, name) != (value, value) for name, value in geometry.items()):
                return f'convolution {c.conv}'
            weight_dtype = c.conv.weight.dtype
            if weight_dtype != dtype and (not autocast or weight_dtype == torch.float64):
                return f'an input of {x.dtype} and weights of {weight_dtype}'
            if c.conv.weight.device != x.device:
                return f'an input on {x.device} and weights on {c.conv.weight.device}'
            if type(c.bn) is not nn.Identity and (c.conv.bias is not None or not _is_fusible(c.bn)):
                return f'norm {type(c.bn).__name__}, convolution with{"out" if c.conv.bias is None else ""} bias'
            if count <= 1 and takes_batch_stats(c.bn):
                return 'statistics of a single value'
        if count == 0:
            return 'an empty input'
        return None

    def _dilation(self) -> int:
        return self.bottlenecks[0].conv2.conv.dilation[0]

    @torch.jit.ignore
    def check_slices(self) -> None:
        """Check that slices of the modules, which an ordered layer runs instead of them, are all there is to them.

        Warns of hooks, which do not run. Raises TypeError for modules that are more than their slices.
        """
        convs = self._conv_norms()
        passed_over = [self.bottlenecks, *self.bottlenecks, *(m for c in convs for m in (c, c.conv, c.bn))]
        reasons = [f'a {type(m).__name__} whose forward is replaced' for m in passed_over if 'forward' in m.__dict__]
        reasons += [type(b).__name__ for b in self.bottlenecks if type(b) is not Bottleneck]
        reasons += [reason for c in convs for reason in [c.unsliceable()] if reason is not None]
        if reasons:
            raise TypeError(
                f'GunnLayer: an ordered layer runs slices of its modules, which cannot stand for {reasons[0]}; '
                'make plain modules of its units first, with timm_gunn.unstack_model(model).')
        if any(map(_has_hooks, passed_over)) and not torch.jit.is_tracing() and not torch.compiler.is_compiling():
            warnings.warn(
                'GunnLayer: hooks on convolutions and norms are not called, since an ordered layer runs slices of '
                'them; make plain modules of its units first, with timm_gunn.unstack_model(model).', stacklevel=2)

    def _kept(self, x: torch.Tensor) -> Optional[torch.Tensor]:
        """Scale of each sample's and segment's update under stochastic depth, (B, P, 1, 1), or None if all are kept."""
        if not self.has_drop_path or not self.training:
            return None
        kept = self.drop_path(x.new_ones((x.shape[0] * self.segments, 1, 1, 1)))
        return kept.view(-1, self.segments, 1, 1)

    @torch.jit.ignore
    def _trace(self, x: torch.fx.Proxy) -> torch.fx.Proxy:
        """Ordered, stay one node in a symbolic trace, which would turn slices of running statistics into constants."""
        if not self.ordered or self.segments == 1:
            return self._forward_simultaneous(x)
        if x.tracer.root is self:
            raise TypeError('GunnLayer: torch.fx can trace a layer as a part of another module, or unstack_model(it).')
        return x.tracer.create_proxy('call_module', x.tracer.path_of_module(self), (x,), {})

    def _load_from_state_dict(self, state_dict: Dict[str, torch.Tensor], prefix: str, *args) -> None:
        self.stack_units(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    @torch.jit.ignore
    def stack_units(self, state_dict: Dict[str, torch.Tensor], prefix: str) -> None:
        """Make weights of this layer, in place, of those of the plain form that unstack_model gives it."""
        for name, own in self.state_dict().items():
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
        reason = unsliceable_norm(self.bn, out_chs)
        if reason is not None:
            raise TypeError(f'GunnLayer: expected a norm of the BatchNorm family, by channel, got {reason}.')

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
            if hasattr(self.bn, 'running_mean'):
                x = _batch_norm_unit(
                    x, start, stop, self.bn.weight, self.bn.bias, self.bn.running_mean, self.bn.running_var,
                    self.bn.num_batches_tracked, self.bn.training, self.bn.momentum, self.bn.eps)
            return x
        return norm_unit(self.bn, x, start, stop)

    def unsliceable(self) -> Optional[str]:
        """What the slices that forward_unit takes cannot stand for, None if nothing."""
        conv, norm = self.conv, self.bn
        if type(self) is not ConvNorm or type(conv) is not nn.Conv2d:
            return f'a {type(self).__name__} of {type(conv).__name__}'
        if conv.padding_mode != 'zeros' or not _owns_weight(conv):
            return f'{conv} with {", ".join(conv._parameters)}'
        return None if is_plain(norm) else unsliceable_norm(norm, conv.out_channels)

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


def check_options(
        owner: str,
        residual: bool,
        act_layer: Union[str, Type[nn.Module], None],
        norm_layer: Union[str, Type[nn.Module], None],
        **drop_path: float,
) -> None:
    """Check what a layer and a network have in common; the rate of stochastic depth goes by the name it has there.

    Raises ValueError for a rate out of bounds or without a residual, TypeError for a layer that is None.
    """
    for name, rate in drop_path.items():
        if not 0.0 <= rate < 1.0:
            raise ValueError(f'{owner}: {name} must be in [0, 1), got {rate!r}.')
        if rate and not residual:
            raise ValueError(f'{owner}: {name}={rate} needs residual=True: without x_i a dropped update leaves zeros.')
    for name, layer in dict(act_layer=act_layer, norm_layer=norm_layer).items():
        if layer is None:
            raise TypeError(f'{owner}: {name} must be the name of a layer or a class of modules, got None.')


def unsliceable_norm(norm: nn.Module, channels: int) -> Optional[str]:
    """What keeps a slice of a norm from being a norm of these channels again, None if nothing does.

    Admitted are torch's BatchNorm and SyncBatchNorm with their subclasses, modules of any library that keep
    running_mean and running_var per channel (frozen BatchNorms), and the Identity that a folded norm leaves behind.
    """
    name = f'{type(norm).__name__} with {", ".join(norm._parameters)}'
    if isinstance(norm, (
            nn.modules.instancenorm._InstanceNorm, nn.modules.lazy.LazyModuleMixin, nn.BatchNorm1d, nn.BatchNorm3d)):
        return name
    tensors = dict(chain(norm.named_parameters(), norm.named_buffers()))
    if isinstance(norm, _BatchNorm):
        if not _owns_weight(norm) or parametrize.is_parametrized(norm):
            return name
    elif type(norm) is not nn.Identity and not {'running_mean', 'running_var'} <= tensors.keys():
        return name
    for key, t in tensors.items():
        if (t.shape != (channels,) and t.numel() > 1) or hasattr(t, 'to_local'):  # a shard of FSDP
            return f'{type(norm).__name__}.{key}, {type(t).__name__} of shape {tuple(t.shape)}'
    return None


def reset_norm(norm: nn.Module) -> None:
    """Set weight and running variance 1, all else 0 in a norm of any class that unsliceable_norm admits."""
    ones = 'weight', 'running_var'
    with torch.no_grad():
        for name, t in chain(norm.named_parameters(), norm.named_buffers()):
            t.fill_(name.rpartition('.')[2] in ones)


@torch.no_grad()
def fold_norm(module: nn.Module) -> None:
    """Replace module.bn by what it does to module.conv with its running statistics: a scale of the weight and a bias.

    Other norms than BatchNorm, SyncBatchNorm and torchvision's frozen one, norms without running statistics, other
    classes than nn.Conv2d, and weights that a hook makes of other parameters are left as they are.
    """
    conv, norm = module.conv, module.bn
    plain = type(norm) in (nn.BatchNorm2d, nn.SyncBatchNorm) or _is_torchvision_frozen(norm)
    owned = _owns_weight(conv) and _owns_weight(norm)
    if type(conv) is not nn.Conv2d or not plain or not owned or norm.running_mean is None:
        return
    mean = norm.running_mean
    weight, bias = folded(
        conv.weight, torch.ones_like(mean) if norm.weight is None else norm.weight,
        torch.zeros_like(mean) if norm.bias is None else norm.bias,
        mean if conv.bias is None else mean - conv.bias, norm.running_var, norm.eps)
    conv.weight.copy_(weight)
    conv.bias = nn.Parameter(bias.to(conv.weight.dtype), requires_grad=conv.weight.requires_grad)
    module.bn = nn.Identity()


def is_plain(norm: nn.Module) -> bool:
    """Whether a norm is an nn.BatchNorm2d, no subclass, whose statistics are there if and only if it tracks them.

    One whose weight a hook makes of other parameters is none.
    """
    return (
        type(norm) is nn.BatchNorm2d and norm.track_running_stats == (norm.running_mean is not None)
        and _owns_weight(norm))


def _is_fusible(norm: nn.Module) -> bool:
    """Whether ordered_update has what the norm does: a plain or frozen (torchvision) BatchNorm."""
    return is_plain(norm) or _is_torchvision_frozen(norm)


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
    if isinstance(norm, nn.Identity):
        return x
    if is_plain(norm):
        return _batch_norm_unit(
            x, start, stop, norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.num_batches_tracked,
            norm.training, norm.momentum, norm.eps)

    # Any other class runs its own forward on sliced parameters and buffers. Statistics are views, so that in-place
    # updates reach the module; what has one value, as counters do, is a copy for all units but the last.
    tensors = list(chain(norm.named_parameters(), norm.named_buffers()))
    channels = max([t.shape[0] for _, t in tensors if t.ndim == 1], default=stop)
    sliced = {}
    for name, t in tensors:
        if t.numel() > 1:
            sliced[name] = t[start:stop]
        else:
            sliced[name] = t if stop == channels else t.clone()
    return torch.func.functional_call(norm, sliced, (x,))


def _batch_norm_unit(
        x: torch.Tensor,
        start: int,
        stop: int,
        weight: Optional[torch.Tensor],
        bias: Optional[torch.Tensor],
        running_mean: Optional[torch.Tensor],
        running_var: Optional[torch.Tensor],
        num_batches_tracked: Optional[torch.Tensor],
        training: bool,
        momentum: Optional[float],
        eps: float,
) -> torch.Tensor:
    """nn.BatchNorm2d's forward on channels [start, stop); all tensors but x are the whole module's."""
    factor = 0.0 if momentum is None else momentum
    if training and running_mean is not None and num_batches_tracked is not None:
        if momentum is None:  # cumulative average over this and all earlier steps
            factor = 1.0 / (float(num_batches_tracked) + 1.0)
        if stop == running_mean.shape[0]:
            num_batches_tracked.add_(1)
    return F.batch_norm(
        x, _rows(running_mean, start, stop), _rows(running_var, start, stop),
        _rows(weight, start, stop), _rows(bias, start, stop),
        training or running_mean is None, factor, eps)


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
