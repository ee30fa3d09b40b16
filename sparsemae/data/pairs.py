"""Images with masks: where they lie, and which mask belongs to which image."""

import os
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sparsemae.data.embedded import EmbeddedPairs
from sparsemae.data.exclude import read_exclude
from sparsemae.data.folders import Openers, split_folders
from sparsemae.data.images import SUFFIXES
from sparsemae.data.masks import IGNORED, SCENEPARSE150, Legend, read_classes, read_mask
from sparsemae.data.sources import check_options
from sparsemae.data.splits import Source, Splits
from sparsemae.data.tree import Split, list_folder, natural_order, said_of_others
from sparsemae.files import existing
from sparsemae.options import SourceConfig

MASK_SUFFIXES = (".png", ".tif", ".tiff", ".bmp", ".gif", ".pgm", ".ppm")
"""Of formats that keep every value."""
MASKS_LOOKED_AT = 500
"""At the start of a training."""
MASK_FOLDERS = ("annotations", "masks", "labels")
# The options that each source of images with masks can use, beside those of all.
_ROOT = {"root", "exclude", "reduce_zero_label", "ignore_label"}
OPTIONS: dict[str, set[str]] = {"embedded": set(), "folder": {"classes", *_ROOT}, "sceneparse": _ROOT}


class PairReader:
    """The reader interface of timm over images and masks of the same stem; the label is the mask's path."""

    def __init__(self, images: Path, masks: Path, legend: Legend) -> None:
        """Raises ValueError, naming the folders, if there is no pair, or two files of one stem."""
        image_files, others = _by_stem(images, SUFFIXES)
        mask_files, other_masks = _by_stem(masks, MASK_SUFFIXES)
        common = natural_order(image_files.keys() & mask_files.keys())
        if not common:
            lossy = sum(count for ending, count in other_masks.items() if ending in SUFFIXES)
            raise ValueError(
                f"{images}: wanted images with masks ({', '.join(MASK_SUFFIXES)}) of the same names in {masks}, "
                f"got {len(image_files)} images and {len(mask_files)} masks without a common name"
                + f" ({_first(image_files)} and {_first(mask_files)})" * bool(image_files and mask_files)
                + f"; {lossy} masks are JPEG or WebP, which change the values: write PNG" * bool(lossy)
            )
        self.legend, self.class_names = legend, legend.class_names
        self.pairs = [(image_files[stem], mask_files[stem]) for stem in common]
        self.unmatched = {
            "images without masks": [file for stem, file in image_files.items() if stem not in mask_files],
            "masks without images": [file for stem, file in mask_files.items() if stem not in image_files],
        }
        self.notes = said_of_others(others + other_masks)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Any, Path]:
        image, mask = self.pairs[index]
        return existing(image).open("rb"), mask

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        """Of the image."""
        return str(self.pairs[index][0])

    def size(self, index: int) -> int:
        """Bytes of image and mask."""
        return sum(file.stat().st_size for file in self.pairs[index])


def _by_stem(folder: Path, suffixes: tuple[str, ...]) -> tuple[dict[str, Path], Counter[str]]:
    if not folder.is_dir():
        return {}, Counter()
    listing, files = list_folder(folder, suffixes), dict[str, Path]()
    for path in listing.paths:
        stem = os.path.splitext(path)[0]
        if files.setdefault(stem, folder / path) != folder / path:
            raise ValueError(f"{folder / path}: wanted one file of a name, got {files[stem].name} beside it")
    return files, listing.others


def _first(files: Mapping[str, Path]) -> str:
    return next((file.name for file in files.values()), "none")


def open_masks(data: SourceConfig, split: Split, limit: int | None = None) -> Source:
    """Open one split of images with masks, or at most ``limit`` images of it; raises as `find_masks`, `open_pairs`."""
    return open_pairs(find_masks(data), split, limit)


def open_pairs(splits: Splits, split: Split, limit: int | None = None) -> Source:
    """One split. Raises ValueError as `Splits.open`, or naming the files if an image or a mask lacks the other."""
    source = splits.open(split, limit)
    check_pairs(splits, source)
    return source


def check_pairs(splits: Splits, source: Source) -> None:
    """Raises ValueError, naming the files, if an image or a mask lacks the other."""
    for what, files in unmatched(source, splits.data).items():
        if files:
            raise ValueError(f"{splits.root}: {len(files)} {what}: {', '.join(map(str, files[:3]))}")


