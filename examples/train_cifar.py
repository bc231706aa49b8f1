"""Train GUNN on CIFAR by the paper's recipe, and any other timm model beside it.

    python examples/train_cifar.py --data-dir cifar10                          # the paper: 300 epochs
    python examples/train_cifar.py --data-dir cifar10 --epochs 3 --schedule onecycle
    python examples/train_cifar.py --data-dir cifar10 --model sunn15 --minutes 60 --schedule onecycle
    python examples/train_cifar.py --data-dir cifar10 --schedule snapshot --cycles 6   # Snapshot Ensemble
    python examples/train_cifar.py --data-dir data --dataset cifar100 --download --model gunn15.c100

The data is an image folder (train/<class>/*, test/<class>/*, all images of one size) or torchvision's copy of CIFAR. It
is held on the device as a whole, and augmented there. The recipe (Section 6.2 and the authors' code): SGD with
Nesterov momentum 0.9, weight decay 1e-4 on every parameter, batches of 64, learning rate 0.1 (scaled with the batch
size), divided by 10 in epochs 150 and 225 of 300 (counted from 1); flips, zero-padded random crops and a cyclic shift.
Unlike there, the last incomplete batch of an epoch is left out.

Everything goes to --output: metrics.csv and curves.png after every epoch; last.pth.tar, a checkpoint that timm's
scripts can read; and at the end model.safetensors, evaluated as it is in float32, with its row of results in
result.csv. The same command goes on where the run was killed, stopped (Ctrl-C) or paused: exactly, as far as the
kernels of the device repeat themselves, as those of a CPU do with the same number of threads. The error that counts is
that of the last epoch. Choose hyperparameters with --held-out, which sets training images aside and leaves the test
images alone.
"""
import argparse
import csv
import hashlib
import math
import os
import signal
import subprocess
import time
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Callable, ContextManager, Dict, Iterator, List, NamedTuple, Optional, Tuple

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
import numpy as np
import safetensors.torch
import timm
import timm.data
import timm.utils
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision.datasets
from benchmark import machine
from torch.optim import lr_scheduler
from tqdm import tqdm

import timm_gunn

Row = Dict[str, Any]
bar = partial(tqdm, leave=False, disable=None)  # silent where the output is no terminal

# What a run may not change when it goes on, besides its data.
SETTINGS = (
    'model', 'model_kwargs', 'held_out', 'dtype', 'epochs', 'minutes', 'batch_size', 'lr', 'weight_decay', 'momentum',
    'schedule', 'cycles', 'smoothing', 'ema', 'shift', 'seed')

