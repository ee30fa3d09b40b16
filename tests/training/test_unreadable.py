"""Unreadable training images in whole runs, on one process and on two."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import metrics, tiny
from PIL import Image

from sparsemae.cli import main


@pytest.fixture
def broken(image_folder: Path) -> Path:
    """16 training images, three of them cut short."""
    for name in ("cat/1", "cat/6", "dog/3"):
        file = image_folder / "train" / f"{name}.png"
        file.write_bytes(file.read_bytes()[:200])
    return image_folder


def words(job: str, folder: Path, out: Path, *options: str) -> list[str]:
    own = tiny(job, out, "--data.source", "folder", "--data.root", str(folder), "--trainer.global_batch", "8", *options)
    at = own.index("--data.train_images")
    return own[:at] + own[at + 2 :]


@pytest.mark.slow
def test_a_run_names_each_unreadable_image_once_and_goes_on(
    broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(words("pretrain", broken, tmp_path / "run", "--data.max_unreadable", "0.2"))
    errors = capsys.readouterr().err
    assert [errors.count(f"{name}.png: unreadable image") for name in ("cat/1", "cat/6", "dog/3")] == [1, 1, 1]
    assert "16 images: 2 steps of 8 in an epoch, 0 left over" in errors
    assert metrics(tmp_path / "run")[-1]["step"] == 6
    # it resumes to the same weights; a new process names them again
    main(words("pretrain", broken, tmp_path / "parts", "--data.max_unreadable", "0.2", "--trainer.max_steps", "3"))
    main(words("pretrain", broken, tmp_path / "parts", "--data.max_unreadable", "0.2", "--data.workers", "2"))
    whole, parts = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("run", "parts"))
    assert whole == parts


def test_validation_images_that_cannot_be_used_are_named_before_the_first_step(
    image_folder: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    """By their headers: an evaluation counts each, and would end the run after an epoch."""
    Image.new("RGB", (6, 3)).save(image_folder / "val" / "cat" / "0.png")
    (image_folder / "val" / "dog" / "1.png").write_text("no image")
    line = refused(*words("finetune", image_folder, tmp_path / "run"))
    assert "cat/0.png: wanted at least one patch of 7 px, got 6 x 3 px (2 of 6 images cannot be used" in line
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    (image_folder / "val" / "cat" / "0.png").unlink()
    assert "dog/1.png: unreadable image: not an image in a known format (1 of 5" in refused(
        *words("finetune", image_folder, tmp_path / "run")
    )


def on_two_processes(*own: str) -> subprocess.CompletedProcess[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [*launch, "-m", "sparsemae.cli", *own, "--trainer.devices", "2"]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.slow
@pytest.mark.holds_only
def test_two_processes_agree_on_what_is_unreadable(broken: Path, tmp_path: Path) -> None:
    options = ["--trainer.device_batch", "4", "--data.max_unreadable"]
    done = on_two_processes(*words("pretrain", broken, tmp_path / "two", *options, "0.2"))
    assert done.returncode == 0, done.stderr
    assert [done.stderr.count(f"{name}.png: unreadable image") for name in ("cat/1", "cat/6", "dog/3")] == [1, 1, 1]
    main(words("pretrain", broken, tmp_path / "one", *options, "0.2"))
    two, one = ([row["loss"] for row in metrics(tmp_path / name)] for name in ("two", "one"))
    assert two == pytest.approx(one, rel=1e-6)

    for job, fraction in (("pretrain", "0.1"), ("finetune", "0.2")):
        if job == "finetune":  # the training images pass, and one for validation does not
            image = broken / "val" / "dog" / "1.png"
            image.write_bytes(image.read_bytes()[:200])
        done = on_two_processes(*words(job, broken, tmp_path / job, *options, fraction))
        errors = [line for line in done.stderr.splitlines() if "error:" in line]
        assert len(set(errors)) == 1  # both say so, or the launcher ends the second one first
        assert ("more than data.max_unreadable=0.1" if job == "pretrain" else "dog/1.png: unreadable") in errors[0]
        assert "gloo" not in done.stderr.lower()
        assert not (tmp_path / job / "model.safetensors").exists()
