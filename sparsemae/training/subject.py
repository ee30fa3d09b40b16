"""What is trained: what a task brings to the loop, which knows no task."""

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from lightning_fabric import Fabric
from torch import Tensor, nn

from sparsemae.card import ModelCard
from sparsemae.data.dataset import ImageDataset
from sparsemae.data.sampling import BatchPlan
from sparsemae.options import TrainingConfig
from sparsemae.sparsity import MaskSchedule


class Trainable(Protocol):
    """What the loop asks of a task."""

    config: TrainingConfig
    title: ClassVar[str]
    best_by: ClassVar[str | None]
    """The metric by which the best checkpoint is kept."""
    higher_is_better: ClassVar[bool]

    def loss(self, forward: nn.Module, batch: dict[str, Any]) -> Tensor:
        """Loss of one micro-batch on the device, a scalar mean over it."""

    def evaluate(self, fabric: Fabric, model: nn.Module) -> dict[str, float]:
        """Metrics of a model in evaluation mode, masks held; empty where there is nothing to evaluate."""


@dataclass(frozen=True)
class Subject:
    """What is trained."""

    task: Trainable
    model: nn.Module
    """The plain module; the loop wraps it for the devices."""
    forward: nn.Module
    """What is wrapped and handed to the task's loss: the model, or a module around it."""
    dataset: ImageDataset
    card: ModelCard
    """Goes into the weights files."""
    masks: MaskSchedule
    batches: BatchPlan
    images: dict[str, Any] | None = None
    """What it is trained on, as `record` says it."""
