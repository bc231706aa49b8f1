"""Publish weights to the Hugging Face Hub, from a checkpoint of timm's train.py or of examples/train_cifar.py.

    python -m weights.publish output/run/last.pth.tar --weights raw --model gunn15.c10 --repo somebody/gunn15.c10 \
        --data-dir cifar10 --dataset-name CIFAR-10 --training-command 'python examples/train_cifar.py ...'

This writes a folder and says what would be uploaded; the same with --push uploads it. The folder holds
model.safetensors (loaded strictly, finite), config.json in timm's format, fingerprint.json (logits of a fixed
image) and README.md, a model card with the error of that very file on an image folder. A checkpoint has to be of the
network that it is published as, by its name, arguments and preprocessing; a .safetensors file does not say what it is
of, and is taken by its shapes, unless the package knows it under another name. The upload is one commit on the head of
the repository as it was found, and none if there is nothing new. Then the weights are loaded from that commit into an
empty cache, sha256 and logits are compared, and the lines that make them the pretrained weights of the model, pinned to
the commit, are printed. The token is that of `hf auth login` or HF_TOKEN. Needs the extra "examples".
"""
import argparse
import json
import math
import os
import platform
import re
import shlex
import shutil
import tempfile
import textwrap
from contextlib import suppress
from pathlib import Path
from typing import Any, Dict, List, Optional, Set

# Files go up by LFS over HTTP, which is what the tests go through, whether hf_xet is installed or not.
os.environ['HF_HUB_DISABLE_XET'] = '1'

import huggingface_hub
import safetensors
import safetensors.torch
import timm
import timm.data
import torch
import torch.nn as nn
import torch.nn.functional as F
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData, get_token
from huggingface_hub.utils import HFValidationError, RepositoryNotFoundError, validate_repo_id
from huggingface_hub.utils.sha import git_hash
from PIL import Image
from tqdm import tqdm

import timm_gunn
from timm_gunn.verify import FILENAME, find_config, fingerprint, known_weights, same_logits, sha256

FILES = ('README.md', 'config.json', 'fingerprint.json', FILENAME)
PICKLES = ('.bin', '.pth', '.pt', '.tar', '.ckpt', '.pkl', '.pickle', '.joblib')
HARMLESS = {'fused', 'drop_rate', 'drop_path_rate'}  # arguments of a model without which it computes the same
CONFIGS = dict(c10='_c10_cfg', c100='_c100_cfg', tiny_in='_tiny_cfg', in1k='_cfg')  # in timm_gunn/gunn.py, by tag

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
    parser.add_argument('--dataset-name', required=True, help='what the data is called, such as CIFAR-10')
    parser.add_argument('--dataset-id', help='on the Hub, such as uoft-cs/cifar10')
    parser.add_argument('--training-command', required=True)
    parser.add_argument('--license', default='apache-2.0')
    parser.add_argument('--output', type=Path, help='the folder (default: output/publish/NAME)')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--batch-size', type=int, default=250)
    parser.add_argument('--push', action='store_true', help='upload')
    parser.add_argument('--private', action='store_true', help='if the repository is new')
    args = parser.parse_args(argv)
    cfg = find_config(args.model)
    if cfg is None or args.model != f'{cfg.architecture}.{cfg.tag}' or cfg.architecture not in timm.list_models(
            module='gunn'):
        parser.error(f'expected --model NAME.TAG of this package, such as gunn15.c10, got {args.model}')
    try:
        validate_repo_id(args.repo)
        if '/' not in args.repo:
            raise HFValidationError('no owner')
    except HFValidationError as e:
        parser.error(f'expected --repo OWNER/NAME, got {args.repo}: {e}')
    if not args.dataset_name.strip() or re.search(r'[|\n]', args.dataset_name):
        parser.error(f'expected a --dataset-name in one line and without "|", got {args.dataset_name!r}')
    if args.dataset_id is None and not slug(args.dataset_name):
        parser.error(f'expected a --dataset-id, as {args.dataset_name!r} gives none')
    if args.batch_size < 1:
        parser.error(f'expected --batch-size >= 1, got {args.batch_size}')
    try:
        torch.zeros(1, device=args.device)
    except (RuntimeError, AssertionError) as e:
        parser.error(f'expected a --device that is there, got {args.device}: {e}')
    args.output = (args.output or Path('output') / 'publish' / args.repo.split('/')[1]).resolve()
    if not next(p for p in args.output.parents if p.exists()).is_dir() or args.output in (
            Path.cwd(), *Path.cwd().parents):
        parser.error(f'expected an --output of its own, in a folder, got {args.output}')
    if args.output.exists() and (not args.output.is_dir() or not is_ours({p.name for p in args.output.iterdir()})):
        parser.error(f'expected an --output that is new or holds what was published, got {args.output}')
    return args


