"""Where images lie, how they are prepared, and how they are augmented."""

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO
from itertools import chain, islice
from pathlib import Path
from typing import Literal

from sparsemae.limits import (
    ABOVE_0,
    AT_LEAST_0,
    AT_LEAST_1,
    BELOW_1,
    BETWEEN_0_AND_1,
    MAX_PIXELS,
    MOST_PROCESSES,
    UNIT_INTERVAL,
    UP_TO_1,
    Options,
    option,
)  # fmt: skip

WITHOUT_ROOT = ("embedded", "torchvision", "fashion-mnist")
"""Sources that have no root, or may make it."""
SPLITS = ("train", "training", "val", "valid", "validation", "dev", "eval", "test")
"""Names of folders that are splits, as `data.tree.SPLIT_WORDS` has them."""
LARGEST_HEADER = 1 << 20
"""Bytes of a header in a tar: one that says more is not believed."""


@dataclass
class SourceConfig(Options):
    """Where the images and their classes or masks lie."""

    prefix = "data."

    source: Literal[
        "auto", "embedded", "folder", "csv", "tar", "wds", "hfds", "torchvision", "fashion-mnist", "sceneparse"
    ] = "auto"  # fmt: skip
    """auto: what data.root looks like, or embedded without one. embedded: a part of Fashion-MNIST that ships with the
    package, its masks computed from the images. With classes: folder: ROOT/train/CLASS/*.jpg and ROOT/val/...; csv: a
    file with a line of FILE,CLASS for each image below its header, or a folder of such files train.csv and val.csv;
    tar: ROOT/train.tar and ROOT/val.tar with class folders or a tar per class in them, or ROOT/train/*.tar and
    ROOT/val/*.tar; wds: WebDataset shards ROOT/*train*.tar and ROOT/*val*.tar; hfds: a folder that HF datasets loads
    (parquet files, say); torchvision: one of its sets (data.name); fashion-mnist: the full set, fetched by
    torchvision. With masks: folder: ROOT/images/{train,val} and ROOT/masks/{train,val}, same stems; sceneparse:
    SceneParse150 (ADE20K) as downloaded. Where there is but one split (class folders in ROOT itself, ROOT a tar file,
    no val folder), a part of it is held out, see val_share."""
    root: str | None = option(
        None,
        may_change=True,
        must_exist=lambda data: data.source not in WITHOUT_ROOT and not re.search("://|{", data.root or ""),
    )
    """Folder of the images (or the tar file); the embedded source has none."""
    name: str | None = None
    """torchvision's name of the set, for example CIFAR10."""
    download: bool = option(False, may_change=True)
    """Let torchvision fetch the set to data.root if it is not there."""
    workers: int = option(2, (0, MOST_PROCESSES), may_change=True, from_data=True)
    """Loader processes per device; 0 loads in the process that computes."""
    val_share: float = option(0.1, BETWEEN_0_AND_1)
    """Fraction of the only split that is held out for validation, of each class at least one image where it has two."""
    val_rule: Literal["stratified", "permutation"] = "stratified"
    """stratified: that fraction of every class; permutation: of all images, as models of before were trained."""
    exclude: str | None = option(None, must_exist=True)
    """File of images to leave out, one path a line, relative to data.root (`sparsemae check --write-exclude` writes
    one)."""
    image_column: str | None = None
    """Of hfds and csv: column of the images or their files; None: image, or the only one there is; of csv the first."""
    label_column: str | None = None
    """Of hfds and csv: column of the classes, ClassLabel or text; None: label, or the only one there is; of csv the
    second."""
    exif: bool | None = None
    """Turn images as their EXIF orientation says, with their masks; None: images with classes are turned, images with
    masks refused if they have one. A model's file keeps it."""
    background: tuple[int, int, int] | None = option((255, 255, 255), (0, 255))
    """RGB color that transparent images are drawn on; None: alpha is dropped. A model's file keeps it."""
    bits: int | None = option(16, (9, 16))
    """Bits of 16-bit gray that are in use, 9 to 16: the largest such value becomes white; None: values are clipped at
    255. A model's file keeps it."""
    max_pixels: int = option(MAX_PIXELS, AT_LEAST_1, may_change=True)
    """Of an image; a larger one counts as unreadable. Decoding takes up to 16 bytes for each."""
    classes: str | None = option(None, must_exist=True)
    """Of a folder with masks: text file with one class a line, in the order of the masks' values; for color masks
    R G B NAME."""
    reduce_zero_label: bool | None = None
    """The masks' 0 means "not annotated" and is ignored; None: for sceneparse only."""
    ignore_label: int = option(255, (0, (1 << 16) - 1))
    """Mask value that is ignored, at most 65535."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.auto = self.source == "auto"  # of a copy no longer
        if self.auto:
            found = source_of(self.root)
            if found is None:
                tar, folder = (next(find(Path(self.root or ""))) for find in (_tars, _class_folders))
                raise ValueError(
                    f"data.source: wanted folder, tar or wds for {self.root}, which has both {tar} and the folder "
                    f"{folder}, got auto"
                )
            self.source = found


def source_of(root: str | None) -> Literal["embedded", "folder", "csv", "tar", "wds", "hfds", "sceneparse"] | None:
    """What a root looks like; class folders, or images and masks, where it is nothing else.

    None where tars and class folders of splits lie beside each other.
    """
    if root is None:
        return "embedded"
    top = Path(root)
    if root.lower().endswith((".csv", ".tsv")):
        return "csv"
    if top.name == "ADEChallengeData2016" or (top / "ADEChallengeData2016").is_dir():
        return "sceneparse"
    if root.endswith(".tar") or "{" in root or any(_tars(top)):
        first = next((file for file in (top, *_tars(top)) if file.is_file()), None)
        both = first is not None and any(_class_folders(top))
        return None if both else "wds" if first is not None and _has_class_numbers(first) else "tar"
    if any(top.glob("*.parquet")) or any(top.glob("data/*.parquet")) or (top / "dataset_dict.json").is_file():
        return "hfds"
    classes = any(entry.is_dir() for split in ("train", "training") for entry in top.glob(f"{split}/*"))
    return "csv" if (top / "train.csv").is_file() and not classes else "folder"


def _tars(top: Path) -> Iterator[Path]:
    return chain(top.glob("*.tar"), top.glob("*/*.tar"))


def _class_folders(top: Path) -> Iterator[Path]:
    """Folders in those of splits."""
    splits = (folder for folder in top.glob("*") if folder.name.lower() in SPLITS)
    return (entry for folder in splits for entry in folder.glob("[!._@]*") if entry.is_dir())


def _has_class_numbers(file: Path) -> bool:
    """Whether a tar's first members are a shard's."""
    try:
        with _SmallReads(file) as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
            return any(member.name.endswith(".cls") for member in islice(archive, 8))
    except Exception:
        return False  # its reader says why


class _SmallReads(FileIO):
    """A file of which no large part is read at a time."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= LARGEST_HEADER:
            raise ValueError(f"wanted at most {LARGEST_HEADER:,} bytes, got {size}")
        return super().read(size)


