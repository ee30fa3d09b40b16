"""From an image file to RGB pixels: the one way of training, check and prediction. Nothing here imports torch."""

import struct
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

SUFFIXES = (".png", ".jpg", ".jpeg")
"""Of the files that are images; timm's reader of folders takes the same."""
# What Pillow raises on files that are not as they should be.
UNREADABLE = (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError)


def decode_rgb(file: Any, name: str, smallest: int = 1, exif: bool = False) -> Image.Image:
    """PIL image (or a file of one) to RGB by Pillow's ``convert``, as timm and torchvision do.

    Gray is repeated, a palette looked up, CMYK converted, alpha dropped; 16-bit gray is clipped at 255, not scaled.
    Turned as its EXIF orientation says if ``exif``. Raises ValueError naming it if it is unreadable or too small.
    """
    try:
        with file if isinstance(file, Image.Image) else Image.open(file) as opened:
            image = ImageOps.exif_transpose(opened) if exif else opened
            if image.mode == "RGB":
                image.load()  # `convert` would copy it
            else:
                image = image.convert("RGB")
    except UNREADABLE as error:
        raise ValueError(f"{name}: unreadable image: {reason(error)}") from error
    if min(image.size) < smallest:
        raise ValueError(f"{name}: wanted at least one patch of {smallest} px, got {image.width} x {image.height} px")
    return image


def as_rgb(image: str | Path | Image.Image, exif: bool = False) -> Image.Image:
    """`decode_rgb` of a file, named by its path, or of an image."""
    return decode_rgb(image, "image" if isinstance(image, Image.Image) else str(image), exif=exif)


def image_files(path: Path) -> list[Path]:
    """A file, or all files in a folder that Pillow may read. Raises ValueError, naming it, if there is none."""
    if not path.is_dir():
        return [path]
    known = Image.registered_extensions()
    found = sorted(file for file in path.rglob("*") if file.suffix.lower() in known)
    if not found:
        raise ValueError(f"{path}: wanted image files, found none")
    return found


def reason(error: Exception) -> str:
    """Why a file is unreadable, in few words without its name."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image in a known format"
    return getattr(error, "strerror", None) or str(error)
