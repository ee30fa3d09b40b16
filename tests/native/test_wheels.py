"""The wheels of `make wheels`: held to their platforms' rules, and those for aarch64 run under qemu."""

import os
import re
import shutil
import struct
import subprocess
import sys
import venv
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import reference
from conftest import ROOT, Figure

from sparsemae.commands.web import MODULES
from sparsemae.packing.format import PackedModel, write

FOLDER = Path(os.environ.get("SPARSEMAE_TEST_WHEELS", ROOT / "build/wheels"))
WHEELS = sorted(FOLDER.glob("sparsemae-*.whl"))
FUNCTIONS = ("open", "open_memory", "describe", "prepare", "forward", "close", "error", "open_as", "time_kernels")
LIBRARIES = {
    "manylinux2014_x86_64": (b"\x7fELF", 18, 62),
    "manylinux2014_aarch64": (b"\x7fELF", 18, 183),
    "musllinux_1_2_x86_64": (b"\x7fELF", 18, 62),
    "musllinux_1_2_aarch64": (b"\x7fELF", 18, 183),
    "macosx_11_0_arm64": (b"\xcf\xfa\xed\xfe", 4, 0x000C),
    "macosx_11_0_x86_64": (b"\xcf\xfa\xed\xfe", 4, 0x0007),
    "win_amd64": (b"MZ", None, 0x8664),
}
"""Of each platform: how its library begins, where its processor's number is, and the number."""

pytestmark = [pytest.mark.holds_only, pytest.mark.skipif(not WHEELS, reason="needs make wheels")]


def platform(wheel: Path) -> str:
    return wheel.stem.split("-")[-1]


