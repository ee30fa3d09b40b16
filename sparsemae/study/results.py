"""What came out of each trial: one JSON line, with the machine and the command that made it."""

import contextlib
import json
import os
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

import sparsemae
from sparsemae.benchmark.kernels import processor
from sparsemae.commands.evaluate import evaluate
from sparsemae.config import read_config
from sparsemae.files import write_atomic
from sparsemae.jobs import JOBS
from sparsemae.options import EvaluateConfig, SourceConfig
from sparsemae.sparsity import summarize
from sparsemae.study.plan import CLASSES, Trial
from sparsemae.tasks import task_class
from sparsemae.tasks.loading import load_model
from sparsemae.tasks.sparse import meta_model


class Results:
    """The lines of a file, one for each trial, by its key."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.rows = _lines(file)

    def get(self, trial: Trial) -> dict[str, Any] | None:
        """The line of a trial that is done. Raises ValueError if it was made with other options."""
        row = next((row for row in self.rows if _key(row) == trial.key), None)
        if row and (other := _options(row["commands"]) ^ _options(trial.commands(self.file.parent))):
            raise ValueError(
                f"{self.file}: {trial.finetuning.title}: made with other options ({', '.join(sorted(other)):.300}): "
                "choose another --out"
            )
        return row

    def of(self, trials: Iterable[Trial]) -> list[dict[str, Any]]:
        """The lines of those that are done."""
        return [row for trial in trials if (row := self.get(trial))]

    def put(self, row: dict[str, Any]) -> None:
        """Write a line, in the place of the same trial's."""
        self.rows = [other for other in _lines(self.file) if _key(other) != _key(row)] + [row]
        write_atomic(self.file, "".join(json.dumps(row) + "\n" for row in self.rows))


def result(trial: Trial, out: Path, seconds: float) -> dict[str, Any]:
    """Of a trial whose runs are in ``out``: figures on the held-out images, sizes, curve, and where it was trained."""
    run = out / trial.finetuning.name
    model, card = load_model(run)
    config = read_config(JOBS[trial.finetuning.job].options, ["--config", str(run / "config.yaml")])
    task: Any = task_class(config.task)(config)
    task.class_names = card.class_names
    summary, forwards = summarize(model), [forward.total for forward in task.forwards(meta_model(task))]
    moved = _lines(run / "topology.jsonl")
    return {
        "setting": trial.setting, "arm": trial.arm, "seed": trial.seed, "lr": trial.lr,
        "val": card.metrics[task.best_by], "test": None,
        "kept": summary.kept + summary.dense_total, "total": summary.sparse_total + summary.dense_total,
        "sparse_weights": summary.sparse_total,
        "multiply_adds": sum(total.kept for total in forwards),
        "dense_multiply_adds": sum(total.dense for total in forwards),
        "curve": [
            [line["epoch"], line[task.best_by]] for line in _lines(run / "metrics.jsonl") if task.best_by in line
        ],
        "topology": [[line["epoch"], line["total"]["flip_rate"], line["total"]["sad"]] for line in moved],
        "seconds": round(seconds, 1),
        "commands": trial.commands(out),
        "processor": processor(), "torch": torch.__version__, "threads": 1, "commit": commit(),
    }  # fmt: skip


def tested(row: dict[str, Any], trial: Trial, out: Path, root: Path) -> dict[str, Any]:
    """The same with the figure on the test images, which nothing is chosen by."""
    classes = str(root / CLASSES) if trial.finetuning.job == "segment" else None
    source = SourceConfig(source="folder", root=str(root), classes=classes, workers=0)
    with (
        Path(os.devnull).open("w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        metrics = evaluate(EvaluateConfig(str(out / trial.finetuning.name), source, split="test", accelerator="cpu"))
    figure = str(task_class(JOBS[trial.finetuning.job].options.task).best_by)
    return {**row, "test": metrics[figure], "test_error": metrics.get("standard_error")}


def commit() -> str:
    """Of the checkout that this package lies in; of an installed package its version."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or sparsemae.__version__


def _key(row: dict[str, Any]) -> list[Any]:
    return [row["setting"], row["arm"], row["seed"], row["lr"]]


def _lines(file: Path) -> list[dict[str, Any]]:
    lines = file.read_text().splitlines() if file.is_file() else []
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise ValueError(f"{file}: wanted a line of JSON for each result, got another: {error}; delete it") from error


def _options(commands: list[list[str]]) -> set[str]:
    """What trainings were given, wherever the study's folder lies."""
    out = f"{Path(commands[-1][commands[-1].index('--out') + 1]).parent}/"
    return {
        f"{job} {name} {value.removeprefix(out) if name in ('--out', '--init', '--data.root') else value}"
        for _, job, *words in commands
        for name, value in zip(words[::2], words[1::2], strict=True)
    }
