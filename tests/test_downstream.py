"""GUNN in other people's code: the libraries of the extra `downstream`, and the examples that use them."""
import argparse
import copy
import re
from itertools import product
from pathlib import Path

import drawn_scenes
import finetune
import numpy as np
import pytest
import timm
import timm.layers
import torch
from common import read_csv
from images import image_folder
from networks import IMAGENET, SMALL, small
from PIL import Image
from reference import randomise
from torch.testing import assert_close


def library(name):
    return pytest.importorskip(name, reason=f"needs {name}: pip install '.[downstream]'")


cbook, samples = library('matplotlib.cbook'), library('sklearn.datasets')

EXAMPLES = Path(__file__).parent.parent / 'examples'


def randomised(name, **kwargs):
    """A network whose norms have statistics of their own."""
    torch.manual_seed(0)
    return randomise(timm.create_model(name, **kwargs))


def assert_trains(model, loss):
    loss.backward()
    grads = [p.grad for n, p in model.named_parameters() if p.requires_grad and 'stage' in n]
    assert grads
    assert all(g is not None and torch.isfinite(g).all() for g in grads)


# --- segmentation_models_pytorch ---

@pytest.mark.parametrize('arch', [
    'Unet', 'UnetPlusPlus', 'Linknet', 'FPN', 'PSPNet', 'MAnet', 'UPerNet', 'Segformer', 'DeepLabV3Plus'])
def test_smp(arch):
    smp = library('segmentation_models_pytorch')
    model = smp.create_model(arch, encoder_name='tu-gunn18', encoder_weights=None, classes=4, **SMALL['gunn18'])
    x = torch.randn(2, 3, 64, 96)
    y = model(x)
    assert y.shape == (2, 4, 64, 96)
    assert_trains(model.encoder, y.square().mean())


def test_smp_weights(tmp_path):
    """Its default asks for pretrained weights, where the error is timm's; there are the package's, and one's own."""
    smp = library('segmentation_models_pytorch')
    with pytest.raises(RuntimeError, match='No pretrained weights exist for sunn18'):
        smp.Unet('tu-sunn18')
    model = smp.Unet('tu-gunn15', encoder_weights=True, encoder_depth=2, decoder_channels=(64, 32))
    weights = timm.create_model('gunn15', pretrained=True).stage3.layer.bottlenecks[0].conv1.conv.weight
    assert torch.equal(model.encoder.model.stage3.layer.bottlenecks[0].conv1.conv.weight, weights)
    assert model(torch.randn(2, 3, 32, 64)).shape == (2, 1, 32, 64)
    source = randomised('gunn18')
    torch.save(dict(state_dict=source.state_dict()), tmp_path / 'last.pth.tar')
    model = smp.Unet(
        'tu-gunn18', encoder_weights=True, pretrained_cfg_overlay=dict(file=str(tmp_path / 'last.pth.tar')))
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in model.encoder.model.state_dict().items())


