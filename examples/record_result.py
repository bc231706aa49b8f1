"""Store the weights of a training by timm's train.py and add what they achieve to weights/results.csv.

    python examples/record_result.py output/tiny/last.pth.tar weights/gunn18.tiny_in.safetensors --timm TIMM \
        --data-dir tiny-imagenet --dataset-name 'Tiny ImageNet' --minutes 3 --command 'python train.py ...'

TIMM is a checkout of pytorch-image-models. Its validate.py evaluates the stored file, in float32, at the training's
--img-size and --crop-pct. Weights are those of the last epoch, not averaged. What the training leaves unsaid (hardware,
versions, commit) is taken to be as here.
"""
import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import List, Optional

import timm
import torch
from cifar_results import RESULT_COLUMNS, identity, origin, read_results
from common import locked, save_weights, write_csv

RESULTS = Path(__file__).parent.parent / 'weights' / 'results.csv'


def recipe(options: argparse.Namespace) -> str:
    """What train.py was told, in short."""
    parts = [options.sched, f'lr {options.lr:g}', f'batch {options.batch_size}',
             f'weight_decay {options.weight_decay:g}']
    parts += [f'{options.img_size} pixels'] if options.img_size else []
    rates = {k: getattr(options, k) for k in ('smoothing', 'mixup', 'cutmix', 'drop_path')}
    parts += [f'{k} {rate:g}' for k, rate in rates.items() if rate]
    parts += [options.amp_dtype] if options.amp else []
    parts += ['from pretrained weights'] if options.pretrained else []
    return ', '.join([*parts, "timm's train.py"])


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('checkpoint', type=Path)
    parser.add_argument('file', type=Path, help='where to store the weights (.safetensors)')
    parser.add_argument('--timm', type=Path, required=True)
    parser.add_argument('--data-dir', type=Path, required=True)
    parser.add_argument('--split', default='val')
    parser.add_argument('--dataset-name', required=True)
    parser.add_argument('--command', required=True, help='of the training')
    parser.add_argument('--minutes', type=float, help='of the training, if it was never resumed')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--results', type=Path, default=RESULTS)
    for name in ('hardware', 'versions', 'commit'):
        parser.add_argument(f'--{name}', help='of the training, if it was elsewhere')
    return parser.parse_args(argv)


def main(argv: Optional[List[str]] = None) -> None:
    args = parse_args(argv)
    read_results(args.results)  # an error before minutes of work

    with torch.serialization.safe_globals([argparse.Namespace]):
        state = torch.load(args.checkpoint, map_location='cpu', weights_only=True)
    options = state['args']
    model = timm.create_model(options.model, num_classes=options.num_classes, **options.model_kwargs)
    model.load_state_dict(timm.models.clean_state_dict(state['state_dict']))
    save_weights(model, args.file)
    sizes = [
        word for name in ('img_size', 'crop_pct') if (value := getattr(options, name)) is not None
        for word in (f'--{name.replace("_", "-")}', str(value))]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / 'result.json'
        subprocess.run([
            sys.executable, 'validate.py', args.data_dir.resolve(), '--split', args.split, '--model', options.model,
            '--num-classes', str(model.num_classes), *sizes, '--checkpoint', args.file.resolve(),
            '--device', args.device, '--results-file', file, '--results-format', 'json'], cwd=args.timm, check=True)
        result = json.loads(file.read_text())
    result = result[0] if isinstance(result, list) else result
    row = dict(
        origin(args), model=options.model, weights='raw', data=args.dataset_name, images=sum(
            1 for path in (args.data_dir / args.split).glob('*/*') if path.is_file()),
        recipe=recipe(options), epochs=options.epochs, seed=options.seed, error=round(result['top1_err'], 4), loss='',
        minutes='' if args.minutes is None else args.minutes, command=args.command, file=args.file.name,
        sha256=hashlib.sha256(args.file.read_bytes()).hexdigest())
    row.update({k: getattr(args, k) for k in ('hardware', 'versions', 'commit') if getattr(args, k)})
    row = {column: row[column] for column in RESULT_COLUMNS}
    with locked(args.results.with_suffix('.lock'), wait=True):
        write_csv(args.results, [r for r in read_results(args.results) if identity(r) != identity(row)] + [row])
    print(f'{row["model"]}: {row["error"]:.2f} % error on {row["images"]} images of {row["data"]}; {args.file}')


if __name__ == '__main__':
    main()
