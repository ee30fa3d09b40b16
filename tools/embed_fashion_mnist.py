"""Make images/sparsemae_images/images.xz from the original IDX files (``train-images-idx3-ubyte.gz`` ...):

python tools/embed_fashion_mnist.py FOLDER_WITH_THE_IDX_FILES
"""

import gzip
import lzma
import sys
from pathlib import Path

import numpy as np

from sparsemae.data.embedded import SIDE, TRAIN_IMAGES, file


def build(idx_folder: Path, path: Path) -> None:
    """Labels, then pixels: of the first training images, then of all test images."""

    def read(name: str, header: int) -> np.ndarray:
        return np.frombuffer(gzip.decompress((idx_folder / name).read_bytes()), np.uint8, offset=header)

    size = SIDE * SIDE
    labels = np.concatenate(
        [read("train-labels-idx1-ubyte.gz", 8)[:TRAIN_IMAGES], read("t10k-labels-idx1-ubyte.gz", 8)]
    )
    pixels = np.concatenate(
        [read("train-images-idx3-ubyte.gz", 16)[: TRAIN_IMAGES * size], read("t10k-images-idx3-ubyte.gz", 16)]
    )
    path.write_bytes(lzma.compress(labels.tobytes() + pixels.tobytes(), preset=9 | lzma.PRESET_EXTREME))


if __name__ == "__main__":
    build(Path(sys.argv[1]), file())
