"""A stranger's machine: a fresh clone, its own virtual environment, the README's commands. `make holds` runs these."""

import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT


def run_target(folder: Path, target: str, seconds: int) -> tuple[str, float]:
    """Run a make target within a time limit; returns its output and seconds."""
    begin = time.monotonic()
    done = subprocess.run(["make", target], cwd=folder, capture_output=True, text=True, check=False, timeout=seconds)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout, time.monotonic() - begin


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clone") / "sparsemae"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    return folder


@pytest.mark.holds_only
@pytest.mark.holds("foundation.1")
def test_make_demo_in_a_fresh_clone(clone: Path, figure: Any) -> None:
    printed, seconds = run_target(clone, "demo", 1500)
    assert "SparseMAE" in printed
    assert (clone / "runs/demo/reconstructions.png").stat().st_size > 10_000
    figure(f"{seconds:.0f} s with the installation; {printed.splitlines()[-1]}")


@pytest.mark.holds_only
@pytest.mark.holds("foundation.8", "house.8")
def test_make_check_is_clean_and_fits_its_time(clone: Path, benchmark_line: Any) -> None:
    run_target(clone, ".venv/installed", 900)
    _, seconds = run_target(clone, "check", 900)
    benchmark_line("make check, seconds", seconds, 120)


@pytest.mark.holds_only
@pytest.mark.holds("foundation.1", "foundation.8", "house.8")
def test_make_test_alone_passes_and_fits_its_time(clone: Path, figure: Any, benchmark_line: Any) -> None:
    subprocess.run(["rm", "-rf", str(clone / ".venv")], check=True)
    run_target(clone, ".venv/installed", 900)
    printed, seconds = run_target(clone, "test", 1800)
    figure(printed.splitlines()[-1].strip("= "))
    benchmark_line("make test, seconds", seconds, 720)
