"""From an image file to RGB pixels: the one way of training, check and prediction. Nothing here imports torch.

Files are not trusted: of Pillow's many decoders only those of `FORMATS` are ever tried.
"""

import struct
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from PIL import Image, ImageOps, UnidentifiedImageError

AVIF = find_spec("PIL.AvifImagePlugin") is not None
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "GIF") + ("AVIF",) * AVIF
"""Pillow's names of what is read; of several frames the first."""
SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".gif", *(".avif",) * AVIF
)  # fmt: skip
"""Of the files that are images, in lower case."""
# What Pillow raises on files that are not as they should be.
UNREADABLE = (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError)
_ORIENTATION = 0x0112  # EXIF's tag


class PixelRules(Protocol):
    """How what is in a file becomes RGB: a model's `InputSpec`, or the options of a training."""

    @property
    def exif(self) -> bool | None:
        """Turn it as its EXIF orientation says."""

    @property
    def background(self) -> Sequence[int] | None:
        """RGB color that transparent images are drawn on; None: alpha is dropped."""

    @property
    def bits(self) -> int | None:
        """Of 16-bit gray, whose largest value becomes 255; None: values are clipped at 255, those of any mode."""


@dataclass(frozen=True)
class DefaultRules:
    """Those of a training that says nothing else."""

    exif: bool | None = True
    background: tuple[int, ...] | None = (255, 255, 255)
    bits: int | None = 16


DEFAULT_RULES = DefaultRules()


def decode_rgb(file: Any, name: str, smallest: int = 1, rules: PixelRules = DEFAULT_RULES) -> Image.Image:
    """PIL image (or a file of one) to RGB by Pillow's ``convert``: gray is repeated, a palette looked up.

    16-bit gray is scaled, alpha composed, and the image turned, as the rules say. Raises ValueError naming it if it is
    unreadable, too small, or of 32 bits.
    """
    try:
        with nullcontext(file) if isinstance(file, Image.Image) else Image.open(file, formats=FORMATS) as opened:
            wide = is_16_bit(opened)
            image = _to_rgb(ImageOps.exif_transpose(opened) if rules.exif else opened, wide, rules)
    except UNREADABLE as error:
        raise ValueError(f"{name}: unreadable image: {reason(error)}") from error
    if min(image.size) < smallest:
        raise ValueError(f"{name}: wanted at least one patch of {smallest} px, got {image.width} x {image.height} px")
    return image


def is_16_bit(image: Image.Image) -> bool:
    """Whether it has one channel of 16 bits; Pillow opens a PGM's as one of 32."""
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")


def orientation(image: Image.Image) -> int:
    """What EXIF says of an opened image; 1 is upright, also a TIFF, which Pillow always turns."""
    value = 1 if image.format == "TIFF" else image.getexif().get(_ORIENTATION, 1)
    return value if value in range(1, 9) else 1


def _to_rgb(image: Image.Image, wide: bool, rules: PixelRules) -> Image.Image:
    transparent = rules.background is not None and image.has_transparency_data
    if image.mode == "RGB" and not transparent:
        image.load()  # `convert` would copy it
        return image
    if wide and rules.bits is not None:
        image = _scaled(image, rules.bits)
    elif image.mode in ("I", "F") and rules.bits is not None:
        raise ValueError(f"wanted 8 or 16 bits a channel, got 32 (mode {image.mode})")
    if transparent and rules.background is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (*rules.background, 255)), image)
    return image.convert("RGB")


def _scaled(image: Image.Image, bits: int) -> Image.Image:
    """16-bit gray to 8 bits, or to gray and alpha where one value is transparent."""
    top, key = (1 << bits) - 1, image.info.get("transparency")
    values = image.convert("I")
    gray = values.point([min(255, (value * 255 + top // 2) // top) for value in range(1 << 16)], "L")
    gray.info.pop("transparency", None)
    if isinstance(key, int):
        gray.putalpha(values.point([255 * (value != key) for value in range(1 << 16)], "L"))
    return gray


def as_rgb(image: str | Path | Image.Image, rules: PixelRules = DEFAULT_RULES) -> Image.Image:
    """`decode_rgb` of a file, named by its path, or of an image."""
    return decode_rgb(image, "image" if isinstance(image, Image.Image) else str(image), rules=rules)


def reason(error: Exception) -> str:
    """Why a file is unreadable, in few words without its name."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image in a known format"
    return getattr(error, "strerror", None) or str(error)
