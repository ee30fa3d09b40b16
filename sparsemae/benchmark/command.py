"""`sparsemae benchmark`: one section at a time, its table on the screen and its figures in a file."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from sparsemae.files import write_atomic
from sparsemae.options import BenchmarkConfig


def benchmark(config: BenchmarkConfig) -> Sequence[Any]:
    """Run a section, print its table, and return its rows."""
    threads, runs, artifacts = config.threads, config.runs, config.artifacts
    arguments: dict[str, tuple[Any, ...]] = {
        "packed": (config.files, config.engines, config.dense, config.batches, threads, runs, artifacts),
        "training": (config.images, config.step_batch, threads, runs),
        "saving": (config.step_batch, threads, runs, artifacts),
        "kernels": (runs,),
    }
    section = resolve_name(f"sparsemae.benchmark.{config.section}")  # only now: it may load torch
    rows: Sequence[Any] = section.measure(*arguments[config.section])
    print(section.table(rows))
    if config.readme and config.section == "kernels":
        section.refresh(Path(config.readme), rows)
    if config.json:
        figures = {"config": asdict(config), "results": [asdict(row) for row in rows]}
        write_atomic(config.json, json.dumps(figures, indent=1))
    return rows
