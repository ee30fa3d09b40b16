"""Predictions for image files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from timm.data.readers.img_extensions import get_img_extensions

from sparsemae.data.classification import decode_rgb, evaluation_transform, normalize
from sparsemae.sparsity import hold_masks
from sparsemae.tasks.build import load_classifier


@dataclass
class PredictConfig:
    """Classify images."""

    model: str
    """The model: a run folder, or its model.safetensors."""
    images: list[str]
    """Image files, or folders of them."""
    top_k: int = 3
    """Classes to name for each image."""


def predict(config: PredictConfig) -> dict[str, list[tuple[str, float]]]:
    """Print and return, per file, the ``top_k`` classes with their probabilities."""
    files = [file for path in config.images for file in _image_files(Path(path))]
    model, description = load_classifier(config.model)
    prepared, names = description["input"], description["class_names"]
    transform = evaluation_transform(prepared["img_size"], prepared["interpolation"], prepared["eval_crop"])
    top_k = min(config.top_k, len(names))
    results = {}
    with torch.inference_mode(), hold_masks(model):
        for file in files:
            image = torch.as_tensor(transform(decode_rgb(file, str(file), exif=prepared["exif"])))[None]
            probabilities = model(normalize(image, prepared["mean"], prepared["std"])).softmax(dim=-1)[0]
            best = probabilities.topk(top_k)
            results[str(file)] = [(names[i], float(p)) for p, i in zip(best.values, best.indices, strict=True)]
            print(f"{file}: " + ", ".join(f"{name} {share:.1%}" for name, share in results[str(file)]))
    return results


def _image_files(path: Path) -> list[Path]:
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.suffix.lower() in get_img_extensions(as_set=True))
        if not found:
            raise ValueError(f"{path}: wanted image files, found none")
        return found
    if not path.is_file():
        raise ValueError(f"{path}: no such file or folder")
    return [path]
