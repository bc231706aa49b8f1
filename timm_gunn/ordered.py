"""The ordered GUNN layer on one state that the units update in place, forward and backward.

The state is a matrix of B * H * W rows and N columns, so that nothing is concatenated. For one bottleneck per unit:

    state = x                                      G = dL/dy                                      (Algorithm 1)
    for i in 1 ... P:                              for i in P ... 1:
        h1 = state W1_i                                a1, a2, h3 again, from h1 and h2
        h2 = conv3x3(a1 = relu(norm(h1)), W2_i)        d3 = norm'(G_i)
        h3 = (a2 = relu(norm(h2))) W3_i                d2 = norm'(relu'(d3 W3_i^T))
        state_i += norm(h3)                            d1 = norm'(relu'(conv3x3'(d2, W2_i)))
    y = state                                          G += d1 W1_i^T
                                                   dL/dx = G

No state between x and y is kept. W1_i's gradient needs none: its columns before segment i have only ever met y, the
others only x.

| name | shape | |
|---|---|---|
| h1, h2 | rows, hidden | outputs of the first two convolutions (with the projection's, o columns: all that is kept) |
| h3, received | rows, o | output of the third, o = N / P; gradient of what a unit, or a bottleneck in it, puts out |
| a, d | as h | activation relu(norm(h)); gradient of h |
| change | rows, columns of a block | y_j - x_j for the block's segments so far |
| sent | rows, channels of a block | d of what reads the state: of each unit, conv1 and the projection |

The narrower a segment, the more often the whole state is read for few output columns. So neighbouring segments form
blocks that share products. Forward, a block's units read the state before it in one product, and each adds what
`change` contributes. Backward, a copy of the block's columns of G carries what its units send each other, and G gets
all that they send in one product. Gradients of weights take two products for a block, with y and with x. A unit's
are from the first up to its segment, and from the second beyond.

What each optimisation is worth on a CPU: time without it over time with all, train / inference, float32 then bfloat16
(`python examples/benchmark.py --reference gunn18 --models gunn18 gunn18:KIND ...`, two cores of an AMD EPYC, batch 8;
for GUNN-15 `--img-size 32 --batch-size 64`; medians of 7 to 9 rounds; quartiles differ by 5 %):

| optimisation | KIND | GUNN-18 | GUNN-15 |
|---|---|---|---|
| blocks forward | unblocked-forward | - (one segment is a block) | 1.00 / 1.08, 1.01 / 1.17 |
| blocks backward | unblocked-backward | 0.98 / -, 1.06 / - | 0.97 / -, 1.04 / - |
| rows as wide ones (aten_norm.py) | narrow | 1.01 / -, 0.97 / - | 1.21 / 1.00, 1.31 / 1.01 |
| state read by convolutions, not products | matmul | 1.07 / 1.48, 1.00 / 0.96 | 1.18 / 1.31, 1.05 / 1.03 |
| norms folded in passing | separate-norms | - / 1.12, - / 1.09 | - / 1.05, - / 1.06 |
| all: the composite of modules | composite | 1.07 / 1.45, 1.54 / 1.31 | 1.74 / 2.34, - / 2.12 |
| and checkpoints by stage (GUNN-15: batch 32) | checkpointed | | 2.42 / - |
"""
import math
from typing import List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F

from .aten_norm import AtenNorm, stats_dtype, unflatten
from .convs import Conv

aten = torch.ops.aten

# Width of a block in columns; one segment where that is wider.
FORWARD_BLOCK, BACKWARD_BLOCK, CUDA_BLOCK = 40, 80, 160
ALIGNED = dict(cuda=8)  # Products are slow on other numbers of columns, so zeros are added.
CONV_ROWS = 1024  # from which a CPU reads the state by a 1x1 convolution instead of a product


