"""Images inside tar files, by index: tars of class folders, and WebDataset shards.

Each tar is scanned once for where its members lie (headers only: the pixels are skipped), so that any image is one seek
away. WebDataset shards are thereby no stream: the order of an epoch, each image exactly once, and an exact resume are
those of a folder. timm's tar reader reads every byte to scan, keeps a kilobyte per image, takes the order of several
tars from the file system and shares one file position among forked workers; its stream reader for shards cannot resume.
Images have the order of their tar.

Tars are not trusted. Python's reader takes a header that it cannot read for the end, follows sizes below 0 in circles,
and reads whatever a header says is another header: each step of the scan is checked before it is believed.
"""

import hashlib
import io
import os
import posixpath
import tarfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from sparsemae.data.images import SUFFIXES, reason
from sparsemae.data.tree import below_shared, by_class, is_hidden, is_image, natural_order, said_of_others
from sparsemae.files import fsync
from sparsemae.options.data import LARGEST_HEADER

CACHE_SECONDS = 1.0
"""A scan that took longer is kept for the next time."""
_CACHE_VERSION = 3
_DEEPEST = 8


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
    tars: list[str]
    """Paths of the tars in it."""


class Member(NamedTuple):
    """One image in a tar."""

    file: Path
    name: str
    path: str
    """By which its class is found: tars in the tar are folders without their ending."""
    offset: int
    size: int


class TarReader:
    """timm's reader interface over images in tar files."""

    def __init__(
        self, images: Sequence[Member], labels: Sequence[int], names: list[str], notes: Sequence[str] = ()
    ) -> None:
        """``labels``: numbers in ``names``, the classes."""
        self.files = natural_order_of({image.file for image in images})
        number = {file: i for i, file in enumerate(self.files)}
        self.where = np.array([(number[image.file], image.offset, image.size) for image in images], np.int64)
        self.names, self.labels, self.class_names = [image.name for image in images], np.array(labels), names
        self.notes, self.no_classes = list(notes), ""

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

    def size(self, index: int) -> int:
        """Bytes of an image."""
        return int(self.where[index, 2])


def natural_order_of(files: Iterable[Path]) -> list[Path]:
    """Files in the order of their names."""
    return [Path(name) for name in natural_order(map(str, files))]


def find_images(files: Sequence[Path]) -> tuple[list[Member], Counter[str]]:
    """All images in some tars, and the endings of what is none."""
    images, others = [], Counter[str]()
    for file in files:
        members, inner = scan(file), set[str]()
        inner.update(members.tars)
        for name, offset, size in zip(members.names, members.offsets, members.sizes, strict=True):
            if is_image(name):
                images.append(Member(file, name, _as_folders(name, inner), int(offset), int(size)))
            else:
                others[posixpath.splitext(name)[1].lower()] += 1
    if not images:
        raise ValueError(f"{files[0]}: wanted images in it ({', '.join(SUFFIXES)}), found none")
    return images, others


def read_tars(files: Sequence[Path], known: Iterable[str] = ()) -> TarReader:
    """Images by class: the first folder below those that all share, or the tar where they lie in none.

    ``known`` classes are no shared folders. Raises ValueError, naming the file, if one is no plain tar, or holds no
    image.
    """
    images, others = find_images(files)
    return class_reader(images, said_of_others(others), known)


def class_reader(images: Sequence[Member], notes: Sequence[str] = (), known: Iterable[str] = ()) -> TarReader:
    """A reader of images in class folders."""
    paths = below_shared([image.path for image in images], known)
    if len({image.file for image in images}) > 1:
        paths = [
            path if "/" in path else f"{image.file.stem}/{path}" for path, image in zip(paths, images, strict=True)
        ]
    class_names, labels, said = by_class(paths)
    return TarReader(images, labels, class_names, [*said, *notes])


def _as_folders(name: str, tars: set[str]) -> str:
    if not tars:
        return name
    parts = name.split("/")
    return "/".join(
        part.removesuffix(part[-4:]) if "/".join(parts[: i + 1]) in tars else part for i, part in enumerate(parts)
    )


def scan(file: Path) -> Members:
    """Where the members of a tar lie; from the user's cache if it was scanned before and has not changed since."""
    status, begin = file.stat(), time.monotonic()
    key = f"{_CACHE_VERSION} {file.resolve()} {status.st_size} {status.st_mtime_ns}"
    name = hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparsemae" / f"{name}.npz"
    with suppress(Exception), cache.open("rb") as kept_file, np.load(kept_file) as kept:  # a torn one is made again
        texts = {key: _split(kept[key]) for key in ("names", "classes", "tars")}
        lengths = len(texts["names"]), len(texts["classes"]), *kept["offsets"].shape, *kept["sizes"].shape
        if len({*lengths}) == 1:
            return Members(offsets=kept["offsets"], sizes=kept["sizes"], **texts)
    found = _Scan()
    try:
        with file.open("rb") as stream:
            found.read(stream, status.st_size, "", 0)
        found.follow_links()
    except _RefusedError as error:
        raise ValueError(f"{file}/{error}") from None
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file)) from error
    except Exception as error:  # tarfile raises what comes
        raise ValueError(f"{file}: wanted a whole, uncompressed tar file: {reason(error)}") from error
    rows = found.rows
    numbers = np.array([row[:2] for row in rows.values()], np.int64).reshape(-1, 2)
    members = Members(list(rows), numbers[:, 0], numbers[:, 1], [row[2] for row in rows.values()], found.tars)
    if time.monotonic() - begin > CACHE_SECONDS:
        with suppress(OSError):  # a home that cannot be written to costs a scan each time
            cache.parent.mkdir(parents=True, exist_ok=True)
            temporary = cache.with_suffix(f".{os.getpid()}.npz")  # a run's processes scan at the same time
            np.savez(temporary, names=_join(members.names), offsets=members.offsets, sizes=members.sizes,
                     classes=_join(members.classes), tars=_join(members.tars))  # fmt: skip
            fsync(temporary)
            temporary.replace(cache)
            fsync(cache.parent)
    return members