RESULT_COLUMNS = [
    'model', 'weights', 'data', 'images', 'recipe', 'epochs', 'seed', 'error', 'loss', 'minutes', 'hardware',
    'versions', 'commit', 'command', 'file', 'sha256']


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = parser.add_argument_group('data')
    data.add_argument('--data-dir', type=Path, required=True)
    data.add_argument('--dataset', choices=['folder', 'cifar10', 'cifar100'], default='folder',
                      help='an image folder, or what torchvision keeps under --data-dir')
    data.add_argument('--dataset-name', help="in the results (default: the folder's name, CIFAR-10 or CIFAR-100)")
    data.add_argument('--download', action='store_true', help='let torchvision download the data set')
    data.add_argument('--held-out', type=int, default=0, metavar='N',
                      help='evaluate on N of the training images, not trained on, instead of on the test images')
    model = parser.add_argument_group('model')
    model.add_argument('--model', default='gunn15', help='name of any timm model')
    model.add_argument('--model-kwargs', nargs='*', default={}, action=timm.utils.ParseKwargs)
    model.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    model.add_argument('--dtype', choices=['float32', 'bfloat16', 'float16'],
                       help='of the computation, 16 bits by autocast (default: bfloat16 on GPUs, float32 on CPUs)')
    model.add_argument('--compile', nargs='?', const='default', metavar='MODE',
                       help='torch.compile, with a mode')
    model.add_argument('--graphs', action='store_true', help='capture forward and backward pass as CUDA graphs')
    recipe = parser.add_argument_group('recipe')
    recipe.add_argument('--epochs', type=int, help='(default: 300)')
    recipe.add_argument('--minutes', type=float,
                        help='instead of --epochs: as many whole epochs as fit, by a measurement at the start')
    recipe.add_argument('--batch-size', type=int, default=64)
    recipe.add_argument('--lr', type=float, default=0.1, help='for 64 images, scaled with the batch size')
    recipe.add_argument('--weight-decay', type=float, default=1e-4)
    recipe.add_argument('--momentum', type=float, default=0.9)
    recipe.add_argument('--schedule', choices=['step', 'onecycle', 'snapshot'], default='step',
                        help="the paper's, one cycle for few epochs, or cyclic cosine with a snapshot per cycle")
    recipe.add_argument('--cycles', type=int, default=6, help='of the snapshot schedule')
    recipe.add_argument('--smoothing', type=float, default=0.0, help='label smoothing')
    recipe.add_argument('--ema', type=float, default=0.0, metavar='DECAY', help='average the weights, as timm does')
    recipe.add_argument('--shift', type=float, default=2 / 3, help='probability of the cyclic shift')
    recipe.add_argument('--seed', type=int, default=0)
    run = parser.add_argument_group('run')
    run.add_argument('--output', type=Path, help='(default: output/MODEL-SCHEDULE-EPOCHS-SEED)')
    run.add_argument('--checkpoint-minutes', type=float, default=5.0, help='time between checkpoints')
    run.add_argument('--pause-after', type=float, default=math.inf, metavar='MINUTES',
                     help='write a checkpoint and leave, to go on another time')
    run.add_argument('--results', type=Path, help='add the row of results to this CSV, too')
    try:
        args = parser.parse_args(argv)
    except ValueError:  # of timm's ParseKwargs
        parser.error('expected --model-kwargs NAME=VALUE ...')

    if args.epochs is not None and args.minutes is not None:
        parser.error('expected --epochs or --minutes, got both')
    if args.epochs is None and args.minutes is None:
        args.epochs = 300
    for name, low in dict(epochs=1, batch_size=2, cycles=1, held_out=0, checkpoint_minutes=0, weight_decay=0).items():
        if (value := getattr(args, name)) is not None and not low <= value < math.inf:
            parser.error(f'expected --{name.replace("_", "-")} >= {low}, got {value}')
    for name in ('lr', 'minutes'):
        if (value := getattr(args, name)) is not None and not 0 < value < math.inf:
            parser.error(f'expected --{name} > 0, got {value}')
    for name in ('smoothing', 'ema', 'momentum'):
        if not 0 <= getattr(args, name) < 1:
            parser.error(f'expected 0 <= --{name} < 1, got {getattr(args, name)}')
    if not 0 <= args.shift <= 1:
        parser.error(f'expected 0 <= --shift <= 1, got {args.shift}')
    if args.epochs is not None and (problem := schedule_problem(args.schedule, args.epochs, args.cycles)):
        parser.error(problem)
    cuda = args.device.startswith('cuda')
    if not cuda and args.device != 'cpu':
        parser.error(f'expected --device cpu or cuda, got {args.device}')
    check_device(parser, args.device)
    if args.dtype is None:
        bfloat16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        args.dtype = 'bfloat16' if bfloat16 else 'float32'
    if args.graphs and not cuda:
        parser.error(f'expected --device cuda for --graphs, got {args.device}')
    if args.dtype == 'float16' and not cuda:
        parser.error(f'expected --dtype float32 or bfloat16 on {args.device}, got float16')
    try:
        with torch.device('meta'):
            timm.create_model(args.model, num_classes=10, **args.model_kwargs)
    except NotImplementedError:  # by a constructor that looks at values, which there are none of yet
        pass
    except Exception as e:  # of any kind, by the model
        parser.error(
            'expected a --model and --model-kwargs that timm.create_model takes, got '
            f'{args.model} and {args.model_kwargs}: {str(e).splitlines()[0]}')
    if args.output is None:
        budget = args.epochs or f'{args.minutes:g}min'
        args.output = Path('output') / f'{args.model}-{args.schedule}-{budget}-{args.seed}'
    return args


