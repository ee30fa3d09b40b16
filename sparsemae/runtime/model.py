"""A packed model ready to run: reads the file, hands its tensors to the native library, and names what comes out.

Which instruction set is used is chosen when a model is loaded: the fastest that the processor has, or the one that
`SPARSEMAE_ISA` names (avx512fp16, amxvnni, amx, avx512vnni, avx512bf16, avx512, avxvnni, avx2, neonfp16, neon,
portable). A file with fp32 weights is computed in fp32 everywhere; bf16 and int8 weights are multiplied as int8, fp16
or bf16 where the processor can, else as fp32.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sparsemae.data.inputs import results_of
from sparsemae.limits import MAX_PIXELS, whole_number
from sparsemae.packing.format import read
from sparsemae.packing.metadata import PackedConfig
from sparsemae.predictor import Inputs, Prediction, checked, raised, rank
from sparsemae.processors import processors
from sparsemae.runtime.native import Vit
from sparsemae.runtime.preprocess import transform

MAX_THREADS = 1024
IMAGES_PER_THREAD = 4
"""In one call of the native library, which hears no Ctrl-C."""


class Model:
    """A packed vision transformer, or a segmenter made of one, as a `Predictor`.

    Safe to call from several threads: calls on one model are serialized, different models run in parallel.
    """

    def __init__(self, config: PackedConfig, native: Vit) -> None:
        self.card, self.vit = config.card, config.vit
        self._native, self._segments = native, config.head is not None

    @property
    def isa(self) -> str:
        """The instruction set in use."""
        return self._native.isa

    @property
    def threads(self) -> int:
        """How many compute."""
        return self._native.threads

    def __call__(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits of preprocessed images; of an encoder, its pooled features (all tokens where it pools none).

        Args:
            images: float32 [B, 3, H, W]; of any size for a segmenter.

        Returns:
            float32 [B, C], or [B, D] (or [B, L, D]) of an encoder, or [B, C, H, W] of a segmenter.

        Raises:
            ValueError: another shape or type.
        """
        if not self._segments:
            return self._forward(images, features=False)
        images, patch = checked(images, self.vit.in_chans, None), self.vit.patch_size
        *_, height, width = images.shape
        padding = ((0, 0), (0, 0), (0, -height % patch), (0, -width % patch))
        scores = self._native.scores(np.pad(images, padding), patch)
        rows, columns = (
            bilinear(side, patch)[:own] for side, own in zip(scores.shape[1:3], (height, width), strict=True)
        )
        logits: NDArray[np.float32] = np.einsum("yr,brkc,xk->bcyx", rows, scores, columns, optimize=True)
        return logits

    def features(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """All tokens after the last block and the final norm, as timm's `forward_features`: float32 [B, L, D]."""
        return self._forward(images, features=True)

    @property
    def smallest_side(self) -> int:
        """The shorter side that an image needs, px."""
        return self.vit.patch_size

    def prepare(self, image: Image.Image) -> NDArray[np.float32]:
        """An RGB image as the model's input: float32 [3, H, W]."""
        return transform(image, self.card.input, self.vit.image_height, self.vit.image_width)

    def predict(self, images: Inputs, top_k: int = 5, batch_size: int | None = None) -> list[Any]:
        """The `top_k` most probable classes of each image, best first; or a segmenter's uint8 [H, W] at its size.

        Args:
            batch_size: images in a call of the forward; None: as many as keep all threads busy.

        Raises:
            ValueError: the model is no classifier, an image cannot be read, or its logits are not finite (its file or
                index).
        """
        return raised(self.stream(images, top_k, batch_size=batch_size))

    def stream(
        self, images: Inputs, top_k: int = 5, max_pixels: int = MAX_PIXELS, batch_size: int | None = None
    ) -> Iterator[Any]:
        """As `predict`, each as soon as it is known; of an image that cannot be read, its ValueError."""
        if self._segments:
            classes = self._native.classes  # of one at a time, by all threads
            return results_of(
                images, self.card.input, np.asarray, lambda pixels: [classes(pixels[0])], 1, processors(), max_pixels
            )
        self._require_classes()

        def run(prepared: list[NDArray[np.float32]]) -> list[list[Prediction]]:
            return [self.rank(logits, top_k) for logits in self(np.stack(prepared))]

        batch_size = batch_size or -(-8 // self.threads) * self.threads
        return results_of(images, self.card.input, self.prepare, run, batch_size, processors(), max_pixels)

    def rank(self, logits: NDArray[np.float32], top_k: int = 5) -> list[Prediction]:
        """The `top_k` most probable classes by one image's logits [C], best first.

        Raises:
            ValueError: the model is no classifier.
        """
        self._require_classes()
        return rank(logits, self.card.class_names, top_k)

    def _require_classes(self) -> None:
        if not self.vit.num_classes:
            raise ValueError("wanted a classifier to predict with, got an encoder: it has no classes")

    def _forward(self, images: NDArray[np.float32], features: bool) -> NDArray[np.float32]:
        images = self._checked(images)
        step = IMAGES_PER_THREAD * self.threads
        parts = [self._native(images[at : at + step], features) for at in range(0, max(1, len(images)), step)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _checked(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        return checked(images, self.vit.in_chans, (self.vit.image_height, self.vit.image_width))


def bilinear(tokens: int, patch: int) -> NDArray[np.float32]:
    """What every pixel of a side is made of, [tokens * patch, tokens]: torch's resizing with align_corners=False."""
    centers = (np.arange(tokens * patch) + 0.5) / patch - 0.5
    weights = [np.interp(centers, np.arange(tokens), one) for one in np.eye(tokens)]
    return np.stack(weights, axis=1).astype(np.float32)


def load(path: str | Path, threads: int | None = None, quantize: bool | None = None) -> Model:
    """Load a packed file.

    Args:
        threads: how many to compute with, fewer where the system lets no more start; default: the processors this
            process may use, within its cgroup's quota, as far as the model has work for them.
        quantize: of int8 files, on processors that multiply int8 (amx, amxvnni, avx512vnni, avxvnni): round the inputs
            of the sparse layers to int8 with a scale per token, for about 1.5 times the speed; False: leave them as
            they are; None: round them in networks 192 wide or more, since narrower ones lose most by it.

    Raises:
        ValueError: it is no packed model that can be used (one line, naming it), another takes its place meanwhile,
            `threads` is no number of threads, or `SPARSEMAE_ISA` cannot be had here.
        OSError: the file cannot be opened.
    """
    config = read(path).config
    if threads is None:
        threads = _default_threads(config.vit.tokens)
    threads = whole_number("threads", threads, 1, MAX_THREADS)
    try:
        native = Vit(Path(path).read_bytes(), threads, os.environ.get("SPARSEMAE_ISA", ""), quantize)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if native.config != config.document:
        raise ValueError(f"{path}: wanted one file while it is loaded, got another in its place: load it again")
    return Model(config, native)


def _default_threads(tokens: int) -> int:
    """The processors this process may use, within its cgroup's quota; no more than there are units of 16 tokens."""
    return min(processors(), -(-tokens // 16))
