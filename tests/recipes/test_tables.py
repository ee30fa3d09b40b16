"""Each recipe against the paper's tables, row by row, typed here from its appendix."""

import math
import re
from dataclasses import is_dataclass
from typing import Any

import pytest
import timm
import torch
from conftest import Figure
from timm.models.vision_transformer import VisionTransformer

from sparsemae.config import RECIPES, read_config
from sparsemae.jobs import training_jobs
from sparsemae.models.mae import random_masking
from sparsemae.options.data import MaskDataConfig
from sparsemae.options.tasks import SegmentConfig, TrainingConfig
from sparsemae.options.training import OptimConfig
from sparsemae.sparsity import iter_sparse, summarize
from sparsemae.tasks import task_class
from sparsemae.tasks.sparse import meta_model
from sparsemae.tasks.task import encoder_of
from sparsemae.training.optim import in_epochs, learning_rate

IMAGENET = 1_281_167


def flat(config: Any) -> dict[str, Any]:
    """Options with their values, by dotted names."""
    found: dict[str, Any] = {}
    for name, value in vars(config).items():
        found |= {f"{name}.{key}": one for key, one in flat(value).items()} if is_dataclass(value) else {name: value}
    return found


def recipe(name: str) -> Any:
    return read_config(training_jobs()[name.split("_", maxsplit=1)[0]], ["--config", name])


@pytest.mark.parametrize(("size", "pattern", "warmup"), [("t", "2:32", 5), ("s", "4:32", 15)])
@pytest.mark.slow
def test_table_1(size: str, pattern: str, warmup: int) -> None:
    config = recipe(f"pretrain_{size}")
    encoder = timm.create_model(config.model.name, num_classes=0, **config.model.args)
    rows = {
        "Layers": (len(encoder.blocks), 12),
        "Mask ratio": (config.mask_ratio, 0.25),
        "Sparse pattern": (config.sparse.pattern, pattern),
        "Patch size": (encoder.patch_embed.patch_size, (16, 16)),
        "Pre-training epochs": (config.trainer.epochs, 400),
        "Batch size": (config.trainer.global_batch, 4096),
        "Adam eps": (config.optim.eps, 1e-8),
        "Adam beta": (config.optim.betas, (0.9, 0.999)),
        "Peak learning rate": (config.optim.lr, 2.4e-3),
        "Minimal learning rate": (config.optim.min_lr, 1e-5),
        "Warmup epochs": (config.optim.warmup_epochs, warmup),
        "Stochastic depth": (config.model.drop_path, 0.1),
        "Dropout": (sum(m.p for m in encoder.modules() if isinstance(m, torch.nn.Dropout)), 0.0),
        "Weight decay": (config.optim.weight_decay, 0.05),
        "Data augment": (config.data.crop, "resized"),
        "Input resolution": (config.data.img_size, 224),
    }
    assert not {row: pair for row, pair in rows.items() if pair[0] != pair[1]}
    assert config.data.auto_augment is None


@pytest.mark.parametrize(("size", "pattern"), [("t", "2:32"), ("s", "4:32")])
def test_table_2(size: str, pattern: str) -> None:
    config = recipe(f"finetune_{size}")
    rows = {
        "Peak learning rate": (config.optim.lr, 5e-3),
        "Fine-tuning epochs": (config.trainer.epochs, 200),
        "Warmup epochs": (config.optim.warmup_epochs, 5),
        "Layer-wise learning rate decay": (config.optim.layer_decay, 0.65),
        "Batch size": (config.trainer.global_batch, 2048),
        "Adam eps": (config.optim.eps, 1e-8),
        "Adam beta": (config.optim.betas, (0.9, 0.999)),
        "Minimal learning rate": (config.optim.min_lr, 1e-6),
        "Stochastic depth": (config.model.drop_path, 0.1),
        "Weight decay": (config.optim.weight_decay, 0.05),
        "Label smoothing": (config.label_smoothing, 0.1),
        "Gradient clipping": (config.optim.clip_grad, None),
        "Erasing": (config.erasing, 0.25),
        "Input resolution": (config.data.img_size, 224),
        "Rand augment": (config.data.auto_augment, "rand-m9-mstd0.5-inc1"),
        "Mixup": (config.mixup, 0.8),
        "Cutmix": (config.cutmix, 1.0),
        "Sparse pattern": (config.sparse.pattern, pattern),
    }
    assert not {row: pair for row, pair in rows.items() if pair[0] != pair[1]}
    assert config.init == f"runs/pretrain_{size}"
    assert config.sparse.mask == "dynamic"


