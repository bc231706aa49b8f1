"""Gradually Updated Neural Networks (GUNN) and their ordering-free baselines (SUNN).

Paper: `Gradually Updated Neural Networks for Large-Scale Image Recognition` - https://arxiv.org/abs/1711.09280
Original code (Torch7): https://github.com/joe-siyuan-qiao/GUNN

One resolution, one representation (Section 5.1): each stage is a transition (pooling and a 1x1 convolution to the
stage's width) followed by a single GUNN layer. Where the paper and the code its authors released disagree, these
networks follow the code, with which the published parameter counts agree: units of the CIFAR networks carry a
projection shortcut, and the transitions of the ImageNet networks pool before their convolution.
"""
import json
import logging
from collections import OrderedDict
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple, Type, Union

import torch
import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead, calculate_drop_path_rates, create_act_layer, get_norm_layer
from timm.models import build_model_with_cfg, checkpoint, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch.utils._python_dispatch import _disable_current_modes

from .layer import ConvNorm, GunnLayer
from .norms import fold_norm, reset_norm

__all__ = ['Gunn']

_logger = logging.getLogger(__name__)


class AtrousAvgPool2d(nn.Module):
    """2x2 average pooling without its stride: the mean of the pixels 0 and `dilation` to the right and below.

    Takes the place of a strided pooling when a stage is dilated. Like there, the mean is of the pixels that exist, so
    that every dilation-th position holds what the strided network would. (B, C, H, W) to (B, C, H, W).
    """

    def __init__(self, dilation: int = 1):
        super().__init__()
        self.dilation = dilation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        d = self.dilation
        # A pixel without a partner, one of the last d, is its own.
        x = (x + torch.cat([x[:, :, d:], x[:, :, -d:]], 2)) / 2
        return (x + torch.cat([x[:, :, :, d:], x[:, :, :, -d:]], 3)) / 2


class ConvNormAct(nn.Sequential):
    """Modules in a row, a convolution `conv` and its norm `bn` among them."""

    @torch.jit.ignore
    def reparameterize(self) -> None:
        """Fold the norm into the convolution, for inference; timm.utils.reparameterize_model calls this."""
        fold_norm(self)


