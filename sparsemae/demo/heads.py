"""The demo's heads: SparseMAE's segmentation with UperNet and with the light heads, at equal steps and three seeds.

The masks are those of the demo's segmentation, computed and not drawn by people.
"""

import statistics
from pathlib import Path

from rich.console import Console

from sparsemae.commands.evaluate import evaluate
from sparsemae.commands.pack import pack
from sparsemae.config import read_config
from sparsemae.data.embedded import CLASS_NAMES
from sparsemae.demo import segmentation
from sparsemae.demo.results import SIZES, Arms, Rows
from sparsemae.demo.stages import PRETRAINING
from sparsemae.options import EvaluateConfig, PackConfig, SegmentConfig, SourceConfig
from sparsemae.study.stages import Stage
from sparsemae.study.statistics import Paired
from sparsemae.tasks.segmentation import Segmentation
from sparsemae.tasks.sparse import meta_model

OUT, MINUTES = "runs/demo-heads", 12.0
ENDING_SECONDS = 60.0
"""Set aside for packing and measuring what was packed."""
INTRODUCTION = f"SparseMAE with three heads. {segmentation.INTRODUCTION}"
TITLE = segmentation.TITLE
HEADINGS = ("head", "seeds", "mIoU", "± s.e.", "less UperNet's, points", "pixel accuracy", *SIZES, "multiply-adds")
UPERNET = "UperNet, 32 wide"
HEADS = {
    UPERNET: (),
    "SegFormer, 32 wide": ("--head.kind", "segformer"),
    "linear": ("--head.kind", "linear"),
}
PACKED = "segformer", "linear"
STAGES = [
    *(stage for stage in PRETRAINING if stage.required),
    *(
        Stage(f"{title.split(',')[0].lower()}-{seed}", "segment", title, options, "pretrain-sparse", True, seed=seed)
        for seed in range(segmentation.SEEDS)
        for title, options in HEADS.items()
    ),
]


def rows(arms: Arms) -> Rows:
    """Cells of the table, in the order of the heads; means over the seeds, differences paired by seed."""
    upernet = {run["seed"]: run["miou"] for run in arms[UPERNET]}
    cells = []
    for title, options in HEADS.items():
        scores = {run["seed"]: run["miou"] for run in arms[title]}
        kept, total = (f"{arms[title][0][name]:,}" for name in ("kept", "total"))
        pair = Paired.of(scores, upernet)
        against = "" if title == UPERNET else f"{pair.mean:+.2f} ± {pair.error:.2f}"
        accuracy = statistics.mean(run["pixel_accuracy"] for run in arms[title])
        error = statistics.stdev(scores.values()) / len(scores) ** 0.5
        miou = statistics.mean(scores.values())
        measured = (f"{miou:.1%}", f"{error:.1%}", against, f"{accuracy:.1%}")
        cells.append((title, str(len(scores)), *measured, kept, total, f"{multiply_adds(options) / 1e6:.2f} M"))
    return cells


def multiply_adds(options: tuple[str, ...]) -> int:
    """Of an image, with the kept weights, encoder and head."""
    task = Segmentation(read_config(SegmentConfig, ["--config", "demo_segment", *options]))
    task.class_names = [*CLASS_NAMES, "background"]
    return sum(forward.total.kept for forward in task.forwards(meta_model(task)))


def finish(arms: Arms, out: Path, images: Path, seed: int, console: Console) -> str:
    """Pack a light model of each kind and measure the files beside their runs; returns what results.md says besides."""
    lines = []
    for kind in PACKED:
        run, file = out / f"{kind}-0", out / f"{kind}.safetensors"
        pack(PackConfig(str(run), str(file)))
        packed = evaluate(EvaluateConfig(str(file), SourceConfig("embedded", workers=0)))["miou"]
        own = next(run["miou"] for title, found in arms.items() if title.lower().startswith(kind) for run in found)
        size = file.stat().st_size / 1000
        lines.append(
            f"{kind} packed: {size:.1f} kB, mIoU {packed:.2%}, in torch {own:.2%} ({100 * (packed - own):+.3f})"
        )
    return f"\nOf the first seed, {'; '.join(lines)}.\n"
