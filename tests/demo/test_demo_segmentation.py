"""The study of the demo's segmentation: pretrained against from scratch, paired by seed."""

import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from rich.console import Console

from sparsemae.demo.segmentation import OURS, PAIRED, SCRATCH, SEEDS, paired
from sparsemae.demo.stages import PRETRAINING
from sparsemae.study.stages import run_stages
from sparsemae.study.statistics import Paired
from sparsemae.tasks.loading import load_model


def test_the_paired_difference_in_a_sentence() -> None:
    scores = {OURS: [0.62, 0.61, 0.66], SCRATCH: [0.60, 0.60, 0.60]}
    said = paired({arm: [{"seed": i, "miou": score} for i, score in enumerate(of)] for arm, of in scores.items()})
    assert "3 equal seeds: +3.00 ± 1.53 points of mIoU (+2.00, +1.00, +6.00; paired" in said
    assert said.endswith("95 % interval -3.57 to +9.57.")


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
    study = Paired.of(*(dict(enumerate(scores)) for scores in arms.values()))
    figure(f"{study.mean:+.2f} ± {study.error:.2f}")
    assert study.mean > 2 * study.error


@pytest.mark.holds("ade20k.5")
def test_the_study_stands_in_the_results() -> None:
    text = (ROOT / "docs/results.md").read_text()
    section = text[text.index("## The demo's segmentation") :]
    section = section[: section.index("\n## ")]
    assert "sparsemae demo --task segment" in section
    assert "computed from the images, not drawn by people" in section
    assert "more than two standard errors" in section
