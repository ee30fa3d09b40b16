"""Figures and their errors of an evaluation, image by image, against slow twins."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sparsemae.data.masks import IGNORED, distinct_colors
from sparsemae.tasks.outcomes import OVERLAYS, SHOWN, ClassOutcomes, PixelOutcomes


def dataset() -> Any:
    """Blank images under their numbers."""
    source = SimpleNamespace(
        filename=lambda index: f"{index:03d}.png", read=lambda index, *_: (Image.new("RGB", (500, 300)), 0)
    )
    return SimpleNamespace(source=source, smallest=1, rules=None)


def class_outcomes(images: int, classes: int, batch: int = 16) -> tuple[ClassOutcomes, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(images, classes, generator=generator)
    target = torch.randint(0, classes, (images,), generator=generator)
    found = ClassOutcomes(dataset(), [f"class {i}" for i in range(classes)])
    order = torch.randperm(images, generator=generator)  # as several processes would bring them
    for part in order.split(batch):
        found.add(part, target[part], logits[part])
    found.gather()
    return found, logits, target


@pytest.mark.parametrize("classes", [2, 7, 50])
def test_a_classifiers_rows_and_figures(classes: int) -> None:
    found, logits, target = class_outcomes(101, classes)
    p = logits.softmax(dim=1)
    head, *rows = found.table()
    assert [row[0] for row in rows] == [f"{i:03d}.png" for i in range(101)]
    assert len(head) == 5 + (classes if classes <= 40 else 8) == len(rows[0])
    for row, own, label in zip(rows, p, target.tolist(), strict=True):
        assert row[1] == f"class {label}"
        assert row[2] == f"class {int(own.argmax())}"
        assert float(row[3]) == pytest.approx(float(own.max()), rel=1e-4)
        assert float(row[4]) == pytest.approx(float(own[label]), rel=1e-4)
        tail = [float(cell) for cell in (row[5:] if classes <= 40 else row[6::2])]
        assert tail == pytest.approx((own if classes <= 40 else own.topk(5).values[1:]).tolist(), rel=1e-4)
    right = (p.argmax(dim=1) == target).double()
    by_name = {one.name: one for one in found.headlines()}
    top1 = by_name["Top-1 accuracy"]
    assert top1.value == pytest.approx(float(right.mean()))
    assert top1.error == pytest.approx(float(right.std(correction=0)) / math.sqrt(101))
    loss = -p.gather(1, target[:, None]).log().double()
    assert by_name["Cross-entropy"].value == pytest.approx(float(loss.mean()), rel=1e-5)
    assert by_name["Cross-entropy"].error == pytest.approx(float(loss.std(correction=0)) / math.sqrt(101), rel=1e-5)
    assert ("Top-5 accuracy" in by_name) == (classes > 5)
    assert found.confusion().sum() == 101
    assert np.diagonal(found.confusion()).sum() == right.sum()


def test_the_error_of_balanced_accuracy_is_that_of_many_draws() -> None:
    generator, truth = np.random.default_rng(0), np.repeat([0, 1, 2], [400, 60, 20])
    rates, drawn, said = np.array([0.9, 0.6, 0.3]), [], 0.0
    for _ in range(200):
        predicted = np.where(generator.random(480) < rates[truth], truth, (truth + 1) % 3)
        found = ClassOutcomes(dataset(), ["a", "b", "c"])
        logits = 5.0 * torch.nn.functional.one_hot(torch.from_numpy(predicted), 3)
        found.add(torch.arange(480), torch.from_numpy(truth), logits)
        found.gather()
        balanced = next(one for one in found.headlines() if one.name == "Balanced accuracy")
        drawn.append(balanced.value)
        said += (balanced.error or math.nan) / 200
    assert np.mean(drawn) == pytest.approx(0.6, abs=0.01)
    assert said == pytest.approx(np.std(drawn), rel=0.15)


def test_galleries_are_bounded_and_in_order() -> None:
    found, logits, target = class_outcomes(300, 7)
    worst, unsure = found.galleries()
    p = logits.softmax(dim=1)
    given = p.gather(1, target[:, None]).squeeze(1)
    wrong = [i for i in given.argsort(stable=True).tolist() if int(p[i].argmax()) != int(target[i])]
    assert [shown.title for shown in worst.pictures] == [f"{i:03d}.png" for i in wrong[:SHOWN]]
    assert len(unsure.pictures) == SHOWN
    assert not {shown.title for shown in worst.pictures} & {shown.title for shown in unsure.pictures}
    top = p.topk(2).values
    margins = [float((top[:, 0] - top[:, 1])[int(shown.title[:3])]) for shown in unsure.pictures]
    assert margins == sorted(margins)
    assert max(max(shown.image.size) for shown in worst.pictures) == 192


def pixel_outcomes(images: int, classes: int) -> tuple[PixelOutcomes, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    truth = generator.integers(0, classes - 1, (images, 9, 11)).astype(np.uint8)  # the last class is in no mask
    right = generator.random((images, 1, 1)) > generator.random(truth.shape)
    predicted = np.where(right, truth, generator.integers(0, classes, truth.shape)).astype(np.uint8)
    truth[generator.random(truth.shape) < 0.1] = IGNORED
    truth[3] = IGNORED
    found = PixelOutcomes(dataset(), [f"class {i}" for i in range(classes)], distinct_colors(classes))
    pixels = torch.zeros(images, 3, 9, 11, dtype=torch.uint8)
    for part in torch.arange(images).split(8):
        found.add(part, pixels[part], torch.from_numpy(truth[part]), torch.from_numpy(predicted[part]).long())
    found.gather()
    return found, truth, predicted


def slow_miou(truth: np.ndarray, predicted: np.ndarray, classes: int) -> float:
    known, ious = truth != IGNORED, []
    for c in range(classes):
        t, p = (truth == c) & known, (predicted == c) & known
        if t.any():
            ious.append((t & p).sum() / (t | p).sum())
    return float(np.mean(ious)) if ious else math.nan


def test_a_segmenters_rows_figures_and_jackknife_errors() -> None:
    found, truth, predicted = pixel_outcomes(30, 5)
    _, *rows = found.table()
    wanted = [slow_miou(t, p, 5) for t, p in zip(truth, predicted, strict=True)]
    assert [float(row[1]) for row in rows] == pytest.approx(wanted, rel=1e-5, nan_ok=True)
    assert [row[3] for row in rows] == [int((t != IGNORED).sum()) for t in truth]
    miou = found.headlines()[0]
    assert miou.value == pytest.approx(slow_miou(truth, predicted, 5))
    assert miou.about == "over 4 of 5 classes"
    left_out = [slow_miou(np.delete(truth, i, 0), np.delete(predicted, i, 0), 5) for i in range(30)]
    assert miou.error == pytest.approx(math.sqrt(29 / 30 * np.square(np.subtract(left_out, np.mean(left_out))).sum()))
    accuracy = found.headlines()[2]
    assert accuracy.value == pytest.approx((truth == predicted)[truth != IGNORED].mean())
    assert found.confusion().sum() == (truth != IGNORED).sum()


def test_best_and_worst_are_kept_as_they_come() -> None:
    found, truth, predicted = pixel_outcomes(30, 5)
    ious = {i: slow_miou(t, p, 5) for i, (t, p) in enumerate(zip(truth, predicted, strict=True)) if i != 3}
    order = sorted(ious, key=lambda i: ious[i])
    worst, best = found.galleries()
    assert [shown.title for shown in worst.pictures] == [f"{i:03d}.png" for i in order[:OVERLAYS]]
    assert [shown.title for shown in best.pictures] == [f"{i:03d}.png" for i in order[: -OVERLAYS - 1 : -1]]
    assert worst.pictures[0].image.size == (2 * 11 + 4, 9)