def test_segment(tmp_path, capsys, monkeypatch):
    library('segmentation_models_pytorch')
    import segment
    scored, score = [], segment.intersection_over_union
    monkeypatch.setattr(
        segment, 'intersection_over_union',
        lambda predicted, scenes: scored.append(scenes) or score(predicted, scenes))
    segment.main([
        '--models', 'gunn18.tiny_in', 'resnet18', '--archs', 'Unet', '--steps', '2', '--batch-size', '2',
        '--size', '64', '--train-scenes', '4', '--held-out', '1', '--device', 'cpu', '--output', str(tmp_path)])
    rows = read_csv(tmp_path / 'results.csv')
    assert [row['backbone'] for row in rows] == ['gunn18.tiny_in', 'resnet18']
    stem = segment.build('Unet', 'gunn18.tiny_in').encoder.model.stem.conv.weight
    assert torch.equal(stem, timm.create_model('gunn18', pretrained=True).stem.conv.weight)
    for row in rows:
        assert float(row['miou']) == pytest.approx(np.nanmean([float(row[c]) for c in drawn_scenes.CLASSES]))
    held_out = drawn_scenes.make_scenes(1, 64, held_out=True)
    assert all(np.array_equal(s.image, t.image) for s, t in zip(scored[0], held_out, strict=True))
    assert len(scored) == 2
    assert (tmp_path / 'unet.png').read_bytes().startswith(b'\x89PNG')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['results.csv', 'unet.png']
    for options, message in ((['--models', 'gunn'], 'expected names of timm models, got gunn'),
                             (['--archs', 'Net'], 'got Net'), (['--size', '50'], 'multiple of 32 from 64, got 50'),
                             (['--models', 'gunn15'], 'strides 2, 4, 8, 16 and 32, got gunn15 with [1, 2, 4]'),
                             (['--steps', '0'], 'got 0, 200 and 8'), (['--seed', '-1'], 'got 0.001 and -1'),
                             (['--device', 'gpu'], 'a --device that torch finds, got gpu'),
                             (['--train-scenes', '4'], 'one batch of 8 scenes, got --train-scenes 4')):
        with pytest.raises(SystemExit):
            segment.main(options)
        assert message in capsys.readouterr().err


def stated(example):
    """Rows of the runs whose tables examples/README.md has."""
    return read_csv(EXAMPLES / 'results' / f'{example}.csv')


@pytest.mark.parametrize(('example', 'columns'), [
    ('segment', ('miou', *drawn_scenes.CLASSES, 'minutes')), ('detect', ('ap', 'ap50', 'ap75', 'minutes'))])
def test_tables_in_the_readme(example, columns):
    readme = (EXAMPLES / 'README.md').read_text()
    rows = stated(example)
    column, whats = dict(
        segment=('architecture', ('Unet', 'DeepLabV3Plus')),
        detect=('detector', ('faster_rcnn', 'retinanet', 'faster_rcnn')))[example]
    assert [(row[column], row['backbone']) for row in rows] == list(product(whats, ('gunn18', 'sunn18', 'resnet50')))
    if example == 'detect':
        assert [row['data'] for row in rows] == ['drawn'] * 6 + ['Tiny ImageNet'] * 3
    for row in rows:
        what = row[column]
        numbers = ' | '.join(f'{float(row[c]):.1f}' for c in columns)
        assert f'\n| {what} | `{row["backbone"]}` | {numbers} |\n' in readme


@pytest.mark.slow  # a training of several minutes each
@pytest.mark.parametrize('example', ['segment', 'detect'])
def test_stated_results(example, tmp_path):
    """The first row of the table by its options, to five points: another machine rounds otherwise."""
    library('segmentation_models_pytorch')
    library('torchmetrics')
    import detect
    import segment
    row, metric = stated(example)[0], dict(segment='miou', detect='ap')[example]
    what = ['--archs', row['architecture']] if example == 'segment' else ['--detectors', row['detector']]
    if example == 'detect':
        what += ['--pretrain-steps', row['pretrain_steps']]
    dict(segment=segment, detect=detect)[example].main(
        ['--models', row['backbone'], *what, '--steps', row['steps'], '--size', row['size'], '--seed', row['seed'],
         '--device', 'cpu', '--output', str(tmp_path)])
    assert float(read_csv(tmp_path / 'results.csv')[0][metric]) >= float(row[metric]) - 5


def test_intersection_over_union():
    """Against its definition."""
    scenes = drawn_scenes.make_scenes(4, 64, held_out=True)
    truth = torch.stack([torch.from_numpy(s.mask).long() for s in scenes])
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 5, truth.shape, generator=generator)
    predicted = torch.where(torch.rand(truth.shape, generator=generator) < 0.7, truth, noise)
    expected = [((predicted == c) & (truth == c)).sum() / ((predicted == c) | (truth == c)).sum() for c in range(5)]
    assert drawn_scenes.intersection_over_union(predicted, scenes) == pytest.approx([e.item() for e in expected])
    scenes = [s._replace(mask=0 * s.mask) for s in scenes]
    ious = drawn_scenes.intersection_over_union(torch.zeros_like(truth), scenes)
    assert ious[0] == 1
    assert np.isnan(ious[1:]).all()  # neither there nor predicted