@dataclass
class DataConfig(SourceConfig):
    """What the data of every training has."""

    train_images: int | None = option(None, AT_LEAST_1)
    """Use at most this many training images: a fixed random choice, of the embedded ones the first; None: all."""
    max_unreadable: float = option(0.001, BELOW_1, may_change=True)
    """Fraction of the training images that may turn out unreadable, each replaced by the next of its epoch, before the
    run stops; 0 stops at the first."""
    cache_gigabytes: float = option(0.0, AT_LEAST_0, may_change=True)
    """Memory for decoded images, which are then read once: of the training images in each loader worker, and with
    data.workers 0 of the validation images, too. Small images that are seen many times gain most."""
    img_size: int = option(224, AT_LEAST_1, from_data=True)
    """Side of the model's input, px; in segmentation of the training crop and of the window."""
    mean: tuple[float, float, float] = option((0.485, 0.456, 0.406), from_data=True)
    """Channel means, for pixels in 0 to 1."""
    std: tuple[float, float, float] = option((0.229, 0.224, 0.225), ABOVE_0, from_data=True)
    """Channel standard deviations, for pixels in 0 to 1."""
    hflip: float = option(0.5, UNIT_INTERVAL)
    """Probability of a horizontal flip."""


@dataclass
class ImageDataConfig(DataConfig):
    """Images with classes, their preparation and their augmentation."""

    exif: bool | None = True
    """Turn images as their EXIF orientation says. A model's file keeps it."""
    interpolation: Literal["bicubic", "bilinear"] = option("bicubic", from_data=True)
    """Resampling of every resize."""
    crop: Literal["resized", "shift"] = "resized"
    """Training crop. resized: RandomResizedCrop; shift: as in evaluation with crop_pct 1, then shifted by up to
    crop_shift px."""
    jpeg: Literal["pillow", "torchvision"] = "pillow"
    """Which library decodes, crops and resizes the training's JPEGs. torchvision: 1.4 times as fast, pixels within 1 of
    255 in the mean; all other files, and evaluation, stay with pillow."""
    resize_on: Literal["loader", "device"] = "loader"
    """Where training crops are resized and flipped. device: by torchvision on the GPU, so that a loader process only
    decodes; pixels within 1 of 255 in the mean. Not with auto_augment or crop shift, which want the resized image."""
    crop_scale: tuple[float, float] = option((0.2, 1.0), UP_TO_1, from_data=True)
    """Area of a resized crop, as a fraction of the image."""
    crop_shift: int = option(1, AT_LEAST_0)
    """Largest shift, px."""
    auto_augment: str | None = option(None, from_data=True)
    """timm's policy string, for example rand-m9-mstd0.5-inc1."""
    crop_pct: float = option(0.875, UP_TO_1)
    """In evaluation the shorter side is resized to img_size / crop_pct px, then the center is cropped."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resize_on == "device" and (self.auto_augment is not None or self.crop != "resized"):
            other = "auto_augment" if self.auto_augment is not None else "crop shift"
            raise ValueError(f"data.resize_on: wanted loader with data.{other}, got device")
        if self.crop == "shift" and self.auto_augment is not None:
            raise ValueError(f"data.auto_augment: wanted null with data.crop shift, got {self.auto_augment!r}")


@dataclass
class MaskDataConfig(DataConfig):
    """Images with masks, their preparation and their augmentation."""

    img_size: int = option(512, AT_LEAST_1, from_data=True)
    """Side of the training crop and of the window, px."""
    short_side: int = option(512, AT_LEAST_1, from_data=True)
    """Images are resized to this shorter side, px: in training times a random scale, in evaluation as it is."""
    long_side: int = option(2048, AT_LEAST_1, from_data=True)
    """Largest longer side after that resize, px; in training times the scale."""
    scale: tuple[float, float] = option((0.5, 2.0), ABOVE_0)
    """Random scale of the training images."""
    cat_max_ratio: float = option(0.75, UP_TO_1)
    """Crops are drawn anew, up to 10 times, while they have no label, or one class is more than this fraction."""
    photometric: bool = True
    """Brightness, contrast, saturation and hue, each changed with probability 0.5."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale[0] > self.scale[1]:
            raise ValueError(f"data.scale: wanted two scales in ascending order, got {list(self.scale)}")
