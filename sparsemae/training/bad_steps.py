"""Optimizer steps whose loss or gradient is not finite: skipped, counted, and written down with their images."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass
class BadSteps:
    """How many there were."""

    total: int = 0
    in_a_row: int = 0

    def count(self, bad: bool) -> None:
        """Take note of a step."""
        self.in_a_row = self.in_a_row + 1 if bad else 0
        self.total += bad


def bad_record(losses: Tensor, indices: Tensor, filename: Callable[[int], str]) -> list[dict[str, Any]]:
    """The micro-batches of a bad step whose own loss is not finite, or else all of them, and their images.

    Args:
        losses: ``[W, K]``, of each process and micro-batch.
        indices: ``[W, K, B]``, the images.
        filename: an image's name.
    """
    finite = losses.isfinite()
    suspects = finite if finite.all() else ~finite
    return [
        {
            "number": number * len(losses) + rank,
            "loss": str(float(losses[rank, number])),
            "images": {index: filename(index) for index in indices[rank, number].tolist()},
        }
        for rank, number in suspects.nonzero().tolist()
    ]
