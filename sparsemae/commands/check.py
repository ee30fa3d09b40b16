"""What in a data set would break or spoil a run: every image is read, once, in parallel.

Classes of images are reported here, masks in `check_masks`. In tars and other containers each image goes by the path
that `Source.filename` gives it.
"""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sparsemae.commands.check_masks import examine_masks
from sparsemae.commands.check_records import Report, read_records
from sparsemae.data.exclude import read_exclude, write_exclude
from sparsemae.data.images import SUFFIXES
from sparsemae.data.pairs import has_masks
from sparsemae.data.sources import Source, Split, open_source, split_folders
from sparsemae.options import CheckConfig, SourceConfig

NO_FOLDER = "(in no class folder)"


@dataclass
class ClassReport(Report):
    """What `examine` found."""

    empty_folders: list[str]
    """Folders below the splits' without any file that training reads, relative to the root."""
    ignored: dict[str, int]
    """Files that training does not read, by their ending."""
    pretraining: bool
    """One class is enough."""

    @property
    def counts(self) -> dict[str, dict[Split, int]]:
        """Usable images by class and split."""
        usable = Counter((file.class_name, file.split) for file in self.files if not file.fault)
        return {name: {"train": usable[name, "train"], "val": usable[name, "val"]} for name in self.class_names}

    @property
    def breaking(self) -> list[str]:
        """What would break a run, in few words each with the first example; empty if nothing would."""
        inhabited = sum(bool(count["train"]) for count in self.counts.values())
        few = (
            f"{inhabited} class with training images, where finetuning wants two (--task pretrain if the images are "
            "for pretraining)"
        )
        return super().breaking + [few] * (inhabited < 2 and not self.pretraining)

    def _classes(self) -> Iterator[str]:
        rows = {name or NO_FOLDER: count for name, count in self.counts.items()}
        rows["all"] = {split: sum(count[split] for count in self.counts.values()) for split in ("train", "val")}
        width = max(len(name) for name in ("class", *rows))
        yield f"{'class':<{width}}{'train':>10}{'val':>10}"
        for name, count in rows.items():
            yield f"{name:<{width}}{count['train']:>10,}{count['val']:>10,}"

    def _problems(self) -> Iterator[str]:
        yield from super()._problems()
        for name, count in self.counts.items():
            yield from (f"no images: class {name or NO_FOLDER} in {split}" for split, n in count.items() if not n)
        for folder in self.empty_folders:
            yield f"no images: folder {folder}, which is no class for training"
        if "" in self.class_names and len(self.class_names) > 1:
            yield f"stray: images {NO_FOLDER} make a class of their own"
        if self.ignored:
            endings = ", ".join(f"{count:,} {ending or 'without ending'}" for ending, count in self.ignored.items())
            yield f"not read by training: {endings} (it reads {', '.join(SUFFIXES)})"


def check(config: CheckConfig) -> Report:
    """Print what is in a data set, and write the list to exclude. Raises ValueError if something would break a run."""
    target, data = config.write_exclude, config.data
    if target is not None and not Path(target).absolute().parent.is_dir():
        raise ValueError(f"write_exclude: {target}: wanted a file in a folder that exists")
    if data.source == "embedded":
        raise ValueError("data.source: wanted a data set of yours, got embedded, whose checksum is checked")
    report: Report
    if (config.task or _task_of(data)) == "segment":
        report = examine_masks(data, config.smallest or 1)
    else:
        report = examine(data, config.smallest or 16, config.task == "pretrain")
    print(report)
    hint = "leave files out with --write-exclude FILE and --data.exclude FILE"
    if target is not None:
        already = read_exclude(data.exclude, report.root) if data.exclude else {}
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


def _task_of(data: SourceConfig) -> str:
    """What images laid out like that are for; said."""
    masks = data.source == "sceneparse" or (data.source == "folder" and has_masks(Path(data.root or ".")))
    task, layout = ("segment", "images with masks") if masks else ("classify", "images with classes")
    print(f"{data.root}: {layout}, checked as for --task {task}")
    return task


def examine(data: SourceConfig, smallest: int = 16, pretraining: bool = False) -> ClassReport:
    """Read every image of both splits, with a progress display."""
    sources: dict[Split, Source] = {"train": open_source(data, "train"), "val": open_source(data, "val")}
    root, class_names = Path(data.root or "."), sources["train"].class_names
    empty, ignored = _other_files(root) if data.source == "folder" else ([], {})
    return ClassReport(root, *read_records(sources, data, smallest), class_names, empty, ignored, pretraining)


def _other_files(root: Path) -> tuple[list[str], dict[str, int]]:
    """Folders without images, and files that training passes over, by ending."""
    folders = [folder for folder in split_folders(root).values() if folder is not None]
    empty, ignored = [], Counter[str]()
    for top in folders if split_folders(root)["train"] else [root]:
        for parent, below, names in os.walk(top, followlinks=True):
            others = [Path(name).suffix.lower() for name in names if Path(name).suffix.lower() not in SUFFIXES]
            ignored.update(others)
            if not below and len(others) == len(names):
                empty.append(os.path.relpath(parent, root))
    return sorted(empty), dict(ignored.most_common())
