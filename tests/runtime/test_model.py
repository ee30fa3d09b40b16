"""The public runtime: load, call, features, predict; small, quick to import, and without torch."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import reference
from PIL import Image

from sparsemae.packing import format
from sparsemae.packing.format import PackedModel, write
from sparsemae.runtime import Prediction, load, native

VIT_BASE = {
    "embed_dim": 768, "depth": 12, "num_heads": 12, "mlp_hidden": 3072, "patch_size": 16, "image_height": 224,
    "image_width": 224, "num_classes": 1000,
}  # fmt: skip


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    model = reference.random_model(reference.TINY)
    card = replace(model.config.card, class_names=tuple(f"class {i}" for i in range(10)))
    write(tmp_path / "model.safetensors", PackedModel(replace(model.config, card=card), model.tensors))
    return tmp_path / "model.safetensors"


@pytest.fixture(scope="module")
def sparsemae_t(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packed") / "tiny.safetensors"
    write(path, reference.random_model(reference.vit_shape(**VIT_BASE), "2:32", "bf16", "bf16"))
    return path


def run(code: str) -> str:
    """Standard output of a fresh Python."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_predict_names_the_best_classes(packed: Path, tmp_path: Path) -> None:
    files = []
    for i in range(3):
        files.append(tmp_path / f"{i}.png")
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(files[-1])
    model = load(packed, threads=1)
    results = model.predict(files, top_k=3, batch_size=2)
    assert [len(best) for best in results] == [3, 3, 3]
    for best in results:
        assert isinstance(best[0], Prediction)
        assert best[0].label == f"class {best[0].index}"
        assert 1 >= best[0].probability >= best[1].probability >= best[2].probability > 0
    assert sum(p.probability for p in model.predict(files[:1], top_k=10)[0]) == pytest.approx(1)
    assert model.predict([], top_k=1) == []


def test_wrong_images_are_refused(packed: Path) -> None:
    model = load(packed, threads=1)
    wrong: tuple[np.ndarray, ...] = (
        np.zeros((1, 3, 16, 17), np.float32),
        np.zeros((1, 3, 16, 16), np.float64),
        np.zeros((3, 16, 16), np.float32),
    )
    for images in wrong:
        with pytest.raises(ValueError, match=r"images: wanted float32 \[B, 3, 16, 16\], got"):
            model(images)
    strided = np.zeros((2, 3, 16, 32), np.float32)[..., ::2]
    assert model(strided).shape == (2, 10)
    assert model.features(strided).shape == (2, 17, 64)


def test_a_file_that_is_replaced_while_it_is_loaded(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def replaced_by(path: Path) -> PackedModel:
        found = format.read(path)
        write(path, PackedModel(replace(other.config, card=named), other.tensors))
        return found

    other = reference.random_model(reference.TINY, seed=1)
    named = replace(other.config.card, class_names=tuple(f"other {i}" for i in range(10)))
    monkeypatch.setattr("sparsemae.runtime.model.read", replaced_by)
    with pytest.raises(ValueError, match=r"model\.safetensors: wanted one file while it is loaded, got another in its"):
        load(packed, threads=1)
    assert load(packed, threads=1).card.class_names == named.class_names


def test_encoder_has_no_classes(tmp_path: Path) -> None:
    write(tmp_path / "m", reference.random_model(reference.vit_shape(num_classes=0)))
    with pytest.raises(ValueError, match="encoder"):
        load(tmp_path / "m").predict(["x.jpg"])


@pytest.mark.holds("packed.5")
def test_isa_is_forced(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for isa in native.usable_isas():
        monkeypatch.setenv("SPARSEMAE_ISA", isa)
        below = {"avxvnni": "avx2"}  # what multiplies int8 alone leaves a file of bf16 to the next one down
        assert load(packed).isa == below.get(isa, isa)
    monkeypatch.setenv("SPARSEMAE_ISA", "sse9")
    with pytest.raises(ValueError, match=r"model\.safetensors: .*(ISA|instruction set).*sse9"):
        load(packed)


@pytest.mark.holds("packed.1")
def test_torch_is_never_imported(packed: Path) -> None:
    out = run(
        f"import sys, sparsemae; sparsemae.load({str(packed)!r}); sparsemae.ModelCard, sparsemae.Predictor\n"
        "print([m for m in ('torch', 'timm', 'torchvision') if m in sys.modules])"
    )
    assert out.strip() == "[]"


@pytest.mark.holds_only
@pytest.mark.holds("packed.1")
def test_import_and_load_are_quick(sparsemae_t: Path) -> None:
    code = (
        "import time, numpy; t = time.perf_counter(); import sparsemae.runtime as r; i = time.perf_counter()\n"
        f"r.load({str(sparsemae_t)!r}, threads=2); print(i - t, time.perf_counter() - i)"
    )
    times = np.array([[float(x) for x in run(code).split()] for _ in range(5)]).min(axis=0)
    assert times[0] <= 0.15
    assert times[1] <= 0.1


@pytest.mark.holds("packed.7")
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.slow
def test_resident_size_of_a_process_that_classifies(sparsemae_t: Path, tmp_path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (375, 500, 3), dtype=np.uint8)).save(tmp_path / "x.jpg")
    code = (
        f"import sparsemae.runtime as r; r.load({str(sparsemae_t)!r}, 2).predict([{str(tmp_path / 'x.jpg')!r}])\n"
        "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])"
    )
    assert int(run(code)) * 1024 / 1e6 < 120
