"""`ordered_update`, the ordered GUNN layer as an operator of PyTorch: registration, autograd and FLOPs of ordered.py.

`GunnLayer` chooses between it and the composite of its modules, which is the reference.
"""
import math
from typing import List, Optional, Tuple

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.flop_counter import register_flop_formula

from .aten_norm import stats_dtype, unflatten
from .ordered import OrderedLayer, memory_format


@torch.library.custom_op('timm_gunn::ordered_update', mutates_args=())
def ordered_update(
        x: torch.Tensor,
        params: List[torch.Tensor],
        drop_scale: Optional[torch.Tensor],
        eps: List[float],
        segments: int,
        dilation: int,
        residual: bool,
        dtype: torch.dtype,
        keep: bool,
) -> Tuple[torch.Tensor, List[torch.Tensor], List[torch.Tensor]]:
    """Update a state (B, N, H, W) segment by segment: Eq. 4 and 5.

    For the arguments see `OrderedLayer`; `keep` asks for what the backward pass needs.

    Returns:
        The updated state, in shape, dtype and memory format of x. Mean and biased variance of the batch for every norm
        that takes them, else empty. The matrices kept for the backward pass, unit by unit.
    """
    with torch.autocast(x.device.type, enabled=False):
        layer = OrderedLayer(x, params, [], drop_scale, eps, segments, dilation, residual, dtype, fold=not keep)
        return layer.forward(x, keep)


@ordered_update.register_fake
def _fake_update(x, params, drop_scale, eps, segments, dilation, residual, dtype, keep):
    convs = unflatten(params)
    stats = [
        x.new_empty(len(p.weight) if p.takes_batch_stats else 0, dtype=stats_dtype(dtype))
        for p in convs for _ in range(2)]
    rows = x.shape[0] * x.shape[2] * x.shape[3]
    saved = [  # of all but the third of a bottleneck
        x.new_empty(rows, len(p.weight) // segments, dtype=dtype)
        for _ in range(segments) for k, p in enumerate(convs) if k % 3 < 2] if keep else []
    return torch.empty_like(x, memory_format=memory_format(x)), stats, saved


@torch.library.custom_op('timm_gunn::ordered_update_backward', mutates_args=())
def ordered_update_backward(
        grad: torch.Tensor,
        x: torch.Tensor,
        y: torch.Tensor,
        saved: List[torch.Tensor],
        params: List[torch.Tensor],
        stats: List[torch.Tensor],
        drop_scale: Optional[torch.Tensor],
        needs: List[bool],
        eps: List[float],
        segments: int,
        dilation: int,
        residual: bool,
        dtype: torch.dtype,
) -> Tuple[torch.Tensor, List[torch.Tensor]]:
    """Gradients of x and of weight, gamma and beta of every convolution: Algorithm 1 and Eq. 6.

    `needs` has an entry for x and one for each entry of `params`. Returns x's gradient, empty if not needed, and those
    of the parameters that need one.
    """
    with torch.autocast(x.device.type, enabled=False):
        layer = OrderedLayer(x, params, stats, drop_scale, eps, segments, dilation, residual, dtype)
        return layer.backward(grad, x, y, saved, needs)


@ordered_update_backward.register_fake
def _fake_update_backward(grad, x, y, saved, params, stats, drop_scale, needs, *_):
    grad_x = torch.empty_like(x, memory_format=memory_format(x)) if needs[0] else x.new_empty(0)
    return grad_x, [torch.empty_like(t) for t, need in zip(params, needs[1:], strict=True) if need]


def _setup_context(ctx, inputs, output):
    x, params, drop_scale, *ctx.config, keep = inputs
    y, stats, saved = output
    if not keep:
        raise RuntimeError('timm_gunn::ordered_update: an input requires a gradient, expected keep=True.')
    ctx.set_materialize_grads(False)  # no zeros in the size of the saved tensors
    # A later training step may update running statistics before this step's backward pass.
    params = [t.clone() if k % 5 > 2 and t.numel() else t for k, t in enumerate(params)]
    # In a list, so that no None is saved: torchviz draws tensors alone.
    tensors, ctx.tree = tree_flatten((x, y, saved, params, stats, [t for t in [drop_scale] if t is not None]))
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad, *_):
    rest = [None] * 7
    if grad is None:
        return (None, [None] * len(ctx.needs_input_grad[1]), *rest)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            'GunnLayer: the fused layer has no second derivative, and create_graph=True asks for one; '
            'set fused=False on the layer.')
    *tensors, drop_scale = tree_unflatten(ctx.saved_tensors, ctx.tree)
    needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[1]]
    grad_x, grads = ordered_update_backward(grad, *tensors, *(drop_scale or [None]), needs, *ctx.config)
    grads = iter(grads)
    return grad_x if needs[0] else None, [next(grads) if need else None for need in needs[1:]], *rest


ordered_update.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.timm_gunn.ordered_update)
def _flops(x_shape, params_shapes, *_, **__) -> int:
    batch, _, height, width = x_shape
    return 2 * batch * height * width * sum(math.prod(shape) for shape in params_shapes[::5])


@register_flop_formula(torch.ops.timm_gunn.ordered_update_backward)
def _backward_flops(
        grad_shape, x_shape, y_shape, saved_shapes, params_shapes, stats_shapes, drop_shape, needs, *_, **__) -> int:
    """FLOPs of the gradients, without what is computed again: the same as of the composite."""
    batch, _, height, width = x_shape
    return 2 * batch * height * width * sum(
        math.prod(shape) * (1 + needs[1 + 5 * k]) for k, shape in enumerate(params_shapes[::5]))
