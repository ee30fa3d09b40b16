"""Whether an accuracy is more than guessing, or than always naming the most frequent class, would give.

One-sided, by the binomial distribution itself, at the level of two standard errors of a normal one. A figure that is
the best of several looks at the same images is held to that level divided by their number (Bonferroni).
"""

import math
from collections.abc import Mapping
from statistics import NormalDist

LEVEL = 1 - NormalDist().cdf(2.0)
MOST_IMAGES = 100_000


def tail(right: int, images: int, guess: float) -> float:
    """Probability that so many images or more are right by guesses that are each right with probability ``guess``."""
    if right <= 0 or guess >= 1:
        return 1.0
    total = 0.0
    for k in range(right, images + 1):
        logs = math.lgamma(images + 1) - math.lgamma(k + 1) - math.lgamma(images - k + 1)
        term = math.exp(logs + k * math.log(guess) + (images - k) * math.log1p(-guess))
        total += term
        if k > images * guess and term < total * 1e-12:
            break
    return min(total, 1.0)


def warning(metrics: Mapping[str, float]) -> str | None:
    """What is to be said of ``top1`` by ``images``, ``guess`` and ``looks``; None if it stands, or one is lacking.

    ``guess`` is the larger of one over the classes and the most frequent class's share, ``looks`` the number of
    evaluations that the figure is the best of.
    """
    if not {"top1", "images", "guess", "looks"} <= metrics.keys():
        return None
    top1, guess, images, level = metrics["top1"], metrics["guess"], int(metrics["images"]), LEVEL / metrics["looks"]
    if tail(round(top1 * images), images, guess) <= level:
        return None
    best_of = f" as the best of {metrics['looks']:g} epochs" * (metrics["looks"] > 1)
    more = _images_that_tell(top1, images, guess, level) if top1 > guess else 0
    hint = f"; the same figure on {more:,} images would be" * bool(more)
    if guess < 1 and guess**images > level:
        return (
            f"warning: {images:,} validation images are too few to tell top-1 {top1:.1%}{best_of} from guessing, which "
            f"gives {guess:.1%}" + (f": {more:,} would" if hint else "")
        )
    return (
        f"warning: top-1 {top1:.1%}{best_of} is not above guessing or the most frequent class, {guess:.1%}, by two "
        f"standard errors on {images:,} images{hint}"
    )


def _images_that_tell(top1: float, images: int, guess: float, level: float) -> int:
    """The number of images, about, from which the same figure is above guessing; 0: more than `MOST_IMAGES`."""
    low, high = images, 2 * images
    while tail(round(top1 * high), high, guess) > level:
        low, high = high, 2 * high
        if high > MOST_IMAGES:
            return 0
    while high - low > 1:
        middle = (low + high) // 2
        tells = tail(round(top1 * middle), middle, guess) <= level
        low, high = (low, middle) if tells else (middle, high)
    return high
