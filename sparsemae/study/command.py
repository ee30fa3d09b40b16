"""`sparsemae study`: choose each arm's learning rate on held-out images, run all its seeds, measure on test images."""

import json
import math
import shlex
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image
from rich.console import Console

from sparsemae.config import check_paths, read_config
from sparsemae.data.embedded import CLASS_NAMES, EmbeddedPairs, EmbeddedReader, masks
from sparsemae.data.folders import split_folders
from sparsemae.files import write_atomic
from sparsemae.jobs import JOBS
from sparsemae.limits import value_of
from sparsemae.options import StudyConfig, TrainerConfig
from sparsemae.processors import processors
from sparsemae.study.page import write_page
from sparsemae.study.plan import CLASSES, Trial, choose, final, images_of, pairs, selection, stages_of
from sparsemae.study.results import Results, digest, result, tested
from sparsemae.study.stages import Stage, run_stages
from sparsemae.terminal import printable

HELD_OUT = 2000
"""Of the embedded training images, the last ones."""
MEASURED_STEPS = 30


def study(config: StudyConfig) -> None:
    """Run what is missing of a study, or plan, print or report it."""
    for name in ("arms", "settings", "learning_rates"):
        if not getattr(config, name):
            raise ValueError(f"{name}: wanted at least one, got none: name a study's recipe: --config study_quick")
    out, console = Path(config.out), Console(highlight=False, soft_wrap=True)
    results = Results(out / "results.jsonl")
    root = Path(config.root) if config.root is not None else out / "images"
    if config.report is not None:
        _report(config, root, results, Path(config.report))
        return
    _check(config, root)
    out.mkdir(parents=True, exist_ok=True)
    if config.root is None:
        _write_embedded(config, root)
    if config.print_commands is not None:
        _print_commands(config, root, out)
    else:
        (_plan if config.plan else _run)(config, root, results, console)


def _check(config: StudyConfig, root: Path) -> None:
    """Read each arm's commands before the first is run: what would be refused after hours is refused now."""
    masks_too = [root / "masks"] if config.job == "segment" else []
    for top in [images_of(config, root), *masks_too] if config.root is not None else []:
        if (
            missing := {"train", "val", "test"} - split_folders(top, "--root").keys()
        ):  # without val test is taken for it
            raise ValueError(f"--root: {top}: wanted images in train, val and test, got none in {', '.join(missing)}")
    if masks_too and config.root is not None and not (root / CLASSES).is_file():
        raise ValueError(f"--root: {root / CLASSES}: wanted a class on each line, got no such file")
    out, lr = Path(config.out), config.learning_rates[0]
    each = final(replace(config, seeds=1), root, dict.fromkeys(pairs(config), lr))
    stages_of([*each, *selection(config, root)])
    for stage in stages_of(each):
        own: dict[str, Any] = {"out": f"{out}/{stage.name}", "seed": stage.seed}
        own |= {"optim.lr": lr} if stage.job != "pretrain" else {}
        try:
            options = read_config(JOBS[stage.job].options, stage.argv(out, 0))
            for name, value in own.items():
                if (got := value_of(options, name)) != value:
                    raise ValueError(f"{name}: wanted the study's own, {value}, got {got}")
            check_paths(options, but=("init", "data.root", "data.classes"))  # which come to be
        except ValueError as error:
            raise ValueError(f"{stage.title}: {error}") from error


def _report(config: StudyConfig, root: Path, results: Results, path: Path) -> None:
    """The page of this study's own trials; the results may have more."""
    tried = results.of(selection(config, root))
    measured = results.of(final(config, root, choose(config, tried)))
    write_page(config, tried, [row for row in measured if row["test"] is not None], path)


def _run(config: StudyConfig, root: Path, results: Results, console: Console) -> None:
    """Choose the rates, train what has no figures yet, and write the page."""
    out, results.images = Path(config.out), digest(root)
    _train(config, selection(config, root), results, console, result)
    trials = final(config, root, choose(config, results.of(selection(config, root))))

    def measured(trial: Trial, out: Path, seconds: float) -> dict[str, Any]:
        return tested(result(trial, out, seconds), trial, out)

    _train(config, trials, results, console, measured)
    for trial in trials:  # the rate's own choice trained these
        row = results.get(trial)
        if row is not None and row["test"] is None:
            results.put(tested(row, trial, out))
    _report(config, root, results, out / "study.md")


def _train(
    config: StudyConfig,
    trials: Sequence[Trial],
    results: Results,
    console: Console,
    row: Callable[[Trial, Path, float], dict[str, Any]],
) -> None:
    """Train what has no result yet; each is written as it comes."""
    missing, out = {trial.finetuning: trial for trial in trials if results.get(trial) is None}, Path(config.out)

    def finished(stage: Stage, seconds: float) -> None:
        if stage in missing:
            results.put(row(missing[stage], out, seconds))

    run_stages(stages_of(list(missing.values())), out, 0, math.inf, console, config.at_a_time, finished)


