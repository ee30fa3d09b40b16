import hashlib

import numpy as np
import pytest
from conftest import ROOT

from sparsemae.data.embedded import CLASS_NAMES, SHA256, EmbeddedReader, arrays, file


def test_the_file_is_the_one_that_was_made() -> None:
    assert hashlib.sha256(file().read_bytes()).hexdigest() == SHA256
    assert (ROOT / "images/LICENSE").read_text().count("Zalando") >= 1


def test_counts_and_classes() -> None:
    labels, pixels = arrays()
    assert labels.shape == (20_000,)
    assert pixels.shape == (20_000, 28, 28)
    # Fashion-MNIST's test set has exactly 1,000 images of each class
    assert np.bincount(labels[10_000:], minlength=10).tolist() == [1000] * 10
    assert len(CLASS_NAMES) == 10
    # published mean and deviation of the training set, 0.2860 and 0.3530, up to sampling
    assert pixels[:10_000].mean() / 255 == pytest.approx(0.2860, abs=0.005)
    assert pixels[:10_000].std() / 255 == pytest.approx(0.3530, abs=0.005)


def test_reader_splits() -> None:
    assert len(EmbeddedReader("train")) == len(EmbeddedReader("val")) == 10_000
    image, label = EmbeddedReader("val")[0]
    assert (image.size, image.mode, CLASS_NAMES[label]) == ((28, 28), "L", "Ankle boot")
