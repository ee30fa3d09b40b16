"""A packed model ready to run: reads the file, hands its tensors to the native library, and names what comes out.

Which instruction set is used is chosen when a model is loaded: the fastest that the processor has, or the one that
`SPARSEMAE_ISA` names (avx512fp16, amx, avx512vnni, avx512bf16, avx512, avx2, neon, portable). A file with fp32 weights
is computed in fp32 everywhere; bf16 and int8 weights are multiplied as int8, fp16 or bf16 where the processor can, else
as fp32.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sparsemae.packing.format import PackedConfig, PackedModel, dense_shapes, from_bf16, parse_pattern, read
from sparsemae.runtime._native import Builder, Vit
from sparsemae.runtime.preprocess import load_image

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")


@dataclass(frozen=True)
class Prediction:
    """One class for one image."""

    label: str
    """The class's name, or its number where the file has no names."""
    index: int
    probability: float
    """Softmax over all classes."""


class Model:
    """A packed vision transformer. Safe to call from several threads: calls of one model take turns, models do not."""

    def __init__(self, config: PackedConfig, native: Vit) -> None:
        self.config = config
        self._native = native

    @property
    def isa(self) -> str:
        """The instruction set in use."""
        return self._native.isa

    @property
    def threads(self) -> int:
        return self._native.threads

    def __call__(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits of preprocessed images; of an encoder, its pooled features (all tokens where it pools none).

        Args:
            images: float32 [B, 3, H, W].

        Returns:
            float32 [B, C], or [B, D] (or [B, L, D]) of an encoder.

        Raises:
            ValueError: another shape or type.
        """
        return self._native(self._checked(images), False)

    def features(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """All tokens after the last block and the final norm, as timm's `forward_features`: float32 [B, L, D]."""
        return self._native(self._checked(images), True)

    def predict(self, paths: Sequence[str | Path], top_k: int = 5, batch_size: int = 8) -> list[list[Prediction]]:
        """The `top_k` most probable classes of each image file, best first.

        Raises:
            ValueError: the model is no classifier, or a file is no image.
            OSError: a file cannot be opened.
        """
        self._wants_classes()
        vit = self.config.vit
        results = []
        for start in range(0, len(paths), batch_size):
            batch = [load_image(path, vit, self.config.preprocess) for path in paths[start : start + batch_size]]
            results += [self.rank(logits, top_k) for logits in self(np.stack(batch))]
        return results

    def rank(self, logits: NDArray[np.float32], top_k: int = 5) -> list[Prediction]:
        """The `top_k` most probable classes by an image's logits [num_classes], best first.

        Raises:
            ValueError: the model is no classifier.
        """
        self._wants_classes()
        exponentials = np.exp(logits - logits.max(), dtype=np.float64)
        probabilities = exponentials / exponentials.sum()
        order = np.argsort(-logits, kind="stable")[:top_k]
        names = self.config.class_names
        return [Prediction(names[i] if names else str(i), int(i), float(probabilities[i])) for i in order]

    def _wants_classes(self) -> None:
        if not self.config.vit.num_classes:
            raise ValueError("this packed model is an encoder: it has no classes to predict")

    def _checked(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        vit = self.config.vit
        wanted = (vit.in_chans, vit.image_height, vit.image_width)
        if images.dtype != np.float32 or images.ndim != 4 or images.shape[1:] != wanted:
            raise ValueError(
                f"images must be float32 [B, {', '.join(map(str, wanted))}], got {images.dtype} {list(images.shape)}"
            )
        return np.ascontiguousarray(images)


def load(path: str | Path, threads: int | None = None, quantize: bool = True) -> Model:
    """Load a packed file.

    Args:
        threads: how many to compute with, fewer where the system lets no more start; default: the processors this
            process may use, within its cgroup's quota, as far as the model has work for them.
        quantize: of int8 files, on processors that multiply int8 (amx, avx512vnni): round the inputs of every sparse
            layer to int8 with a scale per token, for about 1.5 times the speed; off, the int8 weights are multiplied as
            bf16.

    Raises:
        ValueError: the file is no usable packed model (one line, naming it), or `SPARSEMAE_ISA` cannot be had here.
        OSError: the file cannot be opened.
    """
    packed = read(path)
    isa = os.environ.get("SPARSEMAE_ISA", "")
    try:
        native = _build(
            packed, _default_threads(packed.config.vit.tokens) if threads is None else threads, isa, quantize
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return Model(packed.config, native)


def _default_threads(tokens: int) -> int:
    """The processors this process may use, within its cgroup's quota; no more than there are units of 16 tokens."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(processors, _quota() or processors, -(-tokens // 16))


def _quota() -> int | None:
    """Processors that the process's cgroup (version 2) and those above it leave, rounded up; None: no limit."""
    try:
        own = OWN_CGROUP.read_text().partition("0::/")[2].split("\n")[0]
    except OSError:
        return None
    quotas = []
    for group in (CGROUPS / own, *(CGROUPS / own).parents):
        try:
            quota, period = (group / "cpu.max").read_text().split()
        except OSError:
            continue
        if quota != "max":
            quotas.append(-(-int(quota) // int(period)))
    return min(quotas, default=None)


def _build(packed: PackedModel, threads: int, isa: str, quantize: bool = True) -> Vit:
    config, tensors = packed.config, packed.tensors
    builder = Builder(config.vit)
    for name, shape in dense_shapes(config.vit).items():
        pattern = config.patterns.get(name.removesuffix(".weight"))
        if pattern is not None:
            n, m = parse_pattern(pattern)
            values, scale = tensors[f"{name}.values"], tensors.get(f"{name}.scale")
            builder.sparse(name, shape[1], n, m, tensors[f"{name}.codes"], values, scale, quantize)
            continue
        stored = tensors[name]
        dense = stored if stored.dtype == np.float32 else from_bf16(stored)
        if name.endswith(".weight") and len(shape) > 1 and name != "head.weight":
            builder.dense(name, dense)
        else:
            builder.vector(name, dense)
    return builder.build(threads, isa)
