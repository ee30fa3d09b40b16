"""`sparsemae.load`: the same calls for packed files, without torch, and for runs, and every kind of image."""

import io
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SceneRun
from PIL import Image

import sparsemae
from sparsemae.cli import main
from sparsemae.data.images import as_rgb
from sparsemae.predictor import Prediction, Predictor

WITHOUT_TORCH = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "timm", "torchvision", "lightning_fabric", "jsonargparse"):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocked())
"""


@pytest.fixture(scope="module")
def packed(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packed") / "model.safetensors"
    main(["pack", str(runs / "finetune"), str(path), "--dtype", "fp32"])
    return path


@pytest.fixture
def photograph(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / 'photo, of a "cat"\n.png')
    return next(tmp_path.iterdir())


@pytest.fixture(params=["run", "packed"])
def predictor(request: pytest.FixtureRequest, runs: Path, packed: Path) -> Predictor:
    return sparsemae.load(packed if request.param == "packed" else runs / "finetune")


def inputs(file: Path) -> dict[str, Any]:
    """One image, in all kinds."""
    with Image.open(file) as opened:
        pixels = np.asarray(opened.convert("RGB"))
    return {
        "path": file, "name": str(file), "content": file.read_bytes(), "stream": io.BytesIO(file.read_bytes()),
        "array": pixels,
        "strided": np.repeat(pixels, 2, 1)[:, ::2],
        "rgba": np.dstack([pixels, np.full(pixels.shape[:2], 255, np.uint8)]),
    }  # fmt: skip


def same(found: list[Any], wanted: list[Any]) -> bool:
    """Torch's sums depend on the batch, in the last digits."""
    for one, other in zip(found, wanted, strict=True):
        assert [best.label for best in one] == [best.label for best in other]
        assert [best.probability for best in one] == pytest.approx([best.probability for best in other], rel=1e-5)
    return True


@pytest.mark.holds("take.1")
def test_five_kinds_of_input_have_one_answer(predictor: Predictor, photograph: Path, figure: Any) -> None:
    (wanted,) = predictor.predict(photograph, top_k=3)
    assert len(wanted) == 3
    with photograph.open("rb") as file, Image.open(photograph) as opened:
        kinds = inputs(photograph) | {"file": file, "pil": opened}
        for one in kinds.values():
            assert predictor.predict(one, top_k=3) == [wanted]
        many = [*kinds.values(), *[opened, file] * 9]
        assert same(predictor.predict(many, top_k=3), [wanted] * len(many))
        assert same(predictor.predict(iter(many), top_k=3), [wanted] * len(many))
        opened.seek(0)  # it is the caller's own, as the file is
        assert not file.closed
    assert same(predictor.predict(np.stack([kinds["array"]] * 2), top_k=3), [wanted] * 2)
    assert predictor.predict([]) == predictor.predict(np.zeros((0, 9, 9, 3), np.uint8)) == []
    figure(f"{len(kinds)} kinds of input")