# --- torchvision's detectors ---

@pytest.mark.parametrize('name', IMAGENET)
def test_torchvision_fpn_on_the_whole_network(name):
    """Its helper takes the children of a classifier, as it does for its own networks."""
    from torchvision.models.detection.backbone_utils import BackboneWithFPN
    model = randomise(small(name)).eval()
    layers = {f'stage{i}': str(i - 1) for i in range(1, 5)}
    fpn = BackboneWithFPN(copy.deepcopy(model), layers, [i['num_chs'] for i in model.feature_info[1:]], 32).eval()
    x = torch.randn(1, 3, 75, 96)
    assert_close(list(fpn.body(x).values()), model.forward_intermediates(x, indices=4, intermediates_only=True))
    assert [tuple(y.shape[-2:]) for y in fpn(x).values()] == [(19, 24), (10, 12), (5, 6), (3, 3), (2, 2)]


def detect_args(size):
    return argparse.Namespace(size=size, classes=drawn_scenes.CLASSES, tiny_imagenet=None)


@pytest.mark.parametrize('detector', ['faster_rcnn', 'retinanet'])
def test_torchvision_detectors(detector, tmp_path):
    """A step at batch size 2 with frozen norms, from a checkpoint as timm's train.py leaves it."""
    library('torchmetrics')
    from detect import build, target
    source = randomised('gunn18', num_classes=4)
    torch.save(dict(state_dict={f'module.{k}': v for k, v in source.state_dict().items()}), tmp_path / 'last.pth.tar')
    model = build(detector, 'gunn18', tmp_path / 'last.pth.tar', detect_args(64))
    body = model.backbone.body
    assert not [m for m in body.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    state = source.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in body.state_dict().items())
    before = {k: v.clone() for k, v in body.named_buffers()}
    scenes = drawn_scenes.make_scenes(2, 64, held_out=False)
    losses = model.train()([drawn_scenes.to_tensor(s.image) for s in scenes], [target(s, 'cpu') for s in scenes])
    assert_trains(body, sum(losses.values()))
    assert_close(dict(body.named_buffers()), before, rtol=0, atol=0)
    found = model.eval()([drawn_scenes.to_tensor(s.image) for s in scenes])
    assert all(set(f) == {'boxes', 'labels', 'scores'} for f in found)


@pytest.mark.parametrize('detector', ['faster_rcnn', 'retinanet'])
def test_anchors_of_the_detectors(detector, tmp_path):
    """Nearly every object has one that overlaps it by half or more, RetinaNet's bar for a positive one."""
    library('torchmetrics')
    from detect import build
    from torchvision.models.detection.image_list import ImageList
    from torchvision.ops import box_iou
    torch.save(timm.create_model('resnet18').state_dict(), tmp_path / 'weights.pth')
    model = build(detector, 'resnet18', tmp_path / 'weights.pth', detect_args(96)).eval()
    x = torch.zeros(1, 3, 96, 96)
    generator = model.anchor_generator if detector == 'retinanet' else model.rpn.anchor_generator
    anchors, = generator(ImageList(x, [(96, 96)]), list(model.backbone(x).values()))
    boxes = torch.cat([torch.from_numpy(s.boxes) for s in drawn_scenes.make_scenes(200, 96, held_out=False)])
    assert (box_iou(boxes, anchors).amax(1) >= 0.5).float().mean() > 0.98


