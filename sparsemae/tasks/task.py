"""What a task is: all that differs between pretraining, classification and segmentation, and nothing else.

While a model is trained, an object made of the options has the data, the loss and the evaluation. Afterwards there is
only a model's card: what then remains to be done with it (build, measure, predict) are class methods.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from lightning_fabric import Fabric
from PIL import Image
from torch import Tensor, nn

from sparsemae.card import InputSpec, ModelCard
from sparsemae.costs.multiply_adds import Forward
from sparsemae.data.dataset import ImageDataset
from sparsemae.data.sampling import BatchPlan
from sparsemae.data.splits import Part, Source, Splits
from sparsemae.data.survey import survey
from sparsemae.data.tree import Split
from sparsemae.models import patch_side
from sparsemae.options import DEFAULT_MODEL, SourceConfig
from sparsemae.tasks.outcomes import Gallery, Outcomes, Shown
from sparsemae.training.subject import Config, Trainable

Network = Callable[[Tensor], Any]
"""Normalized images ``[B, 3, H, W]`` to what the task's model gives for them."""


class Task(Trainable[Config]):
    """One training, by its options; its class methods need no more than a model's card."""

    around: ClassVar[str | None] = None
    """What stands around the encoder, if anything does."""
    freezes: ClassVar[bool] = True
    """The masks are frozen at the end; not if a later stage trains on."""
    dataset_size: ClassVar[tuple[int, int]] = (1_281_167, 1000)
    """Images and classes that a plan assumes."""
    embedded_classes: ClassVar[int] = 10
    """Classes of the embedded images."""
    at_once: ClassVar[int] = 8
    """Images that a prediction looks at together."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.class_names: Sequence[str] = ()
        self.splits: Splits | None = None
        """Where the images are, once they have been found."""
        self.sources: dict[Split, Source] = {}
        """What is trained on, and what is evaluated on."""
        self.outcomes: Outcomes | None = None
        """Of the last evaluation, image by image, where the task keeps them."""

    @abstractmethod
    def open_data(self) -> None:
        """Find the images and set ``class_names``. Raises ValueError if they cannot be trained on."""

    def settle(self, config: Config) -> None:
        """Take the options as they will be used, and open what depends on them, just before the model is built."""
        self.config = config

    def settings(self) -> dict[str, Any]:
        """JSON values that `build`, `measure` and `predict` will find in the card."""
        return {}

    @abstractmethod
    def datasets(self, model: nn.Module) -> tuple[ImageDataset, ImageDataset | None]:
        """Training and validation set for a model. Raises ValueError on options that do not go with it."""

    def prepare(self, model: nn.Module, fabric: Fabric, batches: BatchPlan) -> None:
        """What depends on the devices and the batch, just before the loop. Raises ValueError if they cannot do."""

    def notes(self, model: nn.Module) -> list[str]:
        """What the log is told at the start, besides the encoder's summary: of the data, here."""
        looked_at = [survey(source, self.config.data) for source in self.sources.values()]
        return (self.splits.notes() if self.splits is not None else []) + [
            note for notes in looked_at for note in notes
        ]

    @cached_property
    def trained_on(self) -> dict[str, Any]:
        """What the card keeps of the data."""
        return self.splits.trained_on() if self.splits is not None else {}

    def wrapped(self, model: nn.Module) -> nn.Module:
        """The module whose forward the loss calls: the model, or one around it."""
        return model

    def seen(self, batch: dict[str, Any]) -> list[Shown]:
        """The images of a training batch on the device, as the model sees them, the generators seeded for it."""
        return [Shown(picture(pixels), "") for pixels in batch["image"]]

    def galleries(self, model: nn.Module) -> list[Gallery]:
        """Images that show how good the trained model is. Raises ValueError or OSError if one cannot be read."""
        return self.outcomes.galleries() if self.outcomes is not None else []

    @abstractmethod
    def example_batch(self, model: nn.Module, size: int) -> dict[str, Any]:
        """A micro-batch of so many blank images, for plans and benchmarks."""

    @abstractmethod
    def forwards(self, model: nn.Module) -> list[Forward]:
        """Multiply-adds of one image, of a model on the meta device."""

    def guess(self, looks: int) -> dict[str, float]:
        """What `guessing.warning` wants beside the metrics that are the best of so many evaluations, if it applies."""
        return {}

    def result(self, metrics: dict[str, float]) -> str:
        """What a finished training says of itself."""
        return self.summary(metrics)

    def card(self) -> ModelCard:
        """Of the model to train, before it is made sparse."""
        config = self.config
        return ModelCard(
            config.task, config.model.name or DEFAULT_MODEL, dict(config.model.args), InputSpec.of(config.data),
            tuple(self.class_names), settings=self.settings(), ema_decay=config.trainer.ema_decay,
            data=self.trained_on,
        )  # fmt: skip

    @classmethod
    @abstractmethod
    def build(cls, card: ModelCard, drop_path: float = 0.0) -> nn.Module:
        """A model as described, its weights drawn from torch's global generator."""

    @classmethod
    @abstractmethod
    def evaluation_set(
        cls, card: ModelCard, data: SourceConfig, smallest: int, split: Part | None = None
    ) -> tuple[ImageDataset, str]:
        """The images to measure on, prepared as the card says, and a line that says which they are.

        ``split`` None: the validation split, see `Splits.open_for_evaluation`. Raises ValueError if their classes are
        not the card's.
        """

    @classmethod
    @abstractmethod
    def measure(
        cls, fabric: Fabric, network: Network, card: ModelCard, dataset: ImageDataset, workers: int,
        progress: bool = False,
    ) -> dict[str, float]:  # fmt: skip
        """Metrics as fractions over all processes, each image counted once."""

    @classmethod
    @abstractmethod
    def predict(cls, network: Network, card: ModelCard, images: Sequence[Image.Image], top_k: int) -> list[Any]:
        """One result for each RGB image, in order."""

    @classmethod
    @abstractmethod
    def summary(cls, metrics: dict[str, float]) -> str:
        """The metrics in one line."""

    @classmethod
    def details(cls, card: ModelCard, metrics: dict[str, float]) -> list[str]:
        """Lines of metrics that are too many for the summary."""
        return []

    @classmethod
    def conditions(cls, card: ModelCard) -> str:
        """How the model looked at the images, where there is a choice."""
        return ""


def encoder_of(model: nn.Module) -> Any:
    """The ViT of a model, which may be all of it."""
    return getattr(model, "encoder", model)


def smallest_side(model: nn.Module) -> int:
    """The shorter side that an image needs: one patch, px."""
    return patch_side(encoder_of(model))


def picture(pixels: Tensor) -> Image.Image:
    """Of uint8 ``[3, H, W]``."""
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().cpu().numpy())


def blank_images(size: int, side: int) -> Tensor:
    """uint8 ``[B, 3, H, W]``."""
    return torch.zeros(size, 3, side, side, dtype=torch.uint8)
