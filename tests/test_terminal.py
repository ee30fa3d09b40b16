"""What names, files and foreign messages hold never acts on a terminal, and stops nothing."""

import io
import os
import subprocess
import sys
import unicodedata
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import tiny
from PIL import Image

from sparsemae.cli import main
from sparsemae.terminal import make_safe, printable

HOSTILE = "a\x1b]0;owned\x07\x1b[2J\u202egnp\u2066\nsparsemae: error: forged\r\x9b31m:cat:[red]"
NOT_UTF8 = os.fsdecode(b"d\xff\xfeg\xe2\x80")
ACTING = {"Cc", "Cf", "Cs", "Zl", "Zp"}


def test_what_acts_is_escaped_and_nothing_else() -> None:
    assert printable("Größe 你好 😀 a\u3000b\u00a0c") == "Größe 你好 😀 a\u3000b\u00a0c"
    assert printable("\x1b[31m\n\t\u202e\u2028\udcff\x9b") == r"\x1b[31m\n\t\u202e\u2028\udcff\x9b"
    assert printable(Path("x\r")) == r"x\r"


def test_what_an_encoding_lacks_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), "ascii", "strict"))
    with monkeypatch.context() as patch:
        patch.setattr(warnings, "formatwarning", None)
        make_safe()
        print("é \udcff")
        message = warnings.formatwarning(UserWarning("two\nlines \x1b"), UserWarning, "file.py", 3)
    assert message == "warning: two lines \\x1b\n"
    sys.stdout.flush()
    assert sys.stdout.buffer.getvalue() == b"\\xe9 \\udcff\n"  # type: ignore[attr-defined, union-attr]


def test_an_output_that_is_closed_is_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    make_safe()
    assert sys.stdout.write("x\udcff") == 2
    assert sys.stderr.fileno() > 2
    for stream in (sys.stdout, sys.stderr):
        stream.close()


def folder(root: Path) -> Path:
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in (HOSTILE.replace("/", ""), NOT_UTF8):
            (root / split / name).mkdir(parents=True)
            for i in range(8 if split == "train" else 3):
                pixels = generator.integers(0, 256, (20, 20, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}{name}.png")
    return root


def shown(capfd: pytest.CaptureFixture[str], *words: str) -> str:
    """All that a command writes on the terminal, which does not end it by a traceback."""
    capfd.readouterr()
    with suppress(SystemExit):
        main(list(words))
    out, err = capfd.readouterr()
    assert "Traceback" not in out + err
    lines = (out + err).split("\n")
    assert not [char for line in lines for char in line if unicodedata.category(char) in ACTING], out + err
    assert not [line for line in lines if line.startswith("sparsemae: error: forged")]
    return out + err


@pytest.mark.slow
@pytest.mark.holds("held.1")
def test_11_every_command_on_hostile_names(tmp_path: Path, capfd: pytest.CaptureFixture[str], came_out: Any) -> None:
    root, out = folder(tmp_path / "images"), tmp_path / f"run{HOSTILE}{NOT_UTF8}"
    data = ["--data.source", "folder", "--data.root", str(root), "--data.workers", "1"]
    words = tiny("finetune", out, *data)
    at = words.index("--data.train_images")
    words = words[:at] + words[at + 2 :]
    assert r"\x1b]0;owned\x07" in shown(capfd, *words)
    assert (out / "model.safetensors").is_file()
    broken = next((root / "val").iterdir()) / f"broken{HOSTILE}.png"
    broken.write_bytes(b"GIF89a\x1b[2J")
    study = tmp_path / "study.yaml"
    study.write_text(yaml.safe_dump({"out": str(tmp_path / "study"), "arms": {HOSTILE: {}}, "root": str(root)}))
    for command in (
        ["predict", str(out), str(root / "val")],
        ["predict", str(out), str(broken)],
        ["evaluate", str(out), *data],
        ["evaluate", str(out / "absent"), *data],
        ["check", *data],
        ["check", *data, "--task", HOSTILE],
        ["report", str(out)],
        ["report", str(root)],
        ["plan", HOSTILE],
        ["plan", "finetune", *words[1:]],
        ["export", str(out), str(tmp_path / f"for{HOSTILE}timm")],
        ["study", "--config", str(study), "--plan", "true"],
        ["study", "--config", str(study), "--print-commands", "lines"],
        ["pack", str(out), str(tmp_path / f"packed{HOSTILE}")],
        [HOSTILE],
        ["finetune", f"--{HOSTILE}", "1"],
        ["finetune", "--data.source", HOSTILE],
        words,
    ):
        assert shown(capfd, *command), command
    packed = next(tmp_path.glob("packed*"))
    assert r"d\udcff\udcfeg\udce2\udc80" in shown(capfd, "predict", str(packed), str(root / "val"), "--top_k", "2")
    came_out("names with escapes, marks of direction and line breaks", "in classes, images, runs and options", "0 or 2")


@pytest.mark.slow
@pytest.mark.holds("held.1")
def test_11_an_encoding_that_lacks_a_name_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for i in range(2):
        Image.new("RGB", (20, 20)).save(tmp_path / "images" / f"größe{i}\u4f60.png")
    main(tiny("finetune", tmp_path / "run", "--trainer.max_steps", "1"))
    main(["pack", str(tmp_path / "run"), str(tmp_path / "m")])
    done = subprocess.run(
        [sys.executable, "-m", "sparsemae", "predict", str(tmp_path / "m"), str(tmp_path / "images")],
        env=os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(b"gr\\xf6\\xdfe") == 2
    assert b"\\u4f60.png: " in done.stdout