class GunnStage(ConvNormAct):
    """A transition and a GUNN layer, which update their running statistics once per step under checkpointing too."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():  # noqa: SIM102 (a joint condition would be compiled whole)
            if self.training and _in_backward():
                with _buffers_set_aside(self):
                    return self._run(x)
        return self._run(x)

    def _run(self, x: torch.Tensor) -> torch.Tensor:
        for module in self:
            x = module(x)
        return x


def _in_backward() -> bool:
    """True while autograd runs a backward pass, where a forward is the recomputation of a checkpointed one.

    Asked here, it serves every way of checkpointing a stage, that of timm's features_only wrappers included. A hook on
    a gradient that runs the network in training mode is taken for a recomputation as well.
    """
    task = getattr(torch._C, '_current_graph_task_id', lambda: -1)  # there is no public function for it
    return not torch.compiler.is_compiling() and task() != -1


@contextmanager
def _buffers_set_aside(module: nn.Module) -> Iterator[None]:
    """Let module work on copies of its buffers, so that what it does to them is forgotten."""
    saved = [(m, dict(m._buffers)) for m in module.modules()]
    try:
        with _disable_current_modes():  # selective checkpointing knows of no copies
            for m, buffers in saved:
                m._buffers.update({k: None if b is None else b.clone() for k, b in buffers.items()})
        yield
    finally:
        for m, buffers in saved:
            m._buffers.update(buffers)


def _conv_norm_act(
        in_chs: int,
        out_chs: int,
        kernel_size: int,
        stride: int,
        norm_layer: Type[nn.Module],
        act_layer: Union[str, Type[nn.Module]],
        **dd,
) -> 'OrderedDict[str, nn.Module]':
    return OrderedDict(
        conv=nn.Conv2d(in_chs, out_chs, kernel_size, stride, padding=kernel_size // 2, bias=False, **dd),
        bn=norm_layer(out_chs, **dd),
        act=create_act_layer(act_layer, inplace=True),
    )


class Gunn(nn.Module):
    """Gradually (or, with ordered=False, simultaneously) updated neural network.

    Maps images (B, in_chans, H, W) of any size to logits (B, num_classes); feature maps have ceil(H / reduction) rows.

    Source: Section 5, Tables 1 and 2.
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
            in_chans: Number of input channels.
            global_pool: Global pooling type, '' for none.
            output_stride: Largest reduction of the feature maps, 32, 16 or 8, kept by dilation.
            act_layer: Activation layer.
            norm_layer: Norm layer of the BatchNorm family.
            drop_rate: Dropout rate before the classifier.
            drop_path_rate: Stochastic depth rate of the last stage's units, rising linearly from 0 in the first.
            fused: Run each GUNN layer as one operator wherever possible (see GunnLayer).
            device: Device to create the parameters on.
            dtype: Dtype of the parameters.

        Raises:
            AssertionError: If layout or output_stride is none of the above, or channels and segments differ in number.
            ValueError: If a layer's arguments do not fit (see GunnLayer).
            TypeError: If norm_layer is not of the BatchNorm family.
        """
        super().__init__()
        assert layout in ('imagenet', 'cifar'), f"layout must be 'imagenet' or 'cifar', got {layout!r}."
        assert output_stride in (8, 16, 32), f'output_stride must be 8, 16 or 32, got {output_stride!r}.'
        assert len(channels) == len(segments), f'channels and segments must go by stage, got {channels} and {segments}.'
        # None is left out: the frozen norms of torchvision know neither argument.
        dd = {k: v for k, v in dict(device=device, dtype=dtype).items() if v is not None}
        norm_layer = get_norm_layer(norm_layer)
        imagenet = layout == 'imagenet'
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.grad_checkpointing = False

        # Every feature is the output of a direct child. What else users attach to the network is theirs to run.
        stem_chs = 64
        kernel_size, reduction = (7, 2) if imagenet else (3, 1)
        self.stem = ConvNormAct(_conv_norm_act(
            in_chans, stem_chs, kernel_size, reduction, norm_layer, act_layer, **dd))
        self.feature_info = [dict(num_chs=stem_chs, reduction=reduction, module='stem')] if imagenet else []

        prev_chs, dilation = stem_chs, 1
        drop_path_rates = calculate_drop_path_rates(drop_path_rate, len(channels))
        for i, num_chs in enumerate(channels):
            transition = _conv_norm_act(prev_chs, num_chs, 1, 1, norm_layer, act_layer, **dd)
            if i == 0:
                pool = nn.MaxPool2d(3, 2, padding=1) if imagenet else None
            elif reduction < output_stride:
                pool = nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False)
            else:
                pool = AtrousAvgPool2d(dilation)
                dilation *= 2
            if pool is not None:
                transition['pool'] = pool
                if imagenet:
                    transition.move_to_end('pool', last=False)
                if not isinstance(pool, AtrousAvgPool2d):
                    reduction *= 2
            layer = GunnLayer(
                num_chs, segments[i], expansion, depth,
                ordered=ordered, residual=residual, shortcut=shortcut, dilation=dilation,
                drop_path=drop_path_rates[i], fused=fused, act_layer=act_layer, norm_layer=norm_layer, **dd)
            name = f'stage{i + 1}'
            self.add_module(name, GunnStage(OrderedDict(**transition, layer=layer)))
            self.feature_info.append(dict(num_chs=num_chs, reduction=reduction, module=name))
            prev_chs = num_chs

        if imagenet:
            self.final_conv = nn.Identity()
        else:
            self.final_conv = ConvNormAct(_conv_norm_act(prev_chs, prev_chs, 1, 1, norm_layer, act_layer, **dd))
        self.num_features = prev_chs
        self._create_head(num_classes, global_pool, **dd)
        self.feature_names: List[str] = [info['module'] for info in self.feature_info]
        self.body_names: List[str] = ['stem', *(f'stage{i + 1}' for i in range(len(channels))), 'final_conv']

        self.init_weights()

    def _create_head(self, num_classes: int, global_pool: str, **dd) -> None:
        # Without pooling there is a map to classify, position by position.
        self.head = ClassifierHead(
            self.num_features, num_classes, pool_type=global_pool, drop_rate=self.drop_rate, use_conv=not global_pool,
            **dd)
        self.head_hidden_size = self.num_features * self.head.global_pool.feat_mult()
        _init_weights(self.head)

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Set every parameter and buffer, wherever they were created (after to_empty() from the meta device, say)."""
        _init_weights(self)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        """Regexes of parameter groups from input to output: by stage (coarse), or transition and layer (fine)."""
        return dict(
            stem=r'^stem',
            blocks=[
                (r'^stage(\d+)' if coarse else r'^stage(\d+)\.layer', None if coarse else (1,)),
                (r'^stage(\d+)', (0,)),
                (r'^final_conv', (99999,)),  # closes the last stage
            ],
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each stage in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The classifier, nn.Identity if num_classes is 0."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Replace the classifier, and the pooling unless global_pool is None.

        Args:
            num_classes: Number of classes, 0 for none: features come out instead of logits.
            global_pool: Type of pooling. With '' there is none, and the output is a map: (B, C, H, W) features, or the
                logits (B, num_classes, H, W) of every position.
        """
        self.num_classes = num_classes
        param = next(self.parameters())
        self._create_head(
            num_classes, self.head.global_pool.pool_type if global_pool is None else global_pool,
            device=param.device, dtype=param.dtype)
        self.head.train(self.training)

    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: Optional[Union[int, List[int]]] = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]]]:
        """Forward features and intermediate feature maps, those of `feature_info`.

        Args:
            x: Images (B, in_chans, H, W).
            indices: Last n features if int, all if None, those at the given indices if a sequence.
            norm: No effect, no norm stands between the features and the head.
            stop_early: Leave out the stages after the last feature asked for.
            output_fmt: Must be 'NCHW'.
            intermediates_only: Return the intermediate features alone.
        """
        assert output_fmt == 'NCHW', f"Output format must be 'NCHW', got '{output_fmt}'."
        take_indices, max_index = feature_take_indices(len(self.feature_names), indices)
        names = self.body_names[:-1]
        if stop_early:
            names = names[:names.index(self.feature_names[max_index]) + 1]
        x, intermediates = self._forward_children(x, names, [self.feature_names[i] for i in take_indices])
        if intermediates_only:
            return intermediates
        if len(names) == len(self.body_names) - 1:
            x = self.final_conv(x)
        return x, intermediates

    def prune_intermediate_layers(
            self,
            indices: Union[int, List[int]] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> List[int]:
        """Remove what the given intermediate features do not need; returns their absolute indices."""
        take_indices, max_index = feature_take_indices(len(self.feature_names), indices)
        # The final convolution never feeds a feature. What stands on it goes with it.
        prune_end = max_index < len(self.feature_names) - 1 or (
            (prune_norm or prune_head) and not isinstance(self.final_conv, nn.Identity))
        for name in self.feature_names[max_index + 1:]:
            if name in self.body_names:  # not pruned before
                self.body_names.remove(name)
                delattr(self, name)
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
        if torch.jit.is_scripting():
            for name, module in self.named_children():  # the only loop over modules that TorchScript has
                if name in names:
                    x = module(x)
                    if name in wanted:
                        outputs.append(x)
        else:
            for name in names:
                module = getattr(self, name)
                checkpointed = self.grad_checkpointing and name.startswith('stage')
                x = checkpoint(module, x) if checkpointed else module(x)
                if name in wanted:
                    outputs.append(x)
        return x, outputs

    def __prepare_scriptable__(self) -> 'Gunn':
        for name in (*self.body_names, 'head'):  # TorchScript runs them in the order of their registration
            self._modules[name] = self._modules.pop(name)
        return self

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Unpooled features to logits, or to pooled features (B, head_hidden_size) if pre_logits."""
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images (B, in_chans, H, W) to logits (B, num_classes)."""
        x = self.forward_features(x)
        return self.forward_head(x)


def _init_weights(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, ConvNorm):  # of GUNN layers
            child.reset_parameters()
        elif isinstance(child, nn.Conv2d) and child.bias is None:
            nn.init.kaiming_normal_(child.weight, mode='fan_out', nonlinearity='relu')
        elif isinstance(child, (nn.Linear, nn.Conv2d)):  # the classifier
            child.reset_parameters()
            nn.init.zeros_(child.bias)
        elif name == 'bn':
            reset_norm(child)
        else:
            _init_weights(child)


def checkpoint_filter_fn(state_dict: Dict[str, torch.Tensor], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Weights of a network, out of those of a larger one that holds it as 'backbone' or under any other name.

    Where timm loads without strictness, into features_only for instance, it goes on with what it has not loaded. So
    what is not there but for the classifier, as of a network that was cut off, is named in a warning.

    Raises:
        ValueError: If there is no such network in state_dict, or more than one.
    """
    key = 'stem.conv.weight'
    prefixes = [k[:-len(key)] for k in state_dict if f'.{k}'.endswith(f'.{key}')]
    if len(prefixes) != 1:
        raise ValueError(
            f'Gunn: expected the weights of one network, among them {key!r} with or without a prefix, got '
            f'{f"those of several, {prefixes}" if prefixes else list(state_dict)[:3]}.')
    prefix, = prefixes
    state_dict = {k[len(prefix):]: v for k, v in state_dict.items() if k.startswith(prefix)}
    for name, module in model.named_modules():
        if isinstance(module, GunnLayer):
            module.stack_units(state_dict, f'{name}.')
    missing = [
        k for k in model.state_dict() if k not in state_dict and not k.startswith('head.') and 'tracked' not in k]
    if missing:
        _logger.warning(f'{len(missing)} tensors are not among the weights and stay as they are, {missing[0]} for one.')
    classifier, own = state_dict.get('head.fc.weight'), model.state_dict().get('head.fc.weight')
    if classifier is not None and own is not None and classifier.shape[:2] == own.shape[:2]:
        state_dict['head.fc.weight'] = classifier.view(own.shape)  # a 1x1 convolution where there is no pooling
    return state_dict


@cache
def _find_weights(variant: str) -> Optional[str]:
    """Tag of the first of a network's weights that are there; the log says so, once, if they are not its default."""
    default, *others = default_cfgs[variant].tags
    tag = next((t for t in (default, *others) if default_cfgs[variant].cfgs[t].has_weights), None)
    if tag not in (None, default):
        _logger.warning(f'There are no {variant}.{default} weights yet, pretrained=True loads {variant}.{tag}.')
    return tag


def _create_gunn(variant: str, pretrained: bool = False, **kwargs) -> Gunn:
    sources = {'url', 'file', 'state_dict', 'hf_hub_id'} & (kwargs.get('pretrained_cfg_overlay') or {}).keys()
    if pretrained and not sources and not kwargs.get('pretrained_cfg'):
        kwargs['pretrained_cfg'] = _find_weights(variant)
    out_indices = tuple(range(len(kwargs['channels']) + (kwargs['layout'] == 'imagenet')))  # the stem of the latter
    return build_model_with_cfg(
        Gunn, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=out_indices), **kwargs)


