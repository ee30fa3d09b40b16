"""Make the image folders of the studies, ROOT/{train,val,test}/CLASS/*, from Debian's packages and from ImageNet:

python tools/study_images.py fashion-mnist /usr/share/datasets/fashion-mnist ROOT
python tools/study_images.py openclipart /usr/share/openclipart/png ROOT
python tools/study_images.py imagenet IMAGENET ROOT        links to IMAGENET/{train,val}/CLASS/*
python tools/study_images.py imagenet-100 IMAGENET ROOT    every tenth class of the 1,000
"""

import gzip
import hashlib
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from sparsemae.data.embedded import CLASS_NAMES, SIDE

HELD_OUT = 6000
"""Of Fashion-MNIST's training images, the last ones."""
CLIPART_SIDE, LEAST, MOST_PER_STEM = 64, 90, 60
"""Of openclipart: side, px; pictures that a class needs; pictures of one name."""
HELD_OUT_OF_CLASS = 50
"""Of ImageNet's training images of a class, those whose names have the lowest hashes."""


def fashion_mnist(source: Path, root: Path) -> None:
    """The 60,000 training images, the last of which are val, and the 10,000 test images, as PNG files."""

    def read(name: str, header: int) -> np.ndarray:
        return np.frombuffer(gzip.decompress((source / name).read_bytes()), np.uint8, offset=header)

    for part, prefix in {"train": "train", "test": "t10k"}.items():
        labels = read(f"{prefix}-labels-idx1-ubyte.gz", 8)
        pixels = read(f"{prefix}-images-idx3-ubyte.gz", 16).reshape(-1, SIDE, SIDE)
        for index, (label, image) in enumerate(zip(labels, pixels, strict=True)):
            split = "val" if part == "train" and index >= len(labels) - HELD_OUT else part
            save(Image.fromarray(image), root / split / CLASS_NAMES[label].replace("/", "-") / f"{index:05}.png")


def openclipart(source: Path, root: Path) -> None:
    """Each picture once, drawn on white; none that lies in several classes; variants of a name in one split."""
    Image.MAX_IMAGE_PIXELS = None  # one has 231 million
    files = sorted(path for path in source.rglob("*.png") if not path.is_symlink())
    digests = {path: hashlib.sha256(path.read_bytes()).digest() for path in files}
    classes, first = defaultdict(set), dict[bytes, Path]()
    for path, digest in digests.items():
        classes[digest].add(path.relative_to(source).parts[0])
        first.setdefault(digest, path)
    stems: Counter[tuple[str, str]] = Counter()
    chosen = defaultdict(list)
    for digest, path in first.items():
        if len(classes[digest]) == 1:
            (name,) = classes[digest]
            stem = re.split(r"\d", path.stem)[0] or path.stem
            stems[name, stem] += 1
            if stems[name, stem] <= MOST_PER_STEM:
                chosen[name].append((stem, path))
    for name, pictures in chosen.items():
        if len(pictures) >= LEAST:
            for number, (stem, path) in enumerate(pictures):
                with Image.open(path) as image:
                    rgba = image.convert("RGBA")
                rgba.thumbnail((CLIPART_SIDE, CLIPART_SIDE), Image.Resampling.BICUBIC)
                square = Image.new("RGB", (CLIPART_SIDE, CLIPART_SIDE), "white")
                square.paste(rgba, ((CLIPART_SIDE - rgba.width) // 2, (CLIPART_SIDE - rgba.height) // 2), rgba)
                save(square, root / split_of(stem) / name / f"{number:04}.png")


def imagenet(source: Path, root: Path, every: int = 1) -> None:
    """Links to the training images, some of which are val, and to the validation images, which are test."""
    classes = sorted(path.name for path in (source / "train").iterdir() if path.is_dir())[::every]
    for name in classes:
        files = sorted(
            (source / "train" / name).iterdir(), key=lambda file: hashlib.sha256(file.name.encode()).digest()
        )
        parts = {"val": files[:HELD_OUT_OF_CLASS], "train": files[HELD_OUT_OF_CLASS:]}
        for part, images in {**parts, "test": sorted((source / "val" / name).iterdir())}.items():
            (root / part / name).mkdir(parents=True)
            for image in images:
                (root / part / name / image.name).symlink_to(image.resolve())


def split_of(stem: str) -> str:
    """A fifth of the names are test, a tenth val."""
    share = int.from_bytes(hashlib.sha256(stem.encode()).digest()[:4], "big") % 10
    return "test" if share < 2 else "val" if share == 2 else "train"


def save(image: Image.Image, path: Path) -> None:
    """As PNG, its folder made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


if __name__ == "__main__":
    what, source, root = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    if root.exists():
        sys.exit(f"{root}: wanted a new folder")
    makers: dict[str, Callable[[Path, Path], None]] = {
        "fashion-mnist": fashion_mnist,
        "openclipart": openclipart,
        "imagenet": imagenet,
        "imagenet-100": partial(imagenet, every=10),
    }
    makers[what](source, root)
