"""The NEON kernels, cross-compiled and run by qemu: against the float64 twin."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import reference
from conftest import Figure

from sparsemae.packing.format import PackedModel, write

ROOT = Path(__file__).parents[2]
COMPILER = "aarch64-linux-gnu-g++"
SOURCES = (
    "bench", "bounds", "c_api", "codes", "dispatch", "json", "kernels_neon", "kernels_portable", "masks",
    "packed_file", "packed_preprocess", "packed_segment", "preprocess", "processor", "segmenter", "team",
    "thread_pool", "vit", "vit_build",
)  # fmt: skip
FLAGS = ["-std=c++20", "-O3", "-Wall", "-Wextra", "-ffp-contract=off", "-fno-math-errno", "-fno-schedule-insns"]
KINDS = {
    "plain": ("2:32", {}),
    "dense": (None, {}),
    "odd n, odd heads": ("3:7", {"embed_dim": 35, "num_heads": 5, "mlp_hidden": 49}),
    "wide": ("4:32", {"embed_dim": 480, "num_heads": 4, "mlp_hidden": 960, "depth": 1}),
    "one token": ("2:32", {"image_height": 4, "image_width": 4, "class_token": False}),
}

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not shutil.which(COMPILER), reason=f"needs {COMPILER}")]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not shutil.which("qemu-aarch64"):
        pytest.skip("needs qemu-aarch64 (qemu-user)")
    path = tmp_path_factory.mktemp("arm") / "forward"
    files = [ROOT / f"native/{name}.cpp" for name in SOURCES]
    command: list[str | Path] = [COMPILER, *FLAGS, "-DSPARSEMAE_NEON", "-I", ROOT / "include"]
    fp16 = path.with_name("fp16.o")
    parts: list[list[str | Path]] = [
        ["-march=armv8.2-a+fp16", "-c", ROOT / "native/kernels_neonfp16.cpp", "-o", fp16],
        ["-static", *files, fp16, ROOT / "tests/native/forward.cpp", "-o", path],
    ]
    for part in parts:
        subprocess.run([*command, *part], check=True, capture_output=True)
    return path


def run(program: Path, folder: Path, threads: int, isa: str, processor: str = "max") -> tuple[str, np.ndarray]:
    """The kernels' name and the logits of the model and the three images of a folder."""
    words: list[str | Path] = [program, folder / "model", folder / "images", "3", str(threads), isa]
    done = subprocess.run(["qemu-aarch64", "-cpu", processor, *words], capture_output=True, check=True)
    return done.stderr.decode().strip(), np.frombuffer(done.stdout, np.float32).reshape(3, -1)


def twin(model: PackedModel, folder: Path) -> np.ndarray:
    """Logits of the float64 twin; the model and its three images are written into a folder."""
    vit = model.config.vit
    images = np.random.default_rng(1).standard_normal((3, vit.in_chans, vit.image_height, vit.image_width), np.float32)
    write(folder / "model", model)
    (folder / "images").write_bytes(images.tobytes())
    return reference.forward(model, images)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.holds("fast.4")
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_neon_agrees_with_the_twin(program: Path, kind: str, dtype: str, tmp_path: Path, figure: Figure) -> None:
    pattern, changes = KINDS[kind]
    wanted = twin(reference.random_model(reference.vit_shape(**changes), pattern, dtype), tmp_path)
    for isa, limit in {"neon": 2e-5, "neonfp16": 4e-2}.items():
        if isa == "neonfp16" and dtype == "fp32":
            continue
        (name, one), (_, two) = (run(program, tmp_path, threads, isa) for threads in (1, 2))
        assert name == isa
        assert (one == two).all()
        error = np.abs(one - wanted).max() / max(float(wanted.std()), 0.3)
        figure(f"{isa}: {error:.1e} of the spread")
        assert error <= limit


def test_fp16_is_taken_where_it_is_safe(program: Path, tmp_path: Path) -> None:
    """Where the processor has it, the weights are not fp32, and no sum can overflow."""
    model = reference.random_model(reference.TINY)
    wanted = twin(model, tmp_path)
    assert run(program, tmp_path, 1, "", "cortex-a57")[0] == "neon"
    for factor, isa in ((1.0, "neonfp16"), (300.0, "neonfp16"), (1e5, "neon")):
        model.tensors["blocks.0.norm2.weight"][3] = factor
        wanted = twin(model, tmp_path)
        for named in ("", "neonfp16"):
            name, got = run(program, tmp_path, 1, named)
            assert name == isa
            assert np.abs(got - wanted).max() <= 4e-2 * max(float(wanted.std()), 0.3)
    for pattern, dtype in (("2:32", "fp32"), (None, "bf16")):
        twin(reference.random_model(reference.TINY, pattern, dtype), tmp_path)
        assert run(program, tmp_path, 1, "")[0] == "neon"
