"""The plan's figures against the method's arithmetic, the loop, real files and a real process's memory."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import Figure, metrics, tiny

from sparsemae.cli import main
from sparsemae.costs.plan import Plan, plan
from sparsemae.costs.rate import loader_rate
from sparsemae.options import ModelConfig, PretrainConfig
from sparsemae.options.commands import PlanConfig
from sparsemae.options.data import ImageDataConfig
from sparsemae.tasks.pretraining import Pretraining
from sparsemae.tasks.sparse import meta_model
from sparsemae.training.checkpoint import TRAINING, load_checkpoint

PEAK = Path(__file__).parent / "peak.py"
MEDIUM = "model: {args: {embed_dim: 384, depth: 6, num_heads: 6}}\ndecoder: {embed_dim: 256, depth: 2, num_heads: 16}\n"


def planned(folder: Path, kind: str, text: str, **options: Any) -> Plan:
    recipe = folder / f"{kind}_it.yaml"
    recipe.write_text(text + "\ndata: {source: folder}" * ("data:" not in text))
    return plan(PlanConfig(str(recipe), **options))


def giga(found: Plan, forward: int) -> dict[str, tuple[float, float]]:
    """Part: (dense, kept) in 1e9 multiply-adds."""
    parts = found.forwards[forward]
    return {part: (dense / 1e9, kept / 1e9) for part, dense, kept in (*parts.parts, parts.total)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pattern", "kept", "linear", "total"), [("2:32", 6_172_416, 1.05, 1.88), ("4:32", 11_480_832, 2.09, 2.92)]
)
def test_the_methods_arithmetic(tmp_path: Path, pattern: str, kept: int, linear: float, total: float) -> None:
    found = planned(tmp_path, "pretrain", f"sparse: {{pattern: '{pattern}'}}", devices=8)
    assert found.encoder.sparse_total + found.encoder.dense_total == 85_798_656
    assert found.encoder.kept + found.encoder.dense_total == kept
    assert [forward.tokens for forward in found.forwards] == [148, 197, 197]
    afterwards = giga(found, 2)
    assert afterwards["total"] == pytest.approx((17.56, total), abs=0.005)
    assert afterwards["sparse linear"][1] == pytest.approx(linear, abs=0.005)
    assert afterwards["attention"][0] == pytest.approx(0.72, abs=0.005)
    assert afterwards["patch embedding"][0] == pytest.approx(0.12, abs=0.005)
    # by hand: weights x tokens; 2 x tokens^2 x width x blocks
    assert giga(found, 0)["sparse linear"][0] * 1e9 == pytest.approx(84_934_656 * 148)
    assert giga(found, 0)["attention"][0] * 1e9 == pytest.approx(2 * 148**2 * 768 * 12)
    decoder = 8 * 12 * 512**2 * 197 + 768 * 512 * 148 + 512 * 768 * 197
    assert giga(found, 1)["dense linear"][0] * 1e9 == pytest.approx(decoder)


@pytest.mark.slow
def test_a_recipe_beyond_the_paper_is_planned_as_the_uniform_one(tmp_path: Path) -> None:
    """Patterns of one total cost the same; a teacher that is not there is not counted."""
    model = "init: runs/mae\nmodel: {name: vit_tiny_patch16_224, args: {depth: 2}}\ntrainer: {global_batch: 8}\n"
    plain = planned(tmp_path, "finetune", model, classes=10)
    plus = "allocation: magnitude, allocation_epoch: 1, decay_epochs: 2, dense_epochs: 1"
    text = f"{model}teacher: runs/nothing\nsparse: {{{plus}}}\noptim: {{freeze_variance_epoch: 1}}"
    assert str(planned(tmp_path, "finetune", text, classes=10)) == str(plain)


@pytest.mark.slow
def test_a_finetuned_model_has_a_head_and_a_dense_one_keeps_all(tmp_path: Path) -> None:
    found = planned(tmp_path, "finetune", "seed: 0", devices=8)
    assert found.encoder.kept + found.encoder.dense_total == 6_172_416 + 769_000
    assert giga(found, 0)["dense linear"][0] * 1e9 == pytest.approx(768_000)
    dense = planned(tmp_path, "finetune", "sparse: {pattern: dense}\ntrainer: {global_batch: 8}", classes=10)
    assert dense.encoder.kept == dense.encoder.sparse_total == 0
    assert giga(dense, 0)["total"][0] == giga(dense, 0)["total"][1] == pytest.approx(17.56, abs=0.005)


@pytest.mark.slow
def test_steps_hours_and_what_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = MEDIUM + "trainer: {epochs: 400, global_batch: 4096, num_nodes: 2}"
    found = planned(tmp_path, "pretrain", text, devices=8, device_batch=64)
    assert (found.batches.world, found.batches.accumulate) == (16, 4)
    assert found.steps == 400 * (1_281_167 // 4096) == 124_800
    assert found.hours is None
    printed = capsys.readouterr().out
    assert "4,096 = 16 devices x 64 images x 4 accumulation" in printed
    assert "511,180,800 images / (N images per second x 3600): give --images-per-second N" in printed
    main(["plan", str(tmp_path / "pretrain_it.yaml"), "--devices", "8", "--images-per-second", "5000"])
    assert f"hours            {511_180_800 / 5000 / 3600:.1f} at 5,000 images/s" in capsys.readouterr().out


@pytest.mark.slow
def test_the_loop_takes_the_steps_and_writes_the_checkpoint_that_were_planned(tmp_path: Path) -> None:
    main(tiny("pretrain", tmp_path / "run"))
    found = plan(PlanConfig(str(tmp_path / "run" / "config.yaml"), images=10_000))
    assert found.steps == metrics(tmp_path / "run")[-1]["step"] == 6
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000006"
    size = sum(file.stat().st_size for file in checkpoint.iterdir())
    tensors = load_checkpoint(checkpoint)[0][TRAINING]
    parameters = sum(key.endswith("/exp_avg") for key in tensors)
    # above that: names, shapes, alignment, some 1 KB for each parameter, which shows in a model this small
    assert found.checkpoint_bytes < size < found.checkpoint_bytes + 2000 * parameters


@pytest.mark.slow
def test_memory_grows_with_the_batch_accumulation_and_processes(tmp_path: Path) -> None:
    def memory(batch: int, **options: Any) -> dict[str, int]:
        return vars(
            planned(
                tmp_path, "pretrain", MEDIUM + f"trainer: {{global_batch: {batch}, precision: bf16}}", **options
            ).memory
        )

    one, two = memory(8), memory(16)
    assert two["activations"] == pytest.approx(2 * one["activations"], rel=0.02)
    assert all(two[kind] == pytest.approx(one[kind], rel=0.001) for kind in one if kind != "activations")
    assert one["gradients"] == 0
    accumulated = memory(16, device_batch=8)
    assert accumulated["activations"] == pytest.approx(one["activations"], rel=0.02)
    trained = one["optimizer"] / 2
    assert accumulated["gradients"] == pytest.approx(trained, rel=0.001)
    assert memory(16, devices=2)["gradients"] == pytest.approx(trained, rel=0.001)
    sparse = 6 * 12 * 384**2
    assert one["masks"] == pytest.approx(
        sparse * (3 + 2), rel=0.001
    )  # held, reference and last look, and the bf16 copies


def measured(folder: Path, words: list[str]) -> int:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(PEAK), str(folder), *words], check=True, capture_output=True, text=True, env=environment
    )
    return int(done.stdout.split()[-1])


def compare(folder: Path, job: str, text: str, precision: str) -> tuple[float, str]:
    """Planned over measured peak, and the figure to print."""
    text += (
        "\ndata: {source: embedded, workers: 0, train_images: 8}\n"
        f"trainer: {{global_batch: 8, precision: {precision}, accelerator: cpu, max_steps: 4, "
        "evaluate_every_epochs: 9}\n"
    )
    wanted = planned(folder, job, text).memory.total
    got = measured(folder, [job, "--config", str(folder / f"{job}_it.yaml")])
    return wanted / got, f"{job} {precision}: planned {wanted / 2**20:.0f}, measured {got / 2**20:.0f} MiB"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="VmHWM is Linux's")
def test_memory_is_within_15_percent_of_a_real_process(tmp_path: Path, figure: Figure) -> None:
    """384 wide, 6 blocks, 224 px, 8 images. Measured as VmHWM less VmRSS before the run (see peak.py)."""
    ratio, text = compare(tmp_path, "pretrain", MEDIUM, "fp32")
    figure(text)
    assert ratio == pytest.approx(1, abs=0.15), text


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="VmHWM is Linux's")
@pytest.mark.parametrize(("job", "precision"), [("pretrain", "bf16"), ("finetune", "fp32")])
@pytest.mark.holds_only
def test_memory_of_vit_base_is_within_15_percent(tmp_path: Path, job: str, precision: str, figure: Figure) -> None:
    """ViT-B/16 at 224 px, 8 images: 3 GB of memory and a minute. Measured as above."""
    ratio, text = compare(tmp_path, job, "seed: 0", precision)
    figure(text)
    assert ratio == pytest.approx(1, abs=0.15), text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"devices": 3}, "wanted a multiple of the 3 processes, got 4096"),
        ({"device_batch": 3}, "1 x 3 does not divide it"),
        ({"device_batch": 0}, "device_batch: wanted at least 1, got 0"),
        ({"images": 9}, "wanted at most the 9 training images, got 4096"),
        ({"devices": 0}, "devices: wanted at least 1, got 0"),
        ({"images_per_second": 0.0}, "images_per_second: wanted more than 0, got 0"),
        ({"job": "sing"}, "job: wanted pretrain or finetune or segment, got sing"),
    ],
)
def test_mistakes(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        planned(tmp_path, "pretrain", MEDIUM, **options)


@pytest.mark.parametrize(("recipe", "images"), [("demo_finetune", 1000), ("demo_pretrain", 10_000)])
@pytest.mark.slow
def test_a_demos_recipe_is_counted_on_the_embedded_images(recipe: str, images: int) -> None:
    assert plan(PlanConfig(recipe)).batches.images == images


@pytest.mark.slow
def test_which_job_a_recipe_is_for(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("trainer: {global_batch: 8}\nmodel: {args: {embed_dim: 32, depth: 1, num_heads: 2}}")
    with pytest.raises(ValueError, match=r"mine\.yaml: wanted --job pretrain or finetune or segment"):
        plan(PlanConfig(str(recipe)))
    assert not plan(PlanConfig(str(recipe), job="finetune")).around
    recipe.write_text(recipe.read_text() + "\nmask_ratio: 0.5")
    assert plan(PlanConfig(str(recipe))).around
    recipe.write_text("mask_ratio: high")
    with pytest.raises(ValueError, match="mask_ratio"):
        plan(PlanConfig(str(recipe)))
    with pytest.raises(ValueError, match="wanted a YAML file or a recipe"):
        plan(PlanConfig("pretrain_q"))


@pytest.mark.slow
def test_a_plan_says_what_the_loader_must_deliver(image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one process gives is measured where the images are known; here it is given."""
    words = ["--data.root", str(image_folder), "--data.source", "folder", "--data.workers", "2", "--data.img_size",
             "28", "--model.args", "{patch_size: 7, embed_dim: 32, depth: 1, num_heads: 2}", "--trainer.global_batch",
             "8", "--trainer.device_batch", "8"]  # fmt: skip
    monkeypatch.setattr("sparsemae.costs.plan.loader_rate", lambda task, model: 99.0)
    found = plan(PlanConfig("pretrain", images_per_second=200.0, words=words))
    for changes, said in (
        ({}, "99 images/s here, too slow: wanted 3 of them, or --data.jpeg torchvision"),
        ({"loader_rate": 25.0, "faster": ""}, "25 images/s here, too slow: wanted 8 of them"),
        ({"loader_rate": 100.0}, "100 images/s here"),
    ):
        *_, wanted, given = str(replace(found, **changes)).splitlines()
        assert wanted.split(maxsplit=1)[1].startswith("100 images/s from each of 2 processes")
        assert given.split(maxsplit=2)[2] == said
    for job, more, said in (
        ("pretrain", "", ", or --data.resize_on device"),
        ("pretrain", "--data.resize_on device", ""),
        ("pretrain", "--data.auto_augment original", ""),
    ):
        told = str(
            plan(PlanConfig(job, images_per_second=200.0, words=[*words, "--data.jpeg", "torchvision", *more.split()]))
        )
        assert told.splitlines()[-1].endswith(f"too slow: wanted 3 of them{said}")
    assert str(replace(found, loader_rate=None)).splitlines()[-1].startswith("loader")
    assert "loader" not in str(replace(found, images_per_second=None))


