"""How many of every m weights each layer keeps, where layers may differ and the network's total stays the same.

A pattern per layer is DominoSearch's idea (Sun et al., NeurIPS 2021). The search is another: an exact knapsack, by
dynamic programming, over the squared weights that the masks would keep.
"""

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from sparsemae.sparsity.pattern import NMPattern


def choices(pattern: NMPattern) -> list[NMPattern]:
    """What a layer may keep of every m instead: n/2, n, 2n or 4n. Raises ValueError if n is odd."""
    if pattern.n % 2:
        raise ValueError(f"sparse.allocation: wanted a pattern whose n can be halved, got {pattern}")
    kept = (pattern.n // 2, pattern.n, 2 * pattern.n, 4 * pattern.n)
    return [NMPattern(n, pattern.m) for n in kept if n <= pattern.m]


def allocate(weights: Mapping[str, Tensor], pattern: NMPattern) -> dict[str, NMPattern]:
    """A pattern for each layer: those that keep the largest sum of squared weights, and as many weights as ``pattern``.

    Args:
        weights: ``[O, I]`` by layer.
        pattern: one for all, of which `choices` are made.
    """
    groups = [weight.numel() // pattern.m for weight in weights.values()]
    unit, possible = math.gcd(*groups), choices(pattern)
    options = []
    for count, weight in zip(groups, weights.values(), strict=True):
        kept = kept_squares(weight, pattern.m)
        options.append([(choice.n * count // unit, kept[choice.n - 1]) for choice in possible])
    taken = knapsack(options, pattern.n * sum(groups) // unit)
    return {name: possible[index] for name, index in zip(weights, taken, strict=True)}


def kept_squares(weight: Tensor, m: int) -> list[float]:
    """For n = 1 to m, the sum of the squares of the n largest weights of every m, in fp64."""
    squares = weight.detach().cpu().double().square().view(-1, m)
    sums: list[float] = squares.sort(dim=1, descending=True).values.sum(dim=0).cumsum(dim=0).tolist()
    return sums


def knapsack(options: Sequence[Sequence[tuple[int, float]]], budget: int) -> tuple[int, ...]:
    """Which (cost, value) to take of each item: those of the largest values whose costs are ``budget`` exactly.

    Of equal values the first found counts. Raises ValueError if there are none of that cost.
    """
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    """By what is spent: the value, and what was taken."""
    for item in options:
        reached: dict[int, tuple[float, tuple[int, ...]]] = {}
        for spent, (value, taken) in best.items():
            for index, (cost, gain) in enumerate(item):
                total = spent + cost
                if total <= budget and (total not in reached or value + gain > reached[total][0]):
                    reached[total] = value + gain, (*taken, index)
        best = reached
    if budget not in best:
        raise ValueError(f"knapsack: wanted choices that cost {budget}, got none")
    return best[budget][1]
