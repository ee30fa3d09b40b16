"""The whole chain on the embedded images: pretrain, finetune, freeze, evaluate, predict, with the paper's baselines."""

import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from sparsemae.commands.evaluate import evaluate
from sparsemae.commands.pack import pack
from sparsemae.commands.predict import predict
from sparsemae.data.embedded import CLASS_NAMES, EmbeddedReader
from sparsemae.demo.segmentation import demo_segment
from sparsemae.demo.stages import DENSE, PRETRAINING, SMALL, Stage, cores, empty, left_out, run_stages
from sparsemae.files import write_atomic
from sparsemae.options import DemoConfig, EvaluateConfig, PackConfig, PredictConfig, SourceConfig
from sparsemae.report.plots import reconstruction_picture
from sparsemae.runtime import load
from sparsemae.sparsity import summarize
from sparsemae.tasks.loading import load_model, load_predictor

PREDICTED_IMAGES = 5
ENDING_SECONDS = 35.0
"""Set aside for evaluation, predictions and the picture."""


STAGES = [  # in order of starting
    *PRETRAINING,
    Stage("finetune-sparse", "finetune", "SparseMAE", (), "pretrain-sparse", True),
    Stage("finetune-srste", "finetune", "dense MAE -> SR-STE", (), "pretrain-dense"),
    Stage("finetune-small", "finetune", "small dense with MAE", SMALL, "pretrain-small"),
    Stage("finetune-oneshot", "finetune", "dense MAE -> one-shot mask", ("--sparse.mask", "fixed"),
          "pretrain-dense"),
    Stage("scratch-sparse", "finetune", "sparse from scratch"),
    Stage("scratch-small", "finetune", "small dense from scratch", SMALL),
    Stage("finetune-dense", "finetune", "big dense with MAE", (*DENSE, "--optim.lr", "2e-3"),
          "pretrain-dense"),
]  # fmt: skip


def demo(config: DemoConfig) -> None:
    """Run the chain and print what came out."""
    console = Console(highlight=False, soft_wrap=True)
    segment = config.task == "segment"
    out = Path(config.out or ("runs/demo-segment" if segment else "runs/demo"))
    minutes = config.minutes or (12.0 if segment else 6.0)
    empty(out)
    images = _write_test_images(out / "images")
    run = demo_segment if segment else _demo_classify
    run(out, config.seed, minutes, images, console)


def _demo_classify(out: Path, seed: int, minutes: float, images: Path, console: Console) -> None:
    begin = time.monotonic()
    console.print("SparseMAE on 10,000 unlabelled and 1,000 labelled Fashion-MNIST images (28 x 28), 2:32 sparse\n")
    done = run_stages(STAGES, out, seed, begin + 60 * minutes - ENDING_SECONDS, console)

    console.print("\nThe frozen sparse model, from its file, on the 10,000 test images:")
    evaluate(EvaluateConfig(f"{out}/finetune-sparse", SourceConfig(workers=0)))
    console.print("\nPredictions on test images:")
    predict(PredictConfig(f"{out}/finetune-sparse", [str(images)]))

    results = {
        stage.name: _result(out / stage.name) for stage in STAGES if stage.job == "finetune" and stage.name in done
    }
    console.print(_table(results))
    for line in _verdicts(results):
        console.print(line)
    console.print(left_out(STAGES, done, minutes))
    picture = out / "reconstructions.png"
    reconstruction_picture(*load_model(out / "pretrain-sparse", "pretrain"), picture, seed)
    console.print(f"\nPicture: {picture} (originals, masked, reconstructed by the sparse and by the full weights)")
    console.print("\nPacked, to run on any CPU without torch:")
    packed = out / "packed.safetensors"
    pack(PackConfig(f"{out}/finetune-sparse", str(packed), data=SourceConfig()))
    console.print(_speed_table(packed, [out / name for name in ("finetune-sparse", "finetune-small") if name in done]))
    console.print(f"Try: sparsemae predict {packed} {out}/images")
    seconds = time.monotonic() - begin
    console.print(f"{seconds:.0f} s on {cores()} cores")
    write_atomic(out / "results.json", json.dumps({"seconds": seconds, "arms": results}, indent=1))
    write_atomic(out / "results.md", _markdown(results))


