"""Time and memory of GUNN beside SUNN, the composite of its modules and timm's networks, in one interleaved run.

    python examples/benchmark.py                              # GUNN-18 and its baselines at 224 pixels
    python examples/benchmark.py --device cuda --dtype bfloat16 --batch-size 128 --graphs
    python examples/benchmark.py --profile --models gunn18    # the most expensive calls of a train step
    python examples/benchmark.py --models gunn15 sunn15 --img-size 32 --batch-size 64
    python examples/benchmark.py --sweep 400x56 1600x14       # one layer, over the number of segments
    python examples/benchmark.py --count --dtype bfloat16 --batch-size 128  # kernels and bytes on a GPU, without one

A model is any that timm knows; `NAME:composite` is a GUNN without the fused operator (`:checkpointed`, with checkpoints
by stage), `NAME:library` one without Triton kernels in it, `NAME:folded` (inference) a model with its norms folded by
timm, `NAME:products` the matrix products and convolutions of a model's step alone, not compiled: what it would take if
all else were free (attention counts as such). `:unblocked-forward`, `:unblocked-backward` (on a GPU, `:unblocked-cuda`
for both), `:separate-norms`, `:narrow` and `:matmul` switch off what the operator gains by blocks, folding, wide rows
and convolutions in place of products.
Every round runs one step of each variant, one after the other, so that a drift of the machine's speed meets all of
them, and every other round backwards; ratios are taken within a round. Times are medians over the rounds, with the
interquartile range. A train step is the forward pass, the cross-entropy, the backward pass and SGD with Nesterov
momentum. With `--graphs`, forward and backward pass are replayed from CUDA graphs.

Every variant has a process of its own, as in use: what an allocator has learned from one network changes the time of
another by up to a third. Peak memory is that of the process on a CPU, and that of PyTorch's allocator on a GPU.
Products and convolutions of float32 may round to TF32 on a GPU, and cuDNN tries its kernels first, as with timm.
"""
import argparse
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
import torch.nn as nn
import torch.nn.functional as F
from common import Row, machine, read_csv, write_csv
from step_calls import Count, RecordProducts, fused_in_modes
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._triton import has_triton_package
from torch.utils.flop_counter import FlopCounterMode

from timm_gunn import GunnLayer

MODELS = [
    'gunn18', 'sunn18', 'gunn18:composite', 'gunn18:folded', 'sunn18:folded',
    'resnet50', 'resnet101', 'resnext50_32x4d', 'densenet201']


def composite(model: nn.Module) -> nn.Module:
    for layer in (m for m in model.modules() if isinstance(m, GunnLayer)):
        layer.fused = False
    return model


def checkpointed(model: nn.Module) -> nn.Module:
    model.set_grad_checkpointing()
    return composite(model)


def switched(name: str, value: Any) -> Callable[[nn.Module], nn.Module]:  # noqa: ANN401 (values of any kind)
    """A kind for which a name in the operator's code has another value, until the next network is made."""
    def change(model: nn.Module) -> nn.Module:
        mock.patch(f'timm_gunn.{name}', value).start()
        return model
    return change


