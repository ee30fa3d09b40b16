"""A finished training's figures: the frozen model on the validation images again, and once on a test split."""

import json
import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from sparsemae.card import ModelCard
from sparsemae.commands.probe import probe_network
from sparsemae.data.draws import INIT
from sparsemae.data.sampling import seed_all
from sparsemae.files import existing, write_atomic
from sparsemae.tasks.guessing import warning
from sparsemae.tasks.sparse import make_sparse
from sparsemae.tasks.task import Task, smallest_side
from sparsemae.training.run import Run
from sparsemae.training.subject import Fitted


@dataclass(frozen=True)
class Result:
    """A finished training's figures, in result.json of its folder."""

    kept: float
    """The epoch whose weights are written."""
    epochs: float
    """Taken."""
    best: float | None
    """The epoch of the best evaluation; None without any."""
    metrics: dict[str, float]
    """Of what is written, on the validation images, as fractions."""
    last: dict[str, float]
    """Of the last evaluation, before the masks were frozen."""
    test: dict[str, float] | None
    """On the split test, measured once; None: there is none."""
    notes: list[str]
    """What is to be said of the figures, warnings first."""

    def write(self, run: Run) -> None:
        """Into the run's folder."""
        write_atomic(run.folder / "result.json", json.dumps(asdict(self), indent=1))


def measured(run: Run, task: Task[Any], model: nn.Module, fitted: Fitted) -> Result:
    """Measure a finished model, on all processes; of a task without an evaluation there are no figures."""
    kept, epochs, best, metrics = fitted.kept, fitted.epochs, fitted.best, fitted.metrics
    if task.best_by is None:
        return Result(kept, epochs, None, {}, {}, None, [])
    chosen = run.trainer.keep == "best" and (looks := _evaluations(run, task.best_by)) > 1
    if run.trainer.keep == "best":
        metrics = task.evaluate(run.fabric, model.eval())
    metrics = metrics | task.guess(looks if chosen else 1)
    notes = [said] if (said := warning(metrics)) else []
    if best is not None and kept != best:
        notes.append(f"the best was epoch {best:g} of {epochs:g}: --keep best writes that one")
    return Result(kept, epochs, best, metrics, fitted.metrics, None, notes)


def tested(run: Run, task: Task[Any], model: nn.Module, card: ModelCard, result: Result) -> Result:
    """The same with the figures of a test split, where there is one with classes or masks."""
    splits, notes = task.splits, list(result.notes)
    if task.best_by is None and task.config.from_data:
        return replace(result, notes=helped(run, task, model, card))
    if task.best_by is None or splits is None or splits.data.root is None:
        return result
    test: dict[str, float] | None = None
    if "test" in splits.openers:
        try:
            dataset, _ = task.evaluation_set(card, splits.data, smallest_side(model), "test")
            test = task.measure(run.fabric, model.eval(), card, dataset, task.config.data.workers)
            notes.append(f"on the split test, measured once: {task.summary(test)} on {len(dataset):,} images")
        except ValueError as error:  # it has no classes, or an image cannot be read: the model is none the worse
            notes.append(f"the split test was not measured: {error}")
    elif run.trainer.keep == "best":
        notes.append("the epoch was chosen by these images; a split named test would be measured once, at the end")
    return replace(result, test=test, notes=notes)


def helped(run: Run, task: Task[Any], model: nn.Module, card: ModelCard) -> list[str]:
    """Whether a pretraining on images with classes gave better features than random weights: a k-NN vote by both."""
    source = task.sources["train"]
    if len(source.class_names) < 2 or task.config.data.train_images is not None:
        return []
    seed_all(task.config.seed, INIT)
    random = task.build(card)
    make_sparse(random, task.config.sparse)
    found, without = (
        probe_network("knn", network.eval(), card, task.config.data, run.fabric) for network in (model, random)
    )
    gain = found["top1"] - without["top1"]
    clear = abs(gain) > 2 * math.hypot(found["standard_error"], without["standard_error"])
    verdict = ("it helped" if gain > 0 else "it did harm") if clear else "no difference beyond two standard errors"
    return [
        f"k-NN vote by its features on {found['images']:,} held-out images: top-1 {found['top1']:.1%} ± "
        f"{found['standard_error']:.1%}, by random weights {without['top1']:.1%}: {verdict}"
    ]


def _evaluations(run: Run, metric: str) -> int:
    """How many a run has had, whatever its interruptions."""
    file = run.folder / "metrics.jsonl"
    return sum(metric in json.loads(line) for line in existing(file).read_text().splitlines())
