"""What in a classification data set would break or spoil a run: every image is read, once, in parallel.

The command takes images with masks, too: `check_masks` reads those.

Files are found and decoded as training does it, so that what passes here passes there; in tars and other containers
each image goes by the path that `Source.filename` gives it. Mean and deviation are exact:
sums of integers over all pixels of the training split's readable images at their own size, where a large image weighs
more than a small one.
"""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from timm.data.readers.img_extensions import get_img_extensions
from torch.utils.data import DataLoader, Dataset

from sparsemae.data.classification import UNREADABLE, decode_rgb
from sparsemae.data.exclude import read_exclude, write_exclude
from sparsemae.data.segmentation import MaskSourceConfig
from sparsemae.data.sources import Source, SourceConfig, open_source, split_folders
from sparsemae.commands.check_masks import MaskReport, check_masks
from sparsemae.training.logs import RunLog

FILES_PER_TURN = 64
NO_FOLDER = "(in no class folder)"
Fault = Literal["empty", "unreadable", "too small"]


@dataclass
class CheckConfig:
    """Read every image of a data set; exit status 2 if something would break a run."""

    data: SourceConfig = field(default_factory=lambda: SourceConfig(source="folder", workers=os.cpu_count() or 1))
    """The data set; workers: processes that read, 0 for none but this one."""
    masks: MaskSourceConfig | None = None
    """Images with masks to check, for segmentation, in place of `data`: --masks.source, --masks.root ..."""
    smallest: int = 16
    """Shortest side that an image may have: the model's patch, px."""
    unlabelled: bool = False
    """The images are for pretraining only: one class is enough."""
    write_exclude: str | None = None
    """File to write the paths to leave out to, for data.exclude: what cannot be used, and all but one of each group of
    duplicates (a validation image stays rather than a training image)."""


@dataclass
class Seen:
    """What one file is."""

    path: str
    split: str
    class_name: str = ""
    """Empty if it could not be opened."""
    fault: Fault | None = None
    reason: str = ""
    size: tuple[int, int] = (0, 0)
    """Width and height, px."""
    digest: bytes = b""
    """Of the file's bytes; of the pixels where a source has no files."""


