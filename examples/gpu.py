"""Everything that a GPU has to say about this package, in six minutes: tests, speed, memory, a profile.

    python examples/gpu.py --output output/gpu
    python examples/gpu.py --output output/gpu --parts speed --minutes 4
    python examples/gpu.py --output output/gpu --parts tests train --train-command 'python examples/train_cifar.py ...'

Runs from a checkout on a machine with PyTorch, timm and pytest; nothing is installed or downloaded. Every part is a few
commands with a common time limit. A command that fails, or is stopped at the limit, costs nothing but itself. What a
part printed is in `<part>.txt`, and the rows of benchmark.py are in `results.csv`, written as soon as they are there.
"""
import argparse
import csv
import importlib.util
import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Dict, List, Optional

ROOT = Path(__file__).resolve().parent.parent
GRACE = 3  # seconds to come to an end in, after an interrupt: pytest then tells what has failed so far
LIMITS = dict(tests=110, speed=150, cifar=100, profile=30, train=float('inf'))  # seconds


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--output', type=Path, required=True, help='new folder')
    parser.add_argument('--parts', nargs='+', choices=list(LIMITS), default=['tests', 'speed', 'cifar', 'profile'])
    parser.add_argument('--minutes', type=float, default=9, help='limit of all parts together')
    parser.add_argument('--train-command', help='command line of the part train, which may take all that is left')
    parser.add_argument('--device', default='cuda')
    parser.add_argument('--tiny', action='store_true', help='one small case of each part, to try the script itself')
    args = parser.parse_args(argv)
    if ('train' in args.parts) != bool(args.train_command):
        parser.error('--parts train and --train-command need each other')
    return args


def commands(args: argparse.Namespace) -> Dict[str, List[List[str]]]:
    """Command lines of every part, in order of worth."""
    graphs = ['--graphs'] if args.device.startswith('cuda') else []
    benchmark = [sys.executable, str(ROOT / 'examples' / 'benchmark.py'), '--device', args.device, '--models']
    pytest = [
        sys.executable, '-m', 'pytest', '-m', 'gpu', '-v', '--maxfail=10', '--durations=5', '-p', 'no:cacheprovider',
        *(['-n', '8'] if importlib.util.find_spec('xdist') else [])]

    def bench(models: str, batch_size: int, img_size: int, *options: str, dtype: str = 'bfloat16') -> List[str]:
        if args.tiny:
            batch_size, img_size, options = 2, 8, (*options, '--rounds', '1', '--warmup', '0')
        return [*benchmark, *models.split(), '--batch-size', str(batch_size), '--img-size', str(img_size),
                '--dtype', dtype, '--csv', str(args.output / 'results.csv'), *options]

    parts = dict(
        tests=[[*pytest, *(str(ROOT / 'tests' / f'test_{name}.py') for name in names)] for names in (
            ['fused', 'layer', 'cuda', 'train_cifar'], ['triton_norm'])],
        speed=[
            bench('gunn18 sunn18 gunn18:composite resnet50 gunn18:library', 128, 224, '--rounds', '5', *graphs),
            bench('gunn18 sunn18 resnet50 gunn18:library', 128, 224, '--rounds', '5'),
            bench('gunn18 sunn18 gunn18:unblocked-cuda', 128, 224, '--bench', 'train', '--rounds', '5', *graphs)],
        cifar=[
            bench('gunn15 sunn15', 256, 32, '--bench', 'train', *graphs),
            bench('gunn15 sunn15', 64, 32, '--bench', 'train', *graphs),
            bench('gunn15 sunn15', 512, 32, '--bench', 'train', *graphs),
            bench('gunn15 sunn15 gunn15:library', 256, 32, '--bench', 'train'),
            bench('gunn15 sunn15', 64, 32, '--bench', 'train', dtype='float32')],
        profile=[bench('gunn18', 128, 224, '--profile'), bench('gunn15', 256, 32, '--profile')],
        train=[shlex.split(args.train_command or '')])
    if args.tiny:
        parts.update(
            tests=[[*pytest, str(ROOT / 'tests' / 'test_train_cifar.py')]],
            speed=[bench('gunn15', 2, 8, '--bench', 'inference')], cifar=parts['cifar'][4:],
            profile=parts['profile'][1:])
    return parts


def run_part(commands: List[List[str]], limit: float, log: Path) -> List[str]:
    """Run commands one after the other within `limit` seconds, their output into `log`; returns what became of them."""
    end, outcomes = time.monotonic() + limit, []
    env = {**os.environ, 'PYTHONUNBUFFERED': '1', 'PYTHONPATH': os.pathsep.join(
        [str(ROOT), *filter(None, [os.environ.get('PYTHONPATH')])])}
    with open(log, 'w') as f:
        for command in commands:
            left = end - time.monotonic()
            if left < 1:
                outcomes.append('no time left')
                continue
            print(f'$ {shlex.join(command)}', file=f, flush=True)
            try:
                process = subprocess.Popen(
                    command, stdout=f, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=env, cwd=ROOT,
                    start_new_session=True)
            except OSError as e:
                outcomes.append(str(e))
                continue
            try:
                code = process.wait(left)
                outcomes.append('ok' if code == 0 else f'exit {code}')
            except subprocess.TimeoutExpired:
                outcomes.append('stopped at the limit')
                os.killpg(process.pid, signal.SIGINT)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE)
            with suppress(ProcessLookupError):  # of whatever the command has left behind, too
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            print(f'== {outcomes[-1]}\n', file=f, flush=True)
    return outcomes


def last_line(log: Path) -> str:
    """What the last command of a part printed last."""
    lines = [line for line in log.read_text(errors='replace').splitlines() if line and not line.startswith(('$', '=='))]
    return lines[-1][:100] if lines else ''


def main(argv: Optional[List[str]] = None) -> None:
    args = parse_args(argv)
    args.output = args.output.resolve()
    args.output.mkdir(parents=True)
    end, table = time.monotonic() + 60 * args.minutes, []
    for name in args.parts:
        start, log = time.monotonic(), args.output / f'{name}.txt'
        outcomes = run_part(commands(args)[name], min(LIMITS[name], end - start), log)
        table.append(f'| {name} | {time.monotonic() - start:.0f} | {", ".join(outcomes)} | {last_line(log)} |')
        print(table[-1], flush=True)
    print('\n| part | seconds | outcome of its commands | last line |\n|---|---|---|---|\n' + '\n'.join(table))
    if (args.output / 'results.csv').exists():
        print('\n| step | model | batch | dtype | ms | images/s | ratio | peak, MiB |\n' + '|---' * 8 + '|')
        with open(args.output / 'results.csv', newline='') as f:
            for row in csv.DictReader(f):
                seconds, batch_size = float(row['seconds']), int(row['batch_size'])
                ratio = f'{float(row["ratio"]):.2f} of {row["reference"]}' if row['ratio'] else ''
                graphs = ', graphs' if row['graphs'] == 'True' else ''
                print(f'| {row["bench"]}{graphs} | {row["model"]} | {batch_size} | {row["dtype"]} | '
                      f'{1e3 * seconds:.1f} | {batch_size / seconds:.0f} | {ratio} | {float(row["peak_mib"]):.0f} |')


if __name__ == '__main__':
    main()
