"""The page of an exported model: README.md with the metadata that the hub reads."""

import json
import shlex
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import EvalResult, ModelCardData

from sparsemae.card import ModelCard
from sparsemae.files import existing
from sparsemae.models.weights import find_weights
from sparsemae.options import ExportConfig
from sparsemae.packing.pack import pack
from sparsemae.plain_yaml import read_mapping
from sparsemae.runtime import load, native
from sparsemae.sparsity import iter_sparse
from sparsemae.tasks import task_class
from sparsemae.tasks.task import encoder_of

KINDS = {"classify": "image-classification", "segment": "image-segmentation", "pretrain": "image-feature-extraction"}
"""A task's name on the hub."""
METRICS = {"top1": "accuracy", "top5": "accuracy", "miou": "mean_iou"}
"""Of those that a card has, the hub's types."""
RUNS = 9


def model_card(model: Any, card: ModelCard, config: ExportConfig) -> str:
    """Markdown with YAML before it: data, metrics with errors, start, license, command, size and speed.

    What is not known of the model is left out. Speed is measured here and now, of the packed file.
    """
    data, start, command = _of_run(find_weights(config.model).parent)
    name = config.push or Path(config.folder).name
    kind, error = KINDS.get(card.task, card.task), card.metrics.get("standard_error")
    patterns = Counter(card.patterns.values()).items()
    found = [
        EvalResult(kind, data or "unknown", data or "unknown", METRICS[key], value, metric_name=key, task_name=kind)
        for key, value in card.metrics.items()
        if key in METRICS
    ]
    kept, stored = _weights(model)
    tags = ["sparsemae", *["sparse"] * bool(kept), "vision-transformer"]
    library = {"timm": "timm", "hf": "transformers" if card.task == "pretrain" else "timm", "onnx": "onnx"}[config.to]
    front = ModelCardData(
        license=card.license or None, library_name=library, pipeline_tag=kind, tags=tags, model_name=name,
        eval_results=found or None,
    )  # fmt: skip
    rows = {
        "task": card.task + f", {len(card.class_names):,} classes" * bool(card.class_names),
        "architecture": f"{card.architecture} {json.dumps(card.model_args)}",
        "sparsity": ", ".join(f"{pattern} in {layers} layers" for pattern, layers in patterns),
        "data": data,
        "metrics": task_class(card.task).summary(card.metrics) if card.metrics else "",
        "standard error of top-1": "" if error is None else f"{error:.2%}",
        "started from": start,
        "license of the weights": card.license or "not known",
        "command": shlex.join(["sparsemae", *command]) if command else "",
        "size and speed": _size_and_speed(model, card),
    }
    table = "\n".join(f"| {key} | {_cell(value)} |" for key, value in rows.items() if value)
    return (
        f"---\n{front.to_yaml()}\n---\n\n# {name}\n\nA vision transformer{kept}, made by SparseMAE (Zhou et al., ICCV "
        f"2023).{stored}\n\n| | |\n|---|---|\n{table}\n"
    )


def _weights(model: Any) -> tuple[str, str]:
    """What is said of them: whether they are sparse, and what the pruned ones are."""
    layers = [layer for _, layer in iter_sparse(model)]
    if not layers:
        return "", ""
    latent = any(bool(layer.weight[~layer.current_mask()].any()) for layer in layers)
    as_they_are = " All weights are stored, pruned ones too: their masks still move."
    return " with N:M sparse weights", as_they_are if latent else " Pruned weights are stored as zeros."


def _size_and_speed(model: Any, card: ModelCard) -> str:
    """Of the packed file, where the model can be packed."""
    if card.task != "classify" or not any(iter_sparse(model)):
        return ""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "packed.safetensors"
        try:
            size = pack(encoder_of(model), file, card).packed
        except ValueError:  # it computes what the runtime does not
            return ""
        packed = load(file)
        image, seconds = np.zeros((1, 3, card.input.img_size, card.input.img_size), np.float32), []
        for _ in range(RUNS):
            start = time.perf_counter()
            packed(image)
            seconds.append(time.perf_counter() - start)
        median, name = statistics.median(seconds[1:]), native.processor()[0]
        return f"packed {size / 1e6:.2f} MB; {median * 1e3:.1f} ms an image with {packed.threads} threads of {name}"


def _of_run(folder: Path) -> tuple[str, str, list[str]]:
    """What a model was trained on, what it started from, and by which words, as its run's folder says; or nothing."""
    config, machine = folder / "config.yaml", folder / "environment.json"
    if not (config.exists() and machine.exists()):  # one alone may be anybody's
        return "", "", []
    try:
        kept = read_mapping(config)
        words = json.loads(existing(machine).read_text())["command"][1:]
        data = kept.get("data", {})
        name = Path(str(data.get("root") or data.get("source", "unknown"))).name if kept else ""
        start = str(kept.get("init") or "") or "random weights" * bool(kept)
        return name, start, [str(word) for word in words]
    except Exception as error:  # they may hold anything
        raise ValueError(f"{folder}: wanted the files of a run: {error}") from error


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
