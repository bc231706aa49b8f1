"""The plain form of a network, for tools that look at modules: every unit is a module, whose modules are called.

Counters, hooks, quantisation, pruning, adapters and exporters take it as any network. Outputs, gradients and statistics
are those of the stacked network, in more time and memory, and its weights load into that as they are.
"""
import copy
from typing import List

import torch
import torch.nn as nn

from .checks import _is_replaced, check_slices
from .layer import GunnLayer

__all__ = ['unstack_model']


def unstack_model(model: nn.Module, inplace: bool = False) -> nn.Module:
    """Make modules of the units of every ordered GunnLayer in a model; layers without an order call theirs anyway.

    Args:
        model: Network, backbone, layer, or any module that has some in it.
        inplace: Change the model itself. Otherwise a copy is changed.

    Returns:
        The plain model, each of whose convolutions and norms is called once per forward. Its weights go back by
        `model.load_state_dict(plain.state_dict())`. Layers that share weights do not in the plain model.

    Raises:
        TypeError: If a layer, or a module in it, is more than the package's own (pruned, parametrised, a subclass,
            compiled by itself).
    """
    compiled = [m._orig_mod for m in model.modules() if hasattr(m, '_orig_mod')]
    for layer in _ordered_layers(model):
        check_slices(layer, warn=False)
        if type(layer) is not GunnLayer or _is_replaced(layer) or layer in compiled:
            raise TypeError(
                f'unstack_model: expected GunnLayer itself, got a {type(layer).__name__} that is a subclass, '
                'has another forward or is compiled alone.')
    if not inplace:
        model = copy.deepcopy(model)
    units = {layer: [Unit(layer, i) for i in range(layer.segments)] for layer in _ordered_layers(model)}
    for layer in units:
        layer.units = nn.ModuleList(units[layer])
        del layer.bottlenecks, layer.proj, layer.drop_path
        layer.__class__ = UnstackedLayer  # mode, hooks and what users have attached stay
    return model


def _ordered_layers(model: nn.Module) -> List[GunnLayer]:
    return [m for m in model.modules() if isinstance(m, GunnLayer) and m.ordered and m.segments > 1]


class UnstackedLayer(nn.Module):
    """What becomes of a GunnLayer, with units that are modules: (B, N, H, W) to (B, N, H, W), Eq. 4 and 5."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Update x segment by segment."""
        segments = x.chunk(len(self.units), 1)
        state = [segments[i] for i in range(len(self.units))]
        for i, unit in enumerate(self.units):
            update = unit(torch.cat(state, 1))  # of y_1 ... y_{i-1}, x_i ... x_P
            state[i] = state[i] + update if self.residual else update
        return torch.cat(state, 1)


class Unit(nn.Module):
    """U_i of a layer, with copies of its parameters: (B, N, H, W) to (B, o, H, W)."""

    def __init__(self, layer: GunnLayer, i: int):
        super().__init__()
        # What a copy makes of the layer's tensors: slices of those that are stacked; all units share the others.
        memo = {id(p): p for p in layer.parameters()}
        for m in layer._conv_norms():
            for t in [*m.parameters(), *m.buffers()]:
                if t.numel() > 1:
                    part = t.detach()[i * m.unit_chs:(i + 1) * m.unit_chs].clone()
                    memo[id(t)] = nn.Parameter(part, t.requires_grad) if isinstance(t, nn.Parameter) else part
        self.bottlenecks, self.proj = copy.deepcopy((layer.bottlenecks, layer.proj), memo)
        self.drop_path = copy.deepcopy(layer.drop_path)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                m.in_channels, m.out_channels, m.groups = m.weight.shape[1], m.weight.shape[0], 1
            elif hasattr(m, 'num_features'):
                m.num_features //= layer.segments
        self.training = layer.training

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The update of a segment from the whole state."""
        update = self.bottlenecks(x)
        if self.proj is not None:
            update = self.proj(x) + update
        return self.drop_path(update)
