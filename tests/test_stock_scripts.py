"""timm's unmodified scripts on the networks of this package, for a checkout named by TIMM_CHECKOUT.

    git clone https://github.com/huggingface/pytorch-image-models ../pytorch-image-models
    TIMM_CHECKOUT=../pytorch-image-models python -m pytest tests/test_stock_scripts.py

A script in a checkout imports the timm of that checkout, not the installed one.
"""
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import record_result
import torch
from cifar_results import RESULT_COLUMNS
from common import read_csv, write_csv
from images import image_folder

CHECKOUT = os.environ.get('TIMM_CHECKOUT')
if not CHECKOUT:
    pytest.skip('TIMM_CHECKOUT does not name a checkout of pytorch-image-models', allow_module_level=True)
CHECKOUT = Path(CHECKOUT).resolve()

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'


@pytest.fixture(scope='session')
def images(tmp_path_factory):
    """16 training and 8 validation images of two classes, 32x32."""
    return image_folder(tmp_path_factory.mktemp('images'), dict(train=8, validation=4))


def run(script, *args, launcher=(), cwd=None):
    """Run a script of the checkout to its end; returns what it printed."""
    result = subprocess.run(
        [sys.executable, *launcher, str(CHECKOUT / script), *map(str, args)], cwd=cwd, timeout=1200,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert result.returncode == 0, result.stdout[-5000:]
    return result.stdout


def train_args(images, output, model='gunn15', epochs=1, batch_size=8):
    return [
        '--data-dir', images, '--model', model, '--num-classes', 2, '--device', DEVICE, '--workers', 1,
        '--batch-size', batch_size, '--epochs', epochs, '--lr', 0.01, '--sched', 'step', '--warmup-epochs', 0,
        '--output', output, '--experiment', 'run']


def summary(output):
    return read_csv(output / 'run' / 'summary.csv')


@pytest.fixture(scope='session')
def checkpoints(images, tmp_path_factory):
    """Output of two epochs of training, with its checkpoints."""
    output = tmp_path_factory.mktemp('trained')
    run('train.py', *train_args(images, output, epochs=2), '--model-ema', '--model-ema-decay', 0.5)
    return output / 'run'


OPTIONS = {
    'amp bfloat16': ['--amp', '--amp-dtype', 'bfloat16'],
    'channels last': ['--channels-last'],
    'ema': ['--model-ema', '--model-ema-decay', 0.5],
    'grad checkpointing': ['--grad-checkpointing'],
    'grad accumulation': ['--grad-accum-steps', 2],
    'split bn': ['--split-bn', '--aug-splits', 2, '--aa', 'rand-m9-mstd0.5', '--jsd-loss'],
    'head init scale': ['--head-init-scale', 0.01],
    'bce': ['--bce-loss'],
    'mixup': ['--mixup', 0.2, '--cutmix', 0.5],
    'drop path': ['--drop-path', 0.1, '--drop', 0.1],
    'layer decay': ['--layer-decay', 0.75, '--opt', 'adamw'],
    'weight decay on all': ['--weight-decay', 1e-4, '--opt-kwargs', 'filter_bias_and_bn=False'],
    'model dtype': ['--model-dtype', 'bfloat16'],
    'torchcompile': ['--torchcompile', 'aot_eager'],
    'inductor': ['--torchcompile'],
    'amp float16': ['--amp', '--amp-dtype', 'float16'],
    'all together': ['--amp', '--amp-dtype', 'bfloat16', '--channels-last', '--model-ema', '--grad-checkpointing',
                     '--drop-path', 0.1, '--mixup', 0.2, '--layer-decay', 0.9],
}


@pytest.mark.parametrize(
    'options', [pytest.param(o, marks=[pytest.mark.gpu] * (o == 'amp float16')) for o in OPTIONS])
def test_train_options(images, tmp_path, options):
    run('train.py', *train_args(images, tmp_path), *OPTIONS[options])
    row, = summary(tmp_path)
    assert math.isfinite(float(row['train_loss']))
    assert math.isfinite(float(row['eval_loss']))


@pytest.mark.parametrize('model', ['gunn18', 'sunn18', 'gunn15_nores'])
def test_train_other_networks(images, tmp_path, model):
    run('train.py', *train_args(images, tmp_path, model), '--img-size', 64)
    assert math.isfinite(float(summary(tmp_path)[0]['eval_loss']))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="train.py's DistributedDataParallel needs two CUDA devices")
