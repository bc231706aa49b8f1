"""The ordered GUNN layer as one operator on a state that is updated in place.

Unit i's first convolution reads the whole state, whose segments before i are already updated:

    h_i = sum over j < i of W_ij y_j + sum over j >= i of W_ij x_j    (Eq. 4; W is cut into P x P blocks)

Here the state is a matrix of B * H * W rows and N columns that the units update in place: h_i is a matrix product and
nothing is concatenated. The backward pass is Algorithm 1 of the paper. One gradient G, at first that of y, passes the
units from the last to the first, and what unit i sends back to its input is added to G in place; after the first unit,
G is the gradient of x. The gradients of W need x and y, but none of the states between them: the columns of W_i before
segment i have only ever met y, the others only x.

Neighbouring segments form blocks that share products. Else, the narrower the segments, the more often all N columns
would be read for a product with few columns. Forward, a block's units read the state before the block in one product,
and each adds what the changes within the block, y_j - x_j, contribute. Backward, what the units of a block send to its
own columns is passed on unit by unit, what they send to all others in one product for the block. The gradient of their
weights is computed as if all of them had met x in the block; the columns that they have met as y are then overwritten,
in products of halves.

What is kept for the backward pass are x, y and the outputs of the projection and of those convolutions that an
activation follows. All that
the norms, activations and narrow 1x1 convolutions make of these is computed again, in the same way. Where no backward
pass follows, norms with given statistics are folded into the weights.

`GunnLayer` chooses between this operator and the composite of its modules, which is the reference.
"""
import functools
import importlib.util
import math
from collections import defaultdict
from typing import Dict, List, Optional, Tuple

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import register_flop_formula

__all__ = ['ordered_update']

aten = torch.ops.aten

# Columns of the state in a block of segments that share products, if that many are more than one segment.
FORWARD_BLOCK, CUDA_FORWARD_BLOCK, BACKWARD_BLOCK = 64, 160, 160
TRITON = True  # Triton kernels for norms on CUDA devices


@torch.library.custom_op('timm_gunn::ordered_update', mutates_args=())
def ordered_update(
        x: torch.Tensor,
        params: List[torch.Tensor],
        kept: Optional[torch.Tensor],
        eps: List[float],
        segments: int,
        dilation: int,
        residual: bool,
        dtype: torch.dtype,
        keep: bool,
) -> Tuple[torch.Tensor, List[torch.Tensor], List[torch.Tensor]]:
    """Update a state segment by segment: Eq. 4 and 5.

    `params` has five entries per convolution, each stacked over the units: its weight, then weight (gamma), bias
    (beta), mean and variance of its norm. Mean and variance are empty where the norm takes those of the batch. Gamma
    is empty where there is no norm; then beta is the bias of the convolution, or empty too. The convolutions are
    conv1, conv2, conv3 of each bottleneck, and at the end the projection, if there is one.

    Args:
        x: State (B, N, H, W), of dtype `dtype` or float32.
        params: As above, in any floating dtype.
        kept: Factor of each sample's and segment's update (stochastic depth), (B, P), or None.
        eps: What each norm adds to the variance.
        segments: Number of segments P.
        dilation: Dilation of the 3x3 convolutions.
        residual: Add x_i to the update of segment i.
        dtype: Dtype to compute in; norms compute in float32 where it is one of 16 bits.
        keep: Return what the backward pass needs.

    Returns:
        The updated state, in shape, dtype and memory format of x. Mean and biased variance of the batch for every norm
        that takes them, else empty. The matrices kept for the backward pass, unit by unit.
    """
    with torch.autocast(x.device.type, enabled=False):
        batch_stats = [t.numel() == 0 for t in params[3::5]]
        if not keep:
            params = _fold_norms(x, params, eps)
        layer = _Layer(x, params, batch_stats, kept, eps, segments, dilation, residual, dtype)
        y, saved = layer.forward(x, keep)
        stats = [t for norm in layer.norms for t in norm.batch_statistics()]
        return y, stats, saved


