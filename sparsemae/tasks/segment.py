"""Sparse finetuning for semantic segmentation: the mask keeps moving, then it is frozen (stage 2)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from sparsemae.data.masks import IGNORED
from sparsemae.data.sampling import BatchPlan
from sparsemae.data.segmentation import (
    MaskDataConfig,
    MaskDataset,
    classes_at_a_glance,
    open_masks,
    training_transform,
)  # fmt: skip
from sparsemae.data.transforms import normalize
from sparsemae.models import ModelConfig
from sparsemae.models.segmenter import HeadConfig, Segmenter, segmentation_loss
from sparsemae.models.start import start_from
from sparsemae.models.weights import save_model
from sparsemae.sparsity import freeze, summarize
from sparsemae.tasks.build import SparseConfig, build_segmenter, describe, make_sparse, mask_schedule
from sparsemae.tasks.sliding_window import InferenceConfig, score, summary_of
from sparsemae.costs.multiply_adds import Forward, count_forward
from sparsemae.training.config import TrainerConfig
from sparsemae.training.fit import fit, use_plain_attention
from sparsemae.training.optim import OptimConfig
from sparsemae.training.run import start
from sparsemae.training.task import Task


@dataclass
class SegmentConfig:
    """Sparse finetuning for semantic segmentation (Table 3)."""

    out: str = "runs/segment"
    """The run's folder."""
    seed: int = 0
    """Seed of everything random."""
    init: str | None = None
    """Weights to start from: a run folder, a file (MAE, timm, HF ViTMAE, our own), or timm:NAME; None: from scratch."""
    taps: list[int] = field(default_factory=lambda: [3, 5, 7, 11])
    """Four blocks after which the ViT is read, counted from 0; the last must be its last."""
    head: HeadConfig = field(default_factory=HeadConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    sparse: SparseConfig = field(default_factory=SparseConfig)
    data: MaskDataConfig = field(default_factory=MaskDataConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(
            lr=1e-4, min_lr=0.0, schedule="linear", warmup_steps=1500, warmup_start=1e-6, layer_decay=0.75
        )
    )
    trainer: TrainerConfig = field(default_factory=lambda: TrainerConfig(steps=160_000, global_batch=16))


def segment(config: SegmentConfig) -> Path:
    """Run (or continue) sparse finetuning; returns the file of the frozen sparse segmenter."""
    data, sparse, trainer = config.data, config.sparse, config.trainer
    config.inference.check(data.img_size)
    train, val = open_masks(data, "train", data.train_images), open_masks(data, "val")
    names = train.labels.class_names
    model = build_segmenter(config.model, config.head, config.taps, data.img_size, len(names), config.seed)
    dataset, validation = MaskDataset(train, training_transform(data), config.seed), MaskDataset(val)

    run = start(config, trainer, config.out, config.seed)
    trainer = run.trainer  # device_batch resolved
    plan = BatchPlan.make(len(dataset), trainer.global_batch, trainer.device_batch, run.fabric.world_size)
    refuse_single_images(plan.micro_batch)
    if config.init is not None:
        run.log.say(f"{config.init}: {start_from(model, config.init)}")
    if len(seen := classes_at_a_glance(train)) < 2:
        run.log.say(
            f"warning: {train.names[0]}, ...: masks with one class only: {', '.join(names[i] for i in seen) or 'none'} "
            "(a binary mask has 0 and 1, not 0 and 255; sparsemae check --masks.root reads all)"
        )
    make_sparse(model, sparse)
    run.log.say(f"{summarize(model)}\n{_cost(config, len(names))}")
    share_batch_norm(model, run.fabric)
    description = describe(
        "segment", model, config.model, data, names, head=asdict(config.head), taps=config.taps,
        inference=asdict(config.inference), palette=train.labels.palette,
        reduce_zero_label=train.labels.reduce_zero_label, ema_decay=trainer.ema_decay,
    )  # fmt: skip

    def loss_of(forward: nn.Module, batch: dict[str, Any]) -> Tensor:
        output = forward(normalize(batch["image"], data.mean, data.std))
        return segmentation_loss(output, batch["target"], config.head.auxiliary_weight, IGNORED)

    def evaluate(model: nn.Module) -> dict[str, float]:
        assert isinstance(model, Segmenter)
        scores = score(run.fabric, model, validation, description["input"], config.inference, data.workers)
        return scores.metrics()

    task = Task(
        model, dataset, loss_of, description, "segmentation", workers=data.workers, filename=train.names.__getitem__,
        evaluate=evaluate, best_by="miou",
        srste_strength=sparse.strength, srste_decoupled=sparse.term == "decoupled",
        masks=mask_schedule(model, sparse, trainer, plan),
    )  # fmt: skip
    metrics = fit(run, task, config.optim)
    if sparse.pattern != "dense":
        freeze(model)
    path = run.folder / "model.safetensors"
    if run.fabric.is_global_zero:
        save_model(path, model, {**description, "frozen": sparse.pattern != "dense", "metrics": metrics})
        run.log.say(f"{summary_of(metrics)} on {len(val):,} images; wrote {path}")
    return path


def refuse_single_images(micro_batch: int) -> None:
    """Raises ValueError for one image per device and forward."""
    if micro_batch < 2:
        raise ValueError(
            "trainer.device_batch: wanted at least 2 images per device and forward, got 1: the head pools to 1 x 1, "
            "where batch normalisation has nothing to normalise over in a single image"
        )


def share_batch_norm(model: Segmenter, fabric: Fabric) -> None:
    """Batch statistics over all processes, where they are GPUs; torch has none for CPUs."""
    if fabric.device.type == "cuda" and fabric.world_size > 1:
        nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]


def count_segmenter(model: Segmenter) -> list[Forward]:
    """The forwards of one image of a segmenter on the meta device."""
    use_plain_attention(model)  # matrix products, each of which the counter knows
    model.eval()
    embed = model.encoder.patch_embed
    image = torch.empty(1, model.encoder.in_chans, *embed.img_size, device="meta")
    tokens = embed.num_patches + model.encoder.num_prefix_tokens
    maps = model.forward_pyramid(image)
    return [
        count_forward("encoder and pyramid", tokens, model, lambda: model.forward_pyramid(image)),
        count_forward("the head", tokens, model, lambda: model.decode_head(maps)),
    ]


def _cost(config: SegmentConfig, classes: int) -> str:
    """The head's size, and the multiply-adds of one crop."""
    with torch.device("meta"):
        model = build_segmenter(config.model, config.head, config.taps, config.data.img_size, classes, config.seed)
    if config.sparse.pattern != "dense":
        make_sparse(model, SparseConfig(config.sparse.pattern, exclude=config.sparse.exclude))
    parts = {
        part: sum(parameter.numel() for parameter in getattr(model, part).parameters())
        for part in ("pyramid", "decode_head", "auxiliary_head")
    }
    around = ", ".join(f"{count:,} {part}" for part, count in parts.items())
    totals = [forward.total for forward in count_segmenter(model)]
    dense, kept = sum(total.dense for total in totals), sum(total.kept for total in totals)
    return (
        f"UperNet {config.head.width} wide: {around} parameters, dense; multiply-adds per {config.data.img_size} px "
        f"image: {kept / 1e9:.1f} G with the kept weights, {dense / 1e9:.1f} G with all, "
        f"of both {totals[1].dense / 1e9:.1f} G in the head"
    )
