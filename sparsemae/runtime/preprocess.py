"""From an RGB image to a packed model's input, in pillow and numpy."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sparsemae.card import InputSpec
from sparsemae.data.images import center_crop


def transform(image: Image.Image, spec: InputSpec, height: int, width: int) -> NDArray[np.float32]:
    """Resize, crop and normalize an RGB image. Returns float32 [3, H, W]. Raises ValueError on another mode."""
    if image.mode != "RGB":
        raise ValueError(f"image: wanted mode RGB, got {image.mode}")
    cropped = center_crop(image, height, width, spec.crop_pct, spec.interpolation)
    pixels = np.asarray(cropped, dtype=np.float32) / np.float32(255)
    mean, std = (np.array(values, np.float32) for values in (spec.mean, spec.std))
    return np.ascontiguousarray(((pixels - mean) / std).transpose(2, 0, 1))