@pytest.mark.holds("take.1")
def test_packed_files_answer_so_without_torch(packed: Path, photograph: Path) -> None:
    wanted = sparsemae.load(packed).predict(photograph)
    code = WITHOUT_TORCH + (
        "import sparsemae, numpy as np, io\nfrom PIL import Image\n"
        f"file, model = {str(photograph)!r}, sparsemae.load({str(packed)!r})\ncontent = open(file, 'rb').read()\n"
        "print(model.predict([file, content, io.BytesIO(content), Image.open(file), np.asarray(Image.open(file))]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(wanted * 5)


def test_what_is_no_model_is_said_to_be_none_without_torch(packed: Path, tmp_path: Path) -> None:
    """And not that torch is missing, which it is not for this."""
    (tmp_path / "cut.safetensors").write_bytes(packed.read_bytes()[:100])
    (tmp_path / "empty.safetensors").touch()
    (tmp_path / "header.safetensors").write_bytes((2**20).to_bytes(8, "little") + bytes(2**20 + 1))
    code = WITHOUT_TORCH + (
        "import sparsemae\nfor name in sys.argv[1:]:\n"
        "    try:\n        sparsemae.load(name)\n    except ValueError as error:\n        print(error)"
    )
    names = ("cut.safetensors", "empty.safetensors", "header.safetensors", "absent.safetensors")
    command = [sys.executable, "-c", code, *names]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    *damaged, absent = done.stdout.splitlines()
    for name, line in zip(names[:3], damaged, strict=True):
        assert line.startswith(f"{name}: not a readable safetensors file: ")
    assert absent == "absent.safetensors: no such file or run folder"


def test_order_is_kept_and_gray_is_repeated(predictor: Predictor) -> None:
    generator = np.random.default_rng(1)
    images = [generator.integers(0, 256, (28 + i, 40 - i), dtype=np.uint8) for i in range(30)]
    wanted = [predictor.predict(image)[0] for image in images]
    assert same(predictor.predict([image[..., None] for image in images]), wanted)
    assert same(predictor.predict([np.dstack([image] * 3) for image in images]), wanted)
    assert len({found[0].probability for found in wanted}) > 20


def test_the_cards_rules_hold_for_what_has_them(packed: Path, tmp_path: Path) -> None:
    predictor = sparsemae.load(packed)
    pixels = np.random.default_rng(2).integers(0, 256, (40, 60, 4), dtype=np.uint8)
    turned = Image.fromarray(pixels[..., :3])
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(pixels).save(tmp_path / "clear.png")
    for name, array in (("turned.png", None), ("clear.png", pixels)):
        seen = as_rgb(tmp_path / name, predictor.card.input)
        wanted = predictor.predict(np.asarray(seen))
        with Image.open(tmp_path / name) as opened:
            assert predictor.predict(tmp_path / name) == predictor.predict(opened) == wanted
        assert array is None or predictor.predict(array) == wanted


@pytest.mark.parametrize(
    ("image", "said"),
    [
        ("absent.png", r"^absent\.png: unreadable image: No such file"),
        (b"no image", "^image 1: unreadable image: not an image"),
        (io.BytesIO(b"\x89PNG\r\n\x1a\n cut"), "^image 1: unreadable image"),
        (io.StringIO("text"), "^image 1: unreadable image"),
        (Image.new("F", (4, 4)), "^image 1: .*wanted 8 or 16 bits"),
        (np.zeros((4, 4, 3), np.float32), "^image 1: wanted an array of uint8, got float32"),
        (np.zeros((4, 4), bool), "^image 1: wanted an array of uint8, got bool"),
        (np.zeros((3, 8, 8), np.uint8), r"^image 1: wanted \[H, W\] or .* got \[3, 8, 8\]"),
        (np.zeros((8, 8, 2), np.uint8), r"^image 1: wanted .* got \[8, 8, 2\]"),
        (np.zeros((0, 8, 3), np.uint8), r"^image 1: wanted .* got \[0, 8, 3\]"),
        (np.zeros((2, 8, 8, 3), np.uint8), r"^image 1: wanted .* got \[2, 8, 8, 3\]"),
        ([1, 2], "^image 1: wanted a path, bytes, .* got list"),
        (None, "^image 1: wanted .* got NoneType"),
    ],
)
def test_what_cannot_be_read_is_named(packed: Path, photograph: Path, image: Any, said: str) -> None:
    predictor = sparsemae.load(packed)
    with pytest.raises(ValueError, match=said):
        predictor.predict([photograph, image, photograph])
    first, error, last = predictor.stream([photograph, image, photograph])
    assert first == last
    assert isinstance(error, ValueError)
    with pytest.raises(ValueError, match="images: wanted one image or several, got int"):
        predictor.predict(7)  # type: ignore[arg-type]


def test_a_segmenters_map_has_the_images_size(scene_run: SceneRun, tmp_path: Path) -> None:
    predictor = sparsemae.load(scene_run.folder)
    array = np.random.default_rng(3).integers(0, 256, (70, 90), dtype=np.uint8)
    first, second = predictor.predict([array, array[:33].copy()])
    assert (first.shape, second.shape, first.dtype) == ((70, 90), (33, 90), np.uint8)
    assert len(predictor.card.class_names) > first.max()
    with pytest.raises(ValueError, match=r"images: wanted float32 \[B, 3, H, W\], got float64"):
        predictor(np.zeros((1, 3, 64, 64)))  # type: ignore[arg-type]


def test_what_both_kinds_refuse(predictor: Predictor, photograph: Path) -> None:
    side = predictor.card.input.img_size
    with pytest.raises(
        ValueError, match=rf"images: wanted float32 \[B, 3, {side}, {side}\], got float32 \[1, 3, 9, 9\]"
    ):
        predictor(np.zeros((1, 3, 9, 9), np.float32))
    frozen = np.zeros((1, 3, side, side), np.float32)
    frozen.flags.writeable = False
    assert predictor(frozen).shape == (1, 10)
    assert predictor.features(frozen).shape[:2] == (1, 17)
    with pytest.raises(ValueError, match="top_k: wanted at least 1, got 0"):
        predictor.predict(photograph, top_k=0)
    with pytest.raises(ValueError, match=r"top_k: wanted at least 1, got 'two\.jpg'"):
        predictor.predict(photograph, "two.jpg")  # type: ignore[arg-type]


def test_a_stream_that_is_left_leaves_no_thread(packed: Path, photograph: Path) -> None:
    before = threading.active_count()
    results: Any = sparsemae.load(packed).stream([photograph] * 1000)
    assert isinstance(next(results)[0], Prediction)
    results.close()
    assert threading.active_count() == before
