"""From a finetuned run to the packed file that is shipped, held against the model it was made of."""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparsemae.card import ModelCard
from sparsemae.data import loader, sampling, transforms
from sparsemae.models.weights import find_weights
from sparsemae.options import PackConfig, SourceConfig
from sparsemae.packing.pack import PackReport, pack as pack_model, require_light
from sparsemae.runtime import load
from sparsemae.sparsity import freeze, iter_sparse
from sparsemae.tasks import task_class
from sparsemae.tasks.guessing import warning
from sparsemae.tasks.loading import load_model
from sparsemae.terminal import printable

_BATCH = 64


def pack(config: PackConfig) -> PackReport:
    """Write the packed file, print its size by part, and compare its output with the masked dense model's."""
    if Path(config.out).resolve() == find_weights(config.checkpoint).resolve():
        raise ValueError(f"out: wanted another file than the model's own, got {config.out}")
    model, card = load_model(config.checkpoint)
    if card.task not in ("classify", "segment"):
        raise ValueError(f"{config.checkpoint}: wanted a model for classify or segment, got one for {card.task}")
    if card.task == "segment":
        require_light(model.head.kind)
        if config.data is not None:
            raise ValueError("data: wanted none for a segmenter, whose packed file sparsemae evaluate measures")
    if not card.frozen and any(iter_sparse(model)):
        print(f"{config.checkpoint}: a checkpoint, whose masks are frozen as they are at step {card.step}")
        freeze(model)
        card = replace(card, frozen=True)
    if said := warning(card.metrics):
        print(said, file=sys.stderr)
    card = replace(card, source=str(config.checkpoint), license=config.license or card.license)
    report = pack_model(model, config.out, card, config.dtype)
    print(report)
    agreement = compare(model, load(config.out), checked_images(config.data, card))
    kind = "random images" if config.data is None else "images"
    print(printable(f"{config.out}: against the masked dense model on {agreement.images} {kind}: {agreement}"))
    return report


@dataclass(frozen=True)
class Agreement:
    """How far a packed model's outputs are from its source's."""

    images: int
    error: float
    """Largest difference of a logit, over the standard deviation of all logits."""
    same: float
    """Fraction of images, or of a segmenter's pixels, with the same class."""

    def __str__(self) -> str:
        return (
            f"largest difference of a logit {self.error:.1e} of the logits' standard deviation, "
            f"same class for {self.same:.1%}"
        )


def compare(dense: torch.nn.Module, packed: Any, batches: Iterable[torch.Tensor]) -> Agreement:
    """Run both on batches of normalized images [B, 3, H, W]; `packed` is called with float32 arrays."""
    wanted, got = [], []
    for images in batches:
        with torch.inference_mode():
            output = dense(images)
            wanted.append(getattr(output, "logits", output).numpy())
        got.append(packed(images.numpy()))
    logits, packed_logits = np.concatenate(wanted), np.concatenate(got)
    error, same = np.abs(packed_logits - logits).max(), packed_logits.argmax(axis=1) == logits.argmax(axis=1)
    return Agreement(len(logits), float(error / logits.std()), float(same.mean()))


def checked_images(data: SourceConfig | None, card: ModelCard) -> Iterator[torch.Tensor]:
    """Batches of normalized validation images [B, 3, H, W], as the card says."""
    spec = card.input
    if data is None:
        yield torch.randn(8, 3, spec.img_size, spec.img_size, generator=torch.Generator().manual_seed(0))
        return
    dataset, _ = task_class(card.task).evaluation_set(card, data, 1)
    for batch in loader.batches(dataset, sampling.EvaluationSampler(len(dataset), _BATCH), data.workers):
        yield transforms.normalize(batch["image"], spec.mean, spec.std)
