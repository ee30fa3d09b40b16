from __future__ import annotations

import re

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix, jaccard_score, precision_recall_fscore_support

from sparsemae.report.tables import class_figures, class_table, confusion_table, layer_table


@pytest.mark.holds("own.3")
@pytest.mark.parametrize("seed", range(5))
def test_figures_of_each_class_are_scikit_learns(seed: int) -> None:
    generator = np.random.default_rng(seed)
    classes = 7  # of which one may be in no label, and one in no prediction
    truth = generator.integers(0, classes - 1, 60)
    predicted = np.where(generator.random(60) < 0.6, truth, generator.integers(1, classes, 60))
    confusion = confusion_matrix(truth, predicted, labels=range(classes))
    found = class_figures(confusion)
    wanted = precision_recall_fscore_support(truth, predicted, labels=range(classes), zero_division=np.nan)
    for ours, theirs in zip((found.precision, found.recall, found.f1, found.support), wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)
    there = found.support > 0
    iou = jaccard_score(truth, predicted, labels=range(classes), average=None, zero_division=0)
    np.testing.assert_allclose(found.iou[there], iou[there], rtol=1e-12)


def cells(page: str, kind: str) -> list[str]:
    return [text.replace(",", "") for text in re.findall(rf'<td class="{kind}[^>]*>([^<]*)<?', page)]


@pytest.mark.holds("own.3")
def test_the_matrix_in_writing_sums_to_the_images() -> None:
    confusion = np.array([[50, 2, 0], [0, 40, 1200], [3, 0, 7]])
    page = confusion_table(confusion, ["a", "<b>", "c"], "images")
    hits, misses = ([int(cell) for cell in cells(page, kind)] for kind in ("hit", "miss"))
    assert hits == [50, 40, 7]
    assert sum(hits + misses) == confusion.sum()
    assert "<b>" not in page
    assert "&lt;b&gt; → c: 1,200 (97%)" in page


@pytest.mark.parametrize("unit", ["images", "pixels"])
def test_a_thousand_classes_are_no_picture(unit: str) -> None:
    confusion = np.random.default_rng(0).integers(0, 3, (1000, 1000)) + 90 * np.eye(1000, dtype=np.int64)
    confusion[7, 3] = 500
    names = [f"class {i}" for i in range(1000)]
    page = confusion_table(confusion, names, unit)
    assert page.count("<tr>") == 1 + 16
    assert re.search(r"<tbody><tr><td>class 7</td><td>class 3</td><td class=n>500</td>", page)
    table = class_table(confusion, names, unit, None)
    assert table.index("class 7<") < table.index("class 0<") < 400_000  # the weakest first, all folded away
    assert len(page) + len(table) < 500_000


def test_layers_add_up() -> None:
    page = layer_table({"sparse": [["qkv", "2:32", 4, 64], ["<fc>", "1:4", 16, 64]], "dense": [["norm", 6]]})
    assert "<b>20</b>" in page
    assert "<b>26</b>" in page
    assert "<b>134</b>" in page
    assert "&lt;fc&gt;" in page
