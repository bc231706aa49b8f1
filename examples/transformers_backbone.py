"""GUNN in Hugging Face transformers: as the backbone of UperNet or DETR, and as an image classifier from a folder.

    pip install '.[downstream]'
    python examples/transformers_backbone.py

Trains UperNet with GUNN-18 as its TimmBackbone to segment objects drawn on photographs (examples/shapes.py), from
scratch, reports the mean intersection over union on held-out scenes, and loads what it saved again. Then writes the
pretrained GUNN-15 as a folder in the Hub's format, and lets TimmWrapperForImageClassification name photographs with it.

Two things are worked around here. transformers 5.23 sets the running statistics of every BatchNorm of a TimmBackbone
to 0 and 1, those of pretrained networks (any of timm's) as well: `restore` puts them back. And the config.json of timm
1.0.31 states num_classes twice, on which TimmWrapperForImageClassification stumbles: `export` leaves one out.
"""
import argparse
import json
from pathlib import Path
from typing import List, Optional

import timm
import timm.models
import torch
from PIL import Image
from quickstart import CIFAR10, PHOTOGRAPHS
from segment import intersection_over_union
from shapes import CLASSES, Scene, batches, make_scenes, to_tensor
from tqdm import tqdm
from transformers import (
    AutoImageProcessor,
    DetrConfig,
    DetrForObjectDetection,
    TimmBackboneConfig,
    TimmWrapperForImageClassification,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)


def restore(model: torch.nn.Module, weights: Optional[Path] = None) -> None:
    """Give the timm part of a transformers model the parameters and statistics that timm gives it.

    Args:
        model: Model with a TimmBackbone somewhere in it, its norms frozen by transformers or not.
        weights: Weights of the backbone, such as a checkpoint of timm's train.py; None for the pretrained ones or, if
            there are none, fresh ones.
    """
    body = next(m for m in model.modules() if isinstance(m, timm.models.FeatureListNet))
    name = body.pretrained_cfg['architecture']
    overlay = dict(file=str(weights)) if weights else None
    state = timm.create_model(
        name, features_only=True, pretrained=bool(weights) or timm.is_model_pretrained(name),
        pretrained_cfg_overlay=overlay, out_indices=body.feature_info.out_indices).state_dict()
    body.load_state_dict(state)


def upernet(backbone: str, classes: int, **kwargs) -> UperNetForSemanticSegmentation:
    channels = timm.create_model(backbone, features_only=True, device='meta').feature_info.channels()
    model = UperNetForSemanticSegmentation(UperNetConfig(
        backbone_config=TimmBackboneConfig(
            backbone=backbone, use_pretrained_backbone=False, out_indices=list(range(len(channels)))[-4:]),
        auxiliary_in_channels=channels[-2], num_labels=classes, **kwargs))
    restore(model)
    return model


def detr(backbone: str, classes: int, **kwargs) -> DetrForObjectDetection:
    """DETR, whose frozen norms keep the statistics that they are given: a backbone should come with weights."""
    last = len(timm.create_model(backbone, features_only=True, device='meta').feature_info.channels()) - 1
    model = DetrForObjectDetection(DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, num_labels=classes,
        backbone_config=TimmBackboneConfig(backbone=backbone, use_pretrained_backbone=False, out_indices=[last]),
        **kwargs))
    restore(model)
    return model


def train(model: UperNetForSemanticSegmentation, scenes: List[Scene], args: argparse.Namespace) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=args.lr, total_steps=args.steps)
    model.train()
    progress = tqdm(batches(len(scenes), args.batch_size, args.steps), total=args.steps, disable=None)
    for batch in progress:
        images = torch.stack([to_tensor(scenes[i].image) for i in batch])
        masks = torch.stack([torch.from_numpy(scenes[i].mask).long() for i in batch])
        loss = model(images.to(args.device), labels=masks.to(args.device)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f'{loss.item():.3f}')


@torch.no_grad()
def predict(model: UperNetForSemanticSegmentation, scenes: List[Scene], device: str) -> torch.Tensor:
    """Classes (n, H, W)."""
    images = torch.stack([to_tensor(s.image) for s in scenes])
    return torch.cat([model.eval().to(device)(b.to(device)).logits.argmax(1).cpu() for b in images.split(16)])


def export(model: torch.nn.Module, folder: Path) -> None:
    """Write a timm model as a folder in the Hub's format that transformers can read as well."""
    timm.models.save_for_hf(model, folder, safe_serialization=True)
    path = folder / 'config.json'
    config = json.loads(path.read_text())
    config.get('model_args', {}).pop('num_classes', None)  # it stands beside the arguments
    path.write_text(json.dumps(config, indent=2))


def classify(folder: Path) -> int:
    """How many of the photographs in examples/cifar10 are named rightly by the classifier in a folder."""
    model = TimmWrapperForImageClassification.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    files = sorted(PHOTOGRAPHS.glob('*.jpg'))
    with torch.no_grad():
        predicted = model(**processor([Image.open(f).convert('RGB') for f in files])).logits.argmax(1)
    return sum(CIFAR10[p] == f.stem.rstrip('0123456789') for p, f in zip(predicted, files, strict=True))


def main(argv: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', default='gunn18', help='backbone, any timm model with features of strides 2 to 32')
    parser.add_argument('--size', type=int, default=128, help='side of the scenes, in pixels')
    parser.add_argument('--steps', type=int, default=300)
    parser.add_argument('--batch-size', type=int, default=8)
    parser.add_argument('--lr', type=float, default=1e-3)
    parser.add_argument('--train-scenes', type=int, default=800)
    parser.add_argument('--held-out', type=int, default=200, help='number of held-out scenes')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--output', type=Path, default=Path('output/transformers'))
    args = parser.parse_args(argv)
    if not timm.is_model(args.model):
        parser.error(f'expected the name of a timm model, got {args.model}')
    if args.steps < 1 or args.held_out < 1 or not 2 <= args.batch_size <= args.train_scenes:
        parser.error('expected --steps and --held-out >= 1 and 2 <= --batch-size <= --train-scenes, got '
                     f'{args.steps}, {args.held_out}, {args.batch_size} and {args.train_scenes}')
    if args.size < 64 or args.size % 32:
        parser.error(f'expected --size to be a multiple of 32 from 64, got {args.size}')

    torch.manual_seed(0)
    model = upernet(args.model, len(CLASSES), hidden_size=128, auxiliary_channels=64).to(args.device)
    train(model, make_scenes(args.train_scenes, args.size, held_out=False), args)
    held_out = make_scenes(args.held_out, args.size, held_out=True)
    predicted = predict(model, held_out, args.device)
    ious = intersection_over_union(predicted, held_out)
    print(f'UperNet on {args.model}: mIoU {100 * sum(ious) / len(ious):.1f} % on {len(held_out)} held-out scenes')
    model.save_pretrained(args.output / 'upernet')
    again = UperNetForSemanticSegmentation.from_pretrained(args.output / 'upernet')
    same = (predict(again, held_out, args.device) == predicted).float().mean().item()
    print(f'saved to {args.output / "upernet"} and loaded again: {same:.1%} of the predicted pixels are the same')

    export(timm.create_model('gunn15', pretrained=True), args.output / 'gunn15.c10')
    right = classify(args.output / 'gunn15.c10')
    print(f'{args.output / "gunn15.c10"} as TimmWrapperForImageClassification names {right} of 12 photographs rightly')


if __name__ == '__main__':
    main()
