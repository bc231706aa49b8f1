"""Time and memory of GUNN beside SUNN, the composite of its modules and timm's networks, in one interleaved run.

    python examples/benchmark.py                              # GUNN-18 and its baselines at 224 pixels
    python examples/benchmark.py --device cuda --dtype bfloat16 --batch-size 128 --graphs
    python examples/benchmark.py --profile --models gunn18    # the most expensive calls of a train step
    python examples/benchmark.py --models gunn15 sunn15 --img-size 32 --batch-size 64
    python examples/benchmark.py --sweep 400x56 1600x14       # one layer, over the number of segments
    python examples/benchmark.py --count --dtype bfloat16 --batch-size 128  # kernels and bytes on a GPU, without one

A model is any that timm knows; `NAME:composite` is a GUNN without the fused operator, `NAME:library` one without Triton
kernels in it, `NAME:folded` (inference) a model with its norms folded by timm, `NAME:products` the matrix products and
convolutions of a model's step alone, not compiled: what it would take if all else were free (attention counts as such).
Every round runs one step of each variant, one after the other, so that a drift of the machine's speed meets all of
them, and every other round backwards; ratios are taken within a round. Times are medians over the rounds, with the
interquartile range. A train step is the forward pass, the cross-entropy, the backward pass and SGD with Nesterov
momentum. With `--graphs`, every network also runs with its forward and backward pass captured in a CUDA graph; its
ratio is to the reference in graphs.

Every variant has a process of its own, as in use: what an allocator has learned from one network changes the time of
another by up to a third. Peak memory is that of the process on a CPU, and that of PyTorch's allocator on a GPU.
Products and convolutions of float32 may round to TF32 on a GPU, and cuDNN tries its kernels first, as with timm.
"""
import argparse
import csv
import multiprocessing
import statistics
import sys
import time
from collections import defaultdict
from contextlib import nullcontext
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Callable, ContextManager, Dict, List, Optional, Tuple
from unittest import mock

import timm
import timm.utils
import torch
import torch.nn.functional as F
from common import machine
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from timm_gunn import GunnLayer, ops, ordered

KINDS = 'composite', 'library', 'folded', 'products'
MODELS = [
    'gunn18', 'sunn18', 'gunn18:composite', 'gunn18:folded', 'sunn18:folded',
    'resnet50', 'resnet101', 'resnext50_32x4d', 'densenet201']


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--models', nargs='+', default=MODELS, metavar='NAME[:composite|:library|:folded|:products]')
    parser.add_argument('--reference', help='the ratios are to this one (default: the second of the models)')
    parser.add_argument('--bench', choices=['train', 'inference', 'both'], default='both')
    parser.add_argument('--sweep', nargs='+', metavar='CHANNELSxPIXELS', help='time single layers over their segments')
    parser.add_argument('--segments', nargs='+', type=int, help='of the sweep (default: all divisors up to a quarter)')
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--dtype', choices=['float32', 'bfloat16', 'float16'], default='float32',
                        help='16 bits by autocast')
    parser.add_argument('--batch-size', type=int, default=8)
    parser.add_argument('--img-size', type=int, default=224)
    parser.add_argument('--contiguous', action='store_true', help='instead of channels-last memory')
    parser.add_argument('--compile', nargs='?', const='default', metavar='MODE',
                        help='torch.compile in this mode; reduce-overhead captures CUDA graphs (default: not compiled)')
    parser.add_argument('--graphs', action='store_true', help='every network in CUDA graphs too, beside eager')
    parser.add_argument('--profile', action='store_true', help='list the most expensive calls of one train step')
    parser.add_argument('--count', action='store_true', help='count kernels, bytes and FLOPs of a step, without a GPU')
    parser.add_argument('-v', '--verbose', action='store_true', help='list the most expensive calls of the count too')
    parser.add_argument('--rounds', type=int, default=10)
    parser.add_argument('--warmup', type=int, default=2, help='rounds that do not count')
    parser.add_argument('--csv', type=Path, help='append a row per variant to this file')
    parser.add_argument('--plots', type=Path, help='write plots into this folder (needs matplotlib)')
    args = parser.parse_args(argv)
    for name, low in dict(rounds=1, warmup=0, batch_size=1, img_size=1).items():
        if getattr(args, name) < low:
            parser.error(f'--{name.replace("_", "-")} must be at least {low}, got {getattr(args, name)}')
    if args.graphs and not args.device.startswith('cuda'):
        parser.error(f'--graphs needs --device cuda, got {args.device}')
    if args.csv and args.csv.exists():
        kind = 'gunn_seconds' if args.sweep else 'bench'
        with open(args.csv, newline='') as f:
            if kind not in next(csv.reader(f), []):
                parser.error(f'--csv {args.csv} holds other columns than this kind of run writes; choose another file')
    return args


