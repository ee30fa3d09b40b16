"""Real JPEGs to train on: crops of the photographs in the scikit-image wheel, 500 x 375 px, the size of ImageNet's.

    python tests/photographs.py FOLDER [--count 200]

writes FOLDER/folder/{train,val}/CLASS/N.jpg, the same bytes in FOLDER/tar/{train,val}.tar with class folders, and in
FOLDER/wds as WebDataset shards. A class is one photograph; every fifth crop is for validation.
"""

from __future__ import annotations

import argparse
import io
import tarfile
from pathlib import Path

import numpy as np
import skimage
from PIL import Image

PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg", "motorcycle_left.png",
               "motorcycle_right.png", "retina.jpg", "rocket.jpg")  # fmt: skip
WIDTH, HEIGHT, SHARDS = 500, 375, 2


def make(folder: Path, count: int = 200) -> None:
    """Write ``count`` JPEGs, the same each time, in the three layouts."""
    rows = list(photographs(count))
    for split in ("train", "val"):
        own = [row for row in rows if row[0] == split]
        for _, name, number, content in own:
            file = folder / "folder" / split / name / f"{number:04d}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        _tar(folder / "tar" / f"{split}.tar", [(f"{name}/{n:04d}.jpg", content) for _, name, n, content in own])
        classes = sorted({name for _, name, *_ in rows})
        for shard in range(SHARDS):
            members = []
            for _, name, number, content in own[shard::SHARDS]:
                key = f"{name}_{number:04d}"
                members += [(f"{key}.jpg", content), (f"{key}.cls", str(classes.index(name)).encode())]
            _tar(folder / "wds" / f"photographs-{split}-{shard:06d}.tar", members)


def photographs(count: int):
    """Yields split, class, number and JPEG: each a random crop of 4:3, a third of the area or more, at quality 90."""
    generator = np.random.default_rng(0)
    originals = _originals(PHOTOGRAPHS)
    for number in range(count):
        name, image = list(originals.items())[number % len(originals)]
        crop = _crop(image, generator, (WIDTH, HEIGHT))
        content = io.BytesIO()
        crop.save(content, "JPEG", quality=90)
        yield "val" if number // len(originals) % 5 == 4 else "train", name, number, content.getvalue()


def class_folders(root: Path, count: int, seed: int = 0, names: tuple[str, ...] = PHOTOGRAPHS[:4]) -> Path:
    """ROOT/CLASS/N.jpg, ``count`` images in turn of each class, 160 x 120 px: other crops for another seed."""
    generator, originals = np.random.default_rng(seed), _originals(names)
    for number in range(count):
        name, image = list(originals.items())[number % len(originals)]
        file = root / name / f"{number:05d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        _crop(image, generator, (160, 120)).save(file, "JPEG", quality=90)
    return root


def _originals(names: tuple[str, ...]) -> dict[str, Image.Image]:
    data = Path(skimage.__file__).parent / "data"
    return {Path(name).stem: Image.open(data / name).convert("RGB") for name in names}


def _crop(image: Image.Image, generator: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """A random part of 4:3, a third of the area or more."""
    width = min(image.width, image.height * WIDTH / HEIGHT) * generator.uniform(0.6, 1.0)
    left, top = generator.uniform(0, [image.width - width, image.height - width * HEIGHT / WIDTH])
    box = (left, top, left + width, top + width * HEIGHT / WIDTH)
    return image.resize(size, Image.Resampling.BICUBIC, box=box)


def _tar(file: Path, members: list[tuple[str, bytes]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=200)
    words = parser.parse_args()
    make(words.folder, words.count)