def _cfg(url: str = '', **kwargs) -> Dict[str, Any]:
    return {
        'url': url,
        'num_classes': 1000, 'input_size': (3, 224, 224), 'pool_size': (7, 7),
        'crop_pct': 0.875, 'interpolation': 'bicubic',
        'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'stem.conv', 'classifier': 'head.fc',
        'license': 'apache-2.0',
        'paper_ids': 'arXiv:1711.09280',
        'paper_name': 'Gradually Updated Neural Networks for Large-Scale Image Recognition',
        'origin_url': 'https://github.com/joe-siyuan-qiao/GUNN',
        **kwargs,
    }


@cache
def _labels() -> Dict[str, Any]:
    """Names of the classes by tag, in the order of the logits; those of Tiny ImageNet with what they mean."""
    return json.loads((Path(__file__).parent / 'labels.json').read_text())


def _cifar_cfg(num_classes: int, mean: Tuple[float, ...], std: Tuple[float, ...], **kwargs) -> Dict[str, Any]:
    """Config of a CIFAR network, mean and std in units of 1 / 255."""
    return _cfg(
        num_classes=num_classes, input_size=(3, 32, 32), pool_size=(8, 8), crop_pct=1.0,
        mean=tuple(m / 255 for m in mean), std=tuple(s / 255 for s in std), **kwargs)


