"""Gradually Updated Neural Networks (GUNN) and their ordering-free baselines (SUNN).

Paper: `Gradually Updated Neural Networks for Large-Scale Image Recognition` - https://arxiv.org/abs/1711.09280
Original code (Torch7): https://github.com/joe-siyuan-qiao/GUNN

One resolution, one representation (Section 5.1): each stage is a transition (pooling and a 1x1 convolution to the
stage's width) followed by a single GUNN layer. Where the paper and the code its authors released disagree, these
networks follow the code: units of the CIFAR networks carry a projection shortcut, as the published parameter counts
prove, and the transitions of the ImageNet networks pool before their convolution.
"""
import json
import logging
from collections import OrderedDict
from functools import cache, partial
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple, Type, Union

import torch
import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead, calculate_drop_path_rates, create_act_layer, get_norm_layer
from timm.models import build_model_with_cfg, checkpoint, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch.func import functional_call
from torch.utils._python_dispatch import _disable_current_modes

from .layer import ConvNorm, GunnLayer
from .norms import fold_norm, reset_norm

__all__ = ['Gunn']

_logger = logging.getLogger(__name__)


class AtrousAvgPool2d(nn.Module):
    """Mean of each pixel and those `dilation` to the right and below it: a 2x2 pooling without its stride."""

    def __init__(self, dilation: int = 1):
        super().__init__()
        self.dilation = dilation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        d = self.dilation
        # A pixel without a partner, one of the last d, is its own.
        x = (x + torch.cat([x[:, :, d:], x[:, :, -d:]], 2)) / 2
        return (x + torch.cat([x[:, :, :, d:], x[:, :, :, -d:]], 3)) / 2


class ConvNormSequential(nn.Sequential):
    """Modules in a row, a convolution `conv` and its norm `bn` among them."""

    def reset_parameters(self) -> None:
        nn.init.kaiming_normal_(self.conv.weight, mode='fan_out', nonlinearity='relu')
        reset_norm(self.bn)

    reparameterize = fold_norm  # called by timm.utils.reparameterize_model


