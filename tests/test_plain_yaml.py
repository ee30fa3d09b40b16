"""YAML of strangers: plain values of bounded size, or one line."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from sparsemae.plain_yaml import MOST_BYTES, read_yaml

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
HOSTILE = {
    "aliases that unfold to 9**12 values": BOMB,
    "merge keys that do": "a0: &a0 {x: 1}\n" + "".join(
        f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}], y{i}: 1}}\n" for i in range(1, 12)
    ),
    "a list that holds itself": "seed: &a [*a]",
    "a mapping that holds itself": "seed: &a {b: *a}",
    "100,000 brackets": "[" * 100_000,
    "deep nesting": "seed: " + "{a: " * 5000 + "1" + "}" * 5000,
    "a call": "seed: !!python/object/apply:os.system [touch executed]",
    "a module": "seed: !!python/module:antigravity",
    "an object": "seed: !!python/object/new:os.system [touch executed]",
    "an unknown tag": "seed: !strange 1",
    "a number of 5,000 digits": "seed: " + "9" * 5000,
    "a date that is none": "seed: 2001-99-99",
    "a list as a key": "? [1, 2]\n: 3",
    "bytes that are no text": "seed: \x00\x01",
    "more than any recipe": "# " + "x" * MOST_BYTES,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.holds("held.1")
def test_10_each_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str], came_out: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    for kind, text in HOSTILE.items():
        (tmp_path / "x.yaml").write_text(text)
        with pytest.raises(ValueError, match=r"x\.yaml: wanted a YAML file of plain values: .") as caught:
            read_yaml(tmp_path / "x.yaml")
        assert "\n" not in str(caught.value), kind
        assert len(str(caught.value)) < 500, kind
        for command in ("pretrain", "plan"):
            words = [command, *(["--config"] * (command == "pretrain")), "x.yaml"]
            assert "x.yaml: wanted a YAML file of plain values: " in refused(*words), kind
    assert not (tmp_path / "executed").exists()
    came_out("hostile YAML as a recipe", "; ".join(HOSTILE), 2, str(caught.value), times=len(HOSTILE))


def test_plain_files_are_read_as_pyyaml_reads_them(tmp_path: Path) -> None:
    for text in ("", "a: &x [1, 2]\nb: *x\nc: {<<: {d: 1}, e: [null, 1.5, yes]}", "- 1\n- ü\n", "x"):
        (tmp_path / "x.yaml").write_text(text)
        assert read_yaml(tmp_path / "x.yaml") == yaml.safe_load(text)
    with pytest.raises(FileNotFoundError):
        read_yaml(tmp_path / "absent.yaml")


def test_a_name_that_stands_twice_is_refused(tmp_path: Path) -> None:
    """PyYAML takes the last: of two arms of one name the first would be gone, and nobody told."""
    file = tmp_path / "study.yaml"
    file.write_text("arms:\n  a: {x: 1}\n  b: &b {x: 1}\n  c: {<<: *b, x: 2}\n  1: {}\n  '1': {}\n")
    assert read_yaml(file)["arms"]["c"] == {"x": 2}
    file.write_text("arms:\n  a: {x: 1}\n  b: {}\n  a: {x: 2}\n")
    with pytest.raises(ValueError, match=r"study.yaml: .* wanted each name once, got 'a' 2 times"):
        read_yaml(file)
