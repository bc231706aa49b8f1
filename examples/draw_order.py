"""Draw what the order is: segments that are updated all at once (SUNN) beside segments updated in turn (GUNN).

    python examples/draw_order.py

Both halves have the same four units. Each unit reads the whole state. The colour of a segment counts the units on the
longest path to it. Writes examples/results/order.png.
"""
import argparse
from pathlib import Path
from typing import List, Optional

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
from matplotlib.colors import to_rgb
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

SEGMENTS = 4
DEPTHS = ('#eceff1', '#c6dbef', '#6baed6', '#2878b5', '#084081')  # of a segment, by the units behind it
PITCH, CELL, UNIT = 2.9, 1.0, 0.8  # from column to column; sizes of segments and of units
INK, READS = '#263238', '#f2a541'


def row(i: int) -> float:
    """Middle of segment i, from 1 at the top."""
    return SEGMENTS - i + 0.5


def box(ax: plt.Axes, x: float, y: float, size: float, text: str, color: str, lw: float, fontsize: int = 13) -> None:
    ax.add_patch(FancyBboxPatch(
        (x - size / 2, y - size / 2), size, size, boxstyle=f'round,pad=0,rounding_size={size / 10}', fc=color, ec=INK,
        lw=lw, zorder=3))
    dark = sum(to_rgb(color)) < 1.6
    ax.text(x, y - 0.02, text, ha='center', va='center', fontsize=fontsize, color='white' if dark else INK, zorder=4)


def state(ax: plt.Axes, x: float, depths: List[int], written: List[int]) -> None:
    """A column of segments, those that were just written with a thick edge."""
    for i, depth in enumerate(depths, 1):
        name = f'${"y" if depth else "x"}_{i}$'
        box(ax, x, row(i), CELL - 0.08, name, DEPTHS[depth], lw=2.2 if i in written else 0.8)


def unit(ax: plt.Axes, x: float, i: int) -> None:
    """Unit i, its input, which is the whole state at x, and its output, segment i of the next state."""
    middle = x + PITCH / 2
    for j in range(1, SEGMENTS + 1):
        ax.plot([x + CELL / 2 - 0.04, middle - UNIT / 2], [row(j), row(i)], color=READS, lw=1.5, zorder=1)
    box(ax, middle, row(i), UNIT, f'$U_{i}$', 'white', lw=1.2)
    ax.add_patch(FancyArrowPatch(
        (middle + UNIT / 2, row(i)), (x + PITCH - CELL / 2, row(i)), arrowstyle='-|>', mutation_scale=12, lw=1.4,
        color=INK, shrinkA=0, shrinkB=0, zorder=2))


def panel(ax: plt.Axes, x: float, columns: int, title: str, formula: str) -> None:
    middle = x + (columns - 1) * PITCH / 2
    ax.text(middle, SEGMENTS + 0.75, title, ha='center', fontsize=13, weight='bold', color=INK)
    ax.text(middle, SEGMENTS + 0.25, formula, ha='center', fontsize=12, color=INK)


def draw(path: Path) -> None:
    fig, ax = plt.subplots(figsize=(11, 3.9))
    panel(ax, 0, 2, 'SUNN: all at once', '$y = x + U(x)$')
    state(ax, 0, [0] * SEGMENTS, [])
    for i in range(1, SEGMENTS + 1):
        unit(ax, 0, i)
    state(ax, PITCH, [1] * SEGMENTS, list(range(1, SEGMENTS + 1)))

    left = 2 * PITCH
    ax.plot([left - PITCH / 2] * 2, [-0.1, SEGMENTS + 1], color='#b0bec5', lw=1)
    panel(ax, left, SEGMENTS + 1, 'GUNN: the same units, in order',
          r'$y_i = x_i + U_i(y_1, \dots, y_{i-1},\; x_i, \dots, x_P)$')
    for i in range(SEGMENTS + 1):
        state(ax, left + i * PITCH, [j if j <= i else 0 for j in range(1, SEGMENTS + 1)], [i])
        if i < SEGMENTS:
            unit(ax, left + i * PITCH, i + 1)

    right, low = left + SEGMENTS * PITCH + CELL / 2, -0.62
    ax.text(right - 2.95, low, 'units on the longest path:', ha='right', va='center', fontsize=11, color=INK)
    for depth, color in enumerate(DEPTHS):
        x = right - 0.25 - 0.55 * (SEGMENTS - depth)
        box(ax, x, low, 0.48, str(depth), color, lw=0.8, fontsize=10)
    ax.set(xlim=(-CELL / 2 - 0.1, right + 0.1), ylim=(-1, SEGMENTS + 1.2), aspect='equal')
    ax.axis('off')
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=150, bbox_inches='tight', facecolor='white', metadata={'Software': None})
    plt.close(fig)


def main(argv: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--output', type=Path, default=Path(__file__).parent / 'results' / 'order.png')
    args = parser.parse_args(argv)
    draw(args.output)
    print(f'wrote {args.output}')


if __name__ == '__main__':
    main()
