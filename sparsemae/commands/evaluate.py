"""Figures of a trained or packed model on a validation split, each image counted once.

Packed classifiers are measured here, in numpy: the bare install has no torch. All else is `evaluate_run`.
"""

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sparsemae.data.sources import find_source
from sparsemae.data.splits import Source
from sparsemae.limits import with_values
from sparsemae.options import EvaluateConfig, SourceConfig
from sparsemae.packing.format import is_packed
from sparsemae.predictor import NotFiniteError, require_finite
from sparsemae.processors import processors
from sparsemae.renamed import OPTIONS, renamed
from sparsemae.tasks.class_figures import details, figures, summary
from sparsemae.terminal import printable

if TYPE_CHECKING:
    from sparsemae.runtime import Model

BATCH = 64


def evaluate(config: EvaluateConfig) -> dict[str, float]:
    """Print and return the metrics of the model's task as fractions; of a classifier's probe, its accuracy."""
    config = replace(config, data=own_data(config.model, config.data))
    packed = is_packed(config.model)
    if packed and config.probe is not None:
        raise ValueError(f"model: wanted a run or its weights with --probe, got a packed file: {config.model}")
    predictor = _packed(config.model) if packed else None
    if predictor is None or predictor.card.task != "classify":
        from sparsemae.commands.evaluate_run import evaluate_run

        return evaluate_run(config)
    card = predictor.card
    if not card.class_names:
        got = "one without" if predictor.vit.num_classes else "an encoder"
        raise ValueError(f"{config.model}: wanted a classifier with the names of its classes, got {got}")
    if any(value is not None for value in vars(config.inference).values()):
        raise ValueError(f"inference: wanted none for a model for {card.task}, got {config.inference}")
    if config.data.exif and card.input.exif is False:
        raise ValueError(f"data.exif: wanted what {config.model} was trained with, false, got true")
    source, said = find_source(config.data).open_for_evaluation(config.split, card.data, card.class_names)
    print(printable(said), file=sys.stderr)
    try:
        metrics = figures(*outcomes(predictor, source), card.class_names)
    except NotFiniteError as error:
        raise ValueError(f"{config.model}: {error}") from error
    print(*map(printable, details(card.class_names, metrics)), sep="\n")
    print(printable(f"{config.model}: {summary(metrics)} on {len(source):,} images"))
    return metrics


def _packed(file: str) -> "Model":
    from sparsemae.runtime import load  # the native library, which a run does not want

    return load(file)


def outcomes(predictor: "Model", source: Source) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Classes [N], and the five likeliest by the model [N, 5], best first.

    Threads read and prepare what comes next while the model computes. Raises ValueError if images are unreadable, or
    logits not finite.
    """
    targets, best, failed = list[int](), list[NDArray[np.int64]](), list[str]()

    def prepared(index: int) -> Any:
        try:
            image, target = source.read(index, predictor.smallest_side, predictor.card.input)
            return predictor.prepare(image), target
        except ValueError as error:
            return error

    with ThreadPoolExecutor(processors()) as pool:
        for batch in _ahead(pool, prepared, len(source)):
            failed += [str(one) for one in batch if isinstance(one, ValueError)]
            if found := [one for one in batch if not isinstance(one, ValueError)]:
                logits = predictor(np.stack([image for image, _ in found]))
                require_finite(np.isfinite(logits).all())
                best.append(np.argsort(-logits, axis=1, kind="stable")[:, :5])
                targets += [target for _, target in found]
    if failed:
        hint = "sparsemae check --write-exclude FILE lists them all for data.exclude"
        raise ValueError(f"{failed[0]} ({len(failed):,} of {len(source):,} images cannot be used: {hint})")
    return np.array(targets, np.int64), np.concatenate(best)


def _ahead(pool: ThreadPoolExecutor, prepared: Any, images: int) -> Iterator[list[Any]]:
    """Batches of results, the next one under way."""
    starts = range(0, images, BATCH)
    waiting = [[pool.submit(prepared, i) for i in range(starts[0], min(BATCH, images))]]
    for start in starts:
        following = range(start + BATCH, min(start + 2 * BATCH, images))
        waiting.append([pool.submit(prepared, i) for i in following])
        yield [one.result() for one in waiting.pop(0)]


def own_data(model: str, data: SourceConfig) -> SourceConfig:
    """Where to evaluate: what is named, or else the data that the model's run was trained on, as its folder says."""
    if data.root is not None or not data.auto:
        return data
    path, plain = Path(model), SourceConfig()
    for folder in (path, *path.absolute().parents[:3]):  # of a file, or of a checkpoint
        if (folder / "config.yaml").is_file() and (folder / "environment.json").is_file():
            from sparsemae.plain_yaml import read_mapping

            kept = renamed(read_mapping(folder / "config.yaml"), OPTIONS).get("data", {})
            if not isinstance(kept, dict):
                raise ValueError(f"{folder}/config.yaml: data: wanted names and values, got {type(kept).__name__}")
            names = ({f.name for f in fields(SourceConfig)} & kept.keys()) - {"workers", "exif", "download"}
            own = {f"data.{name}": kept[name] for name in names if getattr(data, name) == getattr(plain, name)}
            found = with_values(EvaluateConfig(model, data), own).data
            if found.root is not None and not Path(found.root).exists() and "{" not in found.root:
                raise ValueError(f"{model}: its images are no longer in {found.root}: wanted --data.root")
            return found
    return data
