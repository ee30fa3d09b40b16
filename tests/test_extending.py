"""docs/extending.md: its code is run as it stands, its patches are applied to a copy of the tree."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from conftest import ROOT
from documents import blocks
from rich.console import Console

from sparsemae.demo import classification
from sparsemae.demo.results import read_arms
from sparsemae.demo.stages import PRETRAINING
from sparsemae.jobs import JOBS
from sparsemae.packing.format import write
from sparsemae.study.stages import run_stages
from sparsemae.tasks import TASKS

PAGE = ROOT / "docs/extending.md"
WITHOUT_EDITABLE_INSTALL = (
    "import sys\nsys.meta_path = [finder for finder in sys.meta_path if 'Redirecting' not in type(finder).__name__]\n"
)


def block(word: str, language: str = "python") -> str:
    """The page's one block that has a word in it."""
    (found,) = [block for block in blocks(PAGE, language) if word in block]
    return found


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the tree without what was built."""
    for name in ("sparsemae", "native"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "libsparsemae*"))
    for name in ("CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def apply(patch: str, tree: Path) -> None:
    """Apply a patch, wherever its lines have gone since it was written."""
    done = subprocess.run(
        ["git", "apply", "-C1", "-"], input=patch, cwd=tree, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def run(tree: Path, code: str, *words: str, **environment: str) -> str:
    """Run code in a fresh process that imports the copy; returns what it prints."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", WITHOUT_EDITABLE_INSTALL + code, *words], cwd=tree, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(tree), **environment}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_an_arm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classification, "STAGES", list(classification.STAGES))
    exec(block("STAGES.append"), {})
    arm = classification.STAGES[-1]
    short = ("--data.train_images", "64", "--trainer.global_batch", "16", "--trainer.max_steps", "2",
             "--model.args", "{patch_size: 14, embed_dim: 32, depth: 1, num_heads: 1}")  # fmt: skip
    stages = [replace(stage, options=(*stage.options, *short)) for stage in (*PRETRAINING, arm)
              if stage.name in (arm.init, arm.name)]  # fmt: skip
    out = tmp_path / "demo"
    out.mkdir()
    done = run_stages(stages, out, 0, np.inf, Console(quiet=True))
    assert list(done) == [arm.init, arm.name]
    assert read_arms(stages, out).keys() == {arm.title}


@pytest.mark.slow
def test_a_mask_criterion() -> None:
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    exec(block("relative_size"), names)
    layer = names["model"].blocks[0].attn.qkv
    assert len(names["names"]) == 48
    assert layer.weight_mask.reshape(-1, 32).sum(dim=1).eq(2).all()
    assert torch.equal(torch.where(layer.weight_mask, layer.weight, 0.0), layer.weight)
    assert torch.equal(layer.weight_mask, names["moving"]["blocks.0.attn.qkv"])


@pytest.mark.slow
def test_a_data_source(tree: Path) -> None:
    (tree / "sparsemae/data/arrays.py").write_text(block("class ArrayReader"))
    apply(block("ArrayReader", "diff"), tree)
    generator = np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 6)):
        images = generator.integers(0, 256, (count, 32, 32, 3), np.uint8)
        np.savez(tree / f"{split}.npz", images=images, labels=np.arange(count) % 2, names=["cat", "dog"])
    data = ["--data.source", "npz", "--data.root", ".", "--data.workers", "0"]
    train = [
        "--model.args", "{patch_size: 8, embed_dim: 32, depth: 1, num_heads: 2}", "--data.img_size", "32",
        "--out", "run", "--trainer.global_batch", "8", "--trainer.max_steps", "2", "--trainer.precision", "fp32",
    ]  # fmt: skip
    words = (["check", *data], ["finetune", *data, *train], ["evaluate", "run", *data])
    said = run(tree, f"from sparsemae.cli import main\nfor words in {words}: main(words)")
    assert "nothing would break a run" in said
    assert "on 6 images" in said


def test_a_task_is_that_of_its_test(monkeypatch: pytest.MonkeyPatch) -> None:
    (file,) = (ROOT / "tests").rglob("test_new_task.py")
    tested = file.read_text().split("# the task: at most 80 lines, from here\n")[1].split("# to here")[0]
    assert block("class Brightness(Task").strip() == tested.strip(), f"{file} has another: run docs/update.py"
    monkeypatch.setitem(JOBS, "brightness", None)
    monkeypatch.setitem(TASKS, "brightness", None)
    exec(block('TASKS["brightness"]'), {"BrightnessConfig": int, "Brightness": str})
    assert JOBS["brightness"].options is int
    assert TASKS["brightness"] is str


@pytest.mark.slow
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="AVX is x86's")
@pytest.mark.holds_only
def test_an_instruction_set(tree: Path) -> None:
    (tree / "native/kernels_avx.cpp").write_text(block("lane_kernels-inl.h", "cpp"))
    apply(block("kernels_avx.cpp", "diff"), tree)
    # the other instruction sets take a minute to compile
    for file, others in (("CMakeLists.txt", r"list\(APPEND sources native/kernels_avx2[^)]*\)"),
                         ("native/dispatch.cpp", r".*if \(processor\..*\n")):  # fmt: skip
        (tree / file).write_text(re.sub(others, "", (tree / file).read_text()))
    wheels = tree / "wheels"
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "--wheel-dir", str(wheels), str(tree)]
    subprocess.run(pip, check=True, capture_output=True, env={**os.environ, "CMAKE_BUILD_PARALLEL_LEVEL": "2"})
    (wheel,) = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as content:
        (native,) = [name for name in content.namelist() if "/libsparsemae." in name]
        content.extract(native, tree)
    model = reference.random_model(reference.TINY)
    write(tree / "model.safetensors", model)
    images = np.random.default_rng(1).standard_normal((3, 3, 16, 16), np.float32)
    np.save(tree / "images.npy", images)
    code = (
        "import numpy, sparsemae.runtime as r\n"
        "model = r.load('model.safetensors')\n"
        "numpy.save('logits.npy', model(numpy.load('images.npy')))\n"
        "print(model.isa)"
    )
    assert run(tree, code, SPARSEMAE_ISA="avx") == "avx\n"
    wanted = reference.forward(model, images)
    assert np.abs(np.load(tree / "logits.npy") - wanted).max() < 2e-5 * wanted.std()
