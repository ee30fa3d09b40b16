"""Images with masks: where they lie, and which mask belongs to which image."""

import os
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sparsemae.data.embedded import EmbeddedPairs
from sparsemae.data.exclude import read_exclude
from sparsemae.data.images import SUFFIXES
from sparsemae.data.masks import IGNORED, SCENEPARSE150, Legend, read_classes
from sparsemae.data.sources import SPLIT_FOLDERS, Readers, Source, Split, check_options, open_split
from sparsemae.options import SourceConfig

MASK_FOLDERS = ("annotations", "masks", "labels")
# The options that each source of images with masks can use, beside those of all.
_ROOT = {"root", "exclude", "reduce_zero_label", "ignore_label"}
OPTIONS: dict[str, set[str]] = {"embedded": set(), "folder": {"classes", *_ROOT}, "sceneparse": _ROOT}


class PairReader:
    """The reader interface of timm over images and PNG masks of the same stem; the label is the mask's path."""

    def __init__(self, images: Path, masks: Path, legend: Legend) -> None:
        """Raises ValueError, naming the folders, if there is no pair."""
        image_files, mask_files = _by_stem(images, SUFFIXES), _by_stem(masks, (".png",))
        common = sorted(image_files.keys() & mask_files.keys())
        if not common:
            raise ValueError(
                f"{images}: wanted images with PNG masks of the same names in {masks}, "
                f"got {len(image_files)} images and {len(mask_files)} masks without a common name"
            )
        self.legend, self.class_names = legend, legend.class_names
        self.pairs = [(image_files[stem], mask_files[stem]) for stem in common]
        self.unmatched = {
            "images without masks": [file for stem, file in image_files.items() if stem not in mask_files],
            "masks without images": [file for stem, file in mask_files.items() if stem not in image_files],
        }

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Any, Path]:
        image, mask = self.pairs[index]
        return image.open("rb"), mask

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        """Of the image."""
        return str(self.pairs[index][0])


def _by_stem(folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    files = [file for file in sorted(folder.rglob("*")) if file.suffix.lower() in suffixes]
    return {str(file.relative_to(folder).with_suffix("")): file for file in files}


def open_masks(data: SourceConfig, split: Split, limit: int | None = None) -> Source:
    """Open one split of images with masks, or at most ``limit`` images of it.

    Raises ValueError as `open_source`, or naming the files if an image or a mask lacks the other.
    """
    source = find_masks(data, split, limit)
    for what, files in unmatched(source, data).items():
        if files:
            raise ValueError(f"{data.root}: {len(files)} {what}: {', '.join(map(str, files[:3]))}")
    return source


def find_masks(data: SourceConfig, split: Split, limit: int | None = None) -> Source:
    """As `open_masks`, of the pairs that there are."""
    check_options(data, OPTIONS, "images with masks")
    if data.source == "embedded":
        return open_split(data, {part: partial(EmbeddedPairs, part) for part in SPLIT_FOLDERS}, split, limit)
    legend = _legend(data)
    images, masks = _folders(Path(data.root or "."))
    folders = {
        part: next((name for name in names if (images / name).is_dir() or (masks / name).is_dir()), None)
        for part, names in SPLIT_FOLDERS.items()
    }
    if folders["val"] and not folders["train"]:
        raise ValueError(f"{images}: wanted the folders train and {folders['val']}, got {folders['val']} alone")
    readers: Readers = {
        part: partial(PairReader, images / (name or ""), masks / (name or ""), legend)
        for part, name in folders.items()
        if name or part == "train"
    }
    return open_split(data, readers, split, limit)


def _legend(data: SourceConfig) -> Legend:
    names, colors = read_classes(data.classes or SCENEPARSE150)
    sceneparse = data.source == "sceneparse"
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


def sample_classes(source: Source, masks: int = 16) -> set[int]:
    """Classes in so many masks, spread over the source; masks that cannot be read are passed over."""
    found: set[int] = set()
    for index in np.unique(np.linspace(0, len(source) - 1, masks).round().astype(int)):
        file, label = source.open(int(index))
        with file, suppress(ValueError):
            found |= set(np.unique(source.target(label)).tolist())
    return found - {IGNORED}
