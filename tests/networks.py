"""The registered networks, whole by name and small enough to try everything on."""
import copy

import benchmark
import timm
import torch

from timm_gunn import GunnLayer

MODELS = timm.list_models(module='gunn')
IMAGENET = [m for m in MODELS if timm.get_pretrained_cfg(m).num_classes == 1000]
CIFAR = [m for m in MODELS if m not in IMAGENET]
SMALL = {name: dict(channels=(12, 16, 20, 24)[:stages], segments=(3, 4, 5, 6)[:stages])
         for name in MODELS for stages in [4 if name in IMAGENET else 3]}

# One of each kind of code, for what takes seconds: the others differ in sizes, or have less or more of the same.
KINDS = ['gunn15_nores', 'gunn24', 'sunn15', 'gunn18']


def small(name, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **{**SMALL[name], **kwargs})


def tiny(name, **kwargs):
    """For compilers and exporters, which take seconds for a hundred operations."""
    stages = len(SMALL[name]['channels'])
    return small(name, **{**dict(channels=(4, 6, 4, 4)[:stages], segments=(2, 3, 2, 1)[:stages]), **kwargs})


def composite_of(model):
    """A copy that computes its ordered layers by their modules."""
    model = copy.deepcopy(model)
    for m in model.modules():
        if isinstance(m, GunnLayer):
            m.fused = False
    return model


def saved_bytes(model, x):
    """Bytes that autograd keeps for the backward pass of model(x), without parameters and input."""
    return benchmark.saved_bytes(lambda: model(x), model, x)
