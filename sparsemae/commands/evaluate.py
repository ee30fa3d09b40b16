"""Figures of a trained or packed model on a validation split, each image counted once."""

import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch
from lightning_fabric import Fabric

import sparsemae
from sparsemae.commands.probe import probe
from sparsemae.limits import with_values
from sparsemae.options import EvaluateConfig, InferenceConfig, SourceConfig
from sparsemae.packing.format import is_packed
from sparsemae.plain_yaml import read_mapping
from sparsemae.predictor import Predictor
from sparsemae.renamed import OPTIONS, renamed
from sparsemae.tasks import task_class
from sparsemae.tasks.loading import TorchPredictor
from sparsemae.tasks.task import Network
from sparsemae.terminal import printable


def evaluate(config: EvaluateConfig) -> dict[str, float]:
    """Print and return the metrics of the model's task as fractions; of a classifier's probe, its accuracy."""
    config = replace(config, data=own_data(config.model, config.data))
    if config.probe is not None:
        if is_packed(config.model):
            raise ValueError(f"model: wanted a run or its weights with --probe, got a packed file: {config.model}")
        fabric = _fabric(config.accelerator)
        metrics = probe(config.probe, config.model, config.data, fabric)
        print(printable(f"{config.model}: {config.probe} probe, {task_class('classify').summary(metrics)}"))
        return metrics
    predictor = sparsemae.load(config.model)
    card = predictor.card
    task = task_class(card.task)
    fabric = _fabric(config.accelerator if isinstance(predictor, TorchPredictor) else "cpu")
    if any(value is not None for value in vars(config.inference).values()):
        if "inference" not in card.settings:
            raise ValueError(f"inference: wanted none for a model for {card.task}, got {config.inference}")
        inference = config.inference.applied_to(InferenceConfig(**card.settings["inference"]))
        inference.check(card.input.img_size)
        card = card.with_settings(inference=asdict(inference))
    if config.data.exif and card.input.exif is False:
        raise ValueError(f"data.exif: wanted what {config.model} was trained with, false, got true")
    dataset, said = task.evaluation_set(card, config.data, predictor.smallest_side, config.split)
    print(printable(said), file=sys.stderr)
    with torch.inference_mode():
        network = _network(predictor, fabric)
        metrics = task.measure(fabric, network, card, dataset, config.data.workers, progress=True)
    conditions = f" ({task.conditions(card)})" if task.conditions(card) else ""
    summary = f"{config.model}: {task.summary(metrics)} on {len(dataset):,} images{conditions}"
    print(*map(printable, (*task.details(card, metrics), summary)), sep="\n")
    return metrics


def own_data(model: str, data: SourceConfig) -> SourceConfig:
    """Where to evaluate: what is named, or else the data that the model's run was trained on, as its folder says."""
    if data.root is not None or data != replace(SourceConfig(), workers=data.workers):
        return data
    path = Path(model)
    for folder in (path, *path.absolute().parents[:3]):  # of a file, or of a checkpoint
        if (folder / "config.yaml").is_file() and (folder / "environment.json").is_file():
            kept = renamed(read_mapping(folder / "config.yaml"), OPTIONS).get("data", {})
            if not isinstance(kept, dict):
                raise ValueError(f"{folder}/config.yaml: data: wanted names and values, got {type(kept).__name__}")
            own = {f"data.{f.name}": kept[f.name] for f in fields(SourceConfig) if f.name in kept} | {
                "data.workers": data.workers, "data.exif": data.exif, "data.download": data.download,
            }  # fmt: skip
            found = with_values(EvaluateConfig(model, data), own).data
            if found.root is not None and not Path(found.root).exists() and "{" not in found.root:
                raise ValueError(f"{model}: its images are no longer in {found.root}: wanted --data.root")
            return found
    return data


def _fabric(accelerator: str) -> Fabric:
    try:
        return Fabric(accelerator=accelerator, devices=1)
    except RuntimeError as error:
        raise ValueError(f"accelerator: {accelerator} cannot be had here: {error}") from error


def _network(predictor: Predictor, fabric: Fabric) -> Network:
    if isinstance(predictor, TorchPredictor):
        return predictor.model.to(fabric.device)
    return lambda images: torch.from_numpy(predictor(images.numpy()))
