"""The GUNN layer again, written from the paper with one module per update unit. Slow, plain, and independent.

And what makes any network depend on its norms.
"""
from typing import Callable

import torch
import torch.nn as nn


def randomise(model: nn.Module) -> nn.Module:
    """Give norms statistics and parameters that a fresh network lacks, so that eval mode depends on them."""
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            for t in [*m.parameters(), *m.buffers()]:
                if t.is_floating_point():
                    t.data.uniform_(0.5, 1.5)
    return model


class ConvNorm(nn.Module):
    def __init__(self, in_chs: int, out_chs: int, kernel_size: int, dilation: int, norm: Callable):
        super().__init__()
        padding = dilation * (kernel_size // 2)
        self.conv = nn.Conv2d(in_chs, out_chs, kernel_size, padding=padding, dilation=dilation, bias=False)
        self.bn = norm(out_chs)

    def forward(self, x):
        return self.bn(self.conv(x))


class Bottleneck(nn.Module):
    def __init__(self, in_chs: int, hidden_chs: int, out_chs: int, dilation: int, act: Callable, norm: Callable):
        super().__init__()
        self.conv1 = ConvNorm(in_chs, hidden_chs, 1, 1, norm)
        self.conv2 = ConvNorm(hidden_chs, hidden_chs, 3, dilation, norm)
        self.conv3 = ConvNorm(hidden_chs, out_chs, 1, 1, norm)
        self.act = act()

    def forward(self, x):
        return self.conv3(self.act(self.conv2(self.act(self.conv1(x)))))


class Unit(nn.Module):
    """U_i of Eq. 5. Its parameters bear the names of the stacked ones."""

    def __init__(self, n, p, k, m, shortcut, dilation, act, norm):
        super().__init__()
        o, e = n // p, k * n // p
        self.bottlenecks = nn.Sequential(*[Bottleneck(o if j else n, e, o, dilation, act, norm) for j in range(m)])
        self.proj = ConvNorm(n, o, 1, 1, norm) if shortcut else None

    def forward(self, s):
        return self.bottlenecks(s) if self.proj is None else self.proj(s) + self.bottlenecks(s)


class ReferenceLayer(nn.Module):
    """y_i = x_i + U_i(y_1 ... y_{i-1}, x_i ... x_P), or + U_i(x) without the order."""

    def __init__(self, n, p, k=2, m=1, *, ordered=True, residual=True, shortcut=False, dilation=1,
                 act=nn.ReLU, norm=nn.BatchNorm2d):
        super().__init__()
        self.ordered, self.residual = ordered, residual
        self.members = nn.ModuleList([Unit(n, p, k, m, shortcut, dilation, act, norm) for _ in range(p)])

    def forward(self, x):
        xs = x.chunk(len(self.members), 1)
        ys = []
        for i, unit in enumerate(self.members):
            update = unit(torch.cat([*ys, *xs[i:]], 1) if self.ordered else x)
            ys.append(xs[i] + update if self.residual else update)
        return torch.cat(ys, 1)

    def load_stacked(self, state: dict) -> None:
        """Load the state dict of a GunnLayer: unit i gets the i-th of P equal parts of every tensor."""
        for i, unit in enumerate(self.members):
            unit.load_state_dict({k: v.chunk(len(self.members))[i] if v.ndim else v for k, v in state.items()})

    def stacked(self, name: str, get: Callable = lambda t: t) -> torch.Tensor:
        """The named parameter or buffer of all units as a GunnLayer holds it; counters must agree among the units."""
        values = [get(dict([*u.named_parameters(), *u.named_buffers()])[name]) for u in self.members]
        if values[0].ndim == 0:
            assert all(torch.equal(v, values[0]) for v in values)
            return values[0]
        return torch.cat(values)
