"""Norms of the ordered layer by PyTorch's kernels, and what a convolution and its norm have as parameters."""
from typing import List, NamedTuple, Optional, Tuple

import torch

aten = torch.ops.aten


class Params(NamedTuple):
    """Parameters of a convolution and its norm, stacked over the units.

    Mean and variance are empty where the norm takes those of the batch. Gamma is empty where there is no norm; then
    beta is the bias of the convolution, or empty too.
    """

    weight: torch.Tensor
    gamma: torch.Tensor
    beta: torch.Tensor
    mean: torch.Tensor
    variance: torch.Tensor

    @property
    def takes_batch_stats(self) -> bool:
        return self.gamma.numel() > 0 and self.mean.numel() == 0


def unflatten(params: List[torch.Tensor]) -> List[Params]:
    """Of the three convolutions of each bottleneck, and last of the projection, if there is one."""
    return [Params(*params[i:i + 5]) for i in range(0, len(params), 5)]


def stats_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of statistics, and of what is computed with them."""
    return torch.float32 if dtype.itemsize == 2 else dtype


class AtenNorm:
    """The norm behind a convolution of P units, or none, by PyTorch's kernels, on (rows, width) matrices of one unit.

    CPU kernels are slow on channels that do not fill their vectors. On 25,088 x 20 float32 numbers,
    native_batch_norm_backward takes 15 times as long as on the same numbers seen as 6,272 x 80. So several rows are
    taken as one wide row, and results of reductions are merged.
    """

    def __init__(self, params: Params, eps: float, batch_stats: bool, rows: int, segments: int, dtype: torch.dtype):
        self.exists, self.batch_stats = params.gamma.numel() > 0, batch_stats
        self.rows, self.eps, self.dtype = rows, eps, dtype
        self.affine_needed = True
        self.empty = params.beta.new_zeros(0, dtype=stats_dtype(dtype))
        self.grad_gamma, self.grad_beta = [self.empty] * segments, [self.empty] * segments
        if self.exists:
            self.pack = self._pack(params.gamma, segments)
            known = [self._repeat(t.to(stats_dtype(dtype)).view(segments, -1)) for t in params[1:] if t.numel()]
            # gamma, beta, mean and variance of each unit; the last two are still to come where they are the batch's
            self.vectors = list(zip(*[t.unbind() for t in known], strict=True))
            self._prepare(known)

    def _pack(self, gamma: torch.Tensor, segments: int) -> int:
        width, lanes, pack = len(gamma) // segments, 64 // self.dtype.itemsize, 1
        if not gamma.is_cuda and self.rows * width >= 2 ** 13:
            while pack * width % lanes and pack < lanes and self.rows % (2 * pack) == 0:
                pack *= 2
        return pack

    def _prepare(self, known: List[torch.Tensor]) -> None:
        """Make ready what all units use of `vectors`, (P, channels) each."""
        # Given running statistics of float32, PyTorch's kernels return float32 for an h of 16 bits too.
        self.running = known[0].new_zeros(2, known[0].shape[1])
        if len(known) == 4:
            self.inv_stds = (known[3] + self.eps).rsqrt_().unbind()

    def _wide(self, h: torch.Tensor) -> torch.Tensor:
        return h if self.pack == 1 else h.view(self.rows // self.pack, -1)

    def _repeat(self, t: torch.Tensor) -> torch.Tensor:
        """Repeat (channels,), or (P, channels), for the channels of wide rows."""
        return t if self.pack == 1 else torch.cat([t] * self.pack, -1)

    def measure(self, i: int, h: torch.Tensor) -> torch.Tensor:
        """Take the statistics of the batch for unit i, if they are wanted; returns h."""
        if self.batch_stats:
            self.vectors[i] += tuple(map(self._repeat, self._statistics(h)))
        return h

    def _statistics(self, h: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        h = self._wide(h)
        mean, variance = aten.batch_norm_update_stats(h, *self.running.unbind(), 0.0)
        if self.pack > 1:
            within = variance.view(self.pack, -1).sum(0)
            between, mean = torch.var_mean(mean.view(self.pack, -1), 0, correction=0)
            variance = torch.add(between, within, alpha=1 / self.pack)
        return mean, variance

    def batch_statistics(self) -> List[torch.Tensor]:
        """Mean and biased variance of the batch, of all units; empty if they were not taken."""
        if not self.batch_stats:
            return [self.empty, self.empty.clone()]
        return [torch.cat([v[k][:len(v[k]) // self.pack] for v in self.vectors]) for k in (2, 3)]

    def apply(self, i: int, h: torch.Tensor) -> torch.Tensor:
        """Normalise; h itself without a norm."""
        if not self.exists:
            return h
        return aten.native_batch_norm(self._wide(h), *self.vectors[i], False, 0.0, self.eps)[0].view_as(h)

    def activate(self, i: int, h: torch.Tensor, in_place: bool = False) -> torch.Tensor:
        """ReLU of apply(); `in_place` allows to overwrite h."""
        a = self.apply(i, h)
        return a.relu() if a is h and not in_place else a.relu_()

    def update(
            self, i: int, h: torch.Tensor, out: torch.Tensor, other: 'Optional[Tuple[AtenNorm, torch.Tensor]]' = None,
            add: bool = False, state: Optional[torch.Tensor] = None, change: Optional[torch.Tensor] = None,
            drop_scale: Optional[torch.Tensor] = None,
    ) -> None:
        """Write the normalised h to `out`, or add it.

        Args:
            other: Norm and matrix of a second term.
            state: Where else to write the sum.
            change: Takes what was added, or the difference to what was there.
            drop_scale: Factor of each sample's update, (B, 1, 1).
        """
        update = self.apply(i, h)
        if other is not None:
            norm, t = other
            update.add_(norm.apply(i, t))
        if drop_scale is not None:
            update.view(len(drop_scale), -1, update.shape[1]).mul_(drop_scale)
        if change is not None:
            torch.sub(update, 0 if add else out if state is None else state, out=change)
        if add:
            out.add_(update)
        else:
            out.copy_(update)
        if state is not None:
            state.copy_(out)

    @property
    def reads_input(self) -> bool:
        """Whether backward() reads h."""
        return self.exists and (self.batch_stats or self.affine_needed)

    def backward(
            self,
            i: int,
            grad: torch.Tensor,
            h: Optional[torch.Tensor],
            a: Optional[torch.Tensor] = None,
            out: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        """Gradient of h from that of apply(i, h), or of a = activate(i, h), which it may overwrite then.

        Keeps the gradients of gamma and beta, if they are needed. Writes to `out`, too, if that is given.
        """
        grad = grad.to(self.dtype).contiguous()
        if a is not None:
            aten.threshold_backward.grad_input(grad, a, 0, grad_input=grad)
        if self.exists:
            grad = self._backward(i, self._wide(grad), None if h is None else self._wide(h)).view_as(grad)
        elif self.affine_needed:
            self.grad_beta[i] = grad.sum(0)
        return grad if out is None else out.copy_(grad)

    def _backward(self, i: int, grad: torch.Tensor, h: Optional[torch.Tensor]) -> torch.Tensor:
        gamma, _, mean, variance = self.vectors[i]
        inv_std = self.inv_stds[i]
        if grad.is_cuda and self.reads_input:  # on a CPU, several calls are faster than this one
            grad_h, self.grad_gamma[i], self.grad_beta[i] = aten.native_batch_norm_backward(
                grad, h, gamma, mean, variance, mean, inv_std, self.batch_stats, self.eps, [True, True, True])
            return grad_h
        scale = gamma * inv_std
        if self.reads_input:
            _, *sums = aten.native_batch_norm_backward(
                grad, h, None, mean, variance, None, None, False, self.eps, [False, True, True])
            self.grad_gamma[i], self.grad_beta[i] = (
                sums if self.pack == 1 else (t.view(self.pack, -1).sum(0) for t in sums))
        if not self.batch_stats:
            return (grad * scale).to(self.dtype)
        # scale * (grad - grad_beta / rows - normalised h * grad_gamma / rows), written as linear in grad and h
        by_h = (scale * inv_std).mul_(self._repeat(self.grad_gamma[i])).div_(-self.rows)
        constant = (scale / -self.rows).mul_(self._repeat(self.grad_beta[i])).addcmul_(by_h, mean, value=-1)
        return torch.addcmul(constant, h, by_h).addcmul_(grad, scale).to(self.dtype)
