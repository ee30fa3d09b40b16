"""Paired differences over seeds, and what may be claimed of them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Self

T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Two-sided 95 % quantiles of Student's t at 1, 2, ... degrees of freedom."""


@dataclass(frozen=True)
class Paired:
    """One arm less another at equal seeds, in points."""

    differences: list[float]
    """One for each seed."""

    @classmethod
    def of(cls, ours: Mapping[int, float], theirs: Mapping[int, float]) -> Self:
        """From fractions by seed; seeds that only one has are left out."""
        return cls([100 * (ours[seed] - theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())])

    @property
    def mean(self) -> float:
        """Points."""
        return fmean(self.differences)

    @property
    def error(self) -> float:
        """Standard error of the mean over the seeds; infinite with one seed."""
        count = len(self.differences)
        return stdev(self.differences) / math.sqrt(count) if count > 1 else math.inf

    @property
    def interval(self) -> tuple[float, float]:
        """95 % t-interval of the mean."""
        half = T95[len(self.differences) - 2] * self.error if len(self.differences) > 1 else math.inf
        return self.mean - half, self.mean + half

    @property
    def order(self) -> int:
        """1: ours is better, -1: worse, 0: the interval holds 0, and no order is claimed."""
        low, high = self.interval
        return (low > 0) - (high < 0)
