"""What a run says of where it was trained."""

import json
import re
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, tiny

import sparsemae
from sparsemae.cli import main
from sparsemae.training.logs import commit


def test_the_commit_is_of_the_packages_own_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment may lie in a checkout of something else."""
    if (ROOT / ".git").exists():
        assert re.fullmatch(r"[0-9a-f]{7,}(-dirty)?", commit())
    (tmp_path / ".venv" / "sparsemae").mkdir(parents=True)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "another's"], check=True)
    monkeypatch.setattr(sparsemae, "__file__", str(tmp_path / ".venv" / "sparsemae" / "__init__.py"))
    assert commit() == sparsemae.__version__


@pytest.mark.slow
def test_the_environment_is_that_of_the_last_steps(tmp_path: Path) -> None:
    run, old = tmp_path / "run", {"commit": "of before"}
    for steps, kept in ((1, False), (1, True), (2, False)):  # begun, ended already, and gone on with
        file = run / "environment.json"
        if file.is_file():
            file.write_text(json.dumps(old))
        main(tiny("pretrain", run, "--trainer.max_steps", str(steps)))
        assert (json.loads(file.read_text()) == old) == kept
