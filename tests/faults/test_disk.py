"""A full disk stops the write, not the run; if it stays full, the run stops and says what is safe."""

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import metrics, tiny
from harness import fill, small_disk
from torch.optim.optimizer import register_optimizer_step_post_hook

from sparsemae.cli import main
from sparsemae.models.weights import read_weights, save_tensors
from sparsemae.training import saver
from sparsemae.training.checkpoint import list_checkpoints, load_checkpoint, step_of
from sparsemae.training.logs import RunLog
from sparsemae.training.saver import Saver
from sparsemae.training.state import TrainingState

FILES = {"model": {"weight": torch.ones(4)}, "training": {"optimizer/0/exp_avg": torch.ones(4)}}
METADATA: dict[str, dict[str, Any]] = {"model": {}, "training": {}}


def full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.slow
@pytest.mark.holds("survive.4")
def test_a_disk_that_is_full_for_a_while(tmp_path: Path, capfd: pytest.CaptureFixture[str], came_out: Any) -> None:
    """The disk is full from step 2 to step 4 of 6: warned, tried again; the run's end is that of an undisturbed one."""
    main(tiny("pretrain", tmp_path / "whole"))
    with small_disk(tmp_path / "disk", 4) as disk:
        out, ballast = disk / "run", disk / "ballast"
        lines = watch_steps({2: lambda: fill(ballast), 4: ballast.unlink})
        main(tiny("pretrain", out, "--trainer.save_every_steps", "1"))
        lines.remove()
        errors = capfd.readouterr().err
        assert "warning: the checkpoint of step 3 could not be written" in errors
        assert "No space left on device" in errors
        assert f"the last good one is {out / 'checkpoints' / 'step-00000001'}" in errors.replace("00002", "00001")
        assert [step_of(path) for path in list_checkpoints(out / "checkpoints")] == [5, 6]
        assert not list(out.glob("checkpoints/.*"))
        assert [row["step"] for row in metrics(out)] == [1, 2, 3, 4, 5, 6]
        whole, other = read_weights(tmp_path / "whole")[0], read_weights(out)[0]
    assert all(torch.equal(whole[key], other[key]) for key in whole)
    warnings = [line for line in errors.splitlines() if "warning: the checkpoint of" in line]
    made = "a tmpfs of 4 MB that another file fills from step 2 to step 4 of 6, a checkpoint each step"
    came_out("full disk, for a while", made, 0, warnings[0], equal=True, times=len(warnings))


@pytest.mark.slow
def test_a_disk_that_stays_full(tmp_path: Path, capfd: pytest.CaptureFixture[str], came_out: Any) -> None:
    """The disk is full from step 2 on: after 3 failed checkpoints the run ends, naming the last good one."""
    with small_disk(tmp_path / "disk", 4) as disk:
        out = disk / "run"
        hook = watch_steps({3: lambda: fill(disk / "ballast")})
        with pytest.raises(SystemExit) as exit_:
            main(tiny("pretrain", out, "--trainer.save_every_steps", "1", "--trainer.epochs", "20"))
        hook.remove()
        assert exit_.value.code == 2
        error = capfd.readouterr().err.splitlines()[-1]
        last = list_checkpoints(out / "checkpoints")[-1]
        assert "checkpoints in a row could not be written" in error
        assert f"the last checkpoint is {last}" in error
        assert load_checkpoint(last)[1]["done"] == step_of(last)
        assert not list(out.glob("checkpoints/.*"))
    came_out("full disk, for good", "the same from step 3 on", exit_.value.code, error)


def watch_steps(at: dict[int, Any]) -> Any:
    """Do something after an optimizer step."""
    steps = 0

    def after(*_: Any) -> None:
        nonlocal steps
        steps += 1
        if steps in at:
            at[steps]()

    return register_optimizer_step_post_hook(after)


def test_the_best_that_is_there_is_kept_when_a_better_one_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = Saver(tmp_path, keep=1, max_failures=9, info=lambda _: None)
    for step, best in ((1, 1), (2, 2), (3, 2), (4, 2)):
        with monkeypatch.context() as patch:
            if step == 2:
                patch.setattr(saver, "save_checkpoint", full)
            writer.save(step, FILES, METADATA, best)
            writer.wait()
    assert [step_of(path) for path in list_checkpoints(tmp_path)] == [1, 4]
    assert writer.best == Saver(tmp_path, 1, 9, print).best == 1
    writer.save(5, FILES, METADATA, 5)
    writer.wait()
    assert [step_of(path) for path in list_checkpoints(tmp_path)] == [5]


