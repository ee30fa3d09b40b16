"""A data set's splits: what each is, and the images of one of them, each read with its class or its mask."""

import errno
import hashlib
import os
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from sparsemae.data.draws import HOLDOUT, held_out, stream
from sparsemae.data.exclude import read_exclude
from sparsemae.data.folders import Openers
from sparsemae.data.images import DEFAULT_RULES, PixelRules, decode_rgb, orientation_with_mask, reason
from sparsemae.data.masks import Legend, read_mask, turned_mask
from sparsemae.data.tree import Split
from sparsemae.limits import MAX_PIXELS
from sparsemae.options import SourceConfig

Part = Split | Literal["all"]
HELD_OUT_BEFORE = {"rule": "permutation", "share": 0.1, "seed": 0}
"""The part of the only split that models of before kept for validation; see `Splits.held_out` for those of now."""


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
    max_pixels: int = MAX_PIXELS
    """Images and masks of more are refused."""
    decoder: Callable[..., Any] = decode_rgb
    """From a file to pixels: `decode_rgb`, or what takes its arguments and makes its errors."""

    def __len__(self) -> int:
        return len(self.indices)

    def class_counts(self) -> np.ndarray | None:
        """Images of each class ``[C]``; None where they have masks, or the reader does not list its labels."""
        labels = getattr(self.reader, "labels", None)
        if labels is None or self.legend is not None:
            return None
        own = np.asarray(labels, np.int64)[self.indices]
        return np.bincount(own if self.labels is None else self.labels[own], minlength=len(self.class_names))

    def filename(self, index: int) -> str:
        """Path of one image, for messages and lists; what lies inside a file as if that were a folder."""
        return str(self.reader.filename(int(self.indices[index]), absolute=True))

    def read(self, index: int, smallest: int = 1, rules: PixelRules = DEFAULT_RULES) -> tuple[Image.Image, Any]:
        """An RGB image, and its class number or the classes of its pixels, uint8 ``[H, W]``.

        Raises ValueError naming the file if it is unreadable or too small, ConnectionError if the source itself is
        gone.
        """
        file, label = self.open(index)
        return self.decode(index, file, label, smallest, rules)

    def open(self, index: int) -> Any:
        """What the reader has of one image: file or PIL image, and label. Raises as `read`."""
        try:
            return self.reader[int(self.indices[index])]
        except Exception as error:  # torchvision's sets decode here
            name = self.filename(index)
            if isinstance(error, OSError) and _is_gone(error, name):
                raise ConnectionError(f"{name}: {error.strerror}") from error
            raise ValueError(f"{name}: unreadable image: {reason(error)}") from error

    def decode(
        self, index: int, file: Any, label: Any, smallest: int = 1, rules: PixelRules = DEFAULT_RULES
    ) -> tuple[Image.Image, Any]:
        """`read`, of what `open` gave."""
        name = self.filename(index)
        with file:
            turned = 1 if self.legend is None else orientation_with_mask(file, name, rules.exif, self.max_pixels)
            image = self.decoder(file, name, smallest, rules, self.max_pixels)
        target = self.target(label)
        if self.legend is None:
            return image, target
        if rules.exif and turned != 1 and (turned < 5 or image.size != target.shape[::-1]):
            target = turned_mask(target, turned)  # unless it was drawn on the turned image, as its size tells
        if image.size == target.shape[::-1]:
            return image, target
        (height, width), other = target.shape, image.size == target.shape
        raise ValueError(
            f"{label}: wanted the size of its image, {image.width} x {image.height} px, got {width} x {height} px"
            + f" (turned by the image's EXIF orientation? then data.exif {str(not rules.exif).lower()})" * other
        )

    def target(self, label: Any) -> Any:
        """Class number, or classes of the pixels, of what the reader has for it. Raises ValueError naming the mask."""
        if self.legend is None:
            return int(label if self.labels is None else self.labels[label])
        return (
            self.legend.decode(read_mask(label, self.legend.colors is not None, self.max_pixels), label)
            if isinstance(label, Path)
            else label
        )


# A broken link, or a file that is not ours to read; other errors are of the file system.
_OF_ONE_FILE = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.ELOOP, errno.EISDIR)


