from pathlib import Path

import pytest
import torch
from torch import nn

from sparsemae.training.checkpoint import (
    checkpoint_path,
    list_checkpoints,
    load_checkpoint,
    remove_old_checkpoints,
    save_checkpoint,
    step_of,
)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = checkpoint_path(tmp_path, 12)
    save_checkpoint(path, nn.Linear(4, 3), {"task": "test"}, {"optimizer": {"state": {0: torch.ones(2)}}})
    return path


def test_round_trip(saved: Path) -> None:
    model = nn.Linear(4, 3)
    state = load_checkpoint(saved, model)
    assert torch.equal(state["optimizer"]["state"][0], torch.ones(2))
    assert step_of(saved) == 12
    assert not list(saved.parent.glob(".*"))


@pytest.mark.parametrize("file", ["model.safetensors", "training.pt", "sha256.json"])
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
        load_checkpoint(saved, nn.Linear(4, 3))


def test_another_architecture_names_the_keys(saved: Path) -> None:
    with pytest.raises(ValueError, match=r"another architecture: got weight \[3, 4\] for \[3, 5\]"):
        load_checkpoint(saved, nn.Linear(5, 3))


def test_only_the_last_ones_are_kept(tmp_path: Path) -> None:
    for step in (5, 100, 20):
        save_checkpoint(checkpoint_path(tmp_path, step), nn.Linear(1, 1), {}, {})
    remove_old_checkpoints(tmp_path, 2)
    assert [step_of(path) for path in list_checkpoints(tmp_path)] == [20, 100]
