"""What in a set of images and masks would break or spoil a run: every pair is read, once, in parallel.

Pairs are found, decoded and mapped to classes as training does it, so that what passes here passes there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch.utils.data import DataLoader, Dataset

from sparsemae.data.masks import IGNORED, Labels, read_mask
from sparsemae.data.segmentation import MaskSourceConfig, Pairs, find_pairs, open_labels, read_pair
from sparsemae.training.logs import RunLog

PAIRS_PER_TURN = 16
Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = ("train", "val")
Fault = Literal["unusable", "binary", "ignored"]
FAULTS: dict[Fault, str] = {
    "unusable": "that cannot be used",
    "binary": "of only 0 and 255, which is ignored (a binary mask has 0 and 1)",
    "ignored": "of ignored pixels only",
}


@dataclass
class SeenPair:
    """What one image with its mask is."""

    mask: Path
    split: Split
    fault: Fault | None = None
    reason: str = ""
    values: frozenset[int] = frozenset()
    """Of an index mask."""
    pixels: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """Per class ``[C]``; of an unusable mask empty."""


@dataclass
class MaskReport:
    """What `examine_masks` found; ``str()`` gives the page."""

    root: str
    labels: Labels
    files: dict[Split, Pairs]
    seen: list[SeenPair]

    @property
    def pixels(self) -> dict[Split, np.ndarray]:
        """Labelled pixels of each class, by split."""
        zero = np.zeros(len(self.labels.class_names), np.int64)
        return {split: sum((pair.pixels for pair in self._usable(split)), zero) for split in self.files}

    @property
    def reduced_twice(self) -> bool:
        """The masks look as if their zero label had been removed already: 255 occurs, the highest class never."""
        values = frozenset().union(*(pair.values for pair in self.seen))
        return self.labels.reduce_zero_label and IGNORED in values and len(self.labels.class_names) not in values

    @property
    def breaking(self) -> list[str]:
        """What would break a run, in few words each with the first example; empty if nothing would."""
        found = []
        for name, what in (("images_alone", "without masks"), ("masks_alone", "without images")):
            if files := [file for pairs in self.files.values() for file in getattr(pairs, name)]:
                found.append(f"{len(files)} {name.removesuffix('_alone')} {what} ({files[0]})")
        for fault, what in FAULTS.items():
            if pairs := [pair for pair in self.seen if pair.fault == fault]:
                found.append(f"{len(pairs)} masks {what} ({pairs[0].reason or pairs[0].mask})")
        if self.reduced_twice:
            found.append(
                f"the zero label would be removed twice (masks hold 255 and never {len(self.labels.class_names)}: it "
                "has been removed already; wanted reduce_zero_label false)"
            )
        for split in self.files:
            if not self._usable(split):
                found.append(f"no usable pair in {split}")
        return found

    def _usable(self, split: Split) -> list[SeenPair]:
        return [pair for pair in self.seen if pair.split == split and pair.pixels.size]

    def __str__(self) -> str:
        return "\n".join(line for part in (self._classes(), self._problems()) for line in part)

    def _classes(self) -> Iterator[str]:
        names, pixels = self.labels.class_names, self.pixels
        width = max(len(name) for name in ("class", *names))
        yield f"{'class':<{width}}" + "".join(f"{split + ', % of labels':>20}" for split in pixels)
        for index, name in enumerate(names):
            shares = (100 * count[index] / max(count.sum(), 1) for count in pixels.values())
            yield f"{name:<{width}}" + "".join(f"{share:>20.3f}" for share in shares)
        yield f"{'pairs':<{width}}" + "".join(f"{len(self._usable(split)):>20,}" for split in pixels)

    def _problems(self) -> Iterator[str]:
        for pairs in self.files.values():
            yield from (f"image without a mask: {file}" for file in pairs.images_alone)
            yield from (f"mask without an image: {file}" for file in pairs.masks_alone)
        for pair in self.seen:
            if pair.fault:
                yield pair.reason if pair.fault == "unusable" else f"{pair.mask}: mask {FAULTS[pair.fault]}"
        for split, pixels in self.pixels.items():
            absent = [name for name, count in zip(self.labels.class_names, pixels, strict=True) if not count]
            if absent:
                yield f"in no {split} mask: {len(absent)} classes: {', '.join(absent[:8])}{', ...' * (len(absent) > 8)}"


def check_masks(data: MaskSourceConfig) -> MaskReport:
    """Print what is in a set of images and masks. Raises ValueError if something would break a run."""
    report = examine_masks(data)
    print(report)
    if report.breaking:
        raise ValueError(f"{report.root}: would break a run: {'; '.join(report.breaking)}")
    print(f"{report.root}: nothing would break a run")
    return report


def examine_masks(data: MaskSourceConfig) -> MaskReport:
    """Read every pair of both splits, with a progress display."""
    if data.source == "embedded":
        raise ValueError("masks.source: wanted folder or sceneparse, got embedded: its images are not checked")
    labels = open_labels(data)
    files = {split: find_pairs(data, split) for split in SPLITS}
    dataset = _Pairs(files, labels, data.exif)
    loader = DataLoader(dataset, batch_size=PAIRS_PER_TURN, num_workers=data.workers, collate_fn=list)
    turns = iter(loader)  # starts the processes, before the progress display starts its thread
    seen: list[SeenPair] = []
    with RunLog(None).progress("checking", 0, len(dataset), 1, unit="pair") as progress:
        for turn in turns:
            seen += turn
            progress.advance(len(seen), f"{sum(pair.fault is not None for pair in seen):,} faulty")
    return MaskReport(str(data.root), labels, files, seen)


class _Pairs(Dataset[Any]):
    def __init__(self, files: dict[Split, Pairs], labels: Labels, exif: bool) -> None:
        self.labels, self.exif = labels, exif
        self.pairs = [(split, *pair) for split, found in files.items() for pair in found.pairs]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> SeenPair:
        split, image, mask = self.pairs[index]
        seen = SeenPair(mask, split)
        try:
            _, classes = read_pair(image, mask, self.labels, self.exif)
            values = read_mask(mask)
        except ValueError as error:
            seen.fault, seen.reason = "unusable", str(error)
            return seen
        if values.ndim == 2:
            seen.values = frozenset(np.unique(values).tolist())
        counts = np.bincount(classes.ravel(), minlength=IGNORED + 1)
        seen.pixels = counts[: len(self.labels.class_names)]
        if seen.values == {0, IGNORED}:
            seen.fault = "binary"
        elif counts[IGNORED] == classes.size:
            seen.fault = "ignored"
        return seen
