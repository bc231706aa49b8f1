"""Folders of images for tests that train or evaluate."""
import numpy as np
from PIL import Image


def image_folder(root, splits, classes=2, size=32):
    """Write <split>/class<c>/<i>.png under root: noise of a colour by class, `splits` of each name to their numbers."""
    rng = np.random.default_rng(0)
    for split, n in splits.items():
        for c in range(classes):
            folder = root / split / f'class{c}'
            folder.mkdir(parents=True)
            for i in range(n):
                colour = 127 * np.array([c % 2, c % 3 == 1, c / classes])
                pixels = rng.integers(0, 128, (size, size, 3)) + colour
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f'{i}.png')
    return root
