"""A loader whose worker dies or hangs, and a source that goes away: started again, or a clear end with a checkpoint."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny
from torch.optim.optimizer import register_optimizer_step_post_hook

from sparsemae.cli import main
from sparsemae.data.folders import FolderReader
from sparsemae.models.weights import read_weights
from sparsemae.training import feed
from sparsemae.training.checkpoint import list_checkpoints, load_checkpoint
from sparsemae.training.feed import Feed


def equal(one: Path, other: Path) -> bool:
    a, b = read_weights(one)[0], read_weights(other)[0]
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def children() -> list[int]:
    """Loader processes of this one."""
    return [process.pid for process in multiprocessing.active_children() if process.pid is not None]


def after_step(wanted: int, do: Callable[[], None]) -> Any:
    """Do something once, in the middle of an optimizer step's update."""
    steps = 0

    def count(*_: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == wanted:
            do()

    return register_optimizer_step_post_hook(count)


@pytest.mark.slow
@pytest.mark.holds("survive.4")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_that_dies_or_stops(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], number: signal.Signals, came_out: Any
) -> None:
    """A loader worker is killed, or stopped with a batch half handed over: started again, the same weights."""
    options = ["--data.workers", "1", "--trainer.epochs", "6"]
    main(tiny("pretrain", tmp_path / "whole", *options))
    before = children()

    def strike() -> None:
        for child in set(children()) - set(before):
            os.kill(child, number)
        time.sleep(0.1)  # the death is told here, in the middle of an update

    hook = after_step(5, strike)
    main(tiny("pretrain", tmp_path / "run", *options, "--trainer.loader_timeout_seconds", "2"))
    hook.remove()
    errors = capfd.readouterr().err
    assert "DataLoader" in errors
    assert "trying again in 1 s (1 of 6)" in errors
    assert equal(tmp_path / "whole", tmp_path / "run")
    said = next(line for line in errors.splitlines() if "trying again" in line)
    kind = {"SIGKILL": "dies", "SIGSTOP": "stops half-way"}[number.name]
    came_out(f"loader process that {kind}", f"{number.name} in the middle of an update", 0, said, equal=True)


@pytest.mark.slow
@pytest.mark.holds("survive.4")
def test_a_worker_that_hangs(
    tmp_path: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
    came_out: Any,
) -> None:  # fmt: skip
    """A loader worker hangs in opening a file, as on a file system that does not answer: started again."""
    words, hanging, read = on(image_folder, "1"), tmp_path / "hanging", FolderReader.__getitem__
    main(words(tmp_path / "whole"))

    def open_(reader: FolderReader, index: int) -> Any:
        while hanging.exists():
            time.sleep(0.1)
        return read(reader, index)

    def strike() -> None:
        hanging.touch()
        threading.Timer(3.0, hanging.unlink).start()

    monkeypatch.setattr(FolderReader, "__getitem__", open_)
    hook = after_step(4, strike)
    main([*words(tmp_path / "run"), "--trainer.loader_timeout_seconds", "2"])
    hook.remove()
    errors = capfd.readouterr().err
    assert "DataLoader timed out after 2.0 seconds; trying again in 1 s (1 of 6)" in errors
    assert equal(tmp_path / "whole", tmp_path / "run")
    said = next(line for line in errors.splitlines() if "trying again" in line)
    came_out("loader process that hangs", "opening an image does not return for 3 s", 0, said, equal=True)


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_source_that_comes_back(
    tmp_path: Path, image_folder: Path, capfd: pytest.CaptureFixture[str], workers: str, came_out: Any
) -> None:
    """The folder of the images is away for a second: waited for, the same weights."""
    words = on(image_folder, workers)
    main(words(tmp_path / "whole"))
    away = image_folder.with_name("away")

    def hide() -> None:
        image_folder.rename(away)
        threading.Timer(1.5, lambda: away.rename(image_folder)).start()

    hook = after_step(4, hide)
    main(words(tmp_path / "run"))
    hook.remove()
    errors = capfd.readouterr().err
    assert "No such file or directory; trying again in 1 s (1 of 6)" in errors
    assert equal(tmp_path / "whole", tmp_path / "run")
    said = next(line for line in errors.splitlines() if "trying again" in line)
    made = f"the images' folder renamed for 1.5 s, {workers} loader processes"
    came_out("source that goes away for a while", made, 0, said, equal=True)