def test_average_precision():
    """Of the truth, of other labels, and of boxes that overlap the truth by about 0.6."""
    library('torchmetrics')
    library('pycocotools')
    from detect import average_precision, target
    scenes = drawn_scenes.make_scenes(20, 128, held_out=True)

    def found(scale=1.0, shift=0):
        truth = [target(s, 'cpu') for s in scenes]
        middles = [(t['boxes'][:, :2] + t['boxes'][:, 2:]).repeat(1, 2) / 2 for t in truth]
        return [dict(boxes=m + scale * (t['boxes'] - m), labels=(t['labels'] - 1 + shift) % 4 + 1,
                     scores=torch.linspace(0.5, 0.9, len(t['labels']))) for t, m in zip(truth, middles, strict=True)]

    assert average_precision(found(), scenes) == pytest.approx(dict(ap=100, ap50=100, ap75=100))
    result = average_precision(found(scale=0.6 ** 0.5), scenes)
    assert (result['ap50'], result['ap75']) == pytest.approx((100, 0))
    assert 10 < result['ap'] < 35  # two or three of ten thresholds
    assert average_precision(found(shift=1), scenes)['ap50'] < 20


def test_detect(tmp_path, capsys, monkeypatch):
    library('torchmetrics')
    library('pycocotools')
    import detect
    scored, score = [], detect.average_precision
    monkeypatch.setattr(
        detect, 'average_precision', lambda found, scenes: scored.append(scenes) or score(found, scenes))
    monkeypatch.setattr(detect, 'STEPS', dict(faster_rcnn=99, retinanet=2))
    detect.main([
        '--models', 'gunn18', 'resnet18', '--detectors', 'retinanet', '--pretrain-steps', '1', '--size', '64',
        '--train-scenes', '8', '--held-out', '1', '--device', 'cpu', '--output', str(tmp_path)])
    rows = read_csv(tmp_path / 'results.csv')
    assert [row['backbone'] for row in rows] == ['gunn18', 'resnet18']
    assert {row['steps'] for row in rows} == {'2'}
    held_out = drawn_scenes.make_scenes(1, 64, held_out=True)
    assert all(np.array_equal(s.image, t.image) for s, t in zip(scored[0], held_out, strict=True))
    assert len(scored) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        'gunn18.safetensors', 'resnet18.safetensors', 'results.csv', 'retinanet.png']
    for options, message in ((['--models', 'gunn15'], 'strides 2, 4, 8, 16 and 32, got gunn15 with [1, 2, 4]'),
                             (['--models', 'x'], 'expected names of timm models, got x'),
                             (['--wnids', 'n1'], '--wnids needs --tiny-imagenet'),
                             (['--pretrain-steps', '0'], 'expected --pretrain-steps >= 1, got 0')):
        with pytest.raises(SystemExit):
            detect.main(options)
        assert message in capsys.readouterr().err


@pytest.fixture
def tiny_imagenet(tmp_path):
    """Five training images and two others of each of three classes, white with a black box."""
    root = tmp_path / 'tiny-imagenet-200'
    (root / 'val' / 'images').mkdir(parents=True)
    (root / 'wnids.txt').write_text('n2\nn1\nn3\n')
    rng, val = np.random.default_rng(0), []
    for wnid in ('n1', 'n2', 'n3'):
        (root / 'train' / wnid / 'images').mkdir(parents=True)
        lines = []
        for i in range(7):
            x1, y1 = rng.integers(30, size=2)
            x2, y2 = x1 + rng.integers(20, 30), y1 + rng.integers(20, 30)
            pixels = np.full((64, 64, 3), 255, np.uint8)
            pixels[y1:y2 + 1, x1:x2 + 1] = 0
            training = i < 5
            name = f'{wnid}_{i}.JPEG' if training else f'val_{wnid}{i}.JPEG'
            Image.fromarray(pixels).save(root / ('train/' + wnid if training else 'val') / 'images' / name, quality=95)
            box = f'{x1}\t{y1}\t{x2}\t{y2}'
            lines.append(f'{name}\t{box}') if training else val.append(f'{name}\t{wnid}\t{box}')
        (root / 'train' / wnid / f'{wnid}_boxes.txt').write_text('\n'.join(lines) + '\n')
    (root / 'val' / 'val_annotations.txt').write_text('\n'.join(val) + '\n')
    return root