# The fused operator as functions: no mode sees what is called beneath an operator.
FUNCTIONS = {op._opoverload: op._init_fn for op in (ops.ordered_update, ops.ordered_update_backward)}


class Network:
    """A network of timm with what it takes to run one step of it."""

    def __init__(self, spec: str, bench: str, args: argparse.Namespace, graphs: bool = False):
        name, _, kind = spec.partition(':')
        self.args, self.device, self.graphs = args, torch.device(args.device), graphs
        self.model = timm.create_model(name, **({'fused': False} if kind == 'composite' else {}))
        ordered.TRITON = kind != 'library'
        if kind == 'folded':
            self.model = timm.utils.reparameterize_model(self.model)
        size = 2, 3, args.img_size, args.img_size
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            self.model.eval()(torch.randn(size))
        memory_format = torch.contiguous_format if args.contiguous else torch.channels_last
        self.model.to(self.device, memory_format=memory_format)
        self.x = torch.randn(args.batch_size, *size[1:], device=self.device).contiguous(memory_format=memory_format)
        self.target = torch.zeros(args.batch_size, dtype=torch.long, device=self.device)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), 1e-6, momentum=0.9, nesterov=True, fused=self.device.type == 'cuda')
        self.facts = dict(
            params=sum(p.numel() for p in self.model.parameters()),
            gmacs=counter.get_total_flops() / 2 / size[0] / 1e9, saved_mib_per_image=0.0, compile=args.compile or '')
        if bench == 'train':  # only then: it would be the peak of inference
            saved = saved_bytes(self.forward, self.model)
            self.facts['saved_mib_per_image'] = saved / args.batch_size / 2 ** 20
        self.run = torch.compile(self.model, mode=args.compile) if args.compile else self.model

    def forward(self) -> torch.Tensor:
        with autocast(self.args):
            return self.model.train()(self.x)

    def train(self) -> None:
        self.model.train()
        self.optimizer.zero_grad()
        with autocast(self.args):
            loss = F.cross_entropy(self.run(self.x), self.target)
        loss.backward()
        self.optimizer.step()

    def inference(self) -> None:
        self.model.eval()
        with torch.no_grad(), autocast(self.args):
            self.run(self.x)

    def capture(self, bench: str) -> None:
        """Replay CUDA graphs from here on: of forward and backward pass, or of the inference."""
        if bench == 'train':
            with torch.autocast('cuda', getattr(torch, self.args.dtype), self.args.dtype != 'float32', False):
                torch.cuda.make_graphed_callables(self.model.train(), (self.x,))
            return
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.inference()  # what is allocated or chosen once must be so before the capture
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            self.inference()
        self.inference = graph.replay


class RecordProducts(TorchDispatchMode):
    """Keep the calls of products and convolutions, those within the fused operator too.

    Operands are replaced by others of their shapes, strides and dtypes. Those in equally large memory share it, so that
    caches serve them no worse than the step's own.
    """

    def __init__(self):
        super().__init__()
        self.products = {getattr(torch.ops.aten, name) for name in (
            'mm', 'addmm', 'addmm_', 'bmm', 'baddbmm', 'conv2d', 'convolution', 'convolution_backward')}
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


