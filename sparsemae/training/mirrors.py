"""The lines of metrics.jsonl for other eyes, as `--log` asks: TensorBoard, CSV, Weights & Biases.

metrics.jsonl stays the source. What lies in files is made anew from it when a run starts or goes on, so that no step is
there twice and none is missing; a W&B run goes on under its id, which is kept in the run's folder.
"""

import secrets
import shutil
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from lightning_fabric.loggers import CSVLogger, TensorBoardLogger

from sparsemae.files import write_atomic

PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "csv": (), "wandb": ("wandb",)}
"""Any of which each wants."""
ALL_AT_ONCE = 1 << 62


class Mirror(Protocol):
    """What takes the figures of a step."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Take them."""

    def save(self) -> None:
        """Write what was taken."""

    def finalize(self, status: str) -> None:
        """The run has ended."""


class _WandB:
    """Fabric has none of its own."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        import wandb

        known = folder / "wandb-id.txt"
        if not known.is_file():
            write_atomic(known, secrets.token_hex(4))
        try:
            self.run = wandb.init(
                project="sparsemae", name=folder.name, id=known.read_text().strip(), resume="allow", dir=str(folder),
                config=dict(config), settings=wandb.Settings(silent=True, console="off"),
            )  # fmt: skip
        except wandb.errors.Error as error:
            said = " ".join(str(error).split())
            raise ValueError(f"log: wandb: {said} (WANDB_MODE=offline keeps all in {folder}/wandb)") from error

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        self.run.log(dict(metrics), step=step)

    def save(self) -> None: ...

    def finalize(self, status: str) -> None:
        self.run.finish(exit_code=int(status != "success"))


def require_packages(names: Sequence[str]) -> None:
    """Raises ValueError, naming the package, if one is not installed that a mirror wants."""
    for name in names:
        wanted = PACKAGES[name]
        if wanted and not any(map(find_spec, wanted)):
            raise ValueError(f"log: wanted the package {wanted[0]}, which is not installed: pip install {wanted[0]}")


def open_mirrors(
    names: Sequence[str], folder: Path, config: Mapping[str, Any], records: Sequence[Mapping[str, Any]]
) -> list[Mirror]:
    """One for each name, with the records of before in those that are files.

    Raises ValueError if W&B refuses to start.
    """
    opened: list[Mirror] = []
    for name in names:
        if name == "wandb":
            opened.append(_WandB(folder, config))
            continue
        shutil.rmtree(folder / name, ignore_errors=True)
        place: dict[str, Any] = {"root_dir": folder, "name": name, "version": ""}
        mirror: Any = (
            TensorBoardLogger(**place)
            if name == "tensorboard"
            else CSVLogger(**place, flush_logs_every_n_steps=ALL_AT_ONCE)
        )
        for record in records:
            mirrored(mirror, record)
        if records:
            mirror.save()
        opened.append(mirror)
    return opened


def mirrored(mirror: Mirror, record: Mapping[str, Any]) -> None:
    """Hand on a line of metrics.jsonl."""
    mirror.log_metrics({name: value for name, value in record.items() if name != "step"}, record["step"])
