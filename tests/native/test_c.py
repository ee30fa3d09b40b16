"""The library for C: its logits are Python's, its errors come back, and no file harms it."""

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import reference
from conftest import ROOT
from documents import blocks
from mutations import edit, scramble
from PIL import Image

from sparsemae.packing.format import PackedModel, write
from sparsemae.runtime import load, native
from sparsemae.terminal import printable

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("cmake") or not shutil.which("cc"), reason="needs cmake and a C compiler"),
]
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")
KINDS = {
    "plain": {"num_classes": 10},
    "oblong": {"image_width": 24, "pre_norm": True, "patch_bias": False},
    "registers": {"reg_tokens": 2, "no_embed_class": True, "layer_scale": True},
}


def build(folder: Path, *options: str) -> Path:
    configure = ["cmake", "-S", str(ROOT), "-B", str(folder), *options]
    subprocess.run(configure, check=True, capture_output=True)
    subprocess.run(["cmake", "--build", str(folder), "-j2"], check=True, capture_output=True)
    return folder


def compiled(source: Path, library: Path, *flags: str) -> Path:
    program = library / source.stem
    subprocess.run(
        ["cc", "-std=c99", "-Wall", "-Wextra", "-Werror", *flags, source, "-I", ROOT / "include", *linked(library),
         "-o", program], check=True,
    )  # fmt: skip
    return program


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The installed library, and the program beside it."""
    folder = tmp_path_factory.mktemp("c")
    shutil.copy(native.FILE, folder)
    command = ["c++", "-std=c++20", "-O2", ROOT / "native/run.cpp", "-I", ROOT / "include", *linked(folder)]
    subprocess.run([*command, "-o", folder / "sparsemae-run"], check=True)
    return folder


def linked(library: Path) -> list[str | Path]:
    return ["-L", library, "-lsparsemae", f"-Wl,-rpath,{library}"]


def packed(path: Path, dtype: str = "bf16", interpolation: str = "bicubic", **vit: object) -> Path:
    model = reference.random_model(reference.vit_shape(**vit), "2:32", dtype)
    spec = replace(
        model.config.card.input, interpolation=interpolation, crop_pct=0.875, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4)
    )
    names = tuple(f'"{i}" é\n' for i in range(model.config.vit.num_classes))
    card = replace(model.config.card, input=spec, class_names=names)
    write(path, PackedModel(replace(model.config, card=card), model.tensors))
    return path


@pytest.mark.holds("take.5")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_the_programs_logits_are_pythons(
    library: Path, tmp_path: Path, kind: str, dtype: str, figure: Callable[[str], None]
) -> None:
    generator, images = np.random.default_rng(0), list[Path]()
    for i, size in enumerate([(16, 16), (31, 200, 3), (300, 7), (61, 47, 3), (2, 3, 3), (1, 1)]):
        images.append(tmp_path / f"{i}.{'ppm' if len(size) == 3 else 'pgm'}")
        Image.fromarray(generator.integers(0, 256, size, dtype=np.uint8)).save(images[-1])
    for interpolation in INTERPOLATIONS:
        file = packed(tmp_path / "model", dtype, interpolation, **KINDS[kind])
        model = load(file)
        command: list[str | Path] = [library / "sparsemae-run", "--logits", file, *images]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        got = np.array([line.split() for line in done.stdout.splitlines()], np.float32)
        with_python = [model.prepare(Image.open(image).convert("RGB")) for image in images]
        assert np.array_equal(got, np.concatenate([model(image[None]) for image in with_python]))
    figure(f"{len(images) * len(INTERPOLATIONS)} images, equal bits")


@pytest.mark.holds_only
@pytest.mark.holds("take.5")
def test_cmake_builds_both(tmp_path: Path) -> None:
    folder, file = build(tmp_path / "build", "-DSPARSEMAE_PORTABLE=ON"), packed(tmp_path / "model")
    Image.new("RGB", (30, 20), "red").save(tmp_path / "red.ppm")
    done = subprocess.run([folder / "sparsemae-run", file, tmp_path / "red.ppm"], capture_output=True, check=True)
    best = load(file).predict(tmp_path / "red.ppm", 1)[0][0]
    assert printable(best.label) in done.stdout.decode()


def test_the_program_names_classes_and_what_it_cannot_read(library: Path, tmp_path: Path) -> None:
    file, run = packed(tmp_path / "model"), library / "sparsemae-run"
    Image.new("RGB", (30, 20), "red").save(tmp_path / "red.ppm")
    (tmp_path / "cut.ppm").write_bytes((tmp_path / "red.ppm").read_bytes()[:100])
    (tmp_path / "huge.ppm").write_bytes(b"P6\n65535 65535\n255\n")
    (tmp_path / "jpeg.ppm").write_bytes(b"\xff\xd8\xff\xe0")
    names = ("red", "cut", "huge", "jpeg", "absent", "red")
    done = subprocess.run([run, file, *(tmp_path / f"{name}.ppm" for name in names)], capture_output=True, check=False)
    best = load(file).predict(tmp_path / "red.ppm", 3)[0]
    shown = ", ".join(f"{printable(one.label)} {one.probability:.1%}" for one in best)
    assert done.stdout.decode() == f"{tmp_path / 'red.ppm'}: {shown}\n" * 2
    said = done.stderr.decode().splitlines()
    assert [line.split(": ")[1] for line in said] == [str(tmp_path / f"{name}.ppm") for name in names[1:-1]]
    assert done.returncode == 2
    cases: dict[str, list[str]] = {
        "usage:": [], "wanted a packed model": [str(tmp_path / "red.ppm"), "x.ppm"],
        "No such file": ["absent", "x.ppm"],
        "wanted a packed model, got": ["/dev/zero", "x.ppm"],
        "wanted a model with classes": [str(packed(tmp_path / "encoder", num_classes=0)), str(tmp_path / "red.ppm")],
        "wanted finite logits": [str(tmp_path / "infinite"), str(tmp_path / "red.ppm")],
    }  # fmt: skip
    model = reference.random_model(reference.vit_shape(num_classes=2), dtype="fp32")
    model.tensors["head.weight"][:] = 3e38
    write(tmp_path / "infinite", model)
    for wanted, words in cases.items():
        done = subprocess.run([run, *words], capture_output=True, check=False)
        assert (done.returncode, done.stdout) == (2, b"")
        (line,) = done.stderr.decode().splitlines()
        assert wanted in line


@pytest.mark.holds("take.5")
def test_the_program_of_the_page_runs(library: Path, tmp_path: Path) -> None:
    (block,) = blocks(ROOT / "docs/deploy.md", "c")
    (tmp_path / "example.c").write_text(block)
    packed(tmp_path / "small.safetensors")
    program = compiled(tmp_path / "example.c", library)
    done = subprocess.run([program], cwd=tmp_path, capture_output=True, text=True, check=True)
    model = load(tmp_path / "small.safetensors")
    best = model.predict(np.full((200, 300, 3), (255, 0, 0), np.uint8), 1)[0][0]
    assert done.stdout == f"class {best.index} of 10: {best.label}\n"


def hostile_files(folder: Path, count: int) -> list[Path]:
    """Of a classifier and of segmenters, damaged."""
    rng, kinds = np.random.default_rng(0), list[Callable[[], bytes]]()
    originals = [packed(folder / "model").read_bytes()]
    for kind in ("linear", "segformer"):
        write(folder / kind, reference.random_segmenter(kind))
        originals.append((folder / kind).read_bytes())
    for whole in originals:
        header = 8 + int.from_bytes(whole[:8], "little")
        kinds += [partial(scramble, rng, whole, header), partial(scramble, rng, whole, len(whole))]
        kinds += [partial(edit, rng, whole, where) for where in ("header", "config", "values")]
    files = [folder / f"{i:04d}" for i in range(count)]
    for i, file in enumerate(files):
        file.write_bytes(kinds[i % len(kinds)]())
    return files


@pytest.mark.holds_only
@pytest.mark.holds("take.5")
def test_a_thousand_hostile_files_under_the_address_sanitizer(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, figure: Callable[[str], None]
) -> None:
    folder = build(tmp_path_factory.mktemp("asan"), "-DSPARSEMAE_SANITIZE=ON", "-DSPARSEMAE_PORTABLE=ON")
    program = compiled(ROOT / "tests/native/hostile.c", folder, "-fsanitize=address,undefined", "-g")
    files = hostile_files(tmp_path, 1000)
    environment = os.environ | {"ASAN_OPTIONS": "max_allocation_size_mb=1000"}
    done = subprocess.run([program, *files], capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert len(lines) == len(files)
    refused = sum(line.startswith("refused: ") for line in lines)
    for file, line in zip(files, lines, strict=True):
        assert re.fullmatch(r"refused: [^\n]+|-?[\d.e+-]+|-?inf|-?nan", line), line
        if not line.startswith("refused"):  # Python takes it, too
            load(file, 1)
    assert len(files) * 0.5 < refused < len(files)
    figure(f"{len(files)} files, {refused} refused, the others run; no report of the sanitizers")


@pytest.mark.holds("take.3")
def test_the_class_of_each_pixel_is_pythons(library: Path, tmp_path: Path) -> None:
    program = compiled(ROOT / "tests/native/segment.c", library)
    for kind in ("linear", "segformer"):
        file = tmp_path / f"{kind}.safetensors"
        write(file, reference.random_segmenter(kind))
        for width, height in ((16, 16), (40, 23), (9, 61)):
            done = subprocess.run([program, file, str(width), str(height)], capture_output=True, text=True, check=True)
            *rows, sizes, said = done.stdout.splitlines()
            x, y, c = np.meshgrid(np.arange(width), np.arange(height), np.arange(3))
            pixels = (x * 7 + y * 3 + c).astype(np.uint8)
            (wanted,) = load(file).predict(pixels)
            assert np.array_equal(np.array([row.split() for row in rows], np.uint8), wanted)
            assert len(np.unique(wanted)) > 1
            assert (sizes, said[:30]) == ("4 4 5 80", "wanted a classifier or an enco")
    Image.fromarray(pixels).save(tmp_path / "x.ppm")
    done = subprocess.run(
        [library / "sparsemae-run", file, tmp_path / "x.ppm"], capture_output=True, text=True, check=True
    )
    best = int(np.bincount(wanted.ravel()).argmax())
    assert done.stdout.startswith(f"{tmp_path / 'x.ppm'}: class {best} {(wanted == best).mean():.1%}")
