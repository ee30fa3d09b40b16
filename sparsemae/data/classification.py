"""From a folder of labelled images (or the embedded ones) to batches of bytes, and from bytes to the normalised input.

Images are read through timm's readers, not timm's ``ImageDataset``, which silently replaces unreadable files.
A sample that cannot be read travels as an `Unreadable` to the training process, which names it: an exception raised
in a loader worker would arrive as a page of traceback.
"""

from __future__ import annotations

import errno
import os
import random
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from timm.data import create_transform
from timm.data.readers import create_reader
from timm.data.readers.img_extensions import get_img_extensions
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate
from torchvision import transforms
from torchvision.datasets import FashionMNIST

from sparsemae.data.embedded import CLASS_NAMES, EmbeddedReader
from sparsemae.data.exclude import read_exclude
from sparsemae.data.sampling import HOLDOUT, SAMPLE, Key, seeding, stream

SPLIT_FOLDERS = {"train": ("train", "training"), "val": ("val", "validation", "test")}


@dataclass
class SourceConfig:
    """Where the images lie."""

    source: Literal["embedded", "folder", "fashion-mnist"] = "embedded"
    """embedded: a part of Fashion-MNIST that ships with the package; folder: ROOT/train/CLASS/*.jpg and ROOT/val/...
    (or ROOT/CLASS/*.jpg, a tenth of which is held out); fashion-mnist: the full set, fetched to ROOT by torchvision."""
    root: str | None = None
    """Folder of the images; not used by the embedded source."""
    workers: int = 2
    """Loader processes per device; 0 loads in the training process."""
    exclude: str | None = None
    """File of images to leave out, one path a line, relative to root (`sparsemae check --write-exclude` writes one)."""


@dataclass
class DataConfig(SourceConfig):
    """Images, their preparation and their augmentation."""

    train_images: int | None = None
    """Use at most this many training images: of a folder a fixed random choice, else the first; None: all."""
    img_size: int = 224
    """Side of the model's input, px."""
    exif: bool = False
    """Turn images as their EXIF orientation says; the field does not. Goes with the model's file."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Channel means, for pixels in 0 to 1."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Channel standard deviations, for pixels in 0 to 1."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """Resampling of every resize."""
    crop: Literal["resized", "shift"] = "resized"
    """Training crop. resized: RandomResizedCrop; shift: resize to img_size, then shift by up to crop_shift px."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Area of a resized crop, as a share of the image."""
    crop_shift: int = 1
    """Largest shift, px."""
    hflip: float = 0.5
    """Probability of a horizontal flip."""
    auto_augment: str | None = None
    """timm's policy string, for example rand-m9-mstd0.5-inc1."""
    eval_crop: float = 0.875
    """Evaluation: the shorter side is resized to img_size / eval_crop px, then the centre is cropped."""


@dataclass(frozen=True)
class Source:
    """Images by index, and the names of their classes."""

    reader: Any
    """timm's reader interface: ``reader[i]`` is (file or PIL image, label), ``reader.filename(i)``."""
    class_names: list[str]
    indices: np.ndarray
    """Which of the reader's images belong to this split."""

    def __len__(self) -> int:
        return len(self.indices)

    def filename(self, index: int) -> str:
        """Path of one image, for messages."""
        return str(self.reader.filename(int(self.indices[index]), absolute=True))


def open_source(data: SourceConfig, split: Literal["train", "val"], limit: int | None = None) -> Source:
    """Open one split, or at most ``limit`` images of it of it.

    Raises ValueError, naming the folder, if it is missing or empty, or its classes are not those of the training split;
    or naming ``data.exclude``, if that cannot be read, names what the set does not hold, or leaves nothing.
    """
    if data.source == "embedded":
        if data.root is not None:
            raise ValueError(f"data.root: the embedded images take none, got {data.root} (wanted --data.source folder)")
        reader: Any = EmbeddedReader(split)
        source = Source(reader, CLASS_NAMES, _all(reader))
    elif data.root is None:
        raise ValueError(f"data.root: wanted a folder for data.source={data.source}, got none")
    elif data.source == "fashion-mnist":
        try:
            dataset = FashionMNIST(data.root, train=split == "train", download=True)
        except RuntimeError as error:  # torchvision's way of saying that no mirror answered
            raise ValueError(
                f"data.root: {data.root}: wanted Fashion-MNIST, which could not be fetched: {error}"
            ) from error
        reader = _IndexedDataset(dataset, f"fashion-mnist/{split}")
        source = Source(reader, dataset.classes, _all(reader))
    else:
        source = _open_folder(Path(data.root), split)
    if data.exclude is not None:
        if data.source != "folder":
            raise ValueError(f"data.exclude: wanted data.source=folder, got {data.source}")
        source = _without(source, Path(data.root or "."), data.exclude)
    if limit is None:
        return source
    if limit < 1:
        raise ValueError(f"data.train_images: wanted at least 1, got {limit}")
    if data.source == "folder":  # sorted by class: the first ones would be of one class
        order = stream(0, HOLDOUT, 1).permutation(len(source))[:limit]
        return Source(source.reader, source.class_names, np.sort(source.indices[order]))
    return Source(source.reader, source.class_names, source.indices[:limit])