class GunnStage(ConvNormSequential):
    """A transition and a GUNN layer, whose running statistics are updated once per step under any checkpointing."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for module in self:
            if self.training and not torch.jit.is_scripting() and _in_backward():
                with _disable_current_modes():  # selective checkpointing knows of no copies
                    buffers = {name: b.clone() for name, b in module.named_buffers()}
                x = functional_call(module, buffers, x)  # what is done to the copies is forgotten
            else:
                x = module(x)
        return x


@torch.jit.unused
def _in_backward() -> bool:
    """Whether autograd runs a backward pass, where a forward in training mode is taken for a recomputation."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class Gunn(nn.Module):
    """Gradually (or, with ordered=False, simultaneously) updated neural network, Section 5, Tables 1 and 2.

    Maps images (B, in_chans, H, W) of any size to logits (B, num_classes); feature maps have ceil(H / reduction) rows.
    """

    def __init__(
            self,
            channels: Tuple[int, ...] = (400, 800, 1600, 2000),
            segments: Tuple[int, ...] = (10, 20, 40, 50),
            expansion: int = 2,
            depth: int = 1,
            layout: str = 'imagenet',
            ordered: bool = True,
            residual: bool = True,
            shortcut: bool = False,
            num_classes: int = 1000,
            in_chans: int = 3,
            global_pool: str = 'avg',
            output_stride: int = 32,
            act_layer: Union[str, Type[nn.Module]] = 'relu',
            norm_layer: Union[str, Type[nn.Module]] = 'batchnorm2d',
            drop_rate: float = 0.0,
            drop_path_rate: float = 0.0,
            fused: bool = True,
            device=None,
            dtype=None,
    ):
        """
        Args:
            channels: Number of channels N of each stage's GUNN layer.
            segments: Number of segments P of each stage's GUNN layer.
            expansion: Expansion K of the update units.
            depth: Number M of stacked bottlenecks per update unit.
            layout: 'imagenet' (7x7 stem of stride 2, max pooling, transitions that pool first; Table 2) or
                'cifar' (3x3 stem, transitions that pool last, a closing 1x1 convolution; Table 1).
            ordered: Update segments in order (GUNN) if True, all at once (SUNN) if False.
            residual: Add the segment's input to its update, False for the paper's "NoRes" ablation.
            shortcut: Projection shortcut around each update unit.
            num_classes: Number of classes, 0 for no classifier.
            global_pool: Global pooling type, '' for none: the classifier is then a 1x1 convolution of the map.
            output_stride: Largest reduction of the feature maps, 32, 16 or 8, kept by dilation.
            norm_layer: Norm layer of the BatchNorm family.
            drop_rate: Dropout rate before the classifier.
            drop_path_rate: Stochastic depth rate of the last stage's units, rising linearly from 0 in the first.
            fused: Run each GUNN layer as one operator wherever possible (see GunnLayer).
        """
        super().__init__()
        assert layout in ('imagenet', 'cifar'), f"layout must be 'imagenet' or 'cifar', got {layout!r}."
        assert output_stride in (8, 16, 32), f'output_stride must be 8, 16 or 32, got {output_stride!r}.'
        assert len(channels) == len(segments), f'channels and segments must go by stage, got {channels} and {segments}.'
        # None is left out: the frozen norms of torchvision know neither argument.
        dd = {k: v for k, v in dict(device=device, dtype=dtype).items() if v is not None}
        norm_layer = get_norm_layer(norm_layer)
        imagenet = layout == 'imagenet'
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.grad_checkpointing = False

        def conv_norm_act(in_chs: int, out_chs: int, kernel: int = 1, stride: int = 1) -> OrderedDict[str, nn.Module]:
            return OrderedDict(
                conv=nn.Conv2d(in_chs, out_chs, kernel, stride, padding=kernel // 2, bias=False, **dd),
                bn=norm_layer(out_chs, **dd),
                act=create_act_layer(act_layer, inplace=True),
            )

        # Every feature is the output of a direct child. What else users attach to the network is theirs to run.
        prev_chs = 64
        kernel_size, reduction = (7, 2) if imagenet else (3, 1)
        self.stem = ConvNormSequential(conv_norm_act(in_chans, prev_chs, kernel_size, reduction))
        self.feature_info = [dict(num_chs=prev_chs, reduction=reduction, module='stem')] if imagenet else []

        dilation = 1
        drop_path_rates = calculate_drop_path_rates(drop_path_rate, len(channels))
        for i, num_chs in enumerate(channels):
            stage = conv_norm_act(prev_chs, num_chs)
            if imagenet or i > 0:
                if reduction >= output_stride:
                    pool = AtrousAvgPool2d(dilation)
                    dilation *= 2
                else:
                    pool = nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False) if i else nn.MaxPool2d(3, 2, 1)
                    reduction *= 2
                stage['pool'] = pool
                stage.move_to_end('pool', last=not imagenet)
            stage['layer'] = GunnLayer(
                num_chs, segments[i], expansion, depth, ordered=ordered, residual=residual, shortcut=shortcut,
                dilation=dilation, drop_path=drop_path_rates[i], fused=fused, act_layer=act_layer,
                norm_layer=norm_layer, **dd)
            name = f'stage{i + 1}'
            self.add_module(name, GunnStage(stage))
            self.feature_info.append(dict(num_chs=num_chs, reduction=reduction, module=name))
            prev_chs = num_chs
        self.final_conv = nn.Identity() if imagenet else ConvNormSequential(conv_norm_act(prev_chs, prev_chs))
        self.feature_names: List[str] = [info['module'] for info in self.feature_info]
        self.body_names: List[str] = [name for name, _ in self.named_children()]

        self.num_features = prev_chs
        self.reset_classifier(num_classes, global_pool)
        self.init_weights()

    def init_weights(self) -> None:
        """Set every parameter and buffer, wherever they were created (after to_empty() from the meta device, say)."""
        for m in self.modules():
            if isinstance(m, (ConvNormSequential, ConvNorm)):
                m.reset_parameters()
        _init_classifier(self.head.fc)

    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        """Regexes of parameter groups from input to output: by stage (coarse), or transition and layer (fine)."""
        stages = [(r'^stage(\d+)', None)] if coarse else [(r'^stage(\d+)\.layer', (1,)), (r'^stage(\d+)', (0,))]
        return dict(stem=r'^stem', blocks=[*stages, (r'^final_conv', (99999,))])  # it closes the last stage

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each stage in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Replace the classifier, 0 classes for none, and the pooling, '' for none and None for the present one."""
        self.num_classes = num_classes
        param = next(self.parameters())
        pool_type = self.head.global_pool.pool_type if global_pool is None else global_pool
        self.head = ClassifierHead(
            self.num_features, num_classes, pool_type, self.drop_rate, use_conv=not pool_type,
            device=param.device, dtype=param.dtype)
        self.head_hidden_size = self.num_features * self.head.global_pool.feat_mult()
        self.head.train(self.training)
        _init_classifier(self.head.fc)

    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: Optional[Union[int, List[int]]] = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]]]:
        """Forward features that returns intermediates, those of `feature_info`. As in timm; `norm` has no effect."""
        assert output_fmt == 'NCHW', f"Output format must be 'NCHW', got '{output_fmt}'."
        take_indices, max_index = feature_take_indices(len(self.feature_names), indices)
        stages = self.body_names[:-1]
        names = stages[:stages.index(self.feature_names[max_index]) + 1] if stop_early else stages
        x, intermediates = self._forward_children(x, names, [self.feature_names[i] for i in take_indices])
        if intermediates_only:
            return intermediates
        if names == stages:
            x = self.final_conv(x)
        return x, intermediates

    def prune_intermediate_layers(
            self,
            indices: Union[int, List[int]] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> List[int]:
        """Prune layers not required for specified intermediates, whose absolute indices are returned."""
        take_indices, max_index = feature_take_indices(len(self.feature_names), indices)
        # The final convolution never feeds a feature. What stands on it goes with it.
        prune_end = max_index < len(self.feature_names) - 1 or (
            (prune_norm or prune_head) and not isinstance(self.final_conv, nn.Identity))
        for name in self.feature_names[max_index + 1:]:
            self.body_names.remove(name)
            delattr(self, name)
        self.feature_names = self.feature_names[:max_index + 1]
        if prune_end:
            self.final_conv = nn.Identity()
            self.num_features = self.feature_info[max_index]['num_chs']
        if prune_end or prune_head:
            self.reset_classifier(0, '')
        return take_indices

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images (B, in_chans, H, W) to unpooled features (B, num_features, ceil(H / reduction), ...)."""
        return self._forward_children(x, self.body_names, [])[0]

    def _forward_children(
            self, x: torch.Tensor, names: List[str], wanted: List[str]) -> Tuple[torch.Tensor, List[torch.Tensor]]:
        """Run the named children in that order; returns the last output and those of the wanted ones."""
        outputs: List[torch.Tensor] = []
        for name in names:
            if torch.jit.is_scripting():  # TorchScript has no getattr(self, name)
                for child_name, module in self.named_children():
                    if child_name == name:
                        x = module(x)
            elif self.grad_checkpointing and name.startswith('stage'):
                x = checkpoint(getattr(self, name), x)
            else:
                x = getattr(self, name)(x)
            if name in wanted:
                outputs.append(x)
        return x, outputs

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Unpooled features to logits, or to pooled features (B, head_hidden_size) if pre_logits."""
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.forward_features(x)
        return self.forward_head(x)


def _init_classifier(fc: nn.Module) -> None:
    if not isinstance(fc, nn.Identity):
        fc.reset_parameters()
        nn.init.zeros_(fc.bias)


def checkpoint_filter_fn(state_dict: Dict[str, torch.Tensor], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Weights of a network, out of those of a larger one that holds it as 'backbone' or under any other name."""
    key = 'stem.conv.weight'
    prefixes = [k.removesuffix(key) for k in state_dict if f'.{k}'.endswith(f'.{key}')]
    if len(prefixes) != 1:  # timm would go on with none in features_only
        got = prefixes or list(state_dict)[:3]
        raise ValueError(f'Gunn: expected the weights of one network, {key!r} with or without a prefix, got {got}.')
    prefix, = prefixes
    state_dict = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
    key = 'head.fc.weight'
    if key in state_dict:  # of a 1x1 convolution where there is no pooling, of a linear layer otherwise
        weight = state_dict[key].flatten(1)
        state_dict[key] = weight[:, :, None, None] if isinstance(model.head.fc, nn.Conv2d) else weight
    return state_dict


