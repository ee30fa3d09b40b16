"""A run's checkpoints: folders that appear whole or not at all, and prove on loading that they are intact.

``checkpoints/step-NNNNNNNN/`` holds ``model.safetensors`` (public weights, usable on their own), ``ema.safetensors``
where there is a moving average, ``training.safetensors`` (optimizer, masks and, as JSON metadata, counters) and
``sha256.json``. Nothing in it is pickled. It is written under a hidden name, fsynced and renamed. A torn or altered one
is named, and the one before it is used. ``checkpoints/best`` points to the best one.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sparsemae.files import fsync
from sparsemae.models.weights import read_weights, save_tensors

WEIGHTS, AVERAGE, TRAINING = "model", "ema", "training"
"""Names of a checkpoint's files, without ``.safetensors``."""
Tensors = dict[str, Tensor]


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of an optimizer step lies."""
    return folder / f"step-{step:08d}"


def step_of(path: Path) -> int:
    """Inverse of `checkpoint_path`."""
    return int(path.name.removeprefix("step-"))


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first."""
    return sorted(folder.glob("step-*"))


def save_checkpoint(
    path: Path, files: Mapping[str, Mapping[str, Tensor]], metadata: Mapping[str, Mapping[str, Any]]
) -> None:
    """Write a checkpoint folder; it appears whole or not at all.

    Args:
        files: tensors by file (`WEIGHTS`, `AVERAGE`, `TRAINING`) and key.
        metadata: plain values by file.

    Raises:
        OSError: it cannot be written; nothing is left of it then.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        for name, tensors in files.items():
            save_tensors(temporary / f"{name}.safetensors", tensors, metadata[name])
        sums = {file.name: _sha256(file) for file in sorted(temporary.iterdir())}
        (temporary / "sha256.json").write_text(json.dumps(sums, indent=1))
        fsync(temporary / "sha256.json")
        fsync(temporary)
        remove_checkpoint(path)
        temporary.rename(path)
        fsync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_checkpoint(path: Path) -> None:
    """Remove one whole: a kill in the middle leaves no torn one under its name."""
    if path.exists():
        removed = path.with_name(f".{path.name}.old")
        path.rename(removed)
        shutil.rmtree(removed)


def remove_old_checkpoints(folder: Path, keep: int, best: int | None = None) -> None:
    """Keep only the last ``keep`` checkpoints and that of step ``best``."""
    for old in list_checkpoints(folder)[:-keep]:
        if step_of(old) != best:
            remove_checkpoint(old)


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed run was writing or removing."""
    for path in folder.glob(".*"):
        path.unlink() if path.is_symlink() else shutil.rmtree(path)


def point_to_best(folder: Path, step: int) -> None:
    """Make ``best`` a link to the checkpoint of a step."""
    temporary = folder / ".best"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(checkpoint_path(folder, step).name)
    temporary.replace(folder / "best")


def load_checkpoint(path: Path) -> tuple[dict[str, Tensors], dict[str, Any]]:
    """A checkpoint's tensors by file and key, and its training metadata, after a look at the checksums.

    Raises ValueError, naming the checkpoint and the file, if one is missing or altered.
    """
    try:
        with (path / "sha256.json").open() as stream:
            sums = json.loads(stream.read(10_000))  # what it can be at most, and much more
        names = {file.removesuffix(".safetensors") for file in sums}
        if not {WEIGHTS, TRAINING} <= names <= {WEIGHTS, AVERAGE, TRAINING}:
            raise ValueError(f"sha256.json names {', '.join(map(str, sums)) or 'nothing'}")
        damaged = [file for file, wanted in sums.items() if _sha256(path / file) != wanted]
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: torn checkpoint: {error}") from error
    if damaged:
        raise ValueError(f"{path}: damaged checkpoint: {', '.join(damaged)} differs from its checksum")
    read = {name: read_weights(path / f"{name}.safetensors") for name in sorted(names)}
    return {name: tensors for name, (tensors, _) in read.items()}, read[TRAINING][1]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Tensors:
    """Nested dicts of tensors as one, its keys joined by ``/``."""
    leaves: Tensors = {}
    for key, value in tree.items():
        leaves |= flatten(value, f"{prefix}{key}/") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return leaves


def unflatten(leaves: Mapping[str, Tensor]) -> dict[str, Any]:
    """Inverse of `flatten`, but for branches without a leaf."""
    tree: dict[str, Any] = {}
    for path, value in leaves.items():
        *branches, leaf = path.split("/")
        branch = tree
        for name in branches:
            branch = branch.setdefault(name, {})
        branch[leaf] = value
    return tree


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
