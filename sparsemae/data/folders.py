"""Class folders as a source: which folder is which split, and a reader of the images in one."""

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sparsemae.data.images import SUFFIXES
from sparsemae.data.tree import Split, by_class, find_splits, holds_images, list_folder, subfolders
from sparsemae.files import existing

Openers = dict[Split, tuple[str, Callable[[], Any]]]
"""What each split there is is called, and how to open a reader of it."""


class FolderReader:
    """timm's reader interface over the images in a folder, whose subfolders are the classes."""

    def __init__(self, folder: Path) -> None:
        """Raises ValueError, naming the folder, if there is no image."""
        listing = list_folder(folder)
        if not listing.paths:
            what = f"{folder}: wanted images in it or in its subfolders ({', '.join(SUFFIXES)}), found none"
            raise ValueError("; ".join([what, *listing.notes]))
        self.folder, self.paths = str(folder), listing.paths
        self.class_names, labels, said = by_class(listing.paths)
        self.labels, self.notes = np.array(labels), [*said, *listing.notes]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return existing(self.filename(index)).open("rb"), int(self.labels[index])

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        """Its path."""
        return f"{self.folder}/{self.paths[index]}"

    def size(self, index: int) -> int:
        """Bytes of an image."""
        return os.stat(self.filename(index)).st_size


def split_folders(root: Path, options: str = "data.root") -> dict[Split, str]:
    """Names of the folders that are splits of a data set; none where its classes lie in the root itself.

    A folder named ``test`` without images is none. Raises ValueError, naming the folder, if two are the same split, or
    if images lie in another folder beside them.
    """
    names = subfolders(root)
    found = find_splits(root, names)
    if found:
        others = [name for name in names if name not in found.values() and holds_images(root / name)]
        stores = _linked_folders([root / name for name in found.values()]) if others else set[str]()
        strange = [name for name in others if not stores & {os.path.realpath(root / name)}]
        if strange:
            raise ValueError(
                f"{root}: wanted images in {', '.join(found.values())} alone, got others in {', '.join(strange[:4])}: "
                f"move them, or name {options} another folder"
            )
    return {split: name for split, name in found.items() if split != "test" or holds_images(root / name)}


def _linked_folders(folders: Sequence[Path]) -> set[str]:
    """Where the links in some folders lead, with all folders above: such a one is where the images are kept."""
    inside = (entry for folder in folders for entry in os.walk(folder))
    paths = [*map(str, folders), *(f"{parent}/{name}" for parent, below, files in inside for name in (*below, *files))]
    targets = {Path(os.path.realpath(path)) for path in paths if os.path.islink(path)}
    return {str(above) for target in targets for above in (target, *target.parents)}


def open_folders(root: Path) -> Openers:
    """Readers of class folders."""
    folders = split_folders(root)
    if not folders:
        return {"train": ("", partial(FolderReader, root))}
    return {split: (name, partial(FolderReader, root / name)) for split, name in folders.items()}
