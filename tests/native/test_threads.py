"""Threads that a fork leaves behind, that are held up, and that cannot start."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference

from sparsemae import processors
from sparsemae.packing.format import write
from sparsemae.runtime import load
from sparsemae.runtime.native import usable_isas

ROOT = Path(__file__).parents[2]
CHILDREN = 40
SECONDS = 60


@pytest.mark.slow
@pytest.mark.holds("held.1")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("calling", [False, True], ids=["idle", "during another thread's call"])
def test_4_a_forked_child_answers(calling: bool, tmp_path: Path, came_out: Any) -> None:
    write(tmp_path / "m", reference.random_model(reference.TINY))
    packed = load(tmp_path / "m", threads=2)
    images = np.random.default_rng(0).standard_normal((3, 3, 16, 16), np.float32)
    wanted = packed(images)
    done = threading.Event()

    def call() -> None:
        while calling and not done.is_set():
            packed(images)

    caller = threading.Thread(target=call)
    caller.start()
    try:
        codes = []
        for _ in range(CHILDREN):
            child = os.fork()
            if child == 0:
                same = (packed(images) == wanted).all() and packed.threads == 2
                os._exit(0 if same else 1)
            codes.append(wait(child))
    finally:
        done.set()
        caller.join()
    assert codes == [0] * CHILDREN
    assert (packed(images) == wanted).all()
    made = "fork of a process that has a model" + ", in the middle of another thread's call" * calling
    came_out(made, "the child predicts, with two threads of its own", 0, f"all {CHILDREN} answer", times=CHILDREN)


def wait(child: int) -> int:
    """The child's exit code; a child that hangs is killed, its code is negative."""
    for _ in range(10 * SECONDS):
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.slow
@pytest.mark.holds("held.1")
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_6_a_step_goes_on_without_a_thread_that_is_held_up(tmp_path: Path, came_out: Any) -> None:
    """Threads sleep for 4 ms amid a piece; under the thread sanitizer, because they still write when they wake."""
    sources = [ROOT / "tests/native/crew.cpp", ROOT / "native/team.cpp", ROOT / "native/thread_pool.cpp"]
    command: list[str | Path] = [
        "g++",
        "-std=c++20",
        "-O1",
        "-g",
        "-fsanitize=thread",
        "-pthread",
        f"-I{ROOT / 'native'}",
        *sources,
    ]
    subprocess.run([*command, "-o", tmp_path / "crew"], check=True)
    for threads in (2, 8):
        done = subprocess.run([tmp_path / "crew", str(threads), "40"], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr[-4000:]
        assert int(done.stdout.split()[0]) > 2
    came_out("thread that is descheduled", "4 ms of sleep amid a piece of work, 2 and 8 threads", 0, "others take over")


@pytest.mark.parametrize("isa", usable_isas())
@pytest.mark.slow
@pytest.mark.holds("held.1")
def test_6_more_threads_than_processors_give_the_same_bits(
    isa: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of them is always held up."""
    monkeypatch.setenv("SPARSEMAE_ISA", isa)
    shape = reference.vit_shape(image_height=48, image_width=48)
    write(tmp_path / "m", reference.random_model(shape, dtype="int8"))
    images = np.random.default_rng(0).standard_normal((7, 3, 48, 48), np.float32)
    alone, crowd = (load(tmp_path / "m", threads, quantize=True) for threads in (1, 8))
    wanted = alone(images)
    assert crowd.threads == 8
    for _ in range(5):
        assert (crowd(images) == wanted).all()
    assert (crowd.features(images) == alone.features(images)).all()


@pytest.mark.holds("held.1")
@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_5_threads_that_cannot_start_are_done_without(tmp_path: Path, came_out: Any) -> None:
    """Stacks of 256 MB, and memory for a few of them: a limit on processes does not hold root."""
    write(tmp_path / "m", reference.random_model(reference.TINY))
    code = (
        "import resource, numpy as np, sparsemae.runtime as r\n"
        "x = np.zeros((5, 3, 16, 16), np.float32)\n"
        f"wanted = r.load({str(tmp_path / 'm')!r}, threads=1)(x)\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, used + 2**30))\n"
        f"m = r.load({str(tmp_path / 'm')!r}, threads=64)\n"
        "print(m.threads, (m(x) == wanted).all())"
    )
    command = ["bash", "-c", 'ulimit -s 262144; exec "$@"', "-", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    threads, same = done.stdout.split()
    assert 1 <= int(threads) < 6
    assert same == "True"
    came_out(
        "thread that cannot start", "64 are asked for, with memory for a few", 0, f"{threads} compute, the same bits"
    )


@pytest.mark.holds("held.1")
def test_5_the_default_is_no_more_than_quota_and_model_have_use_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = tmp_path / "cgroup"
    (groups / "pod/box").mkdir(parents=True)
    (tmp_path / "self").write_text("0::/pod/box\n")
    monkeypatch.setattr(processors, "CGROUPS", groups)
    monkeypatch.setattr(processors, "OWN_CGROUP", tmp_path / "self")
    assert processors.quota() is None
    (groups / "pod/box/cpu.max").write_text("max 100000\n")
    assert processors.quota() is None
    (groups / "pod/cpu.max").write_text("250000 100000\n")
    assert processors.quota() == 3
    (groups / "pod/box/cpu.max").write_text("50000 100000\n")
    assert processors.quota() == 1
    (tmp_path / "self").unlink()
    assert processors.quota() is None

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    write(tmp_path / "m", reference.random_model(reference.vit_shape(image_height=32, image_width=32)))
    assert load(tmp_path / "m").threads == 5  # 65 tokens
    assert load(tmp_path / "m", threads=7).threads == 7
