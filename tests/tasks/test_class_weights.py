"""Class weights weigh images, and nothing else of the loss."""

import math

import pytest
import torch
from timm.data.mixup import Mixup

from sparsemae.tasks.classification import shares, weighted_cross_entropy


@pytest.mark.holds("own.1")
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_balanced_classes_pull_nothing_at_even_odds(smoothing: float) -> None:
    """19 images to 1 under weights inverse to that: where every image is called either class, the pulls cancel.

    torch's own weights fail this with label smoothing: they pull towards the rare class.
    """
    target, weights = torch.tensor([0] * 19 + [1]), torch.tensor([20 / 38, 20 / 2])
    logits = torch.zeros(20, 2, requires_grad=True)
    weighted_cross_entropy(logits, target, weights, smoothing).backward()
    assert logits.grad is not None
    assert logits.grad.sum(0).abs().max() < 1e-7
    theirs = torch.zeros(20, 2, requires_grad=True)
    torch.nn.functional.cross_entropy(theirs, target, weights, label_smoothing=smoothing).backward()
    assert theirs.grad is not None
    assert (theirs.grad.sum(0)[1] < -1e-3) == (smoothing > 0)


@pytest.mark.holds("own.1")
@pytest.mark.parametrize("mixed", [False, True])
def test_each_images_loss_is_weighed_by_its_classes(mixed: bool) -> None:
    """Against sums written out; a mixed image has the weights of its two classes in their shares."""
    torch.manual_seed(0)
    logits, target, weights, smoothing = torch.randn(6, 3), torch.arange(6) % 3, torch.tensor([0.5, 1.0, 3.0]), 0.2
    wanted = 0.0
    soft = torch.full((6, 3), smoothing / 3)
    share = 0.7 if mixed else 1.0
    for image in range(6):
        of = [(int(target[image]), share), (int(target[5 - image]), 1 - share)]
        for number, part in of:
            soft[image, number] += part * (1 - smoothing)
        total = math.log(sum(math.exp(v) for v in logits[image].tolist()))
        loss = sum(float(soft[image, c]) * (total - float(logits[image, c])) for c in range(3))
        wanted += loss * sum(float(weights[number]) * part for number, part in of) / 6
    given = soft if mixed else target
    assert float(weighted_cross_entropy(logits, given, weights, smoothing)) == pytest.approx(wanted, rel=1e-5)


def test_mixup_smooths_as_is_undone() -> None:
    """timm's targets, whose shares are read back."""
    mix = Mixup(0.8, 0.0, label_smoothing=0.1, num_classes=4)
    _, soft = mix(torch.randn(8, 3, 8, 8), torch.arange(8) % 4)
    found = shares(soft, 4, 0.1)
    assert torch.allclose(found.sum(1), torch.ones(8))
    assert found.min() > -1e-6
