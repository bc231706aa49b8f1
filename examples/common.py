"""What the examples share: facts about the machine, files that are never half written, and the paper's errors."""
import argparse
import csv
import os
import platform
import shlex
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Dict, Iterator, List

import safetensors.torch
import timm
import torch
import torch.nn as nn
from tqdm import tqdm

import timm_gunn

Row = Dict[str, Any]
bar = partial(tqdm, leave=False, disable=None)  # silent where the output is no terminal

# Errors in percent, Tables 3 to 5 of the paper.
PUBLISHED = {
    'gunn15': {'C10': 4.15, 'C100': 20.45}, 'gunn15_nores': {'C10': 4.45, 'C100': 21.15},
    'sunn15': {'C10': 5.64, 'C100': 23.75}, 'gunn24': {'C10': 3.21, 'C100': 16.69},
    'sunn24': {'C10': 3.88, 'C100': 19.60}, 'gunn18': {'top-1': 21.65, 'top-5': 5.87},
    'sunn18': {'top-1': 26.16, 'top-5': 8.48}, 'wide_gunn18': {'top-1': 20.59, 'top-5': 5.52},
}


def machine(args: argparse.Namespace) -> Dict[str, str]:
    if args.device.startswith('cuda'):
        hardware = torch.cuda.get_device_name(args.device)
    else:
        hardware = platform.processor() or platform.machine()
        if os.path.exists('/proc/cpuinfo'):
            lines = Path('/proc/cpuinfo').read_text().splitlines()
            names = [line.split(':')[1].strip() for line in lines if line.startswith('model name')]
            hardware = names[0] if names else hardware
        hardware += f', {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}'
    return dict(
        hardware=hardware, torch=torch.__version__, timm=timm.__version__, timm_gunn=timm_gunn.__version__,
        python=platform.python_version(), command='python ' + shlex.join(sys.argv))


def check_device(parser: argparse.ArgumentParser, device: str) -> None:
    """An error of the parser if there is no such device."""
    try:
        torch.empty(1, device=device)
    except (AssertionError, RuntimeError) as e:
        parser.error(f'expected a --device that torch finds, got {device}: {str(e).splitlines()[0]}')


def has_weights(name: str) -> bool:
    """Whether pretrained=True loads weights for a timm model, whose name may have a tag."""
    return timm.is_model_pretrained(name) or bool(timm.list_models(f'{name}.*', pretrained=True))


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, renamed to `path` once it is complete: there is never half a file under that name."""
    part = path.with_name(path.name + '.part')
    try:
        yield part
        with open(part, 'rb+') as f:
            os.fsync(f.fileno())
        umask = os.umask(0)
        os.umask(umask)
        part.chmod(0o666 & ~umask)  # safetensors keeps its files from everybody else
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def locked(path: Path, wait: bool) -> Iterator[None]:
    """Hold a file against other processes of this script, where the system has such locks."""
    with open(path, 'w') as f:
        try:
            import fcntl
        except ImportError:
            pass
        else:
            try:
                fcntl.flock(f, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                raise SystemExit(f'another process trains in {path.parent}; expected another --output') from None
        yield


def read_csv(path: Path) -> List[Row]:
    """Rows of a CSV, none if it is not there."""
    if not path.exists():
        return []
    with open(path, newline='') as f:
        return list(csv.DictReader(f))


def write_csv(path: Path, rows: List[Row]) -> None:
    with replacing(path) as part, open(part, 'w', newline='') as f:
        writer = csv.DictWriter(f, list(rows[0]), lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)


def save_weights(model: nn.Module, path: Path) -> None:
    """Matrices and kernels in float16, half the size; norms and biases as they are."""
    state = model.state_dict()
    tensors = {
        k: (v.half() if v.ndim > 1 and v.is_floating_point() else v).detach().cpu().contiguous()
        for k, v in state.items()}
    with replacing(path) as part:
        safetensors.torch.save_file(tensors, part, metadata=dict(format='pt'))
