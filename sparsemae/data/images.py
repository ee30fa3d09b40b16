"""From an image file to RGB pixels: the one way of training, check and prediction. Nothing here imports torch.

Files are not trusted: of Pillow's many decoders only those of `FORMATS` are ever tried, whatever a file is called, an
image of too many pixels is refused by its header, and whatever a decoder raises is the file's fault.
"""

import io
import math
import re
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from PIL import Image, ImageOps, UnidentifiedImageError

from sparsemae.files import existing
from sparsemae.limits import MAX_PIXELS

AVIF = find_spec("PIL.AvifImagePlugin") is not None
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "GIF") + ("AVIF",) * AVIF
"""Pillow's names of what is read; of several frames the first."""
SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".gif", *(".avif",) * AVIF
)  # fmt: skip
"""Of the files that are images, in lower case."""
MAX_RESIZED_PIXELS = 1 << 25
"""Of an image resized before it is cropped: of a narrower strip only what is kept is ever computed."""
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
        """Of 16-bit gray, whose largest value becomes 255, unless a file says its own; None: values are clipped at
        255, those of any mode."""


@dataclass(frozen=True)
class DefaultRules:
    """Those of a training that says nothing else."""

    exif: bool | None = True
    background: tuple[int, ...] | None = (255, 255, 255)
    bits: int | None = 16


DEFAULT_RULES = DefaultRules()


def open_image(file: Any, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The header of an image file, as PIL's image that decodes when it is used. A decoder may raise anything.

    Raises ValueError if it has more pixels than ``max_pixels``.
    """
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels  # Pillow warns above it, and raises above twice as many
    try:
        image = Image.open(existing(file) if isinstance(file, str | Path) else file, formats=FORMATS)
    except Image.DecompressionBombError as error:  # its text has the number of pixels first
        pixels = f"{int(found[0]):,}" if (found := re.search(r"\d+", str(error))) else "more"
        raise ValueError(f"wanted at most max_pixels={max_pixels:,}, got {pixels} px") from error
    if image.width * image.height > max_pixels:
        image.close()
        raise ValueError(f"wanted at most max_pixels={max_pixels:,}, got {image.width} x {image.height} px")
    return image


def decode_rgb(
    file: Any, name: str, smallest: int = 1, rules: PixelRules = DEFAULT_RULES, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """PIL image (or a file of one) to RGB by Pillow's ``convert``: gray is repeated, a palette looked up.

    16-bit gray is scaled, alpha composed, and the image turned, as the rules say. Raises ValueError naming it if it is
    unreadable, too small or too large, or of 32 bits.
    """
    try:
        with nullcontext(file) if isinstance(file, Image.Image) else open_image(file, max_pixels) as opened:
            wide, bits = is_16_bit(opened), 16 if rules.bits and own_maxval(opened) else rules.bits
            image = _to_rgb(ImageOps.exif_transpose(opened) if rules.exif else opened, wide, bits, rules.background)
    except Exception as error:
        raise ValueError(f"{name}: unreadable image: {reason(error)}") from error
    if min(image.size) < smallest:
        raise ValueError(f"{name}: wanted at least one patch of {smallest} px, got {image.width} x {image.height} px")
    return image


def is_16_bit(image: Image.Image) -> bool:
    """Whether it has one channel of 16 bits; Pillow opens a PGM's as one of 32."""
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")


def own_maxval(image: Image.Image) -> int | None:
    """What becomes 255 or 65535 when a file is decoded, by its header: a PGM's or PPM's maxval, or 2 or 4 bits of gray.

    None: values stay as they are. Of an opened image whose pixels were not asked for: Pillow's decoder alone knows it.
    """
    codec, _, _, args = next(iter(getattr(image, "tile", ())), ("", (), 0, ""))
    raw, last = (args[0], args[-1]) if isinstance(args, tuple) and args else (args, None)
    if codec.startswith("ppm") and raw != "1;I":
        return None if last == (65535 if image.mode == "I" else 255) else last
    return {"L;2": 3, "L;4": 15}.get(str(raw)[:3])


def orientation(image: Image.Image) -> int:
    """What EXIF says of an opened image; 1 is upright, also a TIFF, which Pillow always turns."""
    return 1 if image.format == "TIFF" else stored_orientation(image)


def stored_orientation(image: Image.Image) -> int:
    """What EXIF says of an opened image of any format, before it is decoded."""
    value = image.getexif().get(_ORIENTATION, 1)
    return value if value in range(1, 9) else 1


def orientation_with_mask(file: Any, name: str, exif: bool | None, max_pixels: int) -> int:
    """What EXIF says of an image file that has a mask; 1 of what `decode_rgb` cannot read either.

    Raises ValueError, naming it, if the mask could not be turned with it: there is no rule, Pillow turns the image
    whatever the rule is, or a square one's mask has the same size turned or not.
    """
    if isinstance(file, Image.Image):
        return 1
    try:
        with open_image(io.BytesIO(file.read()), max_pixels) as opened:
            turned, tiff, square = stored_orientation(opened), opened.format == "TIFF", opened.width == opened.height
    except Exception:
        return 1  # `decode_rgb` says why
    finally:
        file.seek(0)
    if turned != 1 and tiff:
        raise ValueError(
            f"{name}: wanted a TIFF with a mask saved upright, got one whose orientation is {turned}, which Pillow "
            "turns without its mask, whatever data.exif is"
        )
    if turned != 1 and exif is None:
        raise ValueError(
            f"{name}: wanted data.exif true or false, got none for an image whose EXIF orientation is {turned} "
            "(true turns it and its mask, false neither)"
        )
    if turned >= 5 and exif and square:
        raise ValueError(
            f"{name}: wanted data.exif false, or this image saved upright, got true for a square one whose EXIF "
            f"orientation is {turned}: the size of its mask does not tell whether that is turned already"
        )
    return turned


def _to_rgb(image: Image.Image, wide: bool, bits: int | None, background: Sequence[int] | None) -> Image.Image:
    transparent = background is not None and image.has_transparency_data
    if image.mode == "RGB" and not transparent:
        image.load()  # `convert` would copy it
        return image
    if wide and bits is not None:
        image = _scaled(image, bits)
    elif image.mode in ("I", "F") and bits is not None:
        raise ValueError(f"wanted 8 or 16 bits a channel, got 32 (mode {image.mode})")
    if transparent and background is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (*background, 255)), image)
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


