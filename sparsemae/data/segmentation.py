"""Images with masks: where they lie, how both are cut and turned together, and what a batch holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from timm.data.readers.img_extensions import get_img_extensions
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from sparsemae.data import embedded
from sparsemae.data.classification import Unreadable, decode_rgb
from sparsemae.data.masks import IGNORED, SCENEPARSE150, Labels, read_classes, read_mask
from sparsemae.data.sampling import HOLDOUT, Key, seeding, stream
from sparsemae.data.sources import SPLIT_FOLDERS
from sparsemae.limits import ABOVE_0, AT_LEAST_1, SHARE, UP_TO_1, check_limits

MASK_FOLDERS = ("annotations", "masks", "labels")
CROP_TRIES = 10


@dataclass
class MaskSourceConfig:
    """Where images and their masks lie, and what the masks' values mean."""

    source: Literal["embedded", "sceneparse", "folder"] = "embedded"
    """embedded: Fashion-MNIST in the package, with masks computed from it; sceneparse: SceneParse150 (ADE20K) as
    downloaded, ROOT/ADEChallengeData2016 or ROOT/{images,annotations}/{training,validation}; folder:
    ROOT/images/{train,val} and ROOT/masks/{train,val}, same stems (without a val folder a tenth is held out)."""
    root: str | None = None
    """Folder of images and masks; not used by the embedded source."""
    classes: str | None = None
    """Of a folder: text file with one class a line, in the order of the masks' values; for colour masks R G B NAME."""
    reduce_zero_label: bool | None = None
    """The masks' 0 means "not annotated" and is ignored; None: for sceneparse only."""
    ignore_label: int = 255
    """Mask value that is ignored, at most 65535."""
    exif: bool = False
    """Turn images (not masks) as their EXIF orientation says. Goes with the model's file."""
    workers: int = 2
    """Loader processes per device; 0 loads in the training process."""


@dataclass
class MaskDataConfig(MaskSourceConfig):
    """Images with masks, their preparation and their augmentation."""

    train_images: int | None = None
    """Use at most this many training images: of files a fixed random choice, else the first; None: all."""
    img_size: int = 512
    """Side of the training crop and of the window, px."""
    short_side: int = 512
    """Images are resized to this shorter side, px: in training times a random scale, in evaluation as it is."""
    long_side: int = 2048
    """Largest longer side after that resize, px; in training times the scale."""
    scale: tuple[float, float] = (0.5, 2.0)
    """Random scale."""
    crop_max_share: float = 0.75
    """Crops are drawn anew, up to 10 times, while they have no label, or one class is more than this share of them."""
    hflip: float = 0.5
    """Probability of a horizontal flip."""
    photometric: bool = True
    """Brightness, contrast, saturation and hue, each changed with probability 0.5."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Channel means, for pixels in 0 to 1."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Channel standard deviations, for pixels in 0 to 1."""

    def __post_init__(self) -> None:
        sides = {"img_size": AT_LEAST_1, "short_side": AT_LEAST_1, "long_side": AT_LEAST_1}
        check_limits(self, "data.", std=ABOVE_0, crop_max_share=UP_TO_1, hflip=SHARE, **sides)


@dataclass(frozen=True)
class MaskSource:
    """Images and masks by index."""

    labels: Labels
    names: list[str]
    """Of the images, for messages."""
    read: Callable[[int], tuple[Image.Image, np.ndarray]]
    """RGB image, and classes uint8 ``[H, W]`` of the same size; raises ValueError naming the file."""
    one_size: bool
    """All images have the same size."""

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class Pairs:
    """The files of one split."""

    pairs: list[tuple[Path, Path]]
    """Image and mask of the same stem."""
    images_alone: list[Path] = field(default_factory=list)
    masks_alone: list[Path] = field(default_factory=list)


def open_masks(data: MaskSourceConfig, split: Literal["train", "val"], limit: int | None = None) -> MaskSource:
    """Open one split, or at most ``limit`` images of it.

    Raises ValueError if the folder is missing or empty, or an image or a mask lacks the other.
    """
    labels = open_labels(data)
    if limit is not None and limit < 1:
        raise ValueError(f"data.train_images: wanted at least 1, got {limit}")
    if data.source == "embedded":
        reader, masks = embedded.EmbeddedReader(split), embedded.masks(split)
        names = [reader.filename(index) for index in range(len(reader))[:limit]]
        return MaskSource(labels, names, partial(_embedded_pair, reader, masks), True)
    found = find_pairs(data, split)
    for alone, what in ((found.images_alone, "images without masks"), (found.masks_alone, "masks without images")):
        if alone:
            raise ValueError(f"{data.root}: {len(alone)} {what}: {', '.join(map(str, alone[:3]))}")
    pairs = found.pairs
    if limit is not None:
        pairs = [pairs[i] for i in sorted(stream(0, HOLDOUT, 1).permutation(len(pairs))[:limit])]
    names = [str(image) for image, _ in pairs]
    return MaskSource(labels, names, partial(_listed_pair, pairs, labels, data.exif), False)


