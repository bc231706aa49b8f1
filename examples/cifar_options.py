"""The options of train_cifar.py, and what is wrong with them."""
import argparse
import math
from pathlib import Path
from typing import List, Optional

import timm
import timm.utils
import torch
from common import check_device


def parse_args(argv: Optional[List[str]] = None, description: Optional[str] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
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
                       help='torch.compile, with a mode')
    model.add_argument('--graphs', action='store_true', help='capture forward and backward pass as CUDA graphs')
    recipe = parser.add_argument_group('recipe')
    recipe.add_argument('--epochs', type=int, default=300)
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
    run.add_argument('--output', type=Path, help='(default: output/MODEL-SCHEDULE-EPOCHS-SEED)')
    run.add_argument('--checkpoint-minutes', type=float, default=5.0, help='time between checkpoints')
    run.add_argument('--pause-after', type=float, default=math.inf, metavar='MINUTES',
                     help='write a checkpoint and leave, to go on another time')
    run.add_argument('--results', type=Path, help='add the row of results to this CSV, too')
    try:
        args = parser.parse_args(argv)
    except ValueError:  # of timm's ParseKwargs
        parser.error('expected --model-kwargs NAME=VALUE ...')

    for name, low in dict(epochs=1, batch_size=2, cycles=1, held_out=0, checkpoint_minutes=0, weight_decay=0).items():
        if not low <= (value := getattr(args, name)) < math.inf:
            parser.error(f'expected --{name.replace("_", "-")} >= {low}, got {value}')
    if not 0 < args.lr < math.inf:
        parser.error(f'expected --lr > 0, got {args.lr}')
    for name in ('smoothing', 'ema', 'momentum'):
        if not 0 <= getattr(args, name) < 1:
            parser.error(f'expected 0 <= --{name} < 1, got {getattr(args, name)}')
    if not 0 <= args.shift <= 1:
        parser.error(f'expected 0 <= --shift <= 1, got {args.shift}')
    if args.schedule == 'step' and args.epochs < 4:
        parser.error(f'expected at least 4 epochs for --schedule step, got {args.epochs}; there is onecycle for few')
    if args.schedule == 'snapshot' and args.epochs % args.cycles:
        parser.error(f'expected a number of epochs that {args.cycles} cycles divide, got {args.epochs}')
    cuda = args.device.startswith('cuda')
    if not cuda and args.device != 'cpu':
        parser.error(f'expected --device cpu or cuda, got {args.device}')
    check_device(parser, args.device)
    if args.dtype is None:
        bfloat16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        args.dtype = 'bfloat16' if bfloat16 else 'float32'
    if args.graphs and (args.compile or not cuda):
        parser.error(f'expected --device cuda and no --compile for --graphs, got {args.device} and {args.compile}')
    if args.dtype == 'float16' and not cuda:
        parser.error(f'expected --dtype float32 or bfloat16 on {args.device}, got float16')
    try:
        with torch.device('meta'):
            timm.create_model(args.model, num_classes=10, **args.model_kwargs)
    except NotImplementedError:  # by a constructor that looks at values, which there are none of yet
        pass
    except Exception as e:  # of any kind, by the model
        parser.error(
            'expected a --model and --model-kwargs that timm.create_model takes, got '
            f'{args.model} and {args.model_kwargs}: {str(e).splitlines()[0]}')
    if args.output is None:
        args.output = Path('output') / f'{args.model}-{args.schedule}-{args.epochs}-{args.seed}'
    return args
