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
The last incomplete batch of an epoch is left out.

Everything goes to --output: metrics.csv and curves.png after every epoch; last.pth.tar, a checkpoint that timm's
scripts can read; and at the end model.safetensors, evaluated as it is in float32, with its row of results in
result.csv. The same command goes on where the run was killed or paused, exactly. The error that counts is that of the
last epoch. Choose hyperparameters with --held-out, which sets training images aside and leaves the test images alone.
"""
import argparse
import csv
import hashlib
import math
import os
import subprocess
import time
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
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

Row = Dict[str, Any]
bar = partial(tqdm, leave=False, disable=None)  # silent where the output is no terminal

# What a run may not change when it goes on.
SETTINGS = (
    'model', 'model_kwargs', 'dataset', 'held_out', 'dtype', 'epochs', 'minutes', 'batch_size', 'lr', 'weight_decay',
    'momentum', 'schedule', 'cycles', 'smoothing', 'ema', 'shift', 'seed')

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
                       help="torch.compile, with a mode ('reduce-overhead' captures CUDA graphs)")
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
    run.add_argument('--output', type=Path, default=Path('output/train_cifar'))
    run.add_argument('--checkpoint-minutes', type=float, default=5.0, help='time between checkpoints')
    run.add_argument('--pause-after', type=float, default=math.inf, metavar='MINUTES',
                     help='write a checkpoint and leave, to go on another time')
    run.add_argument('--results', type=Path, help='add the row of results to this CSV, too')
    args = parser.parse_args(argv)

    if args.epochs is not None and args.minutes is not None:
        parser.error('expected --epochs or --minutes, got both')
    if args.epochs is None and args.minutes is None:
        args.epochs = 300
    for name, low in dict(epochs=1, batch_size=2, cycles=1, held_out=0, checkpoint_minutes=0, weight_decay=0).items():
        if (value := getattr(args, name)) is not None and value < low:
            parser.error(f'expected --{name.replace("_", "-")} >= {low}, got {value}')
    for name in ('smoothing', 'ema', 'shift', 'momentum'):
        if not 0 <= getattr(args, name) <= 1:
            parser.error(f'expected --{name} in [0, 1], got {getattr(args, name)}')
    if args.minutes is not None and not args.minutes > 0:
        parser.error(f'expected --minutes > 0, got {args.minutes}')
    if args.epochs is not None and (problem := schedule_problem(args.schedule, args.epochs, args.cycles)):
        parser.error(problem)
    args.dtype = args.dtype or ('bfloat16' if args.device.startswith('cuda') else 'float32')
    if args.dtype == 'float16' and not args.device.startswith('cuda'):
        parser.error(f'expected --dtype float32 or bfloat16 on {args.device}, got float16')
    return args


# --- Data ---

class Split(NamedTuple):
    images: torch.Tensor  # (n, 3, H, W) uint8
    labels: torch.Tensor  # (n,) int64


def load_data(args: argparse.Namespace) -> Tuple[Split, Split, List[str]]:
    """Training images, images to evaluate on, names of the classes."""
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
    train, test = (
        Split(s.images.to(args.device, memory_format=torch.channels_last), s.labels.to(args.device))
        for s in (train, test))
    return train, test, classes


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

    def __init__(self, args: argparse.Namespace, num_classes: int, num_images: int):
        self.args = args
        torch.manual_seed(args.seed)
        self.model = timm.create_model(args.model, num_classes=num_classes, **args.model_kwargs)
        self.model.to(args.device, memory_format=torch.channels_last)
        self.config = timm.data.resolve_model_data_config(self.model)
        self.mean, self.std = (torch.tensor(self.config[k], device=args.device) for k in ('mean', 'std'))
        self.forward = torch.compile(self.model, mode=args.compile) if args.compile else self.model
        self.steps = num_images // args.batch_size
        self.num_images = num_images
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=args.lr * args.batch_size / 64, momentum=args.momentum, nesterov=True,
            weight_decay=args.weight_decay)
        self.scheduler = make_scheduler(self.optimizer, args.schedule, args.epochs, self.steps, args.cycles)
        self.scaler = torch.amp.GradScaler(enabled=args.dtype == 'float16')
        self.ema = timm.utils.ModelEmaV3(self.model, decay=args.ema) if args.ema else None
        self.generator = torch.Generator(args.device).manual_seed(args.seed)
        self.step = 0  # since the start of the run
        self.rate = 0.0  # of the last step
        self.sums = torch.zeros(2, dtype=torch.float64, device=args.device)  # of the epoch: losses, wrong predictions
        self.history: List[Row] = []
        self.seconds = 0.0
        self.commits = [commit()]

    @property
    def done(self) -> bool:
        return len(self.history) == self.args.epochs

    def autocast(self) -> ContextManager[Any]:
        if self.args.dtype == 'float32':
            return nullcontext()
        return torch.autocast(self.args.device.split(':')[0], getattr(torch, self.args.dtype))

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
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.rate = self.optimizer.param_groups[0]['lr']
        self.scheduler.step()
        self.step += 1
        if self.ema is not None:
            self.ema.update(self.model, step=self.step)
        self.sums += torch.stack([loss.detach(), (logits.argmax(1) != labels).float().mean()])

    def probabilities(self, model: nn.Module, forward: Callable, split: Split) -> torch.Tensor:
        """Of the classes, (n, classes) float32."""
        model.eval()
        with torch.inference_mode():
            return torch.cat([
                forward(normalise(images, self.mean, self.std)).float().softmax(1)
                for images in bar(split.images.split(256), desc='evaluating', unit='batch')])

    def end_epoch(self, test: Split) -> None:
        """Evaluate, and write down the epoch."""
        loss, error = (self.sums / self.steps).tolist()
        row = dict(epoch=len(self.history) + 1, lr=self.rate, train_loss=loss, train_error=100 * error)
        models = dict(test=(self.model, self.forward))
        if self.ema is not None:
            models['ema'] = (self.ema.module, self.ema.module)
        for name, (model, forward) in models.items():
            with self.autocast():
                loss, error = evaluate(self.probabilities(model, forward, test), test.labels)
            row.update({f'{name}_loss': loss, f'{name}_error': error})
        self.history.append(row)
        self.sums.zero_()

    def state(self) -> Dict[str, Any]:
        """Tensors and plain values, under timm's names where timm has some."""
        device = self.args.device
        return dict(
            arch=self.args.model, settings=settings(self.args), epochs=self.args.epochs, step=self.step,
            state_dict=self.model.state_dict(), optimizer=self.optimizer.state_dict(),
            scheduler=self.scheduler.state_dict(), scaler=self.scaler.state_dict(), sums=self.sums,
            **(dict(state_dict_ema=self.ema.module.state_dict()) if self.ema is not None else {}),
            rng=torch.get_rng_state(), rng_augment=self.generator.get_state(),
            **(dict(rng_cuda=torch.cuda.get_rng_state(device)) if device.startswith('cuda') else {}),
            history=self.history, rate=self.rate, seconds=self.seconds, commits=self.commits)

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
        self.commits = list(dict.fromkeys(state['commits'] + self.commits))


