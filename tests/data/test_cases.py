"""Every input of `cases.CASES` comes to the right figure, or is refused by one line; `check` says the same of it."""

import re
from pathlib import Path

import pytest
from cases import CASES, Case

from sparsemae.cli import main

RUN = [
    "--data.train_images", "null", "--trainer.epochs", "8", "--trainer.global_batch", "16", "--optim.lr", "2e-3",
    "--trainer.accelerator", "cpu",
]  # fmt: skip


def where(case: Case, root: Path) -> list[str]:
    source = "folder" if case.source == "masks" else case.source
    classes = ["--data.classes", str(root / "classes.txt")] if case.source == "masks" else []
    return ["--data.source", source, "--data.root", str(root), *classes, *case.words]


def run(words: list[str], capfd: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit status, and all that was said."""
    capfd.readouterr()
    status = 0
    try:
        main(words)
    except SystemExit as error:
        status = int(error.code or 0)
    printed = capfd.readouterr()
    if status:
        lines = [line for line in printed.err.splitlines() if line.startswith("sparsemae ")]
        assert len(lines) == 1, printed.err
    return status, printed.out + printed.err


@pytest.mark.slow
@pytest.mark.holds("right.1")
@pytest.mark.parametrize("name", CASES)
def test_a_case_comes_to_the_right_figure_or_is_refused(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], figure: object
) -> None:
    case, root = CASES[name], tmp_path / name
    case.make(root)
    task = "segment" if case.source == "masks" else "finetune"
    batch = ["--trainer.global_batch", "6", "--optim.lr", "4e-3"] if case.source == "masks" else []
    words = [task, "--config", f"demo_{task}", *RUN, *batch, *where(case, root), "--out", str(tmp_path / "run")]
    status, said = run(words, capfd)
    assert status == (2 if case.figure is None else 0), said
    assert re.search(case.says, said), said
    if case.figure is not None:
        got = re.search(r"(?:top-1|mIoU) ([\d.]+)%", said)
        assert got is not None
        assert float(got[1]) / 100 >= case.figure, said
        figure(f"{name}: {got[0]}")  # type: ignore[operator]


# A look at every image finds what a run of few steps would not meet.
CHECKED_AS = {"seg_val_void": 0}


@pytest.mark.holds("right.3")
@pytest.mark.parametrize("name", CASES)
def test_check_says_what_training_would_do(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    case, root = CASES[name], tmp_path / name
    case.make(root)
    status, said = run(["check", *where(case, root), "--data.workers", "0", "--smallest", "7"], capfd)
    assert status == (2 if case.figure is None else 0), said
    if case.figure is None and name not in ("broken", "seg_255"):
        assert re.search(case.says, said), said
