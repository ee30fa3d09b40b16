"""What every trained model can do, whatever runs it: torch, or the runtime of packed files. Nothing here imports torch.

`sparsemae.load` opens one; it has a file of its own, because what it opens is built on this one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sparsemae.card import ModelCard


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

    def predict(self, images: Sequence[str | Path | Image.Image], top_k: int = 5) -> list[Any]:
        """One result for each image (a file, or PIL's), in order: `top_k` `Prediction`s, or classes uint8 [H, W].

        Raises ValueError, naming the file, if one cannot be read.
        """


def require_finite(finite: Any) -> None:
    """Raises ValueError unless an image's logits are finite: there is no most probable class among others."""
    if not finite:
        raise ValueError("wanted finite logits, got NaN or infinite ones")


def rank(logits: NDArray[np.float32], class_names: Sequence[str], top_k: int = 5) -> list[Prediction]:
    """The `top_k` most probable classes by one image's logits [C], best first; class_names may be empty.

    Raises ValueError if they are not finite.
    """
    require_finite(np.isfinite(logits).all())
    exponentials = np.exp(logits - logits.max(), dtype=np.float64)
    probabilities = exponentials / exponentials.sum()
    order = np.argsort(-logits, kind="stable")[:top_k]
    return [Prediction(class_names[i] if class_names else str(i), int(i), float(probabilities[i])) for i in order]