def test_tiny_imagenet_boxes(tiny_imagenet):
    for held_out, names in ((False, [f'n{c}_{i}' for c in (2, 3) for i in range(5)]),
                            (True, [f'val_n{c}{i}' for c in (2, 3) for i in (5, 6)])):
        found = drawn_scenes.tiny_imagenet_boxes(tiny_imagenet, ['n2', 'n3'], held_out)
        assert [(path.stem, label) for path, label, _ in found] == [(n, 1 if 'n2' in n else 2) for n in names]
    scenes = drawn_scenes.tiny_imagenet_scenes(tiny_imagenet, ['n2', 'n3'], 99, 128, held_out=False)
    assert sorted(s.labels.item() for s in scenes) == [1] * 5 + [2] * 5
    for scene in scenes:
        assert scene.image.shape == (128, 128, 3)
        rows, columns = np.nonzero(scene.image.mean(2) < 128)
        expected = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert np.abs(scene.boxes - expected).max() <= 1
    assert len(drawn_scenes.tiny_imagenet_scenes(tiny_imagenet, ['n2', 'n3'], 3, 64, held_out=True)) == 3


def test_detect_on_tiny_imagenet(tiny_imagenet, tmp_path, capsys):
    library('torchmetrics')
    library('pycocotools')
    import detect
    options = ['--models', 'resnet18', '--detectors', 'faster_rcnn', '--pretrain-steps', '1', '--steps', '1', '--size',
               '64', '--device', 'cpu', '--output', str(tmp_path / 'out'), '--tiny-imagenet', str(tiny_imagenet)]
    detect.main(options)
    row, = read_csv(tmp_path / 'out' / 'results.csv')
    assert row['data'] == 'Tiny ImageNet'
    assert (tmp_path / 'out' / 'faster_rcnn.png').read_bytes().startswith(b'\x89PNG')
    with pytest.raises(SystemExit, match='got 5 and 2'):
        detect.main([*options, '--wnids', 'n3'])
    (tiny_imagenet / 'val' / 'val_annotations.txt').rename(tmp_path / 'val_annotations.txt')
    with pytest.raises(SystemExit, match=r'to be the folder tiny-imagenet-200: .*val_annotations'):
        detect.main(options)
    for changed, message in ((['--wnids', 'n4'], "got ['n4']"), (['--wnids', 'n1', 'n1'], "['n1', 'n1']"),
                             (['--tiny-imagenet', str(tmp_path)], 'wnids.txt')):
        with pytest.raises(SystemExit):
            detect.main([*options, *changed])
        assert message in capsys.readouterr().err


# --- transformers ---

@pytest.mark.parametrize('kind', ['Detr', 'ConditionalDetr', 'DeformableDetr'])
def test_detr(kind):
    """From scratch, with every norm at 0 and 1, and frozen: a loss and gradients that are finite; then restored."""
    transformers = library('transformers')
    from transformers_backbone import restore
    sizes = dict(d_model=32, encoder_ffn_dim=32, decoder_ffn_dim=32, encoder_layers=1, decoder_layers=2,
                 encoder_attention_heads=2, decoder_attention_heads=2, num_queries=5, num_labels=4)
    maps = (2, 3, 4) if kind == 'DeformableDetr' else (4,)
    backbone = transformers.TimmBackboneConfig(backbone='gunn18', out_indices=maps, use_pretrained_backbone=False)
    if kind == 'DeformableDetr':
        sizes['num_feature_levels'] = len(maps)
    torch.manual_seed(0)
    model = getattr(transformers, f'{kind}ForObjectDetection')(
        getattr(transformers, f'{kind}Config')(backbone_config=backbone, **sizes)).train()
    assert {type(m).__name__ for m in model.modules() if 'Norm2d' in type(m).__name__} == {f'{kind}FrozenBatchNorm2d'}
    target = dict(class_labels=torch.tensor([1]), boxes=torch.tensor([[0.5, 0.5, 0.2, 0.2]]))
    assert_trains(model, model(torch.randn(2, 3, 64, 96), labels=[target, target]).loss)
    source = randomised('gunn18', features_only=True, out_indices=maps)
    state = restore(model, source).state_dict()
    for k, v in source.state_dict().items():
        assert 'tracked' in k or any(torch.equal(v, state[n]) for n in state if n.endswith(k)), k


