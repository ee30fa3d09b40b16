"""N:M patterns and the masks they select.

``n`` always means *kept*: 2:32 keeps 2 of every 32 consecutive input features of each output row.
Groups run along the last dimension of an ``[O, I]`` weight and never cross a row; reshaping the whole
weight to ``(-1, m)`` would hide an ``I`` that ``m`` does not divide, so that is refused here instead.
What is kept is a `Criterion`'s to say, magnitude by default. Equal scores keep the lower index, on every device and in
every dtype, so that a mask is a function of the weight alone.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsemae.sparsity import passes


@dataclass(frozen=True)
class NMPattern:
    """Keep ``n`` of every ``m`` consecutive input features (SR-STE, arXiv 2102.04010).

    Raises:
        ValueError: if not 1 <= n <= m.
    """

    n: int
    """Weights kept in each group."""
    m: int
    """Group length, in input features."""

    def __post_init__(self) -> None:
        if not 1 <= self.n <= self.m:
            raise ValueError(f"N:M pattern: wanted 1 <= n <= m (n kept of every m), got n={self.n}, m={self.m}")

    @classmethod
    def parse(cls, text: "str | NMPattern") -> "NMPattern":
        """Read ``"2:32"``. ``"32:32"`` is dense. Raises ValueError on anything that is not ``n:m``."""
        if isinstance(text, NMPattern):
            return text
        match = re.fullmatch(r"([+-]?\d+):([+-]?\d+)", text.strip())
        if match is None:
            raise ValueError(f'N:M pattern: wanted "n:m" (n kept of every m, for example "2:32"), got {text!r}')
        return cls(int(match[1]), int(match[2]))

    @property
    def density(self) -> float:
        """Share of weights kept, n / m."""
        return self.n / self.m

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


Criterion = Callable[[Tensor], Tensor]
"""From a latent weight ``[O, I]``, detached, to finite floating-point scores ``[O, I]``: of every ``m`` the ``n``
largest are kept. It is called in each training forward: nothing in it should wait for the device."""


def magnitude(weight: Tensor) -> Tensor:
    """The criterion of SR-STE and SparseMAE: how large a weight is, whatever its sign."""
    return weight.abs()


def nm_mask(weight: Tensor, pattern: NMPattern, name: str = "weight", criterion: Criterion = magnitude) -> Tensor:
    """Select the ``n`` weights of highest score in every group of ``m``; ties keep the lower index.

    Args:
        weight: ``[..., I]``, floating point; groups run along the last dimension.
        name: the layer's name, for messages.
        criterion: what is to be kept, see `Criterion`.

    Returns:
        bool ``[..., I]``, True = kept, exactly ``n`` per group.

    Raises:
        ValueError: if ``m`` does not divide ``I``, a weight or a score is NaN or infinite, or the scores are not one
            floating-point number for each weight.
    """
    check_divides(weight, pattern, name)
    check_finite(weight, name)
    if criterion is not magnitude:
        scores = criterion(weight.detach())
        if scores.shape != weight.shape or not scores.is_floating_point():
            raise ValueError(
                f"{name}: criterion: wanted floating-point scores {list(weight.shape)}, "
                f"got {scores.dtype} {list(scores.shape)}"
            )
        check_finite(scores, f"{name}: criterion", "scores")
    return select_mask(weight, pattern, criterion)


def select_mask(weight: Tensor, pattern: NMPattern, criterion: Criterion = magnitude) -> Tensor:
    """`nm_mask` without its checks, for the training forward (a check for NaN would synchronize the device)."""
    n, m = pattern.n, pattern.m
    if criterion is magnitude and passes.selects(weight, n, m):
        kept: Tensor = passes.select_kept(weight.detach(), n, m)
        return kept
    scores = criterion(weight.detach())
    groups = (scores if criterion is magnitude else scores.clone()).reshape(-1, m)  # overwritten; might be the weight
    if n == m:
        return torch.ones_like(weight, dtype=torch.bool)
    if n <= 8:  # n passes of a maximum: 4 times as fast as a sort at n = 2
        for _ in range(n):  # max() returns the first of equal values
            groups.scatter_(1, groups.max(dim=1, keepdim=True).indices, -math.inf)
        return (groups == -math.inf).view(weight.shape)
    order = groups.sort(dim=1, descending=True, stable=True).indices
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, order[:, :n], True).view(weight.shape)


def check_divides(weight: Tensor, pattern: NMPattern, name: str) -> None:
    """Raise ValueError, naming the layer and both numbers, unless ``m`` divides the last dimension."""
    if weight.shape[-1] % pattern.m:
        raise ValueError(
            f"{name}: pattern {pattern} wants in_features divisible by {pattern.m}, got in_features={weight.shape[-1]}"
        )


def check_finite(weight: Tensor, name: str, what: str = "weights") -> None:
    """Raise ValueError, naming the layer and the row, if a weight is NaN or infinite."""
    if weight.is_meta:
        return
    finite = torch.isfinite(weight.detach())
    if not finite.all():
        where = (~finite).nonzero()[0].tolist()
        raise ValueError(f"{name}: wanted finite {what}, got {weight[tuple(where)].item()} at {where}")


def check_holds(weight: Tensor, mask: Tensor, pattern: NMPattern, name: str) -> None:
    """Raise ValueError unless ``mask`` keeps exactly n per group and ``weight`` is 0 wherever it does not.

    Names the layer, the output row and the group of the first offence.
    """
    check_divides(weight, pattern, name)
    if mask.shape != weight.shape:
        raise ValueError(f"{name}: wanted a mask of shape {list(weight.shape)}, got {list(mask.shape)}")
    check_finite(weight, name)
    kept = mask.reshape(-1, pattern.m).sum(dim=1)
    if not (kept == pattern.n).all():
        group = int((kept != pattern.n).nonzero()[0])
        row, column = divmod(group, weight.shape[-1] // pattern.m)
        raise ValueError(
            f"{name}: wanted {pattern.n} kept of every {pattern.m}, got {int(kept[group])} in row {row}, group {column}"
        )
    stray = (weight.detach() != 0) & ~mask
    if stray.any():
        row, column = stray.reshape(-1, weight.shape[-1]).nonzero()[0].tolist()
        raise ValueError(
            f"{name}: wanted pruned weights to be 0, got {weight.reshape(-1, weight.shape[-1])[row, column].item():.3g}"
            f" in row {row}, group {column // pattern.m}"
        )
