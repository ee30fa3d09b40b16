"""What every trained model can do, whatever runs it: torch, or the runtime of packed files. Nothing here imports torch.

`sparsemae.load` opens one; it has a file of its own, because what it opens is built on this one.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sparsemae.card import ModelCard
from sparsemae.limits import MAX_PIXELS

Input = str | os.PathLike[str] | bytes | BinaryIO | Image.Image | NDArray[np.uint8]
"""An image: a file's path, its content, an open file (rewound), PIL's, or pixels [H, W] or [H, W, C], C 1, 3 or 4."""
Inputs = Input | Iterable[Input]
"""One, several, or an array of several [N, H, W, C]."""


@dataclass(frozen=True)
class Prediction:
    """One class for one image."""

    label: str
    """The class's name, or its number where the model has no names."""
    index: int
    probability: float
    """Softmax over all classes."""


class Predictor(Protocol):
    """A trained model, ready to run."""

    @property
    def card(self) -> ModelCard:
        """What the model is."""

    def __call__(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits [B, C] of preprocessed images [B, 3, H, W].

        Of an encoder, its features; of a segmenter, [B, C, H, W].
        """

    def features(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """All tokens after the last block and the final norm, as timm's `forward_features`: float32 [B, L, D]."""

    @property
    def smallest_side(self) -> int:
        """The shorter side that an image needs, px."""

    def predict(self, images: Inputs, top_k: int = 5) -> list[Any]:
        """One result for each image, in order: `top_k` `Prediction`s, best first, or classes uint8 [H, W] at its size.

        Files are turned as their EXIF orientation says, and drawn on the background, if the model's card says so.

        Raises ValueError, naming its file or its index, if one cannot be read.
        """

    def stream(self, images: Inputs, top_k: int = 5, max_pixels: int = MAX_PIXELS) -> Iterator[Any]:
        """As `predict`, each as soon as it is known; of an image that cannot be read, its ValueError."""


def raised(results: Iterable[Any]) -> list[Any]:
    """The results of a `stream`. Raises the first that is a ValueError."""
    found = []
    for result in results:
        if isinstance(result, ValueError):
            raise result
        found.append(result)
    return found


def checked(images: NDArray[np.float32], channels: int, size: Sequence[int] | None) -> NDArray[np.float32]:
    """Preprocessed images, contiguous. Raises ValueError unless they are float32 [B, channels, *size] (None: any)."""
    is_array = isinstance(images, np.ndarray)
    fits = is_array and images.dtype == np.float32 and images.ndim == 4
    fits = fits and images.shape[1:] == (channels, *(size or images.shape[2:]))
    if not fits:
        wanted = ", ".join(map(str, (channels, *(size or ("H", "W")))))
        got = f"{images.dtype} {list(images.shape)}" if is_array else f"a {type(images).__name__}"
        raise ValueError(f"images: wanted float32 [B, {wanted}], got {got}")
    return np.require(images, requirements=("C", "ALIGNED", "ENSUREARRAY"))


class NotFiniteError(ValueError):
    """Of logits: there is no most probable class among them."""


def require_finite(finite: Any) -> None:
    """Raises NotFiniteError unless logits are finite."""
    if not finite:
        raise NotFiniteError("wanted finite logits, got NaN or infinite ones")


def rank(logits: NDArray[np.float32], class_names: Sequence[str], top_k: int = 5) -> list[Prediction]:
    """The `top_k` most probable classes by one image's logits [C], best first; class_names may be empty.

    Raises ValueError if they are not finite.
    """
    if not isinstance(top_k, int | np.integer) or top_k < 1:  # a second image that is not in a list comes here
        raise ValueError(f"top_k: wanted at least 1, got {top_k!r:.40}")
    require_finite(np.isfinite(logits).all())
    exponentials = np.exp(logits - logits.max(), dtype=np.float64)
    probabilities = exponentials / exponentials.sum()
    order = np.argsort(-logits, kind="stable")[:top_k]
    return [Prediction(class_names[i] if class_names else str(i), int(i), float(probabilities[i])) for i in order]
