"""Mutated packed files, images, tars and run folders, each loaded as its command loads it."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import reference
import yaml
from conftest import tiny
from mutations import edit, graft, scramble
from PIL import Image
from watched import SMALLEST, Outcome, attempt

import sparsemae
from sparsemae.cli import main
from sparsemae.commands.check_records import FileRecord
from sparsemae.config import read_config
from sparsemae.data.images import as_rgb
from sparsemae.data.masks import read_mask
from sparsemae.data.shards import read_shards
from sparsemae.data.tars import read_tars
from sparsemae.options import ReportConfig
from sparsemae.options.tasks import FinetuneConfig
from sparsemae.packing.format import write
from sparsemae.report.page import report
from sparsemae.runtime import load
from sparsemae.training.run import _kept_config

MAX_PIXELS = 1 << 22
"""That images are loaded with."""
IMAGE_BYTES = 16 * MAX_PIXELS + 16 * SMALLEST
FOLDER_BYTES = 64 * SMALLEST


class _Files:
    """What the kinds have in common: original ``number % len``, mutated, loaded in one of some ways."""

    refusals: tuple[type[Exception], ...] = ()

    def __init__(self, originals: Path, folder: Path, seed: int) -> None:
        self.originals, self.folder, self.seed = sorted(originals.iterdir()), folder, seed
        self.ways: dict[str, Callable[[Path], Any]] = self.loads()

    def loads(self) -> dict[str, Callable[[Path], Any]]:
        """Ways of loading a file, by name."""
        raise NotImplementedError

    def mutate(self, rng: np.random.Generator, source: Path, target: Path) -> str:
        """Write a mutated file, and say how it was made."""
        raise NotImplementedError

    def most(self, size: int) -> int:
        """Bytes that a load may take."""
        return 4 * max(size, 4 * SMALLEST)

    def warm_up(self) -> None:
        for load_one in self.ways.values():
            for original in self.originals:
                try:
                    load_one(original)
                except ValueError:  # a tar of folders is no tar of shards
                    continue

    def try_one(self, number: int) -> Outcome:
        rng = np.random.default_rng([self.seed, number])
        source = self.originals[number % len(self.originals)]
        way = list(self.ways)[number // len(self.originals) % len(self.ways)]
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        path = self.folder / source.name
        outcome = Outcome(number, f"{source.name}, {way}", self.mutate(rng, source, path))
        files = path.rglob("*") if path.is_dir() else [path]
        outcome.size = sum(file.stat().st_size for file in files if file.is_file())
        attempt(outcome, path, self.ways[way], self.most(outcome.size), self.refusals)
        return outcome


class Packed(_Files):
    """Packed models; a forward is part of the load."""

    @staticmethod
    def make_originals(folder: Path) -> None:
        folder.mkdir()
        write(folder / "fp32", reference.random_model(reference.TINY))
        write(folder / "bf16", reference.random_model(reference.TINY, "2:32", "bf16", "bf16"))
        write(folder / "int8", reference.random_model(reference.TINY, "4:32", "int8", "bf16"))

    def loads(self) -> dict[str, Callable[[Path], Any]]:
        return {"load": self._load}

    @staticmethod
    def _load(path: Path) -> None:
        model = load(path, threads=1)
        vit = model.vit
        images = np.zeros((1, vit.in_chans, vit.image_height, vit.image_width), np.float32)
        assert len(model(images)) == 1

    def mutate(self, rng: np.random.Generator, source: Path, target: Path) -> str:
        data = source.read_bytes()
        kind = ("bytes", "header bytes", "header", "config", "values")[rng.integers(5)]
        if "bytes" in kind:
            end = len(data) if kind == "bytes" else 8 + int.from_bytes(data[:8], "little")
            target.write_bytes(scramble(rng, data, end))
        else:
            target.write_bytes(edit(rng, data, kind))
        return kind


class Images(_Files):
    """Images of every decoder, read as training, check and prediction read them, and as masks."""

    @staticmethod
    def make_originals(folder: Path) -> None:
        folder.mkdir()
        noise = np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8)
        rgb, gray = Image.fromarray(noise), Image.fromarray(noise[:, :, 0])
        wide = Image.fromarray(noise[:, :, 0].astype(np.uint16) * 257)
        kinds: dict[str, tuple[Image.Image, str, dict[str, Any]]] = {
            "jpeg": (rgb, "JPEG", {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0"}),
            "progressive": (rgb, "JPEG", {"progressive": True}), "mpo": (rgb, "MPO", {}), "png": (rgb, "PNG", {}),
            "palette png": (rgb.convert("P"), "PNG", {"transparency": 3}), "16-bit png": (wide, "PNG", {}),
            "webp": (rgb, "WEBP", {}), "lossless webp": (rgb.convert("RGBA"), "WEBP", {"lossless": True}),
            "animated webp": (rgb, "WEBP", {"save_all": True, "append_images": [rgb, rgb]}),
            "bmp": (rgb, "BMP", {}), "ppm": (rgb, "PPM", {}), "16-bit pgm": (wide, "PPM", {}),
            "gif": (rgb, "GIF", {"save_all": True, "append_images": [rgb]}), "avif": (rgb, "AVIF", {}),
            "16-bit tiff": (wide, "TIFF", {}),
        }  # fmt: skip
        for way in ("raw", "tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits", "group4"):
            image = gray.convert("1") if way == "group4" else rgb
            kinds[f"{way} tiff"] = (image, "TIFF", {"compression": way})
        for name, (image, kind, options) in kinds.items():
            image.save(folder / name, kind, **options)

    def loads(self) -> dict[str, Callable[[Path], Any]]:
        return {"image": self._image, "mask": self._mask, "header": self._header}

    @staticmethod
    def _image(path: Path) -> None:
        image = as_rgb(path, max_pixels=MAX_PIXELS)
        assert image.mode == "RGB"
        assert image.width * image.height <= MAX_PIXELS

    @staticmethod
    def _mask(path: Path) -> None:
        assert read_mask(path, max_pixels=MAX_PIXELS).shape[0] > 0

    @staticmethod
    def _header(path: Path) -> None:
        FileRecord(str(path), "train").note_header(path.read_bytes(), MAX_PIXELS)

    def most(self, size: int) -> int:
        return IMAGE_BYTES

    def mutate(self, rng: np.random.Generator, source: Path, target: Path) -> str:
        data = source.read_bytes()
        for _ in range(int(rng.integers(1, 4))):
            data = scramble(rng, data, len(data) if rng.random() < 0.5 else 200)
        sealed = "png" in source.name and rng.random() < 0.7
        target.write_bytes(_sealed_png(data) if sealed else data)
        return "bytes, checksums made to fit" if sealed else "bytes"


def _sealed_png(data: bytes) -> bytes:
    changed, at = bytearray(data), 8
    while at + 12 <= len(changed):
        end = at + 8 + int.from_bytes(changed[at : at + 4], "big")
        if end + 4 > len(changed):
            break
        changed[end : end + 4] = zlib.crc32(changed[at + 4 : end]).to_bytes(4, "big")
        at = end + 4
    return bytes(changed)


class Tars(_Files):
    """Tars of class folders, of tars, and of shards, in three formats; their images' bytes are read."""

    @staticmethod
    def make_originals(folder: Path) -> None:
        folder.mkdir()
        for name, kind in (("ustar", tarfile.USTAR_FORMAT), ("gnu", tarfile.GNU_FORMAT), ("pax", tarfile.PAX_FORMAT)):
            inner = io.BytesIO()
            _tar(inner, kind, {"1.jpg": b"x" * 600, "2.jpg": b"y"})
            files = {f"{'long' * 25}/{'long' * 20}/{i}.jpg": bytes([i]) * 100 for i in range(3)} | {"ö/1.jpg": b"1"}
            _tar(folder / f"{name} folders", kind, files | {"linked.tar": inner.getvalue()}, link="cat/l.jpg")
            _tar(
                folder / f"{name} shards", kind, {"1.jpg": b"1", "1.cls": b"3", "2.png": b"2", "2.cls": b"99999999999"}
            )

    def loads(self) -> dict[str, Callable[[Path], Any]]:
        return {
            "folders": lambda path: self._read(read_tars([path])),
            "shards": lambda path: self._read(read_shards([path])),
        }

    @staticmethod
    def _read(reader: Any) -> None:
        size = reader.files[0].stat().st_size
        assert ((reader.where[:, 1] >= 0) & (reader.where[:, 2] >= 0)).all()
        assert (reader.where[:, 1] + reader.where[:, 2] <= size).all()
        for index in range(len(reader)):
            assert len(reader[index][0].read()) == reader.size(index)

    def mutate(self, rng: np.random.Generator, source: Path, target: Path) -> str:
        data = bytearray(source.read_bytes())
        if rng.random() < 0.4:
            target.write_bytes(scramble(rng, bytes(data), len(data)))
            return "bytes"
        blocks = [at for at in range(0, len(data) - 511, 512) if data[at + 257 : at + 262] == b"ustar"]
        at = blocks[rng.integers(len(blocks))]
        field = ((100, 124), (124, 136), (156, 157), (257, 265), (0, 100), (157, 257))[rng.integers(6)]
        values = (b"\xff" * 12, b"\x80" + b"\xff" * 11, b"77777777777\0", b"-0000000001\0", b"\0" * 12, rng.bytes(12))
        chosen = bytes([b"012SLKxgDMNAX"[rng.integers(13)]]) if field[0] == 156 else values[rng.integers(len(values))]
        width = min(len(chosen), field[1] - field[0])
        data[at + field[0] : at + field[0] + width] = chosen[:width]
        data[at + 148 : at + 156] = b" " * 8
        data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
        target.write_bytes(data)
        return "header, checksum made to fit"