@ordered_update.register_fake
def _(x, params, kept, eps, segments, dilation, residual, dtype, keep):
    batch_stats = [
        gamma.numel() > 0 and mean.numel() == 0 for gamma, mean in zip(params[1::5], params[3::5], strict=True)]
    stats = [
        x.new_empty(w.shape[0] if batch else 0, dtype=_stats_dtype(dtype))
        for w, batch in zip(params[::5], batch_stats, strict=True) for _ in range(2)]
    rows = x.shape[0] * x.shape[2] * x.shape[3]
    saved = [
        x.new_empty(rows, params[5 * k].shape[0] // segments, dtype=dtype)
        for _ in range(segments) for k in _kept_convs(len(eps))] if keep else []
    return torch.empty_like(x, memory_format=_memory_format(x)), stats, saved


@torch.library.custom_op('timm_gunn::ordered_update_backward', mutates_args=())
def ordered_update_backward(
        grad: torch.Tensor,
        x: torch.Tensor,
        y: torch.Tensor,
        params: List[torch.Tensor],
        saved: List[torch.Tensor],
        batch_stats: List[bool],
        needs: List[bool],
        kept: Optional[torch.Tensor],
        eps: List[float],
        segments: int,
        dilation: int,
        residual: bool,
        dtype: torch.dtype,
) -> Tuple[torch.Tensor, List[torch.Tensor]]:
    """Gradients of x and of weight, gamma and beta of every convolution: Algorithm 1 and Eq. 6.

    Mean and variance in `params` are those that were used, and `batch_stats` tells which were the batch's. `needs` has
    an entry for x and one for each entry of `params`; a gradient that is not needed is empty.
    """
    with torch.autocast(x.device.type, enabled=False):
        layer = _Layer(x, params, batch_stats, kept, eps, segments, dilation, residual, dtype)
        return layer.backward(grad, x, y, params, saved, needs)


@ordered_update_backward.register_fake
def _(grad, x, y, params, saved, batch_stats, needs, kept, eps, segments, dilation, residual, dtype):
    grad_x = torch.empty_like(x, memory_format=_memory_format(x)) if needs[0] else x.new_empty(0)
    return grad_x, [
        torch.empty_like(t) if need else t.new_empty(0)
        for k, (t, need) in enumerate(zip(params, needs[1:], strict=True)) if k % 5 < 3]


def _setup_context(ctx, inputs, output):
    x, params, kept, eps, *config, keep = inputs
    y, stats, saved = output
    if not keep:
        raise RuntimeError('timm_gunn::ordered_update: an input requires a gradient, expected keep=True.')
    ctx.set_materialize_grads(False)  # no zeros in the size of the saved tensors
    ctx.batch_stats = [t.numel() > 0 for t in stats[::2]]
    params = list(params)
    for k, batch in enumerate(ctx.batch_stats):
        # A later step in training mode may update given statistics before the backward pass of this one.
        used = stats[2 * k:2 * k + 2] if batch else [t.clone() for t in params[5 * k + 3:5 * k + 5]]
        params[5 * k + 3:5 * k + 5] = used
    ctx.num_params, ctx.has_kept = len(params), kept is not None
    ctx.config = eps, *config
    ctx.save_for_backward(x, y, *params, *saved, *([] if kept is None else [kept]))  # no None, for torchviz


def _backward(ctx, grad, *_):
    rest = [None] * 7
    if grad is None:
        return (None, [None] * ctx.num_params, *rest)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            'GunnLayer: the fused layer has no second derivative, and create_graph=True asks for one; '
            'set fused=False on the layer.')
    x, y, *tensors = ctx.saved_tensors
    kept = tensors.pop() if ctx.has_kept else None
    params, saved = tensors[:ctx.num_params], tensors[ctx.num_params:]
    needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[1]]
    grad_x, grads = ordered_update_backward(grad, x, y, params, saved, ctx.batch_stats, needs, kept, *ctx.config)
    it = iter(grads)
    grads = [next(it) if k % 5 < 3 else None for k in range(ctx.num_params)]
    return (
        grad_x if needs[0] else None,
        [g if need else None for g, need in zip(grads, needs[1:], strict=True)],
        *rest)


ordered_update.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.timm_gunn.ordered_update)
def _flops(x_shape, params_shapes, *_, **__) -> int:
    batch, _, height, width = x_shape
    return 2 * batch * height * width * sum(math.prod(shape) for shape in params_shapes[::5])


@register_flop_formula(torch.ops.timm_gunn.ordered_update_backward)
def _backward_flops(
        grad_shape, x_shape, y_shape, params_shapes, saved_shapes, batch_stats, needs, *_, **__,
) -> int:
    """FLOPs of the gradients, without what is computed again: the same as of the composite."""
    batch, _, height, width = x_shape
    return 2 * batch * height * width * sum(
        math.prod(shape) * (1 + needs[1 + 5 * k]) for k, shape in enumerate(params_shapes[::5]))


