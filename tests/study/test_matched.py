"""The small dense networks of the studies have what SparseMAE keeps."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT

from sparsemae.config import read_config
from sparsemae.demo.stages import SMALL as RIVAL
from sparsemae.jobs import JOBS
from sparsemae.options import (
    StudyConfig,
)
from sparsemae.sparsity import summarize
from sparsemae.study.plan import final
from sparsemae.tasks import task_class
from sparsemae.tasks.sparse import meta_model

IMAGES = Path("images")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "classes"),
    [
        ("study_quick", 10),
        ("study_fashion", 10),
        ("study_openclipart", 13),
        ("study_imagenet", 1000),
        (str(ROOT / "docs/study/labels.yaml"), 10),
        (str(ROOT / "docs/study/segment.yaml"), 11),
    ],
)
def test_small_networks_are_matched_within_a_hundredth(recipe: str, classes: int) -> None:
    study = read_config(StudyConfig, ["--config", recipe])
    chosen = dict.fromkeys(((setting, arm) for setting in study.settings for arm in study.arms), 1e-3)
    sizes = {}
    for trial in final(replace(study, seeds=1), IMAGES, chosen):
        options: Any = JOBS[study.job].options
        task: Any = task_class(options.task)(read_config(options, trial.finetuning.argv(IMAGES, 0)))
        task.class_names = [str(number) for number in range(classes)]
        model = meta_model(task)
        summary = summarize(model)
        multiply_adds = sum(forward.total.kept for forward in task.forwards(model))
        sizes[trial.arm] = (summary.kept + summary.dense_total, multiply_adds)
    ours = sizes["SparseMAE"]
    assert sizes["small dense with MAE, equal kept parameters"][0] == pytest.approx(ours[0], rel=0.01)
    assert sizes["small dense with MAE, equal multiply-adds"][1] == pytest.approx(ours[1], rel=0.01)
    assert sizes["dense MAE -> SR-STE"] == ours == sizes["sparse from scratch"]
    kept = study.arms["small dense with MAE, equal kept parameters"].finetune["model.args"]
    if recipe == "study_quick":
        assert yaml.safe_load(RIVAL[-1]) == kept, "the demo's rival is the same"
