"""The embedded images, of Fashion-MNIST: real images for every command, with nothing to download.

They are a distribution of their own, `sparsemae-images` (folder images/ of the repository), whose one xz file
holds the labels, then the pixels, as bytes: the first 10,000 training images, then all 10,000 test images, in the
original order. `tools/embed_fashion_mnist.py` makes it from the original IDX files.
"""

import lzma
from functools import cache
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sparsemae.data.masks import Legend

TRAIN_IMAGES, TEST_IMAGES, SIDE = 10_000, 10_000, 28
CLASS_NAMES = [
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
]  # fmt: skip
SHA256 = "95a675888d4544fe4e273d9f70a7555accc103bc16ab8a3368ac0dc5169d6e06"
"""Of the xz file."""
MASK_THRESHOLD = 12


def file() -> Path:
    """Where they lie. Raises ValueError if they are not installed."""
    spec = find_spec("sparsemae_images")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            "wanted the embedded images, which are a package of their own, sparsemae-images, got none: pip install "
            "./images in a checkout of sparsemae, or name your own images"
        )
    return Path(next(iter(spec.submodule_search_locations))) / "images.xz"


@cache
def arrays() -> tuple[np.ndarray, np.ndarray]:
    """Labels uint8 ``[20000]`` and pixels uint8 ``[20000, 28, 28]``, training images first."""
    content = np.frombuffer(lzma.decompress(file().read_bytes()), np.uint8)
    count = TRAIN_IMAGES + TEST_IMAGES
    return content[:count], content[count:].reshape(count, SIDE, SIDE)


class EmbeddedReader:
    """The reader interface of timm (index to image and label) over one split of the embedded images."""

    class_names = CLASS_NAMES

    def __init__(self, split: str) -> None:
        labels, pixels = arrays()
        part = slice(0, TRAIN_IMAGES) if split == "train" else slice(TRAIN_IMAGES, None)
        self.split, self.labels, self.pixels = split, labels[part], pixels[part]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, Any]:
        return Image.fromarray(self.pixels[index]), int(self.labels[index])

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        """A name for messages: the images have no files."""
        return f"fashion-mnist/{self.split}/{index:05d}"


class EmbeddedPairs(EmbeddedReader):
    """Images, and the classes of all their pixels, uint8 ``[28, 28]``, in place of a label."""

    legend = Legend(["Background", *CLASS_NAMES])
    class_names = legend.class_names

    def __getitem__(self, index: int) -> tuple[Image.Image, Any]:
        return super().__getitem__(index)[0], masks(self.split)[index]


@cache
def masks(split: str) -> np.ndarray:
    """Classes of all pixels of a split, uint8 ``[10000, 28, 28]``: 0 background, else the image's label + 1.

    They are computed, not drawn by people: where the image is brighter than 12, holes filled.
    """
    reader = EmbeddedReader(split)
    classes: np.ndarray = fill_holes(reader.pixels > MASK_THRESHOLD) * (reader.labels + 1)[:, None, None]
    return classes


def fill_holes(shapes: np.ndarray) -> np.ndarray:
    """Of each of ``[B, H, W]`` bool, all that is not joined (up, down, left, right) to the outside."""
    free = np.pad(~shapes, ((0, 0), (1, 1), (1, 1)), constant_values=True)
    outside = np.zeros_like(free)
    outside[:, 0], reached = True, 0  # the margin, which is free all around, is joined to itself over the edges
    while (now := int(outside.sum())) > reached:
        reached = now
        for axis, step in product((1, 2), (1, -1)):
            outside |= np.roll(outside, step, axis) & free
    return ~outside[:, 1:-1, 1:-1]