def test_upernet(tmp_path):
    """With the weights and statistics that timm gives; saved and loaded, the same."""
    library('transformers')
    from transformers import UperNetForSemanticSegmentation
    from transformers_backbone import upernet
    source = randomised('gunn18', features_only=True, out_indices=(1, 2, 3, 4)).eval()
    model = upernet(source, 4, hidden_size=32, auxiliary_channels=16, pool_scales=[1, 2]).eval()
    x = torch.randn(2, 3, 64, 96)
    assert_close(list(model.backbone(x).feature_maps), source(x))
    logits = model(x).logits
    model.save_pretrained(tmp_path)
    again = UperNetForSemanticSegmentation.from_pretrained(tmp_path).eval()
    assert_close(again(x).logits, logits)
    assert_trains(model.backbone, model.train()(x, labels=torch.randint(0, 4, (2, 64, 96))).loss)


def test_restore_of_no_backbone():
    library('transformers')
    from transformers_backbone import restore
    with pytest.raises(ValueError, match='with one FeatureListNet of timm in it, got 0'):
        restore(torch.nn.Linear(1, 1), timm.create_model('gunn15', features_only=True))


def test_transformers_backbone(tmp_path, capsys):
    library('transformers')
    import transformers_backbone
    transformers_backbone.main([
        '--steps', '2', '--batch-size', '2', '--size', '64', '--train-scenes', '4', '--held-out', '4', '--device',
        'cpu', '--output', str(tmp_path)])
    printed = capsys.readouterr().out
    assert re.search(r'UperNet on gunn18: mIoU \d+\.\d % on 4 held-out scenes', printed)
    assert 'loaded again: 100.0% of the predicted pixels are the same' in printed
    assert int(re.search(r'names (\d+) of 12 photographs', printed)[1]) >= 9  # 11 when this was written


def test_timm_wrapper(tmp_path):
    library('transformers')
    from transformers import TimmWrapperForImageClassification
    from transformers_backbone import export
    model = timm.create_model('gunn15', pretrained=True).eval()
    export(model, tmp_path)
    x = torch.randn(2, 3, 32, 32)
    wrapped = TimmWrapperForImageClassification.from_pretrained(tmp_path).eval()
    assert_close(wrapped(x).logits, model(x), rtol=0, atol=0)
    again = timm.create_model('gunn15', checkpoint_path=str(tmp_path / 'model.safetensors')).eval()
    assert_close(again(x), model(x), rtol=0, atol=0)


# --- The scenes, and plain fine-tuning ---

def test_scenes():
    scenes = drawn_scenes.make_scenes(50, 64, held_out=False, seed=3)
    for scene, again in zip(scenes, drawn_scenes.make_scenes(50, 64, held_out=False, seed=3), strict=True):
        for a, b in zip(scene, again, strict=True):
            assert np.array_equal(a, b)
        assert scene.image.shape == (64, 64, 3)
        assert len(scene.boxes) == len(scene.labels)
        for (x1, y1, x2, y2), label in zip(scene.boxes.astype(int), scene.labels, strict=True):
            inside = scene.mask[y1:y2, x1:x2] == label
            for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]):  # the box is tight
                assert edge.any()
    assert {label for scene in scenes for label in scene.labels} == {1, 2, 3, 4}
    assert [len(b) for b in drawn_scenes.batches(10, 4, 5)] == [4] * 5
    first = torch.cat(list(drawn_scenes.batches(8, 4, 2)))
    assert first.sort().values.tolist() == list(range(8))