def split_folders(root: Path) -> dict[str, Path | None]:
    """The folders ``train`` and ``val`` of a data set under the names the field has for them; None: there is none."""
    return {
        name: next((root / folder for folder in names if (root / folder).is_dir()), None)
        for name, names in SPLIT_FOLDERS.items()
    }


def _open_folder(root: Path, split: str) -> Source:
    if not root.is_dir():
        raise ValueError(f"data.root: {root}: no such folder")
    folders = split_folders(root)
    train = folders["train"] or root
    class_names = _read_folder(train).class_names
    if folders["val"] is None:  # one folder for both: hold out a tenth, the same tenth every time
        source = _read_folder(train)
        order = stream(0, HOLDOUT).permutation(len(source))
        held_out = max(1, len(source) // 10)
        return Source(source.reader, class_names, np.sort(order[:held_out] if split == "val" else order[held_out:]))
    if split == "train":
        return _read_folder(train)
    extra = sorted(set(_read_folder(folders["val"]).class_names) - set(class_names))
    if extra:
        raise ValueError(f"{folders['val']}: wanted the classes of {train}, got another: {', '.join(extra[:3])}")
    return _read_folder(folders["val"], class_names)


def _read_folder(folder: Path, class_names: list[str] | None = None) -> Source:
    class_map = {name: i for i, name in enumerate(class_names)} if class_names else ""
    try:
        reader = create_reader("", str(folder), class_map=class_map)
    except RuntimeError as error:
        raise ValueError(f"{folder}: wanted images in it or in its subfolders, found none") from error
    return Source(reader, list(reader.class_to_idx), _all(reader))


def _without(source: Source, root: Path, file: str) -> Source:
    """A folder source without the images that a list names; the labels of the classes stay."""
    listed = read_exclude(file, root)
    paths = [os.path.normpath(source.reader.filename(i, absolute=True)) for i in range(len(source.reader))]
    others = [os.path.normpath(folder) + os.sep for folder in split_folders(root).values() if folder is not None]
    unknown = [path for path in listed.keys() - set(paths) if not (path.startswith(tuple(others)) and _is_image(path))]
    if unknown:
        raise ValueError(
            f"data.exclude: {file}: wanted images of {root}, one path a line relative to it, got {len(unknown)} that "
            f"it does not hold: {', '.join(sorted(listed[path] for path in unknown)[:3])}"
        )
    kept = np.array([i for i in source.indices if paths[i] not in listed], np.int64)
    if not len(kept):
        raise ValueError(f"data.exclude: {file}: wanted some images left of {len(source)}, got none")
    return Source(source.reader, source.class_names, kept)


def _is_image(path: str) -> bool:
    return Path(path).suffix.lower() in get_img_extensions(as_set=True) and os.path.lexists(path)


def _all(reader: Any) -> np.ndarray:
    return np.arange(len(reader))


class _IndexedDataset:
    """A torchvision dataset behind timm's reader interface."""

    def __init__(self, dataset: Any, name: str) -> None:
        self.dataset, self.name = dataset, name

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        return f"{self.name}/{index}"


def training_transform(data: DataConfig) -> Any:
    """PIL image to uint8 ``[3, H, W]``, drawing from the global generators."""
    if data.crop == "resized":
        return create_transform(
            data.img_size, is_training=True, scale=data.crop_scale, hflip=data.hflip, color_jitter=0.0,
            auto_augment=data.auto_augment, interpolation=data.interpolation, mean=data.mean, use_prefetcher=True,
        )  # fmt: skip
    if data.auto_augment:
        raise ValueError(f"data.auto_augment: wanted none with data.crop=shift, got {data.auto_augment}")
    return transforms.Compose(
        [
            transforms.Resize((data.img_size, data.img_size), transforms.InterpolationMode(data.interpolation)),
            _RandomShift(data.crop_shift),
            transforms.RandomHorizontalFlip(data.hflip),
            transforms.PILToTensor(),
        ]
    )


class _RandomShift:
    """Move a PIL image by up to ``pixels`` each way, black where it leaves: RandomCrop(padding), in one PIL call."""

    def __init__(self, pixels: int) -> None:
        self.pixels = pixels

    def __call__(self, image: Image.Image) -> Image.Image:
        x, y = (random.randint(-self.pixels, self.pixels) for _ in range(2))
        return image.transform(image.size, Image.Transform.AFFINE, (1, 0, x, 0, 1, y))


def evaluation_transform(img_size: int, interpolation: str, eval_crop: float) -> Any:
    """PIL image to uint8 ``[3, H, W]``: resize the shorter side to ``img_size / eval_crop``, crop the centre."""
    return create_transform(
        img_size, is_training=False, interpolation=interpolation, crop_pct=eval_crop, use_prefetcher=True
    )


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 ``[B, 3, H, W]`` to float32 of mean 0 and deviation 1, on the images' device.

    The batch travels from the workers, and to the device, as bytes: a quarter of the floats.
    """
    shape, device = (1, 3, 1, 1), images.device
    return (images.float() / 255 - torch.tensor(mean, device=device).view(shape)) / torch.tensor(
        std, device=device
    ).view(shape)


@dataclass(frozen=True)
class Unreadable:
    """Stands in for a sample that could not be read."""

    reason: str
    """One line that names the file."""
    unreachable: bool = False
    """Its folder, or the file system, is gone: for a while, perhaps."""


class ImageDataset(Dataset[Any]):
    """Samples ``{"image": uint8 [3, H, W], "target": int, "index": int}``, for pretraining with ``"noise": [L]``.

    Indexed by a training key (epoch, index), or in evaluation by the index alone.

    Args:
        patches: number L of patches to draw masking noise for; 0 for none.
        smallest: images with a shorter side (px) are refused.
        exif: turn images as their EXIF orientation says.
    """

    def __init__(
        self,
        source: Source,
        transform: Any,
        seed: int = 0,
        patches: int = 0,
        smallest: int = 1,
        exif: bool = False,
    ) -> None:
        self.source, self.transform, self.seed = source, transform, seed
        self.patches, self.smallest, self.exif = patches, smallest, exif

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, keys: Sequence[int | Key]) -> list[dict[str, Any] | Unreadable]:
        with seeding() as seed_generators:
            return [self._sample(key, seed_generators) for key in keys]

    def __getitem__(self, key: int | Key) -> dict[str, Any] | Unreadable:
        return self.__getitems__([key])[0]

    def _sample(self, key: int | Key, seed_generators: Callable[..., int]) -> dict[str, Any] | Unreadable:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        seed_generators(self.seed, SAMPLE, epoch, index)
        try:
            image, target = load_image(self.source, index, self.smallest, self.exif)
        except ValueError as error:
            return Unreadable(str(error))
        except ConnectionError as error:
            return Unreadable(str(error), unreachable=True)
        noise = {"noise": torch.rand(self.patches)} if self.patches else {}  # before the transform's own draws
        return {"image": torch.as_tensor(self.transform(image)), "target": target, "index": index, **noise}


# A broken link, or a file that is not ours to read; other errors are of the file system.
_OF_ONE_FILE = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.ELOOP, errno.EISDIR)


def load_image(source: Source, index: int, smallest: int = 1, exif: bool = False) -> tuple[Image.Image, int]:
    """Decode one image to RGB.

    Raises ValueError naming the file if it is unreadable or too small, ConnectionError if the source itself is gone.
    """
    try:
        file, target = source.reader[int(source.indices[index])]
    except OSError as error:
        if error.errno not in _OF_ONE_FILE or not os.path.isdir(os.path.dirname(source.filename(index))):
            raise ConnectionError(f"{source.filename(index)}: {error.strerror}") from error
        raise ValueError(f"{source.filename(index)}: unreadable image: {error.strerror}") from error
    with file:
        return decode_rgb(file, source.filename(index), smallest, exif), target


def decode_rgb(file: Any, name: str, smallest: int = 1, exif: bool = False) -> Image.Image:
    """PIL image (or a file of one) to RGB, turned as its EXIF orientation says if ``exif``.

    Raises ValueError naming it if it is unreadable or too small.
    """
    try:
        with file if isinstance(file, Image.Image) else Image.open(file) as opened:
            image = (ImageOps.exif_transpose(opened) if exif else opened).convert("RGB")
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
        reason = "not an image in a known format" if isinstance(error, UnidentifiedImageError) else error
        raise ValueError(f"{name}: unreadable image: {reason}") from error
    if min(image.size) < smallest:
        raise ValueError(f"{name}: wanted at least one patch of {smallest} px, got {image.width} x {image.height} px")
    return image


def _collate(samples: list[Any]) -> Any:
    return next((sample for sample in samples if isinstance(sample, Unreadable)), None) or default_collate(samples)


def batches(
    dataset: Dataset[Any], sampler: Sampler[Any], workers: int, pin_memory: bool = False, timeout: float = 0.0
) -> Iterator[Any]:
    """Batches in the sampler's order, on the CPU.

    Raises ValueError naming the file at the first unreadable image, ConnectionError if the source is gone, and
    torch's RuntimeError if a worker dies or gives nothing for ``timeout`` seconds (0: however long it takes).
    """
    loader = DataLoader(
        dataset, batch_sampler=sampler, num_workers=workers, collate_fn=_collate, pin_memory=pin_memory,
        timeout=timeout if workers else 0,
        generator=torch.Generator(),  # or starting the iterator would draw from the global one
    )  # fmt: skip
    for batch in loader:
        if isinstance(batch, Unreadable):
            raise ConnectionError(batch.reason) if batch.unreachable else ValueError(batch.reason)
        yield batch
