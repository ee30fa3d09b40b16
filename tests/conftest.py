"""`--holds WORD` runs the numbered requirements of one issue and prints item, figure, pass or fail.

A bar in time or rate is a benchmark line: its figure, its bar, and 'met' or 'MISSED'. It fails no test, since it says
as much of the machine as of the code.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sparsemae.cli import main

PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")
ROOT = Path(__file__).parent.parent
MISSED = "MISSED"
NEEDS_ROOT = "needs root: "
"""Begins the reason for which a test is skipped where it may not mount or make devices; CI as root fails at it."""
SAID = """
import contextlib, io, json, sys
from sparsemae.cli import main

def said(words):
    out, error, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            main(words)
        except SystemExit as exit_:
            status = exit_.code
    return status or 0, out.getvalue(), error.getvalue()
"""
"""Of a script for a fresh process: status, output and errors of a command line."""
RecordProperty = Callable[[str, object], None]
Figure = Callable[[str], None]
sys.path.insert(0, str(Path(__file__).parent))  # tests/reference.py


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--holds", metavar="WORD", help="run only the tests of an issue's numbered requirements")
    parser.addoption("--rows", metavar="FILE", help="write what tests say of faults and resumed runs, as JSON")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    word = config.getoption("--holds")
    if word is None:
        return
    chosen = [item for item in items if any(name.split(".")[0] == word for name in _held(item))]
    if not chosen:
        raise pytest.UsageError(f"--holds: no test is marked holds('{word}.N')")
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen


def _held(item: pytest.Item) -> list[str]:
    return [name for mark in item.iter_markers("holds") for name in mark.args]


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, None]:
    outcome = yield
    report = outcome.get_result()
    reason = report.longrepr[2].removeprefix("Skipped: ") if report.skipped and len(report.longrepr) == 3 else ""
    if reason.startswith(NEEDS_ROOT) and os.geteuid() == 0 and os.environ.get("CI"):
        report.outcome, report.longrepr = "failed", f"{item.nodeid}: skipped while CI runs as root: {reason}"
    if report.when == "call" or report.outcome != "passed":
        figures = "; ".join(str(value) for name, value in item.user_properties if name in ("figure", "benchmark"))
        report.held = [(name, report.outcome, figures, item.nodeid.split("::")[-1]) for name in _held(item)]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if config.getoption("--rows") is not None:
        passed = sorted(terminalreporter.stats.get("passed", ()), key=lambda report: report.nodeid)
        told = [(name, value) for report in passed for name, value in report.user_properties]
        kinds = {kind: [value for name, value in told if name == kind] for kind in ("fault", "resume", "soak")}
        Path(config.getoption("--rows")).write_text(json.dumps(kinds, indent=1))
    skipped = [str(report.longrepr) for report in terminalreporter.stats.get("skipped", ())]
    if count := sum(NEEDS_ROOT in reason for reason in skipped):
        terminalreporter.write_line(f"{count} skipped that need root (sudo make test)")
    if config.getoption("--holds") is None:
        return
    rows = {row for reports in terminalreporter.stats.values() for r in reports for row in getattr(r, "held", ())}
    terminalreporter.section(f"must hold: {config.getoption('--holds')}")
    for name, outcome, figures, test in sorted(rows, key=lambda row: (float(row[0].split(".")[1]), row[3])):
        verdict = {"passed": "pass", "failed": "FAIL"}.get(outcome, outcome)
        terminalreporter.write_line(f"{name:<16} {verdict:<8} {test}" + (f": {figures}" if figures else ""))
    reports = [report for reports in terminalreporter.stats.values() for report in reports if hasattr(report, "held")]
    lines = [str(value) for report in reports for name, value in report.user_properties if name == "benchmark"]
    if lines:
        missed = sum(line.endswith(MISSED) for line in lines)
        terminalreporter.write_line(f"benchmark lines: {len(lines) - missed} met, {missed} {MISSED}")


@pytest.fixture
def figure(record_property: RecordProperty) -> Figure:
    """Call with a measured figure: `make holds` prints it."""
    return lambda text: record_property("figure", text)


@pytest.fixture
def benchmark_line(record_property: RecordProperty) -> Callable[..., None]:
    """Call with a name, a measured time or rate and its bar: `make holds` prints whether it was met, and counts it."""

    def note(name: str, figure: float, bar: float, higher_is_better: bool = False) -> None:
        met = figure >= bar if higher_is_better else figure <= bar
        bound = "at least" if higher_is_better else "at most"
        record_property("benchmark", f"{name}: {figure:.3g}, wanted {bound} {bar:g}: {'met' if met else MISSED}")

    return note


@pytest.fixture
def came_out(record_property: RecordProperty, figure: Figure, tmp_path: Path) -> Callable[..., None]:
    """Call with a fault and what came of it: a row of docs/reliability.md, and a figure.

    ``status`` is that of the run that met the fault; ``said`` what it said, in which our own folder is left out;
    ``equal`` whether the weights in the end are those of a run without it; ``times`` how often it was made.
    """

    def note(fault: str, made: str, status: Any, said: str = "", equal: bool | None = None, times: int = 1) -> None:
        said = re.sub(r"\bpid \d+", "pid N", " ".join(said.replace(f"{tmp_path}/", "").split()))
        row = {"fault": fault, "made": made, "status": status, "said": said, "equal": equal, "times": times}
        record_property("fault", row)
        same = "" if equal is None else f", weights {'equal' if equal else 'differ'}"
        figure(f"{fault}, {times} times: status {status}{same}" + (f", {said!r}" if said else ""))

    return note


@pytest.fixture
def resumed(record_property: RecordProperty) -> Callable[..., None]:
    """Call with a run that was continued and proved equal: another row of docs/reliability.md."""

    def note(job: str, source: str, stops: Any, steps: int, workers: Any, processes: Any) -> None:
        row = {"job": job, "source": source, "stops": stops, "steps": steps, "workers": workers, "processes": processes}
        record_property("resume", row)

    return note


@pytest.fixture
def soaked(record_property: RecordProperty, figure: Figure) -> Callable[..., None]:
    """Call with what ran for long, and what it held: a row of docs/reliability.md, and a figure.

    ``resident``, ``rise`` and ``bound`` in MB, ``slope`` in MB per second or step; descriptors and threads at the end.
    """

    def note(
        what: str, amount: str, samples: int, resident: float, slope: float, rise: float, bound: float,
        descriptors: float, threads: float,
    ) -> None:  # fmt: skip
        row = {
            "what": what, "amount": amount, "samples": samples, "resident": resident, "slope": slope, "rise": rise,
            "bound": bound, "descriptors": descriptors, "threads": threads,
        }  # fmt: skip
        record_property("soak", row)
        figure(
            f"{what}, {amount}: {resident:.1f} MB, {rise:+.2f} MB, {descriptors:.0f} descriptors, {threads:.0f} threads"
        )

    return note


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """ROOT/{train,val}/{cat,dog}/N.png, 40 px, deterministic noise."""
    root, generator = tmp_path / "images", np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 3)):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 256, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


def scene_folder(root: Path, train: int, val: int, longest: int | None = None) -> Path:
    """ROOT laid out as SceneParse150: scikit-image's photographs, and masks computed from their brightness.

    Args:
        longest: longer side, px; None: full size.
    """
    skimage = pytest.importorskip("skimage")
    generator, folder = np.random.default_rng(0), Path(skimage.__file__).parent / "data"
    for split, count in (("training", train), ("validation", val)):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for i in range(count):
            with Image.open(folder / PHOTOGRAPHS[(i + (split == "validation")) % len(PHOTOGRAPHS)]) as opened:
                image = opened.convert("RGB")
            if longest is not None:
                image.thumbnail((longest, longest))
            bright = np.asarray(image.convert("L"))
            mask = bright // 32 * 18 + generator.integers(0, 18, bright.shape)  # 0 to 143
            image.save(root / "images" / split / f"ADE_{split}_{i:08d}.jpg")
            Image.fromarray(mask.astype(np.uint8)).save(root / "annotations" / split / f"ADE_{split}_{i:08d}.png")
    return root


def tiny(job: str, out: Path, *options: str) -> list[str]:
    """Words of a job on a few embedded images with the demo's recipe made tiny: 2 steps an epoch."""
    words = [
        job, "--config", f"demo_{job}", "--out", str(out), "--data.train_images", "32", "--trainer.global_batch", "16",
        "--trainer.epochs", "3", "--optim.warmup_epochs", "1", "--trainer.log_every_steps", "1",
        "--model.args", "{patch_size: 7, embed_dim: 32, depth: 2, num_heads: 2}", "--trainer.precision", "fp32",
    ]  # fmt: skip
    if job == "pretrain":
        words += ["--decoder", "{embed_dim: 16, depth: 1, num_heads: 2}"]
    elif job == "segment":
        words += ["--trainer.evaluate_every_epochs", "100"]
    else:
        words += ["--init", "null", "--trainer.evaluate_every_epochs", "100"]
    return words + list(options)