@pytest.mark.slow
def test_a_run_ends_with_the_best_that_could_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The evaluations of steps 2 and 4 of 6 are the best so far, and step 4 cannot be saved."""
    save = saver.save_checkpoint

    def is_best(state: TrainingState, value: float, _: bool) -> bool:
        if best := state.done < 6:
            state.best = {"step": state.done, "value": value}
        return best

    def full_once(path: Path, *rest: Any) -> None:
        full() if step_of(path) == 4 else save(path, *rest)

    monkeypatch.setattr(TrainingState, "is_best", is_best)
    monkeypatch.setattr(saver, "save_checkpoint", full_once)
    words = ("--trainer.keep", "best", "--trainer.keep_checkpoints", "1", "--trainer.evaluate_every_epochs", "1")
    main(tiny("finetune", tmp_path / "run", *words))
    assert "warning: the best, of step 4, could not be written: it is step 2 that is kept" in capfd.readouterr().err
    kept, written = (read_weights(path)[0] for path in (tmp_path / "run/checkpoints/step-00000002", tmp_path / "run"))
    assert torch.equal(kept["head.weight"], written["head.weight"])
    assert json.loads((tmp_path / "run/result.json").read_text())["kept"] == 1


def test_failures_are_counted_and_the_last_good_one_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    writer = Saver(tmp_path, keep=2, max_failures=2, info=said.append)
    writer.save(1, FILES, METADATA)
    writer.wait()
    save = saver.save_checkpoint
    monkeypatch.setattr(saver, "save_checkpoint", full)
    writer.save(2, FILES, METADATA)
    writer.wait()
    assert writer.failure is None
    assert "the checkpoint of step 2 could not be written: [Errno 28] No space left on device" in said[0]
    assert "step-00000001; failure 1 of 2 in a row" in said[0]
    writer.save(3, FILES, METADATA)
    writer.wait()
    assert "2 checkpoints in a row could not be written; the last good one is" in str(writer.failure)
    monkeypatch.setattr(saver, "save_checkpoint", save)
    writer.save(4, FILES, METADATA)
    writer.wait()
    assert writer.failure is None
    monkeypatch.setattr(saver, "save_checkpoint", lambda *_: 1 / 0)
    writer.save(5, FILES, METADATA)
    with pytest.raises(ZeroDivisionError):  # no fault of the disk: it comes out here
        writer.wait()


def test_what_is_saved_is_the_state_of_the_call(tmp_path: Path) -> None:
    writer = Saver(tmp_path, keep=3, max_failures=1, info=print)
    weight = torch.zeros(1_000_000)
    for step in (1, 2):
        writer.save(step, {**FILES, "model": {"weight": weight}}, METADATA, best=1)
        weight += 1
    writer.wait()
    for step, path in enumerate(list_checkpoints(tmp_path)):
        assert (load_checkpoint(path)[0]["model"]["weight"] == step).all()
    assert (tmp_path / "best").resolve() == tmp_path / "step-00000001"


def test_lines_wait_for_room(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with small_disk(tmp_path / "disk", 0.1) as disk:
        log = RunLog(disk)
        log.write("metrics.jsonl", {"step": 1})
        fill(disk / "ballast")
        for step in (2, 3):
            log.write("metrics.jsonl", {"step": step, "text": "x" * 5000})
        assert [row["step"] for row in metrics(disk)] == [1]
        assert "could not be written: No space left on device; the line is kept" in capfd.readouterr().err
        with pytest.raises(OSError, match="No space"):
            save_tensors(disk / "model.safetensors", {"weight": torch.ones(10_000)}, {})
        assert sorted(path.name for path in disk.iterdir()) == ["ballast", "metrics.jsonl"]
        (disk / "ballast").unlink()
        log.write("metrics.jsonl", {"step": 4})
        assert [row["step"] for row in metrics(disk)] == [1, 2, 3, 4]
