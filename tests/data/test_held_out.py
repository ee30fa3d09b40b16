"""A root without splits, evaluated: what the model's own training held out, and what is another set's."""

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsemae.data.sources import find_source
from sparsemae.data.splits import Splits
from sparsemae.data.tree import Split
from sparsemae.options import SourceConfig

CLASSES = ["ant", "bee", "cat", "dog"]
SPLITS: tuple[Split, Split] = ("train", "val")


def eighty(root: Path) -> Path:
    """Names of images, 20 of each class: they are listed, not read."""
    for name in CLASSES:
        (root / name).mkdir(parents=True)
        for i in range(20):
            (root / name / f"{i:02}.jpg").touch()
    return root


def at(root: Path, **options: Any) -> Splits:
    return find_source(SourceConfig("folder", str(root), **options))


@pytest.mark.parametrize("rule", ["stratified", "permutation"])
def test_a_named_split_is_by_what_the_model_held_out(tmp_path: Path, rule: Any) -> None:
    root = eighty(tmp_path / "flat")
    model = at(root, val_share=0.05, val_rule=rule)
    wanted = {split: model.open(split).indices for split in SPLITS}
    os.rename(root, tmp_path / "moved")
    splits = at(tmp_path / "moved")  # by the options a tenth
    assert len(splits.open("val")) == 8
    for split, said in zip(
        SPLITS, ("all but its held-out part, as the model was trained", "not trained on"), strict=True
    ):
        source, line = splits.open_for_evaluation(split, model.trained_on(), CLASSES)
        assert np.array_equal(source.indices, wanted[split])
        assert line.endswith(said)
    assert len(splits.open_for_evaluation(None, model.trained_on(), CLASSES)[0]) == 4


@pytest.mark.parametrize(("split", "images"), [(None, 8), ("val", 8), ("train", 72)])
def test_of_a_model_that_does_not_say_nothing_is_claimed(tmp_path: Path, split: Split | None, images: int) -> None:
    source, said = at(eighty(tmp_path / "flat")).open_for_evaluation(split, {}, CLASSES)
    part = split or "val"
    assert len(source) == images
    assert said.endswith(f"its {part} part, a tenth held out: the model's file does not say what it was trained on")


def test_a_named_split_of_another_set_is_the_commands_own_and_said(tmp_path: Path) -> None:
    trained_on = at(eighty(tmp_path / "one"), val_share=0.05).trained_on()
    (eighty(tmp_path / "other") / "ant" / "new.jpg").touch()
    for split, count in zip(SPLITS, (73, 8), strict=True):
        source, said = at(tmp_path / "other").open_for_evaluation(split, trained_on, CLASSES)
        assert len(source) == count
        assert said.endswith(
            f"on its {split} part by this command's data.val_share: the model was trained on another set"
        )


@pytest.mark.parametrize("split", [None, "train", "val"])
def test_a_set_that_has_changed_is_refused(tmp_path: Path, split: Split | None) -> None:
    model = at(eighty(tmp_path / "flat")).trained_on()
    (tmp_path / "flat" / "ant" / "new.jpg").touch()
    with pytest.raises(ValueError, match=r"flat: wanted the images .* the folder has changed since \(--split all"):
        at(tmp_path / "flat").open_for_evaluation(split, model, CLASSES)
    assert len(at(tmp_path / "flat").open_for_evaluation("all", model, CLASSES)[0]) == 81


@pytest.mark.parametrize("split", [None, "val"])
def test_nothing_is_held_out_of_a_training_split_whose_validation_has_gone(tmp_path: Path, split: Split | None) -> None:
    for part in SPLITS:
        eighty(tmp_path / part)
    model = at(tmp_path).trained_on()
    shutil.rmtree(tmp_path / "val")
    with pytest.raises(ValueError, match="the folder has changed since"):
        at(tmp_path).open_for_evaluation(split, model, CLASSES)


def test_two_classes_of_one_name_cannot_be_numbered_by_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="each of its own name, got two named ant, in another order or number"):
        at(eighty(tmp_path / "flat")).open("all", class_names=["ant", "bee", "cat", "dog", "ant"])
