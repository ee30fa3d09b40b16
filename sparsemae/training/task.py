"""What a task brings to the loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.data import Dataset

from sparsemae.sparsity import MaskSchedule


@dataclass
class Task:
    """What a task brings to the loop."""

    model: nn.Module
    """The plain module; the loop wraps it for the devices."""
    dataset: Dataset[Any]
    """Map-style, indexed by (epoch, index); a batch is a dict whose ``index`` says which images it has."""
    loss_of: Callable[[nn.Module, dict[str, Any]], Tensor]
    """(wrapped module, batch on the device) -> scalar loss, a mean over the micro-batch."""
    description: dict[str, Any]
    """Goes into the weights files."""
    title: str = "training"
    filename: Callable[[int], str] = str
    """Names a training image by its index, for the record of bad batches."""
    srste_strength: float = 0.0
    """lambda of SR-STE's term; 0 is plain straight-through."""
    srste_decoupled: bool = False
    """The term as a shrink after the step instead of inside the gradient."""
    masks: MaskSchedule | None = None
    """How the masks change over the training; None: they move from the first step to the last."""
    workers: int = 0
    """Loader processes per device."""
    max_unreadable: float = 0.0
    """Share of the images that may be unreadable before the run stops."""
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None
    """Called between steps with a model in evaluation mode, masks held; returns its metrics."""
    best_by: str | None = None
    """The metric by which the best checkpoint is kept."""
    higher_is_better: bool = True
    """Which way that metric goes."""
    forward: nn.Module | None = None
    """What is wrapped for the devices and handed to ``loss_of``, if not the model itself: a module around it."""
