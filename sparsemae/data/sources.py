"""Where labeled images come from: folders, tars, WebDataset shards, HF datasets, torchvision's sets, or the package.

Every source is random-access, so that an epoch's order, each image exactly once, and an exact resume are the same for
all. Images are read through timm's reader interface, by readers of our own: timm's order of classes whose natural-sort
keys are equal is that of a set, and its ``ImageDataset`` silently replaces unreadable files.
"""

import re
from collections.abc import Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from sparsemae.data.embedded import EmbeddedReader
from sparsemae.data.folders import Openers, open_folders
from sparsemae.data.shards import read_shards
from sparsemae.data.splits import Source, Splits
from sparsemae.data.tables import open_tables
from sparsemae.data.tars import Member, class_reader, find_images, natural_order_of, read_tars, scan
from sparsemae.data.tree import (
    SPLIT_WORDS,
    Split,
    below_shared,
    find_splits,
    is_hidden,
    is_image,
    said_of_others,
    splits_said,
    subfolders,
)  # fmt: skip
from sparsemae.options import SourceConfig

# The options that each source of images with classes can use, beside those of all.
_COMMON = {"source", "workers", "exif", "background", "bits", "max_pixels", "val_share", "val_rule"}
_ROOT = {"root", "exclude"}
OPTIONS: dict[str, set[str]] = {
    "embedded": set(), "folder": _ROOT, "tar": _ROOT, "wds": _ROOT, "hfds": {"image_column", "label_column", *_ROOT},
    "csv": {"image_column", "label_column", *_ROOT},
    "torchvision": {"name", "download", *_ROOT}, "fashion-mnist": {"download", *_ROOT},
}  # fmt: skip
_REQUIRED = {"root": "a folder", "classes": "a file with one class a line"}


def open_source(data: SourceConfig, split: Split, limit: int | None = None) -> Source:
    """Open one split of images with classes, or at most ``limit`` images of it; raises as `find_source`."""
    return find_source(data).open(split, limit)


def find_source(data: SourceConfig) -> Splits:
    """The splits of images with classes.

    Raises ValueError, naming the folder, if it is missing, or it cannot be told which part of it is which split; or
    naming the option, if the source has no use for it, or wants it.
    """
    check_options(data, OPTIONS, "images with classes")
    return Splits(data, _openers(data))


def require_classes(source: Source, root: str) -> None:
    """Raises ValueError, naming what is amiss, if there are not two classes or more, or images beside their folders."""
    names = source.class_names
    if "" in names and len(names) > 1:
        stray = next(i for i in range(len(source.reader)) if source.reader.labels[i] == names.index(""))
        name = source.reader.filename(stray, absolute=True)
        raise ValueError(f"{name}: wanted each image in the folder of its class, got one beside the class folders")
    if len(names) < 2:
        hint = getattr(source.reader, "no_classes", "")
        raise ValueError(hint or f"{root}: wanted at least two class folders, got {names}")


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


def _openers(data: SourceConfig) -> Openers:
    if data.source == "embedded":
        return {split: (split, partial(EmbeddedReader, split)) for split in ("train", "val")}
    assert data.root is not None
    if data.source in ("fashion-mnist", "torchvision"):
        from sparsemae.data.libraries import open_torchvision

        full = data.source == "fashion-mnist"
        return open_torchvision(data.root, "FashionMNIST" if full else data.name, data.download or full)
    if "://" in data.root or data.root.startswith("pipe:"):
        raise ValueError(
            f"data.root: wanted a local path, got {data.root}: images are read in any order, each once an epoch, and a "
            "resume continues exactly, which a remote stream cannot"
        )
    if data.source in ("tar", "wds"):
        return open_archives(data.root, data.source)
    root = Path(data.root)
    if data.source == "csv" and root.exists():
        return open_tables(root, data.image_column, data.label_column)
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder")
    if data.source == "hfds":
        from sparsemae.data.libraries import open_hfds

        return open_hfds(root, data.image_column, data.label_column)
    return open_folders(root)


