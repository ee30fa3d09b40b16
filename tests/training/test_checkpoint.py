from pathlib import Path

import pytest
import torch

from sparsemae.limits import flatten
from sparsemae.training.checkpoint import (
    AVERAGE,
    TRAINING,
    WEIGHTS,
    checkpoint_path,
    list_checkpoints,
    load_checkpoint,
    point_to_best,
    remove_leftovers,
    remove_old_checkpoints,
    save_checkpoint,
    step_of,
    unflatten,
)

FILES = {WEIGHTS: {"weight": torch.ones(3, 4)}, TRAINING: {"optimizer/0/exp_avg": torch.ones(2)}}
COUNTERS = {"done": 12, "losses": [0.1, 2.5e-8]}


def save(path: Path) -> None:
    save_checkpoint(path, FILES, {WEIGHTS: {"task": "test"}, TRAINING: COUNTERS})


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = checkpoint_path(tmp_path, 12)
    save(path)
    return path


def test_round_trip(saved: Path) -> None:
    files, counters = load_checkpoint(saved)
    assert files.keys() == FILES.keys()
    assert all(torch.equal(files[name][key], value) for name in FILES for key, value in FILES[name].items())
    assert counters == COUNTERS
    assert step_of(saved) == 12
    assert not list(saved.parent.glob(".*"))
    assert not list(saved.glob(".*"))
    assert (saved / "model.safetensors").stat().st_mode & 0o777 == (saved / "sha256.json").stat().st_mode & 0o777


def test_a_moving_average_is_one_more_file(tmp_path: Path) -> None:
    path = checkpoint_path(tmp_path, 1)
    save_checkpoint(path, FILES | {AVERAGE: FILES[WEIGHTS]}, {WEIGHTS: {}, TRAINING: {}, AVERAGE: {}})
    assert (path / "ema.safetensors").is_file()
    assert torch.equal(load_checkpoint(path)[0][AVERAGE]["weight"], torch.ones(3, 4))


def test_nested_state_becomes_flat_and_back() -> None:
    tree = {"optimizer": {"0": {"step": torch.tensor(3.0)}}, "masks": {"blocks.0.fc": torch.ones(2)}, "none": {}}
    leaves = flatten(tree, "/")
    assert list(leaves) == ["optimizer/0/step", "masks/blocks.0.fc"]
    assert unflatten(leaves) == {name: tree[name] for name in ("optimizer", "masks")}


@pytest.mark.parametrize("file", ["model.safetensors", "training.safetensors", "sha256.json"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_damage_is_found_and_named(saved: Path, file: str, damage: str) -> None:
    content = (saved / file).read_bytes()
    if damage == "missing":
        (saved / file).unlink()
    else:
        half = len(content) // 2
        (saved / file).write_bytes(
            content[:half]
            if damage == "truncated"
            else content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :]
        )
    with pytest.raises(ValueError, match="step-00000012"):
        load_checkpoint(saved)


def test_only_the_last_ones_and_the_best_are_kept(tmp_path: Path) -> None:
    for step in (5, 100, 20, 7):
        save(checkpoint_path(tmp_path, step))
    remove_old_checkpoints(tmp_path, 2, best=5)
    assert [step_of(path) for path in list_checkpoints(tmp_path)] == [5, 20, 100]
    point_to_best(tmp_path, 5)
    point_to_best(tmp_path, 20)
    assert (tmp_path / "best").resolve() == tmp_path / "step-00000020"
    remove_old_checkpoints(tmp_path, 1)
    assert [step_of(path) for path in list_checkpoints(tmp_path)] == [100]


def test_what_a_killed_run_was_writing_is_removed(saved: Path) -> None:
    (saved.parent / ".step-00000013.tmp").mkdir()
    (saved.parent / ".step-00000013.tmp" / "model.safetensors").write_bytes(b"half")
    (saved.parent / ".best").symlink_to("nowhere")
    remove_leftovers(saved.parent)
    assert list(saved.parent.iterdir()) == [saved]
