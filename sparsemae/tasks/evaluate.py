"""Accuracy of a classifier on a labelled set, each image counted once on any number of processes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

from sparsemae.data.classification import (
    ImageDataset,
    SourceConfig,
    batches,
    evaluation_transform,
    normalize,
    open_source,
)
from sparsemae.data.sampling import EvaluationSampler
from sparsemae.sparsity import hold_masks
from sparsemae.tasks.build import load_classifier

EVALUATION_BATCH = 256


@dataclass
class EvaluateConfig:
    """Accuracy of a finetuned model."""

    model: str
    """The model: a run folder, or its model.safetensors."""
    data: SourceConfig = field(default_factory=SourceConfig)
    """Where the validation split lies; preparation of the images comes from the model's file."""
    accelerator: str = "auto"
    """Where to run: auto, cpu, cuda, mps."""


def evaluate(config: EvaluateConfig) -> dict[str, float]:
    """Print and return top-1, top-5 and the standard error of top-1, as shares."""
    model, description = load_classifier(config.model)
    prepared = description["input"]
    source = open_source(config.data, "val")
    if list(source.class_names) != description["class_names"]:
        raise ValueError(
            f"{config.data.root or config.data.source}: wanted the {len(description['class_names'])} classes of "
            f"{config.model} ({', '.join(description['class_names'][:3])}, ...), got {len(source.class_names)} "
            f"({', '.join(source.class_names[:3])}, ...)"
        )
    transform = evaluation_transform(prepared["img_size"], prepared["interpolation"], prepared["eval_crop"])
    dataset = ImageDataset(source, transform, smallest=max(model.patch_embed.patch_size), exif=prepared["exif"])
    fabric = Fabric(accelerator=config.accelerator, devices=1)
    model.to(fabric.device)
    with torch.inference_mode(), hold_masks(model):
        metrics = accuracy(fabric, model, dataset, prepared["mean"], prepared["std"], config.data.workers)
    print(
        f"{config.model}: top-1 {metrics['top1']:.2%} ± {metrics['standard_error']:.2%}, "
        f"top-5 {metrics['top5']:.2%} on {len(source):,} images"
    )
    return metrics


def accuracy(
    fabric: Fabric, model: nn.Module, dataset: ImageDataset, mean: Sequence[float], std: Sequence[float], workers: int
) -> dict[str, float]:
    """Top-1 and top-5 as shares, over all processes. ``model`` is the plain module, in evaluation mode."""
    classes = len(dataset.source.class_names)
    ranks = {"top1": 1, "top5": min(5, classes)}
    meters = {
        name: MulticlassAccuracy(classes, top_k=k, average="micro").to(fabric.device) for name, k in ranks.items()
    }
    sampler = EvaluationSampler(len(dataset), EVALUATION_BATCH, fabric.global_rank, fabric.world_size)
    for batch in batches(dataset, sampler, workers):
        images, targets = fabric.to_device((batch["image"], batch["target"]))
        with fabric.autocast():
            logits = model(normalize(images, mean, std)).float()
        for meter in meters.values():
            meter.update(logits, targets)
    result: dict[str, Any] = {name: float(meter.compute()) for name, meter in meters.items()}
    result["standard_error"] = math.sqrt(result["top1"] * (1 - result["top1"]) / len(dataset))
    return result
