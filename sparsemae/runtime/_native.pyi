"""The native library."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsemae.packing.metadata import VitShape
from sparsemae.packing.segmenter import DenseHead

class Builder:
    def __init__(self, shape: VitShape, head: DenseHead | None = None) -> None: ...
    def vector(self, name: str, values: NDArray[np.float32]) -> None: ...
    def dense(self, name: str, values: NDArray[np.float32]) -> None: ...
    def sparse(
        self,
        name: str,
        columns: int,
        n: int,
        m: int,
        codes: NDArray[np.uint8],
        values: NDArray[Any],
        scale: NDArray[np.float32] | None,
        quantize: bool,
    ) -> None: ...
    def build(self, threads: int, isa: str) -> Vit: ...

class Vit:
    isa: str
    math: str
    threads: int
    def __call__(self, images: NDArray[np.float32], features: bool) -> NDArray[np.float32]: ...

class Segmenter:
    def __init__(
        self,
        model: Vit,
        mean: Sequence[float],
        std: Sequence[float],
        short_side: float,
        long_side: float,
        slide: bool,
        stride: int,
        scales: Sequence[float],
        flip: bool,
    ) -> None: ...
    def scores(self, images: NDArray[np.float32]) -> NDArray[np.float32]: ...
    def classes(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]: ...

class KernelTiming:
    kernel: str
    seconds: float
    instructions: str
    peak: float
    zeros: bool

def time_kernels(model: Vit, rounds: int) -> list[KernelTiming]: ...
def processor() -> tuple[str, list[str]]: ...
def usable_isas() -> list[str]: ...
def decode_positions(codes: NDArray[np.uint8], groups: int, n: int, m: int) -> bytes: ...
