"""Where labeled images come from: folders, tars, WebDataset shards, HF datasets, torchvision's sets, or the package.

Every source is random-access, so that an epoch's order, each image exactly once, and an exact resume are the same for
all. Images are read through timm's reader interface, not timm's ``ImageDataset``, which silently replaces unreadable
files.
"""

import errno
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from timm.data.readers import create_reader

from sparsemae.data.embedded import EmbeddedReader
from sparsemae.data.exclude import read_exclude
from sparsemae.data.images import UNREADABLE, decode_rgb, reason
from sparsemae.data.libraries import open_hfds, open_torchvision
from sparsemae.data.masks import Legend, read_mask
from sparsemae.data.sampling import HOLDOUT, stream
from sparsemae.data.tars import read_shards, read_tars
from sparsemae.options import SourceConfig

Split = Literal["train", "val"]
# The field's names for the two splits, best first.
SPLIT_FOLDERS: dict[Split, tuple[str, ...]] = {"train": ("train", "training"), "val": ("val", "validation", "test")}
# The options that each source of images with classes can use, beside those of all.
_COMMON = {"source", "workers", "exif"}
_ROOT = {"root", "exclude"}
OPTIONS: dict[str, set[str]] = {
    "embedded": set(), "folder": _ROOT, "tar": _ROOT, "wds": _ROOT, "hfds": _ROOT,
    "torchvision": {"name", "download", *_ROOT}, "fashion-mnist": {"download", *_ROOT},
}  # fmt: skip
_REQUIRED = {"root": "a folder", "classes": "a file with one class a line"}


@dataclass(frozen=True)
class Source:
    """Images by index, each with its class or with the classes of its pixels."""

    reader: Any
    """timm's reader interface: ``reader[i]`` is (file or PIL image, label), ``reader.filename(i)``. Of images with
    masks, the label is a mask file's path, or classes uint8 ``[H, W]``."""
    class_names: list[str]
    indices: np.ndarray
    """Which of the reader's images belong to this split."""
    labels: np.ndarray | None = None
    """Number in ``class_names`` for each of the reader's labels; None: they are these numbers."""
    legend: Legend | None = None
    """What the values of the masks mean; None: each image has one class."""
    one_size: bool = False
    """All images have the same size."""

    def __len__(self) -> int:
        return len(self.indices)

    def filename(self, index: int) -> str:
        """Path of one image, for messages and lists; what lies inside a file as if that were a folder."""
        return str(self.reader.filename(int(self.indices[index]), absolute=True))

    def read(self, index: int, smallest: int = 1, exif: bool = False) -> tuple[Image.Image, Any]:
        """An RGB image, and its class number or the classes of its pixels, uint8 ``[H, W]``.

        Raises ValueError naming the file if it is unreadable or too small, ConnectionError if the source itself is
        gone.
        """
        file, label = self.open(index)
        return self.decode(index, file, label, smallest, exif)

    def open(self, index: int) -> Any:
        """What the reader has of one image: file or PIL image, and label. Raises as `read`."""
        try:
            return self.reader[int(self.indices[index])]
        except UNREADABLE as error:  # torchvision's sets decode here
            name = self.filename(index)
            if isinstance(error, OSError) and _is_gone(error, name):
                raise ConnectionError(f"{name}: {error.strerror}") from error
            raise ValueError(f"{name}: unreadable image: {reason(error)}") from error

    def decode(
        self, index: int, file: Any, label: Any, smallest: int = 1, exif: bool = False
    ) -> tuple[Image.Image, Any]:
        """`read`, of what `open` gave."""
        with file:
            image = decode_rgb(file, self.filename(index), smallest, exif)
        target = self.target(label)
        if self.legend is None or image.size == target.shape[::-1]:
            return image, target
        (height, width), turned = target.shape, image.size == target.shape
        raise ValueError(
            f"{label}: wanted the size of its image, {image.width} x {image.height} px, got {width} x {height} px"
            + f" (turned by the image's EXIF orientation? then data.exif {str(not exif).lower()})" * turned
        )

    def target(self, label: Any) -> Any:
        """Class number, or classes of the pixels, of what the reader has for it. Raises ValueError naming the mask."""
        if self.legend is None:
            return int(label if self.labels is None else self.labels[label])
        return self.legend.decode(read_mask(label), label) if isinstance(label, Path) else label


