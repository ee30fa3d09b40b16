"""Settings that follow from the data: the rule, what a user names beside it, and one short start."""

import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from sparsemae import processors
from sparsemae.config import read_config
from sparsemae.limits import value_of, with_values
from sparsemae.options import FinetuneConfig, PretrainConfig, SegmentConfig
from sparsemae.options.derived import RATE_BATCH, RULES, Facts, derive


@cache
def opened(task: str) -> Any:
    """The options of a job on a folder, all else left open."""
    return read_config(KINDS[task], ["images"])


KINDS: dict[str, Any] = {"pretrain": PretrainConfig, "classify": FinetuneConfig, "segment": SegmentConfig}


@pytest.mark.parametrize("task", KINDS)
@pytest.mark.parametrize("images", [2, 9, 36, 360, 3_600, 40_000, 1_281_167])
@pytest.mark.parametrize("start", ["random", "dense"])
@pytest.mark.parametrize("gpu", [False, True])
def test_the_rule(task: str, images: int, start: Any, gpu: bool) -> None:
    config, said = derive(opened(task), Facts(images, 300, start, gpu, 4))
    batch, steps = config.trainer.global_batch, config.trainer.schedule_steps(images // config.trainer.global_batch)
    assert batch % 2 == 0
    assert batch <= max(2, images / 8)
    rule = RULES[task]
    rate = rule.rate if start == "random" else rule.rate_started
    assert config.optim.lr == pytest.approx(rate * batch / RATE_BATCH, rel=1e-2)
    assert config.optim.warmup_epochs == 0
    assert 0 <= config.optim.warmup_steps <= steps / 10
    assert rule.least_epochs <= config.trainer.epochs <= 100
    assert config.data.workers == 3
    assert config.data.img_size % 16 == 0
    if task == "classify":
        light = [config.data.auto_augment, config.mixup, config.cutmix, config.erasing]
        assert (light == [None, 0, 0, 0]) == (images < 5_000)
    if task == "segment":
        assert config.inference == config.inference.of_window(config.data.img_size)
        assert config.data.short_side >= config.data.img_size
    assert config.trainer.keep == ("last" if task == "pretrain" else "best")
    assert config.sparse.schedule == ("gradual" if start == "dense" else "constant")
    for shown in (f"{images:,} images", f"batch {batch} ", f"lr {config.optim.lr:.3g} (linear rule: {rate:g} "):
        assert shown in said
    assert "\n" not in said


def test_a_start_without_its_pruned_weights_has_nothing_to_tighten() -> None:
    words = ["images", "--sparse.init_weights", "sparse"]
    config, said = derive(read_config(FinetuneConfig, words), Facts(400, 300, "dense"))
    assert config.sparse.schedule == "constant"
    assert "tightened" not in said


@pytest.mark.parametrize(
    ("words", "epochs", "steps"),
    [
        (["--config", "segment_t"], 400, 160_000),
        (["--config", "segment_t", "--epochs", "20"], 20, None),
        (["--config", "segment_t", "--trainer", "{epochs: 20}"], 20, None),
        (["--epochs", "20", "--config", "segment_t"], 20, None),
        (["--config", "segment_t", "--epochs", "20", "--trainer.steps", "7"], 20, 7),
        (["--config", "segment_t", "--config", "epochs.yaml"], 30, None),
        (["--config", "epochs.yaml", "--config", "segment_t"], 30, 160_000),
        (["--config", "both.yaml"], 30, 8),
        (["--config", "both.yaml", "--epochs", "3"], 3, None),
    ],
)
def test_a_length_in_epochs_is_not_overridden_by_a_recipes_in_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], epochs: float, steps: int | None
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("epochs.yaml").write_text("trainer: {epochs: 30}\n")
    Path("both.yaml").write_text("trainer: {epochs: 30, steps: 8}\n")
    trainer = read_config(SegmentConfig, ["images", *words]).trainer
    assert (trainer.epochs, trainer.steps) == (epochs, steps)


def test_a_warm_up_in_epochs_is_not_overridden_by_a_recipes_in_steps() -> None:
    words = ["images", "--config", "segment_t", "--optim.warmup_epochs", "2"]
    optim = read_config(SegmentConfig, words).optim
    assert (optim.warmup_epochs, optim.warmup_steps) == (2, None)


@pytest.mark.parametrize(("side", "stride"), [(512, 341), (128, 85), (1, 1)])
def test_windows_overlap_by_a_third_of_any_size(side: int, stride: int) -> None:
    words = ["images", "--img-size", str(side)]
    assert read_config(SegmentConfig, words).inference.stride == stride


def test_what_is_named_is_kept_and_the_rest_follows_from_it() -> None:
    words = ["images", "--batch", "8", "--epochs=7", "--model", "vit_small_patch16_224", "--data.workers", "0"]
    config, said = derive(read_config(FinetuneConfig, words), Facts(400, 300))
    assert (config.trainer.global_batch, config.trainer.epochs, config.data.workers) == (8, 7, 0)
    assert config.model.name == "vit_small_patch16_224"
    assert config.optim.lr == pytest.approx(RULES["classify"].rate * 8 / RATE_BATCH, rel=1e-2)
    assert config.optim.warmup_steps == 7 * 50 // 10
    assert not re.search(r"\bbatch 8|7 epochs|workers|vit_", said)
    named = read_config(FinetuneConfig, ["images", "--optim", "{lr: 0.5, warmup_epochs: 2}", "--trainer.steps", "9"])
    config, _ = derive(named, Facts(400, 300))
    assert (config.optim.lr, config.optim.warmup_epochs, config.optim.warmup_steps) == (0.5, 2, None)
    assert config.trainer.steps == 9


def test_a_recipe_is_the_recipe() -> None:
    config = read_config(FinetuneConfig, ["images", "--config", "finetune_t"])
    assert config.data.root == "images"
    assert config.from_data == []
    assert derive(config, Facts(400, 300)) == (config, "")


def test_small_images_are_not_enlarged_beyond_four_patches() -> None:
    sides = {side: derive(opened("classify"), Facts(400, side))[0].data.img_size
             for side in (20, 64, 100, 128, 500)}  # fmt: skip
    assert sides == {20: 64, 64: 64, 100: 96, 128: 128, 500: 128}


def test_processors_are_those_of_the_quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(64)), raising=False)
    monkeypatch.setattr(processors, "CGROUPS", tmp_path)
    monkeypatch.setattr(processors, "OWN_CGROUP", tmp_path / "self")
    assert processors.processors() == 64
    for quota, wanted in (("max 100000", 64), ("150000 100000", 2), ("50000 100000", 1), ("nonsense", 64)):
        (tmp_path / "cpu.max").write_text(quota)
        assert processors.processors() == wanted
    (tmp_path / "cpu.max").unlink()
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text("300000\n")
    (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000\n")
    assert processors.processors() == 3


def test_values_by_dotted_names() -> None:
    config = with_values(FinetuneConfig(), {"data.mean": [1.0, 2.0, 3.0], "optim.lr": 1.0, "seed": 3})
    assert (config.data.mean, config.optim.lr, config.seed) == ((1.0, 2.0, 3.0), 1.0, 3)
    assert value_of(config, "data.mean") == (1.0, 2.0, 3.0)
    assert replace(config, seed=0, data=FinetuneConfig().data, optim=FinetuneConfig().optim) == FinetuneConfig()
    with pytest.raises(ValueError, match=r"optim.lr: wanted at least 0, got -1"):
        with_values(FinetuneConfig(), {"optim.lr": -1})