class _RefusedError(Exception):
    """Names a member."""


class _Headers:
    """What tarfile reads from: a part of a file, whose headers have the size of headers."""

    def __init__(self, stream: BinaryIO, begin: int, size: int) -> None:
        self.stream, self.begin, self.length, self.at = stream, begin, size, 0

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= LARGEST_HEADER:
            raise tarfile.ReadError(f"wanted a header of 0 to {LARGEST_HEADER:,} bytes, got {size:,}")
        self.stream.seek(self.begin + self.at)
        content = self.stream.read(max(0, min(size, self.length - self.at)))
        self.at += len(content)
        return content

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence != os.SEEK_SET or not 0 <= offset <= self.length:
            raise tarfile.ReadError("unexpected end of data")
        self.at = offset
        return offset

    def tell(self) -> int:
        return self.at


class _Scan:
    """Offset, size, and the content of a .cls, of each file by its path; of two with one path the last, as in tar."""

    def __init__(self) -> None:
        self.rows: dict[str, tuple[int, int, str]] = {}
        self.links: dict[str, str] = {}
        self.tars: list[str] = []

    def read(self, stream: BinaryIO, size: int, folder: str, base: int, depth: int = 0) -> None:
        """All members of the tar of ``size`` bytes at ``base``, and of the tars in it."""
        headers, end = _Headers(stream, base, size), -1
        with tarfile.open(fileobj=headers, mode="r:") as archive:  # type: ignore[call-overload]
            while (member := archive.next()) is not None:
                archive.members.clear()  # they would stay in memory, a kilobyte each
                whole = 0 <= member.size <= size or member.issparse()  # whose size is that of its holes too
                if not whole or archive.offset <= end or "\0" in member.name:
                    raise tarfile.ReadError(f"damaged header of {member.name:.200}, of {member.size:,} bytes")
                end = archive.offset
                self._note(stream, member, folder, base, depth)
        headers.seek(end := max(end, 0))  # where tarfile saw the end, or what it takes for one
        if headers.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"no end mark at byte {end:,}, but a header that is damaged or cut off")

    def _note(self, stream: BinaryIO, member: tarfile.TarInfo, folder: str, base: int, depth: int) -> None:
        parts = [part for part in member.name.split("/") if part not in ("", ".", "..")]
        name = folder + "/".join(parts)
        if member.isdir() or any(map(is_hidden, parts)):
            return
        if member.islnk():
            self.links[name] = folder + _normal(member.linkname)
        elif member.issym():
            outside = member.linkname.startswith("/")
            target = _normal(posixpath.join(posixpath.dirname(name), member.linkname))
            self.links[name] = member.linkname if outside else target
        elif member.issparse():
            raise _RefusedError(f"{name}: wanted its bytes in one piece, got a sparse member (tar without --sparse)")
        elif member.isreg():
            self._note_file(stream, member, name, base, depth)
        elif is_image(name):
            raise _RefusedError(f"{name}: wanted a file, got a member of type {member.type!r}")

    def _note_file(self, stream: BinaryIO, member: tarfile.TarInfo, name: str, base: int, depth: int) -> None:
        self.links.pop(name, None)
        if name.lower().endswith(".tar"):
            self.tars.append(name)
            if depth == _DEEPEST:
                raise _RefusedError(f"{name}: wanted at most {_DEEPEST} tars in one another")
            self.read(stream, member.size, f"{name}/", base + member.offset_data, depth + 1)
        else:
            stream.seek(base + member.offset_data)
            text = stream.read(min(64, member.size)) if name.lower().endswith(".cls") else b""
            self.rows[name] = (base + member.offset_data, member.size, text.decode(errors="replace").strip())

    def follow_links(self) -> None:
        """Give each link what it points to, which may be another link."""
        for name, first in self.links.items():
            target, passed = first, {name}
            while target in self.links and target not in passed:
                passed.add(target)
                target = self.links[target]
            for link in passed:  # each is followed once
                self.links[link] = target
            if target in self.rows:
                self.rows[name] = self.rows[target]
            elif is_image(name) or not posixpath.splitext(name)[1]:
                raise _RefusedError(f"{name}: wanted a file, or a link to one in the same tar, got a link to {target}")


def _normal(path: str) -> str:
    return posixpath.normpath(path).lstrip("/")


def _join(texts: list[str]) -> Any:
    return np.frombuffer("\0".join(texts).encode(errors="surrogateescape"), np.uint8)


def _split(packed: Any) -> list[str]:
    return bytes(packed).decode(errors="surrogateescape").split("\0") if packed.size else []
