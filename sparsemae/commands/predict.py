"""Predictions for image files, by a packed file (without torch) or by a run's model, a segmenter's as pictures."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar

from PIL import Image

from sparsemae.packing.format import is_packed

T = TypeVar("T")
Ranking = list[tuple[str, float]]
"""Classes with their probabilities, or a segmenter's with their shares of the pixels, best first."""


@dataclass
class PredictConfig:
    """Classify images, or with a segmenter their pixels."""

    model: str
    """The model: a packed file, a run folder, or its model.safetensors."""
    images: list[str]
    """Image files, or folders of them."""
    top_k: int = 3
    """Classes to name for each image."""
    out: str = "predictions"
    """Of a segmenter: folder for NAME.png, the mask as a palette PNG, and NAME-overlay.png with its legend."""


def predict(config: PredictConfig) -> dict[str, Ranking]:
    """Print and return, per file, the ``top_k`` classes with their probabilities or shares.

    Each is printed as soon as it is known. Images that cannot be read are named on stderr and left out; in the end a
    ValueError counts them.
    """
    if config.top_k < 1:
        raise ValueError(f"top_k: wanted at least 1, got {config.top_k}")
    images = Images([file for path in config.images for file in _image_files(Path(path))])
    if is_packed(config.model):
        rankings = _by_packed(config.model, images, config.top_k)
    else:
        # imported here: a packed file must not load torch
        from sparsemae.tasks.build import task_of
        from sparsemae.commands.overlays import predict_masks

        if task_of(config.model) == "segment":
            rankings = predict_masks(config.model, images, Path(config.out))
        else:
            rankings = _by_torch(config.model, images, config.top_k)
    results = {}
    for file, ranking in rankings:
        results[str(file)] = ranking[: config.top_k]
        print(f"{file}: " + ", ".join(f"{name} {share:.1%}" for name, share in results[str(file)]), flush=True)
    if images.unreadable:
        raise ValueError(f"{images.unreadable} of {len(images.files)} images could not be read; the others are done")
    return results


class Images:
    """Image files, of which some may not be readable. One alone must be."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files, self.unreadable = files, 0

    def read(self, read: Callable[[Path], T]) -> Iterator[tuple[Path, T]]:
        """Files with what ``read`` makes of them, or their names on stderr if it raises ValueError or OSError."""
        for file in self.files:
            try:
                image = read(file)
            except (ValueError, OSError) as error:
                if len(self.files) == 1:
                    raise
                self.unreadable += 1
                print(f"sparsemae predict: {' '.join(str(error).split())}", file=sys.stderr)
            else:
                yield file, image


def _by_packed(model: str, images: Images, top_k: int, batch_size: int = 8) -> Iterator[tuple[Path, Ranking]]:
    import numpy as np

    from sparsemae.runtime import load, load_image

    packed = load(model)
    inputs = images.read(lambda file: load_image(file, packed.config.vit, packed.config.preprocess))
    while batch := list(islice(inputs, batch_size)):
        logits = packed(np.stack([image for _, image in batch]))
        for (file, _), row in zip(batch, logits, strict=True):
            yield file, [(best.label, best.probability) for best in packed.rank(row, top_k)]


def _by_torch(model: str, images: Images, top_k: int) -> Iterator[tuple[Path, Ranking]]:
    import torch

    from sparsemae.data.classification import decode_rgb
    from sparsemae.data.transforms import evaluation_transform, normalize
    from sparsemae.sparsity import hold_masks
    from sparsemae.tasks.build import load_classifier

    classifier, description = load_classifier(model)
    prepared, names = description["input"], description["class_names"]
    transform = evaluation_transform(prepared["img_size"], prepared["interpolation"], prepared["eval_crop"])
    with torch.inference_mode(), hold_masks(classifier):
        for file, image in images.read(lambda file: decode_rgb(file, str(file), exif=prepared["exif"])):
            pixels = torch.as_tensor(transform(image))[None]
            probabilities = classifier(normalize(pixels, prepared["mean"], prepared["std"])).softmax(dim=-1)[0]
            best = probabilities.topk(min(top_k, len(names)))
            yield file, [(names[i], float(p)) for p, i in zip(best.values, best.indices, strict=True)]


def _image_files(path: Path) -> list[Path]:
    if path.is_dir():
        extensions = Image.registered_extensions()
        found = sorted(file for file in path.rglob("*") if file.suffix.lower() in extensions)
        if not found:
            raise ValueError(f"{path}: wanted image files, found none")
        return found
    if not path.is_file():
        raise ValueError(f"{path}: no such file or folder")
    return [path]
