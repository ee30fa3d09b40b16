"""The demo's classification: SparseMAE beside the paper's baselines, then evaluated, drawn, packed and timed."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from sparsemae.benchmark.timing import seconds, take_turns
from sparsemae.commands.evaluate import evaluate
from sparsemae.commands.pack import pack
from sparsemae.commands.predict import predict
from sparsemae.data.sources import open_source
from sparsemae.demo.results import SIZES, Arms, Rows, ranked, sizes, table
from sparsemae.demo.stages import DENSE, PRETRAINING, SMALL
from sparsemae.options import EvaluateConfig, PackConfig, PredictConfig, SourceConfig
from sparsemae.report.plots import reconstruction_picture
from sparsemae.runtime import load
from sparsemae.study.stages import Stage
from sparsemae.tasks.loading import TorchPredictor, load_model

OUT, MINUTES = "runs/demo", 6.0
ENDING_SECONDS = 35.0
"""Set aside for evaluation, predictions and the picture."""
INTRODUCTION = "SparseMAE on 10,000 unlabeled and 1,000 labeled Fashion-MNIST images (28 x 28), 2:32 sparse\n"
TITLE = "Test accuracy after 20 epochs on 1,000 labeled images (10,000 test images)"
HEADINGS = ("trained", "top-1", "± s.e.", *SIZES)
OURS = "SparseMAE"
STAGES = [  # in order of starting
    *PRETRAINING,
    Stage("finetune-sparse", "finetune", OURS, (), "pretrain-sparse", True),
    Stage("finetune-srste", "finetune", "dense MAE -> SR-STE", (), "pretrain-dense"),
    Stage("finetune-small", "finetune", "small dense with MAE", SMALL, "pretrain-small"),
    Stage("finetune-oneshot", "finetune", "dense MAE -> one-shot mask", ("--sparse.mask", "fixed"), "pretrain-dense"),
    Stage("scratch-sparse", "finetune", "sparse from scratch"),
    Stage("scratch-small", "finetune", "small dense from scratch", SMALL),
    Stage("finetune-dense", "finetune", "big dense with MAE", (*DENSE, "--optim.lr", "2e-3"), "pretrain-dense"),
]


def rows(arms: Arms) -> Rows:
    """Cells of the table, best first."""
    return [
        (title, f"{run['top1']:.1%}", f"{run['standard_error']:.1%}", *sizes(run))
        for title, (run,) in ranked(arms, "top1")
    ]


def finish(arms: Arms, out: Path, images: Path, seed: int, console: Console) -> str:
    """Print what the sparse model is worth, draw its reconstructions, pack it; returns what results.md says besides."""
    run, picture, packed = out / "finetune-sparse", out / "reconstructions.png", out / "packed.safetensors"
    print(_verdicts(arms))
    print("\nThe frozen sparse model, from its file, on the 10,000 test images:")
    evaluate(EvaluateConfig(str(run), SourceConfig(workers=0)))
    print("\nPredictions on test images:")
    predict(PredictConfig(str(run), [str(images)]))
    model, card = load_model(out / "pretrain-sparse", "pretrain")
    reconstruction_picture(model, card, picture, open_source(SourceConfig(), "val"), seed)
    print(f"\nPicture: {picture} (originals, masked, reconstructed by the sparse and by the full weights)")
    print("\nPacked, to run on any CPU without torch:")
    pack(PackConfig(str(run), str(packed), data=SourceConfig()))
    console.print(_speed_table(packed, [run for run in (run, out / "finetune-small") if run.is_dir()]))
    print(f"Try: sparsemae predict {packed} {images}")
    return ""


def _verdicts(arms: Arms) -> str:
    """SparseMAE against each baseline, within the error or not."""
    (ours,) = arms[OURS]
    lines = ["SparseMAE's difference (standard errors are of the test set; one training seed, whose spread they lack):"]
    for title, (row,) in arms.items():
        difference, error = ours["top1"] - row["top1"], math.hypot(ours["standard_error"], row["standard_error"])
        verdict = "better" if difference > 0 else "worse"
        verdict = "within two standard errors" if abs(difference) < 2 * error else verdict
        if row is not ours:
            lines.append(f"  {100 * difference:+5.1f} ± {100 * error:.1f} points, {verdict:<26} against {title}")
    return "\n".join(lines)


def _speed_table(packed: Path, runs: list[Path]) -> Any:
    """Size and time per image of the packed model and of dense ones in torch: one thread, taking turns, medians."""
    torch.set_num_threads(1)
    dense = [(run / "model.safetensors", TorchPredictor(*load_model(run))) for run in runs]
    subjects: dict[str, tuple[Path, Any]] = {"packed bf16": (packed, load(packed, threads=1))} | {
        f"dense, embedding dimension {predictor.model.embed_dim}, torch fp32": (file, predictor)
        for file, predictor in dense
    }
    times, side = [], subjects["packed bf16"][1].card.input.img_size
    for batch in (1, 8):
        images = np.random.default_rng(0).standard_normal((batch, 3, side, side), np.float32)
        works = {title: partial(seconds, partial(predictor, images)) for title, (_, predictor) in subjects.items()}
        times.append(take_turns(works, runs=30))
    rows = [
        (title, f"{file.stat().st_size / 1000:,.0f}", *(f"{1e6 * medians[title]:,.0f}" for medians in times))
        for title, (file, _) in subjects.items()
    ]
    return table("Size, and time per call on one thread", ("model", "file, kB", "1 image, µs", "8 images, µs"), rows)