class OrderedLayer:
    """A layer's parameters taken apart by unit, and what the units compute.

    Args:
        x: State (B, N, H, W), of dtype `dtype` or float32.
        params: See `unflatten`, in any floating dtype.
        stats: In the backward pass, mean and variance that norms took of the batch; empty for others.
        drop_scale: Factor of each sample's and segment's update (stochastic depth), (B, P), or None.
        eps: What each norm adds to the variance.
        segments: Number of segments P.
        dilation: Dilation of the 3x3 convolutions.
        residual: Add x_i to the update of segment i.
        dtype: Dtype to compute in; norms compute in float32 where it is one of 16 bits.
        fold: Make norms with given statistics a part of the weights: no backward pass follows.
    """

    def __init__(
            self,
            x: torch.Tensor,
            params: List[torch.Tensor],
            stats: List[torch.Tensor],
            drop_scale: Optional[torch.Tensor],
            eps: List[float],
            segments: int,
            dilation: int,
            residual: bool,
            dtype: torch.dtype,
            fold: bool = False,
    ):
        batch, channels, height, width = x.shape
        self.map_shape, self.rows = (batch, height, width), batch * height * width
        self.segments, self.width = segments, channels // segments
        self.dilation, self.residual, self.dtype = dilation, residual, dtype
        self.drop_scale = None if drop_scale is None else drop_scale.to(stats_dtype(dtype)).view(batch, 1, segments)
        self.convs = [
            Conv(p, stats[2 * i:2 * i + 2], e, self.rows, segments, dtype, fold)
            for i, (p, e) in enumerate(zip(unflatten(params), eps, strict=True))]
        depth = len(eps) // 3
        self.bottlenecks = [self.convs[3 * i:3 * i + 3] for i in range(depth)]
        self.readers = [self.convs[0], *self.convs[3 * depth:]]
        self.aligned = ALIGNED.get(x.device.type, 1)
        if self.width % self.aligned == 0:
            self.aligned = 1  # nothing to add

    def forward(self, x: torch.Tensor, keep: bool) -> Tuple[torch.Tensor, List[torch.Tensor], List[torch.Tensor]]:
        """Eq. 4 and 5: the updated state, statistics of the batch by norm and, if `keep`, what backward() takes."""
        y = x.clone(memory_format=torch.channels_last)
        out = _matrix(y)
        state = out if x.dtype == self.dtype else out.to(self.dtype)  # what is read is rounded, the residual is not
        saved: List[torch.Tensor] = []
        # Without residual, y - x is as large as x, and rounds: the more of it, the less precise is what units read.
        for start, stop in self._blocks(CUDA_BLOCK if x.is_cuda and self.residual else FORWARD_BLOCK):
            shared = [self._read(conv, state, start, stop).chunk(stop - start, 1) for conv in self.readers]
            block, new = self._columns(start, stop), state.new_empty if self.aligned == 1 else state.new_zeros
            change = new(self.rows, block.stop - block.start if stop - start > 1 else 0)
            for i in range(start, stop):
                own, before = self._columns(i, i + 1), slice(self._align((i - start) * self.width))
                reads = [
                    h[i - start].contiguous() if i == start
                    else torch.addmm(h[i - start], change[:, before], conv.weights[i][:, block][:, before].t())
                    for conv, h in zip(self.readers, shared, strict=True)]
                (norm, h), *other = self._unit(i, reads, saved if keep else None)
                norm.update(
                    i, h, out[:, own], other=other[0] if other else None, add=self.residual,
                    state=None if state is out else state[:, own],
                    change=change[:, self._columns(i - start, i - start + 1)] if i + 1 < stop else None,
                    drop_scale=None if self.drop_scale is None else self.drop_scale[:, :, i:i + 1])
        stats = [t for conv in self.convs for t in conv.norm.batch_statistics()]
        return y.contiguous(memory_format=memory_format(x)), stats, saved

    def _blocks(self, columns: int) -> List[Tuple[int, int]]:
        """First segment of each block, and the one after its last."""
        size = max(1, columns // self.width)
        whole = self.aligned // math.gcd(self.aligned, self.width)  # segments until a column that is a multiple
        size = size // whole * whole or size
        return [(start, min(start + size, self.segments)) for start in range(0, self.segments, size)]

    def _align(self, columns: int) -> int:
        """The next multiple of `aligned`."""
        return -(-columns // self.aligned) * self.aligned

    def _columns(self, start: int, stop: int) -> slice:
        """Columns of segments [start, stop) in the state."""
        return slice(start * self.width, stop * self.width)

    def _read(self, conv: Conv, state: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Outputs of a convolution of units [start, stop) on one and the same state."""
        chs = conv.channels(start, stop)
        weight, bias = conv.weight[chs], None if conv.bias is None else conv.bias[chs]
        if state.is_cuda or self.rows < CONV_ROWS:
            return F.linear(state, weight, bias)
        return self._conv2d(state, weight[:, :, None, None], bias)

    def _conv2d(
            self, x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor], dilation: int = 1,
    ) -> torch.Tensor:
        padding = dilation * (weight.shape[2] // 2)
        y = F.conv2d(_map(x, self.map_shape), weight, bias, padding=padding, dilation=dilation)
        return _matrix(y.contiguous(memory_format=torch.channels_last))

    def _unit(
            self, i: int, reads: List[torch.Tensor], saved: Optional[List[torch.Tensor]],
    ) -> List[Tuple[AtenNorm, torch.Tensor]]:
        """Run unit i, from the outputs of its readers, up to its last norms; returns these, each with its input."""
        keep, norm, h = saved is not None, None, reads[0]
        for conv1, conv2, conv3 in self.bottlenecks:
            if norm is not None:
                h = conv1.linear(i, norm.apply(i, h))
            h1 = conv1.norm.measure(i, h)
            a = conv1.norm.activate(i, h1, in_place=not keep)
            h2 = conv2.norm.measure(i, self._conv2d(a, conv2.weights[i], conv2.biases[i], self.dilation))
            if keep:
                saved += [h1, h2]
            norm, a = conv3.norm, conv2.norm.activate(i, h2, in_place=not keep)
            h = norm.measure(i, conv3.linear(i, a))
        if keep:
            saved += reads[1:]
        return [(norm, h), *(
            (proj.norm, proj.norm.measure(i, p)) for proj, p in zip(self.readers[1:], reads[1:], strict=True))]

    def backward(
            self, grad: torch.Tensor, x: torch.Tensor, y: torch.Tensor, saved: List[torch.Tensor], needs: List[bool],
    ) -> Tuple[torch.Tensor, List[torch.Tensor]]:
        """Algorithm 1: gradients of x, empty if not needed, and of those of `params` that need one."""
        g_map = grad.clone(memory_format=torch.channels_last)
        g = _matrix(g_map)
        x_needed, *needs = needs
        xs, ys = (_matrix(t.contiguous(memory_format=torch.channels_last)).to(self.dtype) for t in (x, y))
        for i, conv in enumerate(self.convs):
            conv.prepare_gradients(needs[5 * i:5 * i + 3])

        # Weights of all that reads the state, by unit
        parts = [conv.weight.view(self.segments, conv.unit_chs, -1) for conv in self.readers]
        read_chs = [p.shape[1] for p in parts]
        padding = self._align(sum(read_chs)) - sum(read_chs)
        if padding:
            parts.append(parts[0].new_zeros(self.segments, padding, parts[0].shape[2]))
        weights = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
        weight_grads = None
        if any(conv.needs[0] for conv in self.readers):
            weight_grads = torch.empty_like(weights) if len(parts) > 1 else self.readers[0].grad.view(weights.shape)
        per_unit = len(saved) // self.segments
        for start, stop in reversed(self._blocks(CUDA_BLOCK if x.is_cuda else BACKWARD_BLOCK)):
            block, units = self._columns(start, stop), slice(start, stop)
            # What units pass on within the block goes to a copy. G gets all that they send in one product, later.
            dtype = g.dtype if self.residual else stats_dtype(self.dtype)
            passed = g[:, block].to(dtype, copy=True, memory_format=torch.contiguous_format)
            sent = (g.new_zeros if padding else g.new_empty)(
                self.rows, (stop - start) * weights.shape[1], dtype=self.dtype)
            for i, d in reversed(list(enumerate(sent.chunk(stop - start, 1), start))):
                received = passed[:, self._columns(i - start, i - start + 1)]
                self._unit_backward(
                    i, received, saved[i * per_unit:(i + 1) * per_unit], d.split([*read_chs, padding], 1))
                if i > start:
                    columns = (i - start) * self.width
                    met = slice(self._align(columns) if self.residual else columns)  # where nobody reads later ones
                    _accumulate(passed[:, met], d, weights[i, :, block][:, met])
            if not self.residual:  # what units after i send to y_i is not x_i's: less that, more all of it below
                g[:, block] -= passed
            columns = slice(None if x_needed else block.start)
            _accumulate(g[:, columns], sent, weights[units, :, columns].flatten(0, 1))
            if weight_grads is not None:
                grads, met = weight_grads[units].flatten(0, 1), slice(self._align((stop - 1) * self.width))
                torch.mm(sent.t(), ys[:, met], out=grads[:, met])
                of_y = weight_grads[units, :, block.start:met.stop].clone()
                torch.mm(sent.t(), xs[:, block.start:], out=grads[:, block.start:])
                for i in range(start + 1, stop):  # has met earlier units' segments as y
                    before = (i - start) * self.width
                    weight_grads[i, :, block][:, :before] = of_y[i - start, :, :before]
        if weight_grads is not None and len(parts) > 1:
            for conv, grads in zip(self.readers, weight_grads.split([*read_chs, padding], 1), strict=False):
                if conv.needs[0]:
                    conv.grad.view(grads.shape).copy_(grads)
        grad_x = g_map.contiguous(memory_format=memory_format(x)) if x_needed else x.new_empty(0)
        return grad_x, [t for conv in self.convs for t in conv.gradients()]

    def _unit_backward(
            self, i: int, received: torch.Tensor, saved: List[torch.Tensor], outs: Sequence[torch.Tensor],
    ) -> None:
        """Write gradients of what unit i's readers made of the state to `outs`, from that of its update."""
        if self.drop_scale is not None:
            received = received.reshape(len(self.drop_scale), -1, self.width) * self.drop_scale[:, :, i:i + 1]
            received = received.view(-1, self.width)
        for proj in self.readers[1:]:
            proj.norm.backward(i, received, saved[-1], out=outs[1])
        for j, (conv1, conv2, conv3) in reversed(list(enumerate(self.bottlenecks))):
            h1, h2 = saved[2 * j:2 * j + 2]
            a = conv2.norm.activate(i, h2)
            d = conv3.norm.backward(i, received, conv3.linear(i, a) if conv3.norm.reads_input else None)
            conv3.write_gradient(i, d, a)
            d = conv2.norm.backward(i, torch.mm(d, conv3.weights[i]), h2, a)
            a = conv1.norm.activate(i, h1)
            d = self._conv3x3_backward(i, conv2, d, a)
            d = conv1.norm.backward(i, d, h1, a, out=None if j else outs[0])
            if j > 0:  # the input is the output of the bottleneck before
                _, conv2, conv3 = self.bottlenecks[j - 1]
                if conv1.needs[0]:
                    h = conv3.linear(i, conv2.norm.activate(i, saved[2 * j - 1]))
                    conv1.write_gradient(i, d, conv3.norm.apply(i, h))
                received = torch.mm(d, conv1.weights[i])

    def _conv3x3_backward(self, i: int, conv: Conv, grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        grad, x, weight = _map(grad, self.map_shape), _map(x, self.map_shape), conv.weights[i]
        if self.dilation > 1 and x.dtype == torch.bfloat16 and not x.is_cuda:
            # In channels-last memory, torch 2.15 gives NaN as the gradient of some such weights.
            grad, x, weight = grad.contiguous(), x.contiguous(), weight.contiguous()
        dilation = [self.dilation] * 2
        grad_x, grad_weight, _ = aten.convolution_backward(
            grad, x, weight, None, [1, 1], dilation, dilation, False, [0, 0], 1, [True, conv.needs[0], False])
        conv.grads.append(grad_weight)
        return _matrix(grad_x.contiguous(memory_format=torch.channels_last))


def memory_format(x: torch.Tensor) -> torch.memory_format:
    """Memory format of outputs and gradients of a map."""
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format


def _matrix(x: torch.Tensor) -> torch.Tensor:
    """View a channels-last map (B, C, H, W) as a matrix (B * H * W, C)."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _map(x: torch.Tensor, shape: Tuple[int, int, int]) -> torch.Tensor:
    """View a matrix (B * H * W, C) as a channels-last map (B, C, H, W)."""
    return x.view(*shape, -1).permute(0, 3, 1, 2)


def _accumulate(g: torch.Tensor, d: torch.Tensor, weight: torch.Tensor) -> None:
    """Add d W to g, in place."""
    if g.dtype == d.dtype:
        g.addmm_(d, weight)
    else:
        g += torch.mm(d, weight)
