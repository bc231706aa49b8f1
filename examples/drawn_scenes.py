"""Small real-image sets for the examples of segmentation and detection: objects drawn on photographs.

The photographs are those that scikit-learn and matplotlib ship (a temple, a flower, a portrait). Training scenes have
their left three fifths behind them, held-out scenes their right two fifths. Objects are discs, squares, triangles and
stars, turned, filled with a colour and with texture from another place of the photographs; later ones hide earlier
ones. Each class has hues of its own, as things have, with overlaps where only the shape tells. What else those examples
share is here, too: the training loop, pictures and options.
"""
import argparse
import math
import time
from functools import lru_cache
from pathlib import Path
from typing import Callable, Dict, Iterator, List, NamedTuple, Sequence, Tuple, Union

import matplotlib

matplotlib.use('Agg')
import matplotlib.cbook
import matplotlib.pyplot as plt
import numpy as np
import timm
import torch
from common import check_device, replacing
from matplotlib.colors import hsv_to_rgb
from PIL import Image, ImageDraw
from sklearn.datasets import load_sample_images
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from tqdm import tqdm

CLASSES = ('background', 'disc', 'square', 'triangle', 'star')
COLORS = ('#000000', '#e63c3c', '#3cc85a', '#466ef0', '#f0d23c')


class Scene(NamedTuple):
    image: np.ndarray  # (size, size, 3), uint8
    mask: np.ndarray  # (size, size), uint8, index in CLASSES
    boxes: np.ndarray  # (n, 4), float32, x1 y1 x2 y2 in pixels around what is visible
    labels: np.ndarray  # (n,), int64, index in CLASSES, never 0


