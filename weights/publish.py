"""Publish weights to the Hugging Face Hub, from a checkpoint of timm's train.py or of examples/train_cifar.py.

    python -m weights.publish output/run/last.pth.tar --weights raw --model gunn15.c10 --repo somebody/gunn15.c10 \
        --data-dir cifar10 --dataset-name CIFAR-10 --training-command 'python examples/train_cifar.py ...'

This writes a folder and says what would be uploaded; the same with --push uploads it. The folder holds
model.safetensors (loaded strictly, float32, finite), config.json in timm's format, fingerprint.json (logits of a fixed
image) and README.md, a model card with the error of that very file on an image folder. The upload is one commit on the
head of the repository as it was found, and none if there is nothing new. Then the Hub's sha256 is compared with the
file's, the weights are loaded from that commit into an empty cache and their logits compared, and the line to paste
into timm_gunn/gunn.py is printed, pinned to the commit. The token is that of `hf auth login` or HF_TOKEN.
"""
import argparse
import hashlib
import json
import platform
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any, Dict, List, Optional

import huggingface_hub
import safetensors
import safetensors.torch
import timm
import timm.data
import torch
import torch.nn as nn
import torch.nn.functional as F
from huggingface_hub import EvalResult, HfApi, ModelCardData
from huggingface_hub.utils import HfHubHTTPError, RepositoryNotFoundError
from tqdm import tqdm

import timm_gunn
from timm_gunn.verify import FILENAME, find_config, fingerprint, sha256

CITATION = '''@inproceedings{Gunn,
  title = {Gradually Updated Neural Networks for Large-Scale Image Recognition},
  author = {Siyuan Qiao and Zhishuai Zhang and Wei Shen and Bo Wang and Alan L. Yuille},
  booktitle = {International Conference on Machine Learning (ICML)},
  year = {2018}
}'''


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    """The command line, checked as far as that goes without files and network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('checkpoint', type=Path, help='of a training (.pth.tar), or weights (.safetensors)')
    parser.add_argument('--weights', choices=['raw', 'ema'], required=True, help='which of the two that a training has')
    parser.add_argument('--model', required=True, help='with its tag, such as gunn15.c10')
    parser.add_argument('--repo', required=True, metavar='OWNER/NAME')
    parser.add_argument('--data-dir', type=Path, required=True, help='image folder to evaluate on')
    parser.add_argument('--split', default='test', help='its subfolder')
    parser.add_argument('--dataset-name', required=True, help='what the data is called, such as "CIFAR-10 (JPEG copy)"')
    parser.add_argument('--dataset-id', help='on the Hub, such as uoft-cs/cifar10')
    parser.add_argument('--training-command', required=True)
    parser.add_argument('--license', default='apache-2.0')
    parser.add_argument('--output', type=Path, help='the folder (default: output/publish/NAME)')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--batch-size', type=int, default=250)
    parser.add_argument('--push', action='store_true', help='upload')
    parser.add_argument('--private', action='store_true', help='if the repository is new')
    args = parser.parse_args(argv)
    if '.' not in args.model or find_config(args.model) is None:
        parser.error(f'expected --model NAME.TAG of a timm model, such as gunn15.c10, got {args.model}')
    if args.repo.count('/') != 1 or not all(args.repo.split('/')):
        parser.error(f'expected --repo OWNER/NAME, got {args.repo}')
    if args.output is None:
        args.output = Path('output') / 'publish' / args.repo.split('/')[1]
    return args


# --- The folder ---

def load_weights(args: argparse.Namespace) -> nn.Module:
    """The model with the weights of the checkpoint, whole, float32 and finite, or SystemExit."""
    path = args.checkpoint
    if not path.is_file():
        raise SystemExit(f'{path}: no such file; expected a checkpoint')
    try:
        if path.suffix == '.safetensors':
            state = safetensors.torch.load_file(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # timm's checkpoints have one
                state = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as e:
        raise SystemExit(f'{path} can not be read: {e}') from None
    if path.suffix != '.safetensors':
        key = dict(raw='state_dict', ema='state_dict_ema')[args.weights]
        if not isinstance(state, dict) or state.get(key) is None:
            raise SystemExit(f'{path}: expected {key} for --weights {args.weights}, got {list(state)}')
        state = timm.models.clean_state_dict(state[key])
    model = timm.create_model(args.model)
    try:
        model.load_state_dict(state)
    except RuntimeError as e:
        raise SystemExit(f'{path} does not fit {args.model}: {e}') from None
    for name, t in state.items():
        if t.is_floating_point() and t.dtype != torch.float32:
            raise SystemExit(f'{path}: expected float32, got {name} in {t.dtype}')
        if not t.isfinite().all():
            raise SystemExit(f'{path}: {name} has values that are not finite')
    return model.eval()


def evaluate(folder: Path, args: argparse.Namespace) -> Dict[str, float]:
    """Accuracies (%) and loss of the weights in a folder on the images, in float32, as by timm's validate.py."""
    model = timm.create_model(args.model, checkpoint_path=str(folder / FILENAME)).to(args.device).eval()
    if not (args.data_dir / args.split).is_dir():
        raise SystemExit(f'{args.data_dir / args.split}: no such folder; expected one with a subfolder per class')
    dataset = timm.data.create_dataset('', root=args.data_dir, split=args.split)
    classes = len(dataset.reader.class_to_idx)
    if classes != model.num_classes:
        raise SystemExit(f'{args.data_dir}: expected {model.num_classes} classes, got {classes}')
    config = timm.data.resolve_model_data_config(model)
    loader = timm.data.create_loader(
        dataset, batch_size=args.batch_size, use_prefetcher=False, num_workers=0, persistent_workers=False, **{
            k: config[k] for k in ('input_size', 'interpolation', 'mean', 'std', 'crop_pct', 'crop_mode')})
    right1 = right5 = loss = 0
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for images, labels in tqdm(loader, desc='evaluating', unit='batch', leave=False, disable=None):
            logits, labels = model(images.to(args.device)), labels.to(args.device)
            loss += F.cross_entropy(logits.double(), labels, reduction='sum').item()
            top = logits.topk(min(5, classes)).indices == labels[:, None]
            right1, right5 = right1 + top[:, 0].sum().item(), right5 + top.sum().item()
    n = len(dataset)
    return dict(images=n, top1=100 * right1 / n, top5=100 * right5 / n, loss=loss / n)


