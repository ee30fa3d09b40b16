"""Images inside tar files, by index: plain tars of class folders, and WebDataset shards.

Each tar is scanned once for where its members lie (headers only: the pixels are skipped), so that any image is one seek
away. WebDataset shards are thereby no stream: the order of an epoch, each image exactly once, and an exact resume are
those of a folder. timm's tar reader reads every byte to scan, keeps a kilobyte per image, takes the order of several
tars from the file system and shares one file position among forked workers; its stream reader for shards cannot resume.
What an image is called and which class it has follows them.
"""

import hashlib
import io
import os
import re
import tarfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from timm.utils.misc import natural_key

from sparsemae.data.images import SUFFIXES

CACHE_SECONDS = 1.0
"""A scan that took longer is kept for the next time."""
_WDS_NAME = re.compile(r"^((?:.*/)?[^.]+)\.([^/]*)$")
_WDS_IMAGES = {"jpg", "jpeg", "png", "webp"}


@dataclass(frozen=True)
class Members:
    """The files in one tar, and in the tars in it."""

    names: list[str]
    """Paths; a tar in the tar is a folder."""
    offsets: np.ndarray
    sizes: np.ndarray
    """Bytes."""
    classes: list[str]
    """What the members that end in .cls say; empty for the others."""


class TarReader:
    """timm's reader interface over images in tar files."""

    def __init__(self, images: Sequence[tuple[Path, str, int, int]], labels: Sequence[int], names: list[str]) -> None:
        """``images``: tar, name, offset, size; ``labels``: numbers in ``names``, the classes."""
        self.files = sorted({file for file, *_ in images})
        number = {file: i for i, file in enumerate(self.files)}
        self.where = np.array([(number[file], offset, size) for file, _, offset, size in images], np.int64)
        self.names, self.labels, self.class_names = [name for _, name, *_ in images], np.array(labels), names

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[io.BytesIO, int]:
        file, offset, size = self.where[index]
        with self.files[file].open("rb") as stream:
            stream.seek(offset)
            return io.BytesIO(stream.read(size)), int(self.labels[index])

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        """The tar as if it were a folder."""
        return f"{self.files[self.where[index, 0]]}/{self.names[index]}"


def read_tars(files: Sequence[Path]) -> TarReader:
    """Images by class: the folder they lie in, or the tar where they lie in none (timm's rule).

    Raises ValueError, naming the file, if one is no plain tar, or if there is no image.
    """
    images, found = [], []
    for file in files:
        members = scan(file)
        for name, offset, size in zip(members.names, members.offsets, members.sizes, strict=True):
            path = PurePosixPath(name)
            if path.suffix.lower() in SUFFIXES:
                images.append((file, name, int(offset), int(size)))
                found.append(PurePosixPath(path.parent.name).name.removesuffix(".tar") or _own_class(file, files))
    if not images:
        raise ValueError(f"{files[0]}: wanted images in it ({', '.join(SUFFIXES)}), found none")
    class_names = sorted(set(found), key=natural_key)
    number = {name: i for i, name in enumerate(class_names)}
    return TarReader(images, [number[name] for name in found], class_names)


def read_shards(files: Sequence[Path]) -> TarReader:
    """WebDataset samples: KEY.jpg (jpeg, png, webp) with its class in KEY.cls, an integer; or without any, no classes.

    Raises ValueError, naming shard and member, as `read_tars`, or if a class is missing or no integer.
    """
    images, found = [], []
    for file in files:
        members = scan(file)
        split = [_WDS_NAME.match(name) for name in members.names]
        classes = {m[1]: text for m, text in zip(split, members.classes, strict=True) if m and m[2].lower() == "cls"}
        for match, offset, size in zip(split, members.offsets, members.sizes, strict=True):
            if match and match[2].lower() in _WDS_IMAGES:
                images.append((file, match[0], int(offset), int(size)))
                found.append(classes.get(match[1]))
    if not images:
        raise ValueError(f"{files[0]}: wanted images in it ({', '.join(sorted(_WDS_IMAGES))}), found none")
    if not any(found):
        return TarReader(images, [0] * len(images), [""])
    wrong = next((i for i, text in enumerate(found) if not (text and text.isdecimal())), None)
    if wrong is not None:
        name = f"{images[wrong][0]}/{images[wrong][1]}"
        raise ValueError(f"{name}: wanted its class, an integer, in a member of that name ending in .cls, "
                         f"got {found[wrong] or 'none'}")  # fmt: skip
    labels = [int(text or 0) for text in found]
    return TarReader(images, labels, [str(i) for i in range(max(labels) + 1)])


def scan(file: Path) -> Members:
    """Where the members of a tar lie; from the user's cache if it was scanned before and has not changed since."""
    status, begin = file.stat(), time.monotonic()
    key = hashlib.sha256(f"{file.resolve()} {status.st_size} {status.st_mtime_ns}".encode()).hexdigest()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparsemae" / f"{key}.npz"
    with suppress(OSError, ValueError, KeyError, EOFError), np.load(cache) as kept:
        return Members(_split(kept["names"]), kept["offsets"], kept["sizes"], _split(kept["classes"]))
    try:
        with tarfile.open(file, "r:") as archive:
            rows = list(_members(archive, "", 0))
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{file}: wanted a whole, uncompressed tar file: {error}") from error
    numbers = np.array([row[1:3] for row in rows], np.int64).reshape(-1, 2)
    members = Members([row[0] for row in rows], numbers[:, 0], numbers[:, 1], [row[3] for row in rows])
    if time.monotonic() - begin > CACHE_SECONDS:
        with suppress(OSError):  # a home that cannot be written to costs a scan each time
            cache.parent.mkdir(parents=True, exist_ok=True)
            temporary = cache.with_suffix(f".{os.getpid()}.npz")  # a run's processes scan at the same time
            np.savez(temporary, names=_join(members.names), offsets=members.offsets, sizes=members.sizes,
                     classes=_join(members.classes))  # fmt: skip
            temporary.replace(cache)
    return members


def _members(archive: tarfile.TarFile, folder: str, base: int) -> Iterator[tuple[str, int, int, str]]:
    """Name, offset, size, and the content of a .cls, of each file in it and in the tars in it."""
    while (member := archive.next()) is not None:
        archive.members.clear()  # type: ignore[attr-defined]  # they would stay in memory, a kilobyte each
        if not member.isreg():
            continue
        name, stream = os.path.normpath(folder + member.name), archive.extractfile(member)
        assert stream is not None
        if name.lower().endswith(".tar"):
            with tarfile.open(fileobj=stream, mode="r:") as inner:
                yield from _members(inner, f"{name}/", base + member.offset_data)
        else:
            text = stream.read(64).decode(errors="replace").strip() if name.lower().endswith(".cls") else ""
            yield name, base + member.offset_data, member.size, text


def _own_class(file: Path, files: Sequence[Path]) -> str:
    return file.stem if len(files) > 1 else ""


def _join(texts: list[str]) -> Any:
    return np.frombuffer("\0".join(texts).encode(errors="surrogateescape"), np.uint8)


def _split(packed: Any) -> list[str]:
    return bytes(packed).decode(errors="surrogateescape").split("\0") if packed.size else []
