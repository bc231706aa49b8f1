"""Time and memory of GUNN beside SUNN, the composite of its modules and timm's networks, in one interleaved run.

    python examples/benchmark.py                              # GUNN-18 and its baselines at 224 pixels
    python examples/benchmark.py --device cuda --dtype bfloat16 --batch-size 128
    python examples/benchmark.py --models gunn15 sunn15 --img-size 32 --batch-size 64
    python examples/benchmark.py --sweep 400x56 1600x14       # one layer, over the number of segments

A model is any that timm knows; `NAME:composite` is a GUNN without the fused operator, `NAME:folded` (inference) a model
with its norms folded by timm. Every round runs each variant once, one after the other, so that a drift of the machine's
speed meets all of them; ratios are taken within a round. Times are medians over the rounds, with the interquartile
range. A train step is the forward pass, the cross-entropy, the backward pass and SGD with Nesterov momentum.
"""
import argparse
import csv
import os
import platform
import shlex
import statistics
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Callable, Dict, List, Optional

import timm
import timm.utils
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import timm_gunn
from timm_gunn import GunnLayer

MODELS = ['gunn18', 'sunn18', 'gunn18:composite', 'resnet50', 'resnet101', 'resnext50_32x4d', 'densenet201']


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--models', nargs='+', default=MODELS, metavar='NAME[:composite|:folded]')
    parser.add_argument('--reference', help='the ratios are to this one (default: the second of the models)')
    parser.add_argument('--bench', choices=['train', 'inference', 'both'], default='both')
    parser.add_argument('--sweep', nargs='+', metavar='CHANNELSxPIXELS', help='time single layers over their segments')
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--dtype', choices=['float32', 'bfloat16', 'float16'], default='float32',
                        help='16 bits by autocast')
    parser.add_argument('--batch-size', type=int, default=8)
    parser.add_argument('--img-size', type=int, default=224)
    parser.add_argument('--contiguous', action='store_true', help='instead of channels-last memory')
    parser.add_argument('--compile', action='store_true', help='torch.compile with its default backend')
    parser.add_argument('--rounds', type=int, default=10)
    parser.add_argument('--warmup', type=int, default=2, help='rounds that do not count')
    parser.add_argument('--csv', type=Path, help='append a row per variant to this file')
    parser.add_argument('--plots', type=Path, help='write plots into this folder (needs matplotlib)')
    return parser.parse_args()


class Variant:
    """A network with what it takes to run one step of it."""

    def __init__(self, spec: str, args: argparse.Namespace):
        name, _, kind = spec.partition(':')
        if kind not in ('', 'composite', 'folded'):
            raise SystemExit(f"benchmark: expected NAME, NAME:composite or NAME:folded, got {spec!r}.")
        self.spec, self.args = spec, args
        self.device = torch.device(args.device)
        self.model = timm.create_model(name, **({'fused': False} if kind == 'composite' else {}))
        self.train_possible = kind != 'folded'
        if kind == 'folded':
            self.model = timm.utils.reparameterize_model(self.model)
        size = 2, 3, args.img_size, args.img_size
        self.num_params = sum(p.numel() for p in self.model.parameters())
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            self.model.eval()(torch.randn(size))
        self.gmacs = counter.get_total_flops() / 2 / size[0] / 1e9
        self.memory_format = torch.contiguous_format if args.contiguous else torch.channels_last
        self.model.to(self.device, memory_format=self.memory_format)
        self.x = torch.randn(args.batch_size, *size[1:], device=self.device).contiguous(
            memory_format=self.memory_format)
        self.target = torch.zeros(args.batch_size, dtype=torch.long, device=self.device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 1e-6, momentum=0.9, nesterov=True)
        self.saved = saved_bytes(self.forward, self.model) / args.batch_size / 2 ** 20 if self.train_possible else None
        self.run = torch.compile(self.model) if args.compile else self.model

    def autocast(self):  # noqa: ANN201 (a context manager)
        if self.args.dtype == 'float32':
            return nullcontext()
        return torch.autocast(self.device.type, getattr(torch, self.args.dtype))

    def forward(self) -> torch.Tensor:
        with self.autocast():
            return self.model.train()(self.x)

    def train(self) -> None:
        self.model.train()
        self.optimizer.zero_grad()
        with self.autocast():
            loss = F.cross_entropy(self.run(self.x), self.target)
        loss.backward()
        self.optimizer.step()

    def inference(self) -> None:
        self.model.eval()
        with torch.no_grad(), self.autocast():
            self.run(self.x)


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


def timed(f: Callable[[], None], device: torch.device) -> float:
    if device.type == 'cuda':
        torch.cuda.synchronize()
    start = time.perf_counter()
    f()
    if device.type == 'cuda':
        torch.cuda.synchronize()
    return time.perf_counter() - start


def interleave(steps: Dict[str, Callable[[], None]], args: argparse.Namespace) -> Dict[str, List[float]]:
    """Seconds of every step in every round."""
    times: Dict[str, List[float]] = {name: [] for name in steps}
    for r in range(args.warmup + args.rounds):
        for name, step in steps.items():
            seconds = timed(step, torch.device(args.device))
            if r >= args.warmup:
                times[name].append(seconds)
    return times


def spread(values: List[float]) -> str:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return f'{median:.3g} ({low:.3g} to {high:.3g})'


def ratios(times: List[float], reference: List[float]) -> List[float]:
    return [a / b for a, b in zip(times, reference, strict=True)]


