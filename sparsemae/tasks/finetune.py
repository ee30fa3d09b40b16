"""Sparse finetuning for classification: the mask keeps moving, then it is frozen (stage 2)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sparsemae.data.classification import (
    DataConfig,
    ImageDataset,
    evaluation_transform,
    normalize,
    open_source,
    training_transform,
)
from sparsemae.models import ModelConfig, load_weights
from sparsemae.models.weights import save_model
from sparsemae.sparsity import freeze, summarize
from sparsemae.tasks.build import SparseConfig, build_classifier, describe, make_sparse
from sparsemae.tasks.evaluate import accuracy
from sparsemae.training.fit import Task, TrainerConfig, fit, start
from sparsemae.training.optim import OptimConfig


@dataclass
class FinetuneConfig:
    """Sparse finetuning for classification (Table 2)."""

    out: str = "runs/finetune"
    """The run's folder."""
    seed: int = 0
    """Seed of everything random."""
    init: str | None = None
    """Weights to start from: a run folder or a file (MAE, timm, HF ViTMAE, our own); None: from scratch."""
    label_smoothing: float = 0.1
    """Label smoothing epsilon."""
    model: ModelConfig = field(default_factory=ModelConfig)
    sparse: SparseConfig = field(default_factory=SparseConfig)
    data: DataConfig = field(default_factory=lambda: DataConfig(crop_scale=(0.08, 1.0)))
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=5e-3, min_lr=1e-6, layer_decay=0.65))
    trainer: TrainerConfig = field(default_factory=lambda: TrainerConfig(epochs=200, global_batch=2048))


def finetune(config: FinetuneConfig) -> Path:
    """Run (or continue) sparse finetuning; returns the file of the frozen sparse model."""
    data, sparse = config.data, config.sparse
    train, val = open_source(data, "train", data.train_images), open_source(data, "val")
    if len(train.class_names) < 2:
        raise ValueError(f"{data.root}: wanted at least two class folders, got {train.class_names}")
    model = build_classifier(config.model, data.img_size, len(train.class_names), config.seed)
    patch = max(model.patch_embed.patch_size)
    dataset = ImageDataset(train, training_transform(data), config.seed, smallest=patch, exif=data.exif)
    validation = ImageDataset(
        val, evaluation_transform(data.img_size, data.interpolation, data.eval_crop), smallest=patch, exif=data.exif
    )

    run = start(asdict(config), config.trainer, config.out, config.seed)
    if config.init is not None:  # a new head and fc_norm, as in MAE; a frozen source becomes a moving one
        loaded = load_weights(model, config.init, ignore=["head.*", "fc_norm.*", "norm.*", "*.weight_mask"])
        run.log.say(f"{config.init}: {loaded}")
    make_sparse(model, sparse)
    if sparse.mask == "fixed" and sparse.pattern != "dense":
        freeze(model)
    if run.fabric.is_global_zero:
        run.log.say(str(summarize(model)))
    description = describe("classify", model, config.model, data, train.class_names)
    criterion = nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)

    def loss_of(forward: nn.Module, batch: dict[str, Any]) -> Tensor:
        logits = forward(normalize(batch["image"], data.mean, data.std))
        loss: Tensor = criterion(logits.float(), batch["target"])
        return loss

    def evaluate() -> dict[str, float]:
        return accuracy(run.fabric, model, validation, data.mean, data.std, data.workers)

    task = Task(
        model, dataset, loss_of, description, "finetuning", sparse.strength, data.workers, evaluate
    )  # fmt: skip
    metrics = fit(run, task, config.optim)
    if sparse.pattern != "dense":
        freeze(model)
    path = run.folder / "model.safetensors"
    if run.fabric.is_global_zero:
        save_model(path, model, {**description, "frozen": True, "metrics": metrics})
        run.log.say(f"top-1 {metrics['top1']:.2%} on {len(val):,} images; wrote {path}")
    return path