# What is done to a model, by the kind that follows its name and a colon.
KINDS: Dict[str, Callable[[nn.Module], nn.Module]] = {
    '': lambda model: model,
    'composite': composite,
    'checkpointed': checkpointed,
    'library': switched('convs.has_triton_package', lambda: False),
    'folded': timm.utils.reparameterize_model,
    'products': lambda model: model,  # see Products
    # The operator without one of its optimisations.
    'unblocked-forward': switched('ordered.FORWARD_BLOCK', 1),
    'unblocked-backward': switched('ordered.BACKWARD_BLOCK', 1),
    'unblocked-cuda': switched('ordered.CUDA_BLOCK', 1),
    'separate-norms': switched('convs.folded', lambda params, *_: params),
    'narrow': switched('aten_norm.AtenNorm._pack', lambda *_: 1),
    'matmul': switched('ordered.CONV_ROWS', float('inf')),
}


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--models', nargs='+', default=MODELS, metavar='NAME[:KIND]')
    parser.add_argument('--reference', help='the ratios are to this one (default: the second of the models)')
    parser.add_argument('--bench', choices=['train', 'inference', 'both'], default='both')
    parser.add_argument('--sweep', nargs='+', metavar='CHANNELSxPIXELS', help='time single layers over their segments')
    parser.add_argument('--segments', nargs='+', type=int, help='of the sweep (default: all divisors up to a quarter)')
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--dtype', choices=['float32', 'bfloat16', 'float16'], default='float32',
                        help='16 bits by autocast')
    parser.add_argument('--batch-size', type=int, default=8)
    parser.add_argument('--img-size', type=int, default=224)
    parser.add_argument('--compile', nargs='?', const='default', metavar='MODE',
                        help='torch.compile in this mode; reduce-overhead captures CUDA graphs (default: not compiled)')
    parser.add_argument('--graphs', action='store_true', help='replay forward and backward pass from CUDA graphs')
    parser.add_argument('--profile', action='store_true', help='list the most expensive calls of one train step')
    parser.add_argument('--count', action='store_true', help='count kernels, bytes and FLOPs of a step, without a GPU')
    parser.add_argument('--rounds', type=int, default=10)
    parser.add_argument('--warmup', type=int, default=2, help='rounds that do not count')
    parser.add_argument('--csv', type=Path, help='append a row per variant to this file')
    parser.add_argument('--plots', type=Path, help='write plots into this folder (needs matplotlib)')
    args = parser.parse_args(argv)
    for name, low in dict(rounds=1, warmup=0, batch_size=1, img_size=1).items():
        if getattr(args, name) < low:
            parser.error(f'--{name.replace("_", "-")} must be at least {low}, got {getattr(args, name)}')
    for spec in args.models:
        name, _, kind = spec.partition(':')
        if kind not in KINDS or not timm.is_model(name):
            parser.error(f'expected a model of timm, and behind a colon one of {", ".join(KINDS)[2:]}, got {spec!r}')
    args.reference = args.reference or args.models[:2][-1]
    if args.reference not in args.models:
        parser.error(f'--reference must be one of {args.models}, got {args.reference!r}')
    if args.graphs and not args.device.startswith('cuda'):
        parser.error(f'--graphs needs --device cuda, got {args.device}')
    if args.csv and any(('gunn_seconds' in row) != bool(args.sweep) for row in read_csv(args.csv)):
        parser.error(f'--csv {args.csv} holds other columns than this kind of run writes; choose another file')
    return args


class Network:
    """A network of timm with what it takes to run one step of it."""

    def __init__(self, spec: str, bench: str, args: argparse.Namespace):
        name, _, kind = spec.partition(':')
        self.args, self.device, self.graphs = args, torch.device(args.device), args.graphs
        mock.patch.stopall()  # of an earlier network
        self.model = KINDS[kind](timm.create_model(name))
        x = torch.randn(args.batch_size, 3, args.img_size, args.img_size)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            self.model.eval()(x[:2])
        self.model.to(self.device, memory_format=torch.channels_last)
        self.x = x.to(self.device, memory_format=torch.channels_last)
        self.target = torch.zeros(args.batch_size, dtype=torch.long, device=self.device)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), 1e-6, momentum=0.9, nesterov=True, fused=self.device.type == 'cuda')
        self.facts = dict(
            params=sum(p.numel() for p in self.model.parameters()),
            gmacs=counter.get_total_flops() / 2e9 / len(x[:2]), saved_mib_per_image=0.0)
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


class Products:
    """The matrix products and convolutions of a network's step alone, those that it makes where it is not compiled."""

    def __init__(self, spec: str, bench: str, args: argparse.Namespace):
        network = Network(spec, bench, argparse.Namespace(**{**vars(args), 'compile': None}))
        with fused_in_modes(), RecordProducts() as recorder:
            getattr(network, bench)()
        self.calls = recorder.calls
        # Its memory would be that of the recording.
        self.facts = {**network.facts, 'saved_mib_per_image': '', 'peak_mib': ''}

    @torch.no_grad()
    def inference(self) -> None:
        for op, args, kwargs in self.calls:
            op(*args, **kwargs)

    train = inference


