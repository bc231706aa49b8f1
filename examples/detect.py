"""Detection with GUNN-18 as the backbone of torchvision's Faster R-CNN and RetinaNet, beside SUNN-18 and ResNet-50.

    pip install '.[downstream]'
    python examples/detect.py
    python examples/detect.py --models gunn18 --detectors retinanet --steps 2000 --device cuda
    python examples/detect.py --tiny-imagenet tiny-imagenet-200 --device cuda   # four classes of it, or --wnids ...

As detectors are trained: the backbone is pretrained as a classifier (here briefly, to say which objects a scene holds),
its norms are frozen, and the whole is fine-tuned at batch size 2, on objects drawn on photographs
(examples/drawn_scenes.py), or on images and boxes of Tiny ImageNet. Reports COCO's mean average precision on held-out
scenes. Writes output/detect/results.csv, the backbones' weights, and a picture with boxes per detector.
"""
import argparse
from collections import OrderedDict
from pathlib import Path
from typing import Callable, Dict, List, Optional, Sequence

import matplotlib.pyplot as plt
import timm
import timm.layers
import torch
import torch.nn.functional as F
import torchvision
from common import machine, save_weights, write_csv
from drawn_scenes import (
    CLASSES,
    COLORS,
    Scene,
    add_arguments,
    check_arguments,
    draw_grid,
    fit,
    images_of,
    load_scenes,
    tiny_imagenet_scenes,
    to_tensor,
)
from torchmetrics.detection import MeanAveragePrecision
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

STEPS = dict(faster_rcnn=400, retinanet=1200)  # the latter begins slowly


class TimmFPN(torch.nn.Module):
    """A feature pyramid on the maps of any timm model, as torchvision's detectors take it; frozen norms."""

    def __init__(self, backbone: str, weights: Path, retina: bool):
        super().__init__()
        # Strides 4 to 32 for Faster R-CNN, 8 to 32 for RetinaNet. `file` takes the checkpoints of timm's train.py, too.
        body = timm.create_model(
            backbone, features_only=True, out_indices=(2, 3, 4) if retina else (1, 2, 3, 4), pretrained=True,
            pretrained_cfg_overlay=dict(file=str(weights)))
        self.body = timm.layers.freeze_batch_norm_2d(body)
        self.out_channels = 256
        extra = LastLevelP6P7(256, 256) if retina else LastLevelMaxPool()
        self.fpn = FeaturePyramidNetwork(body.feature_info.channels(), 256, extra)

    def forward(self, x: torch.Tensor) -> Dict[str, torch.Tensor]:
        return self.fpn(OrderedDict((str(i), fmap) for i, fmap in enumerate(self.body(x))))


def build(detector: str, backbone: str, weights: Path, args: argparse.Namespace) -> torch.nn.Module:
    retina = detector == 'retinanet'
    # Drawn objects are a fifth to two fifths of the scene, or less where partly hidden, those of Tiny ImageNet anything
    # up to all of it: anchors for all of that on each map.
    scales = (0.3, 0.55, 0.85) if args.tiny_imagenet else (0.15, 0.22, 0.33)
    anchors = AnchorGenerator((tuple(round(args.size * s) for s in scales),) * 5, ((0.5, 1.0, 2.0),) * 5)
    # A scene holds four objects at most: 64 proposals of it do, torchvision's 512 take three times as long a step.
    options = dict(anchor_generator=anchors) if retina else dict(
        rpn_anchor_generator=anchors, box_batch_size_per_image=64)
    return (RetinaNet if retina else FasterRCNN)(
        TimmFPN(backbone, weights, retina), len(args.classes), min_size=args.size, max_size=args.size,
        image_mean=[0.0] * 3, image_std=[1.0] * 3, **options)  # the scenes come normalised


def pretrain(backbone: str, path: Path, scenes: List[Scene], args: argparse.Namespace) -> None:
    """Train a classifier to say which objects a scene holds; write its weights."""
    torch.manual_seed(args.seed)
    model = timm.create_model(backbone, num_classes=len(args.classes) - 1)
    model.to(args.device, memory_format=torch.channels_last)
    images = images_of(scenes)
    present = torch.stack([F.one_hot(torch.from_numpy(s.labels), len(args.classes)).sum(0)[1:] > 0 for s in scenes])

    def loss_of(batch: torch.Tensor) -> torch.Tensor:
        logits = model(images[batch].to(args.device, memory_format=torch.channels_last))
        return F.binary_cross_entropy_with_logits(logits, present[batch].to(logits))

    fit(model, loss_of, len(scenes), 8, args.pretrain_steps, 1e-3, args.seed)
    save_weights(model, path)


def target(scene: Scene, device: str) -> Dict[str, torch.Tensor]:
    return dict(boxes=torch.from_numpy(scene.boxes).to(device), labels=torch.from_numpy(scene.labels).to(device))


def train(model: torch.nn.Module, scenes: List[Scene], steps: int, args: argparse.Namespace) -> float:
    """Fine-tune at batch size 2; returns minutes."""
    def loss_of(batch: torch.Tensor) -> torch.Tensor:
        chosen = [scenes[i] for i in batch]
        losses = model(
            [to_tensor(s.image).to(args.device) for s in chosen], [target(s, args.device) for s in chosen])
        return sum(losses.values())

    return fit(model, loss_of, len(scenes), 2, steps, args.lr, args.seed, clip=10.0)


