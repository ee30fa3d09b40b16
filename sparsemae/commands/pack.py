"""From a finetuned run to the packed file that is shipped, held against the model it was made of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from sparsemae.data.classification import ImageDataset, batches
from sparsemae.data.sampling import EvaluationSampler
from sparsemae.data.sources import SourceConfig, open_source
from sparsemae.data.transforms import evaluation_transform, normalize
from sparsemae.models.weights import find_weights
from sparsemae.packing.format import Preprocess
from sparsemae.packing.pack import PackReport
from sparsemae.packing.pack import pack as pack_model
from sparsemae.runtime import load
from sparsemae.tasks.build import load_classifier

_BATCH = 64


@dataclass
class PackConfig:
    """Pack a finetuned model into one small file that runs without torch."""

    checkpoint: str
    """The model: a run folder, or its model.safetensors, with its mask frozen."""
    out: str
    """The packed file to write."""
    dtype: Literal["bf16", "fp32", "int8"] = "bf16"
    """Type of the kept weights; int8 has one scale per output row."""
    license: str = ""
    """Licence of the weights, recorded in the file."""
    data: SourceConfig | None = None
    """Images to check the file on, all of its validation part; None: eight random ones."""


def pack(config: PackConfig) -> PackReport:
    """Write the packed file, print its size by part, and compare its output with the masked dense model's."""
    if Path(config.out).resolve() == find_weights(config.checkpoint).resolve():
        raise ValueError(f"out: wanted another file than the model's own, got {config.out}")
    model, description = load_classifier(config.checkpoint)
    prepared, names = description["input"], description["class_names"]
    preprocess = Preprocess(
        tuple(prepared["mean"]),
        tuple(prepared["std"]),
        prepared["interpolation"],
        prepared["eval_crop"],
        prepared["exif"],
    )
    report = pack_model(
        model, config.out, preprocess, config.dtype, architecture=description["model"]["name"],
        overrides=description["model"]["args"], class_names=names, source=str(config.checkpoint),
        license=config.license,
    )  # fmt: skip
    print(report)
    agreement = compare(model, load(config.out), checked_images(config.data, description))
    kind = "random images" if config.data is None else "images"
    print(f"{config.out}: against the masked dense model on {agreement.images} {kind}: {agreement}")
    return report


@dataclass(frozen=True)
class Agreement:
    """How far a packed model's outputs are from its source's."""

    images: int
    error: float
    """Largest difference of a logit, over the standard deviation of all logits."""
    same: float
    """Share of images with the same class."""

    def __str__(self) -> str:
        return (
            f"largest difference of a logit {self.error:.1e} of the logits' standard deviation, "
            f"same class for {self.same:.1%}"
        )


def compare(dense: torch.nn.Module, packed: Any, batches: Iterable[torch.Tensor]) -> Agreement:
    """Run both on batches of normalised images [B, 3, H, W]; `packed` is called with float32 arrays."""
    wanted, got = [], []
    for images in batches:
        with torch.inference_mode():
            wanted.append(dense(images).numpy())
        got.append(packed(images.numpy()))
    logits, packed_logits = np.concatenate(wanted), np.concatenate(got)
    error = float(np.abs(packed_logits - logits).max() / logits.std())
    same = float((packed_logits.argmax(axis=1) == logits.argmax(axis=1)).mean())
    return Agreement(len(logits), error, same)


def checked_images(data: SourceConfig | None, description: dict[str, Any]) -> Iterator[torch.Tensor]:
    """Batches of normalised validation images [B, 3, H, W], as the model described expects them."""
    prepared = description["input"]
    size = prepared["img_size"]
    if data is None:
        yield torch.randn(8, 3, size, size, generator=torch.Generator().manual_seed(0))
        return
    source = open_source(data, "val")
    transform = evaluation_transform(size, prepared["interpolation"], prepared["eval_crop"])
    sampler = EvaluationSampler(len(source), _BATCH)
    for batch in batches(ImageDataset(source, transform, exif=prepared["exif"]), sampler, data.workers):
        yield normalize(batch["image"], prepared["mean"], prepared["std"])