@dataclass
class Report:
    """What `examine` found; ``str()`` gives the page."""

    root: Path
    files: list[Seen]
    class_names: list[str]
    splits: list[str]
    mean: list[float]
    std: list[float]
    """Of the training split, per channel, for pixels in 0 to 1."""
    empty_folders: list[str]
    """Folders below the splits' without any file that training reads, relative to the root."""
    ignored: dict[str, int]
    """Files that training does not read, by their ending."""
    unlabelled: bool

    @property
    def faulty(self) -> list[Seen]:
        """Files that training cannot use."""
        return [file for file in self.files if file.fault]

    @property
    def duplicates(self) -> list[list[Seen]]:
        """Groups of files with the same bytes; validation files first in each, the first is the one to keep."""
        groups = defaultdict(list)
        for file in sorted(self.files, key=lambda file: file.split != "val"):
            if not file.fault:
                groups[file.digest].append(file)
        return [group for group in groups.values() if len(group) > 1]

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """Usable images by class and split."""
        usable = Counter((file.class_name, file.split) for file in self.files if not file.fault)
        return {name: {split: usable[name, split] for split in self.splits} for name in self.class_names}

    @property
    def exclude(self) -> list[str]:
        """Paths to leave out."""
        repeated = [file for group in self.duplicates for file in group[1:]]
        return sorted({file.path for file in (*self.faulty, *repeated)})

    @property
    def breaking(self) -> list[str]:
        """What would break a run, in few words each; empty if nothing would."""
        faults = Counter(file.fault for file in self.faulty)
        found = [f"{count} {fault}" for fault, count in sorted(faults.items(), key=str)]
        found = [f"{' and '.join(found)} {'image' if len(self.faulty) == 1 else 'images'}"] if found else []
        for split in self.splits:
            if not any(count[split] for count in self.counts.values()):
                found.append(f"no usable image in {split}")
        inhabited = [name for name, count in self.counts.items() if count["train"]]
        if len(inhabited) < 2 and not self.unlabelled:
            found.append(
                f"{len(inhabited)} class with training images, where finetuning wants two (--unlabelled true if the "
                "images are for pretraining)"
            )
        return found

    def __str__(self) -> str:
        return "\n".join(line for part in (self._classes(), self._pixels(), self._problems()) for line in part)

    def _classes(self) -> Iterator[str]:
        width = max(len(name or NO_FOLDER) for name in ("class", *self.class_names))
        yield f"{'class':<{width}}" + "".join(f"{split:>10}" for split in self.splits)
        for name, count in self.counts.items():
            yield f"{name or NO_FOLDER:<{width}}" + "".join(f"{count[split]:>10,}" for split in self.splits)
        totals = {split: sum(count[split] for count in self.counts.values()) for split in self.splits}
        yield f"{'all':<{width}}" + "".join(f"{totals[split]:>10,}" for split in self.splits)

    def _pixels(self) -> Iterator[str]:
        sizes = np.array([file.size for file in self.files if not file.fault])
        if not len(sizes):
            return
        for name, side in (("width", sizes[:, 0]), ("height", sizes[:, 1]), ("shorter side", sizes.min(axis=1))):
            yield f"{name}: {side.min()} to {side.max()} px, median {np.median(side):g}, mean {side.mean():.1f}"
        mean, std = (", ".join(f"{value:.4f}" for value in values) for values in (self.mean, self.std))
        if self.mean:
            yield f"all pixels of train: --data.mean '[{mean}]' --data.std '[{std}]'"

    def _problems(self) -> Iterator[str]:
        for file in self.faulty:
            yield f"{file.fault}: {file.reason}"
        for group in self.duplicates:
            marks = [
                "leaks from validation into training" if len({file.split for file in group}) > 1 else "",
                "in different classes" if len({file.class_name for file in group}) > 1 else "",
            ]
            what = ", ".join(mark for mark in marks if mark)
            yield f"duplicate{f' ({what})' * bool(what)}: {' = '.join(file.path for file in group)}"
        for name, count in self.counts.items():
            for split in self.splits:
                if not count[split]:
                    yield f"no images: class {name or NO_FOLDER} in {split}"
        for folder in self.empty_folders:
            yield f"no images: folder {folder}, which is no class for training"
        if "" in self.class_names and len(self.class_names) > 1:
            yield f"stray: images {NO_FOLDER} make a class of their own"
        if self.ignored:
            endings = ", ".join(f"{count:,} {ending or 'without ending'}" for ending, count in self.ignored.items())
            yield f"not read by training: {endings} (it reads {', '.join(get_img_extensions())})"


def check(config: CheckConfig) -> Report | MaskReport:
    """Print what is in a data set, and write the list to exclude. Raises ValueError if something would break a run."""
    if config.masks is not None:
        for name, value in (("write_exclude", config.write_exclude), ("data.root", config.data.root)):
            if value is not None:
                raise ValueError(f"{name}: wanted none with images and masks to check, got {value}")
        return check_masks(config.masks)
    target = config.write_exclude
    if target is not None and not Path(target).absolute().parent.is_dir():
        raise ValueError(f"write_exclude: {target}: wanted a file in a folder that exists")
    report = examine(config.data, config.smallest, config.unlabelled)
    print(report)
    hint = "leave files out with --write-exclude FILE and --data.exclude FILE"
    if target is not None:
        already = read_exclude(config.data.exclude, report.root) if config.data.exclude else {}
        paths = {*report.exclude, *already}
        write_exclude(target, report.root, paths)
        print(f"wrote {target}: {len(paths):,} to leave out (--data.exclude {target})")
        hint = f"leave files out with --data.exclude {target}"
    leaks = sum(len({file.split for file in group}) > 1 for group in report.duplicates)
    spoiling = f"{len(report.duplicates):,} groups of duplicates, {leaks:,} across train and val"
    if report.breaking:
        raise ValueError(f"{report.root}: would break a run: {'; '.join(report.breaking)}; also {spoiling}; {hint}")
    print(f"{report.root}: nothing would break a run; {spoiling}")
    return report


