"""A run's settings, and which of them may differ when it is continued."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

PRECISIONS: dict[str, Any] = {"bf16": "bf16-mixed", "fp32": "32-true", "fp64": "64-true"}
# Settings that may differ when a run is continued: they do not change what is computed.
MAY_CHANGE = ("out", "trainer.devices", "trainer.num_nodes", "trainer.accelerator", "trainer.compile",
              "trainer.max_steps", "trainer.resume", "trainer.log_every_steps", "trainer.save_every_steps",
              "trainer.save_every_minutes",
              "trainer.keep_checkpoints", "trainer.max_failed_saves", "trainer.max_bad_steps",
              "trainer.loader_timeout_seconds", "trainer.loader_retries", "trainer.evaluate_every_epochs",
              "data.workers", "data.root", "data.download", "data.max_unreadable")  # fmt: skip


@dataclass
class TrainerConfig:
    """Devices, batches and the run's bookkeeping."""

    epochs: float = 400.0
    """Length of the schedule, epochs."""
    steps: int | None = None
    """Length of the schedule in optimizer steps instead of epochs."""
    max_steps: int | None = None
    """Stop after this many optimizer steps, the schedule unchanged; None: run to its end."""
    global_batch: int = 4096
    """Images per optimizer step, over all devices and accumulation: what a recipe fixes."""
    device_batch: int | None = None
    """Images per device and forward; accumulation fills the global batch. None: global_batch / devices, and in a run
    that is continued what it was, on any number of devices."""
    scale_lr: bool = False
    """Scale optim.lr by global_batch / optim.lr_batch (the linear rule)."""
    devices: int = 1
    """Processes, one device each."""
    num_nodes: int = 1
    """Machines."""
    accelerator: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to run."""
    precision: str = "auto"
    """bf16 (autocast), fp32, fp64 (for tests), or auto: bf16 where the device multiplies it, else fp32."""
    compile: bool | Literal["auto"] = "auto"
    """torch.compile the training forward; auto: on CUDA only. Evaluation stays eager."""
    ema_decay: float | None = None
    """Per optimizer step, of a moving average of the latent weights, which is then what is evaluated and written;
    None: no average."""
    log_every_steps: int = 10
    """Optimizer steps between lines of metrics.jsonl."""
    save_every_steps: int = 1000
    """Optimizer steps between checkpoints; one is always written at the end."""
    save_every_minutes: float | None = None
    """Minutes after which a checkpoint is written in between; None: by steps only."""
    keep_checkpoints: int = 2
    """Number of latest checkpoints kept, besides the best one."""
    max_failed_saves: int = 3
    """Stop when this many checkpoints in a row could not be written (a full disk)."""
    max_bad_steps: int = 5
    """Stop when this many optimizer steps in a row had a loss or gradient that is not finite; each is skipped."""
    loader_timeout_seconds: float = 600.0
    """Seconds without a batch after which loader processes count as hung."""
    loader_retries: int = 6
    """Times that a loader that died, hung or lost its source is started again, after 1, 2, 4, ... seconds."""
    evaluate_every_epochs: int = 1
    """Epochs between evaluations, where the task has one; the end is always evaluated."""
    resume: Literal["auto", "never", "anyway"] = "auto"
    """auto: a run folder that holds a checkpoint continues from the last one; anyway: even where settings differ;
    never: refuse such a folder."""

    def __post_init__(self) -> None:
        at_least_one = (
            "steps", "max_steps", "global_batch", "device_batch", "devices", "num_nodes", "log_every_steps",
            "save_every_steps", "keep_checkpoints", "max_failed_saves", "max_bad_steps", "evaluate_every_epochs",
        )  # fmt: skip
        for name in at_least_one:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"trainer.{name}: wanted at least 1, got {value}")
        for name in ("epochs", "save_every_minutes", "loader_timeout_seconds"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"trainer.{name}: wanted more than 0, got {value:g}")
        if self.loader_retries < 0:
            raise ValueError(f"trainer.loader_retries: wanted at least 0, got {self.loader_retries}")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"trainer.ema_decay: wanted 0 to 1, got {self.ema_decay:g}")

    def schedule_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps from the start of the schedule to its end."""
        return self.steps or round(self.epochs * steps_per_epoch)


def resolved_precision(trainer: TrainerConfig) -> str:
    """What trainer.precision comes to on this machine.

    auto is bf16 on CUDA and on processors with AVX512-BF16; elsewhere a CPU emulates it, several times slower.
    """
    if trainer.precision != "auto":
        return trainer.precision
    if trainer.accelerator != "cpu" and torch.cuda.is_available():
        return "bf16"
    return "bf16" if getattr(torch.cpu, "_is_avx512_bf16_supported", bool)() else "fp32"


def differences(before: Mapping[str, Any], now: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[str]:
    """Settings that differ and must not, as ``name was X, is Y``.

    A setting that ``before`` does not know, because it was made by an older version, counts as its default.
    """
    defaults, old, new = flat(defaults), flat(before), flat(now)
    old = {key: value for key, value in defaults.items() if key in new} | old
    keys = [key for key in sorted(old | new) if key not in MAY_CHANGE and old.get(key) != new.get(key)]
    return [f"{key} was {old.get(key)}, is {new.get(key)}" for key in keys]


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree of settings as one dictionary, names joined by dots."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            leaves |= flat(value, f"{prefix}{key}.")
        else:
            leaves[prefix + key] = list(value) if isinstance(value, tuple) else value
    return leaves
