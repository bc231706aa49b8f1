"""The examples run, briefly: in this process, but for what is about processes."""
import itertools
import multiprocessing
import os
import re
import subprocess
import sys
import time
import weakref
from collections import Counter
from functools import partial
from pathlib import Path
from unittest import mock

import benchmark
import draw_order
import gpu
import model_table
import pytest
import quickstart
import record_result
import results_table
import timm
import torch
import train_cifar
from common import read_csv
from tiny_imagenet import arrange
from torch.utils.flop_counter import FlopCounterMode

from timm_gunn import GunnLayer

ROOT = Path(__file__).parent.parent


def test_quickstart(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', ['quickstart.py', '--epochs', '1', '--train-images', '64', '--size', '16'])
    quickstart.main()
    printed = capsys.readouterr().out
    assert 'accuracy on 450 held-out images: ' in printed
    for name in ('quickstart.png', 'photographs.png'):
        assert (tmp_path / 'output' / name).read_bytes().startswith(b'\x89PNG')
    named = re.search(r'gunn15.c10 names rightly: (\d+) of 12', printed)
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
    assert capsys.readouterr().out in (ROOT / 'README.md').read_text()


def test_draw_order(tmp_path):
    """The picture is the same in every run."""
    for name in ('first', 'second'):
        draw_order.main(['--output', str(tmp_path / name / 'order.png')])
    first, second = ((tmp_path / name / 'order.png').read_bytes() for name in ('first', 'second'))
    assert first.startswith(b'\x89PNG')
    assert first == second


# --- Speed and memory ---

SMALL_STEP = ['--img-size', '8', '--batch-size', '2', '--rounds', '2', '--warmup', '1']


@pytest.fixture
def forked(monkeypatch):
    """Processes that have all modules already, where they can: a spawned one takes seconds to import torch."""
    if not torch.cuda.is_available():
        context = multiprocessing.get_context('fork')
        monkeypatch.setattr(multiprocessing, 'get_context', lambda method: context)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # those of OpenMP do not survive a fork
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def as_it_was():
    yield
    mock.patch.stopall()  # what a network of the benchmark has switched


def test_benchmark(tmp_path, forked, capsys):
    path = tmp_path / 'rows.csv'
    options = ['--bench', 'train', *SMALL_STEP, '--csv', str(path), '--plots', str(tmp_path)]
    for models in (['gunn15', 'gunn15:composite', 'gunn15:products'], ['gunn15:library', 'gunn15:folded']):
        assert benchmark.bench_models(benchmark.parse_args([*options, '--models', *models])) == []
    rows = fused, composite, products, library = read_csv(path)
    assert [row['model'] for row in rows] == ['gunn15', 'gunn15:composite', 'gunn15:products', 'gunn15:library']
    assert float(fused['saved_mib_per_image']) < float(composite['saved_mib_per_image'])
    assert fused['gmacs'] == composite['gmacs'] == library['gmacs']
    assert float(composite['ratio']) == 1
    assert float(fused['ratio']) == pytest.approx(float(fused['seconds']) / float(composite['seconds']), rel=0.5)
    assert float(products['seconds']) > 0
    assert float(fused['peak_mib']) > 0
    assert products['saved_mib_per_image'] == products['peak_mib'] == ''
    table = re.findall(r'^\| `(\S+)` \| \S+ \(\S+ to \S+\) \|', capsys.readouterr().out, re.M)
    assert table == [row['model'] for row in read_csv(path)]
    assert (tmp_path / 'throughput_memory.png').read_bytes().startswith(b'\x89PNG')


def test_benchmark_of_layers(tmp_path, forked, capsys):
    """A number of segments that does not divide the channels is left out, and named at the end."""
    path = tmp_path / 'rows.csv'
    failed = benchmark.bench_sweep(benchmark.parse_args([
        '--sweep', '12x4', '8x2', '--segments', '2', '3', *SMALL_STEP, '--csv', str(path), '--plots', str(tmp_path)]))
    assert failed == ['3 segments of 8x2']
    assert [(row['channels'], row['segments']) for row in read_csv(path)] == [('12', '2'), ('12', '3'), ('8', '2')]
    assert all(float(row['gunn_seconds']) > 0 for row in read_csv(path))
    assert 'channels divisible by segments' in capsys.readouterr().out
    assert (tmp_path / 'time_segments.png').read_bytes().startswith(b'\x89PNG')
    with pytest.raises(SystemExit):
        benchmark.parse_args(['--csv', str(path)])
    assert 'holds other columns than this kind of run writes' in capsys.readouterr().err


def test_benchmark_goes_on_without_what_fails(tmp_path, forked, capsys):
    models = ['vit_tiny_patch16_224', 'sunn15']
    failed = benchmark.bench_models(benchmark.parse_args([
        '--models', *models, '--bench', 'inference', *SMALL_STEP, '--csv', str(tmp_path / 'rows.csv')]))
    assert failed == models[:1]
    assert 'benchmark: vit_tiny_patch16_224: AssertionError: ' in capsys.readouterr().out
    assert [(row['model'], row['ratio']) for row in read_csv(tmp_path / 'rows.csv')] == [('sunn15', '1.0')]


class Variant:
    """One whose process may be killed in its second step."""

    def __init__(self, killed):
        self.killed, self.facts, self.steps = killed, {}, 0

    def train(self):
        self.steps += 1
        if self.killed and self.steps == 2:
            os._exit(9)


def test_benchmark_whose_process_is_killed(forked, capsys):
    args = benchmark.parse_args(['--rounds', '3', '--warmup', '0'])
    variants = {'first': partial(Variant, True), 'second': partial(Variant, False)}
    times, _ = benchmark.interleave(variants, 'train', args)
    assert capsys.readouterr().out == 'benchmark: first: its process was killed, by lack of memory perhaps\n'
    assert {name: len(seconds) for name, seconds in times.items()} == {'second': 3}


@pytest.mark.parametrize(('options', 'message'), [
    (['--batch-size', '0'], '--batch-size must be at least 1, got 0'),
    (['--models', 'gunn15:fast'], "expected a model of timm, and behind a colon one of composite, "),
    (['--models', 'gunn'], "expected a model of timm, and behind a colon one of"),
    (['--reference', 'gunn15'], "--reference must be one of ['gunn18', "),
    (['--graphs'], '--graphs needs --device cuda, got cpu')])
def test_benchmark_says_what_is_wrong(options, message, capsys):
    with pytest.raises(SystemExit):
        benchmark.parse_args(options)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(('spec', 'bench'), [('gunn15', 'train'), ('gunn15', 'inference'), ('sunn15', 'train')])
def test_benchmark_replays_every_product(spec, bench):
    args = benchmark.parse_args(SMALL_STEP)
    products, network = benchmark.Products(f'{spec}:products', bench, args), benchmark.Network(spec, bench, args)
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
    network = benchmark.Network(f'sunn15:{kind}', 'inference', benchmark.parse_args(SMALL_STEP))
    network.model, network.x = model, x
    return benchmark.counted(network).calls


def test_benchmark_counts_a_convolution():
    """Bytes (of float32), FLOPs and number of all calls."""
    x, w, y = 2 * 3 * 16, 5 * 3, 2 * 5 * 16  # numbers in each
    assert small_count(torch.nn.Conv2d(3, 5, 1, bias=False), torch.empty(2, 3, 4, 4)) == {
        'convolution': [4 * (x + w + y), 2 * 32 * 15, 1], 'sum': [4 * (y + 1), 0, 1], 'ones_like': [4 * 2, 0, 1],
        'convolution_backward': [4 * (y + x + w + w), 2 * 32 * 15, 1]}


@pytest.mark.parametrize('kind', ['', 'library'])
def test_benchmark_counts_the_operator_as_on_a_gpu(kind):
    """Two units of 4 hidden and 2 own channels on 18 pixels."""
    if not kind:
        pytest.importorskip('triton')
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
        assert calls['batch_norm_update_stats'] == [2 * 4 * (2 * (hidden + 4 * 4) + own + 4 * 2), 0, 2 * 3]


def test_benchmark_prints_counts(capsys):
    benchmark.bench_count(benchmark.parse_args(['--models', 'sunn15', *SMALL_STEP]))
    *table, total = capsys.readouterr().out.splitlines()
    convs = sum(isinstance(m, torch.nn.Conv2d) for m in timm.create_model('sunn15').modules())
    assert any(re.fullmatch(rf'\| 0\.\d\d \| 0\.00 \| {convs} \| `convolution` \|', row) for row in table)
    assert re.fullmatch(r'sunn15, batch 2: \d{3} kernels, 0\.\d GB, 0\.0\d TFLOP', total)


def test_gpu(tmp_path, capsys):
    """A part that fails costs only itself, and the rows of the benchmark become a table."""
    output = tmp_path / 'new'
    gpu.main([
        '--output', str(output), '--device', 'cpu', '--tiny', '--parts', 'train', 'speed',
        '--train-command', 'sh -c "echo no data; exit 3"'])
    assert {p.name for p in output.iterdir()} == {'train.txt', 'speed.txt', 'results.csv'}
    assert 'no data\n== exit 3' in (output / 'train.txt').read_text()
    assert [(row['bench'], row['model']) for row in read_csv(output / 'results.csv')] == [('inference', 'gunn15')]
    table = capsys.readouterr().out.split('outcome of its commands')[1]
    assert re.findall(r'^\| (\w+) \| \d+ \| ([^|]*) \|', table, re.M) == [('train', 'exit 3'), ('speed', 'ok')]
    assert len(re.findall(r'^\| inference \| gunn15 \|', table, re.M)) == 1


@pytest.mark.parametrize('options', [[], ['--tiny', '--device', 'cpu']], ids=str)
def test_commands_of_gpu(tmp_path, options):
    """What they run is there, and takes their options."""
    for commands in gpu.commands(gpu.parse_args(['--output', str(tmp_path), *options])).values():
        for command in filter(None, commands):
            if command[1].endswith('benchmark.py'):
                benchmark.parse_args(command[2:])
            else:
                assert all(Path(word).exists() for word in command if word.endswith('.py'))


def test_the_count_of_saved_bytes_keeps_no_graph():
    """ReLU saves its output; a hook that gave it back would keep it, and all before it, alive."""
    model, outputs = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.ReLU()), []

    def forward():
        out = model(torch.randn(2, 3))
        outputs.append(weakref.ref(out))
        return out

    assert benchmark.saved_bytes(forward, model) == 4 * 2 * (3 + 5)
    assert outputs[0]() is None


