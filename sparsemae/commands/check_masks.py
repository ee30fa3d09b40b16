"""What in a set of images and masks would break or spoil a run."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sparsemae.commands.check_records import USABLE, Report, read_records
from sparsemae.data.masks import IGNORED
from sparsemae.data.pairs import find_masks, unmatched
from sparsemae.data.splits import Source
from sparsemae.data.tree import Split
from sparsemae.options import SourceConfig


@dataclass
class MaskReport(Report):
    """What `examine_masks` found."""

    reduce_zero_label: bool
    unmatched: dict[str, list[Path]]
    """Images without masks, and masks without images."""

    @property
    def pixels(self) -> dict[Split, np.ndarray]:
        """Labeled pixels of each class, by split."""
        none = np.zeros(len(self.class_names), np.int64)
        splits: tuple[Split, Split] = ("train", "val")
        return {split: none + sum(file.pixels for file in self.files if file.split == split) for split in splits}

    @property
    def reduced_twice(self) -> bool:
        """The masks look as if their zero label had been removed already: 255 occurs, the highest class never."""
        values = frozenset().union(*(file.values for file in self.files))
        return self.reduce_zero_label and IGNORED in values and len(self.class_names) not in values

    @property
    def exclude(self) -> list[str]:
        """Paths to leave out: of a pair the image's."""
        return sorted({*super().exclude, *(str(file) for files in self.unmatched.values() for file in files)})

    @property
    def breaking(self) -> list[str]:
        """What would break a run, in few words each with the first example; empty if nothing would."""
        found = [f"{what}: {len(files)} ({files[0]})" for what, files in self.unmatched.items() if files]
        found += super().breaking
        if self.reduced_twice:
            found.append(
                f"the zero label would be removed twice (masks hold 255 and never {len(self.class_names)}: it has been "
                "removed already; wanted data.reduce_zero_label false)"
            )
        return found

    def _classes(self) -> Iterator[str]:
        pixels = self.pixels
        width = max(len(name) for name in ("class", *self.class_names))
        yield f"{'class':<{width}}" + "".join(f"{split + ', % of labels':>20}" for split in pixels)
        for index, name in enumerate(self.class_names):
            percentages = (100 * count[index] / max(count.sum(), 1) for count in pixels.values())
            yield f"{name:<{width}}" + "".join(f"{percentage:>20.3f}" for percentage in percentages)
        usable = [file.split for file in self.files if file.fault in USABLE]
        yield f"{'pairs':<{width}}" + "".join(f"{usable.count(split):>20,}" for split in pixels)

    def _problems(self) -> Iterator[str]:
        for what, files in self.unmatched.items():
            yield from (f"{what}: {file}" for file in files)
        yield from super()._problems()
        for split, pixels in self.pixels.items():
            absent = [name for name, count in zip(self.class_names, pixels, strict=True) if not count]
            if absent:
                yield f"in no {split} mask: {len(absent)} classes: {', '.join(absent[:8])}{', ...' * (len(absent) > 8)}"


def examine_masks(data: SourceConfig, smallest: int = 1) -> MaskReport:
    """Read every pair of both splits, with a progress display."""
    splits = find_masks(data)
    sources: dict[Split, Source] = {"train": splits.open("train"), "val": splits.open("val")}
    alone: dict[str, list[Path]] = {}
    for source in sources.values():
        for what, files in unmatched(source, data).items():
            alone[what] = list(dict.fromkeys(alone.get(what, []) + files))  # of one split that was cut in two
    records, legend = read_records(sources, data, smallest), sources["train"].legend
    assert legend is not None
    root = Path(data.root or ".")
    return MaskReport(root, *records, legend.class_names, splits.notes(), data, legend.reduce_zero_label, alone)