@pytest.mark.slow
def test_a_source_that_stays_away(
    tmp_path: Path, image_folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    came_out: Any,
) -> None:  # fmt: skip
    """The folder of the images goes for good: one line, and a checkpoint of the last step, from which it goes on."""
    words = on(image_folder, "0")
    main(words(tmp_path / "whole"))
    pauses: list[float] = []
    monkeypatch.setattr(feed.time, "sleep", pauses.append)
    away = image_folder.with_name("away")
    hook = after_step(4, lambda: os.rename(image_folder, away))
    with pytest.raises(SystemExit) as exit_:
        main(words(tmp_path / "run"))
    hook.remove()
    assert exit_.value.code == 2
    assert pauses == [1, 2, 4, 8, 16, 32]
    (last,) = list_checkpoints(tmp_path / "run" / "checkpoints")
    error = capfd.readouterr().err.splitlines()[-1]
    assert "error: no data at step 4: " in error
    assert f"No such file or directory (tried 7 times); the last checkpoint is {last}" in error
    assert load_checkpoint(last)[1]["done"] == 4
    away.rename(image_folder)
    main(words(tmp_path / "run"))
    assert equal(tmp_path / "whole", tmp_path / "run")
    made = "the folder renamed for good; then back, and the run continued"
    came_out("source that goes away for good", made, "2, then 0", error, equal=True)


def on(folder: Path, workers: str) -> Callable[[Path], list[str]]:
    """Words of a pretraining run on a folder of images."""

    def words(out: Path) -> list[str]:
        options = ["--data.source", "folder", "--data.root", str(folder), "--data.workers", workers]
        return tiny("pretrain", out, *options, "--trainer.global_batch", "8", "--trainer.epochs", "6")

    return words


def test_a_mistake_is_not_tried_again() -> None:
    def broken(step: int) -> Any:
        raise RuntimeError("Caught RuntimeError in DataLoader worker process 0")
        yield

    with Feed(broken, retries=3, info=print) as micro_batches, pytest.raises(RuntimeError, match="Caught"):
        micro_batches.micro_batch(0, 0)


def test_a_loader_begins_again_at_the_same_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed.time, "sleep", lambda _: None)
    failures = [(1, 2), (1, 2), (2, 0)]
    endings = [ConnectionResetError, EOFError, FileNotFoundError]

    def loader(step: int) -> Any:
        for now in range(step, 3):
            for number in range(3):
                if failures and failures[0] == (now, number):
                    raise endings[len(failures) - 1](f"gone at {failures.pop(0)}")
                yield now, number

    said: list[str] = []
    with Feed(loader, retries=2, info=said.append) as micro_batches:
        given = [micro_batches.micro_batch(step, number) for step in range(3) for number in range(3)]
    assert given == [(step, number) for step in range(3) for number in range(3)]
    assert said == [
        "gone at (1, 2); trying again in 1 s (1 of 2)",
        "DataLoader worker ended half-way (gone at (1, 2)); trying again in 2 s (2 of 2)",
        "DataLoader worker ended half-way (gone at (2, 0)); trying again in 1 s (1 of 2)",
    ]
    failures[:] = [(0, 0)] * 3
    hurried = Feed(loader, retries=2, info=said.append, in_a_hurry=lambda: True)
    with hurried, pytest.raises(ValueError, match=r"no data at step 0: gone at \(0, 0\) \(tried 1 times\)"):
        hurried.micro_batch(0, 0)
