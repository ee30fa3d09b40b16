"""From a source to samples of bytes, decoded and augmented in loader workers: one data set for classes and masks.

A sample that cannot be read travels as text to the training process, which names it: an exception raised in a loader
worker would arrive as a page of traceback. In training the next readable image of the epoch takes its place, a function
of seed, epoch and index; an evaluation, which counts each image once, stops.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from sparsemae.data.crops import Crop
from sparsemae.data.images import DEFAULT_RULES, PixelRules
from sparsemae.data.masks import IGNORED
from sparsemae.data.sampling import Key, epoch_order, seeding
from sparsemae.data.splits import Source

Transform = Callable[[Image.Image, Any], tuple[Tensor | Crop, Any]]
"""RGB image and target to uint8 ``[3, H, W]``, or to a crop that becomes that on the device, and target.

Draws from the global CPU generators.
"""


@dataclass(frozen=True)
class Unreadable:
    """Stands in for a sample that could not be read."""

    reason: str
    """One line that names the file."""
    unreachable: bool = False
    """Its folder, or the file system, is gone: for a while, perhaps."""


class ImageDataset(Dataset[Any]):
    """Samples ``{"image": uint8 [3, H, W] or a crop, "target": class or uint8 [H, W], "index": int}``.

    Indexed by a training key (epoch, index), or in evaluation by the index alone. With ``patches`` a sample has
    ``"noise": [L]``. ``"unreadable"`` lists what a training sample was tried with in vain; its augmentation is that of
    the key.

    Args:
        patches: number L of patches to draw masking noise for; 0 for none.
        smallest: images with a shorter side (px) are refused.
        rules: how files become RGB.
        max_unreadable: fraction of the images that a run tolerates to be unreadable.
        cache_gigabytes: memory for decoded images, which are read once; those beyond it each time.
    """

    def __init__(
        self,
        source: Source,
        transform: Transform,
        seed: int = 0,
        patches: int = 0,
        smallest: int = 1,
        rules: PixelRules = DEFAULT_RULES,
        max_unreadable: float = 0.0,
        cache_gigabytes: float = 0.0,
    ) -> None:
        self.source, self.transform, self.seed = source, transform, seed
        self.patches, self.smallest, self.rules = patches, smallest, rules
        self.tolerated = tolerated(len(source), max_unreadable)
        self._decoded: dict[int, tuple[Image.Image, Any]] = {}
        self._bytes_free = cache_gigabytes * 1e9

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, keys: Sequence[int | Key]) -> list[dict[str, Any] | Unreadable]:
        with seeding(self.seed, keys) as seeded:
            return [self._sample(key) for key in seeded]

    def __getitem__(self, key: int | Key) -> dict[str, Any] | Unreadable:
        return self.__getitems__([key])[0]

    def _sample(self, key: int | Key) -> dict[str, Any] | Unreadable:
        training = isinstance(key, tuple)
        epoch, index = key if isinstance(key, tuple) else (0, key)
        failed: list[str] = []
        for index in self._candidates(epoch, index) if training else (index,):  # noqa: B020 the one used
            try:
                image, target = self._read(index)
                break
            except ConnectionError as error:
                return Unreadable(str(error), unreachable=True)
            except ValueError as error:
                failed.append(str(error))
        else:
            if not training:
                return Unreadable(failed[0])
            # more than a run tolerates: it stops when its processes next meet, until then they keep in step
            image = Image.new("RGB", (self.smallest, self.smallest))
            target = np.full(image.size, IGNORED, np.uint8) if self.source.legend else 0
        noise = {"noise": torch.rand(self.patches)} if self.patches else {}  # before the transform's own draws
        pixels, target = self.transform(image, target)
        return {"image": pixels, "target": target, "index": index, "unreadable": failed, **noise}

    def _read(self, index: int) -> tuple[Image.Image, Any]:
        """`Source.read`, from memory where it is there."""
        if index not in self._decoded:
            read = image, target = self.source.read(index, self.smallest, self.rules)
            size = 4 * image.width * image.height + getattr(target, "nbytes", 0)  # Pillow's RGB has 4 bytes
            if size > self._bytes_free:
                return read
            self._bytes_free -= size
            self._decoded[index] = read
        return self._decoded[index]

    def _candidates(self, epoch: int, index: int) -> Iterator[int]:
        """The image, then those that follow it in the epoch, as long as a run can go on with so many unreadable."""
        yield index
        order = epoch_order(self.seed, epoch, len(self))
        at = int(np.flatnonzero(order == index)[0])
        for step in range(1, self.tolerated + 1):
            yield int(order[(at + step) % len(order)])


def tolerated(images: int, max_unreadable: float) -> int:
    """Unreadable images among so many that do not stop a run."""
    return int(max_unreadable * images)
