"""From a source of labelled images to batches of bytes, decoded and augmented by loader workers.

A sample that cannot be read travels as text to the training process, which names it: an exception raised in a loader
worker would arrive as a page of traceback. In training the next readable image of the epoch takes its place, a function
of seed, epoch and index; an evaluation, which counts each image once, stops.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from sparsemae.data.sampling import Key, epoch_order, seeding
from sparsemae.data.sources import Source

# What Pillow raises on files that are not as they should be.
UNREADABLE = (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError)


@dataclass(frozen=True)
class Unreadable:
    """Stands in for a sample that could not be read."""

    reason: str
    """One line that names the file."""
    unreachable: bool = False
    """Its folder, or the file system, is gone: for a while, perhaps."""


class UnreadableImages:
    """The training images that could not be read, over all processes: each is named once in a process's life.

    Args:
        images: in the training set.
        share: of them that is tolerated (data.max_unreadable).
        say: writes a line to the run's log.
    """

    def __init__(self, images: int, share: float, say: Callable[[str], None] = lambda text: None) -> None:
        self.images, self.share, self.say = images, share, say
        self.named: set[str] = set()
        self._new: list[str] = []

    def add(self, reasons: Sequence[str]) -> None:
        """Note what this process found; alone it settles at once."""
        self._new += reasons
        if self._new and not _several_processes():
            self.settle()

    def settle(self) -> None:
        """Bring the processes together: all call it at the same place, and all raise, or none.

        Raises ValueError, naming the first file, once more than the tolerated share is unreadable.
        """
        found: list[list[str]] = [self._new]
        if _several_processes():
            found = [[] for _ in range(dist.get_world_size())]
            dist.all_gather_object(found, self._new)
        self._new = []
        for reason in dict.fromkeys(reason for reasons in found for reason in reasons):
            if reason in self.named:
                continue
            self.named.add(reason)
            count = f"{len(self.named):,} of {self.images:,} images"
            if len(self.named) > tolerated(self.images, self.share):
                hint = (
                    f" ({count} cannot be read, more than data.max_unreadable={self.share:g}: sparsemae check "
                    "--write-exclude FILE lists them all for data.exclude)"
                )
                raise ValueError(reason + hint * bool(self.share))
            self.say(f"{reason}: the next readable image takes its place ({count} so far)")


def tolerated(images: int, share: float) -> int:
    """Unreadable images among so many that do not stop a run."""
    return int(share * images)


def _several_processes() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class ImageDataset(Dataset[Any]):
    """Samples ``{"image": uint8 [3, H, W], "target": int, "index": int}``, for pretraining with ``"noise": [L]``.

    Indexed by a training key (epoch, index), or in evaluation by the index alone. ``"unreadable"`` lists what a
    training sample was tried with in vain; its augmentation is that of the key.

    Args:
        patches: number L of patches to draw masking noise for; 0 for none.
        smallest: images with a shorter side (px) are refused.
        exif: turn images as their EXIF orientation says.
        max_unreadable: share of the images that a run tolerates to be unreadable.
    """

    def __init__(
        self,
        source: Source,
        transform: Any,
        seed: int = 0,
        patches: int = 0,
        smallest: int = 1,
        exif: bool = False,
        max_unreadable: float = 0.0,
    ) -> None:
        self.source, self.transform, self.seed = source, transform, seed
        self.patches, self.smallest, self.exif = patches, smallest, exif
        self.tolerated = tolerated(len(source), max_unreadable)

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
                image, target = load_image(self.source, index, self.smallest, self.exif)
                break
            except ConnectionError as error:
                return Unreadable(str(error), unreachable=True)
            except ValueError as error:
                failed.append(str(error))
        else:
            if not training:
                return Unreadable(failed[0])
            # more than a run tolerates: it stops when its processes next meet, until then they keep in step
            image, target = Image.new("RGB", (self.smallest, self.smallest)), 0
        noise = {"noise": torch.rand(self.patches)} if self.patches else {}  # before the transform's own draws
        pixels = torch.as_tensor(self.transform(image))
        return {"image": pixels, "target": target, "index": index, "unreadable": failed, **noise}

    def _candidates(self, epoch: int, index: int) -> Iterator[int]:
        """The image, then those that follow it in the epoch, as long as a run can go on with so many unreadable."""
        yield index
        order = epoch_order(self.seed, epoch, len(self))
        at = int(np.flatnonzero(order == index)[0])
        for step in range(1, self.tolerated + 1):
            yield int(order[(at + step) % len(order)])


# A broken link, or a file that is not ours to read; other errors are of the file system.
_OF_ONE_FILE = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.ELOOP, errno.EISDIR)


def _reuse_memory(worker: int) -> None:
    """Let Pillow keep its memory from image to image: in a worker, page faults took 3 % of the time."""
    Image.core.set_blocks_max(8)  # type: ignore[attr-defined]


def load_image(source: Source, index: int, smallest: int = 1, exif: bool = False) -> tuple[Image.Image, int]:
    """Decode one image to RGB.

    Raises ValueError naming the file if it is unreadable or too small, ConnectionError if the source itself is gone.
    """
    try:
        file, target = source[index]
    except UNREADABLE as error:  # torchvision's sets decode here
        if isinstance(error, OSError) and _is_gone(error, source.filename(index)):
            raise ConnectionError(f"{source.filename(index)}: {error.strerror}") from error
        reason = getattr(error, "strerror", None) or _in_words(error)
        raise ValueError(f"{source.filename(index)}: unreadable image: {reason}") from error
    with file:
        return decode_rgb(file, source.filename(index), smallest, exif), target


def _is_gone(error: OSError, name: str) -> bool:
    """Whether the source itself is out of reach, rather than one image of it."""
    if error.errno is None:
        return False
    return error.errno not in _OF_ONE_FILE or not os.path.isdir(os.path.dirname(error.filename or name))


def decode_rgb(file: Any, name: str, smallest: int = 1, exif: bool = False) -> Image.Image:
    """PIL image (or a file of one) to RGB by Pillow's ``convert``, as timm and torchvision do.

    Gray is repeated, a palette looked up, CMYK converted, alpha dropped; 16-bit gray is clipped at 255, not scaled.
    Turned as its EXIF orientation says if ``exif``. Raises ValueError naming it if it is unreadable or too small.
    """
    try:
        with file if isinstance(file, Image.Image) else Image.open(file) as opened:
            image = ImageOps.exif_transpose(opened) if exif else opened
            if image.mode == "RGB":
                image.load()  # `convert` would copy it
            else:
                image = image.convert("RGB")
    except UNREADABLE as error:
        raise ValueError(f"{name}: unreadable image: {_in_words(error)}") from error
    if min(image.size) < smallest:
        raise ValueError(f"{name}: wanted at least one patch of {smallest} px, got {image.width} x {image.height} px")
    return image


def _in_words(error: Exception) -> str:
    return "not an image in a known format" if isinstance(error, UnidentifiedImageError) else str(error)


def _collate(samples: list[Any]) -> dict[str, Any] | Unreadable:
    """A batch of what could be read, and ``"unreadable"``: what could not, one line each."""
    missed = [sample for sample in samples if isinstance(sample, Unreadable)]
    for sample in missed:
        if sample.unreachable:
            return sample
    readable = [sample for sample in samples if not isinstance(sample, Unreadable)]
    reasons = [sample.reason for sample in missed]
    reasons += [reason for sample in readable for reason in sample.pop("unreadable", ())]
    return {**(default_collate(readable) if readable else {}), "unreadable": reasons}


def batches(
    dataset: Dataset[Any],
    sampler: Sampler[Any],
    workers: int,
    pin_memory: bool = False,
    unreadable: UnreadableImages | None = None,
    timeout: float = 0.0,
) -> Iterator[Any]:
    """Batches in the sampler's order, on the CPU, of the images that could be read.

    The others are noted in ``unreadable``; without it the first one raises ValueError naming the file. Raises
    ConnectionError if the source is gone, and torch's RuntimeError if a worker dies or gives nothing for ``timeout``
    seconds (0: however long it takes).
    """
    loader = DataLoader(
        dataset, batch_sampler=sampler, num_workers=workers, collate_fn=_collate, pin_memory=pin_memory,
        timeout=timeout if workers else 0, worker_init_fn=_reuse_memory,
        generator=torch.Generator(),  # or starting the iterator would draw from the global one
    )  # fmt: skip
    for batch in loader:
        if isinstance(batch, Unreadable):
            raise ConnectionError(batch.reason)
        reasons = batch.pop("unreadable")
        if reasons and unreadable is None:
            raise ValueError(reasons[0])
        if unreadable is not None:
            unreadable.add(reasons)
        if batch:
            yield batch