@pytest.mark.holds("imagenet.1")
@pytest.mark.parametrize(("size", "kept"), [("t", 5_308_416), ("s", 10_616_832)])
@pytest.mark.slow
def test_the_papers_arithmetic(size: str, kept: int, figure: Figure) -> None:
    pretrain, finetune = recipe(f"pretrain_{size}"), recipe(f"finetune_{size}")
    models = []
    for config in (pretrain, finetune):
        task = task_class(config.task)(config)
        task.class_names = [str(number) for number in range(1000)]
        models.append(meta_model(task))
        encoder = encoder_of(models[-1])
        assert isinstance(encoder, VisionTransformer)
        assert len(list(iter_sparse(models[-1]))) == 48
        assert (summarize(encoder).kept, summarize(encoder).sparse_total) == (kept, 84_934_656)
    model, classifier = models
    assert classifier.num_classes == 1000
    kept_patches, *_ = random_masking(torch.zeros(1, 196, 1), pretrain.mask_ratio, torch.rand(1, 196))
    assert kept_patches.shape[1] == 147
    tokens: list[int] = []
    for block in encoder_of(model).blocks:
        block.register_forward_hook(lambda _block, inputs, _output: tokens.append(inputs[0].shape[1]))
    model(torch.zeros(1, 3, 224, 224, device="meta"), pretrain.mask_ratio, torch.rand(1, 196, device="meta"))
    assert tokens == [147 + 1] * 12
    figure(f"SparseMAE-{size.upper()}: {kept:,} of 84,934,656 weights kept in 48 layers, 147 + 1 tokens in 12 blocks")


# The tables' peak and minimal rate, warm-up and training epochs, and steps an epoch: 1,281,167 images by the batch.
SCHEDULES = {
    "pretrain_t": (2.4e-3, 1e-5, 5, 400, 312), "pretrain_s": (2.4e-3, 1e-5, 15, 400, 312),
    "finetune_t": (5e-3, 1e-6, 5, 200, 625), "finetune_s": (5e-3, 1e-6, 5, 200, 625),
}  # fmt: skip


@pytest.mark.holds("imagenet.1")
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_schedule_over_imagenet(name: str, figure: Figure) -> None:
    """Linear warm-up from 0, then half a cosine; a step's rate is that of the epochs done before it."""
    config, (peak, least, warmup, epochs, steps) = recipe(name), SCHEDULES[name]
    assert IMAGENET // config.trainer.global_batch == steps
    rates = [learning_rate(config.optim, step / steps, config.trainer.epochs) for step in range(steps * epochs + 1)]
    assert rates[:3] == pytest.approx([0, peak / (warmup * steps), 2 * peak / (warmup * steps)], rel=1e-12)
    for epoch in range(1, epochs + 1):
        cosine = 1 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup))
        wanted = peak * epoch / warmup if epoch < warmup else least + (peak - least) * cosine / 2
        assert rates[epoch * steps] == pytest.approx(wanted, rel=1e-12), epoch
    assert max(rates) == rates[warmup * steps]
    first = ", ".join(f"{rate:.4g}" for rate in rates[:3])
    figure(f"{name}: steps 1, 2, 3 at {first}; highest {max(rates):g} after epoch {warmup}; last {rates[-1]:g}")


def test_what_the_small_recipes_change() -> None:
    for job in ("pretrain", "finetune"):
        t, s = recipe(f"{job}_t"), recipe(f"{job}_s")
        s.sparse.pattern, s.out = t.sparse.pattern, t.out
        s.optim.warmup_epochs = t.optim.warmup_epochs
        if job == "finetune":
            s.init = t.init
        assert s == t


def optim_in_steps(config: TrainingConfig) -> tuple[OptimConfig, int]:
    """The optimizer's settings and the optimizer steps of an epoch of SceneParse150."""
    steps = 20_210 // config.trainer.global_batch
    return in_epochs(config.optim, steps, config.trainer.schedule_steps(steps)), steps