def library(wheel: Path, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as content:
        (name,) = [name for name in content.namelist() if "/libsparsemae." in name]
        return Path(content.extract(name, folder))


def dylibs(content: bytes) -> list[bytes]:
    """A Mach-O library's own name and those of the libraries it loads, from its load commands."""
    names, at = [], 32
    for _ in range(struct.unpack_from("<I", content, 16)[0]):
        command, size, name = struct.unpack_from("<3I", content, at)
        if command & 0x7FFFFFFF in (0x0C, 0x0D, 0x18, 0x1F):
            names.append(content[at + name : at + size].rstrip(b"\0"))
        at += size
    return names


@pytest.mark.holds("take.6")
@pytest.mark.parametrize("wheel", WHEELS, ids=platform)
def test_a_wheel_has_what_its_tag_says(wheel: Path, tmp_path: Path, figure: Figure) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert wheel.name.split("-")[2:4] == ["py3", "none"]
    assert {f"sparsemae/web/{name}" for name in MODULES} <= set(names)
    assert {name.partition("/")[0] for name in names} == {"sparsemae", wheel.name.partition("-py3")[0] + ".dist-info"}
    assert not [name for name in names if name.endswith((".cpp", ".h", ".xz"))]
    content = library(wheel, tmp_path).read_bytes()
    begins, at, machine = LIBRARIES[platform(wheel)]
    assert content.startswith(begins)
    at = struct.unpack_from("<I", content, 60)[0] + 4 if at is None else at
    assert struct.unpack_from("<H", content, at)[0] == machine
    for name in FUNCTIONS:
        assert f"sparsemae_{name}\0".encode() in content, name
    assert b"GLIBCXX" not in content
    if begins.startswith(b"\xcf"):  # macOS: of other libraries the system's alone
        assert dylibs(content) == [b"@rpath/libsparsemae.dylib", b"/usr/lib/libSystem.B.dylib"]
    figure(f"{wheel.name}: {wheel.stat().st_size / 1e6:.2f} MB")


@pytest.mark.holds("take.6")
@pytest.mark.parametrize("wheel", [w for w in WHEELS if "linux" in platform(w)], ids=platform)
def test_auditwheel_accepts_the_linux_ones(wheel: Path, tmp_path: Path) -> None:
    pytest.importorskip("auditwheel")
    # on a Debian, musl's libc.so is not the file of that name
    elsewhere = ["--ldpaths", str(tmp_path)] * ("musl" in platform(wheel))
    command = [sys.executable, "-m", "auditwheel", "show", *elsewhere, str(wheel)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    tag = re.search(r'consistent\s+with\s+the\s+following\s+platform\s+tag:\s+"(\w+)"', said)  # it names others, too
    assert tag is not None, said
    assert tag[1] == platform(wheel).replace("manylinux2014", "manylinux_2_17"), said


@pytest.fixture(scope="module")
def aarch64(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python for aarch64, fetched from Debian."""
    if not shutil.which("qemu-aarch64") or not shutil.which("apt-get"):
        pytest.skip("needs qemu-aarch64 (qemu-user) and apt-get")
    if "SPARSEMAE_TEST_AARCH64" in os.environ:  # fetched before
        return Path(os.environ["SPARSEMAE_TEST_AARCH64"])
    folder = tmp_path_factory.mktemp("aarch64")
    script: list[str | Path] = [
        ROOT / "tests/native/aarch64_python.sh",
        sys.executable,
        folder,
        ROOT / "constraints.txt",
    ]
    subprocess.run(script, check=True, capture_output=True)
    return folder


def native_and_wanted(model: PackedModel, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Logits of this processor's portable kernels and of the float64 twin; model and images as files in a folder."""
    images = np.random.default_rng(1).standard_normal((3, 3, 16, 16), np.float32)
    write(folder / "model", model)
    (folder / "images").write_bytes(images.tobytes())
    return reference.native(model, 1, "portable")(images, False), reference.forward(model, images)


@pytest.mark.holds("take.6")
@pytest.mark.parametrize("wheel", [w for w in WHEELS if platform(w) == "manylinux2014_aarch64"], ids=platform)
def test_the_aarch64_wheel_in_python_under_qemu(wheel: Path, aarch64: Path, tmp_path: Path, figure: Figure) -> None:
    """The portable kernels have the bits of x86, NEON's are within the bar of fp32."""
    with zipfile.ZipFile(wheel) as content:
        content.extractall(tmp_path / "site")
    code = (
        "import sys, numpy\nfrom sparsemae.runtime import load\nmodel = load('model', 2)\n"
        "images = numpy.fromfile('images', numpy.float32).reshape(3, 3, 16, 16)\n"
        "sys.stdout.buffer.write(model.isa.encode() + b' ' + model(images).tobytes())"
    )
    paths = f"{tmp_path / 'site'}:{aarch64 / 'site'}"
    for dtype in ("fp32", "bf16", "int8"):
        portable, wanted = native_and_wanted(reference.random_model(reference.TINY, dtype=dtype), tmp_path)
        for isa in ("portable", "neon"):
            done = subprocess.run(
                ["qemu-aarch64", "-L", aarch64 / "root", "-E", f"PYTHONPATH={paths}", "-E", f"SPARSEMAE_ISA={isa}",
                 aarch64 / "root/usr/bin/python3.11", "-c", code], cwd=tmp_path, capture_output=True, check=True,
            )  # fmt: skip
            name, _, content_ = done.stdout.partition(b" ")
            assert name.decode() == isa
            got = np.frombuffer(content_, np.float32).reshape(3, -1)
            if isa == "portable":
                assert (got == portable).all()
            assert np.abs(got - wanted).max() <= 2e-5 * max(float(wanted.std()), 0.3)
    figure("3 types of weights: portable kernels have equal bits")


@pytest.mark.holds("take.6")
@pytest.mark.parametrize("wheel", [w for w in WHEELS if "musllinux" in platform(w)], ids=platform)
def test_the_musl_wheels_library_in_a_c_program(
    wheel: Path, tmp_path: Path, request: pytest.FixtureRequest, figure: Figure
) -> None:
    """Under Debian's musl: its loader for this processor runs the program, qemu the one for aarch64."""
    shared, zig = library(wheel, tmp_path), Path(pytest.importorskip("ziglang").__file__).with_name("zig")
    processor = platform(wheel).removeprefix("musllinux_1_2_")
    build: list[str | Path] = [
        zig, "cc", "-O2", "-target", f"{processor}-linux-musl", "-dynamic", "-I", ROOT / "include",
        ROOT / "tests/native/forward.c", shared, "-o", tmp_path / "forward", f"-Wl,-rpath,{shared.parent}",
    ]  # fmt: skip
    subprocess.run(build, check=True, capture_output=True)
    if processor == "aarch64":
        runner: list[str | Path] = ["qemu-aarch64", "-L", request.getfixturevalue("aarch64") / "root"]
    else:
        if not shutil.which("apt-get"):
            pytest.skip("needs apt-get")
        fetch = "apt-get download musl && dpkg -x musl_*.deb ."
        subprocess.run(fetch, shell=True, check=True, capture_output=True, cwd=tmp_path)
        runner = [tmp_path / "lib/ld-musl-x86_64.so.1"]
    for dtype in ("fp32", "bf16", "int8"):
        portable, wanted = native_and_wanted(reference.random_model(reference.TINY, dtype=dtype), tmp_path)
        for isa in ("portable", "") if dtype == "fp32" else ("portable",):  # none: the fastest
            command = [*runner, tmp_path / "forward", "model", "images", isa]
            done = subprocess.run(command, cwd=tmp_path, capture_output=True, check=True)
            got = np.frombuffer(done.stdout, np.float32).reshape(len(portable), -1)
            assert isa != "portable" or (got == portable).all()
            assert np.abs(got - wanted).max() <= 2e-5 * max(float(wanted.std()), 0.3)
    figure("3 types of weights: portable kernels have equal bits")


@pytest.mark.holds("take.6")
@pytest.mark.parametrize("wheel", [w for w in WHEELS if platform(w) == "manylinux2014_x86_64"], ids=platform)
def test_the_x86_64_wheel_in_an_empty_environment(wheel: Path, image_folder: Path, tmp_path: Path) -> None:
    """What it prints there for a packed file is what this checkout prints."""
    model = reference.random_model(reference.vit_shape(num_classes=2), dtype="fp32")
    card = replace(model.config.card, class_names=("cat", "dog"))
    write(tmp_path / "small", PackedModel(replace(model.config, card=card), model.tensors))
    venv.create(tmp_path / "env", with_pip=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    pip: list[str | Path] = [tmp_path / "env/bin/python", "-m", "pip", "install", "--quiet", wheel]
    subprocess.run(pip, check=True, capture_output=True, env=environment)
    for words in (
        ["predict", "small", str(image_folder / "val"), "--format", "csv"], ["evaluate", "small", str(image_folder)],
        ["web", "small", "site"],
    ):  # fmt: skip
        there, here = (
            subprocess.run(
                [*program, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
            )
            for program in ([tmp_path / "env/bin/sparsemae"], [sys.executable, "-m", "sparsemae"])
        )
        assert (there.stdout, there.stderr) == (here.stdout, here.stderr)
        assert there.stdout
    assert {file.name for file in (tmp_path / "site").iterdir()} >= {"index.html", "model.safetensors", *MODULES}