# functions with names: loader processes that are not forked are sent them
def _embedded_pair(reader: embedded.EmbeddedReader, masks: Any, index: int) -> tuple[Image.Image, Any]:
    return reader[index][0].convert("RGB"), masks[index]


def _listed_pair(pairs: Sequence[tuple[Path, Path]], labels: Labels, exif: bool, index: int) -> Any:
    return read_pair(*pairs[index], labels, exif)


def open_labels(data: MaskSourceConfig) -> Labels:
    """The classes of a source. Raises ValueError on options that do not go with it."""
    if not 0 <= data.ignore_label < 1 << 16:
        raise ValueError(f"ignore_label: wanted 0 to 65535, got {data.ignore_label}")
    given = {name: getattr(data, name) for name in ("root", "classes")}
    wanted = {"embedded": (), "sceneparse": ("root",), "folder": ("root", "classes")}[data.source]
    for name, value in given.items():
        if (value is not None) != (name in wanted):
            expected = {"root": "a folder", "classes": "a file with one class a line"}[name]
            raise ValueError(
                f"{name}: wanted {expected if name in wanted else 'none'} for source {data.source}, "
                f"got {value or 'none'}"
            )
    reduce_zero_label = data.source == "sceneparse" if data.reduce_zero_label is None else data.reduce_zero_label
    if data.source == "embedded":
        return Labels(["Background", *embedded.CLASS_NAMES], reduce_zero_label, data.ignore_label)
    names, colours = read_classes(data.classes or SCENEPARSE150)
    return Labels(names, reduce_zero_label, data.ignore_label, colours, data.source == "sceneparse")


def classes_at_a_glance(source: MaskSource, masks: int = 16) -> set[int]:
    """Classes in so many masks, spread over the source."""
    indices = np.unique(np.linspace(0, len(source) - 1, masks).round().astype(int))
    found = {int(index) for i in indices for index in np.unique(source.read(int(i))[1])}
    return found - {IGNORED}


def find_pairs(data: MaskSourceConfig, split: Literal["train", "val"]) -> Pairs:
    """Files of one split; what lacks its other half is listed with the split that it lies in.

    Raises ValueError, naming the folder, if the layout is another or there is no pair.
    """
    root = Path(data.root or ".")
    if not root.is_dir():
        raise ValueError(f"root: {root}: no such folder")
    if (root / "ADEChallengeData2016").is_dir():
        root = root / "ADEChallengeData2016"
    images, masks = root / "images", next((root / name for name in MASK_FOLDERS if (root / name).is_dir()), None)
    if not images.is_dir() or masks is None:
        full = next(root.rglob("*_seg.png"), None) is not None
        raise ValueError(
            f"{root}: wanted the folders images and {' or '.join(MASK_FOLDERS)}, "
            f"got {', '.join(sorted(file.name for file in root.iterdir())[:4]) or 'nothing'}"
            + ("; this is the full ADE20K: wanted SceneParse150 (ADEChallengeData2016)" if full else "")
        )
    folders = {name: _split_name(images, masks, names) for name, names in SPLIT_FOLDERS.items()}
    train, val = folders["train"], folders["val"]
    if val is not None:
        if train is None:
            raise ValueError(f"{images}: wanted the folders train and {val}, got {val} alone")
        own = train if split == "train" else val
        return _pairs(images / own, masks / own)
    found = _pairs(images / (train or ""), masks / (train or ""))
    order = stream(0, HOLDOUT).permutation(len(found.pairs))  # a tenth is held out, the same every time
    held_out = max(1, len(order) // 10)
    if split == "val":
        return Pairs([found.pairs[i] for i in sorted(order[:held_out])])
    return replace(found, pairs=[found.pairs[i] for i in sorted(order[held_out:])])


def _split_name(images: Path, masks: Path, names: Sequence[str]) -> str | None:
    return next((name for name in names if (images / name).is_dir() or (masks / name).is_dir()), None)


def _pairs(images: Path, masks: Path) -> Pairs:
    by_stem = [
        {
            str(file.relative_to(folder).with_suffix("")): file
            for file in sorted(folder.rglob("*"))
            if file.suffix.lower() in endings
        }
        for folder, endings in ((images, get_img_extensions(as_set=True)), (masks, {".png"}))
    ]
    common = by_stem[0].keys() & by_stem[1].keys()
    alone = [[file for stem, file in files.items() if stem not in common] for files in by_stem]
    if not common:
        raise ValueError(
            f"{images}: wanted images with PNG masks of the same names in {masks}, "
            f"got {len(by_stem[0])} images and {len(by_stem[1])} masks without a common name"
        )
    return Pairs([(by_stem[0][stem], by_stem[1][stem]) for stem in sorted(common)], *alone)


def read_pair(image: Path, mask: Path, labels: Labels, exif: bool) -> tuple[Image.Image, np.ndarray]:
    """An RGB image and its classes uint8 ``[H, W]``. Raises ValueError naming the file."""
    picture = decode_rgb(image, str(image), exif=exif)
    values = read_mask(mask)
    height, width = values.shape[:2]
    if picture.size != (width, height):
        turned = picture.size == (height, width)
        raise ValueError(
            f"{mask}: wanted the size of its image, {picture.width} x {picture.height} px, got {width} x {height} px"
            + " (turned by the image's EXIF orientation? then exif true)" * turned
        )
    return picture, labels.decode(values, str(mask))


class MaskDataset(Dataset[Any]):
    """Samples ``{"image": uint8 [3, H, W], "target": uint8 [H, W], "index": int}``.

    Indexed by a training key (epoch, index), or in evaluation by the index alone.
    """

    def __init__(self, source: MaskSource, transform: Any = None, seed: int = 0) -> None:
        self.source, self.transform, self.seed = source, transform, seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, keys: Sequence[int | Key]) -> list[dict[str, Any] | Unreadable]:
        with seeding(self.seed, keys) as seeded:
            return [self._sample(key) for key in seeded]

    def __getitem__(self, key: int | Key) -> dict[str, Any] | Unreadable:
        return self.__getitems__([key])[0]

    def _sample(self, key: int | Key) -> dict[str, Any] | Unreadable:
        index = key[1] if isinstance(key, tuple) else key
        try:
            picture, classes = self.source.read(index)
        except ValueError as error:
            return Unreadable(str(error))
        image, mask = tv_tensors.Image(F.pil_to_tensor(picture)), tv_tensors.Mask(torch.from_numpy(classes.copy()))
        if self.transform is not None:
            image, mask = self.transform(image, mask)
        return {"image": image.as_subclass(Tensor), "target": mask.as_subclass(Tensor), "index": index}


