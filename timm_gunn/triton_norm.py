"""The norms of the fused layer for CUDA devices: fewer passes over memory than one kernel per operation makes.

A norm and what follows it, ReLU or the addition to the state, are one pass. So are the ReLU's mask and the sums that
the gradient of a norm takes, which read h instead of the activation. Programs leave their sums in a matrix, which a
second kernel adds up: results are the same in every run.
"""
import math
from typing import Callable, List, Optional, Tuple

import torch
import triton
import triton.language as tl

from .aten_norm import AtenNorm

# Programs at most, numbers that one takes at once, and its warps: for an H100's 132 multiprocessors.
PASS, SUM = (2112, 2048, 4), (128, 16384, 16)

MATRICES = 'h', 'other', 'out', 'state', 'change', 'grad'  # how these are aligned may choose the kernel


def _jit(function: Callable) -> Callable:
    """Compile once for all sizes."""
    names = function.__code__.co_varnames[:function.__code__.co_argcount]
    return triton.jit(function, do_not_specialize=[n for n in names if n not in MATRICES and not n.isupper()])


def launch(kernel: Callable, programs: int, warps: int, *args, **constants) -> None:
    """Run a kernel on the device of its first argument. Replace this to count launches or to leave them out."""
    with torch.cuda.device_of(args[0]):
        kernel[(programs,)](*args, num_warps=warps, **constants)


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


@triton.jit
def _is_last(ticket):
    """Whether all other programs have got here; what they stored before is visible then."""
    tl.debug_barrier()
    return tl.atomic_add(ticket, 1, sem='acq_rel') == tl.num_programs(0) - 1


@triton.jit
def _totals(partials, ticket, channels, c, c_ok, dtype: tl.constexpr, COUNT: tl.constexpr, CHANNELS: tl.constexpr):
    """Add up what the programs left, and make ready for the next launch."""
    x = tl.zeros((COUNT, CHANNELS), dtype)
    y = tl.zeros((COUNT, CHANNELS), dtype)
    start = 0
    while start < tl.num_programs(0):
        p = start + tl.arange(0, COUNT)
        ok = (p < tl.num_programs(0))[:, None] & c_ok[None, :]
        at = partials + p[:, None] * 2 * channels + c[None, :]
        x += tl.load(at, ok, 0.0, cache_modifier='.cg')
        y += tl.load(at + channels, ok, 0.0, cache_modifier='.cg')
        start += COUNT
    tl.store(ticket, 0)
    return tl.sum(x, 0), tl.sum(y, 0)


@_jit
def _statistics(
        h, h_step, partials, ticket, mean, variance, rows, channels, ALIGN: tl.constexpr, ROWS: tl.constexpr,
        CHANNELS: tl.constexpr, COUNT: tl.constexpr):
    """Mean and variance, from sums of h - shift and of its square, where the shift is the mean of some rows."""
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
    if _is_last(ticket):
        x, y = _totals(partials, ticket, channels * ALIGN, c, c_ok, dtype, COUNT, CHANNELS)
        x /= rows.to(dtype)
        tl.store(mean + c, shift + x, c_ok)
        tl.store(variance + c, tl.maximum(y / rows.to(dtype) - x * x, 0.0), c_ok)


@_jit
def _gradient_sums(
        grad, grad_step, h, h_step, gamma, beta, mean, variance, partials, ticket, grad_gamma, grad_beta, rows,
        channels, EPS: tl.constexpr, RELU: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr,
        CHANNELS: tl.constexpr, COUNT: tl.constexpr):
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
    tl.store(at, tl.sum(for_gamma, 0), c_ok)
    tl.store(at + channels * ALIGN, tl.sum(for_beta, 0), c_ok)
    if _is_last(ticket):
        x, y = _totals(partials, ticket, channels * ALIGN, c, c_ok, dtype, COUNT, CHANNELS)
        tl.store(grad_gamma + c, x * tl.rsqrt(tl.load(variance + c, c_ok, 1.0) + EPS), c_ok)
        tl.store(grad_beta + c, y, c_ok)


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