def tiny_segment(out: Path, *options: str) -> list[str]:
    """Words of a segmentation of a few embedded images: 2 epochs of 2 steps, of a ViT of four blocks."""
    args = "{patch_size: 7, embed_dim: 32, depth: 4, num_heads: 2}"
    return tiny("segment", out, "--trainer.epochs", "2", "--model.args", args, *options)


def on_scene(out: Path, root: Path, *options: str) -> list[str]:
    """Words of a segmentation of photographs in a `scene_folder`, by windows."""
    return tiny_segment(
        out, "--data.source", "sceneparse", "--data.root", str(root), "--data.img_size", "64", "--data.short_side",
        "64", "--data.long_side", "256", "--data.train_images", "null", "--data.workers", "1", "--data.photometric",
        "true", "--data.scale", "[0.5, 2.0]", "--data.cat_max_ratio", "0.75", "--trainer.global_batch", "4",
        "--model.args", "{patch_size: 16, embed_dim: 32, depth: 4, num_heads: 2}", "--inference",
        "{mode: slide, stride: 43}", *options,
    )  # fmt: skip


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a pretraining and the finetuning that starts from it, six steps each: to be read only."""
    folder = tmp_path_factory.mktemp("runs")
    main(tiny("pretrain", folder / "pretrain"))
    main(tiny("finetune", folder / "finetune", "--init", str(folder / "pretrain")))
    return folder


@dataclass(frozen=True)
class SceneRun:
    """A tiny segmentation of photographs, and its data: to be read only."""

    folder: Path
    root: Path

    @property
    def where(self) -> list[str]:
        """Options that name the data."""
        return ["--data.source", "sceneparse", "--data.root", str(self.root), "--data.workers", "0"]


@pytest.fixture(scope="session")
def scene_run(tmp_path_factory: pytest.TempPathFactory) -> SceneRun:
    """`SceneRun`, of 8 photographs for training and 3 for validation."""
    folder = tmp_path_factory.mktemp("segment")
    root = scene_folder(folder / "ade", train=8, val=3, longest=160)
    main(on_scene(folder / "run", root))
    return SceneRun(folder / "run", root)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run the command line, which is to refuse: exit status 2 and one line of error, which is returned."""

    def run(*words: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main(list(words))
        errors = [line for line in capsys.readouterr().err.splitlines() if "using the recipe" not in line]
        assert exit_.value.code == 2
        shown = [line for line in errors if "error:" in line]
        assert len(shown) == 1, errors
        assert errors[-1] == shown[0]
        assert "Traceback" not in "".join(errors)
        return shown[0]

    return run


def metrics(out: Path) -> list[dict[str, Any]]:
    """Lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