def _tar(target: Any, kind: int, files: dict[str, bytes], link: str | None = None) -> None:
    with tarfile.open(**({"fileobj": target} if isinstance(target, io.BytesIO) else {"name": target}), mode="w",
                      format=kind) as archive:  # fmt: skip
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        if link is not None:
            member = tarfile.TarInfo(link)
            member.type, member.linkname = tarfile.SYMTYPE, "../ö/1.jpg"
            archive.addfile(member)


class RunFolders(_Files):
    """Folders of runs, read by report, plan, load, and by a run that is to go on."""

    @staticmethod
    def make_originals(folder: Path) -> None:
        folder.mkdir()
        main(tiny("finetune", folder / "run", "--trainer.max_steps", "4"))

    def loads(self) -> dict[str, Callable[[Path], Any]]:
        return {
            "report": lambda path: report(ReportConfig([str(path)])),
            "resume": lambda path: _kept_config(path, lambda *_: None),
            "plan": lambda path: read_config(FinetuneConfig, ["--config", str(path / "config.yaml")]),
            "load": sparsemae.load,
        }

    def most(self, size: int) -> int:
        return FOLDER_BYTES

    def mutate(self, rng: np.random.Generator, source: Path, target: Path) -> str:
        shutil.copytree(source, target, symlinks=True)
        files = [file for file in sorted(target.iterdir()) if file.is_file() and file.suffix in _PLAIN]
        file, kind = files[rng.integers(len(files))], rng.integers(6)
        text = file.read_text()
        if kind == 0:
            file.write_bytes(scramble(rng, file.read_bytes(), len(text)))
            return f"{file.name}: bytes"
        if kind == 1:
            file.unlink()
            return f"{file.name}: removed"
        if kind == 2:
            file.write_text(_STRANGE[rng.integers(len(_STRANGE))])
            return f"{file.name}: another text"
        lines = text.splitlines() if file.suffix == ".jsonl" else [text]
        at = int(rng.integers(len(lines)))
        values = yaml.safe_load(lines[at]) if file.suffix == ".yaml" else json.loads(lines[at])
        for _ in range(int(rng.integers(1, 4))):
            values = graft(rng, values)
        lines[at] = yaml.safe_dump(values) if file.suffix == ".yaml" else json.dumps(values)
        file.write_text("\n".join(lines) + "\n")
        return f"{file.name}: values"


_PLAIN = (".yaml", ".json", ".jsonl")
_STRANGE = (
    "", "\0" * 1000, "[" * 100_000, '{"a":' * 100_000, "a: &a [*a]\n", "null\n", "1\n", '"$\\\\frac{1}{0}$"\n',
    "!!python/object/apply:os.system [touch executed]\n", '{"step": 1, "epoch": 1e400, "loss": NaN}\n' * 3,
    "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
    + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)),
)  # fmt: skip
