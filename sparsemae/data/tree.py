"""Which names in a folder or a tar are images, of which class and split, and in which order: rules of names alone.

The rules are torchvision's where it has any: the class is the folder directly below the split, and what lies deeper
belongs to it. Two names whose natural-sort keys are equal (``Cat`` and ``cat``, ``1`` and ``01``) are ordered by
themselves, or their order would be that of a set, which differs from process to process.
"""

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from sparsemae.data.images import SUFFIXES

Split = Literal["train", "val", "test"]
SPLIT_WORDS: dict[Split, tuple[str, ...]] = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev", "eval"),
    "test": ("test",),
}
"""The field's names of the splits, in any case."""
_NO_DATA = ("__MACOSX", "@eaDir")  # of macOS's archiver, and of a NAS


@dataclass(frozen=True)
class Listing:
    """Images by path, in order, and what lies between them."""

    paths: list[str]
    """Relative to the split, with ``/``."""
    others: Counter[str] = field(default_factory=Counter)
    """Files that are no images, by ending."""
    empty: list[str] = field(default_factory=list)
    """Folders at the bottom without images."""

    @property
    def notes(self) -> list[str]:
        """What is to be said of it."""
        shown = ", ".join(self.empty[:4]) + f" and {len(self.empty) - 4:,} more" * (len(self.empty) > 4)
        return [f"folders without images: {shown}"] * bool(self.empty) + said_of_others(self.others)


def natural_order(names: Iterable[str]) -> list[str]:
    """Numbers in names by their value, letters without their case, ties by the name itself."""
    return sorted(names, key=lambda name: (_natural_key(name), name))


def _natural_key(name: str) -> list[str | int]:
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name.lower()))]


def is_hidden(name: str) -> bool:
    """Whether a file or folder is no part of a data set."""
    return name.startswith(".") or name in _NO_DATA


def is_image(name: str) -> bool:
    """By its ending."""
    return os.path.splitext(name)[1].lower() in SUFFIXES


def list_folder(folder: str | Path, suffixes: Sequence[str] = SUFFIXES) -> Listing:
    """What lies in a folder and below it, links followed. Raises ValueError naming a link to a folder it lies in."""
    paths, folders, others = list[str](), list[str](), Counter[str]()
    for name in _walk(str(folder), "", ()):
        ending = os.path.splitext(name)[1].lower()
        if name.endswith("/"):
            folders.append(name[:-1])
        elif ending in suffixes:
            paths.append(name)
        else:
            others[ending] += 1
    above = {name.rpartition("/")[0] for name in (*paths, *folders)}
    return Listing(natural_order(paths), others, natural_order(name for name in folders if name not in above))


def holds_images(folder: Path) -> bool:
    """Whether there is an image in a folder or below it."""
    return any(is_image(name) for name in _walk(str(folder), "", ()))


def image_files(path: Path, say: Callable[[str], None] = lambda _: None) -> list[Path]:
    """A file, or all images in a folder, and ``say`` what else is there. Raises ValueError, naming it, if none is."""
    if not path.is_dir():
        return [path]
    listing = list_folder(path)
    if not listing.paths:
        raise ValueError("; ".join([f"{path}: wanted image files, found none", *listing.notes]))
    for note in listing.notes:
        say(f"{path}: {note}")
    return [path / name for name in listing.paths]


def _walk(folder: str, prefix: str, above: tuple[tuple[int, int], ...]) -> Iterator[str]:
    """Paths of files and, with a ``/`` at their end, of folders, relative to the top."""
    status = os.stat(folder)
    here = (status.st_dev, status.st_ino)
    if here in above:
        raise ValueError(f"{folder}: wanted folders that end, got a link to one that it lies in")
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_hidden(entry.name):
                continue
            if entry.is_dir():
                yield f"{prefix}{entry.name}/"
                yield from _walk(entry.path, f"{prefix}{entry.name}/", (*above, here))
            else:
                yield prefix + entry.name


def subfolders(folder: Path) -> list[str]:
    """Names of the folders in a folder, in order."""
    with os.scandir(folder) as entries:
        return natural_order(entry.name for entry in entries if entry.is_dir() and not is_hidden(entry.name))


def split_of(name: str) -> Split | None:
    """The split that a folder's name says."""
    return next((split for split, words in SPLIT_WORDS.items() if name.lower() in words), None)


def splits_said(name: str) -> set[Split]:
    """The splits that the words of a file's name say."""
    return {split for word in re.findall(r"[a-z]+", name.lower()) if (split := split_of(word))}


def find_splits(root: str | Path, names: Iterable[str]) -> dict[Split, str]:
    """Which of some names is which split, in the order of `SPLIT_WORDS`.

    Raises ValueError, naming both, if two are the same.
    """
    found: dict[Split, str] = {}
    for name in names:
        split = split_of(name)
        if split is not None and found.setdefault(split, name) != name:
            raise ValueError(f"{root}: wanted one folder for {split}, got {found[split]} and {name}")
    return {split: found[split] for split in SPLIT_WORDS if split in found}


def by_class(paths: Sequence[str]) -> tuple[list[str], list[int], list[str]]:
    """Class names, the number of each path's class, and what is to be said of them.

    The class is the first folder, in Unicode's composed form; "" of what lies in none.
    """
    written = [path.partition("/")[0] if "/" in path else "" for path in paths]
    composed, notes = one_form(written, "its folders are")
    class_names = natural_order(set(composed.values()))
    number = {name: i for i, name in enumerate(class_names)}
    deeper = [path for path in paths if path.count("/") > 1]
    if deeper:
        notes.append(
            f"{len(deeper):,} images lie deeper than the folder of their class, and belong to it: {deeper[0]}"
            + ", ..." * (len(deeper) > 1)
        )
    return class_names, [number[composed[name]] for name in written], notes


def one_form(names: Iterable[str], what: str = "its name is") -> tuple[dict[str, str], list[str]]:
    """Each name of a class in Unicode's composed form, and what is to be said of those written in several."""
    composed = {name: unicodedata.normalize("NFC", name) for name in set(names)}
    return composed, [
        f"class {name}: {what} written in {count} ways (Unicode's composed and decomposed forms), taken as one"
        for name, count in sorted(Counter(composed.values()).items())
        if count > 1
    ]


def said_of_others(others: Counter[str]) -> list[str]:
    """What is to be said of files that are no images."""
    if not others:
        return []
    endings = ", ".join(f"{count:,} {ending or 'without ending'}" for ending, count in others.most_common())
    count = f"{others.total():,} files are" if others.total() > 1 else "1 file is"
    return [f"{count} not read: {endings} (images end in {', '.join(SUFFIXES)})"]


def below_shared(paths: Sequence[str], known: Iterable[str] = ()) -> list[str]:
    """Paths in an archive without the folders that all share, but for one that is a ``known`` class.

    An archive of ``train/``, of what is in it, and of a folder that holds it, are thereby the same. Where all images
    lie in the last shared folder itself it is their class, unless it is named as a split.
    """
    folders = [path.split("/")[:-1] for path in paths]
    first, last = min(folders), max(folders)  # all others lie between them
    depth = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    shared = first[:depth]
    depth = next((i for i, name in enumerate(shared) if name in set(known)), depth)
    if depth and depth == max(map(len, folders)) and not split_of(shared[-1]):
        depth -= 1
    return ["/".join(path.split("/")[depth:]) for path in paths]
