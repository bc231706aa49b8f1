"""Segmentation with GUNN-18 as the backbone of segmentation_models_pytorch, beside SUNN-18 and ResNet-50.

    pip install '.[downstream]'
    python examples/segment.py
    python examples/segment.py --models gunn18 --archs DeepLabV3Plus --steps 1000 --device cuda

Trains each backbone under each architecture with one recipe, on objects drawn on photographs
(examples/drawn_scenes.py): from scratch, or from its weights if the name has a tag (gunn18.tiny_in). Reports the mean
intersection over union of the five classes on held-out scenes. Writes output/segment/results.csv and a picture of
predictions per architecture. DeepLabV3+ runs at output stride 16, with rates for small images.
"""
import argparse
from pathlib import Path
from typing import Callable, Dict, List, Optional, Sequence

import matplotlib.pyplot as plt
import numpy as np
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from common import machine, write_csv
from drawn_scenes import (
    CLASSES,
    COLORS,
    Scene,
    add_arguments,
    check_arguments,
    draw_grid,
    fit,
    images_of,
    intersection_over_union,
    load_scenes,
    masks_of,
    predict_masks,
)
from matplotlib.colors import ListedColormap

# The map of 64 pixels is one of 4 x 4 there: the usual rates of 12, 24 and 36 would reach beyond it.
OPTIONS = {'DeepLabV3Plus': dict(encoder_output_stride=16, decoder_atrous_rates=(1, 2, 3))}


def build(arch: str, backbone: str) -> torch.nn.Module:
    """The one line that a user writes; 'tu-' is segmentation_models_pytorch's prefix for any timm model."""
    return smp.create_model(
        arch, encoder_name=f'tu-{backbone}', encoder_weights=True if '.' in backbone else None,
        classes=len(CLASSES), **OPTIONS.get(arch, {}))


def train(model: torch.nn.Module, scenes: List[Scene], args: argparse.Namespace) -> float:
    """Train by cross entropy and Dice loss; returns minutes."""
    images = images_of(scenes).to(args.device, memory_format=torch.channels_last)
    masks = masks_of(scenes).to(args.device)
    dice = smp.losses.DiceLoss('multiclass')

    def loss_of(batch: torch.Tensor) -> torch.Tensor:
        logits = model(images[batch])
        return F.cross_entropy(logits, masks[batch]) + dice(logits, masks[batch])

    return fit(model, loss_of, len(scenes), args.batch_size, args.steps, args.lr, args.seed)


def draw(path: Path, scenes: List[Scene], predictions: Dict[str, torch.Tensor]) -> None:
    def paint(masks: Sequence[np.ndarray]) -> Callable[[plt.Axes, int], None]:
        return lambda ax, i: ax.imshow(masks[i], cmap=ListedColormap(COLORS), vmin=0, vmax=len(COLORS) - 1)

    draw_grid(path, scenes, {
        'image': lambda ax, i: ax.imshow(scenes[i].image), 'truth': paint([s.mask for s in scenes]),
        **{name: paint(masks.numpy()) for name, masks in predictions.items()}})


def parse_args(argv: Optional[List[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--models', nargs='+', default=['gunn18', 'sunn18', 'resnet50'],
                        help='timm models with features of strides 2 to 32')
    parser.add_argument('--archs', nargs='+', default=['Unet', 'DeepLabV3Plus'], help='of segmentation_models_pytorch')
    parser.add_argument('--batch-size', type=int, default=8)
    add_arguments(parser, size=64, steps=400, lr=1e-3, output='output/segment')
    args = parser.parse_args(argv)
    known = [cls.__name__ for cls in smp.MODEL_ARCHITECTURES_MAPPING.values()]
    unknown = [arch for arch in args.archs if arch not in known]
    if unknown:
        parser.error(f'expected --archs among {", ".join(known)}, got {unknown[0]}')
    check_arguments(parser, args, args.models, args.batch_size)
    return args


def main(argv: Optional[List[str]] = None) -> None:
    args = parse_args(argv)
    scenes, held_out = load_scenes(args)
    args.output.mkdir(parents=True, exist_ok=True)
    rows = []
    print(f'| architecture | backbone | mIoU (%) | {" | ".join(CLASSES)} | minutes |')
    print('|---|---|---|' + '---|' * len(CLASSES) + '---|')
    for arch in args.archs:
        predictions = {}
        for name in args.models:
            torch.manual_seed(args.seed)
            model = build(arch, name).to(args.device, memory_format=torch.channels_last)
            minutes = train(model, scenes, args)
            predicted = predict_masks(model.eval(), held_out, args.device)
            ious = [100 * iou for iou in intersection_over_union(predicted, held_out)]
            mean = float(np.nanmean(ious))
            print(f'| {arch} | `{name}` | {mean:.1f} | {" | ".join(f"{i:.1f}" for i in ious)} | {minutes:.1f} |',
                  flush=True)
            predictions[name] = predicted[:8]
            rows.append(dict(
                architecture=arch, backbone=name, miou=mean, **dict(zip(CLASSES, ious, strict=True)), steps=args.steps,
                batch_size=args.batch_size, size=args.size, seed=args.seed, minutes=minutes,
                segmentation_models_pytorch=smp.__version__, **machine(args)))
            write_csv(args.output / 'results.csv', rows)  # after each, so that nothing is lost
        draw(args.output / f'{arch.lower()}.png', held_out[:8], predictions)


if __name__ == '__main__':
    main()