def settings(args: argparse.Namespace) -> Dict[str, Any]:
    chosen = {name: getattr(args, name) for name in SETTINGS}
    if args.minutes is not None:
        chosen['epochs'] = None  # found by a measurement
    return dict(chosen, device=args.device.split(':')[0])


def evaluate(probs: torch.Tensor, labels: torch.Tensor) -> Tuple[float, float]:
    """Cross-entropy and error in percent."""
    loss = F.nll_loss(probs.double().clamp_min(1e-45).log(), labels).item()
    return loss, 100 * (probs.argmax(1) != labels).double().mean().item()


def epochs_within(args: argparse.Namespace, train: Split, test: Split, num_classes: int) -> int:
    """How many epochs fit into args.minutes, evaluation included, by the speed of a few steps that are thrown away."""
    run = Run(argparse.Namespace(**{**vars(args), 'epochs': 12 * args.cycles}), num_classes, len(train.labels))
    part = Split(*(t[:256] for t in test))

    def seconds(work: Callable[[], Any], times: int) -> float:
        start = time.perf_counter()
        for _ in range(times):
            work()
        run.sums.tolist()  # waits for the device
        return (time.perf_counter() - start) / times

    def step() -> None:
        run.train_step(*(t[:args.batch_size] for t in train))

    def predict() -> None:
        with run.autocast():
            run.probabilities(run.model, run.forward, part)

    seconds(step, 3)
    seconds(predict, 1)
    epoch = seconds(step, 10) * run.steps + seconds(predict, 2) * len(test.labels) / len(part.labels)
    epochs = int(args.minutes * 60 / epoch)
    if args.schedule == 'snapshot':
        epochs -= epochs % args.cycles
    print(f'{epoch:.1f} s per epoch, {epochs} epochs in {args.minutes:g} minutes')
    if epochs == 0 or schedule_problem(args.schedule, epochs, args.cycles):
        raise SystemExit(
            f'--minutes {args.minutes:g} is not enough for --schedule {args.schedule}: '
            f'an epoch takes {epoch / 60:.2f} minutes')
    return epochs


