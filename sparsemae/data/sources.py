"""Where labelled images come from: folders, tars, WebDataset shards, HF datasets, torchvision's sets, or the package.

Every source is random-access, so that an epoch's order, each image exactly once, and an exact resume are the same for
all. Images are read through timm's reader interface, not timm's ``ImageDataset``, which silently replaces unreadable
files.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torchvision.datasets
from timm.data.readers import create_reader

from sparsemae.data.embedded import CLASS_NAMES, EmbeddedReader
from sparsemae.data.exclude import read_exclude
from sparsemae.data.sampling import HOLDOUT, stream
from sparsemae.data.tars import TarReader, read_shards, read_tars

Split = Literal["train", "val"]
# The field's names for the two splits, best first.
SPLIT_FOLDERS = {"train": ("train", "training"), "val": ("val", "validation", "test")}
HFDS_SPLITS = {"train": ("train",), "val": ("validation", "val", "valid", "test")}
TORCHVISION_SPLITS = {"train": ("train", "trainval", "train-standard"), "val": ("val", "valid", "validation", "test")}


@dataclass
class SourceConfig:
    """Where the images lie."""

    source: Literal["embedded", "folder", "tar", "wds", "hfds", "torchvision", "fashion-mnist"] = "embedded"
    """embedded: a part of Fashion-MNIST that ships with the package; folder: ROOT/train/CLASS/*.jpg and ROOT/val/...;
    tar: ROOT/train.tar and ROOT/val.tar with class folders or a tar per class in them, or ROOT/train/*.tar and
    ROOT/val/*.tar; wds: WebDataset shards ROOT/*train*.tar and ROOT/*val*.tar; hfds: a folder that HF datasets loads
    (parquet files, say); torchvision: one of its sets (data.name); fashion-mnist: the full set, fetched by torchvision.
    Where there is but one split (class folders in ROOT itself, ROOT a tar file), a tenth of it is held out."""
    root: str | None = None
    """Folder of the images (or the tar file); not used by the embedded source."""
    name: str | None = None
    """torchvision's name of the set, for example CIFAR10."""
    download: bool = False
    """Let torchvision fetch the set to root if it is not there."""
    workers: int = 2
    """Loader processes per device; 0 loads in the training process."""
    exclude: str | None = None
    """File of images to leave out, one path a line, relative to root (`sparsemae check --write-exclude` writes one)."""


@dataclass(frozen=True)
class Source:
    """Images by index, and the names of their classes."""

    reader: Any
    """timm's reader interface: ``reader[i]`` is (file or PIL image, label), ``reader.filename(i)``."""
    class_names: list[str]
    indices: np.ndarray
    """Which of the reader's images belong to this split."""
    labels: np.ndarray | None = None
    """Number in ``class_names`` for each of the reader's labels; None: they are these numbers."""

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """File or PIL image, and label, of one image."""
        image, label = self.reader[int(self.indices[index])]
        return image, int(label if self.labels is None else self.labels[label])

    def filename(self, index: int) -> str:
        """Path of one image, for messages and lists; what lies inside a file as if that were a folder."""
        return str(self.reader.filename(int(self.indices[index]), absolute=True))


def open_source(data: SourceConfig, split: Split, limit: int | None = None) -> Source:
    """Open one split, or at most ``limit`` images of it.

    Raises ValueError, naming the folder, if it is missing or empty, or its classes are not those of the training split;
    or naming ``data.exclude``, if that cannot be read, names what the set does not hold, or leaves nothing.
    """
    splits = _splits(data)
    train = splits["train"]()
    if "val" not in splits:
        source = _held_out(train, split)
    elif split == "train":
        source = train
    else:
        source = _with_classes_of(train, splits["val"](), data)
    if data.exclude is not None:
        if data.root is None:
            raise ValueError(f"data.exclude: wanted a data.source that has a data.root, got {data.source}")
        other = splits.get("val" if split == "train" else "train")
        source = _without(source, Path(data.root), data.exclude, other)
    if limit is None:
        return source
    if limit < 1:
        raise ValueError(f"data.train_images: wanted at least 1, got {limit}")
    if data.source in ("embedded", "fashion-mnist"):
        return replace(source, indices=source.indices[:limit])
    order = stream(0, HOLDOUT, 1).permutation(len(source))[:limit]  # sorted by class: the first ones would be of one
    return replace(source, indices=np.sort(source.indices[order]))


def split_folders(root: Path) -> dict[Split, Path | None]:
    """The folders ``train`` and ``val`` of a data set under the names the field has for them; None: there is none."""
    names: dict[Split, tuple[str, ...]] = {"train": SPLIT_FOLDERS["train"], "val": SPLIT_FOLDERS["val"]}
    return {
        split: next((root / folder for folder in folders if (root / folder).is_dir()), None)
        for split, folders in names.items()
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


_Openers = dict[Split, Callable[[], Source]]


def _splits(data: SourceConfig) -> _Openers:
    """How to open each split there is: ``train`` always, ``val`` where the set has one."""
    if data.source == "embedded":
        if data.root is not None:
            raise ValueError(f"data.root: the embedded images take none, got {data.root} (wanted --data.source folder)")
        return {"train": partial(_embedded, "train"), "val": partial(_embedded, "val")}
    if data.root is None:
        raise ValueError(f"data.root: wanted a folder for data.source={data.source}, got none")
    if data.source == "fashion-mnist":
        return _torchvision(data.root, "FashionMNIST", download=True)
    if data.source == "torchvision":
        return _torchvision(data.root, data.name, data.download)
    if "://" in data.root or data.root.startswith("pipe:"):
        raise ValueError(
            f"data.root: wanted a local path, got {data.root}: images are read in any order, each once an epoch, and a "
            "resume continues exactly, which a remote stream cannot"
        )
    root = Path(data.root)
    if not root.is_dir() and not (root.is_file() and data.source in ("tar", "wds")):
        raise ValueError(f"{root}: no such folder")
    if data.source == "hfds":
        return _hfds(root)
    if data.source == "folder":
        folders = split_folders(root)
        openers: _Openers = {"train": partial(_folder, folders["train"] or root)}
        return openers | ({"val": partial(_folder, folders["val"])} if folders["val"] else {})
    read = read_tars if data.source == "tar" else read_shards
    tars = split_tars(root)
    if not tars["train"]:
        raise ValueError(f"{root}: wanted .tar files in it, or in its folders train and val, found none")
    return {split: partial(_tars, read, files) for split, files in tars.items() if files}


def _embedded(split: str) -> Source:
    reader = EmbeddedReader(split)
    return Source(reader, CLASS_NAMES, np.arange(len(reader)))


def _folder(folder: Path) -> Source:
    try:
        reader = create_reader("", str(folder))
    except RuntimeError as error:
        raise ValueError(f"{folder}: wanted images in it or in its subfolders, found none") from error
    return Source(reader, list(reader.class_to_idx), np.arange(len(reader)))


def _tars(read: Callable[[Sequence[Path]], TarReader], files: list[Path]) -> Source:
    reader = read(files)
    return Source(reader, reader.class_names, np.arange(len(reader)))


def _hfds(root: Path) -> _Openers:
    if importlib.util.find_spec("datasets") is None:
        raise ValueError("data.source: hfds wants the package datasets, which is not installed: pip install datasets")
    if (root / "dataset_dict.json").is_file() or (root / "state.json").is_file():
        raise ValueError(
            f"{root}: wanted a folder that datasets.load_dataset reads, got one of save_to_disk: write each split with "
            "to_parquet(ROOT/SPLIT.parquet)"
        )
    import datasets

    try:
        there = datasets.get_dataset_split_names(str(root))
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"{root}: wanted a folder that datasets.load_dataset reads: {error}") from error
    names = {split: next((name for name in HFDS_SPLITS[split] if name in there), None) for split in SPLIT_FOLDERS}
    if names["train"] is None:
        raise ValueError(f"{root}: wanted a split train, got {', '.join(there)}")

    def opened(name: str) -> Source:
        try:
            reader = create_reader(f"hfds/{root}", split=name)
        except (ValueError, KeyError, OSError, datasets.exceptions.DatasetsError) as error:
            raise ValueError(f"{root}: wanted the columns image and label in {name}: {error}") from error
        if not reader.class_to_idx:
            raise ValueError(f"{root}: wanted a column label with the names of its classes (ClassLabel) in {name}")
        return Source(_Numbered(reader, f"{root}/{name}"), list(reader.class_to_idx), np.arange(len(reader)))

    openers: _Openers = {"train": partial(opened, names["train"])}
    return openers | ({"val": partial(opened, names["val"])} if names["val"] else {})


def _torchvision(root: str, name: str | None, download: bool) -> _Openers:
    known = {cls: getattr(torchvision.datasets, cls) for cls in torchvision.datasets.__all__}
    if name == "ImageFolder":
        raise ValueError("data.name: wanted data.source=folder for class folders, got torchvision's ImageFolder")
    if name not in known or "root" not in (takes := inspect.signature(known[name]).parameters):
        raise ValueError(f"data.name: wanted torchvision's name of a set (CIFAR10, Food101, ...), got {name}")
    fetch = {"download": download} if "download" in takes else {}

    def opened(part: Split, **chosen: Any) -> Source:
        try:
            dataset = known[name](root, **chosen, **fetch)
            label = dataset[0][1]
        except (RuntimeError, OSError) as error:  # torchvision's ways of saying that a set is not there
            hint = "" if download else " (fetch it with --data.download true)"
            raise ValueError(f"data.root: {root}: wanted torchvision's {name}{hint}: {error}") from error
        if not isinstance(label, int | np.integer):
            raise ValueError(f"data.name: wanted a set with one class an image, got {name}")
        names = getattr(dataset, "classes", None) or getattr(dataset, "categories", None)
        if names is None:
            names = [str(i) for i in range(1 + max(int(label) for _, label in dataset))]
        return Source(_Numbered(dataset, f"{root}/{name}/{part}"), list(map(str, names)), np.arange(len(dataset)))

    def by_word(split: Split) -> Source:
        for word in TORCHVISION_SPLITS[split]:
            try:
                return opened(split, split=word)
            except ValueError as error:
                if "Unknown value" not in str(error):
                    raise
        raise ValueError(f"data.name: {name} has no split for {split}: none of {', '.join(TORCHVISION_SPLITS[split])}")

    if "train" in takes:
        return {"train": partial(opened, "train", train=True), "val": partial(opened, "val", train=False)}
    if "split" in takes:
        return {"train": partial(by_word, "train"), "val": partial(by_word, "val")}
    return {"train": partial(opened, "train")}


class _Numbered:
    """Images without names of their own, behind timm's reader interface."""

    def __init__(self, items: Any, name: str) -> None:
        self.items, self.name = items, name

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        return f"{self.name}/{index:07d}"


def _held_out(source: Source, split: Split) -> Source:
    """A tenth of the only split, the same tenth every time; or the rest."""
    order = stream(0, HOLDOUT).permutation(len(source))
    held_out = max(1, len(source) // 10)
    return replace(source, indices=np.sort(order[:held_out] if split == "val" else order[held_out:]))


def _with_classes_of(train: Source, val: Source, data: SourceConfig) -> Source:
    """The validation split, numbered as the training split numbers its classes, all of which it need not have."""
    number = {name: i for i, name in enumerate(train.class_names)}
    extra = [name for name in val.class_names if name not in number]
    if extra:
        raise ValueError(f"{data.root}: wanted in val the classes of train, got another: {', '.join(extra[:3])}")
    return replace(val, class_names=train.class_names, labels=np.array([number[name] for name in val.class_names]))


def _without(source: Source, root: Path, file: str, other: Callable[[], Source] | None) -> Source:
    """A source without the images that a list names; the labels of the classes stay."""
    listed, paths = read_exclude(file, root), _paths(source)
    unknown = listed.keys() - set(paths)
    if unknown and other is not None:
        unknown -= set(_paths(other()))
    if unknown:
        raise ValueError(
            f"data.exclude: {file}: wanted images of {root}, one path a line relative to it, got {len(unknown)} that "
            f"it does not hold: {', '.join(sorted(listed[path] for path in unknown)[:3])}"
        )
    kept = np.array([i for i in source.indices if paths[i] not in listed], np.int64)
    if not len(kept):
        raise ValueError(f"data.exclude: {file}: wanted some images left of {len(source)}, got none")
    return replace(source, indices=kept)


def _paths(source: Source) -> list[str]:
    """Of all the reader's images, both parts of a split that was cut in two."""
    reader = source.reader
    return [os.path.normpath(reader.filename(i, absolute=True)) for i in range(len(reader))]
