"""docs/python.md, and README.md: their Python is run as it stands, what it prints is what they promise."""

from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from documents import blocks, promised

import sparsemae


@pytest.mark.slow
@pytest.mark.holds("house.7")
@pytest.mark.parametrize("name", ["docs/python.md", "README.md"])
def test_python_does_what_the_page_says(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    shown = blocks(ROOT / name, "python")
    assert shown
    for block in shown:
        capsys.readouterr()
        exec(compile(block, name, "exec"), names)
        assert capsys.readouterr().out.splitlines() == promised(block)


def test_every_public_name_is_named() -> None:
    text = (ROOT / "docs/python.md").read_text()
    missing = [name for name in dir(sparsemae) if not name.startswith("__") and f"`{name}`" not in text]
    assert not missing
