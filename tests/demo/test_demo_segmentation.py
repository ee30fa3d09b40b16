"""The study of the demo's segmentation: pretrained against from scratch, paired by seed."""

import math
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from rich.console import Console

from sparsemae.demo.segmentation import PAIRED, SEEDS, Paired
from sparsemae.demo.stages import PRETRAINING, run_stages
from sparsemae.tasks.loading import load_model


def test_the_paired_difference_by_hand() -> None:
    study = Paired.of([0.62, 0.61, 0.66], [0.60, 0.60, 0.60])
    assert study.differences == pytest.approx([2, 1, 6])
    assert study.mean == pytest.approx(3)
    assert study.error == pytest.approx(math.sqrt((1 + 4 + 9) / 2) / math.sqrt(3))
    assert "+3.00 ± 1.53 points of mIoU (+2.00, +1.00, +6.00; paired, standard error): within two" in str(study)
    assert "more than two standard errors" in str(Paired.of([0.62, 0.63, 0.64], [0.60, 0.60, 0.60]))


def test_the_arms_of_a_pair_differ_in_their_start_alone() -> None:
    pairs = [(PAIRED[i], PAIRED[i + 1]) for i in range(0, len(PAIRED), 2)]
    assert len(pairs) == SEEDS == 3
    for ours, theirs in pairs:
        own, other = (stage.argv(Path("out"), 5) for stage in (ours, theirs))
        differing = {(a, b) for a, b in zip(own, other, strict=True) if a != b}
        assert differing == {(f"out/{ours.name}", f"out/{theirs.name}"), ("out/pretrain-sparse", "null")}


@pytest.mark.holds("ade20k.5")
@pytest.mark.holds_only
def test_pretraining_is_worth_more_than_two_standard_errors(tmp_path: Path, figure: Any) -> None:
    stages = [PRETRAINING[0], *PAIRED]
    done = run_stages(stages, tmp_path, 0, time.monotonic() + 3600, Console(quiet=True))
    assert len(done) == len(stages)
    arms: dict[str, list[float]] = {}
    for stage in PAIRED:
        arms.setdefault(stage.title, []).append(load_model(tmp_path / stage.name)[1].metrics["miou"])
    study = Paired.of(*arms.values())
    figure(str(study))
    assert study.mean > 2 * study.error


@pytest.mark.holds("ade20k.5")
def test_the_study_stands_in_the_results() -> None:
    text = (ROOT / "docs/results.md").read_text()
    section = text[text.index("## The demo's segmentation") :]
    section = section[: section.index("\n## ")]
    assert "sparsemae demo --task segment" in section
    assert "computed from the images, not drawn by people" in section
    assert "more than two standard errors" in section
