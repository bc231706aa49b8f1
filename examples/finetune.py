"""Fine-tune a network on an image folder, the plain way: timm's loader, mixup, layer-wise decay, averaged weights.

    python examples/finetune.py --data-dir flowers                                    # the pretrained GUNN-15
    python examples/finetune.py --data-dir flowers --model gunn18 --checkpoint out/epoch1/last.pth.tar --img-size 224

The folder holds train/<class>/* and val/<class>/*. Without --checkpoint a model starts from its pretrained weights if
there are any. Writes the averaged weights of the last epoch to --output, which timm's scripts take by --checkpoint.
"""
import argparse
from pathlib import Path
from typing import List, Optional

import timm
import timm.data
import timm.loss
import timm.models
import timm.optim
import timm.scheduler
import timm.utils
import torch
from common import check_device, has_weights, save_weights
from tqdm import tqdm


def load_all_but_classifier(model: torch.nn.Module, path: Path) -> None:
    """Load a checkpoint of the same network with any number of classes; SystemExit for that of another."""
    head = model.pretrained_cfg['classifier']
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # train.py's arguments
            keys = timm.models.load_checkpoint(
                model, str(path), strict=False, weights_only=True,
                filter_fn=lambda state, _: {k: v for k, v in state.items() if not k.startswith(head)})
    except RuntimeError as e:
        raise SystemExit(f'expected the weights of a network like this one in {path}: {e}') from e
    if missing := [k for k in keys.missing_keys if not k.startswith(head)]:
        raise SystemExit(f'expected the weights of a network like this one in {path}, got none for {missing[0]}')


@torch.no_grad()
def evaluate(model: torch.nn.Module, loader: torch.utils.data.DataLoader, device: torch.device) -> float:
    """Top-1 accuracy in percent."""
    model.eval()
    right = sum((model(x.to(device)).argmax(1).cpu() == y).sum().item() for x, y in loader)
    return 100 * right / len(loader.dataset)


def finetune(args: argparse.Namespace) -> float:
    """Accuracy of the averaged weights on val/, in percent."""
    device = torch.device(args.device)
    timm.utils.random_seed(args.seed)
    train, val = (timm.data.create_dataset('', root=str(args.data_dir), split=split) for split in ('train', 'val'))
    names, others = (list(dataset.reader.class_to_idx) for dataset in (train, val))
    if names != others:
        unlike = sorted({*names} ^ {*others})
        raise SystemExit(f'expected the same classes in train/ and val/, got in one alone {unlike}')
    if len(train) < args.batch_size:
        raise SystemExit(f'expected at least one batch of {args.batch_size} training images, got {len(train)}')
    classes = len(names)
    pretrained = not args.checkpoint and has_weights(args.model)
    model = timm.create_model(args.model, pretrained=pretrained, num_classes=classes, drop_rate=0.1)
    if args.checkpoint:
        load_all_but_classifier(model, args.checkpoint)
    model.to(device, memory_format=torch.channels_last)
    config = timm.data.resolve_data_config({'img_size': args.img_size}, model=model)
    options = {k: config[k] for k in ('input_size', 'interpolation', 'mean', 'std', 'crop_pct')}
    train, val = (timm.data.create_loader(
        dataset, batch_size=args.batch_size, is_training=training, scale=(0.6, 1.0), num_workers=args.workers,
        use_prefetcher=False, persistent_workers=args.workers > 0, **options)
        for dataset, training in ((train, True), (val, False)))

    # Without mixup (alpha 0) it still smooths the labels.
    mixup = timm.data.Mixup(args.mixup or 1.0, prob=float(args.mixup > 0), label_smoothing=0.1, num_classes=classes)
    loss_fn = timm.loss.SoftTargetCrossEntropy()
    # Layers get smaller rates the nearer they are to the input, by the groups of the model's group_matcher(). Without
    # weights to start from there is nothing in them to keep.
    optimizer = timm.optim.create_optimizer_v2(
        model, opt='adamw', lr=args.lr, weight_decay=0.05,
        layer_decay=args.layer_decay if pretrained or args.checkpoint else None)
    steps = len(train)
    schedule, _ = timm.scheduler.create_scheduler_v2(
        optimizer, 'cosine', num_epochs=args.epochs, warmup_epochs=min(1, args.epochs - 1), warmup_lr=1e-6,
        step_on_epochs=False, updates_per_epoch=steps)
    ema = timm.utils.ModelEmaV3(model, decay=args.ema, use_warmup=True)
    for epoch in range(args.epochs):
        model.train()
        progress = tqdm(train, desc=f'epoch {epoch + 1} of {args.epochs}', disable=None)
        for step, (images, labels) in enumerate(progress, epoch * steps):
            images, targets = mixup(images.to(device, memory_format=torch.channels_last), labels.to(device))
            with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                loss = loss_fn(model(images), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step_update(step + 1)
            ema.update(model, step)
            progress.set_postfix(loss=f'{loss.item():.3f}')
        accuracy = evaluate(ema.module, val, device)
        print(f'epoch {epoch + 1}: accuracy of the averaged weights on val/: {accuracy:.2f} %', flush=True)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    save_weights(ema.module, args.output)
    return accuracy


def main(argv: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data-dir', type=Path, required=True)
    parser.add_argument('--model', default='gunn15', help='name of any timm model')
    parser.add_argument('--checkpoint', type=Path, help='weights to start from, of any number of classes')
    parser.add_argument('--img-size', type=int, help="side of the images, in pixels (default: the model's)")
    parser.add_argument('--epochs', type=int, default=5)
    parser.add_argument('--batch-size', type=int, default=32)
    parser.add_argument('--lr', type=float, default=1e-3, help='of the classifier')
    parser.add_argument('--layer-decay', type=float, default=0.75,
                        help='of the learning rate, per layer downwards, if the model has weights to start from')
    parser.add_argument('--mixup', type=float, default=0.2, help='alpha, 0 for none')
    parser.add_argument('--ema', type=float, default=0.998, help='decay of the averaged weights')
    parser.add_argument('--amp', action='store_true', help='bfloat16 autocast')
    parser.add_argument('--workers', type=int, default=2)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--output', type=Path, default=Path('output/finetuned.safetensors'))
    args = parser.parse_args(argv)
    if not timm.is_model(args.model):
        parser.error(f'expected the name of a timm model, got {args.model}')
    for folder in (args.data_dir / 'train', args.data_dir / 'val'):
        if not folder.is_dir():
            parser.error(f'expected a folder {folder} with a subfolder of images per class; there is none')
    if args.checkpoint and not args.checkpoint.is_file():
        parser.error(f'expected a checkpoint, got {args.checkpoint}')
    if args.epochs < 1 or args.batch_size < 2 or args.batch_size % 2 or args.mixup < 0 or not args.lr > 0:
        parser.error('expected --epochs >= 1, an even --batch-size, --mixup >= 0 and --lr > 0, got '
                     f'{args.epochs}, {args.batch_size}, {args.mixup} and {args.lr}')
    if args.img_size is not None and args.img_size < 16:
        parser.error(f'expected --img-size of 16 or more, got {args.img_size}')
    check_device(parser, args.device)
    if args.output.suffix != '.safetensors':
        parser.error(f'expected an --output that ends in .safetensors, got {args.output}')
    finetune(args)
    print(f'weights: {args.output}')


if __name__ == '__main__':
    main()
