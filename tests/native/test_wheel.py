"""A wheel, built and installed into an empty environment, predicts without torch and without a compiler."""

import json
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import reference
from conftest import Figure
from documents import blocks
from PIL import Image

from sparsemae.packing.format import write
from sparsemae.runtime import native

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.holds("packed.1")
@pytest.mark.holds_only
def test_wheel_in_an_empty_environment(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip"]
    subprocess.run([*pip, "wheel", "--no-deps", "-q", "-w", tmp_path, ROOT], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("sparsemae-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert any(re.fullmatch(r"sparsemae/runtime/libsparsemae\.(so|dylib|dll)", name) for name in names)
    assert not any(name.endswith((".cpp", ".h")) for name in names)
    (notice,) = (name for name in names if name.endswith("licenses/NOTICE"))
    assert all(name in zipfile.ZipFile(wheel).read(notice).decode() for name in ("LLVM", "wasi-libc", "ADE20k"))

    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", wheel], check=True, capture_output=True)
    write(tmp_path / "model.safetensors", reference.random_model(reference.TINY))
    Image.new("RGB", (40, 30), "red").save(tmp_path / "photo.jpg")
    code = (
        "import sys, sparsemae.runtime as r\n"
        "print(r.load('model.safetensors').predict(['photo.jpg'])[0][0].label, 'torch' in sys.modules)"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [python, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert re.fullmatch(r"\d False\n", done.stdout)
    command = [str(tmp_path / "env" / "bin" / "sparsemae"), "predict", "model.safetensors", "photo.jpg"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert re.fullmatch(r"photo\.jpg: \d \d+\.\d%(, \d \d+\.\d%){2}\n", done.stdout), done.stdout


@pytest.mark.slow
@pytest.mark.holds("take.6")
@pytest.mark.holds_only
def test_the_containers_lines_in_an_empty_environment(tmp_path: Path, figure: Figure) -> None:
    """RUN and CMD of docs/deploy.md; an empty virtual environment stands in for the image."""
    (block,) = blocks(ROOT / "docs/deploy.md", "dockerfile")
    named = re.findall(r"sparsemae-\S+\.whl", block)
    built = sorted((ROOT / "build/wheels").glob("*-manylinux2014_x86_64.whl"))  # of `make wheels`
    if not built:
        pip: list[str | Path] = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", tmp_path, ROOT]
        subprocess.run(pip, check=True, capture_output=True)
        built = sorted(tmp_path.glob("sparsemae-*.whl"))
    assert len(set(named)) == 1
    shutil.copy(built[0], tmp_path / built[0].name) if built[0].parent != tmp_path else None
    write(tmp_path / "small.safetensors", reference.random_model(reference.TINY))
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (40, 30), "red").save(tmp_path / "photos/photo.jpg")
    venv.create(tmp_path / "env", with_pip=True)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment["PATH"] = f"{tmp_path / 'env/bin'}:{os.environ['PATH']}"
    (run,) = re.findall(r"^RUN (.*)$", block, re.MULTILINE)
    (cmd,) = re.findall(r"^CMD (.*)$", block, re.MULTILINE)
    before = size(tmp_path / "env")
    subprocess.run(run.replace(named[0], built[0].name), shell=True, check=True, cwd=tmp_path, env=environment)
    done = subprocess.run(
        json.loads(cmd), cwd=tmp_path, env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    assert re.fullmatch(r"file,rank,label,index,probability\n(photos/photo\.jpg,\d,\d,\d,[\d.]+\n){3}", done.stdout)
    figure(f"{(size(tmp_path / 'env') - before) / 1e6:.0f} MB installed, the model beside it")


def size(folder: Path) -> int:
    """Bytes of the files."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and not file.is_symlink())


@pytest.mark.skipif(shutil.which("objdump") is None, reason="reads the library with objdump")
def test_library_fits_a_manylinux_wheel() -> None:
    """manylinux_2_34 (Debian 12, Ubuntu 22.04, RHEL 9): no other library and no newer symbol than it allows."""
    dynamic = subprocess.run(["objdump", "-p", native.FILE], capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"NEEDED +(\S+)", dynamic))
    assert needed <= {
        "libc.so.6",
        "libm.so.6",
        "libpthread.so.0",
        "libgcc_s.so.1",
        "libstdc++.so.6",
        "ld-linux-x86-64.so.2",
    }
    for symbols, newest in (("GLIBC", (2, 34)), ("GLIBCXX", (3, 4, 29))):
        found = re.findall(rf"\b{symbols}_([\d.]+)", dynamic)
        assert max(tuple(map(int, version.split("."))) for version in found) <= newest