class SingleLayer:
    """One layer with what it takes to run its forward and backward pass."""

    def __init__(self, channels: int, segments: int, pixels: int, args: argparse.Namespace, **kwargs):
        self.args, self.facts = args, {}
        self.layer = GunnLayer(channels, segments, **kwargs).to(args.device, memory_format=torch.channels_last)
        x = torch.randn(args.batch_size, channels, pixels, pixels, device=args.device)
        self.x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
        self.grad = torch.randn_like(self.x)
        self.run = torch.compile(self.layer, mode=args.compile) if args.compile else self.layer

    def train(self) -> None:
        self.layer.zero_grad()
        self.x.grad = None
        with autocast(self.args):
            y = self.run(self.x)
        y.backward(self.grad.to(y.dtype))


def autocast(args: argparse.Namespace) -> ContextManager:
    if args.dtype == 'float32':
        return nullcontext()
    return torch.autocast(torch.device(args.device).type, getattr(torch, args.dtype))


def saved_bytes(forward: Callable[[], torch.Tensor], model: torch.nn.Module, *others: torch.Tensor) -> int:
    """Bytes that autograd keeps for the backward pass, each storage once, without parameters, buffers and others."""
    known = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers(), *others]}
    saved: Dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return t.detach()  # an output of its own node would keep the graph alive forever

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = forward()  # noqa: F841 (keeps its graph, so that no storage is freed and counted as another)
    return sum(saved.values())


def timed(run: Callable[[], Any], device: str) -> float:
    """Seconds of a call."""
    synchronize = torch.cuda.synchronize if device.startswith('cuda') else lambda: None
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start


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


def peak_resident_mib() -> float:
    """Largest memory of this process so far."""
    try:
        import resource
    except ImportError:  # Windows
        return float('nan')
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2 ** (20 if sys.platform == 'darwin' else 10)


def interleave(
        builders: Dict[str, Callable[[], Any]], bench: str, args: argparse.Namespace,
) -> Tuple[Dict[str, List[float]], Dict[str, Row]]:
    """Seconds of every variant's step in every round, and what else there is to know about it.

    A variant that fails says so and is left out from there on.
    """
    context = multiprocessing.get_context('spawn')  # CUDA does not survive a fork
    connections: Dict[str, Connection] = {}

    def ask(name: str, request: bool) -> Any:  # noqa: ANN401 (a pipe carries anything)
        try:
            connections[name].send(request)
            answer = connections[name].recv()
        except (EOFError, OSError):
            answer = 'its process was killed, by lack of memory perhaps'
        if isinstance(answer, str):
            print(f'benchmark: {name}: {answer}', flush=True)
            del connections[name], times[name]
        return answer

    facts, times, processes = {}, {name: [] for name in builders}, []
    for name, build in builders.items():
        connections[name], theirs = context.Pipe()
        processes.append(context.Process(target=serve, args=(theirs, build, bench, args.device), daemon=True))
        processes[-1].start()
        theirs.close()
    for name in builders:  # one after the other: cuDNN chooses its kernels by their times
        facts[name] = ask(name, True)
    for r in range(args.warmup + args.rounds):
        for name in list(connections)[::-1 if r % 2 else 1]:
            seconds = ask(name, True)
            if name in times and r >= args.warmup:
                times[name].append(seconds)
    for name in list(connections):
        facts[name].setdefault('peak_mib', ask(name, False))
    for process in processes:
        process.join()
    return times, facts


def spread(values: List[float], digits: int) -> str:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(values, n=4, method='inclusive') if len(values) > 1 else values * 3
    return f'{median:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})'


def row(*cells: object) -> None:
    """Print a row of a table."""
    print(f'| {" | ".join(map(str, cells))} |', flush=True)


def header(*names: str) -> None:
    row(*names)
    print('|---' * len(names) + '|')


def record(args: argparse.Namespace, rows: List[Row]) -> List[Row]:
    """Append to the CSV, if there is one."""
    if args.csv and rows:
        write_csv(args.csv, read_csv(args.csv) + rows)
    return rows


