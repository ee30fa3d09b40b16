"""How a segmenter is tested: whole images or a sliding window, one scale or several, and the scores of it.

Images are resized to the short side of the training, predictions back to the images' own size, where they are compared
with the masks. All scores come from one confusion matrix, summed over all images and processes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch
from lightning_fabric import Fabric
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.classification import MulticlassConfusionMatrix
from torchvision.transforms.v2 import functional as transforms

from sparsemae.data.classification import batches
from sparsemae.data.masks import IGNORED
from sparsemae.data.sampling import EvaluationSampler
from sparsemae.data.segmentation import MaskDataset, MaskSourceConfig, open_masks, resized_size
from sparsemae.data.transforms import normalize
from sparsemae.models.segmenter import Segmenter
from sparsemae.sparsity import densify, freeze, iter_sparse
from sparsemae.tasks.build import load_segmenter
from sparsemae.training.logs import watched

SMALL_IMAGES_AT_ONCE = 250
"""Of a source whose images have one size; others come one at a time."""


@dataclass
class InferenceConfig:
    """How a segmenter looks at an image."""

    mode: Literal["slide", "whole"] = "slide"
    """slide: windows of the training's size, averaged where they overlap; whole: the image at once."""
    stride: int = 341
    """Distance of the windows, px."""
    scales: list[float] = field(default_factory=lambda: [1.0])
    """Scales of the image, whose predictions are averaged; the field's are [0.5, 0.75, 1.0, 1.25, 1.5, 1.75]."""
    flip: bool = False
    """Average with the prediction of the mirrored image."""

    def changed(self, by: InferenceChange) -> InferenceConfig:
        """With what ``by`` says in place of its own."""
        return replace(self, **{name: value for name, value in vars(by).items() if value is not None})

    def check(self, window: int) -> None:
        """Raises ValueError on settings that cannot work with a window of that side."""
        if self.mode == "slide" and not 1 <= self.stride <= window:
            raise ValueError(f"inference.stride: wanted 1 to the window's {window} px, got {self.stride}")
        if not self.scales or min(self.scales) <= 0:
            raise ValueError(f"inference.scales: wanted scales above 0, got {self.scales}")


@dataclass
class InferenceChange:
    """How a segmenter is to look at an image otherwise than its recipe says."""

    mode: Literal["slide", "whole"] | None = None
    """slide: windows of the training's size; whole: the image at once; None: as the recipe says."""
    stride: int | None = None
    """Distance of the windows, px; None: the recipe's."""
    scales: list[float] | None = None
    """Scales of the image, whose predictions are averaged; None: the recipe's."""
    flip: bool | None = None
    """Average with the prediction of the mirrored image; None: as the recipe says."""


@dataclass(frozen=True)
class Scores:
    """Shares; classes without a labelled pixel are nan, and left out of the means."""

    miou: float
    """Over the classes that are in the truth or in a prediction."""
    mean_accuracy: float
    """Over the classes that are in the truth."""
    pixel_accuracy: float
    iou: list[float]
    """Per class."""

    @classmethod
    def of(cls, confusion: Tensor) -> Scores:
        """From a matrix ``[C, C]`` of pixels, rows the truth, columns the prediction."""
        confusion = confusion.double()
        right, truth, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
        iou, recall = right / (truth + predicted - right), right / truth  # 0 / 0 is nan
        return cls(float(iou.nanmean()), float(recall.nanmean()), float(right.sum() / truth.sum()), iou.tolist())

    def metrics(self) -> dict[str, float]:
        """The three that a run logs."""
        return {"miou": self.miou, "mean_accuracy": self.mean_accuracy, "pixel_accuracy": self.pixel_accuracy}


