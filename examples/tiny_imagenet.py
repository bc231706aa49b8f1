"""Arrange Tiny ImageNet as the image folder that timm's scripts read.

    python examples/tiny_imagenet.py tiny-imagenet-200 tiny-imagenet

The data set (200 classes, 100,000 training and 10,000 validation images of 64x64 pixels) comes with its training images
in train/<wnid>/images and its validation images in one folder, with their classes in val/val_annotations.txt. The new
folder has train/<wnid>/* and val/<wnid>/*: hard links, or copies where the file system has no such links.
"""
import argparse
import os
import shutil
from pathlib import Path

from tqdm import tqdm


def place(image: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    try:
        os.link(image, folder / image.name)
    except OSError:
        shutil.copyfile(image, folder / image.name)


def arrange(source: Path, target: Path) -> None:
    """Raises SystemExit if source is not complete or target exists, and leaves no part of it behind then."""
    annotations = source / 'val' / 'val_annotations.txt'
    train = sorted(source.glob('train/*/images/*.JPEG'))
    if not annotations.is_file() or not train:
        raise SystemExit(f'{source}: expected train/<wnid>/images/*.JPEG and val/val_annotations.txt')
    if target.exists():
        raise SystemExit(f'{target} exists; expected a new folder')
    # name, wnid, box: tab-separated
    val = [line.split('\t')[:2] for line in annotations.read_text().splitlines()]
    if missing := [name for name, _ in val if not (source / 'val' / 'images' / name).is_file()]:
        raise SystemExit(f'{source}/val/images: {len(missing)} of {len(val)} images are missing, {missing[0]} for one')
    part = target.with_name(target.name + '.part')
    shutil.rmtree(part, ignore_errors=True)
    try:
        for image in tqdm(train, desc='train', unit='image', disable=None):
            place(image, part / 'train' / image.parent.parent.name)
        for name, wnid in tqdm(val, desc='val', unit='image', disable=None):
            place(source / 'val' / 'images' / name, part / 'val' / wnid)
        part.replace(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    print(f'{target}: {len(train)} training and {len(val)} validation images')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('source', type=Path)
    parser.add_argument('target', type=Path)
    args = parser.parse_args()
    arrange(args.source, args.target)


if __name__ == '__main__':
    main()
