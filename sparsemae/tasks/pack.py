"""From a finetuned run to the packed file that is shipped, held against the model it was made of."""

from __future__ import annotations

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

CHECKED_IMAGES = 64


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
    """Images to check the file on; None: random ones."""


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
    packed = load(config.out)
    images = _images(config.data, description)
    with torch.inference_mode():
        wanted = model(images).numpy()
    got = packed(images.numpy())
    error = np.abs(got - wanted).max() / wanted.std()
    same = (got.argmax(axis=1) == wanted.argmax(axis=1)).mean()
    kind = "random images" if config.data is None else "images"
    print(
        f"{config.out}: against the masked dense model on {len(images)} {kind}: largest difference of a logit "
        f"{error:.1e} of the logits' standard deviation, same class for {same:.1%}"
    )
    return report


def _images(data: SourceConfig | None, description: dict[str, Any]) -> torch.Tensor:
    prepared = description["input"]
    size = prepared["img_size"]
    if data is None:
        return torch.randn(8, 3, size, size, generator=torch.Generator().manual_seed(0))
    source = open_source(data, "val", CHECKED_IMAGES)
    transform = evaluation_transform(size, prepared["interpolation"], prepared["eval_crop"])
    sampler = EvaluationSampler(len(source), CHECKED_IMAGES)
    batch = next(batches(ImageDataset(source, transform, exif=prepared["exif"]), sampler, workers=0))
    images: torch.Tensor = batch["image"]
    return normalize(images, prepared["mean"], prepared["std"])
