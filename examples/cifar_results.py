"""What a run of train_cifar.py leaves behind: curves, weights, their row of results, and the ensemble of snapshots."""
import argparse
import hashlib
import math
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Dict, List, Tuple

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from cifar_data import Data
from common import Row, locked, machine, read_csv, replacing, save_weights, write_csv

import timm_gunn

if TYPE_CHECKING:
    from train_cifar import Run

RESULT_COLUMNS = [
    'model', 'weights', 'data', 'images', 'recipe', 'epochs', 'seed', 'error', 'loss', 'minutes', 'hardware',
    'versions', 'commit', 'command', 'file', 'sha256']


def report(run: 'Run', curves: bool = True) -> None:
    """metrics.csv and curves.png, of all epochs so far."""
    if run.history:
        write_csv(run.args.output / 'metrics.csv', run.history)
        if curves:
            draw_curves({run.args.model: run.history}, run.args.output / 'curves.png')


def draw_curves(runs: Dict[str, List[Row]], path: Path) -> None:
    """Loss and error of one or several runs over their epochs, the training images' dashed."""
    fig, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout='constrained')
    for ax, kind, label in zip(axes, ('loss', 'error'), ('cross-entropy', 'error (%)'), strict=True):
        for i, (name, rows) in enumerate(runs.items()):
            for split, style in (('train', '--'), ('eval', '-'), ('ema', ':')):
                if f'{split}_{kind}' in rows[0]:
                    ax.plot(
                        [int(r['epoch']) for r in rows], [float(r[f'{split}_{kind}']) for r in rows], style,
                        color=f'C{i}', marker='o' if len(rows) < 20 else None, markersize=3, label=f'{name}, {split}')
        ax.set(xlabel='epoch', ylabel=label)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.grid(alpha=0.3)
    axes[1].legend()
    with replacing(path) as part:
        fig.savefig(part, dpi=110, format='png')
    plt.close(fig)


def finish(run: 'Run', data: Data) -> None:
    """Write the weights, evaluate the files as they are, in float32, and write the results down."""
    args, rows = run.args, []
    about = dict(
        data=dataset_name(args), images=len(data.test.labels), recipe=recipe(args), epochs=args.epochs, seed=args.seed)
    for name, (model, _) in run.models().items():
        weights = 'EMA' if name == 'ema' else 'raw'
        path = args.output / ('model_ema.safetensors' if name == 'ema' else 'model.safetensors')
        save_weights(model, path)
        loss, error = evaluate(file_log_probs(run, path, data), data.test.labels)
        origins = {k: '; then '.join(dict.fromkeys(o[k] for o in run.origins)) for k in run.origins[0]}
        row = dict(
            **about, **origins, model=args.model, weights=weights, error=round(error, 4), loss=round(loss, 5),
            minutes=round(run.history[-1]['minutes'], 1), command=machine(args)['command'], file=path.name,
            sha256=hashlib.sha256(path.read_bytes()).hexdigest())
        rows.append({column: row[column] for column in RESULT_COLUMNS})
        print(f'{args.model}, {weights} weights, {args.epochs} epochs: {error:.2f} % error on '
              f'{len(data.test.labels)} images of {about["data"]}; {path}')
    if args.schedule == 'snapshot':
        write_csv(args.output / 'ensemble.csv', [dict(model=args.model, **about, **row) for row in ensemble(run, data)])
    if args.results is not None:
        with locked(args.results.with_suffix('.lock'), wait=True):
            runs = [identity(row) for row in rows]
            write_csv(args.results, [row for row in read_results(args.results) if identity(row) not in runs] + rows)
    write_csv(args.output / 'result.csv', rows)  # last: where it is, the run has ended


def identity(row: Row) -> Tuple[str, ...]:
    """What makes a row that of the same run, of which there is one row: a run that has ended may be called again."""
    return tuple(str(row[k]) for k in ('model', 'weights', 'data', 'images', 'recipe', 'epochs', 'seed'))