@cache
def _find_weights(variant: str) -> Optional[str]:
    """Tag of the first of a network's weights that are there; the log says so, once, if they are not its default."""
    tags, cfgs = default_cfgs[variant].tags, default_cfgs[variant].cfgs
    tag = next((t for t in tags if cfgs[t].has_weights), None)
    if tag not in (None, tags[0]):
        _logger.warning(f'There are no {variant}.{tags[0]} weights yet, pretrained=True loads {variant}.{tag}.')
    return tag


def _create_gunn(variant: str, pretrained: bool = False, **kwargs) -> Gunn:
    sources = {'url', 'file', 'state_dict', 'hf_hub_id'} & (kwargs.get('pretrained_cfg_overlay') or {}).keys()
    if pretrained and not sources and not kwargs.get('pretrained_cfg'):
        kwargs['pretrained_cfg'] = _find_weights(variant)
    num_features = len(kwargs['channels']) + (kwargs['layout'] == 'imagenet')  # the stem of the latter
    return build_model_with_cfg(
        Gunn, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=tuple(range(num_features))), **kwargs)


def _cfg(url: str = '', **kwargs) -> Dict[str, Any]:
    return {
        'url': url,
        'num_classes': 1000, 'input_size': (3, 224, 224), 'pool_size': (7, 7),
        'crop_pct': 0.875, 'interpolation': 'bicubic',
        'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'stem.conv', 'classifier': 'head.fc',
        'license': 'apache-2.0', 'paper_ids': 'arXiv:1711.09280',
        'paper_name': 'Gradually Updated Neural Networks for Large-Scale Image Recognition',
        'origin_url': 'https://github.com/joe-siyuan-qiao/GUNN',
        **kwargs,
    }


