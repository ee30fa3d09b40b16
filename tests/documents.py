"""The fenced blocks of the documents, for the tests that run them."""

import re
import shlex
from pathlib import Path

from conftest import ROOT

PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))


def blocks(page: Path, language: str) -> list[str]:
    """The contents of a page's blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[list[str]]:
    """Words of the shell commands in a page's ``sh`` blocks, comments left out."""
    lines = [line for block in blocks(page, "sh") for line in block.replace("\\\n", " ").splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def promised(block: str) -> list[str]:
    """What a block says that it prints: the comments after its ``print`` calls."""
    return re.findall(r"^ *print\(.*\)  # (.*)$", block, re.MULTILINE)
