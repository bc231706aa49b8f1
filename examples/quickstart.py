"""Fine-tune the pretrained GUNN-15 on handwritten digits, and let it name photographs: about a minute and a half.

    python examples/quickstart.py

The network is found by name through timm alone. Its weights come with the package; they were trained on CIFAR-10. The
digits are scikit-learn's 1,797 scanned ones of 8x8 pixels, upscaled to 24x24 (the network takes any size); a quarter of
them is held out. The photographs are a dozen of CIFAR-10's test images, in examples/cifar10. Writes
output/quickstart.png, the held-out digits that the network is least certain of and the loss curve, and
output/photographs.png, the photographs with what the pretrained network sees in them.
"""
import argparse
from pathlib import Path

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
import timm
import timm.data
import torch
import torch.nn.functional as F
from common import has_weights
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

PHOTOGRAPHS = Path(__file__).parent / 'cifar10'


def load_images(size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Training images, held-out images (n, 1, size, size) in [-1, 1], training labels, held-out labels."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    images = F.interpolate(images, size=(size, size), mode='bilinear')
    labels = torch.tensor(digits.target)
    indices = train_test_split(range(len(labels)), test_size=0.25, random_state=0, stratify=digits.target)
    return (*(images[i] for i in indices), *(labels[i] for i in indices))


def train(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor, epochs: int, batch_size: int) -> list:
    """Train with SGD under a one-cycle schedule; returns the loss of every step."""
    steps = epochs * (len(images) // batch_size)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps)
    losses = []
    model.train()
    with tqdm(total=steps, desc='training', unit='step', disable=None) as progress:
        for _ in range(epochs):
            for batch in torch.randperm(len(images)).split(batch_size)[:len(images) // batch_size]:
                loss = F.cross_entropy(model(images[batch]), labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                losses.append(loss.item())
                progress.set_postfix(loss=f'{sum(losses[-10:]) / len(losses[-10:]):.3f}')
                progress.update()
    return losses


@torch.no_grad()
def predict(model: torch.nn.Module, images: torch.Tensor, batch_size: int) -> torch.Tensor:
    """Class probabilities (n, classes)."""
    model.eval()
    parts = tqdm(images.split(batch_size), desc='evaluating', unit='batch', disable=None)
    return torch.cat([model(b).softmax(1) for b in parts])


def draw(path: Path, images: torch.Tensor, labels: torch.Tensor, probs: torch.Tensor, losses: list) -> None:
    """The 14 least certain predictions and the loss per step."""
    confidence, predicted = probs.max(1)
    fig = plt.figure(figsize=(12, 3.4))
    left, right = fig.subfigures(1, 2, width_ratios=(1.5, 1))
    for ax, i in zip(left.subplots(2, 7).flat, confidence.argsort(), strict=False):
        ax.imshow(images[i, 0].numpy(), cmap='gray')
        color = 'k' if predicted[i] == labels[i] else 'r'
        truth = '' if predicted[i] == labels[i] else f', is {labels[i]}'
        ax.set_title(f'{predicted[i]} ({confidence[i]:.0%}){truth}', color=color, fontsize=9)
        ax.axis('off')
    left.suptitle('least certain held-out images (red: wrong)')
    ax = right.subplots()
    ax.semilogy(losses)
    ax.set(xlabel='step', ylabel='training loss')
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=110, bbox_inches='tight')


@torch.no_grad()
def name_photographs(model: torch.nn.Module, path: Path) -> int:
    """Draw the photographs with the two likeliest classes of each; returns how many the network names rightly."""
    names = model.pretrained_cfg['label_names']
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    files = sorted(PHOTOGRAPHS.glob('*.jpg'))
    images = [Image.open(file) for file in files]
    probs = model.eval()(torch.stack([transform(image) for image in images])).softmax(1)
    fig, axes = plt.subplots(2, (len(files) + 1) // 2, figsize=(12, 5))
    right = 0
    for ax, file, image, prob in zip(axes.flat, files, images, probs, strict=False):
        truth = file.stem.rstrip('0123456789')
        (first, second), (i, j) = (t.tolist() for t in prob.topk(2))
        right += names[i] == truth
        ax.imshow(image, interpolation='bicubic')
        ax.set_title(f'{names[i]} {first:.0%}\n{names[j]} {second:.0%}', fontsize=9,
                     color='k' if names[i] == truth else 'r')
    for ax in axes.flat:
        ax.axis('off')
    fig.suptitle('CIFAR-10 test images and the two likeliest classes (red: wrong)')
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=110, bbox_inches='tight')
    return right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', default='gunn15', help='any timm model that takes images of the given size')
    parser.add_argument('--size', type=int, default=24, help='side of the images, in pixels')
    parser.add_argument('--epochs', type=int, default=2)
    parser.add_argument('--batch-size', type=int, default=32)
    parser.add_argument('--train-images', type=int, default=None, help='use only the first n training images')
    parser.add_argument('--output', type=Path, default=Path('output/quickstart.png'))
    args = parser.parse_args()
    if args.epochs < 1 or args.batch_size < 2:
        parser.error(f'expected --epochs >= 1 and --batch-size >= 2, got {args.epochs} and {args.batch_size}')
    if args.size < 8:
        parser.error(f'expected --size >= 8, the side of the digits, got {args.size}')

    torch.manual_seed(0)
    # Weights that come with the package: those of other models would have to be downloaded.
    pretrained = args.model.split('.')[0] in timm.list_models(module='gunn') and has_weights(args.model)
    try:
        model = timm.create_model(args.model, pretrained=pretrained, num_classes=10, in_chans=1)
    except RuntimeError as e:
        parser.error(f'expected the name of a timm model, got {args.model}: {e}')
    model.to(memory_format=torch.channels_last)
    print(f'{args.model} with one input channel: {sum(p.numel() for p in model.parameters()):,} parameters')
    images, held_out, labels, held_out_labels = load_images(args.size)
    images, labels = images[:args.train_images], labels[:args.train_images]
    if len(images) < args.batch_size:
        parser.error(f'expected at least one batch of {args.batch_size} training images, got {len(images)}')

    losses = train(model, images, labels, args.epochs, args.batch_size)
    probs = predict(model, held_out, 2 * args.batch_size)
    accuracy = (probs.argmax(1) == held_out_labels).double().mean().item()
    draw(args.output, held_out, held_out_labels, probs, losses)
    print(f'accuracy on {len(held_out)} held-out images: {accuracy:.1%}')
    print(f'predictions and loss curve: {args.output}')

    photographs = args.output.with_name('photographs.png')
    right = name_photographs(timm.create_model('gunn15.c10', pretrained=True), photographs)
    print(f'photographs that the pretrained gunn15.c10 names rightly: {right} of 12, {photographs}')


if __name__ == '__main__':
    main()
