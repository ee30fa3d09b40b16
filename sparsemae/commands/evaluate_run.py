"""Figures of a model by torch: of a run or its weights, and of packed files of other tasks than classification."""

import sys
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric

import sparsemae
from sparsemae.commands.probe import probe
from sparsemae.models.segmenter import SegmenterOutput
from sparsemae.options import EvaluateConfig, InferenceConfig
from sparsemae.predictor import NotFiniteError, Predictor
from sparsemae.tasks import task_class
from sparsemae.tasks.loading import TorchPredictor
from sparsemae.tasks.task import Network
from sparsemae.terminal import printable


def evaluate_run(config: EvaluateConfig) -> dict[str, float]:
    """Print and return the metrics of the model's task as fractions; of a classifier's probe, its accuracy."""
    if config.probe is not None:
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
        inference = inference.of_window(card.input.img_size)
        card = card.with_settings(inference=asdict(inference))
    if config.data.exif and card.input.exif is False:
        raise ValueError(f"data.exif: wanted what {config.model} was trained with, false, got true")
    dataset, said = task.evaluation_set(card, config.data, predictor.smallest_side, config.split)
    print(printable(said), file=sys.stderr)
    with torch.inference_mode():
        network = _network(predictor, fabric)
        try:
            metrics = task.measure(fabric, network, card, dataset, config.data.workers, progress=True)
        except NotFiniteError as error:
            raise ValueError(f"{config.model}: {error}") from error
    conditions = f" ({task.conditions(card)})" if task.conditions(card) else ""
    summary = f"{config.model}: {task.summary(metrics)} on {len(dataset):,} images{conditions}"
    print(*map(printable, (*task.details(card, metrics), summary)), sep="\n")
    return metrics


def _fabric(accelerator: str) -> Fabric:
    try:
        return Fabric(accelerator=accelerator, devices=1)
    except RuntimeError as error:
        raise ValueError(f"accelerator: {accelerator} cannot be had here: {error}") from error


def _network(predictor: Predictor, fabric: Fabric) -> Network:
    if isinstance(predictor, TorchPredictor):
        return predictor.model.to(fabric.device)
    segments = predictor.card.task == "segment"

    def network(images: torch.Tensor) -> Any:
        logits = torch.from_numpy(predictor(np.ascontiguousarray(images.numpy())))
        return SegmenterOutput(logits, None) if segments else logits

    return network
