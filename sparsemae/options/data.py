"""Where images lie, how they are prepared, and how they are augmented."""

import re
from dataclasses import dataclass
from typing import Literal

from sparsemae.limits import (
    ABOVE_0,
    AT_LEAST_0,
    AT_LEAST_1,
    BELOW_1,
    MAX_PIXELS,
    UNIT_INTERVAL,
    UP_TO_1,
    Options,
    option,
)  # fmt: skip

WITHOUT_ROOT = ("embedded", "torchvision", "fashion-mnist")
"""Sources that have no root, or may make it."""


@dataclass
class SourceConfig(Options):
    """Where the images and their classes or masks lie."""

    prefix = "data."

    source: Literal[
        "embedded", "folder", "tar", "wds", "hfds", "torchvision", "fashion-mnist", "sceneparse"
    ] = "embedded"  # fmt: skip
    """embedded: a part of Fashion-MNIST that ships with the package, its masks computed from the images. With classes:
    folder: ROOT/train/CLASS/*.jpg and ROOT/val/...; tar: ROOT/train.tar and ROOT/val.tar with class folders or a tar
    per class in them, or ROOT/train/*.tar and ROOT/val/*.tar; wds: WebDataset shards ROOT/*train*.tar and
    ROOT/*val*.tar; hfds: a folder that HF datasets loads (parquet files, say); torchvision: one of its sets
    (data.name); fashion-mnist: the full set, fetched by torchvision. With masks: folder: ROOT/images/{train,val} and
    ROOT/masks/{train,val}, same stems; sceneparse: SceneParse150 (ADE20K) as downloaded. Where there is but one split
    (class folders in ROOT itself, ROOT a tar file, no val folder), a tenth of it is held out."""
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
    workers: int = option(2, AT_LEAST_0, may_change=True)
    """Loader processes per device; 0 loads in the process that computes."""
    exclude: str | None = option(None, must_exist=True)
    """File of images to leave out, one path a line, relative to data.root (`sparsemae check --write-exclude` writes
    one)."""
    image_column: str | None = None
    """Of hfds: column of the images; None: image, or the only one there is."""
    label_column: str | None = None
    """Of hfds: column of the classes, ClassLabel or text; None: label, or the only one there is."""
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


@dataclass
class DataConfig(SourceConfig):
    """What the data of every training has."""

    train_images: int | None = option(None, AT_LEAST_1)
    """Use at most this many training images: a fixed random choice, of the embedded ones the first; None: all."""
    max_unreadable: float = option(0.001, BELOW_1, may_change=True)
    """Fraction of the training images that may turn out unreadable, each replaced by the next of its epoch, before the
    run stops; 0 stops at the first."""
    img_size: int = option(224, AT_LEAST_1)
    """Side of the model's input, px; in segmentation of the training crop and of the window."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Channel means, for pixels in 0 to 1."""
    std: tuple[float, float, float] = option((0.229, 0.224, 0.225), ABOVE_0)
    """Channel standard deviations, for pixels in 0 to 1."""
    hflip: float = option(0.5, UNIT_INTERVAL)
    """Probability of a horizontal flip."""


@dataclass
class ImageDataConfig(DataConfig):
    """Images with classes, their preparation and their augmentation."""

    exif: bool | None = True
    """Turn images as their EXIF orientation says. A model's file keeps it."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """Resampling of every resize."""
    crop: Literal["resized", "shift"] = "resized"
    """Training crop. resized: RandomResizedCrop; shift: resize to img_size, then shift by up to crop_shift px."""
    crop_scale: tuple[float, float] = option((0.2, 1.0), UP_TO_1)
    """Area of a resized crop, as a fraction of the image."""
    crop_shift: int = option(1, AT_LEAST_0)
    """Largest shift, px."""
    auto_augment: str | None = None
    """timm's policy string, for example rand-m9-mstd0.5-inc1."""
    crop_pct: float = option(0.875, UP_TO_1)
    """In evaluation the shorter side is resized to img_size / crop_pct px, then the center is cropped."""


@dataclass
class MaskDataConfig(DataConfig):
    """Images with masks, their preparation and their augmentation."""

    img_size: int = option(512, AT_LEAST_1)
    """Side of the training crop and of the window, px."""
    short_side: int = option(512, AT_LEAST_1)
    """Images are resized to this shorter side, px: in training times a random scale, in evaluation as it is."""
    long_side: int = option(2048, AT_LEAST_1)
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
