"""The examples run as scripts, briefly."""
import csv
import itertools
import os
import re
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from timm_gunn import GunnLayer, fused

EXAMPLES = Path(__file__).parent.parent / 'examples'
sys.path.insert(0, str(EXAMPLES))

import draw_order
import gpu
import model_table
import quickstart
import record_result
import results_table
import train_cifar
from benchmark import Network, Products, bench_count, bench_models, bench_sweep, counted, interleave, parse_args
from tiny_imagenet import arrange


def run(name, *args, cwd):
    return subprocess.run(
        [sys.executable, str(EXAMPLES / name), *args], capture_output=True, text=True, timeout=300, cwd=cwd)


def test_quickstart(tmp_path):
    result = run('quickstart.py', '--epochs', '1', '--train-images', '64', '--size', '16', cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert 'accuracy on 450 held-out images: ' in result.stdout
    for name in ('quickstart.png', 'photographs.png'):
        assert (tmp_path / 'output' / name).read_bytes().startswith(b'\x89PNG')
    named = re.search(r'gunn15.c10 names rightly: (\d+) of 12', result.stdout)
    assert int(named[1]) >= 9  # 11 when this was written


@pytest.mark.parametrize(('options', 'message'), [
    (['--train-images', '8'], 'at least one batch of 32 training images, got 8'),
    (['--epochs', '0'], 'expected --epochs >= 1 and --batch-size >= 2, got 0 and 32'),
    (['--size', '0'], 'expected --size >= 8, the side of the digits, got 0'),
    (['--model', 'gunn'], 'expected the name of a timm model, got gunn')])
def test_quickstart_says_what_is_wrong(options, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['quickstart.py', *options])
    with pytest.raises(SystemExit):
        quickstart.main()
    assert message in capsys.readouterr().err


def test_model_table_is_that_of_the_readme(capsys):
    model_table.main()
    assert capsys.readouterr().out in (EXAMPLES.parent / 'README.md').read_text()


def test_draw_order(tmp_path):
    """The picture is the same in every run."""
    for name in ('first', 'second'):
        draw_order.main(['--output', str(tmp_path / name / 'order.png')])
    first, second = ((tmp_path / name / 'order.png').read_bytes() for name in ('first', 'second'))
    assert first.startswith(b'\x89PNG')
    assert first == second


def test_benchmark(tmp_path):
    result = run(
        'benchmark.py', '--models', 'gunn15', 'gunn15:composite', 'gunn15:products', '--bench', 'train',
        '--img-size', '8', '--batch-size', '2', '--rounds', '2', '--warmup', '0', '--csv', 'rows.csv', cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    with open(tmp_path / 'rows.csv', newline='') as f:
        fused, composite, products = csv.DictReader(f)
    assert float(fused['saved_mib_per_image']) < float(composite['saved_mib_per_image'])
    assert fused['gmacs'] == composite['gmacs']
    assert 'benchmark.py --models gunn15' in fused['command']
    assert float(products['seconds']) > 0
    assert float(fused['peak_mib']) > 0
    assert products['saved_mib_per_image'] == products['peak_mib'] == ''


@pytest.mark.parametrize(('spec', 'bench'), [('gunn15', 'train'), ('gunn15', 'inference'), ('sunn15', 'train')])
def test_benchmark_replays_every_product(spec, bench):
    args = parse_args(['--img-size', '8', '--batch-size', '2'])
    products, network = Products(f'{spec}:products', bench, args), Network(spec, bench, args)
    flops = []
    for variant in (products, network):
        with FlopCounterMode(display=False) as counter:
            getattr(variant, bench)()
        flops.append(counter.get_total_flops())
    in_place = torch.ops.aten.addmm_.default  # not counted by the counter
    flops[0] += sum(2 * args[1].numel() * args[2].shape[1] for op, args, _ in products.calls if op is in_place)
    # Beyond what the network's counter says, blocks multiply what has changed within them, and the backward pass
    # computes the last convolution of each unit again.
    ratio = flops[0] / flops[1]
    assert ratio == 1 if spec == 'sunn15' else 1 < ratio < 1.15, ratio


def small_count(model, x, kind=''):
    network = Network(f'sunn15:{kind}', 'inference', parse_args(['--img-size', '8']))
    network.model, network.x = model, x
    return counted(network).calls


def test_benchmark_counts_a_convolution():
    """Bytes (of float32), FLOPs and number of all calls."""
    x, w, y = 2 * 3 * 16, 5 * 3, 2 * 5 * 16  # numbers in each
    assert small_count(torch.nn.Conv2d(3, 5, 1, bias=False), torch.empty(2, 3, 4, 4)) == {
        'convolution': [4 * (x + w + y), 2 * 32 * 15, 1], 'sum': [4 * (y + 1), 0, 1], 'ones_like': [4 * 2, 0, 1],
        'convolution_backward': [4 * (y + x + w + w), 2 * 32 * 15, 1]}


@pytest.mark.parametrize('kind', ['', 'library'])
def test_benchmark_counts_the_operator_as_on_a_gpu(kind, monkeypatch):
    """Two units of 4 hidden and 2 own channels on 18 pixels."""
    if not kind:
        pytest.importorskip('triton')
    monkeypatch.setattr(fused, 'TRITON', True)  # put back after the network has changed it
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(4), GunnLayer(4, 2))
    calls = small_count(model, torch.empty(2, 4, 3, 3), kind)
    hidden, own = 4 * 18, 2 * 18
    if not kind:
        # What the second unit sends to the first segment, and both units to the state.
        assert calls['addmm_'] == [
            4 * (own + hidden + 4 * 2 + 2 * own + 2 * hidden + 8 * 4), 2 * 18 * (4 * 2 + 8 * 4), 2]
        assert calls['_backward'] == [2 * 4 * (2 * (3 * hidden + 6 * 4) + 3 * own + 6 * 2), 0, 2 * 3]
        assert [calls[name][2] for name in ('_statistics', '_forward', '_gradient_sums')] == [2 * 3, 2 * 5, 2 * 3]
    else:
        assert calls['threshold_backward'] == [2 * 2 * 4 * 2 * hidden, 0, 2 * 2]
        assert calls['batch_norm_update_stats'] == [2 * 4 * (2 * (hidden + 2 * 4) + own + 2 * 2), 0, 2 * 3]


def test_benchmark_prints_counts(capsys):
    bench_count(parse_args(['--count', '-v', '--models', 'sunn15', '--img-size', '8', '--batch-size', '2']))
    *table, total = capsys.readouterr().out.splitlines()
    convs = sum(isinstance(m, torch.nn.Conv2d) for m in timm.create_model('sunn15').modules())
    assert any(re.fullmatch(rf'\| 0\.\d\d \| 0\.00 \| {convs} \| `convolution` \|', row) for row in table)
    assert re.fullmatch(r'sunn15, batch 2: \d{3} kernels, 0\.\d GB, 0\.0\d TFLOP', total)


def test_benchmark_says_what_is_wrong(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse_args(['--batch-size', '0'])
    assert '--batch-size must be at least 1, got 0' in capsys.readouterr().err
    with pytest.raises(SystemExit, match="one of composite, library, folded, products, got 'gunn15:fast'"):
        bench_models(parse_args(['--models', 'gunn15:fast']))
    with pytest.raises(SystemExit, match='--segments must divide the 12 channels, got 5'):
        bench_sweep(parse_args(['--sweep', '400x56', '12x4', '--segments', '5']))
    # What goes wrong in the process of a variant.
    with pytest.raises(SystemExit, match='benchmark: gunn15: RuntimeError: '):
        bench_models(parse_args(['--models', 'gunn15', '--device', 'nowhere', '--csv', str(tmp_path / 'rows.csv')]))
    assert not (tmp_path / 'rows.csv').exists()


class Variant:
    """One whose process is killed while the others run."""

    def __init__(self, killed):
        self.killed, self.facts, self.steps = killed, {}, 0

    def train(self):
        self.steps += 1
        if self.killed and self.steps == 2:
            threading.Timer(0.1, os._exit, [9]).start()
        elif not self.killed:
            time.sleep(1)


def test_benchmark_whose_process_is_killed():
    args = parse_args(['--rounds', '3', '--warmup', '0'])
    with pytest.raises(SystemExit, match='benchmark: first: its process was killed, by lack of memory perhaps'):
        interleave({'first': partial(Variant, True), 'second': partial(Variant, False)}, 'train', args)


def test_gpu(tmp_path, capsys):
    """The whole script, without a GPU; a part that fails costs only itself."""
    output = tmp_path / 'new'
    gpu.main([
        '--output', str(output), '--device', 'cpu', '--tiny', '--parts', 'train', 'tests', 'speed', 'cifar', 'profile',
        '--train-command', 'sh -c "echo no data; exit 3"'])
    assert {p.name for p in output.iterdir()} == {
        'train.txt', 'tests.txt', 'speed.txt', 'cifar.txt', 'profile.txt', 'results.csv'}
    assert 'no data\n== exit 3' in (output / 'train.txt').read_text()
    assert 'calls, ' in (output / 'profile.txt').read_text()
    with open(output / 'results.csv', newline='') as f:
        assert [(row['bench'], row['model']) for row in csv.DictReader(f)] == [
            ('inference', 'gunn15'), ('train', 'gunn15'), ('train', 'sunn15')]
    table = capsys.readouterr().out.split('outcome of its commands')[1]
    assert re.findall(r'^\| (\w+) \| \d+ \| ([^|]*) \|', table, re.M) == [
        ('train', 'exit 3'), ('tests', 'ok'), ('speed', 'ok'), ('cifar', 'ok'), ('profile', 'ok')]
    assert len(re.findall(r'^\| (train|inference) \| [gs]unn15 \|', table, re.M)) == 3


def test_gpu_stops_what_hangs(tmp_path):
    """With all that it has started; what it printed stays, and the commands after it are told apart."""
    log, mark = tmp_path / 'part.txt', tmp_path / 'mark'
    hangs = ['sh', '-c', f'trap "" INT; echo started; (sleep 5; touch {mark}) & wait']
    assert gpu.run_part([['nowhere'], ['true'], hangs, ['true']], 2, log) == [
        "[Errno 2] No such file or directory: 'nowhere'", 'ok', 'stopped at the limit', 'no time left']
    assert 'started\n== stopped' in log.read_text()
    time.sleep(1)
    assert not mark.exists()


def test_benchmark_goes_on_without_what_fails(tmp_path, capsys):
    args = parse_args([
        '--models', 'vit_tiny_patch16_224', 'sunn15', '--bench', 'inference', '--img-size', '8', '--batch-size', '2',
        '--rounds', '1', '--warmup', '0', '--csv', str(tmp_path / 'rows.csv')])
    with pytest.raises(SystemExit, match='benchmark: failed, as said above: vit_tiny_patch16_224'):
        bench_models(args)
    assert 'benchmark: vit_tiny_patch16_224: AssertionError: ' in capsys.readouterr().out
    with open(tmp_path / 'rows.csv', newline='') as f:
        assert [row['model'] for row in csv.DictReader(f)] == ['sunn15']


RESULTS = '''\
model,weights,data,images,recipe,epochs,seed,error,loss,minutes,hardware,versions,commit,command,file,sha256
gunn15.c10,raw,CIFAR-10 (JPEG copy),10000,"step, batch 64",300,0,4.5,0.2,25.4,a GPU,v,c,python x.py,model.safetensors,00
gunn15.c10,raw,CIFAR-10 (JPEG copy),10000,"step, batch 64",300,1,4.7,0.2,26.4,a GPU,v,c,python x.py,model.safetensors,01
sunn15.c100,EMA,CIFAR-100,10000,onecycle,30,0,25,1.2,3,a CPU,v,c,python x.py,model_ema.safetensors,02
gunn15.c10,raw,CIFAR-10,10000,"step, batch 64, depth=2",300,0,4,0.2,9,a GPU,v,c,python x.py,model.safetensors,04
resnet18,raw,digits,450,onecycle,3,0,2,0.1,0.9,a CPU,v,c,python x.py,model.safetensors,03
'''


def test_results_table(tmp_path, capsys):
    (tmp_path / 'results.csv').write_text(RESULTS)
    results_table.main(['--results', str(tmp_path / 'results.csv')])
    assert capsys.readouterr().out.splitlines()[2:] == [
        '| `gunn15.c10` | CIFAR-10 (JPEG copy), 10000 images | 300 | step, batch 64 | 0, 1 | 4.60 (4.50 to 4.70) '
        '| 26 (25 to 26) | a GPU | 4.15 |',
        '| `sunn15.c100` | CIFAR-100, 10000 images | 30 | onecycle, averaged weights | 0 | 25.00 | 3 | a CPU | 23.75 |',
        '| `gunn15.c10` | CIFAR-10, 10000 images | 300 | step, batch 64, depth=2 | 0 | 4.00 | 9 | a GPU |  |',
        '| `resnet18` | digits, 450 images | 3 | onecycle | 0 | 2.00 | 1 | a CPU |  |']


def test_results_table_is_that_of_the_readme(capsys):
    results_table.main([])
    assert capsys.readouterr().out in (EXAMPLES.parent / 'weights' / 'README.md').read_text()


def test_training_dynamics(tmp_path, capsys):
    metrics, output = tmp_path / 'metrics.csv', tmp_path / 'new' / 'curves.png'
    metrics.write_text(
        'epoch,lr,train_loss,train_error,eval_loss,eval_error,minutes\n1,0.1,2,80,1.5,60,1\n2,0.01,1,30,0.9,28,2\n')
    results_table.main(['--curves', f'a={metrics}', f'b={metrics}', '--output', str(output)])
    assert output.read_bytes().startswith(b'\x89PNG')
    with pytest.raises(SystemExit):
        results_table.main(['--curves', 'metrics.csv'])
    assert "expected --curves NAME=CSV with the metrics.csv of a run, got 'metrics.csv'" in capsys.readouterr().err
    metrics.write_text('epoch,lr\n')
    with pytest.raises(SystemExit):
        results_table.main(['--curves', f'a={metrics}'])
    assert f'expected at least one epoch in {metrics}, got none' in capsys.readouterr().err
    with pytest.raises(SystemExit):
        results_table.main(['--results', 'nowhere.csv'])
    assert 'expected a CSV of results, got nowhere.csv' in capsys.readouterr().err


def test_reproduce_script(tmp_path):
    """Its commands, as it gives them to a stand-in for python: what has ended is skipped, what was killed goes on."""
    (tmp_path / 'python').write_text("""#!/bin/sh
printf '%s\\t' "$@" >> "$LOG"; echo >> "$LOG"
case $1 in
  *train_cifar.py) while [ "$1" != --output ]; do shift; done; mkdir -p "$2"
                   [ "$KILL" = cifar ] || touch "$2/result.csv";;
  *train.py) while [ "$1" != --experiment ]; do shift; done; mkdir -p "$OUTPUT/$2"; touch "$OUTPUT/$2/last.pth.tar"
             [ "$KILL" != stock ] || exit 1;;
esac
""")
    (tmp_path / 'python').chmod(0o755)
    for folder in ('data/cifar10', 'data/tiny-imagenet', 'timm'):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / 'timm' / 'train.py').touch()
    log = tmp_path / 'log'

    def reproduce(returncode=0, **env):
        log.write_text('')
        result = subprocess.run(
            [EXAMPLES.parent / 'weights' / 'reproduce.sh', 'data', 'timm'], capture_output=True, text=True,
            cwd=tmp_path, env={**os.environ, 'PATH': f'{tmp_path}:{os.environ["PATH"]}', 'LOG': str(log),
                 'OUTPUT': str(tmp_path / 'out'), 'EPOCHS': '7', 'TINY_EPOCHS': '3', 'SEEDS': '3 4', **env})
        assert result.returncode == returncode, result.stderr
        return [line.split('\t')[:-1] for line in log.read_text().splitlines()], result.stdout

    commands, printed = reproduce(KILL='cifar')
    assert len(commands) == 1
    assert printed == 'paused; say it again to go on\n'
    commands, _ = reproduce(1, KILL='stock')
    assert [Path(c[0]).name for c in commands] == ['train_cifar.py', 'train.py']
    assert '--resume' not in commands[-1]
    commands, _ = reproduce()
    assert [Path(c[0]).name for c in commands] == [
        'train.py', 'record_result.py', 'train_cifar.py', *['train.py', 'record_result.py'] * 6,
        *['train_cifar.py'] * 3]
    checkpoint = tmp_path / 'out' / 'gunn18-tiny-imagenet-3-0' / 'last.pth.tar'
    assert commands[0][commands[0].index('--resume') + 1] == str(checkpoint)
    trained = [dict(itertools.pairwise(c)) for c in commands if c[0].endswith('train.py')]
    assert [(c['--model'], c['--data-dir'], c['--epochs'], c['--seed']) for c in trained] == [
        ('gunn18', 'tiny-imagenet', '3', '0'), *[(m, 'imagenette', '5', s) for s in '34' for m in (
            'gunn18', 'sunn18', 'resnet50')]]
    recorded = [record_result.parse_args(c[1:]) for c in commands if 'record_result' in c[0]]
    assert [r.minutes for r in recorded] == [None, *[0] * 6]
    runs = [train_cifar.parse_args(c[1:]) for c in commands if 'train_cifar' in c[0]]
    assert [(r.model, r.dataset_name, r.epochs, r.device) for r in runs] == [
        ('sunn15', 'CIFAR-10', 7, 'cpu'), ('gunn15_nores', 'CIFAR-10', 7, 'cpu'),
        ('gunn15.c100', 'CIFAR-100', 7, 'cpu'), ('sunn15.c100', 'CIFAR-100', 7, 'cpu')]
    assert reproduce() == ([], '')  # all done
    result = subprocess.run(
        [EXAMPLES.parent / 'weights' / 'reproduce.sh', tmp_path / 'nowhere', 'timm'], capture_output=True, text=True)
    assert result.returncode == 2
    assert 'usage: weights/reproduce.sh DATA TIMM' in result.stderr


def test_tiny_imagenet(tmp_path):
    source, target = tmp_path / 'tiny-imagenet-200', tmp_path / 'new' / 'tiny'
    target.parent.mkdir()
    for wnid in ('n01', 'n02'):
        (source / 'train' / wnid / 'images').mkdir(parents=True)
        for i in range(2):
            (source / 'train' / wnid / 'images' / f'{wnid}_{i}.JPEG').write_text(f'{wnid} {i}')
    with pytest.raises(SystemExit, match=r'expected train/<wnid>/images/\*.JPEG and val/val_annotations.txt'):
        arrange(source, target)
    (source / 'val' / 'images').mkdir(parents=True)
    (source / 'val' / 'val_annotations.txt').write_text('val_0.JPEG\tn02\t0\t0\t9\t9\nval_1.JPEG\tn01\t1\t1\t5\t5\n')
    (source / 'val' / 'images' / 'val_0.JPEG').write_text('zero')
    with pytest.raises(SystemExit, match=r'1 of 2 images are missing, val_1.JPEG for one'):
        arrange(source, target)
    assert not list(target.parent.iterdir())
    (source / 'val' / 'images' / 'val_1.JPEG').write_text('one')
    arrange(source, target)
    assert {str(p.relative_to(target)): p.read_text() for p in target.rglob('*.JPEG')} == {
        'train/n01/n01_0.JPEG': 'n01 0', 'train/n01/n01_1.JPEG': 'n01 1',
        'train/n02/n02_0.JPEG': 'n02 0', 'train/n02/n02_1.JPEG': 'n02 1',
        'val/n02/val_0.JPEG': 'zero', 'val/n01/val_1.JPEG': 'one'}
    with pytest.raises(SystemExit, match='exists; expected a new folder'):
        arrange(source, target)
