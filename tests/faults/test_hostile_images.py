"""Images that nobody vouches for: one list of decoders, whatever they raise, and little memory."""

import io
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import PHOTOGRAPHS, tiny
from PIL import Image
from watched import memory_now, memory_peak

from sparsemae.card import InputSpec
from sparsemae.cli import main
from sparsemae.commands.check import examine
from sparsemae.commands.overlays import overlay_image
from sparsemae.data import images
from sparsemae.data.images import as_rgb, center_crop, decode_rgb
from sparsemae.data.masks import read_mask
from sparsemae.data.sources import open_source
from sparsemae.data.survey import survey
from sparsemae.data.transforms import evaluation_transform
from sparsemae.options.data import SourceConfig
from sparsemae.predictor import Prediction
from sparsemae.runtime.preprocess import transform

POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n{} loop\n%%EOF\n"
MEGABYTE = 1 << 20


def encoded(kind: str, size: tuple[int, int] = (40, 40), **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.effect_noise(size, 80).convert("RGB").save(stream, kind, **options)
    return stream.getvalue()


@pytest.mark.holds("held.1")
def test_8_postscript_by_any_name_starts_nothing(
    tmp_path: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str], came_out: Any
) -> None:
    trace, tools = tmp_path / "executed", tmp_path / "bin"
    tools.mkdir()
    (tools / "gs").write_text(f"#!/bin/sh\ntouch {trace}\n")
    (tools / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tools), prepend=os.pathsep)
    (image_folder / "val" / "cat" / "0.jpg").write_bytes(POSTSCRIPT)
    with pytest.raises(ValueError, match=r"0\.jpg: unreadable image: not an image in a known format"):
        as_rgb(image_folder / "val" / "cat" / "0.jpg")
    line = refused("check", "--data.root", str(image_folder), "--data.workers", "0")
    assert "unusable: 1" in line
    assert not trace.exists()
    came_out("PostScript named .jpg", "an endless loop in it; check, training and predict decode alike", 2, line)


def test_8_the_content_decides_among_the_list_alone(tmp_path: Path) -> None:
    for kind in ("MPO", "WEBP", "AVIF", "TIFF"):
        (tmp_path / "x.png").write_bytes(encoded(kind))
        assert as_rgb(tmp_path / "x.png").size == (40, 40)
    for kind in ("DDS", "JPEG2000", "ICNS", "PDF"):
        (tmp_path / "x.jpg").write_bytes(encoded(kind))
        with pytest.raises(ValueError, match="not an image in a known format"):
            as_rgb(tmp_path / "x.jpg")