def examine(data: SourceConfig, smallest: int = 16, unlabelled: bool = False) -> Report:
    """Read every image of both splits, with a progress display."""
    if data.source == "embedded":
        raise ValueError("data.source: wanted a data set of yours, got embedded, whose checksum is checked")
    if smallest < 1:
        raise ValueError(f"smallest: wanted at least 1 px, got {smallest}")
    sources = {"train": open_source(data, "train"), "val": open_source(data, "val")}
    dataset = _Files(sources, smallest)
    loader = DataLoader(dataset, batch_size=FILES_PER_TURN, num_workers=data.workers, collate_fn=list)
    turns = iter(loader)  # starts the processes, before the progress display starts its thread
    files, sums = [], np.zeros((2, 3), object)  # python's integers do not overflow
    pixels = faulty = 0
    with RunLog(None).progress("checking", 0, len(dataset), 1, unit="image") as progress:
        for turn in turns:
            for seen, own_sums in turn:
                files.append(seen)
                faulty += seen.fault is not None
                if seen.split == "train" and not seen.fault:
                    sums = sums + own_sums
                    pixels += seen.size[0] * seen.size[1]
            progress.advance(len(files), f"{faulty:,} faulty")
    mean = [int(total) / (255 * pixels) for total in sums[0]] if pixels else []
    # exact until the root: E[x^2] - E[x]^2 in integers
    variances = [int(square) * pixels - int(total) ** 2 for total, square in zip(*sums, strict=True)]
    std = [variance**0.5 / (255 * pixels) for variance in variances] if pixels else []
    root = Path(data.root or ".")
    empty, ignored = _other_files(root) if data.source == "folder" else ([], {})
    return Report(root, files, sources["train"].class_names, list(sources), mean, std, empty, ignored, unlabelled)


class _Files(Dataset[Any]):
    """Every file of the splits: what it is, and its channels' sums and sums of squares ``[2, 3]``."""

    def __init__(self, sources: dict[str, Source], smallest: int) -> None:
        self.smallest, self.sources = smallest, sources
        self.keys = [(split, i) for split, source in sources.items() for i in range(len(source))]

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, number: int) -> tuple[Seen, np.ndarray]:
        split, index = self.keys[number]
        source = self.sources[split]
        path = source.filename(index)
        seen, sums = Seen(path, split), np.zeros((2, 3), np.int64)
        try:
            with warnings.catch_warnings(action="ignore"):  # of harmless oddities in metadata
                file, label = source[index]
                with file:
                    content = file.tobytes() if isinstance(file, Image.Image) else file.read()
                    seen.class_name, seen.digest = source.class_names[label], hashlib.sha256(content).digest()
                    if not content:
                        seen.fault, seen.reason = "empty", f"{path}: 0 bytes"
                        return seen, sums
                    image = decode_rgb(file if isinstance(file, Image.Image) else io.BytesIO(content), path)
        except UNREADABLE as error:
            reason = getattr(error, "strerror", None) or str(error)
            seen.fault, seen.reason = "unreadable", reason if reason.startswith(path) else f"{path}: {reason}"
            return seen, sums
        seen.size = image.size
        if min(image.size) < self.smallest:
            seen.fault = "too small"
            seen.reason = f"{path}: wanted at least {self.smallest} px, got {image.width} x {image.height} px"
        else:
            histogram, values = np.array(image.histogram(), np.int64).reshape(3, 256), np.arange(256)
            sums = np.stack((histogram @ values, histogram @ values**2))
        return seen, sums


def _other_files(root: Path) -> tuple[list[str], dict[str, int]]:
    """Folders without images, and files that timm's reader passes over, by ending."""
    folders = [folder for folder in split_folders(root).values() if folder is not None]
    endings, empty, ignored = get_img_extensions(as_set=True), [], Counter[str]()
    for top in folders if split_folders(root)["train"] else [root]:
        for parent, below, names in os.walk(top, followlinks=True):
            others = [Path(name).suffix.lower() for name in names if Path(name).suffix.lower() not in endings]
            ignored.update(others)
            if not below and len(others) == len(names):
                empty.append(os.path.relpath(parent, root))
    return sorted(empty), dict(ignored.most_common())
