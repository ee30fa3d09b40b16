"""How everything here is timed and shown: subjects take turns, medians count."""

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median


def seconds(work: Callable[[], object]) -> float:
    """That some work takes."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def take_turns(works: Mapping[str, Callable[[], float]], runs: int) -> dict[str, float]:
    """Median of the figures that each gives in ``runs`` turns, every other one backwards, after one for warming up."""
    figures: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(runs + 1):
        for name in list(works)[:: -1 if turn % 2 else 1]:
            figures[name].append(works[name]())
    return {name: median(counted) for name, (_, *counted) in figures.items()}


def aligned(rows: Sequence[Sequence[str]], texts: int) -> str:
    """Rows of cells as a text table; the first ``texts`` columns hold words, the others numbers."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = [str.ljust if i < texts else str.rjust for i in range(len(widths))]
    return "\n".join("  ".join(map(lambda side, *cell: side(*cell), sides, row, widths)) for row in rows)
