"""The texts that a command is given, and those in a run's folder, may be anything: none is waited for, none stops it
but in one line."""

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny

from sparsemae.cli import main

FILES = ("config.yaml", "environment.json", "metrics.jsonl", "topology.jsonl", "report.json", "result.json", ".lock")
MAKE: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "a folder": os.mkdir,
    "a link to /dev/zero": lambda path: path.symlink_to("/dev/zero"),
    "100,000 brackets": lambda path: path.write_text("[" * 100_000 + "\n"),
    "a list": lambda path: path.write_text("[1, 2]\n"),
    "settings that are none": lambda path: path.write_text("{data: 3, init: [], command: 7}\n"),
}
SECONDS = 100


class TooLongError(BaseException):
    """A command does not end by itself."""


@contextmanager
def ends_soon() -> Iterator[None]:
    """Raise in whatever waits for longer than `SECONDS`."""

    def raises(*_: Any) -> None:
        raise TooLongError

    before = signal.signal(signal.SIGALRM, raises)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def line_of(capfd: pytest.CaptureFixture[str], words: list[str]) -> str:
    """The line of error of a command that ends by itself, well or in such a line."""
    capfd.readouterr()
    with ends_soon(), suppress(SystemExit):
        main(words)
    output = capfd.readouterr().err
    lines = [line for line in output.splitlines() if "error: " in line]
    assert "Traceback" not in output, output
    assert len(lines) <= 1, output
    return next(iter(lines), "")


def altered(run: Path, folder: Path, kind: str) -> Iterator[Path]:
    """Copies of a run, each with another one of its texts replaced."""
    for name in FILES:
        shutil.copytree(run, folder / name)
        (folder / name / name).unlink(missing_ok=True)
        MAKE[kind](folder / name / name)
        yield folder / name


@pytest.mark.slow
@pytest.mark.holds("held.1")
@pytest.mark.parametrize("kind", MAKE)
def test_10_a_report_of_whatever_lies_in_a_runs_folder(
    runs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], kind: str, came_out: Any
) -> None:
    found = [line_of(capfd, ["report", str(folder)]) for folder in altered(runs / "pretrain", tmp_path, kind)]
    said = next(filter(None, found))
    assert f"sparsemae report: error: {tmp_path}" in said
    came_out("a run's folder of others", f"{kind} in place of each of its texts", "0 or 2", said, times=len(FILES))


@pytest.mark.holds_only
@pytest.mark.holds("held.1")
@pytest.mark.parametrize("kind", MAKE)
def test_10_all_commands_on_whatever_lies_in_a_runs_folder(
    runs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], kind: str
) -> None:
    for folder in altered(runs / "pretrain", tmp_path, kind):
        for words in (
            ["export", str(folder), str(folder.with_suffix(".out")), "--to", "hf"],
            ["evaluate", str(folder)],
            tiny("pretrain", folder),
        ):
            line_of(capfd, words)


@pytest.mark.holds("held.1")
@pytest.mark.parametrize("where", ["a pipe", "/dev/zero"])
def test_10_a_list_or_a_table_that_has_no_end(
    tmp_path: Path, image_folder: Path, refused: Callable[..., str], where: str
) -> None:
    path = Path("/dev/zero")
    if where == "a pipe":
        os.mkfifo(path := tmp_path / "pipe")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.csv").symlink_to(path)
    wanted = "wanted a file, got a device or pipe"
    for words in (
        ["check", str(image_folder), "--data.exclude", str(path)],
        ["segment", str(image_folder), "--data.source", "folder", "--data.classes", str(path)],
        ["check", str(tmp_path / "set"), "--data.source", "csv"],
    ):
        assert wanted in refused(*words), words


def test_7_a_table_that_is_no_table_is_named(tmp_path: Path, refused: Callable[..., str]) -> None:
    table = tmp_path / "t.csv"
    for text in (
        "image,label\n" + "x" * 200_000 + ",a\n",
        'image,label\n"not closed',
        f"image,label\n{'y' * 5000},a\n",
    ):
        table.write_text(text)
        assert "t.csv: wanted " in refused("check", str(table))


def test_10_a_recipe_with_a_wrong_value_or_name_is_named(tmp_path: Path, refused: Callable[..., str]) -> None:
    recipe = tmp_path / "x.yaml"
    for text in ("cutmix: x", "cutmix: {a: 1}", "trainer: {nothing: 1}"):
        recipe.write_text(text)
        assert f"error: --config: {recipe}: " in refused("finetune", "--config", str(recipe))
    recipe.write_text("cutmix: 0.5")
    assert "error: mixup: wanted a number, got x" in refused("finetune", "--config", str(recipe), "--mixup", "x")