def check_device(parser: argparse.ArgumentParser, device: str) -> None:
    """An error of the parser if there is no such device."""
    try:
        torch.empty(1, device=device)
    except (AssertionError, RuntimeError) as e:
        parser.error(f'expected a --device that torch finds, got {device}: {str(e).splitlines()[0]}')


# --- Data ---

class Split(NamedTuple):
    images: torch.Tensor  # (n, 3, H, W) uint8
    labels: torch.Tensor  # (n,) int64


class Data(NamedTuple):
    train: Split
    test: Split  # or the held-out training images
    classes: List[str]
    fingerprint: str  # of all pixels and labels


def load_data(args: argparse.Namespace) -> Data:
    """The images, on the device."""
    if args.dataset == 'folder':
        train, classes = load_folder(args.data_dir / 'train')
        test = None
        if not args.held_out:
            test, test_classes = load_folder(args.data_dir / 'test')
            if test_classes != classes:
                raise SystemExit(
                    f'{args.data_dir}: expected the same classes in train and test, got {classes} and {test_classes}')
            if test.images.shape[1:] != train.images.shape[1:]:
                raise SystemExit(
                    f'{args.data_dir}: expected images of one size, got {tuple(train.images.shape[2:])} in train '
                    f'and {tuple(test.images.shape[2:])} in test')
    else:
        cls = dict(cifar10=torchvision.datasets.CIFAR10, cifar100=torchvision.datasets.CIFAR100)[args.dataset]
        splits = [cls(args.data_dir, train=train, download=args.download) for train in (True, False)]
        train, test = (Split(torch.from_numpy(s.data).permute(0, 3, 1, 2), torch.tensor(s.targets)) for s in splits)
        classes = splits[0].classes
    if args.held_out:
        if args.held_out >= len(train.labels):
            raise SystemExit(f'expected --held-out < {len(train.labels)} training images, got {args.held_out}')
        order = torch.randperm(len(train.labels), generator=torch.Generator().manual_seed(0))  # for any --seed
        test, train = (
            Split(*(t[part] for t in train)) for part in (order[:args.held_out], order[args.held_out:]))
    if len(train.labels) < args.batch_size:
        raise SystemExit(f'expected at least one batch of {args.batch_size} images, got {len(train.labels)}')
    digest = hashlib.sha256(repr(classes).encode())
    for t in (*train, *test):
        digest.update(t.contiguous().numpy())
    train, test = (
        Split(s.images.to(args.device, memory_format=torch.channels_last), s.labels.to(args.device))
        for s in (train, test))
    return Data(train, test, classes, digest.hexdigest()[:16])


def load_folder(folder: Path) -> Tuple[Split, List[str]]:
    """Images of folder/<class>/* and the names of the classes."""
    if not folder.is_dir():
        raise SystemExit(f'{folder}: no such folder; expected one with a subfolder of images per class')
    dataset = torchvision.datasets.ImageFolder(folder)
    images = []
    for i, (path, _) in enumerate(bar(dataset.samples, desc=f'reading {folder}', unit='image')):
        images.append(np.asarray(dataset[i][0]))
        if images[i].shape != images[0].shape:
            (w, h), (h0, w0) = images[i].shape[1::-1], images[0].shape[:2]
            raise SystemExit(f'{path}: expected an image of {w0}x{h0} like the others, got {w}x{h}')
    return Split(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), torch.tensor(dataset.targets)), dataset.classes