def train(run: Run, train: Split, test: Split) -> bool:
    """Train to the end, or to --pause-after; True if to the end."""
    args, output = run.args, run.args.output
    start, before = time.perf_counter(), run.seconds
    saved = start

    def check() -> None:
        if not math.isfinite(run.sums[0].item()):
            raise SystemExit(
                f'the loss is not finite in epoch {len(run.history) + 1}; {output / "last.pth.tar"}, where there is '
                'one, is from before. A lower --lr may help.')

    def save() -> None:
        nonlocal saved
        check()
        saved = time.perf_counter()
        run.seconds = before + saved - start
        with replacing(output / 'last.pth.tar') as path:
            torch.save(run.state(), path)

    while not run.done:
        epoch = len(run.history)
        order = run.order(epoch)
        with bar(total=run.steps, initial=run.step - epoch * run.steps, unit='step',
                  desc=f'epoch {epoch + 1}/{args.epochs}') as progress:
            while run.step < (epoch + 1) * run.steps:
                i = run.step - epoch * run.steps
                run.train_step(*(t[order[i]] for t in train))
                progress.update()
                if (i + 1) % 10 == 0:
                    progress.set_postfix(loss=f'{run.sums[0].item() / (i + 1):.3f}')
                now = time.perf_counter()
                if now - start > 60 * args.pause_after:
                    save()
                    return False
                if now - saved > 60 * args.checkpoint_minutes and i + 1 < run.steps:
                    save()
        check()
        if args.schedule == 'snapshot' and (epoch + 1) % (args.epochs // args.cycles) == 0:
            save_weights(run.model, snapshot_path(output, (epoch + 1) * args.cycles // args.epochs))
        run.end_epoch(test)
        run.history[-1]['minutes'] = (before + time.perf_counter() - start) / 60
        if run.done or time.perf_counter() - saved > 60 * args.checkpoint_minutes:
            save()
        report(run)
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
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def save_weights(model: nn.Module, path: Path) -> None:
    tensors = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    with replacing(path) as part:
        safetensors.torch.save_file(tensors, part, metadata=dict(format='pt'))


def snapshot_path(output: Path, cycle: int) -> Path:
    return output / f'snapshot_{cycle}.safetensors'


def write_csv(path: Path, rows: List[Row]) -> None:
    with replacing(path) as part, open(part, 'w', newline='') as f:
        writer = csv.DictWriter(f, list(rows[0]), lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)


def report(run: Run) -> None:
    """metrics.csv and curves.png, of all epochs so far."""
    if run.history:
        write_csv(run.args.output / 'metrics.csv', run.history)
        draw_curves({run.args.model: run.history}, run.args.output / 'curves.png')


def draw_curves(runs: Dict[str, List[Row]], path: Path) -> None:
    """Loss and error of one or several runs over their epochs, the training images' dashed."""
    fig, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout='constrained')
    for ax, kind, label in zip(axes, ('loss', 'error'), ('cross-entropy', 'error (%)'), strict=True):
        for i, (name, rows) in enumerate(runs.items()):
            for split, style in (('train', '--'), ('test', '-'), ('ema', ':')):
                if f'{split}_{kind}' in rows[0]:
                    ax.plot(
                        [int(r['epoch']) for r in rows], [float(r[f'{split}_{kind}']) for r in rows], style,
                        color=f'C{i}', marker='o' if len(rows) < 20 else None, markersize=3, label=f'{name}, {split}')
        ax.set(xlabel='epoch', ylabel=label)
        ax.grid(alpha=0.3)
    axes[1].legend()
    with replacing(path) as part:
        fig.savefig(part, dpi=110, format='png')
    plt.close(fig)


def finish(run: Run, test: Split, classes: List[str]) -> None:
    """Write the weights, evaluate the files as they are, in float32, and write the results down."""
    args, rows = run.args, []
    models = dict(model=run.model)
    if run.ema is not None:
        models['model_ema'] = run.ema.module
    for name, model in models.items():
        path = args.output / f'{name}.safetensors'
        save_weights(model, path)
        loss, error = evaluate(file_probabilities(run, path, test, len(classes)), test.labels)
        machine_row = machine(args)
        row = dict(
            model=args.model, weights='EMA' if name == 'model_ema' else 'raw', data=dataset_name(args),
            images=len(test.labels), recipe=recipe(args), epochs=args.epochs, seed=args.seed, error=round(error, 4),
            loss=round(loss, 5), minutes=round(run.history[-1]['minutes'], 1), hardware=machine_row.pop('hardware'),
            versions=', '.join(f'{k} {machine_row.pop(k)}' for k in ('torch', 'timm', 'timm_gunn', 'python')),
            commit=' '.join(run.commits), command=machine_row['command'], file=path.name,
            sha256=hashlib.sha256(path.read_bytes()).hexdigest())
        assert list(row) == RESULT_COLUMNS
        rows.append(row)
        print(f'{args.model}, {row["weights"]} weights, {args.epochs} epochs: {error:.2f} % error on '
              f'{len(test.labels)} images of {row["data"]}; {path}, sha256 {row["sha256"][:16]}')
    if args.results is not None:
        hashes = [row['sha256'] for row in rows]  # a run that was killed here does not add its rows twice
        write_csv(args.results, [row for row in read_results(args.results) if row['sha256'] not in hashes] + rows)
    if args.schedule == 'snapshot':
        write_csv(args.output / 'ensemble.csv', ensemble(run, test, len(classes)))
    write_csv(args.output / 'result.csv', rows)  # last: where it is, the run has ended


def read_results(path: Path) -> List[Row]:
    """Rows of a CSV of results, none if it is not there."""
    if not path.exists():
        return []
    with open(path, newline='') as f:
        reader = csv.DictReader(f)
        if reader.fieldnames != RESULT_COLUMNS:
            raise SystemExit(f'{path}: expected the columns {RESULT_COLUMNS}, got {reader.fieldnames}')
        return list(reader)


def file_probabilities(run: Run, path: Path, test: Split, num_classes: int) -> torch.Tensor:
    model = timm.create_model(run.args.model, num_classes=num_classes, **run.args.model_kwargs)
    model.load_state_dict(safetensors.torch.load_file(path))
    model.to(run.args.device, memory_format=torch.channels_last)
    return run.probabilities(model, model, test)


def ensemble(run: Run, test: Split, num_classes: int) -> List[Row]:
    """Errors of the last m snapshots, their probabilities averaged, for m = 1 to all (Huang et al. 2017, Section 3)."""
    rows, total = [], torch.zeros((), device=run.args.device)
    for m in range(1, run.args.cycles + 1):
        cycle = run.args.cycles + 1 - m
        probs = file_probabilities(run, snapshot_path(run.args.output, cycle), test, num_classes)
        total = total + probs
        _, single = evaluate(probs, test.labels)
        loss, error = evaluate(total / m, test.labels)
        rows.append(dict(m=m, snapshot=cycle, snapshot_error=single, ensemble_error=error, ensemble_loss=loss))
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
    return ', '.join(parts)


def commit() -> str:
    """Of this file, marked if something has been changed since."""
    result = subprocess.run(
        ['git', 'describe', '--always', '--dirty', '--abbrev=12', '--exclude=*'], cwd=Path(__file__).parent,
        capture_output=True, text=True)
    return result.stdout.strip() or 'unknown'


def main(argv: Optional[List[str]] = None) -> None:
    args = parse_args(argv)
    if args.results is not None:
        read_results(args.results)  # what is wrong with it had better be said before the training
    args.output.mkdir(parents=True, exist_ok=True)
    checkpoint = args.output / 'last.pth.tar'
    state = None
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location='cpu', weights_only=True)
        changed = {k: (v, settings(args)[k]) for k, v in state['settings'].items() if v != settings(args)[k]}
        if changed:
            changes = ', '.join(f'{k} {old} (now {new})' for k, (old, new) in changed.items())
            raise SystemExit(f'{checkpoint} is of a run with {changes}; expected the same settings or another --output')
        args.epochs = state['epochs']
    train_split, test_split, classes = load_data(args)
    if args.epochs is None:
        args.epochs = epochs_within(args, train_split, test_split, len(classes))

    run = Run(args, len(classes), len(train_split.labels))
    if state is not None:
        run.restore(state)
        report(run)
        print(f'going on after {run.step} of {args.epochs * run.steps} steps')
    print(f'{args.model}: {sum(p.numel() for p in run.model.parameters()):,} parameters, {len(classes)} classes, '
          f'{len(train_split.labels)} training images, {args.epochs} epochs of {run.steps} steps')
    if train(run, train_split, test_split):
        finish(run, test_split, classes)
    else:
        print(f'paused after {run.step} of {args.epochs * run.steps} steps; the same command goes on')


if __name__ == '__main__':
    main()