def test_held_out_scenes_show_nothing_of_the_training_scenes(monkeypatch):
    with cbook.get_sample_data('grace_hopper.jpg') as f:
        wholes = [*samples.load_sample_images().images, np.asarray(Image.open(f).convert('RGB'))]
    for left, right, whole in zip(drawn_scenes.photographs(False), drawn_scenes.photographs(True), wholes, strict=True):
        assert np.array_equal(np.concatenate([left, right], 1), whole)  # no pixel is in both
    # Behind objects and, by half, in them is what photographs(held_out) gives and nothing else.
    monkeypatch.setattr(
        drawn_scenes, 'photographs', lambda held_out: [np.full((99, 99, 3), 40 + 170 * held_out, np.uint8)])
    for held_out, level in ((False, 40), (True, 210)):
        for scene in drawn_scenes.make_scenes(20, 64, held_out):
            assert (scene.image[scene.mask == 0] == level).all()
            objects = scene.image[scene.mask > 0]
            assert (objects >= level // 2).all()
            assert (objects <= level // 2 + 128).all()


def test_fit():
    """The shared loop trains: a linear map is found, in batches of its data."""
    torch.manual_seed(0)
    model, (x, w) = torch.nn.Linear(4, 1, bias=False), torch.randn(2, 8, 4)
    y, seen = x @ w[0], []

    def loss_of(batch):
        seen.append(batch)
        return (model(x[batch])[:, 0] - y[batch]).square().mean()

    drawn_scenes.fit(model, loss_of, 8, 4, 200, 0.1, seed=0)
    assert (model.weight[0] - w[0]).abs().max() < 0.05
    assert len(seen) == 200
    assert all(len(batch) == 4 for batch in seen)


@pytest.fixture
def folder(tmp_path):
    """Two classes that can be told apart."""
    image_folder(tmp_path / 'data', dict(train=16, val=8))
    return tmp_path


def finetuned(folder, monkeypatch, *options):
    """(weights before training, optimizer, averaged weights) of a run."""
    seen, make_optimizer, make_ema = {}, finetune.timm.optim.create_optimizer_v2, finetune.timm.utils.ModelEmaV3

    def optimizer(model, **kwargs):
        seen['before'] = copy.deepcopy(model.state_dict())
        seen['optimizer'] = make_optimizer(model, **kwargs)
        return seen['optimizer']

    def ema(model, **kwargs):
        seen['model'], seen['ema'] = model, make_ema(model, **kwargs)
        return seen['ema']

    monkeypatch.setattr(finetune.timm.optim, 'create_optimizer_v2', optimizer)
    monkeypatch.setattr(finetune.timm.utils, 'ModelEmaV3', ema)
    finetune.main(['--data-dir', str(folder / 'data'), '--workers', '0', '--device', 'cpu', *options])
    return seen


def test_finetune(folder, monkeypatch, capsys):
    output = folder / 'new' / 'weights.safetensors'
    seen = finetuned(
        folder, monkeypatch, '--epochs', '2', '--batch-size', '8', '--ema', '0.5', '--output', str(output))
    assert float(re.findall(r'on val/: (.*) %', capsys.readouterr().out)[-1]) >= 90
    pretrained = timm.create_model('gunn15', pretrained=True).state_dict()
    assert all(torch.equal(v, pretrained[k]) for k, v in seen['before'].items() if not k.startswith('head'))
    written = timm.create_model('gunn15', num_classes=2, checkpoint_path=str(output)).state_dict()
    for k, v in seen['ema'].module.state_dict().items():
        assert_close(written[k], v.half().float() if v.ndim > 1 else v, rtol=0, atol=0)
    assert not torch.equal(written['head.fc.weight'], seen['model'].state_dict()['head.fc.weight'])
    assert [p.name for p in output.parent.iterdir()] == [output.name]


@pytest.mark.parametrize(('classes', 'mixup'), [(5, '0.2'), (10, '0')])
def test_finetune_from_a_checkpoint(folder, monkeypatch, classes, mixup):
    """Of any number of classes, that of the model's config included; layers nearer to the input get smaller rates."""
    source = timm.create_model('gunn15', num_classes=classes)
    torch.save(dict(state_dict=source.state_dict(), args=argparse.Namespace(epochs=1)), folder / 'last.pth.tar')
    mixed, params = [], finetune.timm.data.Mixup._params_per_batch
    monkeypatch.setattr(
        finetune.timm.data.Mixup, '_params_per_batch', lambda self: mixed.append(params(self)) or mixed[-1])
    seen = finetuned(
        folder, monkeypatch, '--checkpoint', str(folder / 'last.pth.tar'), '--epochs', '1', '--batch-size', '16',
        '--mixup', mixup, '--output', str(folder / 'weights.safetensors'))
    state = source.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in seen['before'].items() if not k.startswith('head'))
    scales = sorted({group['lr_scale'] for group in seen['optimizer'].param_groups})
    assert scales == pytest.approx([0.75 ** i for i in reversed(range(len(scales)))])
    assert len(scales) >= 7  # stem, three transitions, three layers
    scale_of = {id(p): group['lr_scale'] for group in seen['optimizer'].param_groups for p in group['params']}
    assert scale_of[id(seen['model'].stem.conv.weight)] == scales[0]
    assert scale_of[id(seen['model'].head.fc.weight)] == 1
    assert len(mixed) == 2
    assert all((share < 1) == (mixup != '0') for share, _ in mixed)


@pytest.mark.parametrize('name', ['gunn18', 'sunn18'])
def test_finetune_large_networks(folder, monkeypatch, name):
    """From weights of another tag than the default; the rates of a network without any are all the same."""
    seen = finetuned(folder, monkeypatch, '--model', name, '--img-size', '32', '--epochs', '1', '--batch-size', '16',
                     '--output', str(folder / 'weights.safetensors'))
    scales = {group.get('lr_scale', 1) for group in seen['optimizer'].param_groups}
    assert len(scales) == (10 if name == 'gunn18' else 1)
    if name == 'gunn18':
        state = timm.create_model(name, pretrained=True).state_dict()
        assert all(torch.equal(v, state[k]) for k, v in seen['before'].items() if not k.startswith('head'))


def test_finetune_says_what_is_wrong(folder, capsys):
    data = str(folder / 'data')
    for options, message in (
            (['--data-dir', data, '--model', 'gunn'], 'expected the name of a timm model, got gunn'),
            (['--data-dir', str(folder)], f'expected a folder {folder / "train"} with a subfolder of images per class'),
            (['--data-dir', data, '--checkpoint', 'none'], 'expected a checkpoint, got none'),
            (['--data-dir', data, '--batch-size', '7'], '--mixup >= 0 and --lr > 0, got 5, 7, 0.2 and 0.001'),
            (['--data-dir', data, '--img-size', '0'], 'expected --img-size of 16 or more, got 0'),
            (['--data-dir', data, '--output', 'x.pth'], 'that ends in .safetensors, got x.pth')):
        with pytest.raises(SystemExit):
            finetune.main(options)
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit, match='at least one batch of 64 training images, got 32'):
        finetune.main(['--data-dir', data, '--batch-size', '64'])
    torch.save(timm.create_model('resnet18').state_dict(), folder / 'resnet.pth')
    with pytest.raises(SystemExit, match=r'a network like this one in .*resnet.pth, got none for stem.conv.weight'):
        finetune.main(['--data-dir', data, '--batch-size', '8', '--checkpoint', str(folder / 'resnet.pth')])
    torch.save(timm.create_model('sunn24').state_dict(), folder / 'sunn24.pth')
    with pytest.raises(SystemExit, match=r'(?s)a network like this one in .*sunn24.pth: .*size mismatch'):
        finetune.main(['--data-dir', data, '--batch-size', '8', '--checkpoint', str(folder / 'sunn24.pth')])
    (folder / 'data' / 'val' / 'class1').rename(folder / 'data' / 'val' / 'class2')
    with pytest.raises(SystemExit, match=r"got in one alone \['class1', 'class2'\]"):
        finetune.main(['--data-dir', data])