class Products:
    """The matrix products and convolutions of a network's step alone, those that it makes where it is not compiled."""

    def __init__(self, spec: str, bench: str, args: argparse.Namespace):
        network = Network(spec, bench, argparse.Namespace(**{**vars(args), 'compile': None}))
        with RecordProducts() as recorder:
            getattr(network, bench)()
        self.calls = recorder.calls
        # Its memory would be that of the recording.
        self.facts = {**network.facts, 'saved_mib_per_image': None, 'peak_mib': None}

    @torch.no_grad()
    def inference(self) -> None:
        for op, args, kwargs in self.calls:
            op(*args, **kwargs)

    train = inference


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


class SingleLayer:
    """One layer with what it takes to run its forward and backward pass."""

    def __init__(self, channels: int, segments: int, pixels: int, args: argparse.Namespace, **kwargs):
        self.args, self.facts = args, {}
        memory_format = torch.contiguous_format if args.contiguous else torch.channels_last
        self.layer = GunnLayer(channels, segments, **kwargs).to(args.device, memory_format=memory_format)
        x = torch.randn(args.batch_size, channels, pixels, pixels, device=args.device)
        self.x = x.contiguous(memory_format=memory_format).requires_grad_()
        self.grad = torch.randn_like(self.x)
        self.run = torch.compile(self.layer, mode=args.compile) if args.compile else self.layer

    def train(self) -> None:
        self.layer.zero_grad()
        self.x.grad = None
        with autocast(self.args):
            y = self.run(self.x)
        y.backward(self.grad.to(y.dtype))


def autocast(args: argparse.Namespace) -> ContextManager[None]:
    if args.dtype == 'float32':
        return nullcontext()
    return torch.autocast(torch.device(args.device).type, getattr(torch, args.dtype))


def saved_bytes(forward: Callable[[], torch.Tensor], model: torch.nn.Module) -> int:
    """Bytes that autograd keeps for the backward pass, each storage once, without parameters and buffers."""
    known = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    saved: Dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = forward()  # noqa: F841 (keeps its graph, so that no storage is freed and counted as another)
    return sum(saved.values())


def serve(connection: Connection, build: Callable[[], Any], bench: str, device: str) -> None:
    """Build when told so, then time a step whenever one is asked for; send what went wrong if something did."""
    cuda = device.startswith('cuda')
    torch.set_float32_matmul_precision('high')  # as of cuDNN's convolutions
    torch.backends.cudnn.benchmark = True
    try:
        connection.recv()
        variant = build()
        getattr(variant, bench)()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        if getattr(variant, 'graphs', False):
            variant.capture(bench)
        connection.send(variant.facts)
        while connection.recv():
            connection.send(timed(getattr(variant, bench), device))
        connection.send(torch.cuda.max_memory_allocated() / 2 ** 20 if cuda else peak_resident_mib())
    except Exception as e:
        connection.send(f'{type(e).__name__}: {e}')


