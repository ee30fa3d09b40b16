"""A run that is stopped and continued equals one that is not, whatever changes in between that must not matter."""

import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import metrics, scene_folder, tiny
from harness import EVERYTHING, run

from sparsemae.cli import main
from sparsemae.models.weights import read_weights

JOBS = (
    ("pretrain", "folder"), ("pretrain", "tar"), ("finetune", "folder"), ("finetune", "tar"), ("segment", "sceneparse"),
)  # fmt: skip
CHAIN = ((1, 0), (3, 1), (4, 4), (None, 0))
"""Where the run stops, and its loader processes until then: 4 steps are an epoch."""


@pytest.fixture
def words(tmp_path: Path, image_folder: Path) -> Callable[..., list[str]]:
    """Words of a run of a job on images of a source, with everything random that there is; of 8 steps, 4 an epoch."""

    def words(job: str, source: str, name: str, *options: str) -> list[str]:
        out, long = tmp_path / name, ["--trainer.global_batch", "4", "--trainer.epochs", "2"]
        if job == "segment":
            root = tmp_path / "scene"
            if not root.exists():
                scene_folder(root, train=16, val=2, longest=64)
            return [
                *tiny("segment", out, "--data.source", source, "--data.root", str(root)), *long, "--data.train_images",
                "null", "--data.img_size", "32", "--data.short_side", "32", "--data.long_side", "128",
                "--data.photometric", "true", "--data.scale", "[0.5, 2.0]", "--data.cat_max_ratio", "0.75",
                "--model.args", "{patch_size: 16, embed_dim: 32, depth: 4, num_heads: 2}", "--model.drop_path", "0.3",
                "--head.width", "8", "--head.auxiliary_width", "8", *options,
            ]  # fmt: skip
        root = image_folder
        if source == "tar":
            root = image_folder.with_name("tar")
            root.mkdir(exist_ok=True)
            for split in image_folder.iterdir():
                with tarfile.open(root / f"{split.name}.tar", "w") as archive:
                    archive.add(split, ".")
        everything = EVERYTHING if job == "finetune" else ["--model.drop_path", "0.3"]
        return [*tiny(job, out, "--data.source", source, "--data.root", str(root)), *long, *everything, *options]

    return words


def differing(one: Path, other: Path) -> list[str]:
    """Tensors that differ."""
    a, b = read_weights(one)[0], read_weights(other)[0]
    assert a.keys() == b.keys()
    return [key for key in a if not torch.equal(a[key], b[key])]


def losses(folder: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in metrics(folder) if "loss" in row}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
@pytest.mark.parametrize(("job", "source"), JOBS)
def test_stopped_three_times_with_other_workers_each_time(
    tmp_path: Path, words: Callable[..., list[str]], job: str, source: str, resumed: Any
) -> None:
    main(words(job, source, "whole", "--data.workers", "0"))
    for stop, workers in CHAIN:
        at = ["--trainer.max_steps", str(stop)] if stop else []
        main(words(job, source, "parts", "--data.workers", str(workers), *at))
    assert not differing(tmp_path / "whole", tmp_path / "parts")
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    assert list(losses(tmp_path / "whole")) == list(range(1, 9))
    stops, numbers = zip(*CHAIN, strict=True)
    resumed(job, source, stops[:-1], 8, workers=numbers, processes=(1,) * 4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("job", "source"), [("pretrain", "tar"), pytest.param("segment", "sceneparse", marks=pytest.mark.holds_only)]
)
def test_continued_on_another_number_of_processes(
    tmp_path: Path, words: Callable[..., list[str]], job: str, source: str, resumed: Any
) -> None:
    """2 processes to step 1, 2 to step 3, 1 to step 5, 2 to the end; beside 1 process for all of it."""
    options = ["--data.workers", "0", "--trainer.device_batch", "2"]
    main(words(job, source, "whole", *options))
    chain = ((1, 2), (3, 2), (5, 1), (8, 2))
    for stop, processes in chain:
        statuses, output = run(words(job, source, "parts", *options, "--trainer.max_steps", str(stop)), processes)
        assert statuses == [0] * processes, output
    # a process sees its own micro-batches only in batch normalization's running statistics
    statistics = [key for key in differing(tmp_path / "whole", tmp_path / "parts") if "running" not in key]
    assert not [key for key in statistics if "num_batches_tracked" not in key]
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    stops, numbers = zip(*chain, strict=True)
    resumed(job, source, stops[:-1], 8, workers=(0,) * 4, processes=numbers)
