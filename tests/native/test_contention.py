"""Beside busy processes: how long a call takes, and what a second thread is worth."""

import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference

from sparsemae.packing.format import write
from sparsemae.runtime import Model, load
from sparsemae.runtime.native import processor_name

ROOT = Path(__file__).parents[2]
EARLIER = "916367b"
"""The last commit in which a thread that is held up holds up the others."""
SIZES = {"SparseMAE-T": {"embed_dim": 768, "num_heads": 12, "mlp_hidden": 3072}, "ViT-S": {}}
ROUNDS, CALLS = 6, 12
SERVER = """
import sys, time
sys.path.insert(0, sys.argv[1])
import numpy as np, sparsemae.runtime as runtime
model, images = runtime.load(sys.argv[2], threads=int(sys.argv[3])), np.zeros((1, 3, 224, 224), np.float32)
for line in sys.stdin:
    times = []
    for _ in range(int(line) + 2):
        start = time.perf_counter()
        model(images)
        times.append(time.perf_counter() - start)
    print(*times[2:], flush=True)
"""

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


@contextmanager
def burning(cores: list[int]) -> Iterator[None]:
    """One busy process on each core."""
    code = "import os, sys\nos.sched_setaffinity(0, [int(sys.argv[1])])\nwhile True: pass"
    busy = [subprocess.Popen([sys.executable, "-c", code, str(core)]) for core in cores]
    try:
        time.sleep(0.3)
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def earlier_tree(folder: Path) -> Path:
    """The package as it was in EARLIER, with its native library."""
    pytest.importorskip("nanobind")
    archive = subprocess.run(["git", "archive", EARLIER], cwd=ROOT, capture_output=True, check=True).stdout
    subprocess.run(["tar", "-x", "-C", folder], input=archive, check=True)
    build = folder / "build"
    cmake: list[str | Path] = ["cmake", "-S", folder, "-B", build, f"-DPython_EXECUTABLE={sys.executable}"]
    subprocess.run(cmake, check=True, capture_output=True)
    subprocess.run(["cmake", "--build", build, "-j2"], check=True, capture_output=True)
    for built in build.glob("_native*.so"):
        built.rename(folder / "sparsemae" / "runtime" / built.name)
    return folder


def topology(cores: list[int]) -> str:
    """Which processors, and how many share a core."""
    files = [Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list") for core in cores]
    shared = {file.read_text().strip() for file in files if file.is_file()}
    return f"{len(cores)} processors on {len(shared) or 'unknown'} cores, {processor_name().split(':')[0]}"


@pytest.mark.holds_only
@pytest.mark.holds("held.5")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs two cores of Linux"
)
def test_a_second_thread_beside_busy_processes(size: str, tmp_path: Path, figure: Any, benchmark_line: Any) -> None:
    cores = sorted(os.sched_getaffinity(0))
    write(tmp_path / "m", reference.random_model(reference.vit_shape(**SHAPE | SIZES[size])))
    (tmp_path / "earlier").mkdir()
    trees = {"now": ROOT, "earlier": earlier_tree(tmp_path / "earlier")}
    times: dict[tuple[str, str, int], list[float]] = defaultdict(list)
    with ExitStack() as stack:
        servers = {}
        for tree, root in trees.items():
            for threads in (1, 2):
                command = [sys.executable, "-c", SERVER, str(root), str(tmp_path / "m"), str(threads)]
                server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
                servers[tree, threads] = stack.enter_context(server)
                stack.callback(server.kill)

        def turn(state: str) -> None:
            for (tree, threads), server in servers.items():
                assert server.stdin
                assert server.stdout
                server.stdin.write(f"{CALLS}\n")
                times[state, tree, threads] += map(float, server.stdout.readline().split())

        for _ in range(ROUNDS):
            turn("quiet")
            with burning(cores):
                turn("busy")
    median = {key: float(np.median(values)) for key, values in times.items()}
    where = f"{size} bf16, {topology(cores)}"
    for state in ("quiet", "busy"):
        for tree in trees:
            one, two = (1e3 * median[state, tree, threads] for threads in (1, 2))
            figure(f"{where}, {state}, {tree}: 1 thread {one:.2f} ms, 2 threads {two:.2f} ms")
    busy = median["busy", "now", 2] / median["busy", "now", 1]
    benchmark_line(f"{where}: 2 threads beside a busy process per core, times the time of 1", busy, 1.3)
    gain = {tree: median["quiet", tree, 1] / median["quiet", tree, 2] for tree in trees}
    name = f"{where}: quiet, the speed-up of 2 threads, times the earlier {gain['earlier']:.2f}"
    benchmark_line(name, gain["now"] / gain["earlier"], 0.97, higher_is_better=True)
