"""Train GUNN on CIFAR by the paper's recipe, and any other timm model beside it.

    python examples/train_cifar.py --data-dir data --dataset cifar10 --download        # the paper: 300 epochs
    python examples/train_cifar.py --data-dir data --dataset cifar100 --download --model gunn15.c100
    python examples/train_cifar.py --data-dir cifar10 --model sunn15 --epochs 3 --schedule onecycle
    python examples/train_cifar.py --data-dir cifar10 --schedule snapshot --cycles 6   # Snapshot Ensemble

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
images alone. The options are in cifar_options.py, data and augmentation in cifar_data.py, what a run leaves behind in
cifar_results.py.
"""
import argparse
import signal
import time
from contextlib import contextmanager, nullcontext
from types import FrameType
from typing import Any, Callable, ContextManager, Dict, Iterator, List, Optional, Tuple

import timm
import timm.data
import timm.utils
import torch
import torch.nn as nn
import torch.nn.functional as F
from cifar_data import Data, Split, augment, load_data, normalise
from cifar_options import parse_args
from cifar_results import evaluate, finish, origin, read_results, report, snapshot_path
from common import Row, bar, locked, replacing, save_weights
from torch.optim import lr_scheduler

# What a run may not change when it goes on, besides its data.
SETTINGS = (
    'model', 'model_kwargs', 'held_out', 'dtype', 'epochs', 'batch_size', 'lr', 'weight_decay', 'momentum', 'schedule',
    'cycles', 'smoothing', 'ema', 'shift', 'seed')


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
            nesterov=args.momentum > 0, weight_decay=args.weight_decay,
            # Where GradScaler skips the first step, a fused optimizer goes on with an uninitialised momentum.
            fused=args.device.startswith('cuda') and args.dtype != 'float16')
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
    return dict(chosen, device=args.device.split(':')[0], data=data.fingerprint)


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


def main(argv: Optional[List[str]] = None) -> None:
    args = parse_args(argv, __doc__)
    if args.results is not None:
        read_results(args.results)  # what is wrong with it had better be said before the training
        args.results.parent.mkdir(parents=True, exist_ok=True)
    torch.backends.cudnn.benchmark = True
    data = load_data(args)
    args.output.mkdir(parents=True, exist_ok=True)
    with locked(args.output / '.lock', wait=False):
        state = load_checkpoint(args, data)
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


if __name__ == '__main__':
    main()
