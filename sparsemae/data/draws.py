"""Draws that are functions of a seed and of counters, and the part of a data set that is held out by one."""

from collections.abc import Mapping
from typing import Any

import numpy as np

# One stream per use, so that no two draws share their counters.
ORDER, SAMPLE, STEP, INIT, HOLDOUT, PICTURE = range(6)


def stream(seed: int, *counters: int) -> np.random.Generator:
    """A generator that is a function of its arguments alone (counter-based Philox)."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, *counters))))


def held_out(images: int, rule: Mapping[str, Any], labels: np.ndarray | None = None) -> np.ndarray:
    """Which of a split's images are kept for validation, in order: a share, the same every time.

    With ``labels`` (class numbers, int64 ``[images]``) it has of each class of two images or more that share, one at
    least; a single image stays in training.

    Raises:
        ValueError: an unknown rule, or nothing to hold out.
    """
    if rule["rule"] not in ("permutation", "stratified"):
        raise ValueError(
            f"held-out part: wanted the rule permutation or stratified, got {rule['rule']}: update sparsemae"
        )
    share, order = float(rule["share"]), stream(rule["seed"], HOLDOUT).permutation(images)
    if labels is None:
        held = order[: max(1, int(round(images * share, 6)))]
    else:
        counts = np.bincount(labels)
        wanted = np.where(counts > 1, np.maximum(1, np.minimum(np.rint(counts * share), counts - 1)), 0).astype(int)
        by_class = order[np.argsort(labels[order], kind="stable")]
        rank = np.arange(images) - np.repeat(np.cumsum(counts) - counts, counts)
        held = by_class[rank < np.repeat(wanted, counts)]
    if not len(held):
        raise ValueError("wanted a class of two images or more, one of them for validation, got none")
    return np.sort(held)
