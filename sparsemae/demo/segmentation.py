"""The demo's segmentation: the paper's arms, and SparseMAE against the same network from scratch at three seeds.

The masks are computed from the images, not drawn by people (`data/embedded.py`): the figures say how the arms compare,
nothing about segmenting photographs.
"""

import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from rich.console import Console

from sparsemae.commands.predict import predict
from sparsemae.demo.results import SIZES, Arms, Rows, ranked, sizes
from sparsemae.demo.stages import DENSE, PRETRAINING, SMALL, Stage
from sparsemae.options import PredictConfig

OUT, MINUTES = "runs/demo-segment", 12.0
ENDING_SECONDS = 20.0
"""Set aside for predictions and the tables."""
INTRODUCTION = (
    "Segmentation of Fashion-MNIST images (28 x 28) into 10 garments and background, 1,000 of them labeled, 2:32 "
    "sparse.\nThe masks are computed from the images, not drawn by people.\n"
)
TITLE = "On the 10,000 test images, after 10 epochs on 1,000 labeled ones"
HEADINGS = ("trained", "seeds", "mIoU", "± s.e.", "pixel accuracy", *SIZES)
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


def rows(arms: Arms) -> Rows:
    """Cells of the table, best first; means over the seeds."""
    cells = []
    for title, runs in ranked(arms, "miou"):
        scores, accuracies = ([run[metric] for run in runs] for metric in ("miou", "pixel_accuracy"))
        error = f"{statistics.stdev(scores) / math.sqrt(len(scores)):.1%}" if len(scores) > 1 else ""
        means = (f"{statistics.mean(scores):.1%}", error, f"{statistics.mean(accuracies):.1%}")
        cells.append((title, str(len(runs)), *means, *sizes(runs[0])))
    return cells


def finish(arms: Arms, out: Path, images: Path, seed: int, console: Console) -> str:
    """Print the paired comparison, draw what SparseMAE makes of ``images``; returns what results.md says besides."""
    study = Paired.of(*([run["miou"] for run in arms[title]] for title in (OURS, SCRATCH)))
    print(f"{study}\n\nMasks and overlays of test images, in {out}/predictions:")
    predict(PredictConfig(f"{out}/segment-sparse-0", [str(images)], top_k=2, pictures=f"{out}/predictions"))
    return f"\n{study}\n"


@dataclass(frozen=True)
class Paired:
    """SparseMAE less the same network from scratch, in points of mIoU, at equal steps and seeds."""

    differences: list[float]
    """One for each seed."""
    mean: float
    error: float
    """Standard error of the mean over the seeds."""

    @classmethod
    def of(cls, ours: list[float], theirs: list[float]) -> Self:
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