def find_masks(data: SourceConfig, trained: Mapping[str, Any] | None = None) -> Splits:
    """The splits of images with masks. Raises ValueError as `find_source`.

    Args:
        trained: what a model's card says of ``reduce_zero_label`` and ``ignore_label``; they hold where ``data`` says
            nothing, and another value is refused.
    """
    found = Path(data.root or ".", "classes.txt")
    if data.source == "folder" and data.classes is None and data.root is not None and found.is_file():
        data = replace(data, classes=str(found))
    check_options(data, OPTIONS, "images with masks")
    if data.source == "embedded":
        return Splits(data, {part: (part, partial(EmbeddedPairs, part)) for part in ("train", "val")})
    legend = _legend(data, trained or {})
    images, masks = _folders(Path(data.root or "."))
    of_images, of_masks = split_folders(images), split_folders(masks)
    if not of_images and not of_masks:
        return Splits(data, {"train": ("", partial(PairReader, images, masks, legend))})
    if "train" not in of_images:
        there = ", ".join(of_images.values()) or "none"
        raise ValueError(f"{images}: wanted the folders train and val, got {there} alone")
    openers: Openers = {
        part: (name, partial(PairReader, images / name, masks / of_masks.get(part, name), legend))
        for part, name in of_images.items()
        if part != "test" or part in of_masks
    }
    splits = Splits(data, openers)
    if "test" in of_images and "test" not in of_masks:
        splits.note(f"{images / of_images['test']}: has no masks, and is left")
    return splits


def _legend(data: SourceConfig, trained: Mapping[str, Any]) -> Legend:
    names, colors = read_classes(data.classes or SCENEPARSE150)
    sceneparse = data.source == "sceneparse"
    if data.reduce_zero_label and colors is not None and not trained:
        raise ValueError(
            f"data.reduce_zero_label: wanted none with the colors in {data.classes}, which have no 0, got true "
            "(for masks of numbers: names alone there)"
        )
    for name, value in trained.items():
        given = getattr(data, name)
        if given not in (value, getattr(SourceConfig(), name)):
            raise ValueError(
                f"data.{name}: wanted what the model was trained with, {str(value).lower()}, got {str(given).lower()}"
            )
    data = replace(data, **trained)
    reduce_zero_label = sceneparse if data.reduce_zero_label is None else data.reduce_zero_label
    return Legend(names, reduce_zero_label, data.ignore_label, colors, full_ade20k_hint=sceneparse)


def has_masks(root: Path) -> bool:
    """Whether a folder is laid out as images with masks, rather than as class folders."""
    base = _base(root)
    return (base / "images").is_dir() and any((base / name).is_dir() for name in MASK_FOLDERS)


def _base(root: Path) -> Path:
    """The folder of images and masks in a download."""
    inside = root / "ADEChallengeData2016"
    return inside if inside.is_dir() else root


def _folders(root: Path) -> tuple[Path, Path]:
    """Of the images and of the masks. Raises ValueError, naming the folder, if the layout is another."""
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder")
    root = _base(root)
    if not has_masks(root):
        full = next(root.rglob("*_seg.png"), None) is not None
        raise ValueError(
            f"{root}: wanted the folders images and {' or '.join(MASK_FOLDERS)}, "
            f"got {', '.join(sorted(file.name for file in root.iterdir())[:4]) or 'nothing'}"
            + ("; this is the full ADE20K: wanted SceneParse150 (ADEChallengeData2016)" if full else "")
        )
    return root / "images", next(root / name for name in MASK_FOLDERS if (root / name).is_dir())


def unmatched(source: Source, data: SourceConfig) -> dict[str, list[Path]]:
    """Images without masks, and masks without images, but for those that ``data.exclude`` lists."""
    listed = read_exclude(data.exclude, Path(data.root or ".")) if data.exclude else {}
    found: dict[str, list[Path]] = getattr(source.reader, "unmatched", {})
    return {what: [file for file in files if os.path.normpath(file) not in listed] for what, files in found.items()}


def _masks(source: Source) -> list[Path]:
    """Files of a source's masks; none where they are made."""
    pairs = getattr(source.reader, "pairs", None)
    return [pairs[index][1] for index in source.indices.tolist()] if pairs else []


def refuse_binary(source: Source) -> None:
    """Raises ValueError, naming the first mask and the cure, if all masks are of 0 and of 255, which is ignored."""
    first: Path | None = None
    if source.legend is None or source.legend.colors is not None or source.legend.ignore_label != IGNORED:
        return
    for mask in _masks(source):
        with suppress(ValueError):
            values = np.unique(read_mask(mask, max_pixels=source.max_pixels)).tolist()
            if not {*values} <= {0, IGNORED}:
                return
            first = first or (mask if IGNORED in values else None)
    if first is not None:
        raise ValueError(
            f"{first}, ...: wanted masks of class numbers, got 0 and 255 alone in all {len(source):,}, where 255 is "
            "ignored and one class is left: divide them by 255, so that the second class is 1"
        )


def said_of_classes(source: Source) -> list[str]:
    """Classes that are in no mask, where there are few enough to look at; unreadable ones are passed over."""
    found: set[int] = set()
    masks = _masks(source)
    for mask in masks if len(masks) <= MASKS_LOOKED_AT else ():
        with suppress(ValueError):
            found |= set(np.unique(source.target(mask)).tolist())
    absent = [name for i, name in enumerate(source.class_names) if found and i not in found]
    shown = ", ".join(absent[:8]) + ", ..." * (len(absent) > 8)
    return [f"in no training mask: {len(absent)} of {len(source.class_names)} classes: {shown}"] if absent else []
