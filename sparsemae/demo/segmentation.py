"""The demo's segmentation: the paper's arms, and SparseMAE against the same network from scratch at three seeds.

The masks are computed from the images, not drawn by people (`data/embedded.py`): the figures say how the arms compare,
nothing about segmenting photographs.
"""

import math
import statistics
from pathlib import Path

from rich.console import Console

from sparsemae.commands.predict import predict
from sparsemae.demo.results import SIZES, Arms, Rows, ranked, sizes
from sparsemae.demo.stages import DENSE, PRETRAINING, SMALL
from sparsemae.options import PredictConfig
from sparsemae.study.stages import Stage
from sparsemae.study.statistics import Paired

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
    study = paired(arms)
    print(f"{study}\n\nMasks and overlays of test images, in {out}/predictions:")
    predict(PredictConfig(f"{out}/segment-sparse-0", [str(images)], top_k=2, pictures=f"{out}/predictions"))
    return f"\n{study}\n"


def paired(arms: Arms) -> str:
    """SparseMAE less the same network from scratch, in points of mIoU, at equal steps and seeds, in one sentence."""
    ours, theirs = ({run["seed"]: run["miou"] for run in arms[title]} for title in (OURS, SCRATCH))
    pair = Paired.of(ours, theirs)
    each = ", ".join(f"{difference:+.2f}" for difference in pair.differences)
    low, high = pair.interval
    return (
        f"{OURS} less {SCRATCH}, at equal steps and {len(pair.differences)} equal seeds: {pair.mean:+.2f} ± "
        f"{pair.error:.2f} points of mIoU ({each}; paired, standard error), 95 % interval {low:+.2f} to {high:+.2f}."
    )