def test_profile(capsys):
    benchmark.bench_profile(benchmark.parse_args(['--models', 'sunn15', *SMALL_STEP]))
    *table, total = capsys.readouterr().out.splitlines()
    assert any(re.fullmatch(r'\| \d+\.\d\d \| \d+ \| `aten::convolution_backward` \|', row) for row in table)
    assert re.fullmatch(r'sunn15, batch 2: \d+ calls, \d+\.\d ms', total)


def test_gpu_stops_what_hangs(tmp_path, monkeypatch):
    """With all that it has started; what it printed stays, and the commands after it are told apart."""
    monkeypatch.setattr(gpu, 'GRACE', 0.1)
    log, mark, start = tmp_path / 'part.txt', tmp_path / 'mark', time.monotonic()
    hangs = ['sh', '-c', f'trap "" INT; echo started; (sleep 2; touch {mark}) & wait']
    assert gpu.run_part([['nowhere'], ['true'], hangs, ['true']], 1.1, log) == [
        "[Errno 2] No such file or directory: 'nowhere'", 'ok', 'stopped at the limit', 'no time left']
    assert 'started\n== stopped' in log.read_text()
    time.sleep(start + 2.2 - time.monotonic())
    assert not mark.exists()


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
    assert capsys.readouterr().out in (ROOT / 'weights' / 'README.md').read_text()
    results_table.main(['--finetuning'])
    assert capsys.readouterr().out in (ROOT / 'README.md').read_text()


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
  *segment.py) while [ "$1" != --output ]; do shift; done; mkdir -p "$2"; touch "$2/unet.png";;