def write_folder(folder: Path, args: argparse.Namespace) -> Dict[str, Any]:
    """Everything that is to be uploaded; returns the record for timm_gunn/weights.json."""
    model = load_weights(args)
    timm.models.save_for_hf(model, folder, safe_serialization=True)
    result = evaluate(folder, args)
    record = dict(sha256=sha256(folder / FILENAME), logits=fingerprint(model, model.pretrained_cfg['input_size']))
    (folder / 'fingerprint.json').write_text(
        json.dumps(dict(record, image='timm_gunn.verify.fingerprint_image')) + '\n')
    (folder / 'README.md').write_text(card(model, args, result, record['sha256']))
    return record


def card(model: nn.Module, args: argparse.Namespace, result: Dict[str, float], digest: str) -> str:
    """Model card with its metadata."""
    cfg = model.pretrained_cfg
    data = dict(
        task_type='image-classification', dataset_type=args.dataset_id or args.dataset_name,
        dataset_name=args.dataset_name, dataset_split=args.split)
    results = [EvalResult(
        **data, metric_type='accuracy', metric_name='Top-1 accuracy', metric_value=round(result['top1'], 4))]
    if model.num_classes > 5:
        results.append(EvalResult(
            **data, metric_type='accuracy', metric_name='Top-5 accuracy', metric_value=round(result['top5'], 4)))
    metadata = ModelCardData(
        license=args.license, library_name='timm', pipeline_tag='image-classification', model_name=args.model,
        tags=['image-classification', 'timm', 'gunn'], eval_results=results,
        datasets=[args.dataset_id] if args.dataset_id else None)
    command = 'python -m weights.publish ' + shlex.join(sys.argv[1:])
    versions = ', '.join(f'{m.__name__} {m.__version__}' for m in (
        timm_gunn, timm, torch, huggingface_hub, safetensors)) + f', python {platform.python_version()}'
    size = 'x'.join(map(str, cfg['input_size'][1:]))
    return f"""---
{metadata.to_yaml()}
---
# {args.model}

Gradually Updated Neural Network ([Qiao et al., ICML 2018](https://arxiv.org/abs/1711.09280)) for timm, in the package
timm-gunn.

## Details

- Parameters: {sum(p.numel() for p in model.parameters()):,}
- Image size: {size}
- Training data: {args.dataset_name}
- Weights: {dict(raw='those of the last step', ema='their moving average (EMA)')[args.weights]}, float32
- sha256 of `{FILENAME}`: `{digest}`
- License of the weights: {args.license}; the terms of the data set hold as well

## Results

| data | images | top-1 error (%) | top-5 error (%) | loss |
|---|---|---|---|---|
| {args.dataset_name}, {args.split} | {result['images']} | {100 - result['top1']:.2f} | {100 - result['top5']:.2f} | \
{result['loss']:.4f} |

Of this very file, in float32. Trained by

    {args.training_command}

and evaluated by

    {command}

with {versions}.

## Use

```python
import timm  # and timm-gunn installed

model = timm.create_model('hf-hub:{args.repo}', pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
```

## Citation

```bibtex
{CITATION}
```
"""