def peak_resident_mib() -> Optional[float]:
    """Largest memory of this process so far; None where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2 ** (20 if sys.platform == 'darwin' else 10)


def interleave(
        builders: Dict[str, Callable[[], Any]],
        bench: str,
        args: argparse.Namespace,
        failed: Optional[List[str]] = None,
) -> Tuple[Dict[str, List[float]], Dict[str, Dict[str, float]]]:
    """Seconds of every variant's step in every round, and what else there is to know about it.

    A variant that cannot be built ends the run, unless there is a list for its name and others are left.
    """
    context = multiprocessing.get_context('spawn')  # CUDA does not survive a fork
    connections: Dict[str, Connection] = {}

    def receive(name: str, request: Optional[bool] = None) -> Any:  # noqa: ANN401 (a pipe carries anything)
        try:
            if request is not None:
                connections[name].send(request)
            message = connections[name].recv()
        except (EOFError, OSError):
            message = 'its process was killed, by lack of memory perhaps'
        if isinstance(message, str):
            raise SystemExit(f'benchmark: {name}: {message}')
        return message

    facts, times, processes = {}, {}, []
    for name, build in builders.items():
        connections[name], theirs = context.Pipe()
        processes.append(context.Process(target=serve, args=(theirs, build, bench, args.device), daemon=True))
        processes[-1].start()
        theirs.close()
    for name in builders:  # one after the other: cuDNN chooses its kernels by their times
        try:
            facts[name], times[name] = receive(name, True), []
        except SystemExit as e:
            if failed is None or len(connections) == 1:
                raise
            print(e, flush=True)
            failed.append(name)
            del connections[name]
    for r in range(args.warmup + args.rounds):
        for name in list(connections)[::-1 if r % 2 else 1]:
            seconds = receive(name, True)
            if r >= args.warmup:
                times[name].append(seconds)
    for name in connections:
        facts[name].setdefault('peak_mib', receive(name, False))
    for process in processes:
        process.join()
    return times, facts


def spread(values: List[float], digits: int) -> str:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(values, n=4, method='inclusive') if len(values) > 1 else values * 3
    return f'{median:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})'


def ratios(times: List[float], reference: List[float]) -> List[float]:
    return [a / b for a, b in zip(times, reference, strict=True)]


def write_csv(path: Optional[Path], rows: List[Dict[str, object]]) -> None:
    if path is None:
        return
    new = not path.exists()
    with open(path, 'a', newline='') as f:
        writer = csv.DictWriter(f, list(rows[0]))
        if new:
            writer.writeheader()
        writer.writerows(rows)


def bench_models(args: argparse.Namespace) -> None:
    reference = args.reference or args.models[min(1, len(args.models) - 1)]
    if reference not in args.models:
        raise SystemExit(f'benchmark: --reference must be one of {args.models}, got {reference!r}.')
    for spec in args.models:
        name, _, kind = spec.partition(':')
        if kind not in ('', *KINDS) or not timm.is_model(name):
            raise SystemExit(
                f'benchmark: expected a model of timm, and behind a colon one of {", ".join(KINDS)}, got {spec!r}.')
    if args.bench == 'train' and all(':folded' in spec for spec in args.models):
        raise SystemExit(f'benchmark: folded models are for inference, got --bench train of {args.models}.')
    all_rows, failed = [], []
    for bench in ('train', 'inference') if args.bench == 'both' else (args.bench,):
        variants = {
            f'{spec}, graphs' if graphs else spec: (spec, graphs)
            for spec in args.models if bench == 'inference' or ':folded' not in spec
            for graphs in ((False, True) if args.graphs and ':products' not in spec else (False,))}
        times, facts = interleave({
            name: partial(Products, spec, bench, args) if spec.endswith(':products')
            else partial(Network, spec, bench, args, graphs)
            for name, (spec, graphs) in variants.items()}, bench, args, failed)
        passes = 3 if bench == 'train' else 1
        print(f'\n{bench}: {args.batch_size} images of {args.img_size} pixels, {args.dtype}\n')
        print(f'| model | ms per step | / {reference} | images/s | GMAC/s | kept for backward, MiB/image | peak, MiB |')
        print('|---|---|---|---|---|---|---|')
        rows = []
        for name, seconds in times.items():
            (spec, graphs), fact = variants[name], facts[name]
            median = statistics.median(seconds)
            base = times.get(f'{reference}, graphs' if graphs else reference)
            ratio = ratios(seconds, base) if base else None
            compiled = fact.pop('compile')
            memory = ['' if fact[k] is None else f'{fact[k]:.{digits}f}' for k, digits in (
                ('saved_mib_per_image', 1), ('peak_mib', 0))]
            print(f'| `{spec}`{", graphs" if graphs else ""} | '
                  f'{spread([1e3 * s for s in seconds], 0 if median > 1 else 1)} | '
                  f'{spread(ratio, 2) if ratio else ""} | '
                  f'{args.batch_size / median:.4g} | {passes * fact["gmacs"] * args.batch_size / median:.4g} | '
                  f'{" | ".join(memory)} |', flush=True)
            rows.append(dict(
                bench=bench, model=spec, batch_size=args.batch_size, img_size=args.img_size, dtype=args.dtype,
                compile=compiled, graphs=graphs, contiguous=args.contiguous, rounds=args.rounds, seconds=median,
                seconds_min=min(seconds), seconds_max=max(seconds), reference=reference,
                ratio=statistics.median(ratio) if ratio else '', **fact, **machine(args)))
        write_csv(args.csv, rows)
        all_rows += rows
    if args.plots:
        plot_models(all_rows, args.plots)
    if failed:
        raise SystemExit(f'benchmark: failed, as said above: {"; ".join(failed)}')


def bench_profile(args: argparse.Namespace) -> None:
    """The twenty calls of a train step that take most time: kernels on a GPU, operators on a CPU."""
    activity = torch.profiler.ProfilerActivity
    device = torch.autograd.DeviceType.CUDA if args.device.startswith('cuda') else torch.autograd.DeviceType.CPU
    for spec in args.models:
        network = Network(spec, 'train', args)
        for _ in range(3):
            network.train()
        with torch.profiler.profile(activities=[activity.CPU, activity.CUDA]) as profiler:
            timed(network.train, args.device)
        calls: Dict[str, List[float]] = {}
        for event in profiler.events():
            if event.device_type == device and not event.is_user_annotation:
                time = event.self_cpu_time_total if device.name == 'CPU' else event.time_range.elapsed_us()
                calls.setdefault(event.name, []).append(time / 1e3)
        print('| ms | calls | name |\n|---|---|---|')
        for name, milliseconds in sorted(calls.items(), key=lambda item: -sum(item[1]))[:20]:
            print(f'| {sum(milliseconds):.2f} | {len(milliseconds)} | `{name[:120]}` |')
        total = [t for milliseconds in calls.values() for t in milliseconds]
        print(f'{spec}, batch {args.batch_size}: {len(total)} calls, {sum(total):.1f} ms', flush=True)


def counted(network: Network) -> Count:
    """Calls of a forward and backward pass; the network's own tensors become fake."""
    counter = Count()
    with FakeTensorMode(allow_non_fake_inputs=True), (
            mock.patch('timm_gunn.triton_norm.launch', counter.launch) if ordered.has_triton() else nullcontext()):
        network.model.to_empty(device='cpu')
        network.x = torch.empty_like(network.x)
        with counter:
            network.forward().sum().backward()
    return counter


