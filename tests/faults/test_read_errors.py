"""A checkpoint that cannot be read for a while: waited for, never taken for damage, and never lost."""

import errno
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import tiny

from sparsemae import files
from sparsemae.cli import main
from sparsemae.models import weights
from sparsemae.models.weights import read_weights
from sparsemae.training import checkpoint, state

ERRORS = [OSError(number, os.strerror(number)) for number in (
    errno.EIO, errno.ESTALE, errno.EACCES, errno.EMFILE, errno.ETIMEDOUT, errno.ENOMEM,
)] + [MemoryError()]  # fmt: skip
PLACES = [(checkpoint, "_sha256"), (weights, "safe_open"), (state, "load_weights")]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run stopped at step 4 of 6, with the checkpoints of steps 3 and 4, and ``whole`` beside it."""
    folder = tmp_path_factory.mktemp("read_errors")
    main(tiny("pretrain", folder / "whole"))
    main(words(folder, "--trainer.max_steps", "4"))
    return folder


@pytest.fixture
def stopped(original: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    shutil.copytree(original / "run", tmp_path / "run")
    return tmp_path


def words(folder: Path, *options: str) -> list[str]:
    return tiny("pretrain", folder / "run", "--trainer.save_every_steps", "1", *options)


def tree(folder: Path) -> dict[str, str]:
    """Checksums of all files of a run, but for what a start says of itself."""
    own = (".lock", "config.yaml", "environment.json")
    found = (path for path in (folder / "run").rglob("*") if path.is_file() and path.name not in own)
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def fail(function: Callable[..., Any], error: BaseException, times: float) -> tuple[Callable[..., Any], list[int]]:
    """The function, which fails so often first; and its calls."""
    calls: list[int] = []

    def failing(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) <= times:
            raise error
        return function(*args, **options)

    return failing, calls


@pytest.mark.holds("held.1")
@pytest.mark.parametrize("error", ERRORS, ids=repr)
@pytest.mark.slow
def test_12_an_error_that_passes_is_waited_for(
    original: Path, stopped: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], came_out: Any,
    error: BaseException,
) -> None:  # fmt: skip
    """The second of the newest checkpoint's files cannot be read twice; then it can."""
    pauses: list[float] = []
    monkeypatch.setattr(files.time, "sleep", pauses.append)
    failing, _ = fail(checkpoint._sha256, error, 2)
    monkeypatch.setattr(checkpoint, "_sha256", failing)
    main(words(stopped))
    said = capfd.readouterr().err.splitlines()
    assert pauses == [1, 2]
    assert any(line.endswith("at step 4") and "continuing" in line for line in said)
    assert not list((stopped / "run" / "checkpoints").glob("damaged*"))
    one, other = (read_weights(folder)[0] for folder in (original / "whole", stopped / "run"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    line = next(line for line in said if "trying again" in line)
    assert "step-00000004" in line
    assert (str(error) or "out of memory") in line
    came_out("checkpoint that cannot be read for a while", f"{error!r} twice while it is read", 0, line, equal=True)


@pytest.mark.holds("held.1")
@pytest.mark.parametrize(("module", "name"), PLACES, ids=[name for _, name in PLACES])
def test_12_an_error_that_stays_ends_the_resume_and_nothing_is_lost(
    stopped: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], came_out: Any, module: Any,
    name: str,
) -> None:  # fmt: skip
    before = tree(stopped)
    monkeypatch.setattr(files, "RETRY_PAUSES_SECONDS", (0.0, 0.0))
    error = OSError(errno.EIO, os.strerror(errno.EIO))
    failing, calls = fail(getattr(module, name), error, float("inf"))
    monkeypatch.setattr(module, name, failing)
    with pytest.raises(SystemExit) as exit_:
        main(words(stopped))
    assert exit_.value.code == 2
    assert len(calls) == 3
    said = capfd.readouterr().err.splitlines()[-1]
    assert "error:" in said
    assert "step-00000004" in said
    assert "Input/output error" in said
    assert tree(stopped) == before
    came_out("checkpoint that cannot be read", "EIO each time", 2, said)


@pytest.mark.holds("held.1")
@pytest.mark.parametrize("how", ["a bit flipped", "a file missing"])
def test_12_damage_is_set_aside_and_never_touched_again(
    original: Path, stopped: Path, capfd: pytest.CaptureFixture[str], how: str
) -> None:
    """Twice the same step: each keeps a name of its own, whatever is saved and pruned afterwards."""
    folder, kept = stopped / "run" / "checkpoints", []
    for stop in ("4", "6"):
        file = folder / "step-00000004" / "training.safetensors"
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content) if how == "a bit flipped" else file.unlink()
        kept.append({path.name: path.read_bytes() for path in (folder / "step-00000004").iterdir()})
        main(words(stopped, "--trainer.max_steps", stop))
    for name, files_ in zip(("damaged-step-00000004", "damaged-step-00000004-2"), kept, strict=True):
        assert {path.name: path.read_bytes() for path in (folder / name).iterdir()} == files_
    assert sorted(path.name for path in folder.iterdir()) == [
        "damaged-step-00000004", "damaged-step-00000004-2", "step-00000005", "step-00000006",
    ]  # fmt: skip
    one, other = (read_weights(path)[0] for path in (original / "whole", stopped / "run"))
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.holds("held.1")
def test_12_a_folder_that_cannot_be_listed_is_not_an_empty_one(
    stopped: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    before = tree(stopped)
    failing, _ = fail(os.listdir, PermissionError(errno.EACCES, "Permission denied", "checkpoints"), float("inf"))
    monkeypatch.setattr(checkpoint, "os", SimpleNamespace(listdir=failing))
    with pytest.raises(SystemExit):
        main(words(stopped))
    assert "Permission denied" in capfd.readouterr().err.splitlines()[-1]
    assert tree(stopped) == before
