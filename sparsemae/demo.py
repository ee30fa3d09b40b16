"""The whole chain on the embedded images: pretrain, finetune, freeze, evaluate, predict, with the paper's baselines.

Each stage is the very job that a user would type (its command is printed); stages run as many at a time as there are
cores, one thread each, which for models this small is faster than several threads on one. A stage that would not end
within the time limit is left out, and the table says so.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import multiprocessing
import os
import shlex
import shutil
import signal
import statistics
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from sparsemae.config import read_config
from sparsemae.data.embedded import CLASS_NAMES, EmbeddedReader
from sparsemae.data.sources import SourceConfig
from sparsemae.report.plots import reconstruction_picture
from sparsemae.runtime import load
from sparsemae.sparsity import densify, iter_sparse, summarize
from sparsemae.tasks.build import load_autoencoder, load_classifier
from sparsemae.tasks.evaluate import EvaluateConfig, evaluate
from sparsemae.tasks.pack import PackConfig, pack
from sparsemae.tasks.predict import PredictConfig, predict

PREDICTED_IMAGES = 5
ENDING_SECONDS = 35.0
"""Set aside for evaluation, predictions and the picture."""
MARKER = ".sparsemae-demo"
DENSE = ("--sparse.pattern", "dense")
SMALL = (*DENSE, "--model.args", "{patch_size: 7, embed_dim: 32, depth: 4, num_heads: 4}")


@dataclass
class DemoConfig:
    """The whole chain on embedded real images."""

    out: str = "runs/demo"
    """Folder of the demo's runs; emptied first."""
    minutes: float = 6.0
    """Time limit: stages that would not end in time are left out."""
    seed: int = 0
    """Seed of everything random."""


@dataclass(frozen=True)
class Stage:
    """One job of the demo."""

    name: str
    job: str
    title: str
    options: tuple[str, ...] = ()
    init: str | None = None
    """Name of the pretraining stage it starts from."""
    required: bool = False
    cost: float = 1.0
    """Time it takes, relative to the longest stage of its job."""

    def words(self, config: DemoConfig) -> list[str]:
        """Command-line words after ``sparsemae``."""
        words = ["--config", f"demo_{self.job}", "--out", f"{config.out}/{self.name}", "--seed", str(config.seed)]
        if self.job == "finetune":
            words += ["--init", f"{config.out}/{self.init}" if self.init else "null"]
        return words + list(self.options)


