"""What each file of a data set is, and what they are together: the common part of both kinds of check.

Files are found, decoded and mapped to classes as training does it, so that what passes here passes there. Mean and
standard deviation are exact: sums of integers over all pixels of the training split's readable images at their own
size, where a large image weighs more than a small one.
"""

import hashlib
import io
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from sparsemae.commands.near_duplicates import fingerprint, near_pairs
from sparsemae.data.images import PixelRules, is_16_bit, open_image, orientation, own_maxval
from sparsemae.data.loader import begin_worker
from sparsemae.data.masks import IGNORED, read_mask
from sparsemae.data.splits import Source
from sparsemae.data.survey import Traits
from sparsemae.data.tree import Split
from sparsemae.options import SourceConfig
from sparsemae.terminal import printable
from sparsemae.training.logs import RunLog

FILES_PER_TURN = 16
LISTED = 50
"""Groups of duplicates, and pairs of near-duplicates, that are shown."""
Fault = Literal["empty", "unusable", "too small", "binary", "ignored"]
USABLE: tuple[Fault | None, ...] = (None, "binary", "ignored")
"""What training would take, to no use."""
FAULTS: dict[Fault, str] = {
    "empty": "empty",
    "unusable": "unusable",
    "too small": "too small",
    "binary": "mask of only 0 and 255, which is ignored (a binary mask has 0 and 1)",
    "ignored": "mask of ignored pixels only",
}


@dataclass
class FileRecord:
    """What one image is, with its class or mask."""

    path: str
    split: Split
    class_name: str = ""
    """Empty if it could not be opened, or has a mask."""
    fault: Fault | None = None
    reason: str = ""
    """One line that names the file."""
    size: tuple[int, int] = (0, 0)
    """Width and height, px."""
    digest: bytes = b""
    """Of the image file's bytes; of the pixels where a source has no files."""
    mark: bytes = b""
    """Of the picture, see `near_duplicates`."""
    values: frozenset[int] = frozenset()
    """Of an index mask."""
    flat: bool = False
    """All pixels have one value."""
    turned: bool = False
    """Its EXIF orientation is not upright."""
    highest: int | None = None
    """Largest value of 16-bit gray, whose range its file does not say."""
    pixels: np.ndarray | int = 0
    """Per class of a mask ``[C]``; of an unusable one 0."""

    def note_header(self, content: bytes, max_pixels: int) -> None:
        """Note what the image file says of itself, if it can be opened."""
        with suppress(Exception), open_image(io.BytesIO(content), max_pixels) as image:
            self.turned = orientation(image) != 1
            wide = is_16_bit(image) and own_maxval(image) is None
            self.highest = int(np.asarray(image).max()) if wide else None


@dataclass
class Report:
    """What was found; ``str()`` gives the page."""

    root: Path
    files: list[FileRecord]
    mean: list[float]
    std: list[float]
    """Of the training split, per channel, for pixels in 0 to 1."""
    class_names: list[str]
    notes: list[str]
    """What training would say of the splits."""
    rules: SourceConfig

    @property
    def faulty(self) -> list[FileRecord]:
        """Files that training cannot use, or not well."""
        return [file for file in self.files if file.fault]

    @property
    def duplicates(self) -> list[list[FileRecord]]:
        """Groups of files with the same bytes, those across the splits first, then those across classes.

        Validation files are first in each; the first is the one to keep.
        """
        groups = defaultdict(list)
        for file in sorted(self.files, key=lambda file: file.split != "val"):
            if not file.fault:
                groups[file.digest].append(file)
        found = [group for group in groups.values() if len(group) > 1]
        return sorted(found, key=lambda group: (-len({f.split for f in group}), -len({f.class_name for f in group})))

    @cached_property
    def near_duplicates(self) -> list[tuple[FileRecord, FileRecord, int]]:
        """A validation file, a training file that is the same picture with other bytes, and how many bits differ."""
        val, train = (
            [file for file in self.files if file.split == part and not file.fault] for part in ("val", "train")
        )
        pairs = near_pairs([file.mark for file in val], [file.mark for file in train])
        return [(val[i], train[j], bits) for i, j, bits in pairs if val[i].digest != train[j].digest]

    @property
    def exclude(self) -> list[str]:
        """Paths to leave out."""
        repeated = [file for group in self.duplicates for file in group[1:]]
        return sorted({file.path for file in (*self.faulty, *repeated)})

    @property
    def breaking(self) -> list[str]:
        """What would break a run, in few words each with the first example; empty if nothing would."""
        by_fault = {fault: [file for file in self.files if file.fault == fault] for fault in FAULTS}
        found = [f"{FAULTS[fault]}: {len(files)} ({files[0].reason})" for fault, files in by_fault.items() if files]
        flat = [file.path for file in self.files if file.flat]
        if len(flat) > len(self.files) / 2:
            found.append(f"one value in all of an image: {len(flat)} of {len(self.files)} ({flat[0]})")
        there = {file.split for file in self.files if file.fault in USABLE}
        return found + [f"no usable image in {split}" for split in ("train", "val") if split not in there]

    def __str__(self) -> str:
        lines = (*self.notes, *self._traits(), *self._classes(), *self._pixels(), *self._problems())
        return "\n".join(map(printable, lines))

    def _classes(self) -> Iterator[str]:
        raise NotImplementedError

    def _traits(self) -> list[str]:
        """What is to be said of the images' headers."""
        turned = [file.path for file in self.files if file.turned]
        wide = [file.highest for file in self.files if file.highest is not None]
        traits = Traits(len(self.files), len(turned), len(wide), max(wide, default=0), turned[0] if turned else "")
        return traits.notes(self.rules)

    def _pixels(self) -> Iterator[str]:
        sizes = np.array([file.size for file in self.files if not file.fault])
        if not len(sizes):
            return
        for name, side in (("width", sizes[:, 0]), ("height", sizes[:, 1]), ("shorter side", sizes.min(axis=1))):
            yield f"{name}: {side.min()} to {side.max()} px, median {np.median(side):g}, mean {side.mean():.1f}"
        largest = int(sizes.prod(axis=1).max())
        yield f"largest image: {largest:,} px, of at most data.max_pixels={self.rules.max_pixels:,}"
        mean, std = (", ".join(f"{value:.4f}" for value in values) for values in (self.mean, self.std))
        if self.mean:
            yield f"all pixels of train: --data.mean '[{mean}]' --data.std '[{std}]'"

    def _problems(self) -> Iterator[str]:
        for file in self.files:
            if file.fault:
                yield f"{FAULTS[file.fault]}: {file.reason}"
        for group in self.duplicates[:LISTED]:
            marks = [
                "leaks from validation into training" if len({file.split for file in group}) > 1 else "",
                "in different classes" if len({file.class_name for file in group}) > 1 else "",
            ]
            what = ", ".join(mark for mark in marks if mark)
            yield f"duplicate{f' ({what})' * bool(what)}: {' = '.join(file.path for file in group)}"
        if len(self.duplicates) > LISTED:
            yield f"... and {len(self.duplicates) - LISTED:,} more such groups"
        for val, train, bits in self.near_duplicates[:LISTED]:
            yield f"near-duplicate in validation and training: {val.path} ~ {train.path} ({bits} of 256 bits differ)"
        if len(self.near_duplicates) > LISTED:
            yield f"... and {len(self.near_duplicates) - LISTED:,} more such pairs"


