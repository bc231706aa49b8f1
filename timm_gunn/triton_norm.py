"""The norms of the fused layer for CUDA devices: fewer passes over memory than one kernel per operation makes.

A norm and what follows it, ReLU or the addition to the state, are one pass. So are the ReLU's mask and the sums that
the gradient of a norm takes, which read h instead of the activation. Programs leave their sums in a matrix, which a
second kernel adds up: results are the same in every run.
"""
import math
from typing import Callable, Optional, Tuple

import torch
import triton
import triton.language as tl

from timm_gunn.fused import _Norm

PROGRAMS = 512  # that sum up: about four for each of an H100's 132 multiprocessors
BLOCK = 2048  # numbers that a program takes at once

SIZES = ['h_step', 'other_step', 'out_step', 'state_step', 'change_step', 'grad_step', 'rows', 'channels', 'count']
VECTORS = [
    'gamma', 'beta', 'mean', 'variance', 'other_gamma', 'other_beta', 'other_mean', 'other_variance',
    'grad_gamma', 'grad_beta', 'first', 'second']


def _jit(function: Callable) -> Callable:
    """Compile once for all sizes."""
    names = function.__code__.co_varnames[:function.__code__.co_argcount]
    return triton.jit(function, do_not_specialize=[n for n in SIZES + VECTORS if n in names])


def launch(kernel: Callable, programs: int, *args, **constants) -> None:
    """Run a kernel on the device of its first argument. Replace this to count launches or to leave them out."""
    with torch.cuda.device_of(args[0]):
        kernel[(programs,)](*args, num_warps=4, **constants)


@triton.jit
def _factors(gamma, beta, mean, variance, c, ok, EPS: tl.constexpr):
    scale = tl.rsqrt(tl.load(variance + c, ok, 1.0) + EPS) * tl.load(gamma + c, ok, 0.0)
    return scale[None, :], tl.load(mean + c, ok, 0.0)[None, :], tl.load(beta + c, ok, 0.0)[None, :]


@triton.jit
def _normalise(h, scale, centre, shift):
    """What forward and backward pass must agree on to the last bit, for the sake of the ReLU."""
    d = h.to(scale.dtype) - centre
    return tl.fma(d, tl.broadcast_to(scale, d.shape), tl.broadcast_to(shift, d.shape))


