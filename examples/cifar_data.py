"""The images of train_cifar.py, on the device as a whole, and their augmentation there."""
import argparse
import hashlib
from pathlib import Path
from typing import List, NamedTuple, Tuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.datasets
from common import bar


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
