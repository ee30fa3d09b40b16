"""One run in a folder at a time, a lock that does not outlive its run, and one number of processes after another."""

import os
import shutil
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import metrics, tiny
from harness import Job, run, wait_for
from torch.optim.optimizer import register_optimizer_step_post_hook

from sparsemae.cli import main
from sparsemae.models.weights import read_weights


@pytest.mark.slow
@pytest.mark.holds("survive.4")
def test_a_second_run_in_the_same_folder(tmp_path: Path, capfd: pytest.CaptureFixture[str], came_out: Any) -> None:
    """A second run in a folder in use is refused, naming the process; after a kill -9 the lock counts as stale."""
    words = tiny("pretrain", tmp_path / "run", "--trainer.epochs", "2000")
    job = Job([*words, "--data.workers", "2"])
    wait_for((tmp_path / "run" / "metrics.jsonl").is_file)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").glob("*.yaml")}
    with pytest.raises(SystemExit) as exit_:
        main(words)
    assert exit_.value.code == 2
    pid, host = job.processes[0].pid, os.uname().nodename
    refusal = capfd.readouterr().err.splitlines()[-1]
    assert f"in use by process {pid} on {host}" in refusal
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").glob("*.yaml")}
    job.kill(signal.SIGKILL)
    job.wait()
    main([*words, "--trainer.max_steps", "2"])  # at once: the loader's processes still live
    stale = next(line for line in capfd.readouterr().err.splitlines() if "stale" in line)
    assert f"the lock is stale: process {pid} on {host} ended without" in stale
    main([*words, "--trainer.max_steps", "2"])
    assert "stale" not in capfd.readouterr().err
    refusal, stale = (
        line.replace(f"process {pid}", "process PID").replace(f"on {host}", "on HOST") for line in (refusal, stale)
    )
    came_out("second run in the same folder", "started while the first one trains", exit_.value.code, refusal)
    came_out("stale lock", "the first one killed with -9, the second started at once", 0, stale)


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)])
def test_another_number_of_processes(tmp_path: Path, image_folder: Path, first: int, then: int, resumed: Any) -> None:
    """Continued on 1 process instead of 2, and on 2 instead of 1: the same weights."""
    options = ["--mixup", "0.8", "--model.drop_path", "0.3", "--erasing", "0.5", "--trainer.ema_decay", "0.9"]
    options += ["--data.source", "folder", "--data.root", str(image_folder), "--trainer.epochs", "6"]
    options += ["--trainer.device_batch", "8"] if first == 1 else []
    words = [tiny("finetune", tmp_path / name, *options) for name in ("whole", "parts")]
    assert run(words[0], first)[0] == [0] * first
    assert run([*words[1], "--trainer.max_steps", "3"], first)[0] == [0] * first
    assert yaml.safe_load((tmp_path / "parts" / "config.yaml").read_text())["trainer"]["device_batch"] == 8
    statuses, output = run(words[1], then)
    assert statuses == [0] * then, output
    one, other = read_weights(tmp_path / "whole")[0], read_weights(tmp_path / "parts")[0]
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert [row.get("loss") for row in metrics(tmp_path / "whole")] == [
        row.get("loss") for row in metrics(tmp_path / "parts") if row["step"] != 3 or "loss" in row
    ]
    steps = metrics(tmp_path / "whole")[-1]["step"]
    workers = yaml.safe_load((tmp_path / "parts" / "config.yaml").read_text())["data"]["workers"]
    resumed("finetune", "folder", [3], steps, workers=[workers] * 2, processes=[first, then])


@pytest.mark.slow
def test_processes_that_cannot_keep_the_micro_batch_are_refused(tmp_path: Path) -> None:
    words = tiny("pretrain", tmp_path / "run")
    main([*words, "--trainer.max_steps", "1"])
    statuses, output = run(words, 2)
    assert statuses == [2, 2]
    assert "was begun with 16 images per device and forward, which 2 processes cannot keep at a global batch" in output
    given_up = [*words, "--trainer.device_batch", "8"]
    assert "trainer.device_batch was 16, is 8" in run(given_up, 2)[1]
    assert run([*given_up, "--trainer.resume", "anyway"], 2)[0] == [0, 0]


@pytest.mark.holds("held.1")
@pytest.mark.parametrize("at", [3, 6])
@pytest.mark.parametrize("fate", ["deleted", "renamed", "renamed, and a new one in its place"])
@pytest.mark.slow
def test_16_a_run_notices_that_its_folder_is_gone(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], came_out: Any, fate: str, at: int
) -> None:
    """At the next write: it says so in one line, ends, and makes no folder of that name again."""
    out, moved, steps = tmp_path / "run", tmp_path / "moved", list[int]()
    words = ["--trainer.save_every_steps", "2"]

    def strike(*_: Any) -> None:
        steps.append(1)
        if len(steps) == at:
            wait_for(lambda: not any("_write" in thread.name for thread in threading.enumerate()))
            shutil.rmtree(out) if fate == "deleted" else out.rename(moved)
            if "new one" in fate:
                (out / "checkpoints").mkdir(parents=True)

    hook = register_optimizer_step_post_hook(strike)
    with pytest.raises(SystemExit) as exit_:
        main(tiny("pretrain", out, *words))
    hook.remove()
    assert exit_.value.code == 2
    said = capfd.readouterr().err.splitlines()
    assert f"{out}: {fate.split(',', maxsplit=1)[0]} while the run was on; it ends at step {at}, unsaved" in said[-1]
    assert not [line for line in said if "warning" in line]
    assert not list(out.rglob("*.*"))
    assert out.exists() == ("new one" in fate)
    if moved.exists():
        main(tiny("pretrain", moved, *words))
        main(tiny("pretrain", tmp_path / "whole", *words))
        one, other = (read_weights(folder)[0] for folder in (tmp_path / "whole", moved))
        assert all(torch.equal(one[key], other[key]) for key in one)
    came_out(f"folder of the run {fate}", f"in step {at} of 6", 2, said[-1])


def rename_in_step_3() -> None:
    """The first process does, after its update."""
    out, steps = Path(sys.argv[sys.argv.index("--out") + 1]), list[int]()

    def strike(*_: Any) -> None:
        steps.append(1)
        if len(steps) == 3 and os.environ["RANK"] == "0":
            out.rename(out.with_name("moved"))

    register_optimizer_step_post_hook(strike)


@pytest.mark.slow
@pytest.mark.holds("held.1")
def test_16_two_processes_end_together_when_their_folder_is_gone(tmp_path: Path) -> None:
    statuses, output = run(tiny("pretrain", tmp_path / "run", "--trainer.device_batch", "8"), 2, rename_in_step_3)
    assert statuses == [2, 2]
    said = [line for line in output.splitlines() if "renamed while the run was on; it ends at step 3" in line]
    assert len(said) == 2  # one from each
    assert "Traceback" not in output
    assert not (tmp_path / "run").exists()


def test_a_run_that_is_killed_before_its_first_file_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed() -> dict[str, object]:
        raise KeyboardInterrupt

    words = tiny("pretrain", tmp_path / "run", "--trainer.max_steps", "1")
    with monkeypatch.context() as patched:
        patched.setattr("sparsemae.training.logs.environment", killed)
        with pytest.raises(SystemExit):
            main(words)
    main(words)
    assert (tmp_path / "run" / "model.safetensors").is_file()
