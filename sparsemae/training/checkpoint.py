"""A run's checkpoints: folders that appear whole or not at all, and prove on loading that they are intact.

``checkpoints/step-NNNNNNNN/`` holds ``model.safetensors`` (public weights, usable on their own), ``ema.safetensors``
where there is a moving average, ``training.safetensors`` (optimizer, masks and, as JSON metadata, counters) and
``sha256.json``. Nothing in it is pickled. It is written under a hidden name, fsynced and renamed. A damaged one, of
which a file is missing or differs from its checksum, is set aside as ``damaged-step-NNNNNNNN``, and the one before it
is used; one that cannot be read for another reason is left alone. ``checkpoints/best`` points to the best one.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

from torch import Tensor

from sparsemae.files import fsync, write_atomic
from sparsemae.models.weights import read_metadata, read_weights, save_tensors
from sparsemae.renamed import CHECKPOINT, renamed

VERSION = 2
"""Of the counters in ``training.safetensors``."""
WEIGHTS, AVERAGE, TRAINING = "model", "ema", "training"
"""Names of a checkpoint's files, without ``.safetensors``."""
Tensors = dict[str, Tensor]


class DamagedCheckpoint(ValueError):
    """A file of a checkpoint is missing, or differs from its checksum."""


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of an optimizer step lies."""
    return folder / f"step-{step:08d}"


def step_of(path: Path) -> int:
    """Inverse of `checkpoint_path`."""
    return int(path.name.removeprefix("step-"))


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first. Raises OSError if they cannot be listed, which a glob would take for none."""
    names = os.listdir(folder) if folder.exists() else []
    return sorted(folder / name for name in names if re.fullmatch(r"step-\d{8,}", name))


def last(folder: Path) -> str:
    """Which checkpoint is the last, for a message."""
    kept = list_checkpoints(folder)
    return f"the last checkpoint is {kept[-1] if kept else 'none'}"


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
        temporary.mkdir()
        for name, tensors in files.items():
            save_tensors(temporary / f"{name}.safetensors", tensors, metadata[name])
        sums = {file.name: _sha256(file) for file in sorted(temporary.iterdir())}
        write_atomic(temporary / "sha256.json", json.dumps(sums, indent=1))
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


def set_aside(path: Path) -> None:
    """Rename a damaged one to where nothing will touch it again."""
    names = (f"damaged-{path.name}" + f"-{i}" * (i > 1) for i in count(1))
    path.rename(next(free for name in names if not (free := path.with_name(name)).exists()))


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


def best_step(folder: Path) -> int | None:
    """The step that ``best`` points to, if its checkpoint is there."""
    best = folder / "best"
    return step_of(best.resolve()) if best.is_symlink() and best.is_dir() else None


def load_checkpoint(path: Path) -> tuple[dict[str, Tensors], dict[str, Any]]:
    """A checkpoint's tensors by file and key, and its counters, after a look at the checksums.

    Raises:
        DamagedCheckpoint: a file is missing or altered; names the checkpoint and the file.
        ValueError: none that this version can read; names the one that wrote it.
        OSError: it cannot be read now.
    """
    files = {f"{name}.safetensors": name for name in (AVERAGE, WEIGHTS, TRAINING)}
    try:
        with (path / "sha256.json").open() as stream:
            sums = json.loads(stream.read(10_000))  # what it can be at most, and much more
        if missing := {f"{WEIGHTS}.safetensors", f"{TRAINING}.safetensors"} - sums.keys():
            raise ValueError(f"sha256.json lacks {', '.join(sorted(missing))}")
        damaged = [file for file in files if file in sums and _sha256(path / file) != sums[file]]
    except (FileNotFoundError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise DamagedCheckpoint(f"{path}: torn checkpoint: {error}") from error
    if damaged:
        raise DamagedCheckpoint(f"{path}: damaged checkpoint: {', '.join(damaged)} differs from its checksum")
    counters = migrated(read_metadata(path / f"{TRAINING}.safetensors"), path)
    if foreign := sums.keys() - files.keys():
        raise ValueError(f"{path}: wanted no files but {', '.join(files)}, got {', '.join(map(repr, foreign)):.80}")
    return {files[file]: read_weights(path / file)[0] for file in files if file in sums}, counters


def migrated(counters: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The counters in a checkpoint under their names of now.

    Raises ValueError, naming the version of sparsemae that wrote them, if they are newer than this one.
    """
    version, packages = counters.get("version", 1), counters.get("packages")
    if version not in range(1, VERSION + 1):
        by = f"sparsemae {packages.get('sparsemae')!s:.40}" if isinstance(packages, dict) else "an unknown version"
        raise ValueError(
            f"{path}: wanted a checkpoint of version 1 to {VERSION}, got version {version!r:.40}, written by {by}: "
            "update sparsemae"
        )
    return renamed(counters, CHECKPOINT)


def unflatten(leaves: Mapping[str, Tensor]) -> dict[str, Any]:
    """Inverse of `limits.flatten` with ``/``, but for branches without a leaf."""
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