def plot(lines: Dict[str, List[Tuple[float, float]]], path: Path, **axes) -> None:
    """Draw named lines, or single points."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(6, 4), layout='constrained')
    for name, points in lines.items():
        ax.plot(*zip(*points, strict=True), 'o--' if name.startswith('SUNN') else 'o-', ms=4, label=name)
    ax.set(**axes)
    ax.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=150)
    print(f'wrote {path}')


def bench_models(args: argparse.Namespace) -> List[str]:
    """Steps of networks, as a table; returns what has failed."""
    rows, failed = [], []
    for bench in ('train', 'inference') if args.bench == 'both' else (args.bench,):
        variants = {
            spec: partial(Products if spec.endswith(':products') else Network, spec, bench, args)
            for spec in args.models if bench == 'inference' or ':folded' not in spec}
        times, facts = interleave(variants, bench, args)
        failed += [spec for spec in variants if spec not in times]
        passes = 3 if bench == 'train' else 1
        print(f'\n{bench}: {args.batch_size} images of {args.img_size} pixels, {args.dtype}\n')
        header('model', 'ms per step', f'/ {args.reference}', 'images/s', 'GMAC/s',
               'kept for backward, MiB/image', 'peak, MiB')
        new = []
        for spec, seconds in times.items():
            fact, median, base = facts[spec], statistics.median(seconds), times.get(args.reference)
            ratio = [a / b for a, b in zip(seconds, base, strict=True)] if base else []
            row(f'`{spec}`', spread([1e3 * s for s in seconds], 0 if median > 1 else 1),
                spread(ratio, 2) if ratio else '', f'{args.batch_size / median:.4g}',
                f'{passes * fact["gmacs"] * args.batch_size / median:.4g}',
                *(f'{fact[k]:.{digits}f}' if fact[k] != '' else '' for k, digits in (
                    ('saved_mib_per_image', 1), ('peak_mib', 0))))
            new.append(dict(
                bench=bench, model=spec, batch_size=args.batch_size, img_size=args.img_size, dtype=args.dtype,
                compile='' if spec.endswith(':products') else args.compile or '',
                graphs=args.graphs and not spec.endswith(':products'),
                rounds=args.rounds, seconds=median, seconds_min=min(seconds), seconds_max=max(seconds),
                reference=args.reference, ratio=statistics.median(ratio) if ratio else '', **fact, **machine(args)))
        rows += record(args, new)
    if args.plots and args.bench != 'inference':
        plot({r['model']: [(r['saved_mib_per_image'], r['batch_size'] / r['seconds'])] for r in rows
              if r['bench'] == 'train' and r['saved_mib_per_image'] != ''}, args.plots / 'throughput_memory.png',
             xlabel='kept for backward, MiB per image', ylabel='images per second, training')
    return failed


def bench_sweep(args: argparse.Namespace) -> List[str]:
    """Steps of single layers, as a table; returns what has failed."""
    rows, failed = [], []
    for channels, pixels in (map(int, size.split('x')) for size in args.sweep):
        print(f'\n{channels} channels, {pixels} x {pixels} pixels, batch {args.batch_size}, {args.dtype}: '
              'forward and backward\n')
        header('segments', 'GUNN, ms', 'SUNN, ms', 'GUNN / SUNN')
        for segments in args.segments or [p for p in range(1, channels // 4 + 1) if channels % p == 0]:
            times, facts = interleave({
                name: partial(SingleLayer, channels, segments, pixels, args, ordered=name == 'GUNN')
                for name in ('GUNN', 'SUNN')}, 'train', args)
            if len(times) < 2:
                failed.append(f'{segments} segments of {channels}x{pixels}')
                continue
            ratio = [a / b for a, b in zip(times['GUNN'], times['SUNN'], strict=True)]
            row(segments, *(spread([1e3 * s for s in seconds], 0) for seconds in times.values()), spread(ratio, 2))
            rows += record(args, [dict(
                channels=channels, pixels=pixels, segments=segments, batch_size=args.batch_size, dtype=args.dtype,
                compile=args.compile or '', rounds=args.rounds, ratio=statistics.median(ratio),
                gunn_seconds=statistics.median(times['GUNN']), sunn_seconds=statistics.median(times['SUNN']),
                gunn_peak_mib=facts['GUNN']['peak_mib'], sunn_peak_mib=facts['SUNN']['peak_mib'], **machine(args))])
    if args.plots:
        lines = defaultdict(list)
        for r in rows:
            for name in ('GUNN', 'SUNN'):
                line = f'{name}, N = {r["channels"]}, {r["pixels"]} x {r["pixels"]}'
                lines[line].append((r['segments'], 1e3 * r[f'{name.lower()}_seconds']))
        plot(lines, args.plots / 'time_segments.png', xscale='log', xlabel='segments P',
             ylabel='forward and backward, ms', ylim=(0, None))
    return failed


def bench_profile(args: argparse.Namespace) -> None:
    """The twenty calls of a train step that take most time: kernels on a GPU, operators on a CPU."""
    device = torch.autograd.DeviceType.CUDA if args.device.startswith('cuda') else torch.autograd.DeviceType.CPU
    for spec in args.models:
        network = Network(spec, 'train', args)
        for _ in range(3):
            network.train()
        with torch.profiler.profile() as profiler:
            timed(network.train, args.device)
        calls: Dict[str, List[float]] = defaultdict(list)  # milliseconds
        for event in profiler.events():
            if event.device_type == device and not event.is_user_annotation:
                time = event.self_cpu_time_total if device.name == 'CPU' else event.time_range.elapsed_us()
                calls[event.name].append(time / 1e3)
        header('ms', 'calls', 'name')
        for name, times in sorted(calls.items(), key=lambda item: -sum(item[1]))[:20]:
            row(f'{sum(times):.2f}', len(times), f'`{name[:120]}`')
        total = [t for times in calls.values() for t in times]
        print(f'{spec}, batch {args.batch_size}: {len(total)} calls, {sum(total):.1f} ms', flush=True)


def counted(network: Network) -> Count:
    """Calls of a forward and backward pass; the network's own tensors become fake."""
    counter = Count()
    with FakeTensorMode(allow_non_fake_inputs=True), (
            mock.patch('timm_gunn.triton_norm.launch', counter.launch) if has_triton_package() else nullcontext()):
        network.model.to_empty(device='cpu')
        network.x = torch.empty_like(network.x)
        with fused_in_modes(), counter:
            network.forward().sum().backward()
    return counter