@lru_cache
def photographs(held_out: bool) -> List[np.ndarray]:
    with matplotlib.cbook.get_sample_data('grace_hopper.jpg') as f:
        portrait = np.asarray(Image.open(f).convert('RGB'))
    whole = [*load_sample_images().images, portrait]
    return [p[:, p.shape[1] * 3 // 5:] if held_out else p[:, :p.shape[1] * 3 // 5] for p in whole]


def crop(rng: np.random.Generator, size: int, held_out: bool) -> np.ndarray:
    """A random square of a photograph, of 0.75 to 1.5 times the size where there is room, brought to that size."""
    choice = photographs(held_out)
    photo = choice[rng.integers(len(choice))]
    side = min(round(size * rng.uniform(0.75, 1.5)), *photo.shape[:2])
    y, x = (rng.integers(s - side + 1) for s in photo.shape[:2])
    return np.asarray(Image.fromarray(photo[y:y + side, x:x + side]).resize((size, size), Image.Resampling.BILINEAR))


def outline(label: int, radius: float, turn: float) -> List[Tuple[float, float]]:
    """Corners of an object around (0, 0)."""
    corners, inner = {1: (64, 1.0), 2: (4, 1.0), 3: (3, 1.0), 4: (10, 0.45)}[label]
    return [(r * math.cos(a), r * math.sin(a)) for i in range(corners)
            for r, a in [(radius * (inner if i % 2 else 1), turn + 2 * math.pi * i / corners)]]


def make_scene(rng: np.random.Generator, size: int, held_out: bool) -> Scene:
    image = crop(rng, size, held_out).astype(np.float64)
    owner = np.zeros((size, size), np.int64)  # of each pixel: the object that is seen there, from 1
    areas, labels = [0], [0]
    for i in range(1, 1 + rng.integers(1, 5)):
        label = int(rng.integers(1, len(CLASSES)))
        radius = size * rng.uniform(0.1, 0.22)
        x, y = rng.uniform(radius / 2, size - radius / 2, 2)
        stencil = Image.new('1', (size, size))
        corners = outline(label, radius, rng.uniform(0, 2 * math.pi))
        ImageDraw.Draw(stencil).polygon([(x + a, y + b) for a, b in corners], fill=1)
        inside = np.asarray(stencil)
        hue = rng.normal(label / 4, 0.08) % 1
        color = 255 * hsv_to_rgb((hue, rng.uniform(0.4, 1), rng.uniform(0.4, 1)))
        image[inside] = 0.5 * crop(rng, size, held_out)[inside] + 0.5 * color
        owner[inside] = i
        areas.append(inside.sum())
        labels.append(label)

    boxes, kept = [], []
    for i in range(1, len(labels)):
        rows, columns = np.nonzero(owner == i)
        if len(rows) > 0.3 * areas[i]:
            boxes.append([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            kept.append(labels[i])
        # What is left of a hidden object stays in the mask: its pixels are what they are.
    return Scene(
        image.round().astype(np.uint8), np.asarray(labels, np.uint8)[owner],
        np.asarray(boxes, np.float32).reshape(-1, 4), np.asarray(kept, np.int64))


def make_scenes(n: int, size: int, held_out: bool, seed: int = 0) -> List[Scene]:
    """As many scenes of size x size pixels, the same ones on every machine; held-out ones have other backgrounds."""
    rng = np.random.default_rng([seed, held_out])
    return [make_scene(rng, size, held_out) for _ in range(n)]


def tiny_imagenet_boxes(folder: Path, wnids: List[str], held_out: bool) -> List[Tuple[Path, int, List[float]]]:
    """(image, class from 1, x1 y1 x2 y2) of the classes: val/ if held out, train/ otherwise. 64 pixels a side.

    Raises:
        FileNotFoundError: If the folder is not a Tiny ImageNet as it is distributed.
    """
    found = []
    if held_out:
        for line in (folder / 'val' / 'val_annotations.txt').read_text().splitlines():
            name, wnid, *box = line.split('\t')
            if wnid in wnids:
                found.append((folder / 'val' / 'images' / name, wnids.index(wnid) + 1, box))
    else:
        for label, wnid in enumerate(wnids, 1):
            for line in (folder / 'train' / wnid / f'{wnid}_boxes.txt').read_text().splitlines():
                name, *box = line.split('\t')
                found.append((folder / 'train' / wnid / 'images' / name, label, box))
    # The last column and row belong to the box in these files.
    return [(path, label, [float(a) + i // 2 for i, a in enumerate(box)]) for path, label, box in found]


def tiny_imagenet_scenes(
        folder: Path, wnids: List[str], n: int, size: int, held_out: bool, seed: int = 0) -> List[Scene]:
    """As many images of these classes as there are, n at most, brought to size x size pixels; the masks are empty."""
    found = tiny_imagenet_boxes(folder, wnids, held_out)
    scenes = []
    for i in np.random.default_rng(seed).permutation(len(found))[:n]:
        path, label, box = found[i]
        with Image.open(path) as image:
            pixels = np.array(image.convert('RGB').resize((size, size), Image.Resampling.BICUBIC))
        scenes.append(Scene(pixels, np.zeros((size, size), np.uint8), np.asarray([box], np.float32) * (size / 64),
                            np.asarray([label])))
    return scenes


def to_tensor(image: np.ndarray) -> torch.Tensor:
    """(3, H, W), float32, normalised with timm's ImageNet statistics."""
    mean, std = (torch.tensor(t)[:, None, None] for t in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    return (torch.from_numpy(image).permute(2, 0, 1) / 255 - mean) / std


def images_of(scenes: Sequence[Scene]) -> torch.Tensor:
    """(n, 3, H, W), as to_tensor gives them."""
    return torch.stack([to_tensor(s.image) for s in scenes])


def masks_of(scenes: Sequence[Scene]) -> torch.Tensor:
    """(n, H, W), int64."""
    return torch.stack([torch.from_numpy(s.mask).long() for s in scenes])


@torch.no_grad()
def predict_masks(
        logits_of: Callable[[torch.Tensor], torch.Tensor], scenes: Sequence[Scene], device: str) -> torch.Tensor:
    """Classes (n, H, W), from what gives logits (B, classes, H, W) of images."""
    return torch.cat([
        logits_of(images.to(device, memory_format=torch.channels_last)).argmax(1).cpu()
        for images in images_of(scenes).split(16)])


def load_scenes(args: argparse.Namespace) -> Tuple[List[Scene], List[Scene]]:
    """Training scenes and held-out scenes."""
    return (make_scenes(args.train_scenes, args.size, held_out=False, seed=args.seed),
            make_scenes(args.held_out, args.size, held_out=True, seed=args.seed))


def batches(n: int, batch_size: int, steps: int, seed: int = 0) -> Iterator[torch.Tensor]:
    """Indices of `steps` batches, epoch after epoch in random order, incomplete batches left out."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(math.ceil(steps / (n // batch_size))):
        for batch in torch.randperm(n, generator=generator).split(batch_size)[:n // batch_size]:
            if steps:
                steps -= 1
                yield batch


def fit(
        model: torch.nn.Module,
        loss_of: Callable[[torch.Tensor], torch.Tensor],
        n: int,
        batch_size: int,
        steps: int,
        lr: float,
        seed: int,
        clip: float = math.inf,
) -> float:
    """Train with AdamW under a one-cycle schedule; returns minutes.

    Args:
        model: Model to train.
        loss_of: Loss of the scenes of a batch of indices below n.
        n: Number of scenes.
        batch_size: Scenes per step.
        steps: Number of steps.
        lr: Highest learning rate.
        seed: Seed of the order of the scenes.
        clip: Largest norm of all gradients together.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps)
    model.train()
    start = time.monotonic()
    with tqdm(batches(n, batch_size, steps, seed), total=steps, unit='step', disable=None) as progress:
        for batch in progress:
            loss = loss_of(batch)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            schedule.step()
            progress.set_postfix(loss=f'{loss.item():.3f}')
    return (time.monotonic() - start) / 60


def intersection_over_union(predicted: torch.Tensor, scenes: List[Scene]) -> List[float]:
    """Of each class, over the pixels of all scenes together; NaN for a class that is neither there nor predicted."""
    n = len(CLASSES)
    confusion = torch.bincount((masks_of(scenes) * n + predicted).flatten(), minlength=n * n).view(n, n).double()
    both = confusion.diagonal()
    return (both / (confusion.sum(0) + confusion.sum(1) - both)).tolist()


def draw_grid(
        path: Path,
        scenes: List[Scene],
        rows: Dict[str, Callable[[plt.Axes, int], None]],
        legend: Sequence[str] = (),
) -> None:
    """A picture with a column per scene and a row per name, filled by rows[name](axes, number of the scene)."""
    fig, axes = plt.subplots(
        len(rows), len(scenes), figsize=(1.5 * len(scenes), 1.5 * len(rows)), squeeze=False)
    for row, (name, fill) in zip(axes, rows.items(), strict=True):
        for i, ax in enumerate(row):
            fill(ax, i)
            ax.set(xticks=[], yticks=[])
        row[0].set_ylabel(name)
    if legend:
        lines = [plt.Line2D([], [], color=COLORS[i % 4 + 1], label=name) for i, name in enumerate(legend[1:])]
        fig.legend(handles=lines, ncols=len(lines), loc='upper center', fontsize='small')
    fig.tight_layout(pad=0.3, rect=(0, 0, 1, 0.95) if legend else None)
    with replacing(path) as part:
        fig.savefig(part, dpi=80, format='png')
    plt.close(fig)


def add_arguments(
        parser: argparse.ArgumentParser, size: int, steps: Union[int, Dict[str, int]], lr: float, output: str) -> None:
    """Options that the examples on scenes have in common; `steps` may differ by what is trained."""
    parser.add_argument('--size', type=int, default=size, help='side of the scenes, in pixels')
    parser.add_argument('--steps', type=int, default=steps, help='(default: %(default)s)')
    parser.add_argument('--lr', type=float, default=lr)
    parser.add_argument('--train-scenes', type=int, default=800)
    parser.add_argument('--held-out', type=int, default=200, help='number of held-out scenes')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--output', type=Path, default=Path(output))


def check_arguments(
        parser: argparse.ArgumentParser, args: argparse.Namespace, models: List[str], batch_size: int) -> None:
    """An error of the parser if they do not make sense together."""
    for name in models:
        if not timm.is_model(name):
            parser.error(f'expected names of timm models, got {name}')
        reduction = timm.create_model(name, features_only=True, device='meta').feature_info.reduction()
        if reduction != [2, 4, 8, 16, 32]:
            parser.error(f'expected a model with features of strides 2, 4, 8, 16 and 32, got {name} with {reduction}')
    if args.size < 64 or args.size % 32:
        parser.error(f'expected --size to be a multiple of 32 from 64, got {args.size}')
    if (isinstance(args.steps, int) and args.steps < 1) or args.held_out < 1 or batch_size < 2:
        parser.error('expected --steps and --held-out >= 1 and batches of 2 scenes or more, got '
                     f'{args.steps}, {args.held_out} and {batch_size}')
    if not args.lr > 0 or args.seed < 0:
        parser.error(f'expected --lr > 0 and --seed >= 0, got {args.lr} and {args.seed}')
    check_device(parser, args.device)
    if args.train_scenes < batch_size:
        parser.error(f'expected at least one batch of {batch_size} scenes, got --train-scenes {args.train_scenes}')
