"""A convolution of the ordered layer and its norm, taken apart by unit."""
from typing import List, Type

import torch
import torch.nn.functional as F
from torch.nn.utils import fuse_conv_bn_weights
from torch.utils._triton import has_triton_package

from .aten_norm import AtenNorm, Params, stats_dtype


class Conv:
    """A convolution of all units and its norm, in the dtype to compute in; those of one pixel as matrices."""

    def __init__(
            self, params: Params, stats: List[torch.Tensor], eps: float, rows: int, segments: int, dtype: torch.dtype,
            fold: bool,
    ):
        batch_stats = params.takes_batch_stats
        if batch_stats and stats:
            params = params._replace(mean=stats[0], variance=stats[1])
        # On a CPU, folding large weights costs more than normalising small maps.
        elif fold and params.mean.numel() and (params.weight.is_cuda or params.weight[0].numel() <= rows):
            params = folded(params, eps, stats_dtype(dtype))
        self.params = params
        weight = params.weight.to(dtype)
        self.weight = weight.flatten(1) if weight.shape[2] == 1 else weight
        self.weights = self.weight.chunk(segments)
        self.unit_chs = len(weight) // segments
        self.norm = norm_class(weight)(params, eps, batch_stats, rows, segments, dtype)
        self.bias = params.beta.to(dtype) if params.beta.numel() and not self.norm.exists else None
        self.biases = [None] * segments if self.bias is None else self.bias.chunk(segments)

    def prepare_gradients(self, needs: List[bool]) -> None:
        """`needs` says which gradients are wanted of weight, gamma and beta."""
        self.needs = needs
        self.norm.affine_needed = any(needs[1:])
        self.grad = torch.empty_like(self.params.weight, dtype=self.weight.dtype) if needs[0] else None
        self.grads: List[torch.Tensor] = []  # what is still to be copied there, from the last unit to the first

    def channels(self, start: int, stop: int) -> slice:
        """Output channels of units [start, stop)."""
        return slice(start * self.unit_chs, stop * self.unit_chs)

    def linear(self, i: int, x: torch.Tensor) -> torch.Tensor:
        """Output of unit i, for convolutions of one pixel."""
        return F.linear(x, self.weights[i], self.biases[i])

    def write_gradient(self, i: int, d: torch.Tensor, x: torch.Tensor) -> None:
        """Gradient of unit i's weight, d^T x, for convolutions of one pixel."""
        if self.needs[0]:
            torch.mm(d.t(), x, out=self.grad.view_as(self.weight)[self.channels(i, i + 1)])

    def gradients(self) -> List[torch.Tensor]:
        """Those that are needed of weight, gamma and beta, in the parameters' dtypes and strides."""
        if self.grads and self.needs[0]:
            torch.cat(self.grads[::-1], out=self.grad)
        grads = self.grad, torch.cat(self.norm.grad_gamma), torch.cat(self.norm.grad_beta)
        return [g.to(p.dtype) for g, p, need in zip(grads, self.params, self.needs, strict=False) if need]


def norm_class(weight: torch.Tensor) -> Type[AtenNorm]:
    """Norm of a weight's device: by Triton kernels on CUDA devices, where Triton is installed."""
    if weight.is_cuda and has_triton_package():
        from .triton_norm import TritonNorm
        return TritonNorm
    return AtenNorm


def folded(p: Params, eps: float, dtype: torch.dtype) -> Params:
    """A convolution with a bias that does what it and its norm do."""
    weight, gamma, beta, mean, variance = (t.to(dtype) for t in p)
    weight, bias = fuse_conv_bn_weights(weight, None, mean, variance, eps, gamma, beta)
    return Params(weight, gamma[:0], bias, gamma[:0], gamma[:0])
