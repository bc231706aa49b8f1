"""Section 4 of the paper as an experiment: can two neurons that have collapsed into one be told apart by training?

    python examples/overlap_singularities.py

A pair of neurons p < q of one layer starts collapsed, y_p = y_q for every input, and is followed under full-batch
gradient descent in float64. Segment by segment, every channel is updated from the state s that earlier segments have
left behind (Eq. 9),

    y_i = x_i + w_i s        or, with ReLU,        y_i = x_i + v_i relu(U_i s)

and so the networks of Section 4 differ in their segments and in the residual x_i alone: "plain" (Eq. 7) is one segment
without the residual, "residual" (Eq. 8) one segment, "gradual" (Eq. 9) has a segment per channel, and "segments of 3"
are what GUNN is in practice (Section 4.3). A trained linear readout A y is to match a target of full rank, which a
layer with a collapsed pair cannot. Whatever reads the pair, the readout and later segments, weighs p and q alike at the
start, except where the readers are called unequal.

What to expect of the linear networks. In the plain one the collapse requires w_q = w_p, and both rows have the same
gradient as long as the readers are equal; the same goes for the residual one, where w_q = w_p + e_p - e_q. Where p and
q are updated in different segments, it requires y_q = x_q + (y_p - x_q), which in general position only
w_q = e_p - e_q gives, whatever w_p is. A step of rate r makes y_q - y_p = -r (dL/dw_q) s, and so gradient descent
leaves the collapse unless the gradient of w_q vanishes. With ReLUs, the neurons of a plain network start with equal
weights. In the others neuron q has four hidden ReLUs that make x_p - x_q or y_p - x_q of the state; "even split"
shares them between p and q.

Prints a table of the pair's distance, ||y_p - y_q|| / ||(y_p + y_q) / 2|| over inputs that were not trained on, and
writes a plot and a CSV of more steps to --output. Medians over the seeds, with the smallest and the largest.
"""
import argparse
import statistics
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Tuple

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
import torch
import torch.nn as nn
from common import bar, machine, replacing, write_csv

CHANNELS, HIDDEN = 6, 8


class Case(NamedTuple):
    segments: Tuple[int, ...]  # their lengths
    residual: bool
    pair: Tuple[int, int]
    equal_readers: bool = True
    split: float = 0.0  # with ReLUs and without an order: the part of neuron p in making the difference


CASES = {
    'plain': Case((6,), False, (1, 4)),
    'plain, unequal readers': Case((6,), False, (1, 4), equal_readers=False),
    'residual': Case((6,), True, (1, 4)),
    'gradual': Case((1,) * 6, True, (1, 4)),
    'gradual, neighbours': Case((1,) * 6, True, (1, 2)),
    'segments of 3, pair in one': Case((3, 3), True, (0, 2)),
    'segments of 3, pair in one, unequal readers': Case((3, 3), True, (0, 2), equal_readers=False),
    'segments of 3, pair in two': Case((3, 3), True, (1, 4)),
}
RELU_CASES = {**CASES, 'residual, even split': Case((6,), True, (1, 4), split=0.5)}