@_jit
def _forward(
        h, h_step, gamma, beta, mean, variance, other, other_step, other_gamma, other_beta, other_mean, other_variance,
        out, out_step, state, state_step, change, change_step, rows, channels, EPS: tl.constexpr,
        OTHER_EPS: tl.constexpr, RELU: tl.constexpr, OTHER: tl.constexpr, ADD: tl.constexpr, STATE: tl.constexpr,
        CHANGE: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    c = tl.arange(0, CHANNELS)
    c_ok = c < channels * ALIGN
    scale, centre, shift = _factors(gamma, beta, mean, variance, c, c_ok, EPS)
    if OTHER:
        other_scale, other_centre, other_shift = _factors(
            other_gamma, other_beta, other_mean, other_variance, c, c_ok, OTHER_EPS)
    block = tl.program_id(0)
    while block * ROWS < rows:
        r = block * ROWS + tl.arange(0, ROWS)
        block += tl.num_programs(0)
        ok = (r < rows)[:, None] & c_ok[None, :]
        r = r.to(tl.int64)[:, None]
        z = _normalise(tl.load(h + r * (h_step * ALIGN) + c[None, :], ok, 0.0), scale, centre, shift)
        if OTHER:
            t = tl.load(other + r * (other_step * ALIGN) + c[None, :], ok, 0.0)
            z += _normalise(t, other_scale, other_centre, other_shift)
        if RELU:
            z = tl.where(z < 0, 0.0, z)
        out_at = out + r * (out_step * ALIGN) + c[None, :]
        state_at = state + r * (state_step * ALIGN) + c[None, :]
        if CHANGE:
            d = z
            if not ADD:
                d -= tl.load(state_at, ok, 0.0).to(z.dtype)
            tl.store(change + r * (change_step * ALIGN) + c[None, :], d.to(change.dtype.element_ty), ok)
        if ADD:
            z += tl.load(out_at, ok, 0.0).to(z.dtype)
        tl.store(out_at, z.to(out.dtype.element_ty), ok)
        if STATE:
            tl.store(state_at, z.to(state.dtype.element_ty), ok)


@_jit
def _statistics(
        h, h_step, partials, mean, rows, channels, ALIGN: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Sums of h - shift and of its square; the shift, the mean of some rows, is left in `mean`."""
    dtype = mean.dtype.element_ty
    c = tl.arange(0, CHANNELS)
    c_ok = c < channels * ALIGN
    r = tl.arange(0, ROWS)
    first = tl.load(h + r[:, None] * (h_step * ALIGN) + c[None, :], (r < rows)[:, None] & c_ok[None, :], 0.0)
    shift = tl.sum(first.to(dtype), 0) / tl.minimum(rows, ROWS).to(dtype)
    sums = tl.zeros((ROWS, CHANNELS), dtype)
    squares = tl.zeros((ROWS, CHANNELS), dtype)
    block = tl.program_id(0)
    while block * ROWS < rows:
        r = block * ROWS + tl.arange(0, ROWS)
        block += tl.num_programs(0)
        ok = (r < rows)[:, None] & c_ok[None, :]
        d = tl.load(h + r.to(tl.int64)[:, None] * (h_step * ALIGN) + c[None, :], ok, 0.0).to(dtype) - shift[None, :]
        d = tl.where(ok, d, 0.0)
        sums += d
        squares += d * d
    at = partials + tl.program_id(0) * 2 * channels * ALIGN + c
    tl.store(at, tl.sum(sums, 0), c_ok)
    tl.store(at + channels * ALIGN, tl.sum(squares, 0), c_ok)
    if tl.program_id(0) == 0:
        tl.store(mean + c, shift, c_ok)


@_jit
def _gradient_sums(
        grad, grad_step, h, h_step, gamma, beta, mean, variance, partials, rows, channels, EPS: tl.constexpr,
        RELU: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Sums for the gradients of gamma and beta."""
    dtype = mean.dtype.element_ty
    c = tl.arange(0, CHANNELS)
    c_ok = c < channels * ALIGN
    scale, centre, shift = _factors(gamma, beta, mean, variance, c, c_ok, EPS)
    for_gamma = tl.zeros((ROWS, CHANNELS), dtype)
    for_beta = tl.zeros((ROWS, CHANNELS), dtype)
    block = tl.program_id(0)
    while block * ROWS < rows:
        r = block * ROWS + tl.arange(0, ROWS)
        block += tl.num_programs(0)
        ok = (r < rows)[:, None] & c_ok[None, :]
        r = r.to(tl.int64)[:, None]
        g = tl.load(grad + r * (grad_step * ALIGN) + c[None, :], ok, 0.0).to(dtype)
        t = tl.load(h + r * (h_step * ALIGN) + c[None, :], ok, 0.0)
        if RELU:
            g = tl.where(_normalise(t, scale, centre, shift).to(h.dtype.element_ty) <= 0, 0.0, g)
        for_gamma += g * (t.to(dtype) - centre)
        for_beta += g
    at = partials + tl.program_id(0) * 2 * channels * ALIGN + c
    tl.store(at, tl.sum(for_gamma, 0) * tl.rsqrt(tl.load(variance + c, c_ok, 1.0) + EPS), c_ok)
    tl.store(at + channels * ALIGN, tl.sum(for_beta, 0), c_ok)


@_jit
def _merge(
        partials, first, second, count, rows, channels, STATS: tl.constexpr, COUNT: tl.constexpr,
        CHANNELS: tl.constexpr):
    """Add up what the programs left: mean and variance, or the gradients of gamma and beta."""
    dtype = first.dtype.element_ty
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    c_ok = c < channels
    p = tl.arange(0, COUNT)
    ok = (p < count)[:, None] & c_ok[None, :]
    at = partials + p[:, None] * 2 * channels + c[None, :]
    x = tl.sum(tl.load(at, ok, 0.0), 0)
    y = tl.sum(tl.load(at + channels, ok, 0.0), 0)
    if STATS:
        x /= rows.to(dtype)
        y = tl.maximum(y / rows.to(dtype) - x * x, 0.0)
        x += tl.load(first + c, c_ok, 0.0)
    tl.store(first + c, x, c_ok)
    tl.store(second + c, y, c_ok)


@_jit
def _backward(
        grad, grad_step, h, h_step, gamma, beta, mean, variance, grad_gamma, grad_beta, out, out_step, rows, channels,
        EPS: tl.constexpr, RELU: tl.constexpr, BATCH: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr,
        CHANNELS: tl.constexpr):
    dtype = mean.dtype.element_ty
    c = tl.arange(0, CHANNELS)
    c_ok = c < channels * ALIGN
    scale, centre, shift = _factors(gamma, beta, mean, variance, c, c_ok, EPS)
    if BATCH:
        inv_std = tl.rsqrt(tl.load(variance + c, c_ok, 1.0) + EPS)
        slope = (inv_std * tl.load(grad_gamma + c, c_ok, 0.0) / rows.to(dtype))[None, :]
        offset = (tl.load(grad_beta + c, c_ok, 0.0) / rows.to(dtype))[None, :]
    block = tl.program_id(0)
    while block * ROWS < rows:
        r = block * ROWS + tl.arange(0, ROWS)
        block += tl.num_programs(0)
        ok = (r < rows)[:, None] & c_ok[None, :]
        r = r.to(tl.int64)[:, None]
        g = tl.load(grad + r * (grad_step * ALIGN) + c[None, :], ok, 0.0).to(dtype)
        if RELU or BATCH:
            t = tl.load(h + r * (h_step * ALIGN) + c[None, :], ok, 0.0)
        if RELU:
            g = tl.where(_normalise(t, scale, centre, shift).to(h.dtype.element_ty) <= 0, 0.0, g)
        if BATCH:
            g -= (t.to(dtype) - centre) * slope + offset
        tl.store(out + r * (out_step * ALIGN) + c[None, :], (g * scale).to(out.dtype.element_ty), ok)


class TritonNorm(_Norm):
    """_Norm for CUDA devices. Its matrices may be column slices of larger ones, gradients of any dtype."""

    takes_slices = True

    def _blocks(self, *matrices: torch.Tensor) -> Tuple[int, int, dict]:
        """Number of blocks; what divides channels and row steps, so that loads are wide; shape of a block."""
        channels = matrices[0].shape[1]
        width = triton.next_power_of_2(channels)
        rows = max(1, BLOCK // width)
        align = math.gcd(8, channels, *[t.stride(0) for t in matrices])
        return triton.cdiv(self.rows, rows), align, dict(ALIGN=align, ROWS=rows, CHANNELS=width)

    def _vectors(self, i: int) -> Tuple[torch.Tensor, ...]:
        return self.gammas[i], self.betas[i], self.means[i], self.variances[i]

    def _merged(self, partials: torch.Tensor, first: torch.Tensor, second: torch.Tensor, stats: bool) -> None:
        launch(_merge, triton.cdiv(len(first), 8), partials, first, second, len(partials), self.rows, len(first),
               STATS=stats, COUNT=triton.next_power_of_2(len(partials)), CHANNELS=8)

    def measure(self, h: torch.Tensor) -> None:
        count, align, blocks = self._blocks(h)
        programs = min(count, PROGRAMS)
        mean, variance = h.new_empty(2, h.shape[1], dtype=self.stats_dtype).unbind()
        partials = h.new_empty(programs, 2, h.shape[1], dtype=self.stats_dtype)
        launch(_statistics, programs, h, h.stride(0) // align, partials, mean, self.rows, h.shape[1] // align, **blocks)
        self._merged(partials, mean, variance, True)
        self.means.append(mean)
        self.variances.append(variance)

    def activate(self, i: int, h: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return self.write(i, h, out, relu=True) if self.exists else super().activate(i, h, out)

    def apply(self, i: int, h: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return self.write(i, h, out) if self.exists else h

    def write(
            self,
            i: int,
            h: torch.Tensor,
            out: torch.Tensor,
            relu: bool = False,
            other: 'Optional[Tuple[TritonNorm, torch.Tensor]]' = None,
            add: bool = False,
            state: Optional[torch.Tensor] = None,
            change: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        """Write the normalised h to `out`, or add it.

        Args:
            other: Norm and matrix of a second term.
            state: Where else to write the sum; what it held before is subtracted from the change, unless `add`.
            change: Takes what was added, or the difference to the state.
        """
        norm, t = other or (self, h)
        state, change_to = out if state is None else state, out if change is None else change
        count, align, blocks = self._blocks(h, t, out, state, change_to)
        launch(_forward, min(count, 4 * PROGRAMS), h, h.stride(0) // align, *self._vectors(i), t, t.stride(0) // align,
               *norm._vectors(i), out, out.stride(0) // align, state, state.stride(0) // align, change_to,
               change_to.stride(0) // align, self.rows, h.shape[1] // align, EPS=self.eps, OTHER_EPS=norm.eps,
               RELU=relu, OTHER=other is not None, ADD=add, STATE=state is not out, CHANGE=change is not None, **blocks)
        return out

    def backward(
            self,
            i: int,
            grad: torch.Tensor,
            h: Optional[torch.Tensor],
            out: torch.Tensor,
            a: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        if not self.exists:
            return super().backward(i, grad.to(self.dtype), h, out, a)
        h, relu = grad if h is None else h, a is not None
        count, align, blocks = self._blocks(grad, h, out)
        programs = min(count, PROGRAMS)
        steps = [t.stride(0) // align for t in (grad, h, out)]
        channels = h.shape[1] // align
        grad_gamma, grad_beta = h.new_empty(2, h.shape[1], dtype=self.stats_dtype).unbind()
        if self.input_wanted:
            partials = h.new_empty(programs, 2, h.shape[1], dtype=self.stats_dtype)
            launch(_gradient_sums, programs, grad, steps[0], h, steps[1], *self._vectors(i), partials, self.rows,
                   channels, EPS=self.eps, RELU=relu, **blocks)
            self._merged(partials, grad_gamma, grad_beta, False)
            self.grad_gammas[i], self.grad_betas[i] = grad_gamma, grad_beta
        launch(_backward, min(count, 4 * PROGRAMS), grad, steps[0], h, steps[1], *self._vectors(i), grad_gamma,
               grad_beta, out, steps[2], self.rows, channels, EPS=self.eps, RELU=relu, BATCH=self.batch, **blocks)
        return out
