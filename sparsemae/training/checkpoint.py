"""A run's checkpoints: folders that appear whole or not at all, and prove on loading that they are unharmed.

``checkpoints/step-NNNNNNNN/`` holds ``model.safetensors`` (public weights, usable on their own), ``training.pt``
(optimizer, counters; tensors and plain values only, no pickled code) and ``sha256.json``. It is written under a
temporary name, fsynced and renamed. A torn or altered one is named, and the one before it is used.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsemae.models.weights import load_weights, save_model


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of an optimizer step lies."""
    return folder / f"step-{step:08d}"


def step_of(path: Path) -> int:
    """Inverse of `checkpoint_path`."""
    return int(path.name.removeprefix("step-"))


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first."""
    return sorted(folder.glob("step-*"))


def save_checkpoint(path: Path, model: nn.Module, description: Mapping[str, Any], training: Mapping[str, Any]) -> None:
    """Write a checkpoint folder; it appears whole or not at all.

    Args:
        description: metadata of the weights file.
        training: what `load_checkpoint` returns: tensors and plain values only.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_model(temporary / "model.safetensors", model, description)
    torch.save(dict(training), temporary / "training.pt")
    sums = {file.name: _sha256(file) for file in sorted(temporary.iterdir())}
    (temporary / "sha256.json").write_text(json.dumps(sums, indent=1))
    for file in temporary.iterdir():
        _fsync(file)
    shutil.rmtree(path, ignore_errors=True)
    temporary.rename(path)
    _fsync(path.parent)


def remove_old_checkpoints(folder: Path, keep: int) -> None:
    """Keep only the last ``keep`` checkpoints."""
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)


def load_checkpoint(path: Path, model: nn.Module) -> dict[str, Any]:
    """Put a checkpoint's weights into ``model``; returns its training state.

    Raises ValueError, naming the checkpoint and the file, if one is missing, altered, or of another architecture.
    """
    try:
        sums = json.loads((path / "sha256.json").read_text())
        damaged = [name for name, wanted in sums.items() if _sha256(path / name) != wanted]
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: torn checkpoint: {error}") from error
    if damaged or set(sums) != {"model.safetensors", "training.pt"}:
        raise ValueError(f"{path}: damaged checkpoint: {', '.join(damaged) or 'sha256.json'} differs from its checksum")
    training: dict[str, Any] = torch.load(path / "training.pt", map_location="cpu", weights_only=True)
    load_weights(model, path / "model.safetensors", strict=True)
    return training


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
