"""What a caller hands to `predict`, made RGB images ahead of the model, on threads. Nothing here imports torch."""

import io
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any

import numpy as np
from PIL import Image

from sparsemae.data.images import PixelRules, decode_rgb
from sparsemae.predictor import Input, Inputs


def results_of(
    images: Inputs,
    rules: PixelRules,
    prepare: Callable[[Image.Image], Any],
    run: Callable[[list[Any]], list[Any]],
    batch: int,
    threads: int,
    max_pixels: int,
) -> Iterator[Any]:
    """One result of ``run`` for each image, in order; of one that cannot be read or has none, its ValueError.

    Args:
        prepare: an RGB image to what ``run`` takes a list of, at most ``batch`` together.
        threads: that read and prepare what comes next while ``run`` computes.
    """

    def decode(image: Any, name: str) -> Image.Image:
        return decode_rgb(image, name, rules=rules, max_pixels=max_pixels)

    prepared = _ahead(images, lambda image, name: prepare(decode(image, name)), decode, threads)
    while found := list(islice(prepared, batch)):
        results = iter(_run_each(run, [one for one in found if not isinstance(one[1], ValueError)]))
        yield from (one if isinstance(one, ValueError) else next(results) for _, one in found)


def _run_each(run: Callable[[list[Any]], list[Any]], named: list[tuple[str, Any]]) -> list[Any]:
    """Results of images with their names; its ValueError in place of one that has none."""
    if not named:
        return []
    try:
        return run([one for _, one in named])
    except ValueError as error:
        if len(named) == 1:
            return [ValueError(f"{named[0][0]}: {error}")]
        return [result for one in named for result in _run_each(run, [one])]


def one_by_one(images: Inputs) -> Iterable[Input]:
    """The images of a call: one alone, several, or those of an array [N, H, W, C]. Raises ValueError on no such."""
    if isinstance(images, np.ndarray):
        return images if images.ndim == 4 else [images]
    given: Any = images
    if isinstance(given, str | os.PathLike | bytes | Image.Image) or hasattr(given, "read"):
        given = [given]
    if not isinstance(given, Iterable):
        raise ValueError(f"images: wanted one image or several, got {type(given).__name__}")
    return given


def _ahead(
    images: Inputs, prepare: Callable[[Any, str], Any], decode: Callable[[Any, str], Image.Image], threads: int
) -> Iterator[tuple[str, Any]]:
    """Names of the images, with what they are prepared to or why they cannot be."""
    waiting = deque[Future[tuple[str, Any]]]()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for index, image in enumerate(one_by_one(images)):
                waiting.append(pool.submit(_attempt, prepare, *_taken(image, index, decode)))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _attempt(prepare: Callable[[Any, str], Any], image: Any, name: str) -> tuple[str, Any]:
    try:
        return name, image if isinstance(image, ValueError) else prepare(image, name)
    except ValueError as error:
        return name, error


def _taken(image: Any, index: int, decode: Callable[[Any, str], Image.Image]) -> tuple[Any, str]:
    """What a thread may decode, or why it cannot, and its name; of an open image, which may come twice, its pixels."""
    if isinstance(image, str | os.PathLike):
        return image, os.fspath(image)
    name = f"image {index}"
    try:
        if isinstance(image, bytes):
            return io.BytesIO(image), name
        if isinstance(image, np.ndarray):
            return _from_array(image, name), name
        if isinstance(image, Image.Image) or hasattr(image, "read"):
            return decode(image, name), name
        raise ValueError(
            f"{name}: wanted a path, bytes, an open file, a PIL image or a uint8 array, got {type(image).__name__}"
        )
    except ValueError as error:
        return error, name


def _from_array(pixels: np.ndarray, name: str) -> Image.Image:
    if pixels.dtype != np.uint8:
        raise ValueError(f"{name}: wanted an array of uint8, got {pixels.dtype}")
    shape = pixels.shape[:2] if pixels.shape[2:] == (1,) else pixels.shape
    if not pixels.size or not (len(shape) == 2 or (len(shape) == 3 and shape[2] in (3, 4))):
        raise ValueError(f"{name}: wanted [H, W] or [H, W, C] with 1, 3 or 4 channels, got {list(pixels.shape)}")
    return Image.fromarray(pixels.reshape(shape))