@pytest.mark.holds("held.1")
@pytest.mark.parametrize(
    "error", [RuntimeError("Failed to decode\nimage"), MemoryError(), KeyError(3), IndexError("x"), ZeroDivisionError()]
)
def test_8_whatever_a_decoder_raises_is_the_files_fault(
    image_folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def raises(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(Image, "open", raises)
    with pytest.raises(ValueError, match=r"^x: unreadable image: .") as caught:
        decode_rgb(io.BytesIO(), "x")
    assert "\n" not in str(caught.value)
    data = SourceConfig("folder", str(image_folder), workers=0)
    assert survey(open_source(data, "train"), data) == []
    report = examine(data)
    assert {file.fault for file in report.files} == {"unusable"}
    assert all("\n" not in file.reason for file in report.files)


def test_8_damaged_avif_and_tiff_are_unreadable_files() -> None:
    for kind, at, to in (
        ("AVIF", b"ispe", b"xxxx"),
        ("AVIF", b"iloc", b"xxxx"),
        ("TIFF", b"\x01\x01\x03", b"\x01\x01\x0b"),
    ):
        content = encoded(kind, compression="tiff_lzw") if kind == "TIFF" else encoded(kind)
        assert at in content
        with pytest.raises(ValueError, match="x: unreadable image: "):
            decode_rgb(io.BytesIO(content.replace(at, to)), "x")


@pytest.mark.slow
@pytest.mark.holds("held.1")
def test_8_a_strip_takes_little_memory(tmp_path: Path, came_out: Any) -> None:
    spec = InputSpec(224, (0.5,) * 3, (0.5,) * 3, crop_pct=0.875)
    Image.new("RGB", (8, 8)).save(tmp_path / "warm.png")
    for size in ((16, 100_000), (100_000, 16)):
        Image.new("RGB", size, (200, 100, 50)).save(tmp_path / "strip.png")
        assert (tmp_path / "strip.png").stat().st_size < 20_000
        for name in ("warm.png", "strip.png"):
            before = memory_now()
            image = as_rgb(tmp_path / name)
            found = [transform(image, spec, 224, 224), evaluation_transform(spec)(image, 0)[0].numpy()]
            overlay_image(image, np.zeros(image.size[::-1], np.uint8), [(1, 2, 3)], [Prediction("a", 0, 1.0)])
            grown = memory_peak() - before
        assert grown < 400 * MEGABYTE
        assert [one.shape for one in found] == [(3, 224, 224)] * 2
        assert np.unique(found[1][0]).tolist() == [200]
    came_out("PNG of 16 x 100,000 px", "14 KB; resized, cropped and drawn with an overlay", 0, "within 400 MB")


def test_8_the_part_that_is_computed_alone_is_that_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    skimage = pytest.importorskip("skimage")
    photograph = as_rgb(Path(skimage.__file__).parent / "data" / PHOTOGRAPHS[1])
    for size in ((40, 900), (900, 40), (451, 300)):
        for way in ("bicubic", "bilinear"):
            image = photograph.resize(size)
            arguments = (image, 96, 64, 0.9, way)
            whole = np.asarray(center_crop(*arguments)).astype(int)
            with monkeypatch.context() as patch:
                patch.setattr(images, "MAX_RESIZED_PIXELS", 1)
                alone = np.asarray(center_crop(*arguments)).astype(int)
            assert alone.shape == whole.shape == (96, 64, 3)
            assert abs(alone - whole).max() <= 3
            assert abs(alone - whole).mean() < 0.1


@pytest.mark.slow
@pytest.mark.holds("held.1")
def test_8_an_image_of_too_many_pixels_is_refused_by_its_header(
    tmp_path: Path, image_folder: Path, refused: Callable[..., str], capsys: pytest.CaptureFixture[str], came_out: Any
) -> None:
    assert images.MAX_PIXELS == 2 * 89_478_485  # Pillow's own
    large = encoded("PNG", (50, 41))
    (image_folder / "val" / "dog" / "0.png").write_bytes(large)
    where = ["--data.root", str(image_folder), "--data.workers", "0"]
    main(["check", *where])
    assert "largest image: 2,050 px, of at most data.max_pixels=178,956,970" in capsys.readouterr().out
    line = refused("check", *where, "--data.max_pixels", "2049")
    wanted = "0.png: unreadable image: wanted at most max_pixels=2,049, got 50 x 41 px"
    assert wanted in line
    words = tiny("finetune", tmp_path / "run", "--data.source", "folder", *where, "--data.max_pixels", "1599")
    at = words.index("--data.train_images")
    assert "got 40 x 40 px" in refused(*words[:at], *words[at + 2 :])
    with pytest.raises(ValueError, match="wanted at most max_pixels=2,049"):
        as_rgb(image_folder / "val" / "dog" / "0.png", max_pixels=2049)
    before = memory_now()
    for width, height, got in ((30_000, 30_000, "900,000,000 px"), (16_000, 14_464, "16000 x 14464 px")):
        header = bytearray(large)  # Pillow raises at the first, and would decode the second with a warning
        header[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
        header[29:33] = zlib.crc32(header[12:29]).to_bytes(4, "big")
        (tmp_path / "bomb.png").write_bytes(header)
        with pytest.raises(ValueError, match=rf"bomb\.png: unreadable image: .*max_pixels=178,956,970, got {got}$"):
            as_rgb(tmp_path / "bomb.png")
    assert memory_peak() - before < 8 * MEGABYTE
    came_out("image of more pixels than data.max_pixels", "50 x 41 px, of at most 2,049", 2, line)


@pytest.mark.holds("held.1")
def test_8_a_pipe_or_a_device_is_no_image_and_nothing_waits_for_it(
    tmp_path: Path, image_folder: Path, refused: Callable[..., str], came_out: Any
) -> None:
    pipe = image_folder / "train" / "cat" / "0.png"
    pipe.unlink()
    os.mkfifo(pipe)
    wanted = "0.png: unreadable image: wanted a file, got a device or pipe"
    where = ["--data.root", str(image_folder), "--data.workers", "0"]
    line = refused("check", *where)
    assert f"unusable: 1 ({pipe.parent}/{wanted})" in line
    words = tiny("pretrain", tmp_path / "run", "--data.source", "folder", *where)
    at = words.index("--data.train_images")
    assert wanted in refused(*words[:at], *words[at + 2 :])
    for path in (pipe, str(pipe), "/dev/zero"):
        with pytest.raises(ValueError, match="wanted a file, got a device or pipe"):
            as_rgb(path)
    with pytest.raises(ValueError, match="unreadable mask: wanted a file, got a device or pipe"):
        read_mask(pipe)
    came_out("pipe in place of an image", "that nobody writes to; check, training, predict and masks alike", 2, line)