_LABELS = json.loads((Path(__file__).parent / 'labels.json').read_text())  # by tag, in the order of the logits

_c10_cfg = partial(
    _cfg, num_classes=10, input_size=(3, 32, 32), pool_size=(8, 8), crop_pct=1.0, label_names=tuple(_LABELS['c10']),
    mean=(125.3 / 255, 123.0 / 255, 113.9 / 255), std=(63.0 / 255, 62.1 / 255, 66.7 / 255))
_c100_cfg = partial(
    _cfg, num_classes=100, input_size=(3, 32, 32), pool_size=(8, 8), crop_pct=1.0, label_names=tuple(_LABELS['c100']),
    mean=(129.3 / 255, 124.1 / 255, 112.4 / 255), std=(68.2 / 255, 65.4 / 255, 70.4 / 255))
_tiny_cfg = partial(
    _cfg, num_classes=200, input_size=(3, 64, 64), pool_size=(2, 2), crop_pct=1.0,
    label_names=tuple(_LABELS['tiny_in']), label_descriptions=_LABELS['tiny_in'])


def _shipped(name: str) -> Optional[str]:
    """Path of weights that come with the package, in a wheel or in a checkout; None if they do not."""
    here = Path(__file__).parent
    paths = [folder / 'weights' / f'{name}.safetensors' for folder in (here, here.parent)]
    return next((str(path) for path in paths if path.is_file()), None)


