"""`sparsemae benchmark`: one section at a time, its table on the screen and its figures in a file."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from sparsemae.files import write_atomic
from sparsemae.options import BenchmarkConfig

QUICK = ("torch fp32", "torch bf16")
"""Rivals that need no export and no compiler."""


def benchmark(config: BenchmarkConfig) -> Sequence[Any]:
    """Run a section, print its table, and return its rows."""
    threads, runs, artifacts = config.threads, 1 if config.quick else config.runs, config.artifacts
    rivals, sizes, batches = config.engines, config.dense, config.batches
    if config.quick:
        rivals, sizes, batches = [name for name in rivals if name in QUICK], sizes[:1], batches[:2]
    arguments: dict[str, tuple[Any, ...]] = {
        "packed": (config.files, rivals, sizes, batches, threads, runs, artifacts),
        "segmentation": (config.files, config.engines, threads, runs, artifacts),
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
