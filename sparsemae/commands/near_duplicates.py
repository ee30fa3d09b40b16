"""Images that are one picture, saved twice: found by a difference hash, whatever their format, quality and size.

A hash is one bit for each of 16 x 16 cells of the gray image: whether the next cell to the right is clearly brighter
(N. Krawetz, *Kind of like that*, 2013, but for `NOISE`). Two of at most `MOST` different bits agree in one of `BANDS`
whole parts, by which candidates are found without a look at all pairs.
"""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from PIL import Image

SIDE = 16
NOISE = 2
"""Steps of brightness, of 255, that JPEG may make in an even sky."""
MOST = 15
"""Of 256 bits, that may differ."""
BANDS = 16
_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1)


def fingerprint(image: Image.Image) -> bytes:
    """32 bytes of an RGB image; empty where too little of it varies to tell it from others."""
    gray = np.asarray(image.convert("L").resize((SIDE + 1, SIDE), Image.Resampling.BOX), np.int16)
    brighter = np.diff(gray, axis=1) > NOISE
    return np.packbits(brighter).tobytes() if SIDE <= brighter.sum() <= SIDE * (SIDE - 1) else b""


def near_pairs(some: Sequence[bytes], others: Sequence[bytes]) -> list[tuple[int, int, int]]:
    """Of each of ``some`` the nearest of ``others``, where it is near: both numbers, and how many bits differ."""
    table = np.frombuffer(b"".join(mark or bytes(32) for mark in others), np.uint8).reshape(-1, 2 * BANDS)
    places: dict[tuple[int, bytes], list[int]] = defaultdict(list)
    for number, mark in enumerate(others):
        for band in range(BANDS) if mark else ():
            places[band, mark[2 * band : 2 * band + 2]].append(number)
    found = []
    for number, mark in enumerate(some):
        bands = range(BANDS) if mark else ()
        candidates = np.unique([n for band in bands for n in places.get((band, mark[2 * band : 2 * band + 2]), ())])
        if not len(candidates):
            continue
        candidates = candidates.astype(np.int64)
        differ = _BITS[table[candidates] ^ np.frombuffer(mark, np.uint8)].sum(axis=1)
        if (nearest := int(differ.argmin())) >= 0 and differ[nearest] <= MOST:
            found.append((number, int(candidates[nearest]), int(differ[nearest])))
    return found