Forward = Callable[[Tensor], Tensor]
"""Normalised images ``[B, 3, H, W]`` to logits ``[B, C, H, W]``."""


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows of a side start along a length; the last ends with it, and a shorter length has one."""
    last = max(length - window, 0)
    return [*range(0, last, stride), last]


def slide(forward: Forward, images: Tensor, window: int, stride: int) -> Tensor:
    """Logits ``[B, C, H, W]``, the mean of all windows over a pixel. What is smaller than a window is one by itself."""
    height, width = images.shape[-2:]
    total, count = None, images.new_zeros(1, 1, height, width)
    for top, left in itertools.product(window_starts(height, window, stride), window_starts(width, window, stride)):
        part = (..., slice(top, top + window), slice(left, left + window))
        logits = forward(images[part])
        if total is None:
            total = logits.new_zeros(*logits.shape[:2], height, width)
        total[part] += logits
        count[part] += 1
    assert total is not None
    return total / count


def predict_scores(forward: Forward, images: Tensor, prepared: dict[str, Any], inference: InferenceConfig) -> Tensor:
    """Scores ``[B, C, H, W]`` of bytes ``[B, 3, H, W]`` at their own size: their argmax is the prediction.

    One view's are its logits; of several scales and mirrored images it is the mean of their probabilities.
    """
    height, width = size = images.shape[-2:]
    window = prepared["img_size"]
    views = [(scale, flip) for scale in inference.scales for flip in (False, True)[: 1 + inference.flip]]
    total = None
    for scale, flip in views:
        resized = resized_size(height, width, prepared["short_side"] * scale, prepared["long_side"] * scale)
        view = transforms.resize(images, list(resized), antialias=True)
        view = normalize(view.flip(-1) if flip else view, prepared["mean"], prepared["std"])
        logits = slide(forward, view, window, inference.stride) if inference.mode == "slide" else forward(view)
        logits = F.interpolate(logits.flip(-1) if flip else logits, size=size, mode="bilinear", align_corners=False)
        if len(views) == 1:
            return logits
        probabilities = logits.softmax(dim=1) / len(views)
        total = probabilities if total is None else total.add_(probabilities)
    assert total is not None
    return total


def score(
    fabric: Fabric, model: Segmenter, dataset: MaskDataset, prepared: dict[str, Any], inference: InferenceConfig,
    workers: int, shown: bool = False,
) -> Scores:  # fmt: skip
    """Scores over a whole set, each image once on any number of processes.

    ``model`` is the plain module, in evaluation mode; ``shown``: with a progress display.
    Raises ValueError if there is no labelled pixel.
    """
    classes = len(dataset.source.labels.class_names)
    meter = MulticlassConfusionMatrix(classes, ignore_index=IGNORED).to(fabric.device)
    at_once = SMALL_IMAGES_AT_ONCE if dataset.source.one_size else 1
    sampler = EvaluationSampler(len(dataset), at_once, fabric.global_rank, fabric.world_size)

    def forward(images: Tensor) -> Tensor:
        with fabric.autocast():
            logits: Tensor = model(images).logits
        return logits

    found = batches(dataset, sampler, workers)
    for batch in watched(found, "evaluating", len(dataset)) if shown else found:
        images, targets = fabric.to_device((batch["image"], batch["target"]))
        meter.update(predict_scores(forward, images, prepared, inference).argmax(dim=1), targets.long())
    confusion = meter.compute()
    if not confusion.sum():
        raise ValueError(
            f"{dataset.source.names[0]}, ...: wanted labelled pixels to evaluate on, got ignored ones only"
        )
    return Scores.of(confusion)


def evaluate_segmenter(fabric: Fabric, source: str, masks: MaskSourceConfig, change: InferenceChange) -> Scores:
    """Print and return the scores of a segmenter's file or run, which looks as it was made for but for ``change``."""
    model, description = load_segmenter(source)
    names, prepared = description["class_names"], description["input"]
    if any(iter_sparse(model)):  # computed as a plain model with zeros; a checkpoint's mask is that of now
        freeze(model)
        densify(model)
    model.to(fabric.device)
    inference = InferenceConfig(**description["inference"]).changed(change)
    inference.check(prepared["img_size"])
    masks.exif = prepared["exif"]
    data = open_masks(masks, "val")
    if data.labels.class_names != names:
        raise ValueError(
            f"{masks.root or masks.source}: wanted the {len(names)} classes of {source} ({', '.join(names[:3])}, ...), "
            f"got {len(data.labels.class_names)} ({', '.join(data.labels.class_names[:3])}, ...)"
            + " (--masks.source and --masks.root name others)"
            * (masks.root is None)
        )
    with torch.inference_mode():
        scores = score(fabric, model, MaskDataset(data), prepared, inference, masks.workers, shown=True)
    width = max(map(len, names))
    for name, iou in zip(names, scores.iou, strict=True):
        print(f"  {name:<{width}} {'absent' if math.isnan(iou) else f'{iou:.2%}':>7}")
    print(f"{source}: {summary_of(scores.metrics())} on {len(data):,} images ({_how(inference)})")
    return scores


def summary_of(metrics: dict[str, float]) -> str:
    """One line of the three scores."""
    return (
        f"mIoU {metrics['miou']:.2%}, mean accuracy {metrics['mean_accuracy']:.2%}, "
        f"pixel accuracy {metrics['pixel_accuracy']:.2%}"
    )


def _how(inference: InferenceConfig) -> str:
    settings = asdict(inference)
    if inference.mode == "whole":
        del settings["stride"]
    return ", ".join(f"{name} {value}" for name, value in settings.items())