def as_rgb(
    image: str | Path | Image.Image, rules: PixelRules = DEFAULT_RULES, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """`decode_rgb` of a file, named by its path, or of an image."""
    name = "image" if isinstance(image, Image.Image) else str(image)
    return decode_rgb(image, name, rules=rules, max_pixels=max_pixels)


def center_crop(image: Image.Image, height: int, width: int, crop_pct: float, interpolation: str) -> Image.Image:
    """timm's evaluation transform, to the pixel: the shorter side resized to ``height / crop_pct``, then the center.

    torchvision resizes PIL images with Pillow itself, so that only its rounding of sizes and offsets has to be met: the
    longer side is ``int(size * long / short)``, truncated; a crop starts at ``round((side - crop) / 2)``, half to even;
    an image smaller than the crop is padded with black. Where the resized image would pass `MAX_RESIZED_PIXELS`, the
    same part is computed alone, in the memory of the crop: the same but for the rounding between Pillow's two passes.
    """
    size, way = _resized(image.size, height, width, crop_pct), Image.Resampling[interpolation.upper()]
    smaller = size[0] < width or size[1] < height
    left, top = (max(0, round((side - part) / 2.0)) for part, side in zip((width, height), size, strict=True))
    if size[0] * size[1] > MAX_RESIZED_PIXELS and not smaller:
        x, y = image.width / size[0], image.height / size[1]
        return image.resize((width, height), way, (left * x, top * y, (left + width) * x, (top + height) * y))
    image = image.resize(size, way)
    if smaller:
        padded = Image.new("RGB", (max(width, image.width), max(height, image.height)))
        padded.paste(image, (max(0, (width - image.width) // 2), max(0, (height - image.height) // 2)))
        image = padded
    return image.crop((left, top, left + width, top + height))


def _resized(size: tuple[int, int], height: int, width: int, crop_pct: float) -> tuple[int, int]:
    """(width, height) after timm's resize: the shorter side for a square input, the better fitting one otherwise."""
    scaled_height, scaled_width = math.floor(height / crop_pct), math.floor(width / crop_pct)
    if scaled_height == scaled_width:
        short, long = sorted(size)
        longer = int(scaled_height * long / short)
        return (scaled_height, longer) if size[0] <= size[1] else (longer, scaled_height)
    ratio = min(size[1] / scaled_height, size[0] / scaled_width)
    return round(size[0] / ratio), round(size[1] / ratio)


def reason(error: Exception) -> str:
    """Why a file is unreadable, in few words without its name."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image in a known format"
    return getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
