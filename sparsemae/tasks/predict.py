"""Predictions for image files, by a packed file (without torch) or by a run's model, a segmenter's as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from sparsemae.packing.format import is_packed

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
    """Print and return, per file, the ``top_k`` classes with their probabilities or shares."""
    if config.top_k < 1:
        raise ValueError(f"top_k: wanted at least 1, got {config.top_k}")
    files = [file for path in config.images for file in _image_files(Path(path))]
    if is_packed(config.model):
        rankings = _by_packed(config.model, files, config.top_k)
    else:
        # imported here: a packed file must not load torch
        from sparsemae.tasks.build import task_of
        from sparsemae.tasks.predict_masks import predict_masks

        if task_of(config.model) == "segment":
            rankings = [ranking[: config.top_k] for ranking in predict_masks(config.model, files, Path(config.out))]
        else:
            rankings = _by_torch(config.model, files, config.top_k)
    results = dict(zip(map(str, files), rankings, strict=True))
    for file, ranking in results.items():
        print(f"{file}: " + ", ".join(f"{name} {share:.1%}" for name, share in ranking))
    return results


def _by_packed(model: str, files: Sequence[Path], top_k: int) -> list[Ranking]:
    from sparsemae.runtime import load

    return [[(best.label, best.probability) for best in ranking] for ranking in load(model).predict(files, top_k)]


def _by_torch(model: str, files: Sequence[Path], top_k: int) -> list[Ranking]:
    import torch

    from sparsemae.data.classification import decode_rgb
    from sparsemae.data.transforms import evaluation_transform, normalize
    from sparsemae.sparsity import hold_masks
    from sparsemae.tasks.build import load_classifier

    classifier, description = load_classifier(model)
    prepared, names = description["input"], description["class_names"]
    transform = evaluation_transform(prepared["img_size"], prepared["interpolation"], prepared["eval_crop"])
    rankings = []
    with torch.inference_mode(), hold_masks(classifier):
        for file in files:
            image = torch.as_tensor(transform(decode_rgb(file, str(file), exif=prepared["exif"])))[None]
            probabilities = classifier(normalize(image, prepared["mean"], prepared["std"])).softmax(dim=-1)[0]
            best = probabilities.topk(min(top_k, len(names)))
            rankings.append([(names[i], float(p)) for p, i in zip(best.values, best.indices, strict=True)])
    return rankings


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
