"""JPEGs of a training decoded, cropped and resized by torchvision, in less time than by Pillow.

It is behind `decode_rgb`, not beside it: Pillow reads the header, and what is not a JPEG in RGB or gray (CMYK among
them, which the two convert differently), is too large or too small, or cannot be decoded, is `decode_rgb`'s, with its
image or its error. The same draws give the same crops; pixels differ by less than 1 of 255 in the mean.

torchvision 0.29 calls its decoders deprecated in favor of TorchCodec's; `_pixels` alone calls one.
"""

import io
import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
import torchvision
from PIL import Image
from torch import Tensor

from sparsemae.data.crops import resized
from sparsemae.data.images import DEFAULT_RULES, PixelRules, decode_rgb, open_image, orientation
from sparsemae.data.splits import Source
from sparsemae.limits import MAX_PIXELS

_FIRST = b"\xff\xd8\xff"  # of a JPEG


@dataclass(frozen=True)
class Decoded:
    """An image as torchvision decodes it, in the place of Pillow's."""

    pixels: Tensor
    """uint8 ``[3, H, W]``, as bytes ``[H, W, 3]``."""

    @property
    def width(self) -> int:
        """Its width, px."""
        return self.pixels.shape[-1]

    @property
    def height(self) -> int:
        """Its height, px."""
        return self.pixels.shape[-2]

    def part(self, box: tuple[int, int, int, int]) -> Tensor:
        """uint8 ``[H, W, 3]``, a view."""
        top, left, height, width = box
        return self.pixels[:, top : top + height, left : left + width].permute(1, 2, 0)

    def resized(self, box: tuple[int, int, int, int], side: int, interpolation: str) -> Image.Image:
        """A part of it, given as top, left, height and width, ``side`` px high and wide."""
        return Image.fromarray(resized(self.part(box), side, interpolation).permute(1, 2, 0).numpy())


def decoded_by(library: str, source: Source) -> Source:
    """The same images, read by Pillow or, where it can, by torchvision."""
    if library == "torchvision" and not hasattr(torchvision.io, "decode_jpeg"):
        raise ValueError(f"data.jpeg: wanted pillow, or a torchvision that decodes, got {torchvision.__version__}")
    return replace(source, decoder=decode) if library == "torchvision" else source


def decode(
    file: Any, name: str, smallest: int = 1, rules: PixelRules = DEFAULT_RULES, max_pixels: int = MAX_PIXELS
) -> Image.Image | Decoded:
    """As `decode_rgb`, whose arguments these are, and which it asks for all that is not a plain JPEG."""
    pixels = None if isinstance(file, Image.Image) else _pixels(file, smallest, rules, max_pixels)
    return decode_rgb(file, name, smallest, rules, max_pixels) if pixels is None else Decoded(pixels)


def _pixels(file: Any, smallest: int, rules: PixelRules, max_pixels: int) -> Tensor | None:
    begin, content = file.tell(), b""
    if file.read(len(_FIRST)) == _FIRST:
        content = _FIRST + file.read()
    file.seek(begin)
    try:
        with open_image(io.BytesIO(content), max_pixels) as opened:
            if opened.format != "JPEG" or opened.mode not in ("RGB", "L") or min(opened.size) < smallest:
                return None
            turned, size = orientation(opened) if rules.exif else 1, opened.size
    except Exception:  # `decode_rgb` says why
        return None
    try:
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
            encoded = torch.frombuffer(bytearray(content), dtype=torch.uint8)
            pixels = torchvision.io.decode_jpeg(encoded, torchvision.io.ImageReadMode.RGB)
    except RuntimeError:  # likewise
        return None
    return _turned(pixels, turned) if pixels.shape[1:] == size[::-1] else None


def _turned(pixels: Tensor, turned: int) -> Tensor:
    """As EXIF's orientation says, 1 to 8: from 5 on rows are columns; then mirrored this way, that way, or both."""
    if turned >= 5:
        pixels = pixels.transpose(1, 2)
    mirrored = {2: [2], 3: [1, 2], 4: [1], 6: [2], 7: [1, 2], 8: [1]}.get(turned)
    return pixels if mirrored is None else pixels.flip(mirrored)