@pytest.mark.parametrize(("size", "pattern"), [("t", "2:32"), ("s", "4:32")])
def test_table_3(size: str, pattern: str) -> None:
    config = recipe(f"segment_{size}")
    text = (RECIPES / f"segment_{size}.yaml").read_text()
    variants = set(re.findall(r"^#.*decay-([\d.]+) ", text, re.MULTILINE))
    overrides = re.findall(r"decay-([\d.]+) +--optim.layer_decay ([\d.]+) --out", text)
    rows = {
        "Input resolution": (config.data.img_size, 512),
        "Peak learning rate": (config.optim.lr, 1e-4),
        "Fine-tuning steps": (config.trainer.steps, 160_000),
        "Batch size": (config.trainer.global_batch, 16),
        "Adam eps": (config.optim.eps, 1e-8),
        "Adam beta": (config.optim.betas, (0.9, 0.999)),
        "Layer-wise learning rate decay": (variants, {"0.65", "0.75", "0.8"}),
        "of which as it is": (config.optim.layer_decay, 0.75),
        "Minimal learning rate": (config.optim.min_lr, 0.0),
        "Learning rate schedule": (config.optim.schedule, "linear"),
        "Warmup steps": (config.optim.warmup_steps, 1500),
        "Dropout": (config.head.dropout, 0.0),
        "Stochastic depth": (config.model.drop_path, 0.1),
        "Weight decay": (config.optim.weight_decay, 0.05),
        "Sparse pattern": (config.sparse.pattern, pattern),
    }
    assert not {row: pair for row, pair in rows.items() if pair[0] != pair[1]}
    assert overrides == [("0.65", "0.65"), ("0.8", "0.8")]
    # the method's page
    data, inference = config.data, config.inference
    assert (config.out_indices, config.head.width, config.head.auxiliary_weight) == ([3, 5, 7, 11], 512, 0.4)
    assert (data.short_side, data.long_side, data.scale, data.cat_max_ratio) == (512, 2048, (0.5, 2.0), 0.75)
    assert (data.photometric, data.hflip, data.reduce_zero_label) == (True, 0.5, None)
    assert (inference.mode, inference.stride, inference.scales, inference.flip) == ("slide", 341, [1.0], False)
    assert config.init == f"runs/pretrain_{size}"
    assert config.sparse.mask == "dynamic"
    # by default the same, but for the pattern
    config.sparse.pattern, config.out, config.init = SegmentConfig().sparse.pattern, "runs/segment", None
    usual = SegmentConfig(data=MaskDataConfig("sceneparse", workers=8, exif=False))  # the field turns no image
    usual.optim.lr_batch, usual.trainer = 16, config.trainer
    assert config == usual


@pytest.mark.parametrize("name", ["segment_t", "segment_s"])
def test_the_schedule_over_ade20k(name: str) -> None:
    config = recipe(name)
    optim, steps = optim_in_steps(config)
    assert config.trainer.schedule_steps(steps) == 160_000
    rates = {step: learning_rate(optim, step / steps, 160_000 / steps) for step in (0, 750, 1500, 80_750, 159_999)}
    assert rates == pytest.approx(
        {0: 1e-10, 750: 1e-4 * 0.5000005, 1500: 1e-4, 80_750: 5e-5, 159_999: 1e-4 / 158_500}, rel=1e-6
    )


@pytest.mark.parametrize("size", ["t", "s"])
@pytest.mark.parametrize("job", ["pretrain", "finetune"])
def test_plus_is_the_papers_recipe_with_its_changes(job: str, size: str) -> None:
    papers, ours = (flat(recipe(f"{job}_{size}{name}")) for name in ("", "_plus"))
    changed = {name: ours[name] for name in ours if ours[name] != papers[name]}
    where = {"out": f"runs/{job}_{size}_plus"} | ({"init": f"runs/pretrain_{size}_plus"} if job == "finetune" else {})
    assert changed == where | {
        "teacher": f"runs/{job}_{size}_dense",
        "sparse.term": "decoupled",
        "sparse.strength": 0.5,
    }
