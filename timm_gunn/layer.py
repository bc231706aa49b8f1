"""The GUNN layer: a grouped residual bottleneck whose segments are updated one after the other.

The N channels of the state are cut into P equal segments of o = N / P channels. Segment by segment, in order,

    y_i = x_i + U_i(y_1, ..., y_{i-1}, x_i, ..., x_P)    i = 1 ... P    (Eq. 4 and 5 of the paper)

where the update unit U_i reads all N channels of the current state and writes only segment i. SUNN, the baseline of
the paper, is the same layer with every unit reading x: y = x + U(x). The order is thus all that differs, and the code
says so: the parameters of the P units are stacked into the modules of a grouped (ResNeXt-like) bottleneck, which SUNN
runs as they are and GUNN runs one slice at a time. Both have the same state dict.

`GunnLayer._forward_ordered` is the order as it is written above, and the reference. Where it can, the layer runs the
operator of ops.py instead, which computes the same from the same parameters in less time and memory.

Paper: `Gradually Updated Neural Networks for Large-Scale Image Recognition` - https://arxiv.org/abs/1711.09280
"""
import logging
import warnings
from typing import Dict, List, Optional, Tuple, Type, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import DropPath, create_act_layer, get_norm_layer

from . import norms, ops  # noqa: F401 (ops registers the operator)
from .checks import PLAIN_FORM, check_slices, compute_dtype, obstacle

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
            raise ValueError(f'GunnLayer: drop_path must be in [0, 1), and 0 with residual=False, got {drop_path!r}.')
        self.channels = channels
        self.segments = segments
        self.ordered = ordered
        self.residual = residual
        self.fused = fused
        # None is left out: the frozen norms of torchvision know neither argument.
        dd = {k: v for k, v in dict(device=device, dtype=dtype).items() if v is not None}
        hidden_chs = expansion * channels
        # The first bottleneck of a unit reads every channel, those stacked on it only their own unit's.
        self.bottlenecks = nn.Sequential(*[
            Bottleneck(
                channels, hidden_chs, segments, in_groups=segments if i else 1, dilation=dilation,
                act_layer=act_layer, norm_layer=norm_layer, **dd) for i in range(depth)])
        self.proj = ConvNorm(channels, channels, segments, norm_layer=norm_layer, **dd) if shortcut else None
        self.drop_path = DropPath(drop_path)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Update x, (B, N, H, W). Ordered, raises ValueError for any other shape."""
        if not self.ordered or self.segments == 1:
            return self._forward_simultaneous(x)
        if torch.jit.is_scripting():
            return self._forward_ordered(x)
        if isinstance(x, torch.fx.Proxy):
            return self._as_leaf(x)
        if x.ndim != 4 or x.shape[1] != self.channels:
            raise ValueError(f'GunnLayer: expected an input (B, {self.channels}, H, W), got {list(x.shape)}.')
        check_slices(self)
        reason = obstacle(self, x) if self.fused else ''
        if reason is None:
            return self._forward_fused(x)
        if reason and not torch.compiler.is_compiling():
            _logger.debug('GunnLayer: not fused, %s.', reason)
        return self._forward_ordered(x)

    def _forward_simultaneous(self, x: torch.Tensor) -> torch.Tensor:
        update = self.bottlenecks(x)
        if self.proj is not None:
            update = self.proj(x) + update
        scale = self._drop_scale(x)
        if scale is not None:
            update = update * scale.repeat_interleave(self.channels // self.segments, 1)
        return x + update if self.residual else update

    def _forward_ordered(self, x: torch.Tensor) -> torch.Tensor:
        width = self.channels // self.segments
        state = [x[:, i * width:(i + 1) * width] for i in range(self.segments)]
        scale = self._drop_scale(x)
        for i in range(self.segments):
            s = torch.cat(state, 1)  # y_1 ... y_{i-1}, x_i ... x_P
            update = s
            for bottleneck in self.bottlenecks:
                update = bottleneck.forward_unit(update, i)
            if self.proj is not None:
                update = self.proj.forward_unit(s, i) + update
            if scale is not None:
                update = update * scale[:, i:i + 1]
            state[i] = state[i] + update if self.residual else update
        return torch.cat(state, 1)

    def _forward_fused(self, x: torch.Tensor) -> torch.Tensor:
        convs = self._conv_norms()
        params = [t for c in convs for t in c.fused_params()]
        drop_scale, dtype = self._drop_scale(x), compute_dtype(x)
        if not self.residual:  # nothing of x but what the convolutions read
            x = x.to(dtype)
        # Looked up anew: a package that is imported again registers anew, and this layer may be of the one before.
        y, stats, _ = torch.ops.timm_gunn.ordered_update.default(
            x, params, None if drop_scale is None else drop_scale.flatten(1),
            [getattr(c.bn, 'eps', 0.0) for c in convs], self.segments, self.bottlenecks[0].conv2.conv.dilation[0],
            self.residual, dtype,
            torch.is_grad_enabled() and (x.requires_grad or any(t.requires_grad for t in params)))
        count = x.shape[0] * x.shape[2] * x.shape[3]
        for c, mean, variance in zip(convs, stats[::2], stats[1::2], strict=True):
            if mean.numel() and c.bn.running_mean is not None:
                norms.update_running_stats(c.bn, mean, variance, count)
        return y

    def _conv_norms(self) -> 'List[ConvNorm]':
        """In the order of ordered_update's parameters."""
        convs = [c for b in self.bottlenecks for c in (b.conv1, b.conv2, b.conv3)]
        return convs if self.proj is None else convs + [self.proj]

    def _drop_scale(self, x: torch.Tensor) -> Optional[torch.Tensor]:
        """Scale of each sample's and segment's update under stochastic depth, (B, P, 1, 1), or None if all are kept."""
        # Another module in its place may have no drop_prob, and is called.
        if not self.drop_path.training or getattr(self.drop_path, 'drop_prob', 1.0) == 0.0:
            return None
        return self.drop_path(x.new_ones((x.shape[0] * self.segments, 1, 1, 1))).view(-1, self.segments, 1, 1)

    def _as_leaf(self, x: torch.fx.Proxy) -> torch.fx.Proxy:
        """Stay one node in a trace, torchvision's too, which would turn slices of running statistics into constants."""
        if x.tracer.root is self:
            raise TypeError('GunnLayer: torch.fx can trace a layer as a part of another module, or unstack_model(it).')
        if type(x.tracer).__module__.startswith('torch.ao.'):
            warnings.warn(f'GunnLayer: an ordered layer is not quantised; {PLAIN_FORM}', stacklevel=1)
        return x.tracer.create_proxy('call_module', x.tracer.path_of_module(self), (x,), {})

    def _load_from_state_dict(self, state_dict: Dict[str, torch.Tensor], prefix: str, *args) -> None:
        """Take weights of the plain form, too, which unstack_model makes of this layer."""
        for name, own in self.state_dict(keep_vars=True).items():
            keys = [f'{prefix}units.{i}.{name}' for i in range(self.segments)]
            units = [state_dict.pop(key) for key in keys if key in state_dict]
            if units:  # counters, and parameters of an activation, are the same in all units
                stacked = own.ndim > 0 and len(own) > len(units[0])
                state_dict[prefix + name] = torch.cat(units) if stacked else units[0]
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __prepare_scriptable__(self) -> 'GunnLayer':
        """Called by torch.jit.script. Raises TypeError for norms whose own forward it would leave out."""
        if self.ordered and self.segments > 1:
            check_slices(self)
        for c in self._conv_norms():
            if type(c.bn) is not nn.Identity and not norms.is_batch_norm2d(c.bn):
                raise TypeError(f'GunnLayer: TorchScript takes nn.BatchNorm2d alone as norm, unchanged, got {c.bn}.')
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
        self.unit_chs = out_chs // segments
        self.conv = nn.Conv2d(
            in_chs, out_chs, kernel_size, padding=dilation * (kernel_size // 2), dilation=dilation,
            groups=groups, bias=False, **dd)
        self.bn = get_norm_layer(norm_layer)(out_chs, **dd)
        if not norms.has_slices(self.bn, out_chs):
            raise TypeError(f'GunnLayer: expected a norm of the BatchNorm family, got {type(self.bn).__name__}.')
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the convolution at fan-in scale, N(0, sqrt(2 / fan_in)), and reset the norm.

        The paper's code takes a unit's fan-out instead. A unit reads many channels and writes few, so that its weights
        are large and learn slowly at first.
        """
        nn.init.kaiming_normal_(self.conv.weight, nonlinearity='relu')
        norms.reset_norm(self.bn)

    reparameterize = norms.fold_norm  # called by timm.utils.reparameterize_model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """All units: (B, in_chs, H, W) to (B, out_chs, H, W)."""
        return self.bn(self.conv(x))

    def forward_unit(self, x: torch.Tensor, unit: int) -> torch.Tensor:
        """One unit: (B, in_chs / groups, H, W) to (B, out_chs / P, H, W)."""
        start, stop = unit * self.unit_chs, (unit + 1) * self.unit_chs
        x = F.conv2d(
            x, self.conv.weight[start:stop], norms.cut(self.conv.bias, start, stop),
            self.conv.stride, self.conv.padding, self.conv.dilation)
        if torch.jit.is_scripting():
            return self._batch_norm_unit(x, start, stop) if hasattr(self.bn, 'running_mean') else x
        if norms.is_batch_norm2d(self.bn):
            return self._batch_norm_unit(x, start, stop)
        return norms.norm_unit(self.bn, x, start, stop)

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
            x, norms.cut(norm.running_mean, start, stop), norms.cut(norm.running_var, start, stop),
            norms.cut(norm.weight, start, stop), norms.cut(norm.bias, start, stop),
            norm.training or norm.running_mean is None, factor, norm.eps)

    def fused_params(self) -> Tuple[torch.Tensor, ...]:
        """Weight of the convolution, weight, bias, mean and variance of the norm, as ordered_update takes them."""
        weight, norm = self.conv.weight, self.bn
        none = weight.new_empty(0)
        if type(norm) is nn.Identity:
            return weight, none, none if self.conv.bias is None else self.conv.bias, none, none
        gamma = weight.new_ones(weight.shape[0]) if norm.weight is None else norm.weight
        beta = weight.new_zeros(weight.shape[0]) if norm.bias is None else norm.bias
        stats = (none, none) if norms.takes_batch_stats(norm) else (norm.running_mean, norm.running_var)
        return weight, gamma, beta, *stats
