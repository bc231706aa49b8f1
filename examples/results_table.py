"""Print the table of trained networks in weights/README.md, from weights/results.csv, beside the paper's numbers.

    python examples/results_table.py
    python examples/results_table.py --finetuning   # what weights are worth: the table in README.md
    python examples/results_table.py --curves gunn15=a/metrics.csv sunn15=b/metrics.csv   # the paper's Figure 3

Runs that differ in their seed alone share a row: the mean error, and its range.
"""
import argparse
import statistics
from pathlib import Path
from typing import Dict, List, Optional

from cifar_results import draw_curves, read_results
from common import PUBLISHED, read_csv

RESULTS = Path(__file__).parent.parent / 'weights' / 'results.csv'
FINETUNING = RESULTS.with_name('finetuning.csv')
SEGMENTATION = Path(__file__).parent / 'results' / 'segment_finetuning.csv'


def spread(values: List[float], digits: int) -> str:
    """Mean, and the range if there are several values; nothing if there are none."""
    if not values:
        return ''
    mean = f'{statistics.mean(values):.{digits}f}'
    return mean if len(values) == 1 else f'{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})'


def print_table(path: Path) -> None:
    groups: Dict[tuple, List[Dict[str, str]]] = {}
    for row in read_results(path):
        key = tuple(row[k] for k in ('model', 'weights', 'data', 'images', 'epochs', 'recipe', 'hardware'))
        groups.setdefault(key, []).append(row)
    print('| model | data | epochs | recipe | seeds | error (%) | minutes | hardware | paper (%): 300 epochs |')
    print('|---|---|---|---|---|---|---|---|---|')
    for (model, weights, data, images, epochs, recipe, hardware), rows in groups.items():
        known = {'CIFAR-10': 'C10', 'CIFAR-100': 'C100'}.get(data.split(' ')[0].rstrip(','))
        changed = '=' in recipe  # a network with other arguments than the paper's
        published = '' if changed else PUBLISHED.get(model.split('.')[0], {}).get(known, '')
        if weights == 'EMA':
            recipe += ', averaged weights'
        print(f'| `{model}` | {data}, {images} images | {epochs} | {recipe} | {", ".join(r["seed"] for r in rows)} '
              f'| {spread([float(r["error"]) for r in rows], 2)} '
              f'| {spread([float(r["minutes"]) for r in rows if r["minutes"]], 0)} | {hardware} | {published} |')


def print_finetuning() -> None:
    """As many steps from scratch and from weights, by task."""
    tasks: Dict[str, tuple] = {}
    for row in read_results(FINETUNING):
        task = f'`{row["model"]}` | {row["data"]}, epochs: {row["epochs"]} | error (%)'
        tasks.setdefault(task, ([], []))['from pretrained weights' in row['recipe']].append(float(row['error']))
    for row in read_csv(SEGMENTATION):
        model, _, tag = row['backbone'].partition('.')
        task = f'`{model}` | {row["architecture"]} on drawn scenes, steps: {row["steps"]} | mIoU (%)'
        tasks.setdefault(task, ([], []))[bool(tag)].append(float(row['miou']))
    print('| network | trained on | measured | from scratch | from its weights |\n|---|---|---|---|---|')
    for task, (scratch, weights) in tasks.items():
        print(f'| {task} | {spread(scratch, 1)} | {spread(weights, 1)} |')


def main(argv: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--results', type=Path, default=RESULTS)
    parser.add_argument('--finetuning', action='store_true', help='the table of fine-tuning instead')
    parser.add_argument('--curves', nargs='+', metavar='NAME=CSV', help='draw the metrics of several runs together')
    parser.add_argument('--output', type=Path, default=Path('output/training_dynamics.png'), help='of --curves')
    args = parser.parse_args(argv)
    if args.finetuning:
        print_finetuning()
        return
    if args.curves is None:
        if not args.results.is_file():
            parser.error(f'expected a CSV of results, got {args.results}')
        print_table(args.results)
        return
    runs = {}
    for curve in args.curves:
        name, separator, path = curve.partition('=')
        if not separator or not Path(path).is_file():
            parser.error(f'expected --curves NAME=CSV with the metrics.csv of a run, got {curve!r}')
        runs[name] = read_csv(Path(path))
        if not runs[name]:
            parser.error(f'expected at least one epoch in {path}, got none')
    args.output.parent.mkdir(parents=True, exist_ok=True)
    draw_curves(runs, args.output)


if __name__ == '__main__':
    main()