def slug(name: str) -> str:
    """What a data set is called where no spaces may be."""
    return re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')


def is_ours(names: Set[str]) -> bool:
    """Whether a folder with such files is one that was written here, or empty."""
    return not names or ('fingerprint.json' in names and names <= {*FILES})


# --- The folder ---

def load_weights(args: argparse.Namespace) -> nn.Module:
    """The model with the weights of the checkpoint, whole, float32 and finite, or SystemExit."""
    path = args.checkpoint
    if not path.is_file():
        raise SystemExit(f'{path}: no such file; expected a checkpoint')
    try:
        if path.suffix == '.safetensors':
            state, digest = safetensors.torch.load_file(path), sha256(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # timm's checkpoints have one
                state = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as e:
        raise SystemExit(f'{path} can not be read: {e}') from None
    model = timm.create_model(args.model)
    if path.suffix == '.safetensors':
        known = [name for name, record in known_weights().items() if record['sha256'] == digest]
        if known and args.model not in known:
            raise SystemExit(f'{path} holds the weights of {known[0]}; expected --model {known[0]}, got {args.model}')
    else:
        key = dict(raw='state_dict', ema='state_dict_ema')[args.weights]
        if not isinstance(state, dict) or not isinstance(state.get(key), dict):
            found = f'{list(state)[:5]}' if isinstance(state, dict) else type(state).__name__
            raise SystemExit(f'{path}: expected {key} for --weights {args.weights}, got {found}; a state dict by '
                             'itself is taken as .safetensors')
        check_origin(path, state, model)
        state = timm.models.clean_state_dict(state[key])
    try:
        model.load_state_dict(state)
    except RuntimeError as e:
        raise SystemExit(f'{path} does not fit {args.model}: {e}') from None
    stored = (torch.float32, torch.float16) if path.suffix == '.safetensors' else (torch.float32,)
    for name, t in state.items():
        if t.is_floating_point() and t.dtype not in stored:
            raise SystemExit(f'{path}: expected {" or ".join(map(str, stored))}, got {name} in {t.dtype}')
        if not t.isfinite().all():
            raise SystemExit(f'{path}: {name} has values that are not finite')
    return model.eval()


def check_origin(path: Path, state: Dict[str, Any], model: nn.Module) -> None:
    """SystemExit if a checkpoint is of another network: the order of the channels, for one, is in no weight."""
    expected = model.pretrained_cfg['architecture']
    trained = re.sub(r'^hf[-_]hub:.*/|@.*|\..*', '', str(state.get('arch', expected)))
    if trained != expected:
        raise SystemExit(f'{path} is of {trained}; expected --model {trained}.TAG, got one of {expected}')
    options = {**vars(state.get('args', argparse.Namespace())), **state.get('settings', {})}
    kwargs = {k: v for k, v in (options.get('model_kwargs') or {}).items() if k not in HARMLESS}
    if kwargs:
        raise SystemExit(f'{path} was trained with the model arguments {kwargs}; expected {expected} as it is')
    for name in ('mean', 'std'):
        value = options.get(name)
        if value and tuple(value) != tuple(model.pretrained_cfg[name]):
            raise SystemExit(
                f'{path} was trained with --{name} {value}; expected that of the model, {model.pretrained_cfg[name]}')


def evaluate(file: Path, args: argparse.Namespace) -> Dict[str, float]:
    """Accuracies (%) and loss of the weights in a file on the images, in float32, as by timm's validate.py."""
    model = timm.create_model(args.model, checkpoint_path=str(file)).to(args.device).eval()
    if not (args.data_dir / args.split).is_dir():  # timm would take what is there instead
        raise SystemExit(f'{args.data_dir / args.split}: no such folder; expected one with a subfolder per class')
    try:
        dataset = timm.data.create_dataset('', root=args.data_dir, split=args.split)
    except (OSError, RuntimeError) as e:
        raise SystemExit(f'{args.data_dir}: expected images in {args.split}/<class>/: {e}') from None
    classes = len(dataset.reader.class_to_idx)
    if classes != model.num_classes:
        raise SystemExit(f'{args.data_dir}: expected {model.num_classes} classes, got {classes}')
    for path in tqdm(dataset.filenames(absolute=True), desc='reading', unit='image', leave=False, disable=None):
        try:  # timm would take another image in place of one that can not be read
            with Image.open(path) as image:
                image.load()
        except Exception as e:
            raise SystemExit(f'{path} can not be read: {e}') from None
    config = timm.data.resolve_data_config({}, model=model, use_test_size=True)
    loader = timm.data.create_loader(
        dataset, batch_size=args.batch_size, num_workers=0, persistent_workers=False, device=torch.device(args.device),
        **{k: config[k] for k in ('input_size', 'interpolation', 'mean', 'std', 'crop_pct', 'crop_mode')})
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
    """Everything that is to be uploaded; returns the record for timm_gunn/fingerprints.json."""
    model = load_weights(args)
    model.pretrained_cfg = dict(model.pretrained_cfg, license=args.license)
    timm.models.save_for_hf(model, folder, safe_serialization=True)
    config = json.loads((folder / 'config.json').read_text())
    # Stated beside them as well, which TimmWrapperForImageClassification of transformers 5.23 stumbles on.
    config.get('model_args', {}).pop('num_classes', None)
    (folder / 'config.json').write_text(json.dumps(config, indent=2) + '\n')
    if args.checkpoint.suffix == '.safetensors':  # the same bytes, and so the same sha256
        shutil.copyfile(args.checkpoint, folder / FILENAME)
    else:  # as examples/train_cifar.py stores them
        state = {k: (v.half() if v.ndim > 1 else v).contiguous() for k, v in model.state_dict().items()}
        safetensors.torch.save_file(state, folder / FILENAME, metadata=dict(format='pt'))
        model.load_state_dict(state)
    (folder / FILENAME).chmod((folder / 'config.json').stat().st_mode)  # not for its owner alone, as safetensors has it
    result = evaluate(folder / FILENAME, args)
    record = dict(sha256=sha256(folder / FILENAME), logits=fingerprint(model, model.pretrained_cfg['input_size']))
    if not all(map(math.isfinite, [result['loss'], *record['logits']])):
        raise SystemExit(f'{args.checkpoint}: losses or logits are not finite, though the weights are')
    (folder / 'fingerprint.json').write_text(
        json.dumps(dict(record, image='timm_gunn.verify.fingerprint_image')) + '\n')
    (folder / 'README.md').write_text(card(model, args, result, record['sha256']))
    texts = {path.name: path.read_text() for path in folder.iterdir() if path.name != FILENAME}
    with safetensors.safe_open(folder / FILENAME, 'pt') as f:
        texts[FILENAME] = str(f.metadata())
    for name, text in texts.items():
        if masked(text) != text:
            raise SystemExit(f'{name} would hold an access token; expected a checkpoint and arguments without one')
    return record


def card(model: nn.Module, args: argparse.Namespace, result: Dict[str, float], digest: str) -> str:
    """Model card with its metadata."""
    cfg = model.pretrained_cfg
    data = dict(
        task_type='image-classification',
        dataset_type=args.dataset_id or slug(args.dataset_name),
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
    command = shlex.join([
        'python', 'validate.py', args.data_dir.resolve().name, '--split', args.split, '--model', f'hf-hub:{args.repo}',
        '--pretrained'])
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
- Data set: {args.dataset_name}
- Weights: {dict(raw='raw, not averaged', ema='moving average (EMA)')[args.weights]}
- sha256 of `{FILENAME}`: `{digest}`
- License of the weights: {args.license}; the terms of the data set hold as well

## Results

| data | images | top-1 error (%) | top-5 error (%) | loss |
|---|---|---|---|---|
| {args.dataset_name}, {args.split} | {result['images']} | {100 - result['top1']:.2f} | {100 - result['top5']:.2f} | \
{result['loss']:.4f} |

Of this very file, in float32. Trained by

{textwrap.indent(args.training_command.strip(), '    ')}

and to be evaluated, to the same numbers, by timm's

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

def masked(text: str) -> str:
    """A text without access tokens."""
    token = get_token()
    if token:
        text = text.replace(token, '***')
    return re.sub(r'\bhf_[A-Za-z0-9]{20,}', '***', text)


def reason(error: BaseException) -> str:
    """An error of the Hub's client, of HTTP or of a signal in one line."""
    text = masked(' '.join(str(error).split())) or type(error).__name__
    status = getattr(getattr(error, 'response', None), 'status_code', None)
    if status == 401 or isinstance(error, huggingface_hub.errors.LocalTokenNotFoundError):
        text += '. Log in by `hf auth login`, or set HF_TOKEN to a token that may write.'
    elif status == 403:
        text += '. Expected a token with write access, and a repository of your own.'
    elif status == 409:
        text += '. Somebody has it, or the token may not see it.'
    return text.rstrip('.') + '.'


def differences(api: HfApi, repo: str, revision: str, folder: Path) -> List[str]:
    """Names of the files of a folder that a repository does not have, or not the same, at a revision."""
    names = sorted(path.name for path in folder.iterdir())
    found = {info.path: info for info in api.get_paths_info(repo, names, revision=revision)}

    def same(name: str) -> bool:
        info = found.get(name)
        if info is None:
            return False
        if info.lfs is not None:
            return info.lfs.sha256 == sha256(folder / name)
        return info.blob_id == git_hash((folder / name).read_bytes())

    return [name for name in names if not same(name)]


def what_is_there(api: HfApi, repo: str, head: Optional[str], folder: Path) -> str:
    """A sentence on what an upload that was broken off has left on the Hub, by asking it."""
    try:
        info = api.model_info(repo)
        now = info.sha
        if head in (None, now):
            empty = {f.rfilename for f in info.siblings} <= {'.gitattributes'}
            return f'The repository {repo} is there, without weights.' if empty else (
                f'No commit has been made to {repo}.')
        if not differences(api, repo, now, folder):
            return f'The commit {now} is in {repo} and not yet checked: publish again, which will do that.'
        return f'{repo} has got the commit {now} from somebody else in the meantime: look at it, and publish again.'
    except RepositoryNotFoundError:
        return f'There is no repository {repo} that this token can see: nothing has been uploaded.'
    except Exception as e:
        return f'What {repo} holds now could not be found out ({reason(e)}): look at it before you publish again.'


def push(folder: Path, args: argparse.Namespace, record: Dict[str, Any]) -> str:
    """Upload a folder as one commit, or none if the Hub has it all; returns the commit, once it has been checked.

    Raises:
        SystemExit: With what is on the Hub now, if anything goes wrong.
    """
    api, repo = HfApi(), args.repo
    head = None
    try:
        api.whoami()
        with suppress(OSError):  # huggingface_hub < 1 asks huggingface.co alone; the upload asks the right one again
            ModelCard.load(folder / 'README.md').validate()
    except Exception as e:
        raise SystemExit(f'{reason(e)} Nothing has been uploaded.') from None
    try:
        try:
            info = api.model_info(repo)
        except RepositoryNotFoundError:
            api.create_repo(repo, private=args.private or None)
            info = api.model_info(repo)
        if args.private and not info.private:
            raise ValueError(f'{repo} is public; expected a private repository, or no --private')
        pickles = [f.rfilename for f in info.siblings if f.rfilename.endswith(PICKLES)]
        if pickles:
            raise ValueError(f'{repo} holds {", ".join(pickles)}; expected none that is loaded by pickle: remove them')
        commit = head = info.sha
        if differences(api, repo, head, folder):
            commit = api.upload_folder(
                repo_id=repo, folder_path=folder, parent_commit=head,
                commit_message=f'{args.model}, sha256 {record["sha256"][:12]}').oid
        else:
            print(f'{repo} has all of this already, at {head}: no commit')
    except (Exception, KeyboardInterrupt) as e:
        raise SystemExit(f'{reason(e)} {what_is_there(api, repo, head, folder)}') from None
    try:
        wrong = differences(api, repo, commit, folder)
        if wrong:
            raise ValueError(f'{repo} has other contents in {", ".join(wrong)}')
        with tempfile.TemporaryDirectory() as cache:
            model = timm.create_model(f'hf-hub:{repo}@{commit}', pretrained=True, cache_dir=cache)
            logits = fingerprint(model, model.pretrained_cfg['input_size'])
            served = [sha256(path) for path in Path(cache).rglob(FILENAME)]
        if served != [record['sha256']]:
            raise ValueError(f'{repo} serves a {FILENAME} of sha256 {", ".join(served)}, expected {record["sha256"]}')
        if not same_logits(logits, record['logits']):
            raise ValueError(f'what {repo} serves gives other logits')
    except (Exception, KeyboardInterrupt) as e:
        raise SystemExit(f'{reason(e)} The commit {commit} is in {repo} and has not passed its checks: do not use it '
                         'before it has. Publishing again repeats them.') from None
    return commit


def main(argv: Optional[List[str]] = None) -> None:
    """Write the folder and, if asked to, upload it."""
    args = parse_args(argv)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.output.parent, prefix='.publish-') as temporary:
        new = Path(temporary) / 'new'
        record = write_folder(new, args)
        if args.output.exists():
            shutil.rmtree(args.output)
        new.rename(args.output)
    print((args.output / 'README.md').read_text().split('## Results')[1].split('Of this')[0].strip())
    for path in sorted(args.output.iterdir()):
        print(f'{path}: {path.stat().st_size:,} bytes, sha256 {sha256(path)}')
    if not args.push:
        print(f'--push would upload these to https://huggingface.co/{args.repo}, as one commit')
        return
    commit = push(args.output, args, record)
    print(f"""{args.repo} at {commit} has been checked. Lines that make it the pretrained weights of {args.model},
in timm_gunn/gunn.py, default_cfgs (in place of the entry that is there):
    {args.model!r}: {CONFIGS[args.model.split('.')[1]]}(hf_hub_id='{args.repo}@{commit}'),
in timm_gunn/fingerprints.json (likewise):
    {json.dumps({args.model: record})[1:-1]}""")


if __name__ == '__main__':
    main()