# --- The Hub ---

def remote_files(api: HfApi, repo: str, revision: str, folder: Path) -> Dict[str, bool]:
    """For each file of a folder, whether the repository has the same at a revision."""
    names = sorted(path.name for path in folder.iterdir())
    found = {info.path: info for info in api.get_paths_info(repo, names, revision=revision)}

    def same(name: str) -> bool:
        info = found.get(name)
        if info is None:
            return False
        if info.lfs is not None:
            return info.lfs.sha256 == sha256(folder / name)
        return info.blob_id == git_blob_id((folder / name).read_bytes())

    return {name: same(name) for name in names}


def git_blob_id(content: bytes) -> str:
    """What git, and so the Hub, calls a small file by."""
    return hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()


def sentence(error: Exception) -> str:
    """An error of the Hub's client in one line."""
    return ' '.join(str(error).split()) or type(error).__name__


def push(folder: Path, args: argparse.Namespace, record: Dict[str, Any]) -> str:
    """Upload a folder as one commit, or none if the Hub has it all; returns the commit, once it has been checked.

    Raises:
        SystemExit: With what is on the Hub now, if anything goes wrong.
    """
    api, repo = HfApi(), args.repo
    try:
        user = api.whoami()['name']
    except OSError as e:
        raise SystemExit(f'the Hub does not know who you are ({sentence(e)}). Log in by `hf auth login`, or set '
                         'HF_TOKEN to a token that may write. Nothing has been uploaded.') from None
    left = 'Nothing has been uploaded.'
    try:
        try:
            head = api.model_info(repo).sha
        except RepositoryNotFoundError:
            api.create_repo(repo, private=args.private)
            left = f'The repository {repo} has been created and is empty.'
            head = api.model_info(repo).sha
        commit = head
        if all(remote_files(api, repo, head, folder).values()):
            print(f'{repo} has all of this already, at {head}: no commit')
        else:
            commit = api.upload_folder(
                repo_id=repo, folder_path=folder, parent_commit=head,
                commit_message=f'{args.model}, sha256 {record["sha256"][:12]}').oid
            left = f'The commit {commit} is in {repo}, and has not passed its checks: do not use it before it has.'
        wrong = [name for name, same in remote_files(api, repo, commit, folder).items() if not same]
        if wrong:
            raise SystemExit(f'{repo} at {commit} has other contents in {", ".join(wrong)}. {left}')
        with tempfile.TemporaryDirectory() as cache:
            model = timm.create_model(f'hf-hub:{repo}@{commit}', pretrained=True, cache_dir=cache)
            logits = fingerprint(model, model.pretrained_cfg['input_size'])
        if logits != record['logits']:
            raise SystemExit(f'{repo} at {commit}, loaded again, gives other logits. {left}')
    except (OSError, RuntimeError, ValueError) as e:
        why = sentence(e)
        if isinstance(e, HfHubHTTPError) and e.response is not None and e.response.status_code == 412:
            why = f'{repo} has got a commit from somebody else in the meantime; look at it, and publish again'
        elif isinstance(e, HfHubHTTPError) and e.response is not None and e.response.status_code == 403:
            why = f'{user} may not write to {repo}; expected a token with write access, or a repository of your own'
        raise SystemExit(f'{why}. {left}') from None
    return commit


def main(argv: Optional[List[str]] = None) -> None:
    """Write the folder and, if asked to, upload it."""
    args = parse_args(argv)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.output.parent, prefix='.publish-') as temporary:
        new = Path(temporary) / 'new'
        record = write_folder(new, args)
        if args.output.exists():
            args.output.rename(Path(temporary) / 'old')
        new.rename(args.output)
    print((args.output / 'README.md').read_text().split('## Results')[1].split('Of this')[0].strip())
    for path in sorted(args.output.iterdir()):
        print(f'{path}: {path.stat().st_size:,} bytes, sha256 {sha256(path)}')
    if not args.push:
        print(f'--push would upload these to https://huggingface.co/{args.repo}, as one commit')
        return
    commit = push(args.output, args, record)
    print(f"""{args.repo} at {commit} has been checked. To make it the weights of {args.model}:
in timm_gunn/gunn.py, default_cfgs, the entry {args.model!r} with   hf_hub_id='{args.repo}@{commit}'
in timm_gunn/weights.json   {json.dumps({args.model: record})[1:-1]}""")


if __name__ == '__main__':
    main()