def machine(args: argparse.Namespace) -> Dict[str, str]:
    if args.device.startswith('cuda'):
        hardware = torch.cuda.get_device_name(args.device)
    else:
        hardware = platform.processor() or platform.machine()
        if os.path.exists('/proc/cpuinfo'):
            lines = Path('/proc/cpuinfo').read_text().splitlines()
            names = [line.split(':')[1].strip() for line in lines if line.startswith('model name')]
            hardware = names[0] if names else hardware
        hardware += f', {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}'
    return dict(
        hardware=hardware, torch=torch.__version__, timm=timm.__version__, timm_gunn=timm_gunn.__version__,
        python=platform.python_version(), command='python ' + shlex.join(sys.argv))


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
    variants = {spec: Variant(spec, args) for spec in args.models}
    reference = args.reference or args.models[min(1, len(args.models) - 1)]
    if reference not in variants:
        raise SystemExit(f'benchmark: --reference must be one of {args.models}, got {reference!r}.')
    rows = []
    for bench in ('train', 'inference') if args.bench == 'both' else (args.bench,):
        steps = {s: getattr(v, bench) for s, v in variants.items() if bench == 'inference' or v.train_possible}
        peaks = {}
        if args.device.startswith('cuda'):
            for spec, step in steps.items():
                step()
                torch.cuda.reset_peak_memory_stats()
                step()
                peaks[spec] = torch.cuda.max_memory_allocated() / 2 ** 20
        times = interleave(steps, args)
        passes = 3 if bench == 'train' else 1
        print(f'\n{bench}: ms per step of {args.batch_size} images of {args.img_size} pixels, {args.dtype}\n')
        print(f'| model | ms | / {reference} | images/s | GMAC/s | kept for backward, MiB/image | peak, MiB |')
        print('|---|---|---|---|---|---|---|')
        for spec, seconds in times.items():
            v, median = variants[spec], statistics.median(seconds)
            ratio = ratios(seconds, times[reference]) if reference in times else None
            saved = f'{v.saved:.1f}' if bench == 'train' else ''
            peak = f'{peaks[spec]:.0f}' if spec in peaks else ''
            print(f'| `{spec}` | {spread([1e3 * s for s in seconds])} | {spread(ratio) if ratio else ""} | '
                  f'{args.batch_size / median:.4g} | {passes * v.gmacs * args.batch_size / median:.4g} | '
                  f'{saved} | {peak} |')
            rows.append(dict(
                bench=bench, model=spec, batch_size=args.batch_size, img_size=args.img_size, dtype=args.dtype,
                compile=args.compile, contiguous=args.contiguous, rounds=args.rounds, seconds=median,
                seconds_min=min(seconds), seconds_max=max(seconds), reference=reference,
                ratio=statistics.median(ratio) if ratio else '', gmacs=v.gmacs, params=v.num_params,
                saved_mib_per_image=saved, peak_mib=peak, **machine(args)))
    write_csv(args.csv, rows)
    if args.plots:
        plot_models([r for r in rows if r['bench'] == 'train'], args.plots)


def bench_sweep(args: argparse.Namespace) -> None:
    rows = []
    for spec in args.sweep:
        channels, _, pixels = spec.partition('x')
        if not channels.isdigit() or not pixels.isdigit():
            raise SystemExit(f"benchmark: --sweep takes CHANNELSxPIXELS such as 400x56, got {spec!r}.")
        channels, pixels = int(channels), int(pixels)
        x = torch.randn(args.batch_size, channels, pixels, pixels, device=args.device, requires_grad=True)
        if not args.contiguous:
            x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
        w = torch.randn_like(x)
        print(f'\n{channels} channels, {pixels} x {pixels} pixels, batch {args.batch_size}: '
              'ms of forward and backward\n')
        print('| segments | GUNN | SUNN | GUNN / SUNN |\n|---|---|---|---|')
        for segments in (p for p in range(1, channels // 4 + 1) if channels % p == 0):
            steps = {}
            for name, ordered in (('GUNN', True), ('SUNN', False)):
                layer = GunnLayer(channels, segments, ordered=ordered).to(args.device)
                if not args.contiguous:
                    layer.to(memory_format=torch.channels_last)
                steps[name] = partial(layer_step, layer, x, w, args)
            times = interleave(steps, args)
            ratio = ratios(times['GUNN'], times['SUNN'])
            print(f'| {segments} | {spread([1e3 * s for s in times["GUNN"]])} | '
                  f'{spread([1e3 * s for s in times["SUNN"]])} | {spread(ratio)} |', flush=True)
            rows.append(dict(
                channels=channels, pixels=pixels, segments=segments, batch_size=args.batch_size, dtype=args.dtype,
                contiguous=args.contiguous, rounds=args.rounds, gunn_seconds=statistics.median(times['GUNN']),
                sunn_seconds=statistics.median(times['SUNN']), ratio=statistics.median(ratio), **machine(args)))
    write_csv(args.csv, rows)
    if args.plots:
        plot_sweep(rows, args.plots)


def layer_step(layer: torch.nn.Module, x: torch.Tensor, w: torch.Tensor, args: argparse.Namespace) -> None:
    layer.zero_grad()
    x.grad = None
    cast = args.dtype != 'float32'
    with torch.autocast(x.device.type, getattr(torch, args.dtype)) if cast else nullcontext():
        y = layer(x)
    y.backward(w.to(y.dtype))


def plot_models(rows: List[Dict[str, object]], folder: Path) -> None:
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(6, 4))
    for r in rows:
        point = float(r['saved_mib_per_image']), r['batch_size'] / r['seconds']
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
    print(', '.join(f'{k} {v}' for k, v in machine(args).items()))
    (bench_sweep if args.sweep else bench_models)(args)


if __name__ == '__main__':
    main()