def normalise(images: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """Images (B, 3, H, W), uint8 to float32; mean and std (3,) of values in [0, 1]."""
    return (images.float() / 255 - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)


def augment(
        images: torch.Tensor, generator: torch.Generator, shift: float = 2 / 3, padding: int = 4) -> torch.Tensor:
    """Flip, crop and shift each image (B, C, H, W) at random.

    With probability 1/2, a horizontal flip; then a crop of the image's size out of the image with `padding` zeros
    around it; then, with probability `shift`, a roll along one axis, x or y with even odds, by 1 to all of its pixels.
    To be used on normalised images, where zero is the mean colour.

    Source: Section 6.1, the authors' code.
    """
    n, _, height, width = images.shape

    def draw(high: int) -> torch.Tensor:
        return torch.randint(high, (n, 1), generator=generator, device=images.device)

    flip, axis = draw(2).bool(), draw(2)
    top, left, down, right = draw(2 * padding + 1), draw(2 * padding + 1), draw(height) + 1, draw(width) + 1
    shifted = torch.rand((n, 1), generator=generator, device=images.device) < shift
    # Where the pixels of the result are in the padded image, along either axis.
    rows, cols = (torch.arange(size, device=images.device) for size in (height, width))
    rows = (rows - down * (shifted & (axis == 0))) % height + top
    cols = (cols - right * (shifted & (axis == 1))) % width + left
    cols = torch.where(flip, width + 2 * padding - 1 - cols, cols)
    each = torch.arange(n, device=images.device)
    return F.pad(images, [padding] * 4)[each[:, None, None], :, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)


# --- Training ---

def schedule_problem(schedule: str, epochs: int, cycles: int) -> Optional[str]:
    if schedule == 'step' and epochs < 4:
        return f'expected at least 4 epochs for --schedule step, got {epochs}; there is onecycle for few'
    if schedule == 'snapshot' and (epochs % cycles or epochs == 0):
        return f'expected a number of epochs that {cycles} cycles divide, got {epochs}'
    return None


def make_scheduler(
        optimizer: torch.optim.Optimizer, schedule: str, epochs: int, steps: int, cycles: int,
) -> lr_scheduler.LRScheduler:
    """Learning rates of every step, `steps` an epoch.

    'step': divided by 10 in epochs E / 2 and again in 3 E / 4, counted from 1. 'onecycle': up and down once.
    'snapshot': from the full rate to 0 as half a cosine, `cycles` times (Huang et al. 2017, Eq. 2).
    """
    if schedule == 'step':
        return lr_scheduler.MultiStepLR(optimizer, [(e - 1) * steps for e in (epochs // 2, epochs * 3 // 4)])
    if schedule == 'onecycle':
        rate = optimizer.param_groups[0]['lr']
        return lr_scheduler.OneCycleLR(optimizer, rate, epochs * steps, cycle_momentum=False)
    return lr_scheduler.CosineAnnealingWarmRestarts(optimizer, epochs * steps // cycles)


class Run:
    """A run of training: all that changes from step to step, and so all that a checkpoint holds."""

    def __init__(self, args: argparse.Namespace, data: Data):
        self.args, self.settings = args, settings(args, data)
        num_classes, num_images = len(data.classes), len(data.train.labels)
        torch.manual_seed(args.seed)
        self.model = timm.create_model(args.model, num_classes=num_classes, **args.model_kwargs)
        self.model.to(args.device, memory_format=torch.channels_last)
        tag = self.model.pretrained_cfg.get('tag')
        if {tag, args.dataset} in ({'c10', 'cifar100'}, {'c100', 'cifar10'}):
            raise SystemExit(f'{args.model} is normalised for {tag}; expected another tag for --dataset {args.dataset}')
        config = timm.data.resolve_model_data_config(self.model)
        self.mean, self.std = (torch.tensor(config[k], device=args.device) for k in ('mean', 'std'))
        self.ema = timm.utils.ModelEmaV3(self.model, decay=args.ema) if args.ema else None
        self.forward = torch.compile(self.model, mode=args.compile) if args.compile else self.model
        if args.graphs:
            self.capture(data.train.images[:args.batch_size])
        self.steps = num_images // args.batch_size
        self.num_images = num_images
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=args.lr * args.batch_size / 64, momentum=args.momentum,
            nesterov=args.momentum > 0, weight_decay=args.weight_decay, fused=args.device.startswith('cuda'))
        self.scheduler = make_scheduler(self.optimizer, args.schedule, args.epochs, self.steps, args.cycles)
        self.scaler = torch.amp.GradScaler(enabled=args.dtype == 'float16')
        self.generator = torch.Generator(args.device).manual_seed(args.seed)
        self.step = 0  # since the start of the run
        self.rate = 0.0  # of the last step
        self.sums = torch.zeros(2, dtype=torch.float64, device=args.device)  # of the epoch: losses, wrong predictions
        self.history: List[Row] = []
        self.seconds = 0.0
        self.origins = [origin(args)]  # hardware, versions and commit of every process that has had a part in it

    @property
    def done(self) -> bool:
        return len(self.history) == self.args.epochs

    def autocast(self) -> ContextManager[Any]:
        if self.args.dtype == 'float32':
            return nullcontext()
        return torch.autocast(self.args.device.split(':')[0], getattr(torch, self.args.dtype))

    def capture(self, images: torch.Tensor) -> None:
        """Let the model replay CUDA graphs in training mode."""
        buffers = [t.clone() for t in self.model.buffers()]
        with torch.autocast('cuda', getattr(torch, self.args.dtype), self.args.dtype != 'float32', cache_enabled=False):
            torch.cuda.make_graphed_callables(self.model.train(), (normalise(images, self.mean, self.std),))
        for t, before in zip(self.model.buffers(), buffers, strict=True):  # the warm-up has changed them
            t.copy_(before)

    def order(self, epoch: int) -> torch.Tensor:
        """Indices of the images in an epoch, one row a batch; not part of the state, since seed and epoch give it."""
        generator = torch.Generator().manual_seed(self.args.seed * 1_000_003 + epoch)
        indices = torch.randperm(self.num_images, generator=generator)[:self.steps * self.args.batch_size]
        return indices.view(self.steps, self.args.batch_size).to(self.args.device)

    def train_step(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.model.train()
        x = augment(normalise(images, self.mean, self.std), self.generator, self.args.shift)
        with self.autocast():
            logits = self.forward(x)
            loss = F.cross_entropy(logits, labels, label_smoothing=self.args.smoothing)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)  # a step that float16 makes it skip counts for the schedule all the same
        self.scaler.update()
        self.rate = self.optimizer.param_groups[0]['lr']
        self.scheduler.step()
        self.step += 1
        if self.ema is not None:
            self.ema.update(self.model, step=self.step)
        self.sums += torch.stack([loss.detach(), (logits.argmax(1) != labels).float().mean()])

    def models(self) -> Dict[str, Tuple[nn.Module, Callable]]:
        """The models to evaluate, each with what computes it."""
        ema = {} if self.ema is None else dict(ema=(self.ema.module, self.ema.module))
        return dict(eval=(self.model, self.forward), **ema)

    def log_probs(self, model: nn.Module, forward: Callable, split: Split) -> torch.Tensor:
        """Of the classes, (n, classes) float64."""
        model.eval()
        batches = split.images.split(256 if self.args.device == 'cpu' else 1000)
        with torch.inference_mode():
            return torch.cat([
                forward(normalise(images, self.mean, self.std)).double().log_softmax(1)
                for images in bar(batches, desc='evaluating', unit='batch')])

    def finite(self) -> bool:
        """Whether losses and weights are."""
        return all(t.isfinite().all() for t in (self.sums, *self.model.parameters()))

    def end_epoch(self, test: Split) -> None:
        """Evaluate, and write down the epoch."""
        loss, error = (self.sums / self.steps).tolist()
        row = dict(epoch=len(self.history) + 1, lr=self.rate, train_loss=loss, train_error=100 * error)
        for name, (model, forward) in self.models().items():
            with self.autocast():
                loss, error = evaluate(self.log_probs(model, forward, test), test.labels)
            row.update({f'{name}_loss': loss, f'{name}_error': error})
        self.history.append(row)
        self.sums.zero_()

    def state(self) -> Dict[str, Any]:
        """Tensors and plain values, under timm's names where timm has some."""
        device = self.args.device
        return dict(
            arch=self.args.model, settings=self.settings, epochs=self.args.epochs, step=self.step,
            state_dict=self.model.state_dict(), optimizer=self.optimizer.state_dict(),
            scheduler=self.scheduler.state_dict(), scaler=self.scaler.state_dict(), sums=self.sums,
            **(dict(state_dict_ema=self.ema.module.state_dict()) if self.ema is not None else {}),
            rng=torch.get_rng_state(), rng_augment=self.generator.get_state(),
            **(dict(rng_cuda=torch.cuda.get_rng_state(device)) if device.startswith('cuda') else {}),
            history=self.history, rate=self.rate, seconds=self.seconds, origins=self.origins)

    def restore(self, state: Dict[str, Any]) -> None:
        self.model.load_state_dict(state['state_dict'])
        for name in ('optimizer', 'scheduler', 'scaler'):
            getattr(self, name).load_state_dict(state[name])
        if self.ema is not None:
            self.ema.module.load_state_dict(state['state_dict_ema'])
        torch.set_rng_state(state['rng'])
        self.generator.set_state(state['rng_augment'])
        if 'rng_cuda' in state:
            torch.cuda.set_rng_state(state['rng_cuda'], self.args.device)
        self.sums.copy_(state['sums'])
        for name in ('step', 'history', 'rate', 'seconds'):
            setattr(self, name, state[name])
        self.origins = state['origins'] + [
            here for here in self.origins if here not in state['origins'] and not self.done]


def settings(args: argparse.Namespace, data: Data) -> Dict[str, Any]:
    """What has to be the same when a run goes on."""
    chosen = {name: getattr(args, name) for name in SETTINGS}
    if args.minutes is not None:
        chosen['epochs'] = None  # found by a measurement
    return dict(chosen, device=args.device.split(':')[0], data=data.fingerprint)


def evaluate(log_probs: torch.Tensor, labels: torch.Tensor) -> Tuple[float, float]:
    """Cross-entropy and error in percent."""
    return F.nll_loss(log_probs, labels).item(), 100 * (log_probs.argmax(1) != labels).double().mean().item()


def epochs_within(args: argparse.Namespace, data: Data) -> int:
    """How many epochs of training and evaluation fit into args.minutes, by a few steps that are thrown away."""
    run = Run(argparse.Namespace(**{**vars(args), 'epochs': 1000 * args.cycles}), data)
    part = Split(*(t[:256] for t in data.test))

    def seconds(work: Callable[[], Any], times: int) -> float:
        start = time.perf_counter()
        for _ in range(times):
            work()
        run.sums.tolist()  # waits for the device
        return (time.perf_counter() - start) / times

    def step() -> None:
        run.train_step(*(t[:args.batch_size] for t in data.train))

    def predict() -> None:
        with run.autocast():
            for model, forward in run.models().values():
                run.log_probs(model, forward, part)

    seconds(step, 3)
    seconds(predict, 3)
    epoch = seconds(step, 10) * run.steps + seconds(predict, 2) * len(data.test.labels) / len(part.labels)
    epochs = int(args.minutes * 60 / epoch)
    if args.schedule == 'snapshot':
        epochs -= epochs % args.cycles
    print(f'{epoch:.1f} s per epoch, {epochs} epochs in {args.minutes:g} minutes')
    if epochs == 0 or schedule_problem(args.schedule, epochs, args.cycles):
        raise SystemExit(
            f'--minutes {args.minutes:g} is not enough for --schedule {args.schedule}: '
            f'an epoch takes {epoch / 60:.2f} minutes')
    return epochs


@contextmanager
def signals() -> Iterator[List[int]]:
    """A list that gets the first SIGINT (Ctrl-C) or SIGTERM; a second one does what it always does."""
    caught: List[int] = []

    def catch(number: int, _: Optional[FrameType]) -> None:
        caught.append(number)
        signal.signal(number, previous[number])

    previous = {number: signal.signal(number, catch) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def train(run: Run, data: Data) -> bool:
    """Train to the end, or until --pause-after or a signal; True if to the end."""
    args, output = run.args, run.args.output
    start, before = time.perf_counter(), run.seconds
    saved = drawn = start

    def check() -> None:
        if not run.finite():
            raise SystemExit(
                f'losses or weights are not finite in epoch {len(run.history) + 1}; {output / "last.pth.tar"}, where '
                'there is one, is from before. A lower --lr (with another --output) may help.')

    def save() -> None:
        nonlocal saved
        check()
        saved = time.perf_counter()
        run.seconds = before + saved - start
        with replacing(output / 'last.pth.tar') as path:
            torch.save(run.state(), path)

    with signals() as caught:
        while not run.done:
            epoch = len(run.history)
            order = run.order(epoch)
            with bar(total=run.steps, initial=run.step - epoch * run.steps, unit='step',
                     desc=f'epoch {epoch + 1}/{args.epochs}') as progress:
                while run.step < (epoch + 1) * run.steps:
                    i = run.step - epoch * run.steps
                    run.train_step(*(t[order[i]] for t in data.train))
                    progress.update()
                    if not progress.disable and (i + 1) % 10 == 0:
                        progress.set_postfix(loss=f'{run.sums[0].item() / (i + 1):.3f}')
                    now = time.perf_counter()
                    if caught or now - start > 60 * args.pause_after:
                        save()
                        return False
                    if now - saved > 60 * args.checkpoint_minutes and i + 1 < run.steps:
                        save()
            check()
            if args.schedule == 'snapshot' and (epoch + 1) % (args.epochs // args.cycles) == 0:
                save_weights(run.model, snapshot_path(output, (epoch + 1) * args.cycles // args.epochs))
            run.end_epoch(data.test)
            now = time.perf_counter()
            run.history[-1]['minutes'] = (before + now - start) / 60
            if run.done or now - saved > 60 * args.checkpoint_minutes:
                save()
            report(run, curves=run.done or now - drawn > 60)  # an epoch can be shorter than a drawing
            if now - drawn > 60:
                drawn = now
            print(', '.join(f'{k} {v:.4g}' for k, v in run.history[-1].items()), flush=True)
    return True


# --- What a run leaves behind ---

@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, renamed to `path` once it is complete: there is never half a file under that name."""
    part = path.with_name(path.name + '.part')
    try:
        yield part
        with open(part, 'rb+') as f:
            os.fsync(f.fileno())
        umask = os.umask(0)
        os.umask(umask)
        part.chmod(0o666 & ~umask)  # safetensors keeps its files from everybody else
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def save_weights(model: nn.Module, path: Path) -> None:
    """Matrices and kernels in float16, half the size; norms and biases as they are."""
    state = model.state_dict()
    tensors = {k: (v.half() if v.ndim > 1 else v).detach().cpu().contiguous() for k, v in state.items()}
    with replacing(path) as part:
        safetensors.torch.save_file(tensors, part, metadata=dict(format='pt'))


def snapshot_path(output: Path, cycle: int) -> Path:
    return output / f'snapshot_{cycle}.safetensors'


def write_csv(path: Path, rows: List[Row]) -> None:
    with replacing(path) as part, open(part, 'w', newline='') as f:
        writer = csv.DictWriter(f, list(rows[0]), lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)


def report(run: Run, curves: bool = True) -> None:
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


def finish(run: Run, data: Data) -> None:
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
    if not path.exists():
        return []
    with open(path, newline='') as f:
        reader = csv.DictReader(f)
        if reader.fieldnames != RESULT_COLUMNS:
            raise SystemExit(f'{path}: expected the columns {RESULT_COLUMNS}, got {reader.fieldnames}')
        return list(reader)


def file_log_probs(run: Run, path: Path, data: Data) -> torch.Tensor:
    """Log-probabilities (n, classes) of the weights in a file, computed in float32, without TensorFloat-32."""
    model = timm.create_model(run.args.model, num_classes=len(data.classes), **run.args.model_kwargs)
    model.load_state_dict(safetensors.torch.load_file(path))
    model.to(run.args.device, memory_format=torch.channels_last)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return run.log_probs(model, model, data.test)


def ensemble(run: Run, data: Data) -> List[Row]:
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


def dataset_name(args: argparse.Namespace) -> str:
    name = args.dataset_name or dict(cifar10='CIFAR-10', cifar100='CIFAR-100').get(
        args.dataset, args.data_dir.resolve().name)
    return f'{name}, held-out training images' if args.held_out else name


def recipe(args: argparse.Namespace) -> str:
    parts = [f'{args.schedule}', f'lr {args.lr:g} per 64', f'batch {args.batch_size}', args.dtype]
    if args.schedule == 'snapshot':
        parts[0] += f' of {args.cycles} cycles'
    defaults = dict(smoothing=0.0, ema=0.0, shift=2 / 3, weight_decay=1e-4, momentum=0.9)
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


@contextmanager
def locked(path: Path, wait: bool) -> Iterator[None]:
    """Hold a file against other processes of this script, where the system has such locks."""
    with open(path, 'w') as f:
        try:
            import fcntl
        except ImportError:
            pass
        else:
            try:
                fcntl.flock(f, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                raise SystemExit(f'another process trains in {path.parent}; expected another --output') from None
        yield


def main(argv: Optional[List[str]] = None) -> None:
    args = parse_args(argv)
    if args.results is not None:
        read_results(args.results)  # what is wrong with it had better be said before the training
        args.results.parent.mkdir(parents=True, exist_ok=True)
    torch.backends.cudnn.benchmark = True
    data = load_data(args)
    args.output.mkdir(parents=True, exist_ok=True)
    with locked(args.output / '.lock', wait=False):
        state = load_checkpoint(args, data)
        if state is not None:
            args.epochs = state['epochs']
        elif args.epochs is None:
            args.epochs = epochs_within(args, data)
        run = Run(args, data)
        if state is not None:
            run.restore(state)
            report(run)
            print(f'going on after {run.step} of {args.epochs * run.steps} steps')
        print(f'{args.output}: {args.model}, {sum(p.numel() for p in run.model.parameters()):,} parameters, '
              f'{len(data.classes)} classes, {len(data.train.labels)} training images, {args.epochs} epochs of '
              f'{run.steps} steps')
        if train(run, data):
            finish(run, data)
        else:
            print(f'paused after {run.step} of {args.epochs * run.steps} steps; the same command goes on')


def load_checkpoint(args: argparse.Namespace, data: Data) -> Optional[Dict[str, Any]]:
    """The state that a run of the same settings has left behind, if there is one."""
    path = args.output / 'last.pth.tar'
    if not path.exists():
        return None
    state = torch.load(path, map_location='cpu', weights_only=True)
    if 'settings' not in state:
        raise SystemExit(f'{path} is not a checkpoint of this script; expected another --output')
    new = settings(args, data)
    changed = [f'{k} {old} (now {new.get(k)})' for k, old in state['settings'].items() if old != new.get(k)]
    if changed:
        raise SystemExit(
            f'{path} is of a run with {", ".join(changed)}; expected the same settings or another --output')
    return state


if __name__ == '__main__':
    main()
