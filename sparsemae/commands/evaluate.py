"""Accuracy of a classifier on a labelled set, each image counted once on any number of processes.

The command takes segmenters, too: `segment_evaluate` has their scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from lightning_fabric import Fabric
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy

from sparsemae.data.classification import ImageDataset, UnreadableImages, batches
from sparsemae.data.sampling import EvaluationSampler
from sparsemae.data.segmentation import MaskSourceConfig
from sparsemae.data.sources import SourceConfig, open_source
from sparsemae.data.transforms import evaluation_transform, normalize
from sparsemae.packing.format import is_packed
from sparsemae.runtime import load
from sparsemae.sparsity import densify, freeze, iter_sparse
from sparsemae.tasks.build import load_classifier, task_of
from sparsemae.commands.probe import probe
from sparsemae.tasks.sliding_window import InferenceChange, evaluate_segmenter
from sparsemae.training.logs import watched

EVALUATION_BATCH = 256


@dataclass
class EvaluateConfig:
    """Accuracy of a finetuned classifier or of a probe on a pretrained model, or mIoU of a segmenter."""

    model: str
    """The model: a packed file, a run folder, or its model.safetensors."""
    data: SourceConfig = field(default_factory=SourceConfig)
    """Where the validation split lies; preparation of the images comes from the model's file."""
    probe: Literal["knn", "linear"] | None = None
    """Instead of the model's own head: a k-nearest-neighbour vote, or a linear classifier, on its frozen features."""
    masks: MaskSourceConfig = field(default_factory=MaskSourceConfig)
    """Of a segmenter: where the images and masks lie, in place of `data`."""
    inference: InferenceChange = field(default_factory=InferenceChange)
    """Of a segmenter: how it looks at an image, where not as its recipe says."""
    accelerator: str = "auto"
    """Where to run: auto, cpu, cuda, mps."""


@dataclass(frozen=True)
class _Subject:
    """A classifier under evaluation, torch's or packed."""

    forward: Callable[[Tensor], Tensor]
    """Normalised images ``[B, 3, H, W]`` to logits ``[B, C]``."""
    input: dict[str, Any]
    class_names: list[str]
    patch: int


def evaluate(config: EvaluateConfig) -> dict[str, float]:
    """Print and return top-1, top-5 and the standard error of top-1, or a segmenter's scores, as shares."""
    packed = is_packed(config.model)
    try:
        fabric = Fabric(accelerator="cpu" if packed else config.accelerator, devices=1)
    except RuntimeError as error:
        raise ValueError(f"accelerator: {config.accelerator} cannot be had here: {error}") from error
    if config.probe is not None:
        if packed:
            raise ValueError(f"{config.model}: wanted a run or its weights with --probe, got a packed file")
        metrics = probe(config.probe, config.model, config.data, fabric)
        print(f"{config.model}: {config.probe} probe, {_shares(metrics)}")
        return metrics
    if not packed and task_of(config.model) == "segment":
        if config.data.root is not None:
            raise ValueError(
                f"data.root: wanted none for a segmenter, got {config.data.root} (--masks.root names images and masks)"
            )
        return evaluate_segmenter(fabric, config.model, config.masks, config.inference).metrics()
    if config.masks.root is not None:
        raise ValueError(
            f"masks.root: wanted none for a classifier, got {config.masks.root} (--data.root names its images)"
        )
    subject = _packed(config.model) if packed else _trained(config.model, fabric)
    prepared = subject.input
    source = open_source(config.data, "val")
    if list(source.class_names) != subject.class_names:
        raise ValueError(
            f"{config.data.root or config.data.source}: wanted the {len(subject.class_names)} classes of "
            f"{config.model} ({', '.join(subject.class_names[:3])}, ...), got {len(source.class_names)} "
            f"({', '.join(source.class_names[:3])}, ...)"
            + " (--data.source and --data.root name others)"
            * (config.data.root is None)
        )
    transform = evaluation_transform(prepared["img_size"], prepared["interpolation"], prepared["eval_crop"])
    dataset = ImageDataset(source, transform, smallest=subject.patch, exif=prepared["exif"])
    with torch.inference_mode():
        metrics = accuracy(
            fabric, subject.forward, dataset, prepared["mean"], prepared["std"], config.data.workers, shown=True
        )
    print(f"{config.model}: {_shares(metrics)} on {len(source):,} images")
    return metrics


def _shares(metrics: dict[str, float]) -> str:
    return f"top-1 {metrics['top1']:.2%} ± {metrics['standard_error']:.2%}, top-5 {metrics['top5']:.2%}"


def _trained(model: str, fabric: Fabric) -> _Subject:
    classifier, description = load_classifier(model)
    if any(iter_sparse(classifier)):  # computed as a plain model with zeros; a checkpoint's mask is that of now
        freeze(classifier)
        densify(classifier)
    classifier.to(fabric.device)
    patch = max(classifier.patch_embed.patch_size)
    return _Subject(classifier, description["input"], description["class_names"], patch)


def _packed(file: str) -> _Subject:
    model = load(file)
    shape, preprocess = model.config.vit, model.config.preprocess
    prepared = {
        "img_size": shape.image_height, "mean": preprocess.mean, "std": preprocess.std,
        "interpolation": preprocess.interpolation, "eval_crop": preprocess.crop_pct,
        "exif": preprocess.exif_transpose,
    }  # fmt: skip
    names = list(model.config.class_names)
    return _Subject(lambda images: torch.from_numpy(model(images.numpy())), prepared, names, shape.patch_size)


def accuracy(
    fabric: Fabric,
    model: Callable[[Tensor], Tensor],
    dataset: ImageDataset,
    mean: Sequence[float],
    std: Sequence[float],
    workers: int,
    shown: bool = False,
) -> dict[str, float]:
    """Top-1, top-5 and the standard error of top-1 as shares, over all processes.

    ``model`` gives the logits of normalised images; a module must be the plain one, in evaluation mode.
    ``shown``: with a progress display.
    Raises ValueError, on all processes, naming an image that cannot be read: each is to count once.
    """
    classes = len(dataset.source.class_names)
    ranks = {"top1": 1, "top5": min(5, classes)}
    meters = {
        name: MulticlassAccuracy(classes, top_k=k, average="micro").to(fabric.device) for name, k in ranks.items()
    }
    sampler = EvaluationSampler(len(dataset), EVALUATION_BATCH, fabric.global_rank, fabric.world_size)
    unreadable = UnreadableImages(len(dataset), 0.0)
    found = batches(dataset, sampler, workers, unreadable=unreadable)
    for batch in watched(found, "evaluating", len(dataset)) if shown else found:
        images, targets = fabric.to_device((batch["image"], batch["target"]))
        with fabric.autocast():
            logits = model(normalize(images, mean, std)).float()
        for meter in meters.values():
            meter.update(logits, targets)
    unreadable.settle()
    result: dict[str, Any] = {name: float(meter.compute()) for name, meter in meters.items()}
    result["standard_error"] = math.sqrt(result["top1"] * (1 - result["top1"]) / len(dataset))
    return result