STAGES = [  # in order of starting
    Stage("pretrain-sparse", "pretrain", "sparse MAE", required=True),
    Stage("pretrain-dense", "pretrain", "dense MAE", DENSE),
    Stage("pretrain-small", "pretrain", "small dense MAE", SMALL, cost=0.6),
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
    begin = time.monotonic()
    console = Console(highlight=False, soft_wrap=True)
    out = Path(config.out)
    _empty(out)
    console.print("SparseMAE on 10,000 unlabelled and 1,000 labelled Fashion-MNIST images (28 x 28), 2:32 sparse\n")
    done = _run_stages(config, console, begin)

    console.print("\nThe frozen sparse model, from its file, on the 10,000 test images:")
    evaluate(EvaluateConfig(f"{out}/finetune-sparse", SourceConfig(workers=0)))
    console.print("\nPredictions on test images:")
    predict(PredictConfig(f"{out}/finetune-sparse", [str(_write_test_images(out / "images"))]))

    results = {
        stage.name: _result(out / stage.name) for stage in STAGES if stage.job == "finetune" and stage.name in done
    }
    console.print(_table(results))
    for line in _verdicts(results):
        console.print(line)
    left_out = [stage.title for stage in STAGES if stage.name not in done]
    if left_out:
        console.print(f"Left out, for lack of time (--minutes {config.minutes:g}): {'; '.join(left_out)}")
    picture = out / "reconstructions.png"
    model, description = load_autoencoder(out / "pretrain-sparse")
    reconstruction_picture(model, description, picture, config.seed)
    console.print(f"\nPicture: {picture} (originals, masked, reconstructed by the sparse and by the full weights)")
    console.print("\nPacked, to run on any CPU without torch:")
    packed = out / "packed.safetensors"
    pack(PackConfig(f"{out}/finetune-sparse", str(packed), data=SourceConfig()))
    console.print(_speed_table(packed, [out / name for name in ("finetune-sparse", "finetune-small") if name in done]))
    console.print(f"Try: sparsemae predict {packed} {out}/images")
    seconds = time.monotonic() - begin
    console.print(f"{seconds:.0f} s on {_cores()} cores")
    (out / "results.json").write_text(json.dumps({"seconds": seconds, "arms": results}, indent=1))
    (out / "results.md").write_text(_markdown(results))


def _empty(out: Path) -> None:
    """Make the demo's folder, or empty an earlier demo's. Raises ValueError rather than remove other files."""
    if out.exists() and any(out.iterdir()) and not (out / MARKER).is_file():
        raise ValueError(f"--out: {out}: wanted a new folder or that of an earlier demo, got one with other files")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / MARKER).touch()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _run_stages(config: DemoConfig, console: Console, begin: float) -> dict[str, float]:
    """Run what fits into the time limit; returns seconds by stage name."""
    slots, waiting = min(_cores(), 4), list(STAGES)
    running: dict[Future[float], Stage] = {}
    done: dict[str, float] = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(slots, context, _leave_interrupts) as pool, console.status("") as status:
        while waiting or running:
            elapsed = time.monotonic() - begin
            for stage in [stage for stage in waiting if stage.init is None or stage.init in done]:
                if len(running) == slots:
                    break
                waiting.remove(stage)
                if stage.required or elapsed + _estimate(stage, done) < 60 * config.minutes - ENDING_SECONDS:
                    words = stage.words(config)
                    console.print(f"$ sparsemae {stage.job} {shlex.join(words)}", style="dim")
                    running[pool.submit(_run_job, stage.job, words, f"{config.out}/{stage.name}.log")] = stage
            if not running:
                break  # what waits starts from a stage that was left out
            titles = "; ".join(
                f"{stage.title} {_progress(Path(config.out) / stage.name)}" for stage in running.values()
            )
            status.update(f"{elapsed:.0f} s: {titles}")
            try:
                finished = wait(running, timeout=1.0, return_when=FIRST_COMPLETED).done
            except KeyboardInterrupt:
                for worker in multiprocessing.active_children():
                    worker.terminate()
                raise
            for future in finished:
                stage = running.pop(future)
                done[stage.name] = future.result()
                console.print(f"[{time.monotonic() - begin:3.0f} s] {stage.title}: done in {done[stage.name]:.0f} s")
    return done


def _leave_interrupts() -> None:
    """In a worker: Ctrl-C is the parent's, which ends the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _estimate(stage: Stage, done: dict[str, float]) -> float:
    """Seconds a stage will take, from the longest of its job so far."""
    same_job = (seconds for name, seconds in done.items() if _stage(name).job == stage.job)
    return stage.cost * max(same_job, default=0.0)


def _stage(name: str) -> Stage:
    return next(stage for stage in STAGES if stage.name == name)


def _progress(folder: Path) -> str:
    """Epoch that a running stage has reached, from its metrics file."""
    try:
        last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
        return f"(epoch {last['epoch']:.0f})"
    except (OSError, ValueError, IndexError, KeyError):
        return ""


def _run_job(job: str, words: list[str], log: str) -> float:
    """Run one job in this process, single-threaded, its output in a file; returns its seconds."""
    begin = time.monotonic()
    torch.set_num_threads(1)
    module: Any = importlib.import_module(f"sparsemae.tasks.{job}")
    with open(log, "w") as file, contextlib.redirect_stderr(file), contextlib.redirect_stdout(file):
        getattr(module, job)(read_config(getattr(module, f"{job.capitalize()}Config"), words))
    return time.monotonic() - begin


def _write_test_images(folder: Path) -> Path:
    folder.mkdir()
    reader = EmbeddedReader("val")
    for index in range(PREDICTED_IMAGES):
        image, label = reader[index]
        image.save(folder / f"{index}-{CLASS_NAMES[label].replace('/', '-').replace(' ', '-').lower()}.png")
    return folder


def _result(folder: Path) -> dict[str, Any]:
    model, description = load_classifier(folder)
    summary, metrics = summarize(model), description["metrics"]
    return {
        "title": _stage(folder.name).title, "top1": metrics["top1"], "standard_error": metrics["standard_error"],
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
    shape = runtime.config.vit
    forwards: dict[str, tuple[Path, Callable[[np.ndarray], Any]]] = {"packed bf16": (packed, runtime)}
    for run in runs:
        model = load_classifier(run)[0]
        if any(iter_sparse(model)):
            densify(model)
        title = f"dense {model.embed_dim} wide, torch fp32"
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