def training_transform(data: MaskDataConfig) -> Any:
    """(image, mask) to a pair of ``img_size`` px, drawing from the global generators."""
    if not 0 < data.scale[0] <= data.scale[1]:
        raise ValueError(f"data.scale: wanted two scales above 0 in ascending order, got {list(data.scale)}")
    steps: list[Any] = [
        _RandomScale(data.short_side, data.long_side, data.scale),
        _RandomCrop(data.img_size, data.mean, data.crop_max_share),
        v2.RandomHorizontalFlip(data.hflip),
    ]
    return v2.Compose([*steps, _Photometric(hue=(-0.1, 0.1))] if data.photometric else steps)


def resized_size(height: int, width: int, short_side: float, long_side: float) -> tuple[int, int]:
    """Height and width with this shorter side, or a smaller one where the longer would pass ``long_side``."""
    factor = min(short_side / min(height, width), long_side / max(height, width))
    return max(1, round(height * factor)), max(1, round(width * factor))


class _RandomScale(v2.Transform):  # type: ignore[misc]
    """Resize both, the mask to the nearest pixel, by one scale."""

    def __init__(self, short_side: int, long_side: int, scale: tuple[float, float]) -> None:
        super().__init__()
        self.short_side, self.long_side, self.scale = short_side, long_side, scale

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        scale = float(torch.empty(()).uniform_(*self.scale))
        height, width = flat_inputs[0].shape[-2:]
        return {"size": resized_size(height, width, self.short_side * scale, self.long_side * scale)}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return self._call_kernel(F.resize, inpt, size=list(params["size"]), antialias=True)


class _RandomCrop(v2.RandomCrop):  # type: ignore[misc]
    """A crop with labels, of which no class has more than ``max_share``, if it finds one.

    What is smaller than the crop is filled up, the image with the mean colour, the mask with `IGNORED`.
    """

    def __init__(self, size: int, mean: Sequence[float], max_share: float) -> None:
        fill = {tv_tensors.Image: [round(255 * value) for value in mean], tv_tensors.Mask: IGNORED}
        super().__init__(size, pad_if_needed=True, fill=fill)
        self.max_share = max_share

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        mask = next(entry for entry in flat_inputs if isinstance(entry, tv_tensors.Mask))
        for _ in range(CROP_TRIES):
            params: dict[str, Any] = super().make_params(flat_inputs)
            counts = torch.bincount(self.transform(mask, params).flatten().long(), minlength=IGNORED + 1)[:IGNORED]
            if 0 < counts.max() <= self.max_share * counts.sum():
                break
        return params


class _Photometric(v2.RandomPhotometricDistort):  # type: ignore[misc]
    """torchvision's, without its permutation of the channels, which segmentation recipes do not have."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        return {**super().make_params(flat_inputs), "channel_permutation": None}