def read_records(
    sources: Mapping[Split, Source], data: SourceConfig, smallest: int
) -> tuple[list[FileRecord], list[float], list[float]]:
    """Read every image of the splits, with a progress display: records, and mean and standard deviation of train's."""
    dataset = _Files(sources, smallest, data)
    loader = DataLoader(
        dataset, batch_size=FILES_PER_TURN, num_workers=data.workers, collate_fn=list,
        worker_init_fn=begin_worker,
    )  # fmt: skip
    turns = iter(loader)  # starts the processes, before the progress display starts its thread
    files, sums = [], np.zeros((2, 3), object)  # python's integers do not overflow
    pixels = faulty = 0
    with RunLog(None).progress("checking", 0, len(dataset), 1, unit="image") as progress:
        for turn in turns:
            for record, own_sums in turn:
                files.append(record)
                faulty += record.fault is not None
                if record.split == "train" and not record.fault:
                    sums = sums + own_sums
                    pixels += record.size[0] * record.size[1]
            progress.advance(len(files), f"{faulty:,} faulty")
    if not pixels:
        return files, [], []
    # exact until the root: E[x^2] - E[x]^2 in integers
    variances = [int(square) * pixels - int(total) ** 2 for total, square in zip(*sums, strict=True)]
    mean = [int(total) / (255 * pixels) for total in sums[0]]
    return files, mean, [variance**0.5 / (255 * pixels) for variance in variances]


class _Files(Dataset[Any]):
    """Every file of the splits: what it is, and its channels' sums and sums of squares ``[2, 3]``."""

    def __init__(self, sources: Mapping[Split, Source], smallest: int, rules: PixelRules) -> None:
        self.sources, self.smallest, self.rules = sources, smallest, rules
        self.keys = [(split, i) for split, source in sources.items() for i in range(len(source))]

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, number: int) -> tuple[FileRecord, np.ndarray]:
        split, index = self.keys[number]
        record = FileRecord(self.sources[split].filename(index), split)
        sums = np.zeros((2, 3), np.int64)
        try:
            with warnings.catch_warnings(action="ignore"):  # of harmless oddities in metadata
                image = self._read(record, index)
        except (ValueError, ConnectionError) as error:
            record.fault, record.reason = record.fault or "unusable", str(error)
            return record, sums
        record.mark = fingerprint(image)
        histogram, values = np.array(image.histogram(), np.int64).reshape(3, 256), np.arange(256)
        record.flat = bool((histogram.max(axis=1) == image.width * image.height).all())
        return record, np.stack((histogram @ values, histogram @ values**2))

    def _read(self, record: FileRecord, index: int) -> Image.Image:
        source, path = self.sources[record.split], record.path
        file, label = source.open(index)
        with file:
            content = file.tobytes() if isinstance(file, Image.Image) else file.read()
            record.digest = hashlib.sha256(content).digest()
            if not content:
                record.fault = "empty"
                raise ValueError(f"{path}: 0 bytes")
            if not isinstance(file, Image.Image):
                record.note_header(content, source.max_pixels)
            image, target = source.decode(
                index, file if isinstance(file, Image.Image) else io.BytesIO(content), label, rules=self.rules
            )
        record.size = image.size
        if min(image.size) < self.smallest:
            record.fault = "too small"
            raise ValueError(f"{path}: wanted at least {self.smallest} px, got {image.width} x {image.height} px")
        if source.legend is None:
            record.class_name = source.class_names[target]
            return image
        values = read_mask(label, source.legend.colors is not None, source.max_pixels)
        if values.ndim == 2:
            record.values = frozenset(np.unique(values).tolist())
        counts = np.bincount(target.ravel(), minlength=IGNORED + 1)
        record.pixels, record.reason = counts[: len(source.class_names)], str(label)
        if record.values == {0, IGNORED}:
            record.fault = "binary"
        elif counts[IGNORED] == target.size:
            record.fault = "ignored"
        return image