class _Layer:
    """A layer's parameters taken apart by unit, and what the units compute, on matrices (B * H * W, channels)."""

    def __init__(
            self,
            x: torch.Tensor,
            params: List[torch.Tensor],
            batch_stats: List[bool],
            kept: Optional[torch.Tensor],
            eps: List[float],
            segments: int,
            dilation: int,
            residual: bool,
            dtype: torch.dtype,
    ):
        batch, channels, height, width = x.shape
        self.map_shape, self.rows, self.device = (batch, height, width), batch * height * width, x.device
        self.buffers: Dict[Tuple[str, int], torch.Tensor] = {}
        self.segments, self.dilation, self.residual, self.dtype = segments, dilation, residual, dtype
        self.depth = len(eps) // 3
        weights = [w.to(dtype) for w in params[::5]]
        # 1x1 convolutions as matrices
        self.weights = [w.flatten(1) if w.shape[2] == 1 else w for w in weights]
        self.unit_weights = [w.chunk(segments) for w in self.weights]
        norm_class = _cuda_norm() if x.is_cuda else _CpuNorm
        self.norms = [
            norm_class(*params[5 * k + 1:5 * k + 5], e, batch_stats[k], self.rows, segments, dtype)
            for k, e in enumerate(eps)]
        self.readers = _readers(len(eps))
        # Norms that write where their results are wanted, and read the gradient where it is.
        self.in_place = all(norm.takes_slices and norm.exists for norm in self.norms)
        self.kept = None if kept is None else kept.to(_stats_dtype(dtype)).view(batch, 1, segments)
        self.width = channels // segments

    def _buffer(self, name: str, channels: int) -> torch.Tensor:
        """Working memory for one matrix, the same for every unit: fresh memory costs more than what is done with it."""
        key = name, channels
        if key not in self.buffers:
            self.buffers[key] = torch.empty(self.rows, channels, dtype=self.dtype, device=self.device)
        return self.buffers[key]

    def forward(self, x: torch.Tensor, keep: bool) -> Tuple[torch.Tensor, List[torch.Tensor]]:
        y = _clone(x)
        out = state = _matrix(y)
        if x.dtype != self.dtype:  # what the convolutions read is rounded, the residual is not
            state = out.to(self.dtype)
        saved: List[torch.Tensor] = []
        segments = out.split(self.width, 1)
        state_segments = segments if state is out else state.split(self.width, 1)
        for start, stop in self._blocks(CUDA_FORWARD_BLOCK if x.is_cuda else FORWARD_BLOCK):
            shared = [self._read(k, state, start, stop).chunk(stop - start, 1) for k in self.readers]
            # What has been added to the segments of the block, which the shared products do not know of.
            change = state.new_empty(len(state), (stop - start - 1) * self.width)
            for i in range(start, stop):
                reads = [
                    self._read_change(k, t[i - start], change, i, start)
                    for k, t in zip(self.readers, shared, strict=True)]
                terms = self._unit(i, reads, saved, keep)
                changed = change[:, self._columns(i - start, i - start + 1)] if i + 1 < stop else None
                if self.in_place and self.kept is None:
                    (norm, h), *other = terms
                    norm.write(
                        i, h, segments[i], other=other[0] if other else None, add=self.residual,
                        state=state_segments[i], change=changed)
                    continue
                update = self._sum(i, terms)
                if changed is not None:
                    changed.copy_(update if self.residual else update - state_segments[i])
                if self.residual:
                    segments[i].add_(update)
                else:
                    segments[i].copy_(update)
                if state is not out:
                    state_segments[i].copy_(segments[i])
        return y.contiguous(memory_format=_memory_format(x)), saved

    def _blocks(self, columns: int) -> List[Tuple[int, int]]:
        """First segment of each block, and the one after its last."""
        size = min(self.segments, max(1, columns // self.width))
        return [(start, min(start + size, self.segments)) for start in range(0, self.segments, size)]

    def _columns(self, start: int, stop: int) -> slice:
        """Columns of segments [start, stop) in the state."""
        return slice(start * self.width, stop * self.width)

    def _rows(self, k: int, start: int, stop: int) -> slice:
        """Rows of units [start, stop) in the weight of a convolution."""
        rows = len(self.weights[k]) // self.segments
        return slice(start * rows, stop * rows)

    def _read(self, k: int, state: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Outputs of convolution k of units [start, stop) on one and the same state."""
        rows = self._rows(k, start, stop)
        weight, bias = self.weights[k][rows], self.norms[k].bias
        bias = None if bias is None else bias[rows]
        # On the CPU, convolutions are up to 1.4 times as fast as products with few columns, if there are many rows.
        if state.is_cuda or self.rows < 1024:
            return _linear(state, weight, bias)
        return _conv2d(state, weight[:, :, None, None], bias, self.map_shape)

    def _read_change(self, k: int, h: torch.Tensor, change: torch.Tensor, i: int, start: int) -> torch.Tensor:
        """Output of unit i's convolution on the state, from that on the state before its block."""
        if i == start:  # a chunk of what the block shares, unless the block is a single unit
            return h.clone(memory_format=torch.contiguous_format) if change.shape[1] else h
        weight = self.unit_weights[k][i][:, self._columns(start, i)]
        return torch.addmm(h, change[:, self._columns(0, i - start)], weight.t())

    def _unit(
            self, i: int, reads: List[torch.Tensor], saved: List[torch.Tensor], keep: bool,
    ) -> 'List[Tuple[_Norm, torch.Tensor]]':
        """From the outputs of the convolutions that read the state to what the update of segment i is the sum of.

        Returns the last norms and what they are applied to.
        """
        h = reads[0]
        for k in range(0, 3 * self.depth, 3):
            if k > 0:
                update = self.norms[k - 1].apply(i, h, self._buffer('update', self.width))
                h = _linear(update, self.unit_weights[k][i], self.norms[k].biases[i])
            if keep:
                saved.append(h)
            self._measure(k, h)
            a = self._activate(k, i, h, keep)
            h = _conv2d(a, self.unit_weights[k + 1][i], self.norms[k + 1].biases[i], self.map_shape, self.dilation)
            if keep:
                saved.append(h)
            self._measure(k + 1, h)
            h = self._last(k + 2, i, self._activate(k + 1, i, h, keep))
            self._measure(k + 2, h)
        terms = [(self.norms[3 * self.depth - 1], h)]
        if len(reads) > 1:
            k, h = self.readers[1], reads[1]
            if keep:
                saved.append(h)
            self._measure(k, h)
            terms.append((self.norms[k], h))
        return terms

    def _sum(self, i: int, terms: 'List[Tuple[_Norm, torch.Tensor]]') -> torch.Tensor:
        """Update of segment i."""
        update, *other = [
            norm.apply(i, h, self._buffer(name, self.width))
            for (norm, h), name in zip(terms, ('update', 'proj'), strict=False)]
        for t in other:
            update.add_(t)
        return update if self.kept is None else self._scale_samples(update, i)

    def _measure(self, k: int, h: torch.Tensor) -> None:
        if self.norms[k].batch:
            self.norms[k].measure(h)

    def _activate(self, k: int, i: int, h: torch.Tensor, keep: bool = True) -> torch.Tensor:
        """Norm and ReLU behind convolution k: in place unless h is kept, else in a buffer that all of them share."""
        return self.norms[k].activate(i, h, self._buffer('activation', h.shape[1]) if keep else h)

    def _last(self, k: int, i: int, a: torch.Tensor) -> torch.Tensor:
        """Output of a bottleneck's last convolution."""
        return _linear(a, self.unit_weights[k][i], self.norms[k].biases[i], self._buffer('last', self.width))

    def _scale_samples(self, update: torch.Tensor, i: int) -> torch.Tensor:
        update.view(len(self.kept), -1, self.width).mul_(self.kept[:, :, i:i + 1])
        return update

    def backward(
            self,
            grad: torch.Tensor,
            x: torch.Tensor,
            y: torch.Tensor,
            params: List[torch.Tensor],
            saved: List[torch.Tensor],
            needs: List[bool],
    ) -> Tuple[torch.Tensor, List[torch.Tensor]]:
        g_map = _clone(grad)
        self.g = _matrix(g_map)
        self.x, self.y = (
            _matrix(t.contiguous(memory_format=torch.channels_last)).to(self.dtype) for t in (x, y))
        self.grads, self.saved = _Gradients(params, needs[1:], self.weights, self.norms, self.segments), saved
        (self._backward_by_masks if self.in_place else self._backward_by_parts)(needs[0])
        grad_x = g_map.contiguous(memory_format=_memory_format(x)) if needs[0] else x.new_empty(0)
        return grad_x, self.grads.collect()

    def _backward_by_masks(self, input_wanted: bool) -> None:
        """Take G through all units in few and large products, of which masks take what is meant: for CUDA devices."""
        blocks = self._blocks(BACKWARD_BLOCK)
        unit = torch.arange(self.segments, device=self.device)
        earlier = (unit < unit[:, None])[:, None, :, None]  # segments before a unit's own
        in_block = (unit >= (unit - unit % blocks[0][1])[:, None])[:, None, :, None]
        unsent = {k: torch.where(earlier & in_block, 0, self._quads(self.weights[k])).view_as(self.weights[k])
                  for k in self.readers}
        by_y = {k: torch.empty_like(self.weights[k]) for k in self.readers if self.grads.wanted(k)}
        for start, stop in reversed(blocks):
            sent = self._sent(stop - start)
            for i in reversed(range(start, stop)):
                received, before = self.g[:, self._columns(i, i + 1)], self._columns(start, i)
                if self.kept is not None:
                    received = self._buffer('received', self.width).copy_(received)
                d = self._unit_backward(i, received, [t.chunk(stop - start, 1)[i - start] for t in sent])
                if not self.residual:
                    self.g[:, self._columns(i, i + 1)].zero_()
                for k, d_k in zip(self.readers, d, strict=True):
                    if i > start:
                        _accumulate(self.g[:, before], d_k, self.unit_weights[k][i][:, before])
            columns = slice(None) if input_wanted else self._columns(0, start)
            updated, others = self._columns(0, stop - 1), self._columns(start, self.segments)
            for k, d_k in zip(self.readers, sent, strict=True):
                rows = self._rows(k, start, stop)
                _accumulate(self.g[:, columns], d_k, unsent[k][rows, columns])
                if k in by_y:
                    torch.mm(d_k.t(), self.y[:, updated], out=by_y[k][rows, updated])
                    torch.mm(d_k.t(), self.x[:, others], out=self.grads.grads[k][rows, others])
        for k, grad in by_y.items():
            by_x = self._quads(self.grads.grads[k])
            torch.where(earlier, self._quads(grad), by_x, out=by_x)

    def _quads(self, weight: torch.Tensor) -> torch.Tensor:
        """View a weight as (units, rows of a unit, segments, columns of a segment)."""
        return weight.view(self.segments, -1, self.segments, self.width)

    def _sent(self, count: int) -> List[torch.Tensor]:
        """Room for the gradients of what the convolutions of a block of units read from the state."""
        return [self._buffer(f'sent {k}', len(self.weights[k]) // self.segments * count) for k in self.readers]

    def _backward_by_parts(self, input_wanted: bool) -> None:
        """Take G through all units with no product larger than it must be: for CPUs."""
        for start, stop in reversed(self._blocks(BACKWARD_BLOCK)):
            self._block_backward(start, stop, input_wanted)

    def _block_backward(self, start: int, stop: int, input_wanted: bool) -> None:
        """Take G through units [start, stop), and compute the gradients of what they read the state with."""
        before, own, after = self._columns(0, start), self._columns(start, stop), self._columns(stop, self.segments)
        sent = self._own_backward(start, stop)
        for k, d in zip(self.readers, sent, strict=True):
            rows = self._rows(k, start, stop)
            weight = self.weights[k][rows]
            _accumulate(self.g[:, before], d, weight[:, before])
            if input_wanted:
                _accumulate(self.g[:, after], d, weight[:, after])
            if self.grads.wanted(k):
                grad, rest = self.grads.grads[k][rows], slice(start * self.width, None)
                torch.mm(d.t(), self.y[:, before], out=grad[:, before])
                torch.mm(d.t(), self.x[:, rest], out=grad[:, rest])
                self._put_updated(d, self.y[:, own], grad[:, own], stop - start)

    def _own_backward(self, start: int, stop: int) -> List[torch.Tensor]:
        """Take the block's own columns of G through its units, as if there were no others.

        Returns the gradients of what the units' convolutions read from the state.
        """
        count, columns = stop - start, self._columns(start, stop)
        g, sent = self.g[:, columns].clone(memory_format=torch.contiguous_format), self._sent(count)
        for i in reversed(range(start, stop)):
            own = self._columns(i - start, i - start + 1)
            received = self._buffer('received', self.width).copy_(g[:, own])
            if not self.residual:
                g[:, own].zero_()
            outs = [self._buffer(f'grad {k}', t.shape[1] // count) for k, t in zip(self.readers, sent, strict=True)]
            for k, d, whole in zip(self.readers, self._unit_backward(i, received, outs), sent, strict=True):
                _accumulate(g, d, self.unit_weights[k][i][:, columns])
                whole.chunk(count, 1)[i - start].copy_(d)
        self.g[:, columns] = g
        return sent

    def _put_updated(self, d: torch.Tensor, y: torch.Tensor, grad: torch.Tensor, count: int) -> None:
        """Write the gradient of a weight of `count` units for the columns that they have met updated by one another.

        The upper half of the units has met all of the lower half as y; within each half it is the same again.
        """
        if count == 1:
            return
        lower = count // 2
        rows, columns = d.shape[1] // count * lower, self.width * lower
        torch.mm(d[:, rows:].t(), y[:, :columns], out=grad[rows:, :columns])
        self._put_updated(d[:, :rows], y[:, :columns], grad[:rows, :columns], lower)
        self._put_updated(d[:, rows:], y[:, columns:], grad[rows:, columns:], count - lower)

    def _unit_backward(self, i: int, received: torch.Tensor, outs: List[torch.Tensor]) -> List[torch.Tensor]:
        """Gradients of what unit i's convolutions read from the state, in `outs` if in_place, from its update's."""
        grads, sent = self.grads, []
        if self.kept is not None:
            self._scale_samples(received, i)
        count = len(self.saved) // self.segments
        saved = self.saved[i * count:(i + 1) * count]
        if len(self.readers) > 1:
            sent.append(self.norms[-1].backward(i, received, saved[-1], outs[1]))
        for k in reversed(range(0, 3 * self.depth, 3)):
            h1, h2 = saved[k // 3 * 2:k // 3 * 2 + 2]
            hidden = h1.shape[1]
            a = self._activate(k + 1, i, h2)
            h = self._last(k + 2, i, a) if self.norms[k + 2].input_wanted else None
            d = self.norms[k + 2].backward(i, received, h, self._buffer('grad_last', self.width))
            grads.add_product(k + 2, i, d, a)
            d = torch.mm(d, self.unit_weights[k + 2][i], out=self._buffer('grad_activation', hidden))
            d = self.norms[k + 1].backward(i, d, h2, self._buffer('grad_hidden', hidden), a)
            a = self._activate(k, i, h1)
            d, grad_weight = _conv3x3_backward(
                d, a, self.unit_weights[k + 1][i], self.map_shape, self.dilation, grads.wanted(k + 1))
            grads.put(k + 1, i, grad_weight)
            out = self._buffer('grad_hidden', hidden) if k > 0 else outs[0]
            d = self.norms[k].backward(i, d, h1, out, a)
            if k > 0:
                if grads.wanted(k):
                    # The input of this bottleneck is the output of the one before.
                    h = self._last(k - 1, i, self._activate(k - 2, i, saved[k // 3 * 2 - 1]))
                    grads.add_product(k, i, d, self.norms[k - 1].apply(i, h, self._buffer('update', self.width)))
                received = d @ self.unit_weights[k][i]
        return [d, *sent]


class _Gradients:
    """Gradients of stacked weights, gammas and betas, filled unit by unit; those not needed stay empty."""

    def __init__(
            self,
            params: List[torch.Tensor],
            needs: List[bool],
            weights: List[torch.Tensor],
            norms: 'List[_Norm]',
            segments: int,
    ):
        self.params, self.needs, self.norms = params, needs, norms
        for k, norm in enumerate(norms):
            norm.affine_wanted = needs[5 * k + 1] or needs[5 * k + 2]
        # In the dtype of the products, as matrices where the weights are.
        self.whole = [
            torch.empty_like(params[5 * k], dtype=w.dtype) if needs[5 * k] else None for k, w in enumerate(weights)]
        self.grads = [t if t is None else t.view(w.shape) for t, w in zip(self.whole, weights, strict=True)]
        self.unit_grads = [t if t is None else t.chunk(segments) for t in self.grads]
        self.parts: Dict[int, List[torch.Tensor]] = defaultdict(lambda: [None] * segments)

    def wanted(self, k: int) -> bool:
        return self.needs[5 * k]

    def add_product(self, k: int, i: int, d: torch.Tensor, t: torch.Tensor) -> None:
        """Write unit i's weight gradient: d^T t."""
        if self.wanted(k):
            torch.mm(d.t(), t, out=self.unit_grads[k][i])

    def put(self, k: int, i: int, grad: Optional[torch.Tensor]) -> None:
        if self.wanted(k):
            self.parts[k][i] = grad

    def collect(self) -> List[torch.Tensor]:
        """In the order and the dtypes of the parameters."""
        for k, parts in self.parts.items():
            torch.cat(parts, out=self.whole[k])
        result = []
        for k, (grad, norm) in enumerate(zip(self.whole, self.norms, strict=True)):
            first, values = 5 * k, (grad, norm.grad_gammas, norm.grad_betas)
            for value, param, need in zip(
                    values, self.params[first:first + 3], self.needs[first:first + 3], strict=True):
                if not need:
                    result.append(param.new_empty(0))
                else:
                    value = torch.cat(value) if isinstance(value, list) else value
                    result.append(value.to(param.dtype))
        return result


class _Norm:
    """The norm behind a convolution of P units, with the statistics of the batch or given ones; or no norm at all.

    Takes (rows, width) matrices of one unit. Statistics and what is computed with them are float32 or float64.
    """

    takes_slices = False

    def __init__(
            self,
            gamma: torch.Tensor,
            beta: torch.Tensor,
            mean: torch.Tensor,
            variance: torch.Tensor,
            eps: float,
            batch_stats: bool,
            rows: int,
            segments: int,
            dtype: torch.dtype,
    ):
        self.exists = gamma.numel() > 0
        self.batch = self.exists and batch_stats
        self.rows, self.eps, self.dtype, self.stats_dtype = rows, eps, dtype, _stats_dtype(dtype)
        self.affine_wanted, self.device = True, beta.device
        self.grad_gammas: List[Optional[torch.Tensor]] = [None] * segments
        self.grad_betas: List[Optional[torch.Tensor]] = [None] * segments
        self.bias = beta.to(dtype) if beta.numel() and not self.exists else None
        self.biases = [None] * segments if self.bias is None else self.bias.view(segments, -1).unbind()
        if not self.exists:
            return
        gamma, beta = (t.to(self.stats_dtype).view(segments, -1) for t in (gamma, beta))
        self.gammas, self.betas = gamma.unbind(), beta.unbind()
        self.means: List[torch.Tensor] = []
        self.variances: List[torch.Tensor] = []
        self._start(gamma.shape[1])
        if mean.numel() > 0:
            mean, variance = (t.to(self.stats_dtype).view(segments, -1) for t in (mean, variance))
            self.means, self.variances = mean.unbind(), variance.unbind()
            self._prepare(gamma, beta, mean, variance)

    def _start(self, width: int) -> None:
        """Prepare what depends on the sizes alone."""

    def _prepare(
            self, gamma: torch.Tensor, beta: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor) -> None:
        """Compute for all units at once what follows from known statistics."""
        self.inv_stds = (variance + self.eps).rsqrt_().unbind()

    def measure(self, h: torch.Tensor) -> None:
        """Take the statistics of the batch for the next unit."""
        mean, variance = aten.batch_norm_update_stats(h, None, None, 0.0)
        self.means.append(mean)
        self.variances.append(variance)

    def apply(self, i: int, h: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Normalise, into `out` where that saves time; h itself without a norm."""
        if not self.exists:
            return h
        return aten.native_batch_norm(
            h, self.gammas[i], self.betas[i], self.means[i], self.variances[i], False, 0.0, self.eps)[0]

    def activate(self, i: int, h: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """ReLU of apply(), for which `out` may be h."""
        a = self.apply(i, h, out)
        return a.relu() if a is h and out is not h else a.relu_()

    @property
    def input_wanted(self) -> bool:
        """Whether backward() reads h."""
        return self.exists and (self.batch or self.affine_wanted)

    def backward(
            self,
            i: int,
            grad: torch.Tensor,
            h: Optional[torch.Tensor],
            out: torch.Tensor,
            a: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        """Gradient of h from that of apply(i, h), or of a = activate(i, h), which it may overwrite then.

        Keeps the gradients of gamma and beta, if they are wanted.
        """
        if a is not None:
            grad = _relu_backward(grad, a)
        if not self.exists:
            if self.affine_wanted:
                self.grad_betas[i] = grad.sum(0)
            return grad
        if not self.input_wanted:
            return out.copy_(grad * (self.gammas[i] * self.inv_stds[i]))
        wanted = self.affine_wanted
        grad_h, self.grad_gammas[i], self.grad_betas[i] = aten.native_batch_norm_backward(
            grad, h, self.gammas[i], self.means[i], self.variances[i], self.means[i], self.inv_stds[i], self.batch,
            self.eps, [True, wanted, wanted])
        return grad_h

    def batch_statistics(self) -> List[torch.Tensor]:
        """Mean and biased variance of the batch, of all units; empty if they were not taken."""
        if self.batch:
            return [torch.cat(self.means), torch.cat(self.variances)]
        return [torch.empty(0, dtype=self.stats_dtype, device=self.device) for _ in range(2)]


class _CpuNorm(_Norm):
    """_Norm for CPUs, whose kernels are slow on channels that do not fill their vectors.

    On 25,088 x 20 float32 numbers, native_batch_norm_backward takes 15 times as long as on the same numbers seen as
    6,272 x 80. So the reductions take several rows as one and merge their results, and all that is linear in h and in
    its gradient is computed as such, with as few calls as possible for the sake of small maps.
    """

    def _start(self, width: int) -> None:
        lanes, self.fold = 64 // self.dtype.itemsize, 1
        if self.rows * width >= 2 ** 13:
            while self.fold * width % lanes and self.fold < lanes and self.rows % (2 * self.fold) == 0:
                self.fold *= 2
        stats = dict(dtype=self.stats_dtype, device=self.device)
        self.zeros, self.ones = torch.zeros(self.fold * width, **stats), torch.ones(self.fold * width, **stats)
        self.scales: List[torch.Tensor] = []
        self.shifts: List[torch.Tensor] = []

    def _wide(self, h: torch.Tensor) -> torch.Tensor:
        return h if self.fold == 1 else h.view(self.rows // self.fold, -1)

    def _repeat(self, t: torch.Tensor) -> torch.Tensor:
        """Repeat (channels,), or (P, channels), for the channels of wide rows."""
        return t if self.fold == 1 else torch.cat([t] * self.fold, -1)

    def _prepare(
            self, gamma: torch.Tensor, beta: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor) -> None:
        inv_std = (variance + self.eps).rsqrt_()
        scale = inv_std * gamma
        self.scales = self._repeat(scale).unbind()
        self.shifts = self._repeat(torch.addcmul(beta, mean, scale, value=-1)).unbind()
        self.wide_means, self.wide_variances = self._repeat(mean).unbind(), self._repeat(variance).unbind()
        self.by_grad_gammas = (scale * inv_std).div_(-self.rows).unbind()
        self.by_grad_betas = (scale / -self.rows).unbind()

    def measure(self, h: torch.Tensor) -> None:
        # Given running statistics of float32, the kernel returns float32 for an h of 16 bits too.
        mean, variance = aten.batch_norm_update_stats(self._wide(h), self.zeros, self.ones, 0.0)
        if self.fold > 1:
            within = variance.view(self.fold, -1).sum(0)
            between, mean = torch.var_mean(mean.view(self.fold, -1), 0, correction=0)
            variance = torch.add(between, within, alpha=1 / self.fold)
        i = len(self.means)
        self.means.append(mean)
        self.variances.append(variance)
        scale = (variance + self.eps).rsqrt_().mul_(self.gammas[i])
        self.scales.append(self._repeat(scale))
        self.shifts.append(self._repeat(torch.addcmul(self.betas[i], mean, scale, value=-1)))

    def apply(self, i: int, h: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        if not self.exists:
            return h
        if self.dtype == self.stats_dtype:
            torch.addcmul(self.shifts[i], self._wide(h), self.scales[i], out=self._wide(out))
            return out
        return aten.native_batch_norm(
            self._wide(h), self.scales[i], self.shifts[i], self.zeros, self.ones, False, 0.0, 0.0)[0].view_as(h)

    def backward(
            self,
            i: int,
            grad: torch.Tensor,
            h: Optional[torch.Tensor],
            out: torch.Tensor,
            a: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        if not self.exists:
            return super().backward(i, grad, h, out, a)
        if a is not None:
            grad = _relu_backward(grad, a)
        wide_grad = self._wide(grad)
        if self.input_wanted:
            wide_h = self._wide(h)
            _, grad_gamma, grad_beta = aten.native_batch_norm_backward(
                wide_grad, wide_h, None, self.wide_means[i], self.wide_variances[i], None, None, False, self.eps,
                [False, True, True])
            if self.fold > 1:
                grad_gamma, grad_beta = (t.view(self.fold, -1).sum(0) for t in (grad_gamma, grad_beta))
            self.grad_gammas[i], self.grad_betas[i] = grad_gamma, grad_beta
        by_grad = self.scales[i]
        if self.batch:
            # by_grad * (grad - grad_beta / rows - normalised h * grad_gamma / rows), written as linear in grad and h
            by_h = self.by_grad_gammas[i] * grad_gamma
            constant = (self.by_grad_betas[i] * grad_beta).addcmul_(by_h, self.means[i], value=-1)
            by_h, constant = self._repeat(by_h), self._repeat(constant)
        wide_out = self._wide(out)
        total = wide_out if self.dtype == self.stats_dtype else None  # 16 bits are rounded to once, at the end
        if self.batch:
            total = torch.addcmul(constant, wide_h, by_h, out=total).addcmul_(wide_grad, by_grad)
        else:
            total = torch.mul(wide_grad, by_grad, out=total)
        if total is not wide_out:
            wide_out.copy_(total)
        return out


def _folded(
        weight: torch.Tensor,
        gamma: torch.Tensor,
        beta: torch.Tensor,
        mean: torch.Tensor,
        variance: torch.Tensor,
        eps: float,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of a convolution that does what `weight` (O, I, H, W) and a norm behind it do.

    All others are (O,), of any floating dtypes. Computes in float32 or float64, and returns that.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    scale = (variance.to(dtype) + eps).rsqrt_().mul_(gamma)
    return weight * scale[:, None, None, None], torch.addcmul(beta.to(dtype), mean.to(dtype), scale, value=-1)


def _fold_norms(x: torch.Tensor, params: List[torch.Tensor], eps: List[float]) -> List[torch.Tensor]:
    """Make norms with given statistics a scale of the weights and a bias; for a forward pass without a backward."""
    result, rows = [], x.shape[0] * x.shape[2] * x.shape[3]
    for (weight, gamma, beta, mean, variance), e in zip(zip(*[iter(params)] * 5, strict=True), eps, strict=True):
        # On a CPU, small maps are sooner scaled than large weights; on CUDA devices the number of calls counts.
        if mean.numel() > 0 and (x.is_cuda or weight[0].numel() <= rows):
            weight, beta = _folded(weight, gamma, beta, mean, variance, e)
            gamma = mean = variance = gamma.new_empty(0)
        result += [weight, gamma, beta, mean, variance]
    return result


def _cuda_norm() -> type:
    """The norms of CUDA devices, by Triton kernels where Triton is installed."""
    if TRITON and _has_triton():
        from timm_gunn.triton_norm import TritonNorm
        return TritonNorm
    return _Norm


@functools.lru_cache(None)
def _has_triton() -> bool:
    return importlib.util.find_spec('triton') is not None


def _readers(num_convs: int) -> List[int]:
    """Indices of the convolutions that read the state: the first, and the projection if there is one."""
    return [0] if num_convs % 3 == 0 else [0, num_convs - 1]


def _kept_convs(num_convs: int) -> List[int]:
    """Indices of the convolutions whose outputs are kept: the first two of every bottleneck, and the projection."""
    return [k for k in range(num_convs) if k % 3 != 2 and k < num_convs // 3 * 3] + _readers(num_convs)[1:]


def _stats_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.itemsize == 2 else dtype


def _memory_format(x: torch.Tensor) -> torch.memory_format:
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format


def _clone(x: torch.Tensor) -> torch.Tensor:
    """Copy a map to channels-last memory."""
    return torch.empty_like(x, memory_format=torch.channels_last).copy_(x)


def _matrix(x: torch.Tensor) -> torch.Tensor:
    """View a channels-last map (B, C, H, W) as a matrix (B * H * W, C)."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _map(x: torch.Tensor, shape: Tuple[int, int, int]) -> torch.Tensor:
    """View a matrix (B * H * W, C) as a channels-last map (B, C, H, W)."""
    return x.view(*shape, -1).permute(0, 3, 1, 2)


def _linear(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor],
        out: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    return torch.mm(x, weight.t(), out=out) if bias is None else torch.addmm(bias, x, weight.t(), out=out)


def _accumulate(g: torch.Tensor, d: torch.Tensor, weight: torch.Tensor) -> None:
    """Add d W to g, in place."""
    if g.dtype == d.dtype:
        g.addmm_(d, weight)
    else:
        g += d @ weight


def _conv2d(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor],
        shape: Tuple[int, int, int],
        dilation: int = 1,
) -> torch.Tensor:
    """A convolution of the map that the matrix x is, to a map of the same size."""
    padding = dilation * (weight.shape[2] // 2)
    return _matrix(F.conv2d(_map(x, shape), weight, bias, padding=padding, dilation=dilation))


def _conv3x3_backward(
        grad: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        shape: Tuple[int, int, int],
        dilation: int,
        weight_wanted: bool,
) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
    grad, x = _map(grad, shape), _map(x, shape)
    if dilation > 1 and x.dtype == torch.bfloat16 and not x.is_cuda:
        # In channels-last memory, torch 2.15 gives NaN as the gradient of some such weights.
        grad, x, weight = grad.contiguous(), x.contiguous(), weight.contiguous()
    grad_x, grad_weight, _ = aten.convolution_backward(
        grad, x, weight, None, [1, 1], [dilation] * 2, [dilation] * 2, False, [0, 0], 1,
        [True, weight_wanted, False])
    return _matrix(grad_x.contiguous(memory_format=torch.channels_last)), grad_weight


def _relu_backward(grad: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """Gradient through a = relu(.), written over that of a."""
    return aten.threshold_backward.grad_input(grad, a, 0, grad_input=grad)
