"""Whether an accuracy is above guessing: the binomial's tail against scipy's, and simulated trainings."""

import numpy as np
import pytest
from scipy import stats

from sparsemae.tasks.guessing import LEVEL, tail, warning


@pytest.mark.parametrize("images", [1, 4, 40, 500, 50_000])
@pytest.mark.parametrize("guess", [0.001, 0.2, 0.5, 0.95])
def test_the_tail_is_the_binomials(images: int, guess: float) -> None:
    for right in {0, 1, images // 3, round(images * guess) + 1, images}:
        assert tail(right, images, guess) == pytest.approx(
            stats.binom.sf(right - 1, images, guess), rel=1e-6, abs=1e-280
        )


def said(right: int, images: int, guess: float, looks: int) -> str | None:
    return warning({"top1": right / images, "images": images, "guess": guess, "looks": looks})


def test_two_standard_errors_at_one_look() -> None:
    """With many images the limit is that of a normal distribution, and wider with more looks."""
    images, guess = 10_000, 0.2
    error = (guess * (1 - guess) / images) ** 0.5
    for looks, wide in ((1, 2.0), (100, stats.norm.isf(LEVEL / 100))):
        limit = (guess + wide * error) * images
        assert said(round(limit + 0.3 * error * images), images, guess, looks) is None
        assert "is not above guessing" in (said(round(limit - 0.3 * error * images), images, guess, looks) or "")


@pytest.mark.holds("own.2")
@pytest.mark.parametrize(("images", "classes", "looks"), [(40, 4, 44), (40, 2, 44), (400, 10, 10), (20, 5, 100)])
def test_random_labels_are_warned_of(images: int, classes: int, looks: int, figure: object) -> None:
    """The best of independent evaluations of a model that guesses: the worst case, since real ones are alike."""
    warned = 0
    for seed in range(20):
        generator = np.random.default_rng(seed)
        truth = generator.integers(classes, size=images)
        guess = max(1 / classes, np.bincount(truth).max() / images)
        right = max((generator.integers(classes, size=images) == truth).sum() for _ in range(looks))
        warned += said(int(right), images, guess, looks) is not None
    assert warned >= 19


def test_a_set_too_small_to_tell_says_how_many_would() -> None:
    line = said(4, 4, 0.25, 100) or ""
    assert line.startswith("warning: 4 validation images are too few to tell top-1 100.0% as the best of 100 epochs")
    (more,) = (int(word) for word in line.replace(":", " ").split() if word.isdigit() and int(word) not in (4, 100))
    assert tail(more, more, 0.25) <= LEVEL / 100 < tail(more - 1, more - 1, 0.25)
    assert said(more, more, 0.25, 100) is None
    assert said(40, 40, 0.25, 44) is None
    hint = said(60, 100, 0.5, 10) or ""
    assert "is not above guessing" in hint
    assert "images would be" in hint
    assert warning({"top1": 0.1}) is None
    assert "would" not in (said(2, 10, 1.0, 1) or "")
