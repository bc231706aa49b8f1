"""Check that pretrained weights are those that were published.

    python -m timm_gunn.verify                 # all pretrained models of this package
    python -m timm_gunn.verify gunn15.c10      # or some

Compared are the sha256 of the file, which is downloaded if need be, and the logits of a fixed image. The Hub's client
checks sizes only: a damaged tensor of the right size loads without a word.
"""
import argparse
import hashlib
import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import timm
import torch
import torch.nn as nn
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from timm.models import PretrainedCfg

from .gunn import _find_weights, default_cfgs

FILENAME = 'model.safetensors'


def known_weights() -> Dict[str, Dict[str, Any]]:
    """For each pretrained name, 'sha256' of its file and 'logits' of fingerprint()."""
    return json.loads((Path(__file__).parent / 'fingerprints.json').read_text())


def sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def fingerprint_image(size: Sequence[int]) -> torch.Tensor:
    """An image (1, *size), float64 in [-2, 2), by integer arithmetic: the same on every machine, in every version."""
    numbers = torch.arange(1, 1 + torch.Size(size).numel())
    return ((numbers * 2654435761) % 2 ** 32).double().div(2 ** 30).sub(2).view(1, *size)


@torch.no_grad()
def fingerprint(model: nn.Module, size: Sequence[int]) -> List[float]:
    """Logits of fingerprint_image(size) in float64, in eval mode on a CPU; the model is left in that state."""
    return model.to('cpu', torch.float64).eval()(fingerprint_image(size))[0].tolist()


def find_config(name: str) -> Optional[PretrainedCfg]:
    """Pretrained config of a name, with its tag or without; None if timm knows no such name or tag."""
    with suppress(RuntimeError):  # no such tag
        return timm.get_pretrained_cfg(name)


def find_file(cfg: PretrainedCfg) -> Path:
    """File of the weights of a pretrained config, downloaded if need be."""
    if cfg.file:
        return Path(cfg.file)
    repo, _, revision = cfg.hf_hub_id.partition('@')
    return Path(hf_hub_download(repo, cfg.hf_hub_filename or FILENAME, revision=revision or None))


def same_logits(logits: Sequence[float], expected: Sequence[float]) -> bool:
    """Whether two fingerprints are the same up to the rounding of float64 on different machines."""
    return len(logits) == len(expected) and all(
        abs(a - b) <= 1e-6 * max(map(abs, expected)) for a, b in zip(logits, expected, strict=True))


def verify(name: str) -> Tuple[bool, str]:
    """Whether weights are as they were published, and a sentence about it. Raises what the Hub's client and timm do."""
    if name in default_cfgs:  # without a tag: what pretrained=True loads
        name = f'{name}.{_find_weights(name) or default_cfgs[name].tags[0]}'
    cfg = find_config(name)
    known = known_weights().get(name)
    if known is None:
        return False, f'{name}: no weights that this package knows; it knows {", ".join(known_weights()) or "none"}'
    if cfg is None or not cfg.has_weights:
        return False, f'{name}: the package came without its weights; install it again'
    path = find_file(cfg)
    found = sha256(path)
    if found != known['sha256']:
        remedy = 'Install the package again.' if cfg.file else f'Remove {path.resolve()}; it is then downloaded again.'
        return False, f'{name}: {path}: sha256 {found}, not {known["sha256"]}: it is damaged or another file. {remedy}'
    model = timm.create_model(name, pretrained=True)
    if not same_logits(fingerprint(model, model.pretrained_cfg['input_size']), known['logits']):
        return False, f'{name}: the logits of the fixed image are others, though the file is the right one'
    return True, f'{name}: ok, {path}, sha256 {found}'


def main(argv: Optional[List[str]] = None) -> int:
    """Exit status 0 if all names are in order, 1 if one is not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('names', nargs='*', metavar='NAME', help='such as gunn15.c10 (default: all)')
    pretrained = timm.list_models(module='gunn', pretrained=True, include_tags=True)
    status = 0
    for name in parser.parse_args(argv).names or sorted({*known_weights(), *pretrained}):
        try:
            fine, sentence = verify(name)
        except Exception as e:  # of the client, of HTTP, of a file that can not be read
            advice = 'The weights could not be had. Look at the connection and try again.'
            if isinstance(e, (RepositoryNotFoundError, RevisionNotFoundError)):
                advice = (
                    "The weights are gone from there, or the repository has become somebody else's. Look for a newer "
                    'version of this package, and do not load them without their commit.')
            fine, sentence = False, f'{name}: {type(e).__name__}: {e}\n{advice}'
        print(sentence)
        status |= not fine
    return status


if __name__ == '__main__':
    sys.exit(main())
