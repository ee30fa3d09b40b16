"""What a command says before it starts: without torch, at once, in one line."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import ROOT, SAID, Figure

from sparsemae.jobs import JOBS

TRAINING = ("pretrain", "finetune", "segment")
NOWHERE = "nowhere: no such file or folder"
PATHS = {
    **{job: ["--data.source=folder", "--data.root=nowhere"] for job in TRAINING},
    "evaluate": ["nowhere"],
    "pack": ["nowhere", "packed.safetensors"],
    "export": ["nowhere", "folder"],
    "check": ["--data.root=nowhere"],
    "predict": [str(ROOT / "README.md"), "nowhere"],
    "web": ["nowhere", "site"],
    "report": ["nowhere"],
    "benchmark": ["nowhere"],
}
"""Words with a file or folder that is not there, for the commands that read any but a recipe."""
RECIPES = {**{job: ["--config", "nowhere"] for job in JOBS}, "plan": ["nowhere"]}

# Runs the command lines of its arguments, one after the other; after each it prints what came of it.
DRIVER = (
    SAID
    + """
for words in json.loads(sys.argv[1]):
    answer = said(words)
    heavy = [name for name in ("torch", "timm", "numpy") if name in sys.modules]
    print(json.dumps([*answer, heavy]))
"""
)


class Answer(NamedTuple):
    """What a command line ended with."""

    status: int
    out: str
    error: str
    heavy: list[str]
    """Of torch, timm and numpy what was loaded until then."""


def answers(lines: list[list[str]], folder: Path) -> list[Answer]:
    """Of command lines in one new process, which begins without any of the heavy packages."""
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(lines)],
        capture_output=True, text=True, check=True, cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    return [Answer(*json.loads(line)) for line in done.stdout.splitlines()]


@pytest.mark.holds("house.5")
def test_help_needs_no_torch(tmp_path: Path, figure: Figure) -> None:
    found = answers([[], ["--help"], ["--version"], *([job, "--help"] for job in JOBS)], tmp_path)
    assert len(found) == 3 + len(JOBS)
    for job, answer in zip(("", "", "", *JOBS), found, strict=True):
        assert (answer.status, answer.error, answer.heavy) == (0, "", []), job
    for job, answer in zip(JOBS, found[3:], strict=True):
        assert f"sparsemae {job}" in answer.out
    figure(f"{len(found)} pages without torch, timm and numpy")


@pytest.mark.holds("house.5")
@pytest.mark.parametrize(
    ("mistake", "cases", "wanted"),
    [
        ("a misspelled command", [["pretrian"]], "wanted a command (demo, "),
        ("a misspelled option", [[job, *PATHS.get(job, ()), "--sead=1"] for job in JOBS], "--sead"),
        (
            "a value of the wrong type", [[job, "--trainer.epochs=many"] for job in TRAINING],
            "trainer.epochs: wanted a number, got many",
        ),
        ("a value beyond its limits", [[job, "--optim.lr=-1"] for job in TRAINING], "lr: wanted at least 0, got -1"),
        ("an option of an earlier version", [["segment", "--taps=[1]"]], "--taps: wanted --out_indices"),
        ("a missing file or folder", [[job, *words] for job, words in PATHS.items()], NOWHERE),
        ("a missing start", [[job, "--init=nowhere"] for job in TRAINING], f"init: {NOWHERE}"),
        (
            "a missing recipe", [[job, *words] for job, words in RECIPES.items()],
            "wanted a YAML file or a recipe (demo_finetune, ",
        ),
    ],
    ids=lambda value: value.replace(" ", "_") if isinstance(value, str) and value.startswith("a") else "",
)  # fmt: skip
@pytest.mark.slow
def test_mistakes_need_no_torch(
    mistake: str, cases: list[list[str]], wanted: str, tmp_path: Path, figure: Figure
) -> None:
    """Each is answered by exit status 2 and one line that names the mistake, and nothing is left behind."""
    for words, answer in zip(cases, answers(cases, tmp_path), strict=True):
        lines = [line for line in answer.error.splitlines() if "using the recipe" not in line]
        assert len(lines) == 1, (words, answer)
        assert lines[0].startswith(f"sparsemae {words[0]}: error: ") or mistake == "a misspelled command", answer
        assert wanted in lines[0], (words, answer)
        assert (answer.status, answer.out, answer.heavy) == (2, "", []), (words, answer)
    assert not list(tmp_path.iterdir())
    figure(f"{mistake}: {len(cases)} command lines, one line each, without torch")


@pytest.mark.holds("house.5")
@pytest.mark.holds_only
def test_help_is_there_at_once(benchmark_line: Callable[..., None]) -> None:
    """Medians of seven, interleaved: every command's help against an import of numpy."""
    commands = {job: ["-m", "sparsemae", job, "--help"] for job in JOBS} | {"numpy": ["-c", "import numpy"]}
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(7):
        for name, words in commands.items():
            begin = time.perf_counter()
            subprocess.run([sys.executable, *words], capture_output=True, check=True, cwd=ROOT)
            seconds[name].append(time.perf_counter() - begin)
    median = {name: statistics.median(taken) for name, taken in seconds.items()}
    for job in JOBS:
        benchmark_line(f"{job} --help over import numpy, {median['numpy']:.3f} s", median[job] / median["numpy"], 5.0)
