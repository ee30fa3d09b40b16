"""A server's load and a long training: memory, descriptors and threads stay flat. `make soak` takes half an hour."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
from conftest import ROOT, tiny
from harness import Job, wait_for
from serving import resources

from sparsemae.packing.format import write

SECONDS = float(os.environ.get("SPARSEMAE_TEST_SOAK_SECONDS", "8"))
STEPS = int(os.environ.get("SPARSEMAE_TEST_SOAK_STEPS", "320"))
BOUND_MB = {"server": 8.0, "training": 24.0}
"""How much more may be resident in the last fifth than in the second one, MB = 10^6 bytes."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.holds("held.4"),
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]


def flat(kind: str, what: str, amount: str, samples: Any, soaked: Callable[..., None]) -> None:
    """Assert that nothing grew from the second fifth of the samples to the last one.

    ``samples``: rows of progress (seconds or steps), resident bytes, descriptors, threads.
    """
    rows = np.array(samples, dtype=float)
    assert len(rows) >= 10, f"{len(rows)} samples"
    fifth = len(rows) // 5
    early, late = rows[fifth : 2 * fifth], rows[-fifth:]
    settled = rows[fifth:]
    slope = float(np.polyfit(settled[:, 0], settled[:, 1] / 1e6, 1)[0])
    rise = float(np.median(late[:, 1]) - np.median(early[:, 1])) / 1e6
    resident, descriptors, threads = (float(value) for value in np.median(late[:, 1:], axis=0))
    soaked(what, amount, len(rows), resident / 1e6, slope, rise, BOUND_MB[kind], descriptors, threads)
    assert rise <= BOUND_MB[kind], f"{rise:.1f} MB more"
    # a save in the background is a thread and a file more, for as long as it writes: a leak is there all the time
    for column in (2, 3):
        assert late[:, column].min() <= np.median(early[:, column])


def test_serving(tmp_path: Path, soaked: Callable[..., None]) -> None:
    shape = reference.vit_shape(embed_dim=192, num_heads=3, mlp_hidden=768, image_height=64, image_width=64)
    for dtype in ("bf16", "int8"):
        write(tmp_path / dtype, reference.random_model(shape, dtype=dtype))
    command = [sys.executable, str(ROOT / "tests/faults/serving.py"), str(tmp_path), str(SECONDS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout)
    counts = told["counts"]
    assert min(counts.values()) > 0, counts
    what = ", ".join(f"{count:,} {name}" for name, count in counts.items())
    flat("server", f"a packed model in a server: {what}", f"{SECONDS:.0f} s", told["samples"], soaked)


def test_training(tmp_path: Path, soaked: Callable[..., None]) -> None:
    """The process that trains, with two loader processes."""
    out = tmp_path / "run"
    steps_per_epoch = 40
    words = tiny("pretrain", out, "--data.train_images", str(16 * steps_per_epoch), "--data.workers", "2",
                 "--trainer.epochs", str(STEPS // steps_per_epoch), "--trainer.save_every_steps", "100")  # fmt: skip
    job = Job(words)
    try:
        pid = job.processes[0].pid
        assert pid is not None
        lines = out / "metrics.jsonl"
        wait_for(lines.is_file)
        samples = []
        while job.processes[0].is_alive():
            written = lines.read_text().count("\n")
            try:
                samples.append((written, *resources(pid)))
            except (OSError, KeyError):  # it has ended
                break
            time.sleep(0.05)
        assert job.wait() == [0], job.output.read_text()[-3000:]
    finally:
        job.end()
    flat("training", "pretraining of a tiny model, a checkpoint every 100 steps, 2 loader processes",
         f"{STEPS:,} steps", samples, soaked)  # fmt: skip
