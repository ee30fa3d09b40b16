"""Sparse finetuning for classification: the mask keeps moving, then it is frozen (stage 2)."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from lightning_fabric import Fabric
from PIL import Image
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from sparsemae.card import ModelCard
from sparsemae.costs.multiply_adds import Forward, count_forward
from sparsemae.data import loader, sampling, sources, transforms
from sparsemae.data.dataset import ImageDataset
from sparsemae.data.jpeg import decoded_by
from sparsemae.data.splits import Part
from sparsemae.models import build_vit, use_plain_attention
from sparsemae.options import FinetuneConfig, SourceConfig
from sparsemae.predictor import rank, require_finite
from sparsemae.tasks import class_figures
from sparsemae.tasks.outcomes import ClassOutcomes, Shown
from sparsemae.tasks.task import Network, Task, blank_images, encoder_of, picture, smallest_side
from sparsemae.tasks.teacher import Teacher, distillation_loss, open_teacher
from sparsemae.training.logs import with_progress

EVALUATION_BATCH = 256


class Classification(Task[FinetuneConfig]):
    """One class for each image."""

    title: ClassVar[str] = "finetuning"
    best_by: ClassVar[str | None] = "top1"
    teacher: Teacher | None = None
    """Opened with the data: a plan or a benchmark has none."""

    def open_data(self) -> None:
        data = self.config.data
        self.splits = sources.find_source(data)
        self.train, self.val = self.splits.open("train", data.train_images), self.splits.open("val")
        self.sources = {"train": self.train, "val": self.val}
        self.class_names = self.train.class_names
        sources.require_classes(self.train, str(data.root))
        if self.config.teacher is not None:
            self.teacher = open_teacher(self.config.teacher, self.class_names)

    def notes(self, model: nn.Module) -> list[str]:
        counts = self.train.class_counts()
        none = [] if counts is None else [self.class_names[i] for i in np.flatnonzero(counts == 0).tolist()]
        few = ", ".join(none[:4]) + ", ..." * (len(none) > 4)
        left = f"{len(none):,} of {len(self.class_names):,} classes have no training image: {few}"
        return [*super().notes(model), *[left] * bool(none)]

    def datasets(self, model: nn.Module) -> tuple[ImageDataset, ImageDataset]:
        data, smallest = self.config.data, smallest_side(model)
        transform = transforms.evaluation_transform(self.card().input)
        cache = data.cache_gigabytes
        self.validation = ImageDataset(self.val, transform, smallest=smallest, rules=data, cache_gigabytes=cache)
        return ImageDataset(
            decoded_by(data.jpeg, self.train), transforms.training_transform(data), self.config.seed, 0, smallest,
            data, data.max_unreadable, cache,
        ), self.validation  # fmt: skip

    def prepare(self, model: nn.Module, fabric: Fabric, batches: sampling.BatchPlan) -> None:
        config, self.autocast = self.config, fabric.autocast
        if self.teacher is not None:
            self.teacher.model.to(fabric.device)
            if fabric.device.type == "cpu":
                use_plain_attention(self.teacher.model)
        self.mix: Mixup | None = None
        if config.mixup or config.cutmix:  # timm's, on every batch; they make the targets soft and smooth them
            if batches.micro_batch % 2:
                raise ValueError(
                    f"trainer.device_batch: mixup and cutmix want an even batch, got {batches.micro_batch}"
                )
            self.mix = Mixup(
                config.mixup, config.cutmix, label_smoothing=config.label_smoothing, num_classes=len(self.class_names)
            )
        smoothing = 0.0 if self.mix else config.label_smoothing
        self.criterion: Callable[[Tensor, Tensor], Tensor] = nn.CrossEntropyLoss(label_smoothing=smoothing)
        if config.class_weights == "balanced":
            counts = self.train.class_counts()
            if counts is None:
                raise ValueError(f"class_weights: wanted none: the labels of {config.data.source} are not listed")
            weights = torch.from_numpy(len(self.train) / (np.maximum(counts, 1) * (counts > 0).sum()))
            weights = weights.to(fabric.device, torch.float32)
            self.criterion = partial(weighted_cross_entropy, weights=weights, smoothing=config.label_smoothing)
        self.erase: Callable[[Tensor], Tensor] = lambda images: images
        if config.erasing:  # on the normalized batch; draws from the generators that the loop seeds
            self.erase = RandomErasing(config.erasing, mode="pixel", device=str(fabric.device))

    def loss(self, forward: nn.Module, batch: dict[str, Any]) -> Tensor:
        images, target = self._mixed(batch)
        logits = forward(images).float()
        loss = self.criterion(logits, target)
        if self.teacher is None:
            return loss
        with self.autocast():
            wanted = self.teacher.logits(images, self.config.data.mean, self.config.data.std).float()
        weight = self.config.teacher_weight
        return (1 - weight) * loss + weight * distillation_loss(logits, wanted, self.config.teacher_temperature)

    def _mixed(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        data = self.config.data
        images, target = self.erase(transforms.normalize(batch["image"], data.mean, data.std)), batch["target"]
        return (images, target) if self.mix is None else self.mix(images, target)

    def seen(self, batch: dict[str, Any]) -> list[Shown]:
        data, smoothing, names = self.config.data, self.config.label_smoothing, self.class_names
        images, target = self._mixed(batch)
        target = shares(target, len(names), smoothing)
        pictures = map(picture, transforms.denormalize(images, data.mean, data.std))
        best = target.topk(2)  # mixed of two at most
        notes = (
            f"{names[i]} {p:.0%} + {names[j]} {q:.0%}" if q > 0.005 else names[i]
            for (p, q), (i, j) in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        )
        return [Shown(shown, "", note) for shown, note in zip(pictures, notes, strict=True)]

    def example_batch(self, model: nn.Module, size: int) -> dict[str, Any]:
        return {"image": blank_images(size, self.config.data.img_size), "target": torch.zeros(size, dtype=torch.long)}

    def forwards(self, model: nn.Module) -> list[Forward]:
        use_plain_attention(model)  # matrix products, each of which the counter knows
        vit = encoder_of(model.eval())
        image = torch.empty(1, vit.in_chans, *vit.patch_embed.img_size, device="meta")
        tokens = vit.patch_embed.num_patches + vit.num_prefix_tokens
        return [count_forward("the model", tokens, model, lambda: model(image))]

    def evaluate(self, fabric: Fabric, model: nn.Module) -> dict[str, float]:
        self.outcomes = ClassOutcomes(self.validation, self.class_names)
        return self.measure(
            fabric, model, self.card(), self.validation, self.config.data.workers, outcomes=self.outcomes
        )

    def guess(self, looks: int) -> dict[str, float]:
        counts, images = self.val.class_counts(), len(self.validation)
        most = 0.0 if counts is None else counts.max() / images
        return {"images": images, "guess": max(1 / len(self.class_names), float(most)), "looks": looks}

    def result(self, metrics: dict[str, float]) -> str:
        error = metrics["standard_error"]
        return f"top-1 {metrics['top1']:.2%} ± {error:.2%} on {len(self.validation):,} images"

    @classmethod
    def build(cls, card: ModelCard, drop_path: float = 0.0) -> VisionTransformer:
        return build_vit(
            card.architecture, card.model_args, card.input.img_size, len(card.class_names), drop_path=drop_path
        )

    @classmethod
    def evaluation_set(
        cls, card: ModelCard, data: SourceConfig, smallest: int, split: Part | None = None
    ) -> tuple[ImageDataset, str]:
        source, said = sources.find_source(data).open_for_evaluation(split, card.data, card.class_names)
        return ImageDataset(
            source, transforms.evaluation_transform(card.input), smallest=smallest, rules=card.input
        ), said

    @classmethod
    def measure(
        cls, fabric: Fabric, network: Network, card: ModelCard, dataset: ImageDataset, workers: int,
        progress: bool = False, outcomes: ClassOutcomes | None = None,
    ) -> dict[str, float]:  # fmt: skip
        """Top-1, top-5 and the standard error of top-1.

        Raises ValueError, on all processes, naming an image that cannot be read (each is to count once), or if a logit
        is not finite.
        """
        classes, finite = len(card.class_names), torch.ones((), device=fabric.device)
        meters = {
            name: MulticlassAccuracy(classes, top_k=k, average="micro").to(fabric.device)
            for name, k in (("top1", 1), ("top5", min(5, classes)))
        }
        sampler = sampling.EvaluationSampler(len(dataset), EVALUATION_BATCH, fabric.global_rank, fabric.world_size)
        unreadable = loader.UnreadableImages(len(dataset), 0.0, at_end=True)
        found = loader.batches(dataset, sampler, workers, unreadable=unreadable)
        for batch in with_progress(found, "evaluating", len(dataset)) if progress else found:
            images, targets = fabric.to_device((batch["image"], batch["target"]))
            with fabric.autocast():
                logits = network(transforms.normalize(images, card.input.mean, card.input.std)).float()
            finite *= logits.isfinite().all()
            for meter in meters.values():
                meter.update(logits, targets)
            if outcomes is not None:
                outcomes.add(batch["index"], targets, logits)
        unreadable.synchronize()
        require_finite(fabric.all_reduce(finite, reduce_op="mean") == 1)
        result: dict[str, Any] = {name: float(meter.compute()) for name, meter in meters.items()}
        result["standard_error"] = math.sqrt(result["top1"] * (1 - result["top1"]) / len(dataset))
        return result

    @classmethod
    def predict(cls, network: Network, card: ModelCard, images: Sequence[Image.Image], top_k: int) -> list[Any]:
        """For each image the ``top_k`` `Prediction` s, best first."""
        transform, spec = transforms.evaluation_transform(card.input), card.input
        pixels = torch.stack([transform(image, 0)[0] for image in images])
        logits = network(transforms.normalize(pixels, spec.mean, spec.std)).float()
        return [rank(one.numpy(), card.class_names, top_k) for one in logits.cpu()]

    @classmethod
    def summary(cls, metrics: dict[str, float]) -> str:
        return class_figures.summary(metrics)


def weighted_cross_entropy(logits: Tensor, target: Tensor, weights: Tensor, smoothing: float) -> Tensor:
    """Mean of the images' cross-entropies ``[B, C]``, each times the weight ``[C]`` of its class, or of those it mixes.

    torch's own ``weight`` weighs the smoothed part of a target too, class by class: a common image would be taught to
    be half of a class twenty times as rare.
    """
    smoothed = 0.0 if target.ndim == 2 else smoothing  # mixup has smoothed its targets
    losses = nn.functional.cross_entropy(logits, target, reduction="none", label_smoothing=smoothed)
    return (losses * (shares(target, len(weights), smoothing) @ weights)).mean()


def shares(target: Tensor, classes: int, smoothing: float) -> Tensor:
    """What each image is of each class ``[B, C]``: of class numbers ``[B]``, or of mixup's smoothed targets."""
    if target.ndim == 1:
        return nn.functional.one_hot(target, classes).float()
    return (target - smoothing / classes) / (1 - smoothing)
