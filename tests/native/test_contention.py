"""With another process busy on one of two cores, latency stays within three times the quiet one."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import reference

from sparsemae.packing.format import write
from sparsemae.runtime import Model, load

SHAPE = {
    "embed_dim": 384, "num_heads": 6, "mlp_hidden": 1536, "depth": 12,
    "patch_size": 16, "image_height": 224, "image_width": 224,
}  # fmt: skip


def latency(model: Model, images: np.ndarray, runs: int) -> float:
    """Median seconds of a call."""
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        model(images)
        times.append(time.perf_counter() - start)
    return float(np.median(times))


@pytest.mark.holds_only
@pytest.mark.holds("packed.6")
@pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity") or (os.cpu_count() or 1) < 2, reason="needs two cores of Linux"
)
def test_latency_beside_a_busy_process(tmp_path: Path) -> None:
    write(tmp_path / "m", reference.random_model(reference.vit_shape(**SHAPE)))
    allowed = os.sched_getaffinity(0)
    cores = sorted(allowed)[:2]
    if len(cores) < 2:
        pytest.skip("needs two cores")
    busy = None
    try:
        os.sched_setaffinity(0, cores)
        model = load(tmp_path / "m", threads=2)
        images = np.zeros((1, 3, 224, 224), np.float32)
        latency(model, images, 5)
        quiet = latency(model, images, 40)
        code = f"import os; os.sched_setaffinity(0, [{cores[0]}])\nwhile True: pass"
        busy = subprocess.Popen([sys.executable, "-c", code])
        time.sleep(0.5)
        beside = latency(model, images, 80)
        assert beside < 3 * quiet, f"{1e3 * quiet:.2f} ms quiet, {1e3 * beside:.2f} ms beside a busy process"
    finally:
        os.sched_setaffinity(0, allowed)
        if busy:
            busy.kill()
            busy.wait()
