"""What is trained, which a task brings to the loop that knows no task; and what came out."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

from lightning_fabric import Fabric
from torch import Tensor, nn

from sparsemae.card import ModelCard
from sparsemae.data.dataset import ImageDataset
from sparsemae.data.sampling import BatchPlan
from sparsemae.options import TrainingConfig
from sparsemae.sparsity import MaskSchedule

Config = TypeVar("Config", bound=TrainingConfig)


class Trainable(ABC, Generic[Config]):
    """What the loop asks of a task."""

    config: Config
    title: ClassVar[str]
    """What the progress display calls the training."""
    best_by: ClassVar[str | None] = None
    """The metric by which the best checkpoint is kept; None: there is no evaluation."""
    higher_is_better: ClassVar[bool] = True

    @abstractmethod
    def loss(self, forward: nn.Module, batch: dict[str, Any]) -> Tensor:
        """Loss of one micro-batch of bytes on the device, a scalar mean over it; ``forward`` is the subject's."""

    def evaluate(self, fabric: Fabric, model: nn.Module) -> dict[str, float]:
        """Metrics on the validation set, as fractions, of a model in evaluation mode, masks held."""
        raise NotImplementedError


@dataclass(frozen=True)
class Subject:
    """What is trained."""

    task: Trainable[Any]
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


class Fitted(NamedTuple):
    """What came out of a training, beside the weights."""

    metrics: dict[str, float]
    """Of the last evaluation; empty if there is none."""
    epochs: float
    """Taken."""
    kept: float
    """The epoch whose weights the model has."""
    best: float | None
    """The epoch of the best evaluation with the whole pattern."""