def open_archives(root: str, source: str) -> Openers:
    """Readers of tars of class folders, or of WebDataset shards, of which one alone may hold several splits."""
    tars = split_tars(root)
    if source == "wds":
        return {split: (_named(files, root), partial(read_shards, files)) for split, files in tars.items()}
    if len(tars) > 1:
        readers: dict[Split, Any] = {}

        def opened(split: Split) -> Any:
            if split not in readers:
                known = opened("train").class_names if split != "train" and "train" in tars else ()
                readers[split] = read_tars(tars[split], known)
            return readers[split]

        return {split: (_named(files, root), partial(opened, split)) for split, files in tars.items()}
    ((split, files),) = tars.items()
    images, others = find_images(files)
    by_folder: dict[str, list[Member]] = {}
    for image, path in zip(images, below_shared([image.path for image in images]), strict=True):
        by_folder.setdefault(path.partition("/")[0] if "/" in path else "", []).append(image)
    found = find_splits(root, by_folder) if len(by_folder) > 1 else {}
    if not found:
        return {split: (_named(files, root), lambda: class_reader(images, said_of_others(others)))}
    strange = [name or "no folder" for name in by_folder if name not in found.values()]
    if strange:
        raise ValueError(f"{root}: wanted images in {', '.join(found.values())} alone, got others in {strange[0]}")
    train = by_folder.get(found.get("train", ""), [])
    known = class_reader(train).class_names if train else []
    return {part: (name, partial(class_reader, by_folder[name], (), known)) for part, name in found.items()}


def split_tars(root: str) -> dict[Split, list[Path]]:
    """Tar files of each split: those in ROOT/train, or those in ROOT named so; all of ROOT if none is (or ROOT).

    Raises ValueError, naming the file, if it cannot be told which split one belongs to, or if there is none.
    """
    top = Path(root)
    if top.is_file():
        return {"train": [top]}
    if "{" in root and not top.exists():
        files = [Path(name) for name in expand_braces(root)]
        if missing := [file for file in files if not file.is_file()]:
            raise ValueError(f"{root}: no such file: {missing[0]}")
        return _by_name(files)
    if not top.is_dir():
        raise ValueError(f"{root}: no such folder")
    folders, files = {name: _tars_in(top / name) for name in subfolders(top)}, _tars_in(top)
    found = find_splits(root, [name for name, inside in folders.items() if inside])
    if not found:
        return _by_name(files) if files else _no_tars(top)
    strange = [str(inside[0]) for name, inside in folders.items() if inside and name not in found.values()]
    if strange or files:
        raise ValueError(f"{root}: wanted tars in {', '.join(found.values())} alone, got {[*strange, *files][0]}")
    return {split: folders[name] for split, name in found.items()}


def _no_tars(top: Path) -> NoReturn:
    packed = next((file.name for file in top.rglob("*.tar.*") if not is_hidden(file.name)), None)
    hint = f", got {packed}: unpack it to a plain tar, in which any image can be sought" if packed else ", found none"
    raise ValueError(f"{top}: wanted .tar files in it, or in its folders train and val{hint}")


def _by_name(files: list[Path]) -> dict[Split, list[Path]]:
    """Tars by the split that a word of their names says; without ``train`` those without such a word are it."""
    by_split: dict[Split | None, list[Path]] = {}
    for file in files:
        splits = splits_said(file.stem)
        if len(splits) > 1:
            raise ValueError(f"{file}: wanted a name that says one split, got {' and '.join(sorted(splits))}")
        by_split.setdefault(splits.pop() if splits else None, []).append(file)
    unnamed = by_split.pop(None, [])
    if unnamed and "train" not in by_split:
        by_split["train"], unnamed = unnamed, []
    for file in unnamed:
        if any(map(is_image, scan(file).names)):
            words = ", ".join(word for words in SPLIT_WORDS.values() for word in words)
            raise ValueError(f"{file}: wanted a name that says its split ({words}), as other tars here have, got none")
    return {split: by_split[split] for split in SPLIT_WORDS if split in by_split}


def _tars_in(folder: Path) -> list[Path]:
    return natural_order_of(file for file in folder.glob("*.tar") if not is_hidden(file.name) and file.is_file())


def _named(files: list[Path], root: str) -> str:
    """A few files in a few words."""
    if files == [Path(root)]:
        return ""
    return files[0].name + (f" and {len(files) - 1:,} more" if len(files) > 1 else "")


def expand_braces(pattern: str) -> list[str]:
    """The names that a pattern of shards stands for, as bash expands it: ``{000..041}`` and ``{a,b}``."""
    match = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if not match:
        return [pattern]
    words = match[3].split(",") if match[3] is not None else []
    if match[1] is not None:
        first, last, width = int(match[1]), int(match[2]), len(match[1]) * match[1].startswith("0")
        step = 1 if last >= first else -1
        words = [f"{number:0{width}d}" for number in range(first, last + step, step)]
    return [name for word in words for name in expand_braces(pattern[: match.start()] + word + pattern[match.end() :])]
