"""The CIFAR trainer: schedules, augmentation, data, exact resumption, what it writes and what it says is wrong."""
import argparse
import hashlib
import itertools
import math
import os
import pickle
import signal
import subprocess
import sys
from collections import Counter

import common
import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torchvision.datasets
import train_cifar
from cifar_data import augment, load_data, normalise
from cifar_options import parse_args
from cifar_results import ensemble
from common import read_csv
from images import image_folder
from PIL import Image
from torch.testing import assert_close
from torch.utils._pytree import tree_flatten
from train_cifar import Run, make_scheduler

CLASSES, TRAIN, TEST = 3, 8, 4  # classes, and images of each


def make_images(root, size=8, classes=CLASSES):
    return image_folder(root, dict(train=TRAIN, test=TEST), classes, size)


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp('images'))


def arguments(images, output, *options):
    return ['--data-dir', str(images), '--output', str(output), '--device', 'cpu', '--batch-size', '8', *options]


@pytest.fixture
def main(images, tmp_path, capsys, monkeypatch):
    """The script, called, with tmp_path / 'out' for its output; returns what it prints."""
    def call(*options):
        monkeypatch.setattr(sys, 'argv', ['train_cifar.py', *arguments(images, tmp_path / 'out', *options)])
        train_cifar.main()
        return capsys.readouterr().out

    return call


def small_run(images, tmp_path, *options, seed=0):
    args = parse_args(arguments(images, tmp_path, '--seed', str(seed), *options))
    data = load_data(args)
    return Run(args, data), data


# --- Recipe ---