def bench_count(args: argparse.Namespace) -> None:
    """Kernels, bytes and FLOPs of a forward and backward pass on a GPU: a model, not a measurement.

    Every call that computes is taken for one kernel, which moves each of its tensors once. FLOPs are those of torch's
    formulas, which are too high for gradients of grouped convolutions (SUNN, ResNeXt).
    """
    for spec in args.models:
        calls = counted(Network(spec, 'inference', argparse.Namespace(**{**vars(args), 'device': 'cpu'}))).calls
        if args.verbose:
            print('| GB | TFLOP | kernels | name |\n|---|---|---|---|')
            for name, (num_bytes, flops, kernels) in sorted(calls.items(), key=lambda item: -item[1][0])[:20]:
                print(f'| {num_bytes / 1e9:.2f} | {flops / 1e12:.2f} | {kernels} | `{name}` |')
        num_bytes, flops, kernels = map(sum, zip(*calls.values(), strict=True))
        print(f'{spec}, batch {args.batch_size}: {kernels} kernels, {num_bytes / 1e9:.1f} GB, '
              f'{flops / 1e12:.2f} TFLOP', flush=True)


def bench_sweep(args: argparse.Namespace) -> None:
    rows, sizes = [], []
    for spec in args.sweep:
        channels, _, pixels = spec.partition('x')
        if not channels.isdigit() or not pixels.isdigit():
            raise SystemExit(f"benchmark: --sweep takes CHANNELSxPIXELS such as 400x56, got {spec!r}.")
        sizes.append((int(channels), int(pixels)))
        if int(channels) < 4 or int(pixels) < 1:
            raise SystemExit(f'benchmark: --sweep takes at least 4 channels and 1 pixel, got {spec!r}.')
        for segments in args.segments or []:
            if segments < 1 or int(channels) % segments:
                raise SystemExit(f'benchmark: --segments must divide the {channels} channels, got {segments}.')
    for channels, pixels in sizes:
        print(f'\n{channels} channels, {pixels} x {pixels} pixels, batch {args.batch_size}, {args.dtype}: '
              'forward and backward\n')
        print('| segments | GUNN, ms | SUNN, ms | GUNN / SUNN |\n|---|---|---|---|')
        for segments in args.segments or [p for p in range(1, channels // 4 + 1) if channels % p == 0]:
            times, facts = interleave({
                name: partial(SingleLayer, channels, segments, pixels, args, ordered=name == 'GUNN')
                for name in ('GUNN', 'SUNN')}, 'train', args)
            ratio = ratios(times['GUNN'], times['SUNN'])
            print(f'| {segments} | {spread([1e3 * s for s in times["GUNN"]], 0)} | '
                  f'{spread([1e3 * s for s in times["SUNN"]], 0)} | {spread(ratio, 2)} |', flush=True)
            rows.append(dict(
                channels=channels, pixels=pixels, segments=segments, batch_size=args.batch_size, dtype=args.dtype,
                compile=args.compile or '', contiguous=args.contiguous, rounds=args.rounds,
                gunn_seconds=statistics.median(times['GUNN']), sunn_seconds=statistics.median(times['SUNN']),
                ratio=statistics.median(ratio), gunn_peak_mib=facts['GUNN']['peak_mib'],
                sunn_peak_mib=facts['SUNN']['peak_mib'], **machine(args)))
    write_csv(args.csv, rows)
    if args.plots:
        plot_sweep(rows, args.plots)


def timed(run: Callable[[], Any], device: str) -> float:
    """Seconds of a call."""
    cuda = device.startswith('cuda')
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def plot_models(rows: List[Dict[str, object]], folder: Path) -> None:
    rows = [r for r in rows if r['bench'] == 'train' and r['saved_mib_per_image'] is not None]
    if not rows:
        return
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(6, 4))
    for r in rows:
        point = r['saved_mib_per_image'], r['batch_size'] / r['seconds']
        ax.plot(*point, 'o')
        ax.annotate(r['model'], point, textcoords='offset points', xytext=(4, 4), fontsize=8)
    ax.set(xlabel='kept for backward, MiB per image', ylabel='images per second, training')
    save(fig, folder / 'throughput_memory.png')


def plot_sweep(rows: List[Dict[str, object]], folder: Path) -> None:
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(6, 4))
    for n, pixels in sorted({(r['channels'], r['pixels']) for r in rows}):
        group = [r for r in rows if (r['channels'], r['pixels']) == (n, pixels)]
        for name, style in (('gunn', 'o-'), ('sunn', 'o--')):
            ax.plot([r['segments'] for r in group], [1e3 * r[f'{name}_seconds'] for r in group], style, ms=3,
                    label=f'{name.upper()}, N = {n}, {pixels} x {pixels}')
    ax.set(xscale='log', xlabel='segments P', ylabel='forward and backward, ms', ylim=(0, None))
    ax.legend(fontsize=8)
    save(fig, folder / 'time_segments.png')


def save(fig, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.tight_layout()
    fig.savefig(path, dpi=150)
    print(f'wrote {path}')


def main() -> None:
    args = parse_args()
    torch.manual_seed(0)
    torch.set_float32_matmul_precision('high')
    print(', '.join(f'{k} {v}' for k, v in machine(args).items()))
    run = (
        bench_sweep if args.sweep else bench_count if args.count
        else bench_profile if args.profile else bench_models)
    run(args)


if __name__ == '__main__':
    main()