# An entry names a source of weights only once they are there: a file of the package or a repository on the Hub, as
# 'owner/name.tag@commit', so that nobody else's weights can take their place. verify.py knows what they are.
default_cfgs = generate_default_cfgs({
    'gunn15.c10': _c10_cfg(file=_shipped('gunn15.c10')),
    'gunn15.c100': _c100_cfg(file=_shipped('gunn15.c100')),
    'gunn15_nores.c10': _c10_cfg(file=_shipped('gunn15_nores.c10')),
    'gunn15_nores.c100': _c100_cfg(),
    'sunn15.c10': _c10_cfg(file=_shipped('sunn15.c10')),
    'sunn15.c100': _c100_cfg(),
    'gunn24.c10': _c10_cfg(),
    'gunn24.c100': _c100_cfg(),
    'sunn24.c10': _c10_cfg(),
    'sunn24.c100': _c100_cfg(),
    'gunn18.tiny_in': _tiny_cfg(file=_shipped('gunn18.tiny_in')),
    'gunn18.in1k*': _cfg(),  # the default without weights too, as it comes after those that have some
    'sunn18.in1k': _cfg(),
    'wide_gunn18.in1k': _cfg(),
})

_ARGS_15 = dict(channels=(240, 300, 360), segments=(20, 25, 30), layout='cifar', shortcut=True)
_ARGS_24 = dict(_ARGS_15, channels=(720, 900, 1080), expansion=3, depth=2)
_ARGS_18 = dict(channels=(400, 800, 1600, 2000), segments=(10, 20, 40, 50), layout='imagenet')


@register_model
def gunn15(pretrained: bool = False, **kwargs) -> Gunn:
    """GUNN-15 for CIFAR (Section 5.2, Table 1)."""
    return _create_gunn('gunn15', pretrained, **dict(_ARGS_15, **kwargs))


@register_model
def gunn15_nores(pretrained: bool = False, **kwargs) -> Gunn:
    """GUNN-15 without the residual x_i in each update (Table 5, "GUNN-15-NoRes")."""
    return _create_gunn('gunn15_nores', pretrained, **dict(_ARGS_15, residual=False, **kwargs))


@register_model
def sunn15(pretrained: bool = False, **kwargs) -> Gunn:
    """SUNN-15, GUNN-15 without the order (Table 5)."""
    return _create_gunn('sunn15', pretrained, **dict(_ARGS_15, ordered=False, **kwargs))


@register_model
def gunn24(pretrained: bool = False, **kwargs) -> Gunn:
    """GUNN-24 for CIFAR (Section 5.2)."""
    return _create_gunn('gunn24', pretrained, **dict(_ARGS_24, **kwargs))


@register_model
def sunn24(pretrained: bool = False, **kwargs) -> Gunn:
    """SUNN-24, GUNN-24 without the order (Table 5)."""
    return _create_gunn('sunn24', pretrained, **dict(_ARGS_24, ordered=False, **kwargs))


@register_model
def gunn18(pretrained: bool = False, **kwargs) -> Gunn:
    """GUNN-18 for ImageNet (Section 5.3, Table 2)."""
    return _create_gunn('gunn18', pretrained, **dict(_ARGS_18, **kwargs))


@register_model
def sunn18(pretrained: bool = False, **kwargs) -> Gunn:
    """SUNN-18, GUNN-18 without the order (Table 4)."""
    return _create_gunn('sunn18', pretrained, **dict(_ARGS_18, ordered=False, **kwargs))


@register_model
def wide_gunn18(pretrained: bool = False, **kwargs) -> Gunn:
    """Wide GUNN-18 for ImageNet (Section 5.3)."""
    model_args = dict(channels=(1200, 1600, 2000, 2000), segments=(30, 40, 50, 50), layout='imagenet')
    return _create_gunn('wide_gunn18', pretrained, **dict(model_args, **kwargs))