def _c10_cfg(**kwargs) -> Dict[str, Any]:
    return _cifar_cfg(
        10, (125.3, 123.0, 113.9), (63.0, 62.1, 66.7), label_names=tuple(_labels()['c10']), **kwargs)


def _c100_cfg(**kwargs) -> Dict[str, Any]:
    return _cifar_cfg(
        100, (129.3, 124.1, 112.4), (68.2, 65.4, 70.4), label_names=tuple(_labels()['c100']), **kwargs)


def _tiny_cfg(**kwargs) -> Dict[str, Any]:
    """Config for Tiny ImageNet: 200 classes of ImageNet, images of 64 x 64 pixels."""
    labels = _labels()['tiny_in']
    return _cfg(
        num_classes=200, input_size=(3, 64, 64), pool_size=(2, 2), crop_pct=1.0,
        label_names=tuple(labels), label_descriptions=labels, **kwargs)


def _shipped(name: str) -> Optional[str]:
    """Path of weights that come with the package, in a wheel or in a checkout; None if they do not."""
    here = Path(__file__).parent
    folders = [here, here.parent] if (here.parent / 'pyproject.toml').is_file() else [here]
    paths = [folder / 'weights' / f'{name}.safetensors' for folder in folders]
    return next((str(path) for path in paths if path.is_file()), None)


# An entry names a source of weights only once they are there: a file of the package or a repository on the Hub, as
# 'owner/name.tag@commit', so that nobody else's weights can take their place. verify.py knows what they are.
default_cfgs = generate_default_cfgs({
    'gunn15.c10': _c10_cfg(file=_shipped('gunn15.c10')),
    'gunn15.c100': _c100_cfg(),
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