@pytest.mark.parametrize('options', [[], ['--sync-bn']], ids=['plain', 'sync-bn'])
def test_train_distributed(images, tmp_path, options):
    run('train.py', *train_args(images, tmp_path, batch_size=4), *options,
        launcher=['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2'])
    assert math.isfinite(float(summary(tmp_path)[0]['eval_loss']))


@pytest.mark.parametrize('fused', [True, False], ids=['fused', 'composite'])
def test_resume_after_a_kill(images, tmp_path, fused):
    """Killed after its second epoch and resumed, a run goes through the losses of one that was left alone.

    The resumed run has the images of its one batch in another order. To the composite, in contiguous memory, that is
    the same. The fused layers compute in channels-last memory, where it changes the rounding, which a fresh network
    amplifies from step to step: there, the losses before and after the first resumed step have to agree.
    """
    def args(output):  # one batch of all images as they are, so that neither its content nor augmentation is random
        return [*train_args(images, output, epochs=4, batch_size=16), '--no-aug', '--smoothing', 0,
                '--model-kwargs', f'fused={fused}']

    run('train.py', *args(tmp_path / 'whole'))
    process = subprocess.Popen(
        [sys.executable, str(CHECKOUT / 'train.py'), *map(str, args(tmp_path / 'killed'))],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    path = tmp_path / 'killed' / 'run' / 'summary.csv'
    deadline = time.monotonic() + 300
    while not path.exists() or path.read_text().count('\n') < 3:  # a header and two epochs
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    run('train.py', *args(tmp_path / 'resumed'), '--resume', path.parent / 'last.pth.tar')
    whole = {row['epoch']: row for row in summary(tmp_path / 'whole')}
    resumed = summary(tmp_path / 'resumed')
    assert resumed[-1]['epoch'] == '3'
    assert len(resumed) in (2, 3)  # the kill may fall before the second epoch's checkpoint is complete
    for row in resumed[:1] if fused else resumed:
        for key in ('train_loss', 'eval_loss'):
            assert float(row[key]) == pytest.approx(float(whole[row['epoch']][key]), rel=1e-3), (row, whole)


@pytest.mark.parametrize('options', [
    ['--use-ema'], ['--use-ema', '--reparam'], ['--amp', '--amp-dtype', 'bfloat16', '--channels-last']], ids=str)
def test_validate(images, checkpoints, options):
    out = run('validate.py', images, '--model', 'gunn15', '--num-classes', 2, '--checkpoint',
              checkpoints / 'last.pth.tar', '--device', DEVICE, '--workers', 1, '--batch-size', 8, *options)
    assert '"top1":' in out
    if '--use-ema' in options:  # which is what train.py evaluates
        expected = summary(checkpoints.parent)[-1]['eval_top1']
        assert f'"top1": {float(expected):g}' in out


def test_inference(images, checkpoints, tmp_path):
    pytest.importorskip('pandas', reason='inference.py needs pandas')
    run('inference.py', images / 'validation', '--model', 'gunn15', '--num-classes', 2, '--checkpoint',
        checkpoints / 'last.pth.tar', '--device', DEVICE, '--workers', 1, '--results-dir', tmp_path, '--topk', 2)
    assert len(read_csv(next(tmp_path.glob('*.csv')))) == 8


@pytest.mark.parametrize('options', [
    ['--model', 'gunn15', '--bench', 'both'], ['--model', 'gunn18', '--bench', 'both'],
    ['--model', 'gunn18', '--bench', 'inference', '--reparam', '--channels-last'],
], ids=' '.join)
def test_benchmark(tmp_path, options):
    out = run('benchmark.py', *options, '--device', DEVICE, '--batch-size', 2,
              '--img-size', 32, '--num-warm-iter', 1, '--num-bench-iter', 10, cwd=tmp_path)
    if 'both' in options:
        assert '"train_samples_per_sec"' in out
    assert '"infer_samples_per_sec"' in out


@pytest.mark.parametrize('options', [
    pytest.param([], id='torchscript'),
    pytest.param(['--dynamo'], id='dynamo', marks=pytest.mark.skipif(
        not hasattr(torch.onnx, 'ExportOptions'),
        reason="timm's --dynamo wants torch.onnx.ExportOptions, which this torch no longer has")),
])
def test_onnx(images, checkpoints, tmp_path, options):
    path = tmp_path / 'gunn15.onnx'
    run('onnx_export.py', path, '--model', 'gunn15', '--num-classes', 2, '--checkpoint', checkpoints / 'last.pth.tar',
        '--check-forward', *options)
    out = run('onnx_validate.py', images / 'validation', '--onnx-input', path, '--img-size', 32, '--batch-size', 1,
              '--workers', 1, '--crop-pct', 1.0, '--interpolation', 'bicubic', '--mean', 0.4913725490196078,
              0.4823529411764706, 0.4466666666666667, '--std', 0.24705882352941178, 0.24352941176470588,
              0.2615686274509804)
    expected = float(summary(checkpoints.parent)[-1]['eval_top1'])
    assert f'Prec@1 {expected:.3f}' in out


def test_average_and_clean_checkpoints(images, checkpoints, tmp_path):
    average, clean = tmp_path / 'average.safetensors', tmp_path / 'clean.safetensors'
    run('avg_checkpoints.py', '--input', checkpoints, '--filter', 'checkpoint-*.pth.tar', '--output', average,
        '--safetensors', '-n', 2)
    run('clean_checkpoint.py', '--checkpoint', checkpoints / 'last.pth.tar', '--output', clean, '--safetensors',
        '--no-hash')
    for path in (average, clean):
        out = run('validate.py', images, '--model', 'gunn15', '--num-classes', 2, '--checkpoint', path,
                  '--device', DEVICE, '--workers', 1, '--batch-size', 8)
        assert '"top1":' in out


@pytest.fixture(scope='session')
def ten_classes(tmp_path_factory):
    """40 training and 30 validation images of ten classes, 32x32."""
    return image_folder(tmp_path_factory.mktemp('ten'), dict(train=4, validation=3), classes=10)


def test_publish_a_checkpoint_of_train(ten_classes, tmp_path):
    """Raw and averaged weights; the numbers of the card are those of validate.py on the file that is to go up."""
    import json

    import safetensors.torch
    run('train.py', *train_args(ten_classes, tmp_path), '--num-classes', 10, '--model-ema', '--model-ema-decay', 0.5)
    heads = {}
    for weights in ('raw', 'ema'):
        folder = tmp_path / weights
        result = subprocess.run(
            [sys.executable, '-m', 'weights.publish', tmp_path / 'run' / 'last.pth.tar', '--weights', weights,
             '--model', 'gunn15.c10', '--repo', 'me/gunn15.c10', '--data-dir', ten_classes, '--split', 'validation',
             '--dataset-name', 'noise', '--training-command', 'python train.py', '--output', folder],
            capture_output=True, text=True, cwd=Path(__file__).parent.parent)
        assert result.returncode == 0, result.stderr
        heads[weights] = safetensors.torch.load_file(folder / 'model.safetensors')['head.fc.weight']
        validated = json.loads(run(
            'validate.py', ten_classes, '--split', 'validation', '--model', 'gunn15', '--checkpoint',
            folder / 'model.safetensors', '--device', DEVICE, '--workers', 1).split('--result')[1])
        card = (folder / 'README.md').read_text()
        assert f'| {validated["top1_err"]:.2f} | {validated["top5_err"]:.2f} |' in card
    assert not torch.equal(heads['raw'], heads['ema'])


def test_record_result(images, checkpoints, tmp_path, monkeypatch):
    """Of train.py's last weights, raw; a row that somebody else adds in the meantime stays."""
    results, subprocess_run = tmp_path / 'results.csv', subprocess.run

    def validate(*args, **kwargs):
        write_csv(results, [dict.fromkeys(RESULT_COLUMNS, 'other')])
        return subprocess_run(*args, **kwargs)

    monkeypatch.setattr(record_result.subprocess, 'run', validate)
    record_result.main([
        str(checkpoints / 'last.pth.tar'), str(tmp_path / 'x.safetensors'), '--timm', str(CHECKOUT), '--data-dir',
        str(images), '--split', 'validation', '--dataset-name', 'noise', '--command', 'python train.py', '--results',
        str(results), '--device', DEVICE])
    other, row = read_csv(results)
    assert other['model'] == 'other'
    assert (row['model'], row['images'], row['epochs'], row['file']) == ('gunn15', '8', '2', 'x.safetensors')
    assert 0 <= float(row['error']) <= 100
