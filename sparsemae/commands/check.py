"""What in a data set would break or spoil a run: every image is read, once, in parallel.

Classes of images are reported here, masks in `check_masks`. In tars and other containers each image goes by the path
that `Source.filename` gives it.
"""

import json
import shlex
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

from sparsemae.commands.check_masks import examine_masks
from sparsemae.commands.check_records import Report, read_records
from sparsemae.data.exclude import read_exclude, write_exclude
from sparsemae.data.pairs import has_masks
from sparsemae.data.sources import find_source, require_classes
from sparsemae.data.splits import Source
from sparsemae.data.tree import Split
from sparsemae.options import CheckConfig, SourceConfig
from sparsemae.options.data import source_of
from sparsemae.terminal import printable

NO_FOLDER = "(in no class folder)"


@dataclass
class ClassReport(Report):
    """What `examine` found."""

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


def check(config: CheckConfig) -> Report:
    """Print what is in a data set, and write the list to exclude. Raises ValueError if something would break a run."""
    target, data = config.write_exclude, config.data
    if target is not None and not Path(target).absolute().parent.is_dir():
        raise ValueError(f"write_exclude: {target}: wanted a file in a folder that exists")
    if data.source == "embedded":
        raise ValueError("data.source: wanted a data set of yours, got embedded, whose checksum is checked")
    report: Report
    task = config.task or _task_of(data)
    if task == "segment":
        report = examine_masks(data, config.smallest or 1)
    else:
        report = examine(replace(data, exif=data.exif is not False), config.smallest or 16, config.task == "pretrain")
    print(report)
    hint = "leave files out with --write-exclude FILE and --data.exclude FILE"
    if target is not None:
        already = read_exclude(data.exclude, report.root) if data.exclude else {}
        paths = {*report.exclude, *already}
        write_exclude(target, report.root, paths)
        print(printable(f"wrote {target}: {len(paths):,} to leave out (--data.exclude {target})"))
        hint = f"leave files out with --data.exclude {target}"
    leaks = sum(len({file.split for file in group}) > 1 for group in report.duplicates)
    spoiling = f"{len(report.duplicates):,} groups of duplicates, {leaks:,} across train and val"
    if report.near_duplicates:
        spoiling += (
            f", and {len(report.near_duplicates):,} near-duplicates (the same picture in gray, or nearly) across them"
        )
    if report.breaking:
        raise ValueError(f"{report.root}: would break a run: {'; '.join(report.breaking)}; also {spoiling}; {hint}")
    print(printable(f"{report.root}: nothing would break a run; {spoiling}"))
    print(printable(f"next: {_next(config, task, target)}"))
    return report


def _next(config: CheckConfig, task: str, exclude: str | None) -> str:
    """The command that trains on what was checked."""
    job, data = {"pretrain": "pretrain", "classify": "finetune", "segment": "segment"}[task], config.data
    words = ["sparsemae", job, data.root or ""] + ["--data.source", data.source] * (source_of(data.root) != data.source)
    plain, own = SourceConfig(), replace(data, exclude=exclude or data.exclude)
    for name in (member.name for member in fields(SourceConfig) if member.name not in ("root", "source", "workers")):
        if (value := getattr(own, name)) != getattr(plain, name):
            words += [f"--data.{name}", value if isinstance(value, str) else json.dumps(value)]
    return shlex.join([*words, "--out", f"runs/{job}"])


def _task_of(data: SourceConfig) -> str:
    """What images laid out like that are for; said."""
    laid_out = data.source == "folder" and has_masks(Path(data.root or "."))
    masks = data.source == "sceneparse" or data.classes is not None or laid_out
    task, layout = ("segment", "images with masks") if masks else ("classify", "images with classes")
    print(printable(f"{data.root}: {layout}, checked as for --task {task}"))
    return task


def examine(data: SourceConfig, smallest: int = 16, pretraining: bool = False) -> ClassReport:
    """Read every image of both splits, with a progress display."""
    splits = find_source(data)
    sources: dict[Split, Source] = {"train": splits.open("train"), "val": splits.open("val")}
    root, class_names = Path(data.root or "."), sources["train"].class_names
    if not pretraining and (len(class_names) > 1 or getattr(sources["train"].reader, "no_classes", None)):
        require_classes(sources["train"], str(root))
    return ClassReport(root, *read_records(sources, data, smallest), class_names, splits.notes(), data, pretraining)