# A broken link, or a file that is not ours to read; other errors are of the file system.
_OF_ONE_FILE = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.ELOOP, errno.EISDIR)


def _is_gone(error: OSError, name: str) -> bool:
    """Whether the source itself is out of reach, rather than one image of it."""
    folder = os.path.dirname(error.filename or name)
    return error.errno is not None and (error.errno not in _OF_ONE_FILE or not os.path.isdir(folder))


Readers = dict[Split, Callable[[], Any]]
"""How to open a reader of each split there is: ``train`` always, ``val`` where the set has one. It knows its
``class_names``, and with masks its ``legend``."""


def open_source(data: SourceConfig, split: Split, limit: int | None = None) -> Source:
    """Open one split of images with classes, or at most ``limit`` images of it.

    Raises ValueError, naming the folder, if it is missing or empty, or its classes are not those of the training split;
    or naming the option, if the source has no use for it, or wants it; or if ``data.exclude`` cannot be read, names
    what the set does not hold, or leaves nothing.
    """
    check_options(data, OPTIONS, "images with classes")
    return open_split(data, _readers(data), split, limit)


def open_split(data: SourceConfig, readers: Readers, split: Split, limit: int | None) -> Source:
    """One split, held out where there is but one, without what is excluded, and at most ``limit`` images of it."""
    reader = readers[split if "val" in readers else "train"]()
    legend, one_size = getattr(reader, "legend", None), getattr(reader, "one_size", False)
    source = Source(reader, reader.class_names, np.arange(len(reader)), None, legend, one_size)
    others = [opener for name, opener in readers.items() if name != split]
    if "val" not in readers:
        source = _held_out(source, split)
    elif split == "val" and legend is None:
        train = readers["train"]()
        source, others = _with_classes_of(train.class_names, source, data), [lambda: train]
    if data.exclude is not None:
        source = _without(source, Path(data.root or "."), data.exclude, others)
    if limit is None:
        return source
    if data.source in ("embedded", "fashion-mnist"):
        return replace(source, indices=source.indices[:limit])
    order = stream(0, HOLDOUT, 1).permutation(len(source))[:limit]  # sorted by class: the first ones would be of one
    return replace(source, indices=np.sort(source.indices[order]))


def check_options(data: SourceConfig, options: Mapping[str, set[str]], what: str) -> None:
    """Refuse a source of another kind, and options that it has no use for. Raises ValueError naming the option."""
    if data.source not in options:
        raise ValueError(f"data.source: wanted {', '.join(options)} for {what}, got {data.source}")
    usable, plain = options[data.source], SourceConfig()
    for name in (field.name for field in fields(SourceConfig)):
        value = getattr(data, name)
        if name in usable | _COMMON:
            if name in _REQUIRED and value is None:
                raise ValueError(f"data.{name}: wanted {_REQUIRED[name]} for data.source={data.source}, got none")
        elif value != getattr(plain, name):
            hint = " (wanted --data.source folder?)" if name == "root" else ""
            raise ValueError(f"data.{name}: wanted none for {what} with data.source={data.source}, got {value}{hint}")


def split_folders(root: Path) -> dict[Split, Path | None]:
    """The folders ``train`` and ``val`` of a data set under the names the field has for them; None: there is none."""
    return {
        split: next((root / name for name in names if (root / name).is_dir()), None)
        for split, names in SPLIT_FOLDERS.items()
    }


def split_tars(root: Path) -> dict[Split, list[Path]]:
    """Tar files of each split: those in ROOT/train, or those in ROOT named so; all of ROOT if none is (or ROOT)."""
    if root.is_file():
        return {"train": [root], "val": []}
    found: dict[Split, list[Path]] = {"train": [], "val": []}
    for split, folder in split_folders(root).items():
        for name in SPLIT_FOLDERS[split]:
            word = re.compile(rf"(?<![a-z]){name}(?![a-z])")
            named = [file for file in root.glob("*.tar") if word.search(file.stem.lower())]
            found[split] = found[split] or sorted(folder.glob("*.tar") if folder else named)
    if not found["train"]:
        found["train"] = sorted(set(root.glob("*.tar")) - set(found["val"]))
    return found


