"""A checkpoint that is torn or altered is named and set aside, and the one before it is used."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny

from sparsemae.cli import main
from sparsemae.models.weights import read_weights


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-9])


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.holds("survive.4")
@pytest.mark.parametrize(
    ("file", "damage", "said"),
    [
        ("training.safetensors", truncate, "damaged checkpoint: training.safetensors differs from its checksum"),
        ("model.safetensors", flip_a_bit, "damaged checkpoint: model.safetensors differs from its checksum"),
        ("sha256.json", Path.unlink, "torn checkpoint: [Errno 2] No such file or directory"),
    ],
)
@pytest.mark.slow
def test_the_checkpoint_before_is_used(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], file: str, damage: Callable[[Path], None], said: str,
    came_out: Any,
) -> None:  # fmt: skip
    main(tiny("pretrain", tmp_path / "whole"))
    words = tiny("pretrain", tmp_path / "run", "--trainer.save_every_steps", "1", "--trainer.max_steps", "4")
    main(words)
    last = tmp_path / "run" / "checkpoints" / "step-00000004"
    damage(last / file)
    main([*words, "--trainer.max_steps", "6"])
    errors = capfd.readouterr().err.splitlines()
    named = next(line for line in errors if f"step-00000004: {said}" in line)
    assert any(line.endswith("at step 3") and "continuing" in line for line in errors)
    assert not last.exists()
    assert (last.parent / "damaged-step-00000004").is_dir()
    whole, other = read_weights(tmp_path / "whole")[0], read_weights(tmp_path / "run")[0]
    assert all(torch.equal(whole[key], other[key]) for key in whole)
    ways: dict[Any, str] = {truncate: "its last 9 bytes cut off", flip_a_bit: "one bit flipped"}
    made = ways.get(damage, "removed")
    came_out("corrupt checkpoint", f"{file} of the last one: {made}", 0, named, equal=True)
