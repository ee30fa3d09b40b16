"""docs/requirements.md and the marks of the tests say the same."""

import ast
import re

from conftest import ROOT

LINE = re.compile(r"^\| (\w+\.\d+) \| .+ \| (\w+) \|$", re.MULTILINE)


def marked() -> set[str]:
    """Items in the marks of all tests."""
    trees = [ast.parse(file.read_text()) for file in (ROOT / "tests").rglob("*.py")]
    calls = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call)]
    marks = [call for call in calls if ast.unparse(call.func).endswith("mark.holds")]
    return {ast.literal_eval(item) for mark in marks for item in mark.args}


def test_each_mark_has_a_line_and_each_line_its_mark() -> None:
    lines = LINE.findall((ROOT / "docs/requirements.md").read_text())
    held = dict(lines)
    assert len(held) == len(lines) > 70
    assert set(held.values()) <= {"test", "partly", "script", "open"}
    tests = {item for item, by in lines if by in ("test", "partly")}
    assert tests == marked(), tests ^ marked()


def test_the_items_of_an_issue_are_numbered_without_a_gap() -> None:
    numbers: dict[str, list[int]] = {}
    for item, _ in LINE.findall((ROOT / "docs/requirements.md").read_text()):
        issue, number = item.split(".")
        numbers.setdefault(issue, []).append(int(number))
    assert all(found == list(range(1, len(found) + 1)) for found in numbers.values())
