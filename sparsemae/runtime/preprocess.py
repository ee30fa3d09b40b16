"""timm's evaluation transform in pillow and numpy, to the pixel: resize the shorter side, crop the center, normalize.

torchvision resizes PIL images with pillow itself, so that only its rounding of sizes and offsets has to be met: the
longer side is ``int(size * long / short)``, truncated; a crop starts at ``round((side - crop) / 2)``, half to even; an
image smaller than the crop is padded with black.
"""

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sparsemae.card import InputSpec


def transform(image: Image.Image, spec: InputSpec, height: int, width: int) -> NDArray[np.float32]:
    """Resize, crop and normalize an RGB image. Returns float32 [3, H, W]."""
    image = image.resize(
        _resized(image.size, height, width, spec.crop_pct), Image.Resampling[spec.interpolation.upper()]
    )
    pixels = np.asarray(_center_crop(image, height, width), dtype=np.float32) / np.float32(255)
    mean, std = (np.array(values, np.float32) for values in (spec.mean, spec.std))
    return np.ascontiguousarray(((pixels - mean) / std).transpose(2, 0, 1))


def _resized(size: tuple[int, int], height: int, width: int, crop_pct: float) -> tuple[int, int]:
    """(width, height) after timm's resize: the shorter side for a square input, the better fitting one otherwise."""
    scaled_height, scaled_width = math.floor(height / crop_pct), math.floor(width / crop_pct)
    if scaled_height == scaled_width:
        short, long = sorted(size)
        longer = int(scaled_height * long / short)
        return (scaled_height, longer) if size[0] <= size[1] else (longer, scaled_height)
    ratio = min(size[1] / scaled_height, size[0] / scaled_width)
    return round(size[0] / ratio), round(size[1] / ratio)


def _center_crop(image: Image.Image, height: int, width: int) -> Image.Image:
    if image.width < width or image.height < height:
        padded = Image.new("RGB", (max(width, image.width), max(height, image.height)))
        padded.paste(image, (max(0, (width - image.width) // 2), max(0, (height - image.height) // 2)))
        image = padded
    left, top = round((image.width - width) / 2.0), round((image.height - height) / 2.0)
    return image.crop((left, top, left + width, top + height))