def _readers(data: SourceConfig) -> Readers:
    if data.source == "embedded":
        return {"train": partial(EmbeddedReader, "train"), "val": partial(EmbeddedReader, "val")}
    assert data.root is not None
    if data.source == "fashion-mnist":
        return open_torchvision(data.root, "FashionMNIST", download=True)
    if data.source == "torchvision":
        return open_torchvision(data.root, data.name, data.download)
    if "://" in data.root or data.root.startswith("pipe:"):
        raise ValueError(
            f"data.root: wanted a local path, got {data.root}: images are read in any order, each once an epoch, and a "
            "resume continues exactly, which a remote stream cannot"
        )
    root = Path(data.root)
    if not root.is_dir() and not (root.is_file() and data.source in ("tar", "wds")):
        raise ValueError(f"{root}: no such folder")
    if data.source == "hfds":
        return open_hfds(root)
    if data.source == "folder":
        folders = split_folders(root)
        readers: Readers = {"train": partial(_folder, folders["train"] or root)}
        return readers | ({"val": partial(_folder, folders["val"])} if folders["val"] else {})
    read = read_tars if data.source == "tar" else read_shards
    tars = split_tars(root)
    if not tars["train"]:
        raise ValueError(f"{root}: wanted .tar files in it, or in its folders train and val, found none")
    return {split: partial(read, files) for split, files in tars.items() if files}


def _folder(folder: Path) -> Any:
    try:
        reader = create_reader("", str(folder))
    except RuntimeError as error:
        raise ValueError(f"{folder}: wanted images in it or in its subfolders, found none") from error
    reader.class_names = list(reader.class_to_idx)
    return reader


def _held_out(source: Source, split: Split) -> Source:
    """A tenth of the only split, the same tenth every time; or the rest."""
    order = stream(0, HOLDOUT).permutation(len(source))
    held_out = max(1, len(source) // 10)
    return replace(source, indices=np.sort(order[:held_out] if split == "val" else order[held_out:]))


def _with_classes_of(class_names: list[str], val: Source, data: SourceConfig) -> Source:
    """The validation split, numbered as the training split numbers its classes, all of which it need not have."""
    number = {name: i for i, name in enumerate(class_names)}
    extra = [name for name in val.class_names if name not in number]
    if extra:
        raise ValueError(f"{data.root}: wanted in val the classes of train, got another: {', '.join(extra[:3])}")
    return replace(val, class_names=class_names, labels=np.array([number[name] for name in val.class_names]))


def _without(source: Source, root: Path, file: str, others: Sequence[Callable[[], Any]]) -> Source:
    """A source without the images that a list names; the labels of the classes stay."""
    listed, paths = read_exclude(file, root), _paths(source.reader)
    unknown = listed.keys() - {*paths, *_unmatched(source.reader)}
    if unknown:
        unknown -= {path for other in others for reader in [other()] for path in _paths(reader) + _unmatched(reader)}
    if unknown:
        raise ValueError(
            f"data.exclude: {file}: wanted images of {root}, one path a line relative to it, got {len(unknown)} that "
            f"it does not hold: {', '.join(sorted(listed[path] for path in unknown)[:3])}"
        )
    kept = np.array([i for i in source.indices if paths[i] not in listed], np.int64)
    if not len(kept):
        raise ValueError(f"data.exclude: {file}: wanted some images left of {len(source)}, got none")
    return replace(source, indices=kept)


def _paths(reader: Any) -> list[str]:
    """Of all the reader's images, both parts of a split that was cut in two."""
    return [os.path.normpath(reader.filename(i, absolute=True)) for i in range(len(reader))]


def _unmatched(reader: Any) -> list[str]:
    """What the reader found but cannot give: an image without a mask, a mask without an image."""
    return [os.path.normpath(path) for files in getattr(reader, "unmatched", {}).values() for path in files]