def read_results(path: Path) -> List[Row]:
    """Rows of a CSV of results, none if it is not there."""
    rows = read_csv(path)
    columns = list(rows[0]) if rows else []
    if path.exists() and columns != RESULT_COLUMNS:
        raise SystemExit(f'{path}: expected rows of the columns {RESULT_COLUMNS}, got {columns}')
    return rows


def evaluate(log_probs: torch.Tensor, labels: torch.Tensor) -> Tuple[float, float]:
    """Cross-entropy and error in percent."""
    return F.nll_loss(log_probs, labels).item(), 100 * (log_probs.argmax(1) != labels).double().mean().item()


def file_log_probs(run: 'Run', path: Path, data: Data) -> torch.Tensor:
    """Log-probabilities (n, classes) of the weights in a file, computed in float32, without TensorFloat-32."""
    model = timm.create_model(run.args.model, num_classes=len(data.classes), **run.args.model_kwargs)
    model.load_state_dict(safetensors.torch.load_file(path))
    model.to(run.args.device, memory_format=torch.channels_last)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return run.log_probs(model, model, data.test)


def ensemble(run: 'Run', data: Data) -> List[Row]:
    """Errors of the last m snapshots, their probabilities averaged, for m = 1 to all (Huang et al. 2017, Section 3)."""
    rows, members = [], []
    for m in range(1, run.args.cycles + 1):
        cycle = run.args.cycles + 1 - m
        members.append(file_log_probs(run, snapshot_path(run.args.output, cycle), data))
        _, single = evaluate(members[-1], data.test.labels)
        loss, error = evaluate(torch.stack(members).logsumexp(0) - math.log(m), data.test.labels)
        rows.append(dict(
            m=m, snapshot=cycle, snapshot_error=round(single, 4), ensemble_error=round(error, 4),
            ensemble_loss=round(loss, 5)))
        print(f'last {m} snapshots: {error:.2f} % error; snapshot {cycle} alone: {single:.2f} %')
    return rows


def snapshot_path(output: Path, cycle: int) -> Path:
    return output / f'snapshot_{cycle}.safetensors'


def dataset_name(args: argparse.Namespace) -> str:
    name = args.dataset_name or dict(cifar10='CIFAR-10', cifar100='CIFAR-100').get(
        args.dataset, args.data_dir.resolve().name)
    return f'{name}, held-out training images' if args.held_out else name


def recipe(args: argparse.Namespace) -> str:
    parts = [f'{args.schedule}', f'lr {args.lr:g} per 64', f'batch {args.batch_size}', args.dtype]
    if args.schedule == 'snapshot':
        parts[0] += f' of {args.cycles} cycles'
    defaults = dict(smoothing=0.0, ema=0.0, shift=2 / 3, weight_decay=None, momentum=0.9)  # the decay is always told
    parts += [f'{k} {getattr(args, k):g}' for k, default in defaults.items() if getattr(args, k) != default]
    return ', '.join(parts + [f'{k}={v}' for k, v in args.model_kwargs.items()])


def origin(args: argparse.Namespace) -> Dict[str, str]:
    """Hardware, versions, and the commits of this file and of the package, with a + if they have been changed since."""
    def commit(folder: Path) -> str:
        def git(*command: str) -> str:
            return subprocess.run(['git', *command], cwd=folder, capture_output=True, text=True).stdout.strip()
        try:
            return (git('rev-parse', '--short=12', 'HEAD') or 'none') + ('+' if git('status', '-s', '.') else '')
        except OSError:
            return 'unknown, without git'

    about = machine(args)
    commits = {commit(Path(module).parent): None for module in (__file__, timm_gunn.__file__)}
    return dict(
        hardware=about['hardware'], commit=' and '.join(commits),
        versions=', '.join(f'{k} {about[k]}' for k in ('torch', 'timm', 'timm_gunn', 'python')))
