"""What came out of a demo's stages, as tables for the screen and for Markdown."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Column, Table

from sparsemae.sparsity import summarize
from sparsemae.study.stages import Stage
from sparsemae.tasks.loading import load_model

Arms = dict[str, list[dict[str, Any]]]
"""By its title, each arm's metrics and parameters, one row for every seed."""
Rows = Sequence[Sequence[str]]


def read_arms(stages: Sequence[Stage], out: Path) -> Arms:
    """Of the finetuning stages among those that ran."""
    arms: Arms = {}
    for stage in (stage for stage in stages if stage.job != "pretrain"):
        model, card = load_model(out / stage.name)
        summary = summarize(model)
        sizes = {"kept": summary.kept + summary.dense_total, "total": summary.sparse_total + summary.dense_total}
        arms.setdefault(stage.title, []).append({**card.metrics, **sizes, "seed": stage.seed})
    return arms


def ranked(arms: Arms, metric: str) -> list[tuple[str, list[dict[str, Any]]]]:
    """Best first, by the mean over the seeds."""
    return sorted(arms.items(), key=lambda arm: -statistics.mean(run[metric] for run in arm[1]))


def sizes(run: dict[str, Any]) -> tuple[str, str]:
    """The cells of `SIZES`."""
    return f"{run['kept']:,}", f"{run['total']:,}"


SIZES = ("parameters kept", "in training")


def table(title: str, headings: Sequence[str], rows: Rows) -> Table:
    """The first column holds words, the others numbers."""
    result = Table(headings[0], *(Column(heading, justify="right") for heading in headings[1:]), title=f"\n{title}")
    for cells in rows:
        result.add_row(*cells)
    return result


def markdown(headings: Sequence[str], rows: Rows) -> str:
    """The same for a document."""
    lines = [headings, ("---", *["---:"] * (len(headings) - 1)), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
