"""What came out of each trial: one JSON line, with the machine and the command that made it."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sparsemae.config import read_config, recipe_settings
from sparsemae.files import existing, write_atomic
from sparsemae.jobs import JOBS
from sparsemae.sparsity import summarize
from sparsemae.study.plan import Trial
from sparsemae.tasks import task_class
from sparsemae.tasks.loading import load_model
from sparsemae.tasks.sparse import meta_model

PATHS = ("--out", "--init", "--data.root", "--data.classes")
"""Options that name what may lie in a study's folder."""


class Results:
    """The lines of a file, one for each trial, by its key."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.rows = _lines(file)
        self.images: str | None = None
        """`digest` of the images of now; None: lines are taken whatever images they are of."""

    def get(self, trial: Trial) -> dict[str, Any] | None:
        """The line of a trial that is done. Raises ValueError if it was made with other options."""
        row = next((row for row in self.rows if _key(row) == trial.key), None)
        commands = trial.commands(self.file.parent)
        if row and (other := _options(row["commands"]) ^ _options(commands) or _changed(row, commands)):
            raise ValueError(
                f"{self.file}: {trial.finetuning.title}: made with other options ({', '.join(sorted(other)):.300}): "
                "choose another --out"
            )
        if row and None not in (told := {row.get("images"), self.images}) and len(told) > 1:
            raise ValueError(
                f"{self.file}: {trial.finetuning.title}: made with other images, which have changed since: choose "
                "another --out"
            )
        return row

    def of(self, trials: Iterable[Trial]) -> list[dict[str, Any]]:
        """The lines of those that are done."""
        return [row for trial in trials if (row := self.get(trial))]

    def put(self, row: dict[str, Any]) -> None:
        """Write a line, in the place of the same trial's."""
        row = {**row, "images": self.images} if self.images else row
        self.rows = [other for other in _lines(self.file) if _key(other) != _key(row)] + [row]
        write_atomic(self.file, "".join(json.dumps(row) + "\n" for row in self.rows))


def digest(root: Path) -> str:
    """What tells the files below a folder from others: their names, and so classes and splits, and their sizes."""
    files = sorted((str(path.relative_to(root)), path.stat().st_size) for path in root.rglob("*") if path.is_file())
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16]


def result(trial: Trial, out: Path, seconds: float) -> dict[str, Any]:
    """Of a trial whose runs are in ``out``: figures on the held-out images, sizes, curve, and where it was trained."""
    run = out / trial.finetuning.name
    model, card = load_model(run)
    config = read_config(JOBS[trial.finetuning.job].options, ["--config", str(run / "config.yaml")])
    task: Any = task_class(config.task)(config)
    task.class_names = card.class_names
    summary, forwards = summarize(model), [forward.total for forward in task.forwards(meta_model(task))]
    moved, machine = _lines(run / "topology.jsonl"), json.loads(existing(run / "environment.json").read_text())
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
        "commands": trial.commands(out), "recipes": _recipes(trial.commands(out)),
        "threads": machine["torch_threads"],
        **{key: machine.get(key, "not recorded") for key in ("processor", "torch", "commit")},
    }  # fmt: skip


def tested(row: dict[str, Any], trial: Trial, out: Path) -> dict[str, Any]:
    """The same with the figure on the test images, which the training measured at its end and nothing is chosen by.

    Raises ValueError if it could not.
    """
    told = json.loads(existing(out / trial.finetuning.name / "result.json").read_text())
    if (metrics := told["test"]) is None:
        raise ValueError(f"{trial.finetuning.title}: {'; '.join(told['notes'])}")
    figure = str(task_class(JOBS[trial.finetuning.job].options.task).best_by)
    return {**row, "test": metrics[figure], "test_error": metrics.get("standard_error")}


def _key(row: dict[str, Any]) -> list[Any]:
    return [row["setting"], row["arm"], row["seed"], row["lr"]]


def _lines(file: Path) -> list[dict[str, Any]]:
    lines = file.read_text().splitlines() if file.is_file() else []
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise ValueError(f"{file}: wanted a line of JSON for each result, got another: {error}; delete it") from error


def _recipes(commands: list[list[str]]) -> dict[str, str]:
    """What tells each recipe that is named from another of its name: a digest of its settings."""
    names = {words[words.index("--config") + 1] for words in commands}
    settings = {name: json.dumps(recipe_settings(name), sort_keys=True, default=str) for name in sorted(names)}
    return {name: hashlib.sha256(text.encode()).hexdigest()[:8] for name, text in settings.items()}


def _changed(row: dict[str, Any], commands: list[list[str]]) -> set[str]:
    """Recipes that have changed since a line was made; lines of before do not say."""
    told = row.get("recipes")
    return {f"recipe {name}" for name, _ in told.items() ^ _recipes(commands).items()} if told else set()


def _options(commands: list[list[str]]) -> set[str]:
    """What trainings were given, wherever the study's folder lies."""
    out = f"{Path(commands[-1][commands[-1].index('--out') + 1]).parent}/"
    return {
        f"{job} {name} {value.removeprefix(out) if name in PATHS else value}"
        for _, job, *words in commands
        for name, value in zip(words[::2], words[1::2], strict=True)
    }
