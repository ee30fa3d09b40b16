"""What had another name in an earlier version is read from files for good."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import metrics, tiny, tiny_segment

from sparsemae.card import InputSpec, ModelCard
from sparsemae.cli import main
from sparsemae.config import read_config
from sparsemae.options.commands import EvaluateConfig
from sparsemae.options.tasks import FinetuneConfig, SegmentConfig
from sparsemae.renamed import OPTIONS, new_option, renamed


def test_a_tree_is_copied_under_the_names_of_now() -> None:
    table = {"a": "b", "c.d": "c.e", "c.f": None, "g.h": "i", "j": "k.l", "m": "k.n"}
    tree = {"a": {"x": 1}, "c": {"d": 2, "f": 3, "x": 4}, "g": {"h": 5, "x": 6}, "j": 7, "m": 8, "x": {"a": 9}}
    before = yaml.safe_dump(tree)
    assert renamed(tree, table) == {
        "b": {"x": 1}, "c": {"e": 2, "x": 4}, "i": 5, "g": {"x": 6}, "k": {"l": 7, "n": 8}, "x": {"a": 9}
    }  # fmt: skip
    assert yaml.safe_dump(tree) == before


@pytest.mark.parametrize(
    ("word", "wanted"),
    [
        ("taps", "out_indices"), ("masks", "data"), ("masks.root", "data.root"), ("data.eval_crop", "data.crop_pct"),
        ("data.root", None), ("tapsy", None), ("mask", None), ("out_indices", None),
    ],
)  # fmt: skip
def test_options_that_had_another_name(word: str, wanted: str | None) -> None:
    assert new_option(word) == wanted


def test_no_option_of_now_has_a_name_of_before() -> None:
    assert not set(OPTIONS) & set(OPTIONS.values())
    for kind in (FinetuneConfig, SegmentConfig, EvaluateConfig):
        options = kind("model") if kind is EvaluateConfig else kind()  # type: ignore[call-arg]
        for old in OPTIONS:
            found: Any = options
            for part in old.split("."):
                found = getattr(found, part, None)
            assert found is None, old


def test_a_recipe_of_before_is_read(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("taps: [1, 2, 4, 11]\ndata: {crop_max_share: 0.5, img_size: 64}\ninference: {stride: 9}")
    config = read_config(SegmentConfig, ["--config", str(recipe), "--data.img_size", "32"])
    assert (config.out_indices, config.data.cat_max_ratio, config.data.img_size) == ([1, 2, 4, 11], 0.5, 32)
    recipe.write_text("data: {eval_crop: 0.9}")
    assert read_config(FinetuneConfig, ["--config", str(recipe)]).data.crop_pct == 0.9
    recipe.write_text("masks: {source: sceneparse, root: ade}")
    data = read_config(EvaluateConfig, ["--config", str(recipe), "runs/segment"]).data
    assert (data.source, data.root) == ("sceneparse", "ade")


@pytest.mark.slow
@pytest.mark.parametrize("job", ["finetune", "segment"])
@pytest.mark.holds_only
def test_a_run_of_before_is_continued(job: str, tmp_path: Path) -> None:
    words = (tiny_segment if job == "segment" else lambda out: tiny(job, out))(tmp_path / "run")
    main([*words, "--trainer.max_steps", "1"])
    file = tmp_path / "run" / "config.yaml"
    config = yaml.safe_load(file.read_text())
    data = config["data"]
    if job == "segment":
        config["taps"], data["crop_max_share"] = config.pop("out_indices"), data.pop("cat_max_ratio")
    else:
        data["eval_crop"] = data.pop("crop_pct")
    file.write_text(yaml.safe_dump(config))
    main([*words, "--trainer.max_steps", "2"])
    assert [row["step"] for row in metrics(tmp_path / "run") if "loss" in row] == [1, 2]
    assert not {"taps", "eval_crop", "crop_max_share"} & {*(now := yaml.safe_load(file.read_text())), *now["data"]}


def test_a_card_of_before_is_read() -> None:
    document = {
        "version": 1, "task": "segment",
        "model": {"name": "vit_base_patch16_224", "args": {"depth": 4}, "drop_path": 0.1},
        "input": {"img_size": 28, "mean": [0.5] * 3, "std": [0.25] * 3, "short_side": 28, "long_side": 56},
        "class_names": ["ground", "crack"], "sparse": {"blocks.0.mlp.fc1": "2:32"}, "frozen": True,
        "metrics": {"miou": 0.5}, "ema_decay": None, "step": None, "taps": [0, 1, 2, 3], "head": {"width": 32},
        "inference": {"mode": "whole"}, "palette": [[0, 0, 0], [9, 9, 9]], "reduce_zero_label": False,
    }  # fmt: skip
    card = ModelCard.from_dict(document)
    spec = InputSpec(28, (0.5,) * 3, (0.25,) * 3, short_side=28, long_side=56)
    settings = {
        "out_indices": [0, 1, 2, 3], "head": {"width": 32}, "inference": {"mode": "whole"},
        "palette": [[0, 0, 0], [9, 9, 9]], "reduce_zero_label": False,
    }  # fmt: skip
    assert card == ModelCard(
        "segment", "vit_base_patch16_224", {"depth": 4}, spec, ("ground", "crack"), {"blocks.0.mlp.fc1": "2:32"},
        settings, frozen=True, metrics={"miou": 0.5},
    )  # fmt: skip
    assert ModelCard.from_dict(card.to_dict()) == card
