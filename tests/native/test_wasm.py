"""The WebAssembly modules in Node: bits of the native portable kernels without relaxed SIMD, the error bar with it."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import reference
from conftest import Figure

from sparsemae.packing.format import PackedModel, write

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ziglang") is None, reason="needs the ziglang wheel (make wasm)"),
    pytest.mark.skipif(shutil.which("node") is None, reason="needs node"),
]


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wasm")
    subprocess.run([ROOT / "native/build_wasm.sh", sys.executable, folder], check=True, capture_output=True)
    return folder


def run(module: Path, model: PackedModel, images: np.ndarray, folder: Path) -> np.ndarray:
    write(folder / "model", model)
    (folder / "images").write_bytes(images.tobytes())
    done = subprocess.run(
        ["node", "--no-warnings", "--experimental-wasm-relaxed-simd", ROOT / "tests/native/forward.mjs", module,
         folder / "model", folder / "images", str(len(images)), "1"], capture_output=True, check=True,
    )  # fmt: skip
    return np.frombuffer(done.stdout, np.float32).reshape(len(images), -1)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("pattern", ["2:32", "5:16", None])
def test_modules_agree_with_the_native_kernels(modules: Path, pattern: str | None, dtype: str, tmp_path: Path) -> None:
    model = reference.random_model(reference.TINY, pattern, dtype)
    images = np.random.default_rng(1).standard_normal((2, 3, 16, 16), np.float32)
    wanted = reference.forward(model, images)
    plain = run(modules / "sparsemae.wasm", model, images, tmp_path)
    assert (plain == reference.native(model, 1, "portable")(images, False)).all()
    relaxed = run(modules / "sparsemae-relaxed.wasm", model, images, tmp_path)
    assert np.abs(relaxed - wanted).max() <= 2e-5 * float(wanted.std())


@pytest.mark.holds("fast.5")
def test_modules_are_small(modules: Path, figure: Figure) -> None:
    sizes = {module.name: module.stat().st_size for module in sorted(modules.glob("*.wasm"))}
    figure(", ".join(f"{name} {size:,} bytes" for name, size in sizes.items()))
    assert len(sizes) == 2
    assert max(sizes.values()) <= 150_000


@pytest.mark.parametrize("kind", ["linear", "segformer"])
def test_a_segmenter_is_refused_in_words(modules: Path, kind: str, tmp_path: Path) -> None:
    for module in modules.glob("*.wasm"):
        with pytest.raises(subprocess.CalledProcessError) as failed:
            run(module, reference.random_segmenter(kind), np.zeros((1, 3, 16, 16), np.float32), tmp_path)
        said = failed.value.stderr.decode()
        assert (failed.value.returncode, said.count("\n")) == (1, 1)
        assert said.startswith("wanted a packed model, got one that cannot be used: a page has no segmenter")