def rates(schedule, epochs, steps, cycles=1, lr=0.1):
    """Learning rate of every step, (epochs, steps)."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr)
    scheduler = make_scheduler(optimizer, schedule, epochs, steps, cycles)
    result = []
    for _ in range(epochs * steps):
        result.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        scheduler.step()
    return torch.tensor(result, dtype=torch.float64).view(epochs, steps)


def test_step_schedule_has_the_milestones_of_the_paper():
    expected = torch.tensor([0.1] * 149 + [0.01] * 75 + [0.001] * 76, dtype=torch.float64)  # epochs 1, 2, ..., 300
    assert_close(rates('step', 300, 3), expected[:, None].expand(300, 3))


def test_snapshot_schedule_is_a_cyclic_cosine():
    """Huang et al. 2017, Eq. 2."""
    total, cycles = 24 * 5, 6
    t = torch.arange(1, total + 1, dtype=torch.float64)
    length = math.ceil(total / cycles)
    expected = 0.1 / 2 * (torch.cos(math.pi * ((t - 1) % length) / length) + 1)
    assert_close(rates('snapshot', 24, 5, cycles).flatten(), expected)


def test_onecycle_schedule():
    lr = rates('onecycle', 3, 20).flatten()
    peak = lr.argmax()
    assert_close(lr[peak].item(), 0.1)
    assert lr[0] < 0.1 / 20
    assert lr[-1] < 0.1 / 1e4
    assert (lr.diff()[:peak] > 0).all()
    assert (lr.diff()[peak:] < 0).all()


def test_optimizer_is_that_of_the_paper(images, tmp_path):
    run, _ = small_run(images, tmp_path)
    group, = run.optimizer.param_groups  # weight decay on norms and biases, too
    assert len(group['params']) == len(list(run.model.parameters()))
    assert {k: group[k] for k in ('lr', 'momentum', 'dampening', 'nesterov', 'weight_decay')} == dict(
        lr=0.1 * 8 / 64, momentum=0.9, dampening=0, nesterov=True, weight_decay=1e-4)


def test_a_step_is_that_of_plain_pytorch(images, tmp_path):
    run, data = small_run(
        images, tmp_path, '--model', 'sunn15', '--smoothing', '0.1', '--schedule', 'onecycle', '--ema', '0.75')
    torch.manual_seed(0)
    model = timm.create_model('sunn15', num_classes=CLASSES)
    assert_close(dict(model.state_dict()), dict(run.model.state_dict()))
    averages = None
    optimizer = torch.optim.SGD(model.parameters(), 1, 0.9, nesterov=True, weight_decay=1e-4)
    generator = torch.Generator().manual_seed(0)
    mean, std = (torch.tensor(v) / 255 for v in ([125.3, 123.0, 113.9], [63.0, 62.1, 66.7]))
    model.to(memory_format=torch.channels_last)
    for lr in rates('onecycle', 300, 3, lr=0.1 * 8 / 64).flatten()[:3]:
        x, labels = data.train.images[:8], data.train.labels[:8]
        run.train_step(x, labels)
        x = augment((x / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1), generator)
        target = torch.full((8, CLASSES), 0.1 / CLASSES).scatter_(1, labels[:, None], 0.9 + 0.1 / CLASSES)
        optimizer.param_groups[0]['lr'] = lr.item()
        optimizer.zero_grad()
        (-(target * model(x).log_softmax(1)).sum(1).mean()).backward()
        optimizer.step()
        weights = [p.detach().clone() for p in model.parameters()]
        averages = [0.75 * a + 0.25 * w for a, w in zip(averages or weights, weights, strict=True)]
    for k, v in model.state_dict().items():
        assert_close(run.model.state_dict()[k], v, rtol=1e-3, atol=1e-5, msg=lambda m, k=k: f'{k}: {m}')
    assert_close(list(run.ema.module.parameters()), averages, rtol=1e-3, atol=1e-5)


# --- Augmentation ---

def outcomes(image, shift, padding=4):
    """Every image that augmentation may make of an image (H, W), with its probability, from the definition."""
    height, width = image.shape
    offsets = range(2 * padding + 1)
    result = Counter()
    for flipped, top, left in itertools.product((False, True), offsets, offsets):
        padded = np.pad(image[:, ::-1] if flipped else image, padding)
        crop = padded[top:top + height, left:left + width]
        prob = 1 / 2 / len(offsets) ** 2
        result[crop.tobytes()] += prob * (1 - shift)
        for axis, size in enumerate(crop.shape):
            for pixels in range(1, size + 1):
                result[np.roll(crop, pixels, axis).tobytes()] += prob * shift / 2 / size
    return +result  # without what has no probability


@pytest.mark.parametrize('shift', [2 / 3, 0.0, 1.0])
def test_augmentation_is_what_its_definition_says(shift):
    """Every outcome is possible, none else is, and their frequencies are those of the definition."""
    image = np.arange(1, 31, dtype=np.float32).reshape(6, 5)
    expected = outcomes(image, shift)
    assert sum(expected.values()) == pytest.approx(1)
    n, generator = 200_000, torch.Generator().manual_seed(0)
    batch = torch.from_numpy(image).expand(n // 10, 3, 6, 5)
    counts = Counter()
    for _ in range(10):
        result = augment(batch, generator, shift)
        assert torch.equal(result[:, 0], result[:, 1])
        assert torch.equal(result[:, 0], result[:, 2])
        counts.update(x.tobytes() for x in result[:, 0].numpy())
    assert counts.keys() == expected.keys()
    chi2 = sum((counts[k] - n * p) ** 2 / (n * p) for k, p in expected.items())
    df = len(expected) - 1
    assert abs(chi2 - df) < 5 * (2 * df) ** 0.5


def test_augmentation_of_an_image_of_its_own():
    """Images of a batch are drawn independently, and pad with the mean colour."""
    x = normalise(torch.randint(256, (64, 3, 8, 8), dtype=torch.uint8), torch.rand(3), torch.rand(3) + 0.5)
    result = augment(x, torch.Generator().manual_seed(0))
    zeros = (result == 0).all(1).flatten(1).sum(1)
    assert len(zeros.unique()) > 10
    assert result.is_contiguous(memory_format=torch.channels_last)


# --- Data ---

def test_held_out_images_are_training_images_not_trained_on(images, tmp_path):
    whole = load_data(parse_args(arguments(images, tmp_path)))
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data' / 'train').symlink_to(images / 'train')  # the test images are not there
    data = load_data(parse_args(arguments(tmp_path / 'data', tmp_path, '--held-out', '5')))
    assert len(data.classes) == CLASSES
    assert len(data.test.labels) == 5

    def as_set(*splits):
        return {(x.numpy().tobytes(), y.item()) for s in splits for x, y in zip(s.images, s.labels, strict=True)}

    assert len(as_set(data.train)) + 5 == len(as_set(data.train, data.test)) == CLASSES * TRAIN
    assert as_set(data.train, data.test) == as_set(whole.train)
    args = parse_args(arguments(tmp_path / 'data', tmp_path, '--held-out', '5', '--seed', '9'))
    assert as_set(load_data(args).test) == as_set(data.test)
    assert load_data(args).fingerprint == data.fingerprint != whole.fingerprint


@pytest.mark.parametrize('name', ['cifar10', 'cifar100'])
def test_torchvision_format(name, tmp_path, monkeypatch):
    """Files as torchvision keeps them, read by torchvision; their checksums are those of CIFAR otherwise."""
    cls = dict(cifar10=torchvision.datasets.CIFAR10, cifar100=torchvision.datasets.CIFAR100)[name]
    num_classes = dict(cifar10=10, cifar100=100)[name]
    folder = tmp_path / cls.base_folder
    folder.mkdir()
    rng = np.random.default_rng(0)
    pixels, labels = [], []

    def write(file, content):
        (folder / file).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / file).read_bytes()).hexdigest()

    for attribute in ('train_list', 'test_list'):
        entries = []
        for file, _ in getattr(cls, attribute):
            data, target = rng.integers(0, 256, (4, 3072), dtype=np.uint8), rng.integers(0, num_classes, 4).tolist()
            key = 'labels' if name == 'cifar10' else 'fine_labels'
            entries.append([file, write(file, {'data': data, key: target})])
            pixels.append(data)
            labels += target
        monkeypatch.setattr(cls, attribute, entries)
    md5 = write(cls.meta['filename'], {cls.meta['key']: [f'c{i}' for i in range(num_classes)]})
    monkeypatch.setattr(cls, 'meta', dict(cls.meta, md5=md5))

    args = parse_args(['--data-dir', str(tmp_path), '--dataset', name, '--batch-size', '2', '--device', 'cpu'])
    data = load_data(args)
    assert len(data.classes) == num_classes
    assert torch.cat([data.train.labels, data.test.labels]).tolist() == labels
    expected = torch.from_numpy(np.concatenate(pixels)).view(-1, 3, 32, 32)
    assert torch.equal(torch.cat([data.train.images, data.test.images]), expected)

    # The mean and the deviation are the model's.
    right, wrong = ('gunn15', 'gunn15.c100') if name == 'cifar10' else ('gunn15.c100', 'gunn15')
    Run(argparse.Namespace(**{**vars(args), 'model': right}), data)
    with pytest.raises(SystemExit, match=f'{wrong} is normalised for c10.*; expected another tag for --dataset {name}'):
        Run(argparse.Namespace(**{**vars(args), 'model': wrong}), data)


# --- A run ---

def test_two_steps_and_what_they_leave(images, tmp_path, main, monkeypatch):
    results = tmp_path / 'results.csv'
    options = [
        '--model', 'sunn15', '--epochs', '1', '--schedule', 'onecycle', '--dtype', 'bfloat16', '--ema', '0.5',
        '--dataset-name', 'noise', '--results', str(results), '--model-kwargs', 'drop_rate=0.1']
    main(*options)
    metrics, = read_csv(tmp_path / 'out' / 'metrics.csv')
    assert list(metrics) == ['epoch', 'lr', 'train_loss', 'train_error', 'eval_loss', 'eval_error', 'ema_loss',
                             'ema_error', 'minutes']
    assert (tmp_path / 'out' / 'curves.png').read_bytes().startswith(b'\x89PNG')

    # The results are those of the files, evaluated by timm's own names, in float32.
    test = load_data(parse_args(arguments(images, tmp_path))).test
    raw, ema = read_csv(results)
    for row, weights in ((raw, 'raw'), (ema, 'EMA')):
        assert (row['model'], row['weights'], row['data'], row['images']) == ('sunn15', weights, 'noise', '12')
        assert row['recipe'] == (
            'onecycle, lr 0.1 per 64, batch 8, bfloat16, ema 0.5, weight_decay 0.0001, drop_rate=0.1')
        assert f'--results {results}' in row['command']
        path = tmp_path / 'out' / row['file']
        assert row['sha256'] == hashlib.sha256(path.read_bytes()).hexdigest()
        model = timm.create_model('sunn15', num_classes=CLASSES, checkpoint_path=str(path)).eval()
        x = normalise(test.images, *(torch.tensor(model.pretrained_cfg[k]) for k in ('mean', 'std')))
        with torch.no_grad():
            logits = model(x)
        assert float(row['error']) == pytest.approx(
            100 * (logits.argmax(1) != test.labels).double().mean().item(), abs=1e-3)
        assert float(row['loss']) == pytest.approx(
            torch.nn.functional.cross_entropy(logits, test.labels).item(), rel=1e-3)
    assert raw['sha256'] != ema['sha256']

    # timm reads the checkpoint.
    model = timm.create_model('sunn15', num_classes=CLASSES)
    timm.models.load_checkpoint(model, str(tmp_path / 'out' / 'last.pth.tar'), use_ema=True)
    saved = safetensors.torch.load_file(tmp_path / 'out' / 'model_ema.safetensors')
    for k, v in model.state_dict().items():
        assert_close(saved[k], v.half() if v.ndim > 1 else v, rtol=0, atol=0)

    # Said again, elsewhere, it changes nothing and adds no second row.
    before = (tmp_path / 'out' / 'last.pth.tar').stat().st_mtime_ns
    monkeypatch.setattr(train_cifar, 'origin', lambda args: dict(hardware='other', versions='other', commit='other'))
    main(*options)
    assert [dict(row, command='') for row in read_csv(results)] == [dict(row, command='') for row in (raw, ema)]
    assert (tmp_path / 'out' / 'last.pth.tar').stat().st_mtime_ns == before

    # A run of another seed adds its own.
    main(*options, '--seed', '1', '--output', str(tmp_path / 'out1'))
    assert [(row['seed'], row['weights']) for row in read_csv(results)] == [
        ('0', 'raw'), ('0', 'EMA'), ('1', 'raw'), ('1', 'EMA')]
    assert {row['commit'] for row in read_csv(results)[2:]} == {'other'}


def test_any_timm_model(tmp_path, main):
    main('--model', 'resnet10t', '--epochs', '1', '--schedule', 'onecycle')
    assert read_csv(tmp_path / 'out' / 'result.csv')[0]['model'] == 'resnet10t'


EVERYTHING = [
    '--epochs', '2', '--schedule', 'snapshot', '--cycles', '2', '--ema', '0.9', '--smoothing', '0.1', '--dtype',
    'bfloat16', '--seed', '5', '--model-kwargs', 'drop_rate=0.3', 'drop_path_rate=0.2']


def assert_same_run(whole, other):
    files = sorted(path.name for path in whole.iterdir())
    assert files == sorted(path.name for path in other.iterdir())
    assert {'model.safetensors', 'model_ema.safetensors', 'snapshot_1.safetensors', 'ensemble.csv', 'result.csv',
            'curves.png'} < {*files}
    for name in files:
        if name.endswith('.safetensors') or name == 'ensemble.csv':
            assert (whole / name).read_bytes() == (other / name).read_bytes(), name
        elif name == 'metrics.csv':
            rows = [[dict(r, minutes=0) for r in read_csv(folder / name)] for folder in (whole, other)]
            assert rows[0] == rows[1]


KILLER = """
import os, signal, sys
sys.path = {path!r}
import cifar_results, train_cifar