def bench_count(args: argparse.Namespace) -> None:
    """Kernels, bytes and FLOPs of a forward and backward pass on a GPU: a model, not a measurement.

    Every call that computes is taken for one kernel, which moves each of its tensors once. FLOPs are those of torch's
    formulas, which are too high for gradients of grouped convolutions (SUNN, ResNeXt).
    """
    for spec in args.models:
        calls = counted(Network(spec, 'inference', argparse.Namespace(**{**vars(args), 'device': 'cpu'}))).calls
        header('GB', 'TFLOP', 'kernels', 'name')
        for name, (num_bytes, flops, kernels) in sorted(calls.items(), key=lambda item: -item[1][0])[:20]:
            row(f'{num_bytes / 1e9:.2f}', f'{flops / 1e12:.2f}', kernels, f'`{name}`')
        num_bytes, flops, kernels = map(sum, zip(*calls.values(), strict=True))
        print(f'{spec}, batch {args.batch_size}: {kernels} kernels, {num_bytes / 1e9:.1f} GB, '
              f'{flops / 1e12:.2f} TFLOP', flush=True)


def main() -> None:
    args = parse_args()
    torch.manual_seed(0)
    torch.set_float32_matmul_precision('high')
    print(', '.join(f'{k} {v}' for k, v in machine(args).items()))
    bench = (
        bench_sweep if args.sweep else bench_count if args.count else bench_profile if args.profile else bench_models)
    failed = bench(args)
    if failed:
        raise SystemExit(f'benchmark: failed, as said above: {"; ".join(failed)}')


if __name__ == '__main__':
    main()
