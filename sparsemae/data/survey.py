"""What the headers of some images say of all: turned pictures, and 16-bit gray that does not use its range."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from PIL import Image

from sparsemae.data.images import PixelRules, is_16_bit, open_image, orientation, own_maxval, reason
from sparsemae.data.splits import Source

LOOKED_AT = 1000
"""Images, spread over the set."""
SIDES_LOOKED_AT = 200
VALIDATION_LOOKED_AT = 10_000


@dataclass
class Traits:
    """Counts over images."""

    images: int = 0
    turned: int = 0
    """By their EXIF orientation."""
    wide: int = 0
    """16-bit gray, whose range its files do not say."""
    highest: int = 0
    """Value of those."""
    example: str = ""
    """One that is turned."""

    def add(self, image: Image.Image, name: str) -> None:
        """Count an opened image."""
        self.images += 1
        if orientation(image) != 1:
            self.turned += 1
            self.example = self.example or name
        if is_16_bit(image) and own_maxval(image) is None:
            self.wide += 1
            self.highest = max(self.highest, int(np.asarray(image).max()))

    def notes(self, rules: PixelRules) -> list[str]:
        """What is to be said of them."""
        lines = []
        if self.turned:
            how = "turned upright" if rules.exif else "read as they are stored; --data.exif true turns them upright"
            lines.append(
                f"{self.turned:,} of {self.images:,} images have an EXIF orientation ({self.example}): they are {how}"
            )
        if self.wide and rules.bits is not None and self.highest < (1 << rules.bits) / 4:
            lines.append(
                f"{self.wide:,} 16-bit images have no value above {self.highest:,} and are nearly black: "
                f"--data.bits {max(9, self.highest.bit_length())} scales that to white"
            )
        return lines


def survey(source: Source, rules: PixelRules) -> list[str]:
    """What is to be said of a source's images, by a look at some.

    Of images with masks, and without a rule for EXIF, all are looked at: raises ValueError naming one that is turned.
    """
    refuse = source.legend is not None and rules.exif is None
    traits = Traits()
    count = len(source) if refuse else min(len(source), LOOKED_AT)
    for index in np.unique(np.linspace(0, len(source) - 1, count).round().astype(int)):
        try:
            file, _ = source.open(int(index))
            with file:
                if isinstance(file, Image.Image):
                    return []  # a set that is decoded by its library
                with open_image(file, source.max_pixels) as image:
                    traits.add(image, source.filename(int(index)))
        except Exception:
            continue  # named when it is its turn
    if refuse and traits.turned:
        raise ValueError(
            f"{traits.example}: wanted data.exif true or false, got none for {traits.turned:,} images with an EXIF "
            "orientation (true turns an image and its mask, false neither)"
        )
    return traits.notes(rules)


def unusable(source: Source, smallest: int) -> Iterator[str]:
    """Why an evaluation could not read images of a source, by the headers of all or many, each in a line that names it.

    Known before a training begins, not an epoch later; what is damaged behind its header is found then.
    """
    for index in np.unique(np.linspace(0, len(source) - 1, min(len(source), VALIDATION_LOOKED_AT)).round().astype(int)):
        name = source.filename(int(index))
        try:
            file, _ = source.open(int(index))
            with file:
                if isinstance(file, Image.Image):
                    return  # a set that is decoded by its library
                with open_image(file, source.max_pixels) as image:
                    size = image.size
        except ConnectionError:
            return  # the source is gone, for a while
        except Exception as error:
            yield str(error) if str(error).startswith(name) else f"{name}: unreadable image: {reason(error)}"
            continue
        if min(size) < smallest:
            yield f"{name}: wanted at least one patch of {smallest} px, got {size[0]} x {size[1]} px"


def median_side(source: Source) -> int:
    """Median of the shorter side of some of a source's images, px; 224 where none can be read."""
    sides = []
    for index in np.unique(np.linspace(0, len(source) - 1, min(len(source), SIDES_LOOKED_AT)).round().astype(int)):
        with suppress(Exception):  # named when it is its turn
            file, _ = source.open(int(index))
            with file:
                if isinstance(file, Image.Image):
                    sides.append(min(file.size))
                    continue
                with open_image(file) as image:
                    sides.append(min(image.size))
    return int(np.median(sides)) if sides else 224