def test_a_loaders_rate_is_measured(image_folder: Path) -> None:
    data = ImageDataConfig(source="folder", root=str(image_folder), img_size=28)
    task = Pretraining(PretrainConfig(data=data, model=ModelConfig(args={"patch_size": 7, "depth": 1})))
    task.open_data()
    assert loader_rate(task, meta_model(task), seconds=0.05) > 1


@pytest.mark.slow
def test_what_is_measured_has_the_precision_that_a_training_here_has(
    image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine without bf16; what is only counted may be for another."""
    seen: list[str] = []

    def rate(task: Any, batches: Any, precision: str) -> tuple[float, str]:
        seen.append(precision)
        return 9.0, "it"

    monkeypatch.setattr("sparsemae.costs.plan.resolved_precision", lambda trainer: "fp32")
    monkeypatch.setattr("sparsemae.costs.plan.measured_rate", rate)
    words = ["--data.root", str(image_folder), "--data.img_size", "28", "--model.args", "{patch_size: 7, depth: 1}"]
    assert ", bf16," in plan(PlanConfig("pretrain", words=words)).memory_title
    for devices, said in ((1, "(it, measured)"), (2, "(it, one of 2 processes measured)")):
        found = plan(PlanConfig("pretrain", words=words, measure=True, devices=devices))
        assert ", fp32," in found.memory_title
        assert said in str(found)
    assert seen == ["fp32", "fp32"]


@pytest.mark.slow
def test_the_teacher_of_a_plus_recipe_need_not_be_there(image_folder: Path) -> None:
    for job in ("pretrain", "finetune"):
        words = ["--config", f"{job}_t_plus", "--init", "null", "--data.root", str(image_folder), "--model.args",
                 "{depth: 1}", "--trainer.global_batch", "8", "--trainer.device_batch", "8"]  # fmt: skip
        assert "images" in str(plan(PlanConfig(job, words=words)))
