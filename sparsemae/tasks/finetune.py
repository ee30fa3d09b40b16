"""Sparse finetuning for classification: the mask keeps moving, then it is frozen (stage 2)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor, nn

from sparsemae.data.classification import ImageDataset
from sparsemae.data.sampling import BatchPlan
from sparsemae.data.sources import open_source
from sparsemae.data.transforms import DataConfig, evaluation_transform, normalize, training_transform
from sparsemae.limits import AT_LEAST_0, BELOW_1, SHARE, check_limits
from sparsemae.models import ModelConfig
from sparsemae.models.start import start_from
from sparsemae.models.weights import save_model
from sparsemae.sparsity import freeze, summarize
from sparsemae.tasks.build import SparseConfig, build_classifier, describe, make_sparse, mask_schedule
from sparsemae.commands.evaluate import accuracy
from sparsemae.training.config import TrainerConfig
from sparsemae.training.fit import fit
from sparsemae.training.optim import OptimConfig
from sparsemae.training.run import start
from sparsemae.training.task import Task


@dataclass
class FinetuneConfig:
    """Sparse finetuning for classification (Table 2)."""

    out: str = "runs/finetune"
    """The run's folder."""
    seed: int = 0
    """Seed of everything random."""
    init: str | None = None
    """Weights to start from: a run folder, a file (MAE, timm, HF ViTMAE, our own), or timm:NAME; None: from scratch."""
    label_smoothing: float = 0.1
    """Label smoothing epsilon."""
    mixup: float = 0.8
    """Alpha of mixup; 0 switches it off."""
    cutmix: float = 1.0
    """Alpha of cutmix; 0 switches it off. With both, each batch takes one of them, with probability 0.5."""
    erasing: float = 0.25
    """Probability of erasing a random rectangle of an image with noise."""
    model: ModelConfig = field(default_factory=ModelConfig)
    sparse: SparseConfig = field(default_factory=SparseConfig)
    data: DataConfig = field(
        default_factory=lambda: DataConfig(crop_scale=(0.08, 1.0), auto_augment="rand-m9-mstd0.5-inc1")
    )
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=5e-3, min_lr=1e-6, layer_decay=0.65))
    trainer: TrainerConfig = field(default_factory=lambda: TrainerConfig(epochs=200, global_batch=2048))

    def __post_init__(self) -> None:
        check_limits(self, "", label_smoothing=BELOW_1, mixup=AT_LEAST_0, cutmix=AT_LEAST_0, erasing=SHARE)


def finetune(config: FinetuneConfig) -> Path:
    """Run (or continue) sparse finetuning; returns the file of the frozen sparse model."""
    data, sparse = config.data, config.sparse
    train, val = open_source(data, "train", data.train_images), open_source(data, "val")
    if len(train.class_names) < 2:
        raise ValueError(f"{data.root}: wanted at least two class folders, got {train.class_names}")
    model = build_classifier(config.model, data.img_size, len(train.class_names), config.seed)
    patch = max(model.patch_embed.patch_size)
    dataset = ImageDataset(
        train, training_transform(data), config.seed, smallest=patch, exif=data.exif,
        max_unreadable=data.max_unreadable,
    )  # fmt: skip
    validation = ImageDataset(
        val, evaluation_transform(data.img_size, data.interpolation, data.eval_crop), smallest=patch, exif=data.exif
    )

    run = start(config, config.trainer, config.out, config.seed)
    if config.init is not None:
        run.log.say(f"{config.init}: {start_from(model, config.init)}")
    make_sparse(model, sparse)
    run.log.say(str(summarize(model)))
    description = describe("classify", model, config.model, data, train.class_names, ema_decay=config.trainer.ema_decay)
    erase, mix = _erasing(config.erasing, run.fabric.device), _mixing(config, len(train.class_names))
    trainer = run.trainer
    plan = BatchPlan.make(len(dataset), trainer.global_batch, trainer.device_batch, run.fabric.world_size)
    if mix is not None and plan.micro_batch % 2:
        raise ValueError(f"trainer.device_batch: mixup and cutmix want an even batch, got {plan.micro_batch}")
    smooth = nn.CrossEntropyLoss(label_smoothing=0.0 if mix else config.label_smoothing)

    def loss_of(forward: nn.Module, batch: dict[str, Any]) -> Tensor:
        images, target = erase(normalize(batch["image"], data.mean, data.std)), batch["target"]
        if mix is not None:
            images, target = mix(images, target)
        loss: Tensor = smooth(forward(images).float(), target)
        return loss

    def evaluate(model: nn.Module) -> dict[str, float]:
        return accuracy(run.fabric, model, validation, data.mean, data.std, data.workers)

    task = Task(
        model, dataset, loss_of, description, "finetuning", workers=data.workers, max_unreadable=data.max_unreadable,
        filename=train.filename, evaluate=evaluate, best_by="top1",
        srste_strength=sparse.strength, srste_decoupled=sparse.term == "decoupled",
        masks=mask_schedule(model, sparse, trainer, plan),
    )  # fmt: skip
    metrics = fit(run, task, config.optim)
    if sparse.pattern != "dense":
        freeze(model)
    path = run.folder / "model.safetensors"
    if run.fabric.is_global_zero:
        save_model(path, model, {**description, "frozen": sparse.pattern != "dense", "metrics": metrics})
        run.log.say(f"top-1 {metrics['top1']:.2%} on {len(val):,} images; wrote {path}")
    return path


def _erasing(probability: float, device: torch.device) -> Callable[[Tensor], Tensor]:
    """timm's random erasing, on the normalised batch; draws from the generators that the loop seeds."""
    if not probability:
        return lambda images: images
    return RandomErasing(probability, mode="pixel", device=str(device))  # type: ignore[no-any-return]


def _mixing(config: FinetuneConfig, num_classes: int) -> Mixup | None:
    """timm's mixup and cutmix, on every batch; they make the targets soft and smooth them."""
    if not config.mixup and not config.cutmix:
        return None
    return Mixup(config.mixup, config.cutmix, label_smoothing=config.label_smoothing, num_classes=num_classes)