def run(owner, name, calls):
    original = getattr(owner, name)
    def last_call(*args, **kwargs):
        nonlocal calls
        calls -= 1
        if calls == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)
    setattr(owner, name, last_call)
    train_cifar.main({args!r})

for owner, name, calls in {moments!r}:
    # This process has computed nothing, so that one forked from it is as good as a new one, and is there at once.
    child = os.fork()
    if child == 0:
        run(eval(owner), name, calls)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, (owner, name, status)
"""


def test_killed_at_any_moment_a_run_goes_on_exactly(images, tmp_path):
    """By SIGKILL, again and again, at the worst moments: the result is that of a run left alone."""
    args = arguments(images, tmp_path / 'killed', *EVERYTHING, '--checkpoint-minutes', '0', '--results',
                     str(tmp_path / 'results.csv'))
    moments = [
        ('train_cifar.Run', 'train_step', 3),  # in an epoch
        ('cifar_results.Path', 'replace', 2),  # the new checkpoint is written, the old one in its place
        ('train_cifar.Run', 'end_epoch', 2),  # there is a snapshot and no checkpoint from after it
        ('train_cifar', 'report', 2),  # a checkpoint and no metrics
        ('cifar_results', 'ensemble', 1),  # at the end
        ('cifar_results', 'write_csv', 4)]  # the run's results stand in the common file, not yet in its own
    result = subprocess.run(
        [sys.executable, '-c', KILLER.format(path=sys.path, args=args, moments=moments)],
        capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert len(read_csv(tmp_path / 'results.csv')) == 2
    train_cifar.main(args)
    assert len(read_csv(tmp_path / 'results.csv')) == 2
    train_cifar.main(arguments(images, tmp_path / 'whole', *EVERYTHING))
    assert_same_run(tmp_path / 'whole', tmp_path / 'killed')


def test_paused_after_every_step_a_run_goes_on_exactly(images, tmp_path, main):
    """The last step of an epoch, before its evaluation, included."""
    for step in range(1, 7):
        assert f'paused after {step} of 6 steps' in main(*EVERYTHING, '--pause-after', '0')
    main(*EVERYTHING)
    train_cifar.main(arguments(images, tmp_path / 'whole', *EVERYTHING))
    assert_same_run(tmp_path / 'whole', tmp_path / 'out')


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_signals_pause(main, monkeypatch, number):
    train_step = Run.train_step

    def step_and_signal(run, *batch):
        train_step(run, *batch)
        if run.step == 4:
            os.kill(os.getpid(), number)

    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(Run, 'train_step', step_and_signal)
    assert 'paused after 4 of 12 steps; the same command goes on' in main('--epochs', '4')
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_two_processes_do_not_share_an_output(images, tmp_path, main):
    (tmp_path / 'out').mkdir()
    with common.locked(tmp_path / 'out' / '.lock', wait=False), pytest.raises(
            SystemExit, match=r'another process trains in .*out; expected another --output'):
        main('--epochs', '4')
    assert 'paused' in main('--epochs', '4', '--pause-after', '0')


@pytest.mark.parametrize('options', [[], EVERYTHING], ids=['paper', 'everything'])
def test_a_restored_run_has_the_state_of_the_old_one(images, tmp_path, options):
    """After every step: what a checkpoint leaves out would show in the steps that follow."""
    whole, data = small_run(images, tmp_path, *options)
    torch.manual_seed(1)  # the state of the process counts only as far as a checkpoint holds it
    for step in range(4):
        torch.save(whole.state(), tmp_path / 'checkpoint')
        rng = torch.get_rng_state()
        restored, _ = small_run(images, tmp_path, *options)
        restored.restore(torch.load(tmp_path / 'checkpoint', weights_only=True))
        assert torch.equal(torch.get_rng_state(), rng)
        states = []
        for run in (whole, restored):
            torch.set_rng_state(rng)
            run.train_step(*(t[run.order(0)[step % run.steps]] for t in data.train))
            if step == 2:
                run.end_epoch(data.test)
            states.append(run.state())
        leaves, spec = tree_flatten(states[0])
        other, other_spec = tree_flatten(states[1])
        assert spec == other_spec
        for a, b in zip(leaves, other, strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_seeds_differ_and_repeat(images, tmp_path):
    def losses(seed):
        run, data = small_run(images, tmp_path, seed=seed)
        for i in run.order(0)[:2]:
            run.train_step(*(t[i] for t in data.train))
        return run.sums.tolist()

    assert losses(1) == losses(1) != losses(2)


def test_every_epoch_has_an_order_of_its_own(images, tmp_path):
    run, _ = small_run(images, tmp_path)
    first, second = run.order(0), run.order(1)
    assert first.shape == (CLASSES * TRAIN // 8, 8)
    assert sorted(first.flatten().tolist()) == sorted(second.flatten().tolist()) == list(range(CLASSES * TRAIN))
    assert not torch.equal(first, second)


def test_snapshot_ensemble_averages_probabilities(images, tmp_path):
    run, data = small_run(images, tmp_path, '--schedule', 'snapshot', '--cycles', '3', '--epochs', '3')
    test = data.test
    x = normalise(test.images, run.mean, run.std)
    probs = []
    for cycle in (1, 2, 3):
        torch.manual_seed(cycle)
        model = timm.create_model('gunn15', num_classes=CLASSES).eval()
        torch.nn.init.normal_(model.head.fc.weight, std=0.3)
        path = tmp_path / f'snapshot_{cycle}.safetensors'
        common.save_weights(model, path)
        model.load_state_dict(safetensors.torch.load_file(path))  # rounded to float16
        with torch.no_grad():
            probs.append(model(x).softmax(1))
    result = ensemble(run, data)
    assert [(row['m'], row['snapshot']) for row in result] == [(1, 3), (2, 2), (3, 1)]
    for m, row in enumerate(result, 1):
        mean = torch.stack(probs[3 - m:]).mean(0)
        assert row['ensemble_error'] == pytest.approx(100 * (mean.argmax(1) != test.labels).double().mean().item())
        loss = -mean.gather(1, test.labels[:, None]).log().mean().item()
        assert row['ensemble_loss'] == pytest.approx(loss, rel=1e-3)
        assert row['snapshot_error'] == pytest.approx(
            100 * (probs[3 - m].argmax(1) != test.labels).double().mean().item())


# --- What is wrong ---

@pytest.mark.parametrize(('options', 'message'), [
    (['--epochs', '3'], 'expected at least 4 epochs for --schedule step, got 3'),
    (['--epochs', '7', '--schedule', 'snapshot', '--cycles', '3'], 'epochs that 3 cycles divide, got 7'),
    (['--epochs', '0'], 'expected --epochs >= 1, got 0'),
    (['--batch-size', '1'], 'expected --batch-size >= 2, got 1'),
    (['--ema', '1'], 'expected 0 <= --ema < 1, got 1.0'),
    (['--momentum', 'nan'], 'expected 0 <= --momentum < 1, got nan'),
    (['--shift', '1.5'], 'expected 0 <= --shift <= 1, got 1.5'),
    (['--lr', '-1'], 'expected --lr > 0, got -1.0'),
    (['--weight-decay', 'nan'], 'expected --weight-decay >= 0, got nan'),
    (['--model-kwargs', 'abc'], 'expected --model-kwargs NAME=VALUE'),
    (['--device', 'mps'], 'expected --device cpu or cuda, got mps'),
    (['--device', 'cuda:99'], 'expected a --device that torch finds, got cuda:99: '),
    (['--dtype', 'float16'], 'expected --dtype float32 or bfloat16 on cpu, got float16'),
    (['--model', 'gunn'], 'that timm.create_model takes, got gunn and {}: Unknown model'),
    (['--model-kwargs', 'width=2'], "that timm.create_model takes, got gunn15 and {'width': 2}: "),
    (['--model-kwargs', 'num_classes=7'], "got gunn15 and {'num_classes': 7}: timm"),
])
def test_bad_arguments(options, message, capsys):
    with pytest.raises(SystemExit):
        parse_args(['--data-dir', 'x', '--device', 'cpu', *options])
    assert message in capsys.readouterr().err


def test_bad_data(images, tmp_path):
    def load(data, *options):
        return load_data(parse_args(arguments(data, tmp_path, *options)))

    with pytest.raises(SystemExit, match=r'nowhere/train: no such folder; expected one with a subfolder of images'):
        load(tmp_path / 'nowhere')
    with pytest.raises(SystemExit, match='expected at least one batch of 64 images, got 24'):
        load(images, '--batch-size', '64')
    with pytest.raises(SystemExit, match='expected --held-out < 24 training images, got 24'):
        load(images, '--held-out', '24')
    odd = make_images(tmp_path / 'odd')
    Image.new('RGB', (9, 7)).save(odd / 'test' / 'class1' / '1.png')
    with pytest.raises(SystemExit, match=r'class1/1.png: expected an image of 8x8 like the others, got 9x7'):
        load(odd)
    mixed = tmp_path / 'mixed'
    mixed.mkdir()
    (mixed / 'train').symlink_to(images / 'train')
    (mixed / 'test').symlink_to(make_images(tmp_path / 'two', classes=2) / 'test')
    with pytest.raises(SystemExit, match='expected the same classes in train and test'):
        load(mixed)
    (mixed / 'test').unlink()
    (mixed / 'test').symlink_to(make_images(tmp_path / 'large', size=9) / 'test')
    with pytest.raises(SystemExit, match=r'expected images of one size, got \(8, 8\) in train and \(9, 9\) in test'):
        load(mixed)


def test_other_settings_do_not_go_on(tmp_path, main):
    options = ['--epochs', '4', '--pause-after', '0']
    assert 'paused after 1 of 12 steps' in main(*options)
    checkpoint = tmp_path / 'out' / 'last.pth.tar'
    before = checkpoint.read_bytes()
    with pytest.raises(SystemExit, match=r'is of a run with model gunn15 \(now sunn15\), lr 0.1 \(now 0.2\); expected'):
        main(*options, '--lr', '0.2', '--model', 'sunn15')
    other = make_images(tmp_path / 'other')
    Image.new('RGB', (8, 8)).save(other / 'train' / 'class0' / '0.png')
    with pytest.raises(SystemExit, match=r'is of a run with data \w+ \(now \w+\); expected'):
        main(*options, '--data-dir', str(other))
    assert checkpoint.read_bytes() == before
    torch.save(dict(state_dict={}), checkpoint)
    with pytest.raises(SystemExit, match=r'last.pth.tar is not a checkpoint of this script; expected another --output'):
        main(*options)


def test_outputs_of_different_runs_differ():
    outputs = {parse_args(['--data-dir', 'x', *options]).output for options in (
        [], ['--model', 'sunn15'], ['--seed', '1'], ['--epochs', '4'], ['--schedule', 'onecycle'])}
    assert len(outputs) == 5


def test_a_loss_that_is_not_finite_leaves_the_checkpoint(images, tmp_path):
    run, data = small_run(images, tmp_path, '--epochs', '4', '--lr', '1e30')
    (tmp_path / 'last.pth.tar').write_bytes(b'good')
    with pytest.raises(SystemExit, match=r'losses or weights are not finite in epoch [12]; .*last.pth.tar, where'):
        train_cifar.train(run, data)
    assert (tmp_path / 'last.pth.tar').read_bytes() == b'good'


def test_weights_that_are_not_finite_leave_the_checkpoint(images, tmp_path):
    """The loss of the step that broke them is finite."""
    run, data = small_run(images, tmp_path, '--epochs', '4', '--checkpoint-minutes', '0')
    (tmp_path / 'last.pth.tar').write_bytes(b'good')
    with torch.no_grad():
        run.model.head.fc.bias[0] = torch.inf
    run.train_step = lambda *batch: setattr(run, 'step', run.step + 1)
    with pytest.raises(SystemExit, match='losses or weights are not finite in epoch 1'):
        train_cifar.train(run, data)
    assert (tmp_path / 'last.pth.tar').read_bytes() == b'good'


def test_a_machine_without_git(images, tmp_path, monkeypatch):
    monkeypatch.setenv('PATH', str(tmp_path))
    run, _ = small_run(images, tmp_path)
    assert run.origins[0]['commit'] == 'unknown, without git'


def test_other_results_are_not_overwritten(tmp_path, main):
    other = tmp_path / 'other.csv'
    other.write_text('name,value\na,1\n')
    with pytest.raises(SystemExit, match=r"other.csv: expected rows of the columns \['model', "):
        main('--results', str(other))
    assert other.read_text() == 'name,value\na,1\n'
    assert not (tmp_path / 'out').exists()  # said before the training


def test_a_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / 'file'
    path.write_text('old')

    def write(text, fail):
        with common.replacing(path) as part:
            part.write_text(text)
            if fail:
                raise OSError('disk full')

    with pytest.raises(OSError, match='disk full'):
        write('half', fail=True)
    assert path.read_text() == 'old'
    write('new', fail=False)
    assert path.read_text() == 'new'
    common.save_weights(torch.nn.Linear(2, 1), tmp_path / 'weights')
    assert {p.name for p in tmp_path.iterdir()} == {'file', 'weights'}
    # safetensors by itself leaves its files to their owner.
    (tmp_path / 'other').touch()
    assert len({p.stat().st_mode for p in tmp_path.iterdir()}) == 1


@pytest.mark.gpu
@pytest.mark.parametrize('options', [
    ['--dtype', 'bfloat16', '--graphs'], ['--dtype', 'float16', '--ema', '0.9'], ['--compile', 'reduce-overhead']],
    ids=' '.join)
def test_cuda(tmp_path, main, options):
    options = ['--device', 'cuda', '--epochs', '2', '--schedule', 'onecycle', *options]
    assert 'paused after' in main(*options, '--pause-after', '0')
    main(*options)
    assert all(math.isfinite(float(row['train_loss'])) for row in read_csv(tmp_path / 'out' / 'metrics.csv'))


@pytest.mark.gpu
def test_a_step_in_cuda_graphs_is_that_without(images, tmp_path):
    """Batches follow each other into the same memory; the warm-up leaves nothing behind."""
    runs = [small_run(images, tmp_path, '--device', 'cuda', '--dtype', 'float32', *options) for options in (
        ['--model', 'sunn15', '--ema', '0.5'], ['--model', 'sunn15', '--ema', '0.5', '--graphs'])]
    for step in range(3):
        for run, data in runs:
            run.train_step(*(t[8 * step:8 * step + 8] for t in data.train))
    for model in ('model', 'ema'):
        plain, graphs = (getattr(run, model).state_dict() for run, _ in runs)
        assert_close(graphs, plain, rtol=1e-3, atol=1e-4)