class Layer(nn.Module):
    """Layers of CHANNELS neurons and their readouts, one per seed: inputs (S, B, n) to y and outputs, both (S, B, n).

    Sums are taken as sums of products, not as matrix products, so that equal neurons are rounded alike.

    Source: Eq. 7 to 9, and 11 with one hidden layer of HIDDEN ReLUs for each neuron.
    """

    def __init__(self, case: Case, relu: bool, seeds: int):
        super().__init__()
        n, self.case, self.relu = CHANNELS, case, relu
        readers = (seeds, n, HIDDEN, n) if relu else (seeds, n, n)
        # What reads the state: hidden neurons or, without ReLUs, the neurons themselves.
        self.U = nn.Parameter(torch.randn(readers, dtype=torch.float64) * (2 / n) ** 0.5)
        if relu:
            self.v = nn.Parameter(torch.randn(seeds, n, HIDDEN, dtype=torch.float64) * (2 / HIDDEN) ** 0.5)
        self.A = nn.Parameter(torch.randn(seeds, n, n, dtype=torch.float64) / n ** 0.5)

    def forward(self, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        s, start = x, 0
        for length in self.case.segments:
            i = slice(start, start + length)
            if self.relu:
                hidden = (self.U[:, None, i] * s[:, :, None, None]).sum(-1).relu()
                update = (self.v[:, None, i] * hidden).sum(-1)
            else:
                update = (self.U[:, None, i] * s[:, :, None]).sum(-1)
            y = x[..., i] + update if self.case.residual else update
            s = torch.cat([s[..., :start], y, s[..., start + length:]], -1)
            start += length
        return s, (self.A[:, None] * s[:, :, None]).sum(-1)

    @torch.no_grad()
    def collapse(self) -> None:
        """Set neuron q so that y_q = y_p for every input; with ReLUs and the residual, some of neuron p as well."""
        (p, q), case = self.case.pair, self.case
        unit = torch.eye(CHANNELS, dtype=torch.float64)
        together = segment_of(case, p) == segment_of(case, q)
        if case.equal_readers:
            later = [i for i in range(CHANNELS) if segment_of(case, i) > segment_of(case, q)]
            self.U[:, later, ..., q] = self.U[:, later, ..., p]
            self.A[..., q] = self.A[..., p]
        if self.relu:
            if case.residual:  # in hidden neurons, x = relu(x) - relu(-x)
                self.U[:, p, :4] = torch.stack([unit[p], -unit[p], unit[q], -unit[q]])
            self.U[:, q], self.v[:, q] = self.U[:, p], self.v[:, p]
            if case.residual:
                signs = torch.tensor([1, -1, -1, 1], dtype=torch.float64)
                if together:  # of x_p - x_q, p subtracts its part and q adds the rest
                    self.v[:, p, :4], self.v[:, q, :4] = -case.split * signs, (1 - case.split) * signs
                else:  # y_q = x_q + (y_p - x_q)
                    self.v[:, q] = 0
                    self.v[:, q, :4] = signs
        elif not case.residual:
            self.U[:, q] = self.U[:, p]
        elif together:  # y_q = x_q + (w_p s + x_p - x_q)
            self.U[:, q] = self.U[:, p] + unit[p] - unit[q]
        else:  # y_q = x_q + (y_p - x_q)
            self.U[:, q] = unit[p] - unit[q]


def segment_of(case: Case, channel: int) -> int:
    ends = [sum(case.segments[:k + 1]) for k in range(len(case.segments))]
    return sum(channel >= end for end in ends)


@torch.no_grad()
def distance(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    """Of each seed's pair, (S,)."""
    y, _ = layer(x)
    p, q = y[..., layer.case.pair[0]], y[..., layer.case.pair[1]]
    return 2 * (p - q).norm(dim=1) / (p + q).norm(dim=1)


def problem(relu: bool, seeds: int) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs (S, 256, n), their targets, and inputs to measure with."""
    x, x_test = torch.randn(2, seeds, 256, CHANNELS, dtype=torch.float64)
    teacher = torch.linalg.qr(torch.randn(seeds, CHANNELS, CHANNELS, dtype=torch.float64))[0]
    target = x @ teacher.mT
    return x, target.relu() if relu else target, x_test


def losses(layer: Layer, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Half the squared error, (S,)."""
    return (layer(x)[1] - target).square().sum(-1).mean(1) / 2


def descend(layer: Layer, x: torch.Tensor, target: torch.Tensor, rate: float) -> None:
    """One step of gradient descent for each seed."""
    grads = torch.autograd.grad(losses(layer, x, target).sum(), list(layer.parameters()))
    with torch.no_grad():
        for param, grad in zip(layer.parameters(), grads, strict=True):
            param -= rate * grad


def follow(case: Case, relu: bool, seeds: int, rate: float, steps: List[int]) -> Tuple[torch.Tensor, torch.Tensor]:
    """Distances and losses after the given numbers of steps, both (len(steps), S)."""
    torch.manual_seed(0)
    x, target, x_test = problem(relu, seeds)
    layer = Layer(case, relu, seeds)
    layer.collapse()
    distances, values = [], []
    for step in bar(range(steps[-1] + 1), unit='step'):
        if step in steps:
            distances.append(distance(layer, x_test))
            values.append(losses(layer, x, target).detach())
        descend(layer, x, target, rate)
    if not (values[-1].isfinite().all() and distances[-1].isfinite().all()):
        raise SystemExit(f'gradient descent diverges with --lr {rate:g}; expected a lower one')
    return torch.stack(distances), torch.stack(values)


def spread(values: List[float]) -> str:
    """Median and range, in few digits."""
    median, low, high = (f'{v:.0e}' if v < 0.01 else f'{v:.2f}' for v in (
        statistics.median(values), min(values), max(values)))
    return median if low == high else f'{median} ({low} to {high})'


def draw(runs: Dict[Tuple[bool, str], torch.Tensor], steps: List[int], path: Path) -> None:
    """Distance over steps: medians over the seeds."""
    fig, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True, layout='constrained')
    styles = dict(zip(RELU_CASES, ('C0-', 'C0:', 'C1-', 'C2-', 'C2:', 'C3-', 'C3:', 'C3--', 'C1--'), strict=True))
    for (relu, name), distances in runs.items():
        axes[int(relu)].loglog(steps[1:], distances.median(1).values[1:].clamp_min(1e-17), styles[name], label=name)
    for ax, title in zip(axes, ('linear', 'ReLU'), strict=True):
        ax.set(title=title, xlabel='steps of gradient descent')
        ax.grid(alpha=0.3)
    axes[0].set(ylabel='relative distance of the pair (1e-17: none)')
    axes[1].legend(fontsize=8)
    with replacing(path) as part:
        fig.savefig(part, dpi=110, format='png')
    plt.close(fig)


def main(argv: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--steps', type=int, default=3000)
    parser.add_argument('--seeds', type=int, default=5)
    parser.add_argument('--lr', type=float, default=0.02)
    parser.add_argument('--output', type=Path, default=Path('output'))
    args = parser.parse_args(argv)
    if args.steps < 1 or args.seeds < 1 or not args.lr > 0:
        parser.error(f'expected --steps >= 1, --seeds >= 1 and --lr > 0, got {args.steps}, {args.seeds} and {args.lr}')
    args.output.mkdir(parents=True, exist_ok=True)

    shown = [step for step in (0, 1, 10, 100, 1000) if step < args.steps] + [args.steps]
    steps = sorted({0, *shown, *(round(args.steps ** (k / 60)) for k in range(61))})
    about = machine(argparse.Namespace(device='cpu'))
    print('| network | ' + ' | '.join(f'step {step}' for step in shown) + ' | loss at the end |')
    print('|---' * (len(shown) + 2) + '|')
    runs, rows = {}, []
    for relu, cases in ((False, CASES), (True, RELU_CASES)):
        for name, case in cases.items():
            distances, values = follow(case, relu, args.seeds, args.lr, steps)
            runs[relu, name] = distances
            title = f'{"ReLU" if relu else "linear"}, {name}'
            cells = [spread(distances[steps.index(step)].tolist()) for step in shown] + [spread(values[-1].tolist())]
            print(f'| {title} | ' + ' | '.join(cells) + ' |', flush=True)
            for i, step in enumerate(steps):
                d = distances[i]
                rows.append(dict(
                    network=title, step=step, distance=f'{d.median():.4g}', distance_min=f'{d.min():.4g}',
                    distance_max=f'{d.max():.4g}', loss=f'{values[i].median():.4g}',
                    seeds=args.seeds, lr=args.lr, torch=about['torch'], command=about['command']))
    write_csv(args.output / 'overlap_singularities.csv', rows)
    draw(runs, steps, args.output / 'overlap_singularities.png')


if __name__ == '__main__':
    torch.set_num_threads(1)  # the layers are small
    main()
