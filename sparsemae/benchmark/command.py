"""`sparsemae benchmark`: one section at a time, its table on the screen and its figures in a file."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sparsemae.benchmark import packed
from sparsemae.files import write_atomic
from sparsemae.options import BenchmarkConfig


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
        write_atomic(config.json, json.dumps(figures, indent=1))
    return rows
