"""What a step calls, within the fused operator too: products to do again; all calls, with their bytes and FLOPs."""
from collections import defaultdict
from typing import Any, Callable, ContextManager, Dict, List, Tuple
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from timm_gunn import ops

# The fused operator as functions: no mode sees what is called beneath an operator.
FUNCTIONS = {op._opoverload: op._init_fn for op in (ops.ordered_update, ops.ordered_update_backward)}


def fused_in_modes() -> ContextManager[Any]:
    """Let layers call the operator where a mode looks on; they would step aside for the sake of modes that count."""
    return mock.patch('timm_gunn.checks.is_in_torch_dispatch_mode', return_value=False)


class RecordProducts(TorchDispatchMode):
    """Keep the calls of products and convolutions, those within the fused operator too.

    Operands are replaced by others of their shapes, strides and dtypes. Those in equally large memory share it, so that
    caches serve them no worse than the step's own.
    """

    def __init__(self):
        super().__init__()
        self.products = {getattr(torch.ops.aten, name) for name in (
            'mm', 'addmm', 'addmm_', 'bmm', 'baddbmm', 'linear', 'conv2d', 'convolution', 'convolution_backward')}
        self.calls: List[Tuple[Callable, List[Any], Dict[str, Any]]] = []
        self.memory: Dict[Tuple, torch.Tensor] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in FUNCTIONS:
            with self, torch.no_grad():
                return FUNCTIONS[func](*args, **kwargs)
        if func.overloadpacket in self.products:
            in_place = func.overloadpacket is torch.ops.aten.addmm_
            self.calls.append((
                func, [self.operand(t, in_place and i == 0) for i, t in enumerate(args)],
                {k: self.operand(t, k == 'out') for k, t in kwargs.items()}))
        return func(*args, **kwargs)

    def operand(self, t: Any, written: bool) -> Any:  # noqa: ANN401 (arguments of any kind pass)
        if not isinstance(t, torch.Tensor):
            return t
        size = t.untyped_storage().nbytes() // t.itemsize
        key = size, t.dtype, t.device, written  # no product writes to what it reads
        if key not in self.memory:
            self.memory[key] = torch.randn(size, dtype=t.dtype, device=t.device)
        return self.memory[key].as_strided(t.shape, t.stride(), t.storage_offset())


class Count(TorchDispatchMode):
    """Bytes, FLOPs and number of all calls on fake tensors, by name.

    The tensors are on a CPU, since autograd takes none of a device that is not there. The fused operator is told that
    they are on a GPU. Triton's kernels are counted in place of their launch.
    """

    def __init__(self):
        super().__init__()
        self.calls: Dict[str, List[int]] = defaultdict(lambda: [0, 0, 0])

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, op = kwargs or {}, func.overloadpacket
        if func in FUNCTIONS:
            with self, torch.no_grad(), mock.patch.object(FakeTensor, 'is_cuda', True):
                return FUNCTIONS[func](*args, **kwargs)
        if func.namespace != 'aten':  # asks for a tensor's device
            return func(*args, **kwargs)
        if op is torch.ops.aten.batch_norm_update_stats:  # has no fake kernel
            dtype = torch.promote_types(args[0].dtype, torch.float32)
            out = [args[0].new_empty(args[0].shape[1], dtype=dtype) for _ in range(2)]
        else:
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:  # what it is made of has been counted
                return out
            out = func(*args, **kwargs)
        if not func.is_view and not any(s in op.__name__ for s in ('view', 'empty')):
            formula = flop_registry.get(torch.ops.aten.addmm if op is torch.ops.aten.addmm_ else op)
            self.add(op.__name__, (args, kwargs, out), formula(*args, **kwargs, out_val=out) if formula else 0)
        return out

    def add(self, name: str, tensors: Any, flops: int = 0) -> None:  # noqa: ANN401 (a tree of any kind)
        tensors = {id(t): t for t in tree_leaves(tensors) if isinstance(t, torch.Tensor)}
        for i, number in enumerate((sum(t.nbytes for t in tensors.values()), flops, 1)):
            self.calls[name][i] += number

    def launch(self, kernel: Any, programs: int, warps: int, *args, **constants) -> None:  # noqa: ANN401 (of Triton)
        self.add(kernel.fn.__name__, args)
