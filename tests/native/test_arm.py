"""The NEON kernels, cross-compiled and run by qemu: against the float64 twin."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import reference

from sparsemae.packing.format import write

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
    subprocess.run(
        [COMPILER, *FLAGS, "-DSPARSEMAE_NEON", "-static", "-I", ROOT / "include", *files,
         ROOT / "tests/native/forward.cpp", "-o", path], check=True, capture_output=True,
    )  # fmt: skip
    return path


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.holds("fast.4")
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_neon_agrees_with_the_twin(program: Path, kind: str, dtype: str, tmp_path: Path) -> None:
    pattern, changes = KINDS[kind]
    model = reference.random_model(reference.vit_shape(**changes), pattern, dtype)
    vit = model.config.vit
    images = np.random.default_rng(1).standard_normal((3, vit.in_chans, vit.image_height, vit.image_width), np.float32)
    wanted = reference.forward(model, images)
    write(tmp_path / "model", model)
    (tmp_path / "images").write_bytes(images.tobytes())
    outputs = []
    for threads in (1, 2):
        files: list[str | Path] = [program, tmp_path / "model", tmp_path / "images"]
        command = ["qemu-aarch64", *files, "3", str(threads), ""]
        done = subprocess.run(command, capture_output=True, check=True)
        assert done.stderr == b"neon\n"
        outputs.append(np.frombuffer(done.stdout, np.float32).reshape(wanted.shape))
    assert (outputs[0] == outputs[1]).all()
    assert np.abs(outputs[0] - wanted).max() <= 2e-5 * max(float(wanted.std()), 0.3)