def _is_gone(error: OSError, name: str) -> bool:
    """Whether the source itself is out of reach, rather than one image of it."""
    folder = os.path.dirname(error.filename or name)
    return error.errno is not None and (error.errno not in _OF_ONE_FILE or not os.path.isdir(folder))


class Splits:
    """The splits of a data set, each listed when it is first wanted.

    Where ``test`` is the only split beside ``train``, and its images have classes, it is validation; without either a
    tenth of ``train`` is.
    """

    def __init__(self, data: SourceConfig, openers: Openers) -> None:
        self.data, self.openers = data, dict(openers)
        self._readers: dict[Split, Any] = {}
        self._notes: list[str] = []
        self.tested = False
        """Validation is by the test split."""
        if {"train", "test"} <= openers.keys() and "val" not in openers:
            flat = [reader.class_names == [""] for reader in (self.reader("train"), self.reader("test"))]
            if flat[0] or not flat[1]:
                self.openers["val"], self._readers["val"] = self.openers.pop("test"), self._readers.pop("test")
                self.tested = True
            else:
                del self.openers["test"]
                self._notes.append(f"{openers['test'][0]} has no class folders: it is no validation split, and left")

    @property
    def root(self) -> str:
        """What the set is called."""
        return self.data.root or self.data.source

    @property
    def held_out(self) -> dict[str, Any]:
        """Which part of the only split is kept for validation, the same every time; a model's card keeps it."""
        return {"rule": self.data.val_rule, "share": self.data.val_share, "seed": 0}

    def reader(self, split: Split) -> Any:
        """Of one split. Raises ValueError if there is none."""
        if split not in self.openers:
            there = ", ".join(name for name, _ in self.openers.values())
            raise ValueError(f"{self.root}: wanted a split {split}, got {there or 'none'}")
        if split not in self._readers:
            self._readers[split] = self.openers[split][1]()
        return self._readers[split]

    def note(self, text: str) -> None:
        """Add a line to `notes`."""
        self._notes.append(text)

    def notes(self) -> list[str]:
        """Which split is which, of how many images, and what else is to be said of them."""
        if self.data.root is None:
            return []
        parts, single = list[str](), list[str]()
        for split, (name, _) in self.openers.items():
            use = {"train": "training", "val": "validation", "test": "left for --split test"}[split]
            with suppress(ValueError):  # one that is not wanted may be amiss
                parts.append(f"{use}: {name or 'all'} ({len(self.reader(split)):,} images)")
        if self.tested:
            parts[-1] += ", the only other split, so that the best epoch is chosen by it"
        if self.openers.keys() == {"train"}:
            whole = self.whole("train")
            with suppress(ValueError):  # too few: said where validation is wanted
                count = len(_held_out(whole, "val", self.held_out))
                parts.append(f"where validation is wanted, {count:,} of them are held out for it (data.val_share)")
            counts = whole.class_counts() if self.data.val_rule == "stratified" else None
            single = [] if counts is None else [whole.class_names[i] for i in np.flatnonzero(counts == 1)]
        own = [note for reader in self._readers.values() for note in getattr(reader, "notes", ())]
        lines = [f"{self.root}: {'; '.join(parts)}", *dict.fromkeys(self._notes + own)]
        train = self._readers.get("train")
        if train is not None and train.class_names != [""] and getattr(train, "legend", None) is None:
            shown = ", ".join(train.class_names[:4]) + ", ..." * (len(train.class_names) > 4)
            lines[0] += f"; {len(train.class_names):,} classes: {shown}"
        if single:
            few = ", ".join(single[:4]) + ", ..." * (len(single) > 4)
            lines.append(f"{len(single):,} classes of one image, which stays in training: {few}")
        return lines

    def whole(self, split: Part) -> Source:
        """All images of one split, or of all splits."""
        reader = self._joined() if split == "all" else self.reader(split)
        legend = getattr(reader, "legend", None)
        return Source(reader, reader.class_names, np.arange(len(reader)), None, legend, self.data.max_pixels)

    def open(
        self, split: Part, limit: int | None = None, class_names: Sequence[str] | None = None,
        held_out: Mapping[str, Any] | None = None,
    ) -> Source:  # fmt: skip
        """One split, without what is excluded, and at most ``limit`` images of it; held out where there is but one.

        Args:
            class_names: number the classes so; None: as the training split has them.
            held_out: which part of the only split is validation; None: by the options.

        Raises:
            ValueError: naming the folder, if a split is missing or empty, or has other classes.
        """
        alone = self.openers.keys() == {"train"} and split in ("train", "val")
        source = self.whole("train" if alone else split)
        if alone:
            source = _held_out(source, split, held_out or self.held_out)
        if source.legend is None:
            whose = "training" if class_names is None else "the model"
            if class_names is None and "train" in self.openers and split != "train":
                class_names = self.reader("train").class_names
            if class_names is not None and list(class_names) != source.class_names:
                source = _numbered(source, class_names, f"{self.root}: {split}: wanted the classes of {whose}")
        if self.data.exclude is not None:
            others = [part for part in self.openers if part != ("train" if alone else split)]
            source = self._without(source, self.data.exclude, others)
        if limit is None:
            return source
        if self.data.source in ("embedded", "fashion-mnist"):
            return replace(source, indices=source.indices[:limit])
        order = stream(0, HOLDOUT, 1).permutation(len(source))[:limit]  # sorted by class: the first would be of one
        return replace(source, indices=np.sort(source.indices[order]))

    def open_for_evaluation(
        self, split: Part | None, trained_on: Mapping[str, Any], class_names: Sequence[str]
    ) -> tuple[Source, str]:
        """What a model is to be measured on, and a line that says so.

        Without a wish the validation split. Of a root without one: the part that the model's own training held out if
        it is the same data set, else all of it; ``train`` and ``val`` of such a root are the parts of that training,
        too, else those by the options. ``trained_on`` is what the model's card says of its data.
        """
        flat = self.openers.keys() == {"train"}
        if split is None and not flat:
            split = "val" if "val" in self.openers else "test"
        if split is not None and not (flat and split in ("train", "val")):
            names = [name or "all its images" for part, (name, _) in self.openers.items() if split in (part, "all")]
            return self.open(split, class_names=class_names), f"{self.root}: evaluated on {', '.join(names) or split}"
        rule = self.held_out_of(trained_on)
        if rule is None and trained_on.get("root") == root_digest(self.data.root):
            raise ValueError(
                f"{self.root}: wanted the images that the model was trained on, to know its held-out ones, got others: "
                "the folder has changed since (--split all reads all of it)"
            )
        part: Part = split or ("all" if rule is None else "val")
        said = {
            "all": "all its images: it has no splits, and the model was trained on another",
            "val": "its held-out part, which the model was not trained on",
            "train": "all but its held-out part, as the model was trained",
        }[part]
        if not trained_on:
            said = f"its {part} part, a tenth held out: the model's file does not say what it was trained on"
        elif rule is None and part != "all":
            said = f"its {part} part by this command's data.val_share: the model was trained on another set"
        return self.open(part, class_names=class_names, held_out=rule), f"{self.root}: evaluated on {said}"

    def held_out_of(self, trained_on: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """What a model's own training held out, as its card says (a tenth, if nothing), of this set without splits."""
        if self.openers.keys() != {"train"}:
            return None
        own = not trained_on or trained_on["digest"] == names_digest(self.whole("train"), self.data.root)
        return trained_on.get("held_out", HELD_OUT_BEFORE) if own else None

    def trained_on(self) -> dict[str, Any]:
        """What a model's card keeps of its data, as `open_for_evaluation` wants it."""
        return {
            "digest": names_digest(self.whole("train"), self.data.root),
            "root": root_digest(self.data.root),
            "held_out": self.held_out if self.openers.keys() == {"train"} else None,
        }

    def _joined(self) -> Any:
        readers = [self.reader(split) for split in self.openers]
        return readers[0] if len(readers) == 1 else _Joined(readers)

    def _without(self, source: Source, file: str, others: Sequence[Split]) -> Source:
        """A source without the images that a list names; the labels of the classes stay."""
        root = Path(self.data.root or ".")
        listed, paths = read_exclude(file, root), _paths(source.reader)
        unknown = listed.keys() - {*paths, *_unmatched(source.reader)}
        if unknown:
            readers = [self.reader(split) for split in others]
            unknown -= {path for reader in readers for path in _paths(reader) + _unmatched(reader)}
        if unknown:
            raise ValueError(
                f"data.exclude: {file}: wanted images of {root}, one path a line relative to it, got {len(unknown)} "
                f"that it does not hold: {', '.join(sorted(listed[path] for path in unknown)[:3])}"
            )
        kept = np.array([i for i in source.indices if paths[i] not in listed], np.int64)
        if not len(kept):
            raise ValueError(f"data.exclude: {file}: wanted some images left of {len(source)}, got none")
        return replace(source, indices=kept)


class _Joined:
    """Several readers as one; the classes are those of the first."""

    def __init__(self, readers: Sequence[Any]) -> None:
        self.readers, self.class_names = readers, readers[0].class_names
        self.legend = getattr(readers[0], "legend", None)
        self.starts = np.cumsum([0, *map(len, readers)])
        sources = [Source(reader, reader.class_names, np.arange(0)) for reader in readers]
        if self.legend is None:
            self.labels = [
                _numbered(source, self.class_names, "wanted the classes of training").labels for source in sources
            ]

    def __len__(self) -> int:
        return int(self.starts[-1])

    def _at(self, index: int) -> tuple[int, int]:
        number = int(np.searchsorted(self.starts, index, side="right")) - 1
        return number, index - int(self.starts[number])

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        number, own = self._at(index)
        file, label = self.readers[number][own]
        return file, label if self.legend is not None else self.labels[number][label]  # type: ignore[index]

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        """As its own reader says."""
        number, own = self._at(index)
        return str(self.readers[number].filename(own, absolute=absolute))


def _held_out(source: Source, split: Part, rule: Mapping[str, Any]) -> Source:
    """A part of the only split, the same every time; or the rest."""
    stratified = rule["rule"] == "stratified" and source.class_counts() is not None
    labels = np.asarray(source.reader.labels, np.int64)[source.indices] if stratified else None
    held = held_out(len(source), rule, labels)
    rest = np.setdiff1d(np.arange(len(source)), held)
    return replace(source, indices=source.indices[held if split == "val" else rest])


def composed(name: str) -> str:
    """A class name in Unicode's composed form."""
    return unicodedata.normalize("NFC", name)


def _numbered(source: Source, class_names: Sequence[str], wanted: str) -> Source:
    """The source with its classes numbered so, all of which it need not have."""
    number = {composed(name): i for i, name in enumerate(class_names)}
    if twice := [name for i, name in enumerate(class_names) if number[composed(name)] != i]:
        raise ValueError(f"{wanted}, each of its own name, got two named {twice[0]}, in another order or number")
    extra = [name for name in source.class_names if composed(name) not in number]
    if extra:
        shown = ", ".join(name or "images in no class folder" for name in extra[:3])
        raise ValueError(f"{wanted} ({', '.join(class_names[:3])}, ...), got another: {shown}")
    labels = np.array([number[composed(name)] for name in source.class_names])
    return replace(source, class_names=list(class_names), labels=labels)


def names_digest(source: Source, root: str | None) -> str:
    """Of the names of all images, relative to the root, and of their classes."""
    reader = source.reader
    base = Path(root or "")
    digest, prefix = hashlib.sha256(), f"{base.parent if base.suffix in ('.csv', '.tsv') else base}/" if root else ""
    digest.update("\0".join(source.class_names).encode(errors="surrogateescape"))
    for i in source.indices.tolist():
        name = reader.filename(i, absolute=True).removeprefix(prefix)
        digest.update(name.encode(errors="surrogateescape") + b"\0")
    if (labels := getattr(reader, "labels", None)) is not None:
        digest.update(np.asarray(labels, np.int64)[source.indices].tobytes())
    return digest.hexdigest()


def root_digest(root: str | None) -> str:
    """Of where a data set lies, without telling it."""
    return hashlib.sha256(os.path.realpath(root or "").encode(errors="surrogateescape")).hexdigest()


def _paths(reader: Any) -> list[str]:
    """Of all the reader's images, both parts of a split that was cut in two."""
    return [os.path.normpath(reader.filename(i, absolute=True)) for i in range(len(reader))]


def _unmatched(reader: Any) -> list[str]:
    """What the reader found but cannot give: an image without a mask, a mask without an image."""
    return [os.path.normpath(path) for files in getattr(reader, "unmatched", {}).values() for path in files]
