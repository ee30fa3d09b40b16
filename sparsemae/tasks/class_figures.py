"""What a classifier's evaluation says, in numpy: figures of all images and of each class."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

PER_CLASS = ("recall", "precision")


def figures(targets: NDArray[np.int64], best: NDArray[np.int64], class_names: Sequence[str]) -> dict[str, float]:
    """Top-1, top-5, the standard error of top-1, and each class's recall and precision, as fractions.

    By the number of the class, ``recall/3``: two may have one name, as ImageNet's cranes. A class without images has no
    recall, one that is never predicted no precision: nan.
    """
    classes, right = len(class_names), best == targets[:, None]
    top1 = float(right[:, 0].mean())
    found = {"top1": top1, "top5": float(right.any(axis=1).mean())}
    found["standard_error"] = math.sqrt(top1 * (1 - top1) / len(targets))
    hits, support, predicted = (
        np.bincount(one, minlength=classes) for one in (targets[right[:, 0]], targets, best[:, 0])
    )
    with np.errstate(invalid="ignore"):
        for name, values in zip(PER_CLASS, (hits / support, hits / predicted), strict=True):
            found |= {f"{name}/{number}": float(x) for number, x in enumerate(values)}
    return found


def details(class_names: Sequence[str], metrics: Mapping[str, float]) -> list[str]:
    """A line for each class."""
    rows: list[tuple[str, ...]] = [("", *PER_CLASS)]
    for number, name in enumerate(class_names):
        values = (metrics[f"{kind}/{number}"] for kind in PER_CLASS)
        rows.append((name, *("none" if math.isnan(value) else f"{value:.2%}" for value in values)))
    width = max(map(len, class_names))
    return [f"  {name:<{width}} {recall:>9} {precision:>9}" for name, recall, precision in rows]


def summary(metrics: Mapping[str, float]) -> str:
    """The metrics of all classes in one line."""
    return f"top-1 {metrics['top1']:.2%} ± {metrics['standard_error']:.2%}, top-5 {metrics['top5']:.2%}"
