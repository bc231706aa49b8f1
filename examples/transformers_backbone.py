"""GUNN in Hugging Face transformers: as the backbone of UperNet, and as an image classifier from a folder.

    pip install '.[downstream]'
    python examples/transformers_backbone.py

Trains UperNet with GUNN-18 as its TimmBackbone to segment objects drawn on photographs (examples/drawn_scenes.py), from
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

import numpy as np
import timm
import timm.models
import torch
from common import replacing
from drawn_scenes import (
    CLASSES,
    Scene,
    add_arguments,
    check_arguments,
    fit,
    images_of,
    intersection_over_union,
    load_scenes,
    masks_of,
    predict_masks,
)
from PIL import Image
from transformers import (
    AutoImageProcessor,
    TimmBackboneConfig,
    TimmWrapperForImageClassification,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)


def restore(model: torch.nn.Module, source: torch.nn.Module) -> torch.nn.Module:
    """Give the timm part of a new transformers model all weights and statistics of the same network made by timm.

    Args:
        model: Model that was just made, with a TimmBackbone in it, its norms frozen by transformers or not.
        source: timm's network, features_only, with the same outputs.
    """
    bodies = [m for m in model.modules() if isinstance(m, timm.models.FeatureListNet)]
    if len(bodies) != 1:
        raise ValueError(f'restore: expected a model with one FeatureListNet of timm in it, got {len(bodies)}.')
    bodies[0].load_state_dict(source.state_dict())
    return model


def backbone_config(source: torch.nn.Module) -> TimmBackboneConfig:
    return TimmBackboneConfig(
        backbone=source.pretrained_cfg['architecture'], out_indices=list(source.feature_info.out_indices))


def upernet(source: torch.nn.Module, classes: int, **kwargs) -> UperNetForSemanticSegmentation:
    """UperNet on maps of strides 4 to 32, by a network that timm made: features_only, out_indices=(1, 2, 3, 4)."""
    config = UperNetConfig(
        backbone_config=backbone_config(source), auxiliary_in_channels=source.feature_info.channels()[2],
        num_labels=classes, **kwargs)
    return restore(UperNetForSemanticSegmentation(config), source)


def train(model: UperNetForSemanticSegmentation, scenes: List[Scene], args: argparse.Namespace) -> None:
    images, masks = images_of(scenes).to(args.device), masks_of(scenes).to(args.device)

    def loss_of(batch: torch.Tensor) -> torch.Tensor:
        return model(images[batch], labels=masks[batch]).loss

    fit(model, loss_of, len(scenes), args.batch_size, args.steps, args.lr, args.seed)


def predict(model: UperNetForSemanticSegmentation, scenes: List[Scene], device: str) -> torch.Tensor:
    """Classes (n, H, W)."""
    model.eval().to(device)
    return predict_masks(lambda images: model(images).logits, scenes, device)


def export(model: torch.nn.Module, folder: Path) -> None:
    """Write a timm model as a folder in the Hub's format that transformers can read as well."""
    timm.models.save_for_hf(model, folder, safe_serialization=True)
    config = json.loads((folder / 'config.json').read_text())
    config.get('model_args', {}).pop('num_classes', None)  # it stands beside the arguments
    with replacing(folder / 'config.json') as part:
        part.write_text(json.dumps(config, indent=2))


def classify(folder: Path) -> int:
    """How many of the photographs in examples/cifar10 are named rightly by the classifier in a folder."""
    model = TimmWrapperForImageClassification.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    files = sorted((Path(__file__).parent / 'cifar10').glob('*.jpg'))
    with torch.no_grad():
        predicted = model(**processor([Image.open(f).convert('RGB') for f in files])).logits.argmax(1)
    names = timm.get_pretrained_cfg('gunn15.c10').label_names
    return sum(names[p] == f.stem.rstrip('0123456789') for p, f in zip(predicted, files, strict=True))


def main(argv: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', default='gunn18', help='timm model with features of strides 2 to 32')
    parser.add_argument('--batch-size', type=int, default=8)
    add_arguments(parser, size=64, steps=400, lr=1e-3, output='output/transformers')
    args = parser.parse_args(argv)
    check_arguments(parser, args, [args.model], args.batch_size)

    torch.manual_seed(args.seed)
    source = timm.create_model(args.model, features_only=True, out_indices=(1, 2, 3, 4))
    model = upernet(source, len(CLASSES), hidden_size=128, auxiliary_channels=64).to(args.device)
    scenes, held_out = load_scenes(args)
    train(model, scenes, args)
    predicted = predict(model, held_out, args.device)
    miou = np.nanmean(intersection_over_union(predicted, held_out))
    print(f'UperNet on {args.model}: mIoU {100 * miou:.1f} % on {len(held_out)} held-out scenes')
    model.save_pretrained(args.output / 'upernet')
    again = UperNetForSemanticSegmentation.from_pretrained(args.output / 'upernet')
    same = (predict(again, held_out, args.device) == predicted).float().mean().item()
    print(f'saved to {args.output / "upernet"} and loaded again: {same:.1%} of the predicted pixels are the same')

    export(timm.create_model('gunn15', pretrained=True), args.output / 'gunn15.c10')
    right = classify(args.output / 'gunn15.c10')
    print(f'{args.output / "gunn15.c10"} as TimmWrapperForImageClassification names {right} of 12 photographs rightly')


if __name__ == '__main__':
    main()