@torch.no_grad()
def predict(model: torch.nn.Module, scenes: List[Scene], args: argparse.Namespace) -> List[Dict[str, torch.Tensor]]:
    """Boxes (n, 4) in pixels, labels (n,) and scores (n,) of each scene."""
    model.eval()
    return [{k: v.cpu() for k, v in model([to_tensor(s.image).to(args.device)])[0].items()} for s in scenes]


def average_precision(found: List[Dict[str, torch.Tensor]], scenes: List[Scene]) -> Dict[str, float]:
    """COCO's AP, AP50 and AP75, in percent."""
    metric = MeanAveragePrecision()
    metric.update(found, [target(s, 'cpu') for s in scenes])
    result = metric.compute()
    return {name: 100 * result[key].item() for name, key in (('ap', 'map'), ('ap50', 'map_50'), ('ap75', 'map_75'))}


def draw(
        path: Path,
        scenes: List[Scene],
        predictions: Dict[str, List[Dict[str, torch.Tensor]]],
        classes: Sequence[str],
) -> None:
    """Boxes that are scored 0.5 or more, below the truth."""
    def paint(found: List[Dict[str, torch.Tensor]]) -> Callable[[plt.Axes, int], None]:
        def fill(ax: plt.Axes, i: int) -> None:
            ax.imshow(scenes[i].image)
            for (x1, y1, x2, y2), label in zip(found[i]['boxes'].tolist(), found[i]['labels'], strict=True):
                ax.add_patch(plt.Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, color=COLORS[(label - 1) % 4 + 1]))
        return fill

    rows = {'truth': paint([target(s, 'cpu') for s in scenes])}
    for name, found in predictions.items():
        rows[name] = paint([{k: v[f['scores'] >= 0.5] for k, v in f.items()} for f in found])
    draw_grid(path, scenes, rows, legend=classes)


def parse_args(argv: Optional[List[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--models', nargs='+', default=['gunn18', 'sunn18', 'resnet50'],
                        help='timm models with features of strides 2 to 32')
    parser.add_argument('--detectors', nargs='+', default=['faster_rcnn', 'retinanet'],
                        choices=['faster_rcnn', 'retinanet'])
    parser.add_argument('--pretrain-steps', type=int, default=200)
    parser.add_argument('--tiny-imagenet', type=Path, metavar='DIR',
                        help='folder tiny-imagenet-200: its images and boxes in place of drawn scenes')
    parser.add_argument('--wnids', nargs='+', help='classes of Tiny ImageNet (default: the first four of wnids.txt)')
    add_arguments(parser, size=96, steps=STEPS, lr=2e-4, output='output/detect')
    args = parser.parse_args(argv)
    check_arguments(parser, args, args.models, batch_size=8)
    if args.pretrain_steps < 1:
        parser.error(f'expected --pretrain-steps >= 1, got {args.pretrain_steps}')
    args.classes = CLASSES
    if args.tiny_imagenet:
        try:
            known = (args.tiny_imagenet / 'wnids.txt').read_text().split()
        except OSError as e:
            parser.error(f'expected --tiny-imagenet to be the folder tiny-imagenet-200: {e}')
        args.wnids = args.wnids or known[:4]
        if not args.wnids or {*args.wnids} - {*known} or len({*args.wnids}) < len(args.wnids):
            parser.error(f'expected different --wnids out of {args.tiny_imagenet / "wnids.txt"}, got {args.wnids}')
        args.classes = ('background', *args.wnids)
    elif args.wnids:
        parser.error('--wnids needs --tiny-imagenet')
    return args


def main(argv: Optional[List[str]] = None) -> None:
    args = parse_args(argv)
    if args.tiny_imagenet:
        try:
            scenes, held_out = (
                tiny_imagenet_scenes(args.tiny_imagenet, args.wnids, n, args.size, held, args.seed)
                for n, held in ((args.train_scenes, False), (args.held_out, True)))
        except OSError as e:
            raise SystemExit(f'expected --tiny-imagenet to be the folder tiny-imagenet-200: {e}') from e
    else:
        scenes, held_out = load_scenes(args)
    if len(scenes) < 8 or not held_out:
        raise SystemExit(f'expected at least 8 training images and 1 held out, got {len(scenes)} and {len(held_out)}')
    args.output.mkdir(parents=True, exist_ok=True)
    for name in args.models:
        pretrain(name, args.output / f'{name}.safetensors', scenes, args)
    rows = []
    print('| detector | backbone | AP (%) | AP50 | AP75 | minutes |')
    print('|---|---|---|---|---|---|')
    for detector in args.detectors:
        predictions = {}
        for name in args.models:
            torch.manual_seed(args.seed)
            model = build(detector, name, args.output / f'{name}.safetensors', args).to(args.device)
            steps = STEPS[detector] if args.steps is STEPS else args.steps
            minutes = train(model, scenes, steps, args)
            found = predict(model, held_out, args)
            aps = average_precision(found, held_out)
            print(f'| {detector} | `{name}` | {" | ".join(f"{ap:.1f}" for ap in aps.values())} | {minutes:.1f} |',
                  flush=True)
            predictions[name] = found[:8]
            rows.append(dict(
                detector=detector, backbone=name, **aps, data='Tiny ImageNet' if args.tiny_imagenet else 'drawn',
                pretrain_steps=args.pretrain_steps, steps=steps, batch_size=2, size=args.size, seed=args.seed,
                minutes=minutes, torchvision=torchvision.__version__, **machine(args)))
            write_csv(args.output / 'results.csv', rows)  # after each, so that nothing is lost
        draw(args.output / f'{detector}.png', held_out[:8], predictions, args.classes)


if __name__ == '__main__':
    main()
