"""The demo's segmentation: the paper's arms, and SparseMAE against the same network from scratch at three seeds.

The masks are computed from the images, not drawn by people (`data/embedded.py`): the figures say how the arms compare,
nothing about segmenting photographs.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sparsemae.commands.predict import predict
from sparsemae.demo.stages import DENSE, PRETRAINING, SMALL, Stage, cores, left_out, run_stages
from sparsemae.files import write_atomic
from sparsemae.options import PredictConfig
from sparsemae.sparsity import summarize
from sparsemae.tasks.loading import load_model

ENDING_SECONDS = 20.0
"""Set aside for predictions and the tables."""
SEEDS = 3
OURS, SCRATCH = "SparseMAE", "sparse from scratch"
PAIRED = [
    stage
    for seed in range(SEEDS)
    for stage in (
        Stage(f"segment-sparse-{seed}", "segment", OURS, (), "pretrain-sparse", True, seed=seed),
        Stage(f"scratch-sparse-{seed}", "segment", SCRATCH, required=True, seed=seed),
    )
]
STAGES = [  # in order of starting
    *PRETRAINING,
    *PAIRED,
    Stage("segment-srste", "segment", "dense MAE -> SR-STE", (), "pretrain-dense"),
    Stage("segment-oneshot", "segment", "dense MAE -> one-shot mask", ("--sparse.mask", "fixed"), "pretrain-dense"),
    Stage("segment-dense", "segment", "big dense with MAE", DENSE, "pretrain-dense"),
    Stage("segment-small", "segment", "small dense with MAE", SMALL, "pretrain-small"),
    Stage("scratch-small", "segment", "small dense from scratch", SMALL),
]
HEADINGS = ("trained", "seeds", "mIoU", "± s.e.", "pixel accuracy", "parameters kept", "in training")


def demo_segment(out: Path, seed: int, minutes: float, images: Path, console: Console) -> None:
    """Run the arms, print what came out, and draw what SparseMAE makes of the ``images``."""
    begin = time.monotonic()
    console.print(
        "Segmentation of Fashion-MNIST images (28 x 28) into 10 garments and background, 1,000 of them labelled, 2:32 "
        "sparse.\nThe masks are computed from the images, not drawn by people.\n"
    )
    done = run_stages(STAGES, out, seed, begin + 60 * minutes - ENDING_SECONDS, console)
    arms: dict[str, list[dict[str, Any]]] = {}
    for stage in (stage for stage in STAGES if stage.job == "segment" and stage.name in done):
        arms.setdefault(stage.title, []).append(_result(out / stage.name))

    rows = _rows(arms)
    table = Table(HEADINGS[0], title="\nOn the 10,000 test images, after 10 epochs on 1,000 labelled ones")
    for heading in HEADINGS[1:]:
        table.add_column(heading, justify="right")
    for cells in rows:
        table.add_row(*cells)
    console.print(table)
    study = Paired.of([run["miou"] for run in arms[OURS]], [run["miou"] for run in arms[SCRATCH]])
    console.print(str(study), highlight=False)
    console.print(f"\nMasks and overlays of test images, in {out}/predictions:")
    predict(PredictConfig(f"{out}/segment-sparse-0", [str(images)], 2, f"{out}/predictions"))
    console.print(left_out(STAGES, done, minutes))
    seconds = time.monotonic() - begin
    console.print(f"{seconds:.0f} s on {cores()} cores")
    lines = [HEADINGS, ("---", *["---:"] * (len(HEADINGS) - 1)), *rows]
    markdown = "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
    write_atomic(out / "results.md", f"{markdown}\n{study}\n")
    write_atomic(out / "results.json", json.dumps({"seconds": seconds, "arms": arms}, indent=1))


@dataclass(frozen=True)
class Paired:
    """SparseMAE less the same network from scratch, in points of mIoU, at equal steps and seeds."""

    differences: list[float]
    """One for each seed."""
    mean: float
    error: float
    """Standard error of the mean over the seeds."""

    @classmethod
    def of(cls, ours: list[float], theirs: list[float]) -> Paired:
        """From fractions, in the order of the seeds."""
        differences = [100 * (a - b) for a, b in zip(ours, theirs, strict=True)]
        error = statistics.stdev(differences) / math.sqrt(len(differences))
        return cls(differences, statistics.mean(differences), error)

    def __str__(self) -> str:
        each = ", ".join(f"{difference:+.2f}" for difference in self.differences)
        verdict = "more than" if abs(self.mean) > 2 * self.error else "within"
        return (
            f"{OURS} against {SCRATCH}, at equal steps and {len(self.differences)} equal seeds: {self.mean:+.2f} ± "
            f"{self.error:.2f} points of mIoU ({each}; paired, standard error): {verdict} two standard errors."
        )


def _result(folder: Path) -> dict[str, Any]:
    model, card = load_model(folder, "segment")
    summary = summarize(model)
    kept, total = summary.kept + summary.dense_total, summary.sparse_total + summary.dense_total
    return {**card.metrics, "kept": kept, "total": total}


def _rows(arms: dict[str, list[dict[str, Any]]]) -> list[tuple[str, ...]]:
    """Cells of the table, best first; means over the seeds."""

    def mean(runs: list[dict[str, Any]], key: str) -> float:
        return float(statistics.mean(run[key] for run in runs))

    rows: list[tuple[str, ...]] = []
    for title, runs in sorted(arms.items(), key=lambda arm: -mean(arm[1], "miou")):
        scores = [run["miou"] for run in runs]
        error = f"{statistics.stdev(scores) / math.sqrt(len(scores)):.1%}" if len(scores) > 1 else ""
        means = (f"{mean(runs, 'miou'):.1%}", error, f"{mean(runs, 'pixel_accuracy'):.1%}")
        rows.append((title, str(len(runs)), *means, f"{runs[0]['kept']:,}", f"{runs[0]['total']:,}"))
    return rows
