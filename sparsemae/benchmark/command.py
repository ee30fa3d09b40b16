"""`sparsemae benchmark`: one section at a time, its table on the screen and its figures in a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from sparsemae.benchmark import packed
from sparsemae.benchmark.packed import DENSE, ENGINES


@dataclass
class BenchmarkConfig:
    """Measure packed models against dense ones in other engines, training against timm's, or what saving costs."""

    section: Literal["packed", "training", "saving", "kernels"] = "packed"
    """packed: latency, throughput, memory and cold start of packed files and their rivals; training: images per second
    of the input pipeline and of optimizer steps, beside timm's loader and its dense ViT-B; saving: what a checkpoint of
    ViT-B with AdamW's state costs the loop, beside a save that blocks it; kernels: every
    instruction set's linear layers, attention and norm, one by one, on one thread."""
    files: list[str] = field(default_factory=list)
    """Packed files; none: SparseMAE-T and -S at ViT-B/16 size with random weights, bf16 and int8."""
    engines: list[str] = field(default_factory=lambda: list(ENGINES))
    """Rivals of packed files to run."""
    dense: list[str] = field(default_factory=lambda: list(DENSE))
    """Dense models for them: B, S, T."""
    batches: list[int] = field(default_factory=lambda: [1, 8, 32])
    """Images per call of a packed model."""
    images: str | None = None
    """Folder of JPEGs for the training section, as for data.source=folder; none: its steps alone are measured."""
    step_batch: int = 8
    """Images per optimizer step of the training and saving sections; 0: the input pipeline alone is measured."""
    threads: int = 2
    """Threads of every engine, and of a step."""
    runs: int = 5
    """Timed runs of each subject, in turn with the others, of which the median counts; of kernels the shortest."""
    artifacts: str = ""
    """Folder that keeps exported models for the next time, or on whose disk checkpoints are written; none: a temporary
    one."""
    readme: str = ""
    """Markdown file with a table of the kernels section, in which this processor's rows are replaced."""
    json: str = ""
    """File to write all figures to."""


def benchmark(config: BenchmarkConfig) -> Sequence[Any]:
    """Run a section, print its table, and return its rows."""
    rows: Sequence[Any]
    if config.section == "packed":
        rows = packed.measure(
            config.files, config.engines, config.dense, config.batches, config.threads, config.runs, config.artifacts
        )
        print(packed.table(rows, config.batches))
    elif config.section == "saving":
        from sparsemae.benchmark import saving

        rows = saving.measure(config.step_batch, config.threads, config.runs, config.artifacts)
        print(saving.table(rows))
    elif config.section == "kernels":
        from sparsemae.benchmark import kernels

        rows = kernels.measure(config.runs)
        print(kernels.table(rows))
        if config.readme:
            kernels.refresh(Path(config.readme), rows)
    else:
        from sparsemae.benchmark import training  # loads torch, which packed files do not want

        rows = training.measure(config.images, config.step_batch, config.threads, config.runs)
        print(training.table(rows))
    if config.json:
        figures = {"config": asdict(config), "results": [asdict(row) for row in rows]}
        Path(config.json).write_text(json.dumps(figures, indent=1))
    return rows