class TritonNorm(AtenNorm):
    """AtenNorm for CUDA devices. Its matrices may be column slices of larger ones, gradients of any dtype."""

    def _prepare(self, known: List[torch.Tensor]) -> None:
        width = known[0].shape[1]
        self.lanes = triton.next_power_of_2(width)
        self.count = min(triton.next_power_of_2(SUM[0]), max(1, 8192 // self.lanes))  # partial sums read at once
        self.partials = self.empty.new_empty(SUM[0], 2, width)
        self.ticket = self.empty.new_zeros(1, dtype=torch.int32)

    def _pack(self, gamma: torch.Tensor, segments: int) -> int:
        return 1

    def _blocks(self, shape: Tuple[int, int, int], *matrices: torch.Tensor) -> Tuple[int, int, int, dict]:
        """Programs and warps; what divides channels and row steps, so that loads are wide; shape of a block."""
        programs, size, warps = shape
        rows = max(1, size // self.lanes)
        align = math.gcd(8, matrices[0].shape[1], *[t.stride(0) for t in matrices])
        return (min(programs, -(-self.rows // rows)), warps, align,
                dict(ALIGN=align, ROWS=rows, CHANNELS=self.lanes))

    def _statistics(self, h: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        programs, warps, align, blocks = self._blocks(SUM, h)
        mean, variance = self.empty.new_empty(2, h.shape[1]).unbind()
        launch(_statistics, programs, warps, h, h.stride(0) // align, self.partials, self.ticket, mean, variance,
               self.rows, h.shape[1] // align, COUNT=self.count, **blocks)
        return mean, variance

    def apply(self, i: int, h: torch.Tensor) -> torch.Tensor:
        return self._write(i, h, h.new_empty(h.shape)) if self.exists else h

    def activate(self, i: int, h: torch.Tensor, in_place: bool = False) -> torch.Tensor:
        if not self.exists:
            return super().activate(i, h, in_place)
        return self._write(i, h, h if in_place else h.new_empty(h.shape), relu=True)

    def update(
            self, i: int, h: torch.Tensor, out: torch.Tensor, other: 'Optional[Tuple[TritonNorm, torch.Tensor]]' = None,
            drop_scale: Optional[torch.Tensor] = None, **where,
    ) -> None:
        if drop_scale is None and self.exists and (other is None or other[0].exists):
            self._write(i, h, out, other, **where)
        else:
            super().update(i, h, out, other, drop_scale=drop_scale, **where)

    def _write(
            self, i: int, h: torch.Tensor, out: torch.Tensor, other: 'Optional[Tuple[TritonNorm, torch.Tensor]]' = None,
            add: bool = False, state: Optional[torch.Tensor] = None, change: Optional[torch.Tensor] = None,
            relu: bool = False,
    ) -> torch.Tensor:
        norm, t = other or (self, h)
        state, change_to = out if state is None else state, out if change is None else change
        programs, warps, align, blocks = self._blocks(PASS, h, t, out, state, change_to)
        launch(_forward, programs, warps, h, h.stride(0) // align, *self.vectors[i], t, t.stride(0) // align,
               *norm.vectors[i], out, out.stride(0) // align, state, state.stride(0) // align, change_to,
               change_to.stride(0) // align, self.rows, h.shape[1] // align, EPS=self.eps, OTHER_EPS=norm.eps,
               RELU=relu, OTHER=other is not None, ADD=add, STATE=state is not out, CHANGE=change is not None, **blocks)
        return out

    def backward(
            self, i: int, grad: torch.Tensor, h: Optional[torch.Tensor], a: Optional[torch.Tensor] = None,
            out: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        if not self.exists:
            return super().backward(i, grad, h, a, out)
        h, relu = grad if h is None else h, a is not None
        out = h.new_empty(h.shape, dtype=self.dtype) if out is None else out
        matrices, channels = (grad, h, out), h.shape[1]
        grad_gamma, grad_beta = self.empty.new_empty(2, channels).unbind()
        if self.reads_input:
            self.grad_gamma[i], self.grad_beta[i] = grad_gamma, grad_beta
            programs, warps, align, blocks = self._blocks(SUM, *matrices)
            launch(_gradient_sums, programs, warps, grad, grad.stride(0) // align, h, h.stride(0) // align,
                   *self.vectors[i], self.partials, self.ticket, grad_gamma, grad_beta, self.rows, channels // align,
                   EPS=self.eps, RELU=relu, COUNT=self.count, **blocks)
        programs, warps, align, blocks = self._blocks(PASS, *matrices)
        launch(_backward, programs, warps, grad, grad.stride(0) // align, h, h.stride(0) // align, *self.vectors[i],
               grad_gamma, grad_beta, out, out.stride(0) // align, self.rows, channels // align, EPS=self.eps,
               RELU=relu, BATCH=self.batch_stats, **blocks)
        return out