esac
""")
    (tmp_path / 'python').chmod(0o755)
    for folder in ('data/cifar10', 'data/tiny-imagenet/val', 'data/imagenette/val', 'timm'):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / 'timm' / 'train.py').touch()
    log = tmp_path / 'log'

    def reproduce(returncode=0, **env):
        log.write_text('')
        result = subprocess.run(
            [ROOT / 'weights' / 'reproduce.sh', 'data', 'timm'], capture_output=True, text=True,
            cwd=tmp_path, env={**os.environ, 'PATH': f'{tmp_path}:{os.environ["PATH"]}', 'LOG': str(log),
                 'OUTPUT': str(tmp_path / 'out'), 'EPOCHS': '7', 'TINY_EPOCHS': '3', 'SEEDS': '3 4', **env})
        assert result.returncode == returncode, result.stderr
        return [line.split('\t')[:-1] for line in log.read_text().splitlines()], result.stdout

    commands, printed = reproduce(KILL='cifar')
    assert len(commands) == 1
    assert printed == 'paused; run it again to go on\n'
    commands, _ = reproduce(1, KILL='stock')
    assert [Path(c[0]).name for c in commands] == ['train_cifar.py', 'train.py']
    assert '--resume' not in commands[-1]
    assert ('--amp-dtype', 'bfloat16') in itertools.pairwise(commands[-1])
    commands, _ = reproduce(DTYPE='float32')
    assert not any('--amp' in c for c in commands)
    assert Counter(Path(c[0]).name for c in commands) == {
        'train.py': 19, 'record_result.py': 19, 'train_cifar.py': 4, 'segment.py': 3}
    checkpoint = tmp_path / 'out' / 'gunn18-tiny-imagenet-3-0' / 'last.pth.tar'
    assert commands[0][commands[0].index('--resume') + 1] == str(checkpoint)
    trained = [dict(itertools.pairwise(c)) for c in commands if c[0].endswith('train.py')]
    assert [(c['--model'], c['--data-dir'], c['--epochs'], c['--seed']) for c in trained] == [
        ('gunn18', 'tiny-imagenet', '3', '0'),
        *[(m, 'imagenette', '5', s) for s in '34' for m in ('gunn18', 'sunn18', 'resnet50')],
        *[(*run, s) for s in '012' for run in [('gunn18', 'imagenette', '3'), ('gunn15', 'cifar100', '1')] * 2]]
    starts = [(c[c.index('--val-split') + 1], '--pretrained' in c) for c in commands if c[0].endswith('train.py')]
    assert starts == [('val', False)] * 7 + [('val', False), ('test', False), ('val', True), ('test', True)] * 3
    recorded = [record_result.parse_args(c[1:]) for c in commands if 'record_result' in c[0]]
    assert [r.minutes for r in recorded] == [None, *[0] * 18]
    runs = [train_cifar.parse_args(c[1:]) for c in commands if 'train_cifar' in c[0]]
    assert [(r.model, r.dataset_name, r.epochs, r.device, r.dtype) for r in runs] == [
        ('sunn15', 'CIFAR-10', 7, 'cpu', 'float32'), ('gunn15_nores', 'CIFAR-10', 7, 'cpu', 'float32'),
        ('gunn15.c100', 'CIFAR-100', 7, 'cpu', 'float32'), ('sunn15.c100', 'CIFAR-100', 7, 'cpu', 'float32')]
    assert {r.results.relative_to(tmp_path / 'out') for r in [*recorded, *runs]} == {
        Path('results.csv'), Path('finetuning.csv')}
    assert reproduce() == ([], '')  # all done
    result = subprocess.run(
        [ROOT / 'weights' / 'reproduce.sh', tmp_path / 'nowhere', 'timm'], capture_output=True, text=True)
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