def _write_test_images(folder: Path) -> Path:
    folder.mkdir()
    reader = EmbeddedReader("val")
    for index in range(PREDICTED_IMAGES):
        image, label = reader[index]
        image.save(folder / f"{index}-{CLASS_NAMES[label].replace('/', '-').replace(' ', '-').lower()}.png")
    return folder


def _result(folder: Path) -> dict[str, Any]:
    model, card = load_model(folder, "classify")
    title = next(stage.title for stage in STAGES if stage.name == folder.name)
    summary, metrics = summarize(model), card.metrics
    return {
        "title": title, "top1": metrics["top1"], "standard_error": metrics["standard_error"],
        "kept": summary.kept + summary.dense_total, "total": summary.sparse_total + summary.dense_total,
    }  # fmt: skip


HEADINGS = ("trained", "top-1", "± s.e.", "parameters kept", "in training")


def _rows(results: dict[str, dict[str, Any]]) -> list[tuple[str, ...]]:
    """Cells of the table, best first."""
    return [
        (row["title"], f"{row['top1']:.1%}", f"{row['standard_error']:.1%}", f"{row['kept']:,}", f"{row['total']:,}")
        for row in sorted(results.values(), key=lambda row: -row["top1"])
    ]


def _table(results: dict[str, dict[str, Any]]) -> Table:
    table = Table(HEADINGS[0], title="\nTest accuracy after 20 epochs on 1,000 labelled images (10,000 test images)")
    for heading in HEADINGS[1:]:
        table.add_column(heading, justify="right")
    for cells in _rows(results):
        table.add_row(*cells)
    return table


def _markdown(results: dict[str, dict[str, Any]]) -> str:
    lines = [HEADINGS, ("---", *["---:"] * (len(HEADINGS) - 1)), *_rows(results)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _speed_table(packed: Path, runs: list[Path]) -> Table:
    """Size and time per image of the packed model and of dense ones in torch: one thread, taking turns, medians."""
    torch.set_num_threads(1)
    runtime = load(packed, threads=1)
    shape = runtime.vit
    forwards: dict[str, tuple[Path, Callable[[np.ndarray], Any]]] = {"packed bf16": (packed, runtime)}
    for run in runs:
        model = load_predictor(run).model
        title = f"dense, embedding dimension {model.embed_dim}, torch fp32"
        forwards[title] = run / "model.safetensors", _torch_forward(model)
    times: dict[tuple[str, int], list[float]] = {}
    for batch in (1, 8):
        images = np.random.default_rng(0).standard_normal((batch, 3, shape.image_height, shape.image_width), np.float32)
        for _ in range(31):
            for title, (_, forward) in forwards.items():
                begin = time.perf_counter()
                forward(images)
                times.setdefault((title, batch), []).append(1e6 * (time.perf_counter() - begin))
    table = Table("model", title="\nSize, and time per call on one thread")
    for heading in ("file, kB", "1 image, µs", "8 images, µs"):
        table.add_column(heading, justify="right")
    for title, (file, _) in forwards.items():
        medians = (f"{statistics.median(times[title, batch]):,.0f}" for batch in (1, 8))
        table.add_row(title, f"{file.stat().st_size / 1000:,.0f}", *medians)
    return table


def _torch_forward(model: nn.Module) -> Callable[[np.ndarray], Any]:
    @torch.inference_mode()
    def forward(images: np.ndarray) -> Any:
        return model(torch.from_numpy(images))

    return forward


def _verdicts(results: dict[str, dict[str, Any]]) -> list[str]:
    """SparseMAE against each baseline, within the error or not."""
    ours = results["finetune-sparse"]
    lines = []
    for row in (row for row in results.values() if row is not ours):
        difference = ours["top1"] - row["top1"]
        error = math.hypot(ours["standard_error"], row["standard_error"])
        verdict = (
            "within two standard errors" if abs(difference) < 2 * error else "better" if difference > 0 else "worse"
        )
        lines.append(f"  {100 * difference:+5.1f} ± {100 * error:.1f} points, {verdict:<26} against {row['title']}")
    return [
        "SparseMAE's difference (standard errors are of the test set; one training seed, whose spread they lack):",
        *lines,
    ]