def _plan(config: StudyConfig, root: Path, results: Results, console: Console) -> None:
    """Count the trainings, and measure the rate of each kind in a few of its steps."""
    out = Path(config.out)
    chosen = dict.fromkeys(pairs(config), config.learning_rates[0])
    kinds: dict[tuple[str, ...], list[Stage]] = {}
    for stage in stages_of([*selection(config, root), *final(config, root, chosen)]):
        kinds.setdefault((stage.job, *_without_rate(stage.options)), []).append(stage)
    seconds = 0.0
    for alike in kinds.values():
        each = _seconds(alike[0], out)
        seconds += each * len(alike)
        console.print(printable(f"{len(alike):4} x {each:6,.0f} s  {alike[0].title}"), markup=False)
    cores = config.at_a_time or min(processors(), 4)
    console.print(
        f"{sum(map(len, kinds.values()))} trainings: {seconds / 3600:.1f} core-hours without evaluations, "
        f"{seconds / 3600 / cores:.1f} hours at {cores} at a time"
    )


def _seconds(stage: Stage, out: Path) -> float:
    """That a training would take, from the rate of its first steps, alone on the machine."""
    limits = ("--trainer.log_every_steps", f"{MEASURED_STEPS}", "--trainer.max_steps", f"{MEASURED_STEPS + 1}")
    with TemporaryDirectory(dir=out) as folder:
        short = replace(stage, name="rate", init=None, options=(*stage.options, *limits))
        run_stages([short], Path(folder), 0, math.inf, Console(quiet=True), 1)
        line = json.loads((Path(folder) / "rate" / "metrics.jsonl").read_text().splitlines()[0])
    trainer: TrainerConfig = read_config(JOBS[stage.job].options, stage.argv(out, 0)).trainer
    images = trainer.schedule_steps(round(line["step"] / line["epoch"])) * trainer.global_batch
    return images / float(line["images_per_second"])


def _without_rate(options: Sequence[str]) -> tuple[str, ...]:
    at = options.index("--optim.lr") if "--optim.lr" in options else len(options)
    return (*options[:at], *options[at + 2 :])


def _print_commands(config: StudyConfig, root: Path, out: Path) -> None:
    """The trainings as commands: pretrainings first, then finetunings, all seeds at every learning rate."""
    rates = [dict.fromkeys(pairs(config), lr) for lr in config.learning_rates]
    trials = [trial for chosen in rates for trial in final(config, root, chosen)]
    stages, after = stages_of([*trials, *selection(config, root)]), ""
    for job in ("pretrain", config.job):
        lines = [shlex.join(["sparsemae", stage.job, *stage.argv(out, 0)]) for stage in stages if stage.job == job]
        if config.print_commands == "slurm" and lines:
            script = out / f"{job}.sh"
            write_atomic(script, _slurm_array(lines))
            print(f"{job}=$(sbatch --parsable {after}{shlex.quote(str(script))})")
            after = f"--dependency=afterok:${job} "
        elif lines:
            print(*lines, sep="\n")


def _slurm_array(lines: Sequence[str]) -> str:
    """A task for each line."""
    numbered = "".join(f"{number}) {line} ;;\n" for number, line in enumerate(lines))
    return f"#!/bin/bash\n#SBATCH --array=0-{len(lines) - 1}\ncase $SLURM_ARRAY_TASK_ID in\n{numbered}esac\n"


def _write_embedded(config: StudyConfig, root: Path) -> None:
    """The embedded images as class folders below train, val and test; of segmentation below images, beside masks."""
    if root.is_dir():
        if not (images_of(config, root) / "train").is_dir():
            raise ValueError(
                f"{root}: wanted images of a study with job {config.job}, got another's: choose another --out"
            )
        return
    partial = root.with_name(f".{root.name}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    for split in ("train", "val"):
        reader = EmbeddedReader(split)
        first_held_out = len(reader) - HELD_OUT
        for index in range(len(reader)):
            image, label = reader[index]
            part = "test" if split == "val" else "train" if index < first_held_out else "val"
            written = {images_of(config, partial): image}
            if config.job == "segment":
                written[partial / "masks"] = Image.fromarray(masks(split)[index])
            for top, picture in written.items():
                folder = top / part / CLASS_NAMES[label].replace("/", "-")
                folder.mkdir(parents=True, exist_ok=True)
                picture.save(folder / f"{index:05}.png")
    if config.job == "segment":
        (partial / CLASSES).write_text("".join(f"{name}\n" for name in EmbeddedPairs.class_names))
    partial.replace(root)
