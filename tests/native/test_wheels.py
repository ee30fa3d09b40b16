"""The wheels of `make wheels`: held to their platforms' rules, and those for aarch64 run under qemu."""

import os
import re
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import reference
from conftest import ROOT, Figure

from sparsemae.commands.web import MODULES
from sparsemae.packing.format import write

sys.path.insert(0, str(ROOT / "tools"))

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


@pytest.mark.holds("take.6")
@pytest.mark.parametrize("wheel", WHEELS, ids=platform)
def test_a_wheel_has_what_its_tag_says(wheel: Path, tmp_path: Path, figure: Figure) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert wheel.name.split("-")[2:4] == ["py3", "none"]
    assert {f"sparsemae/web/{name}" for name in MODULES} <= set(names)
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
        assert set(re.findall(rb"/[\w./+-]+\.dylib", content)) <= {b"/usr/lib/libSystem.B.dylib"}
    figure(f"{wheel.name}: {wheel.stat().st_size / 1e6:.2f} MB")


@pytest.mark.holds("take.6")
@pytest.mark.parametrize("wheel", [w for w in WHEELS if "linux" in platform(w)], ids=platform)
def test_auditwheel_accepts_the_linux_ones(wheel: Path, tmp_path: Path) -> None:
    pytest.importorskip("auditwheel")
    command = [sys.executable, "-m", "auditwheel", "show", str(wheel)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    tags = {tag for tag in re.findall(r'"(\w+)"', said) if tag.endswith(platform(wheel).split("_", 1)[1][-6:])}
    wanted = platform(wheel).replace("manylinux2014", "manylinux_2_17")
    assert wanted in tags or platform(wheel) in tags, said


@pytest.mark.holds("take.6")
@pytest.mark.parametrize("wheel", [w for w in WHEELS if platform(w).endswith("aarch64")], ids=platform)
def test_on_aarch64_the_portable_kernels_have_the_bits_of_x86(wheel: Path, tmp_path: Path, figure: Figure) -> None:
    """The wheel's library, called by a C program under qemu; a Python for aarch64 is not to be had here."""
    if not shutil.which("qemu-aarch64"):
        pytest.skip("needs qemu-aarch64 (qemu-user)")
    ziglang = pytest.importorskip("ziglang")
    from wheels import PLATFORMS

    target, *_ = PLATFORMS[platform(wheel)]
    shared = library(wheel, tmp_path)
    program, zig = tmp_path / "forward", Path(ziglang.__file__).with_name("zig")
    subprocess.run(
        [zig, "cc", "-target", target, "-I", ROOT / "include", ROOT / "tests/native/forward.c", shared, "-o", program,
         f"-Wl,-rpath,{shared.parent}"], check=True, capture_output=True,
    )  # fmt: skip
    for dtype in ("fp32", "bf16", "int8"):
        model = reference.random_model(reference.TINY, dtype=dtype)
        images = np.random.default_rng(1).standard_normal((3, 3, 16, 16), np.float32)
        write(tmp_path / "model", model)
        (tmp_path / "images").write_bytes(images.tobytes())
        command = ["qemu-aarch64", *loader(target), program, tmp_path / "model", tmp_path / "images"]
        found = {}
        for isa in ("portable", "neon"):
            done = subprocess.run([*command, isa], capture_output=True, check=True)
            found[isa] = np.frombuffer(done.stdout, np.float32).reshape(3, -1)
        assert (found["portable"] == reference.native(model, 1, "portable")(images, False)).all()
        wanted = reference.forward(model, images)
        assert np.abs(found["neon"] - wanted).max() <= 2e-5 * max(float(wanted.std()), 0.3)
    figure("3 types of weights, equal bits")


def loader(target: str) -> list[str]:
    """Where qemu finds the system's libraries of aarch64."""
    return ["-L", "/usr/aarch64-linux-gnu"] if "gnu" in target else []
