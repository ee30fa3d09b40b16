"""Tests that need root say so when they are skipped, and CI as root does not skip them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import NEEDS_ROOT, ROOT

TEST = f"""
import pytest

def test_skips():
    pytest.skip("{NEEDS_ROOT}mounts a small file system")

@pytest.mark.skipif(True, reason="{NEEDS_ROOT}makes a device")
def test_is_skipped():
    pass

def test_skips_for_another_reason():
    pytest.skip("no network")
"""


@pytest.mark.slow
@pytest.mark.holds("held.1")
@pytest.mark.parametrize("ci", [True, False])
def test_17_a_skip_is_said_and_fails_in_ci_as_root(tmp_path: Path, ci: bool) -> None:
    (tmp_path / "test_it.py").write_text(TEST)
    environment = {name: value for name, value in os.environ.items() if name not in ("CI", "PYTEST_ADDOPTS")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "conftest", "-p", "no:cacheprovider", "-c", "/dev/null", "."],
        cwd=tmp_path, env=environment | {"PYTHONPATH": str(ROOT / "tests")} | ({"CI": "true"} if ci else {}),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if ci and os.geteuid() == 0:
        assert "1 failed, 1 skipped, 1 error" in done.stdout, done.stdout
        assert f"skipped while CI runs as root: {NEEDS_ROOT}makes a device" in done.stdout
    else:
        assert "3 skipped" in done.stdout, done.stdout
        assert "2 skipped that need root" in done.stdout


def test_17_the_workflow_runs_them_with_sudo_and_may_only_read() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    assert workflow["permissions"] == {"contents": "read"}
    runs = [step["run"] for step in workflow["jobs"]["test"]["steps"] if "run" in step]
    assert any("sudo" in command and ".ci/run" in command for command in runs)
