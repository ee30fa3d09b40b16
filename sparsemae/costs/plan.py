"""What a recipe costs, before it runs: parameters, multiply-adds, steps, memory, hours, checkpoint size.

Everything is counted on the models that the job would build, on the meta device, not by formulas beside them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsemae.config import read_config
from sparsemae.data.embedded import TRAIN_IMAGES
from sparsemae.data.masks import IGNORED
from sparsemae.data.sampling import BatchPlan
from sparsemae.data.transforms import normalize
from sparsemae.models import MaskedAutoencoder
from sparsemae.models.segmenter import Segmenter, segmentation_loss
from sparsemae.sparsity import SparsitySummary, summarize
from sparsemae.tasks.build import build_autoencoder, build_classifier, build_segmenter, make_sparse
from sparsemae.tasks.finetune import FinetuneConfig
from sparsemae.tasks.pretrain import ConcurrentLoss, PretrainConfig
from sparsemae.tasks.segment import SegmentConfig, count_segmenter, refuse_single_images
from sparsemae.costs.multiply_adds import Forward, count_forward
from sparsemae.training.config import resolved_precision
from sparsemae.training.fit import use_plain_attention
from sparsemae.costs.step_memory import StepMemory, step_memory

Recipe = PretrainConfig | FinetuneConfig | SegmentConfig
KINDS: dict[str, type[Recipe]] = {"pretrain": PretrainConfig, "finetune": FinetuneConfig, "segment": SegmentConfig}
DATA_SETS = {"pretrain": (1_281_167, 1000), "finetune": (1_281_167, 1000), "segment": (20_210, 150)}
"""Training images and classes of ImageNet-1K and SceneParse150."""
EMBEDDED = {"pretrain": (TRAIN_IMAGES, 10), "finetune": (TRAIN_IMAGES, 10), "segment": (TRAIN_IMAGES, 11)}
"""The same of the embedded images."""


@dataclass
class PlanConfig:
    """What a recipe of pretraining, finetuning or segmentation costs, before it runs."""

    recipe: str
    """A recipe's name, a YAML file, or the config.yaml of a run."""
    job: str | None = None
    """pretrain, finetune or segment; None: the one whose options the recipe has, or that its name says."""
    devices: int | None = None
    """Devices per machine; None: the recipe's."""
    device_batch: int | None = None
    """Images per device and forward; None: the recipe's."""
    images: int | None = None
    """Training images, of which a recipe's data.train_images may use fewer; None: ImageNet-1K's, SceneParse150's, or
    the embedded ones if they are the recipe's data.source."""
    classes: int | None = None
    """Classes of a finetuned model, which a recipe does not say; None: those of the same."""
    images_per_second: float | None = None
    """Rate of training, over all devices together; without it no hours are given."""


@dataclass(frozen=True)
class Plan:
    """What `plan` found; ``str()`` gives the page."""

    title: str
    encoder: SparsitySummary
    around: tuple[str, int] | None
    """The decoder or the heads around the encoder, and their parameters."""
    forwards: list[Forward]
    batches: BatchPlan
    epochs: float
    steps: int
    memory: StepMemory
    memory_title: str
    checkpoint_bytes: int
    images_per_second: float | None

    @property
    def images(self) -> int:
        """Images seen in all steps."""
        return self.steps * self.batches.global_batch

    @property
    def hours(self) -> float | None:
        """Training alone, at the rate given; None without one."""
        return self.images / self.images_per_second / 3600 if self.images_per_second else None

    def __str__(self) -> str:
        encoder, batches, memory = self.encoder, self.batches, self.memory
        total, kept = encoder.sparse_total + encoder.dense_total, encoder.kept + encoder.dense_total
        what, around = ("encoder", " + {1:,} {0}".format(*self.around)) if self.around else ("model", "")
        lines = [
            self.title,
            f"parameters       {total:,} {what}{around}",
            f"kept             {kept:,} of the {what}: {encoder.kept:,} of {encoder.sparse_total:,} sparse weights, "
            f"all {encoder.dense_total:,} others",
        ]
        for forward in self.forwards:
            lines.append(f"multiply-adds    {forward.title}, {forward.tokens} tokens, per image: dense, kept")
            lines += [
                f"  {part.part:<16} {part.dense / 1e9:8.3f} G {part.kept / 1e9:8.3f} G"
                for part in (*forward.parts, forward.total)
            ]
        lines += [
            f"batch            {batches.global_batch:,} = {batches.world} devices x {batches.micro_batch} images x "
            f"{batches.accumulate} accumulation",
            f"optimizer steps  {self.steps:,}: {self.epochs:g} epochs of {batches.steps_per_epoch:,} steps "
            f"({batches.images:,} images)",
            f"memory           per device, {self.memory_title}",
            *(f"  {name:<16} {_size(size)}" for name, size in (*vars(memory).items(), ("peak", memory.total))),
            "  (one moment, a step's highest: no gradients if that lies before the backward)",
            f"checkpoint       {_size(self.checkpoint_bytes).strip()}",
        ]
        if self.hours is None:
            how = f"{self.images:,} images / (N images per second x 3600): give --images-per-second N"
        else:
            how = f"{self.hours:,.1f} at {self.images_per_second:,g} images/s on all devices, evaluations not counted"
        lines.append(f"hours            {how}")
        return "\n".join(lines)


def plan(config: PlanConfig) -> Plan:
    """Print and return what a recipe costs. Raises ValueError if the recipe cannot run on that many devices."""
    if config.images_per_second is not None and config.images_per_second <= 0:
        raise ValueError(f"images_per_second: wanted a rate above 0, got {config.images_per_second:g}")
    for name in ("devices", "images", "classes", "device_batch"):
        if (value := getattr(config, name)) is not None and value < 1:
            raise ValueError(f"{name}: wanted at least 1, got {value}")
    job, recipe = _read_recipe(config.recipe, config.job)
    trainer = recipe.trainer
    usual = EMBEDDED[job] if recipe.data.source == "embedded" else DATA_SETS[job]
    images, classes = (given or own for given, own in zip((config.images, config.classes), usual, strict=True))
    world = (config.devices or trainer.devices) * trainer.num_nodes
    batches = BatchPlan.make(
        min(images, recipe.data.train_images or images),
        trainer.global_batch,
        config.device_batch or trainer.device_batch,
        world,
    )
    total = trainer.schedule_steps(batches.steps_per_epoch)
    steps = min(total, trainer.max_steps or total)

    if job == "segment":
        refuse_single_images(batches.micro_batch)
    encoder, around, forwards = _count(
        _build(recipe, classes), recipe.mask_ratio if isinstance(recipe, PretrainConfig) else None
    )
    model = _build(recipe, classes)
    # auto: the plan may be made on a machine without the devices it is for
    precision = "bf16" if trainer.precision == "auto" and trainer.accelerator != "cpu" else resolved_precision(trainer)
    plain = trainer.accelerator == "cpu" and precision == "bf16"  # as in the loop
    if plain:
        use_plain_attention(model)
    memory = step_memory(
        model, _loss_of(recipe, batches.micro_batch, classes), recipe.optim, precision=precision,
        accumulate=batches.accumulate, world=world, srste_strength=recipe.sparse.strength,
    )  # fmt: skip
    if trainer.ema_decay is not None:
        memory = replace(memory, weights=2 * memory.weights)
    topology_bytes = 2 * encoder.sparse_total // 8  # reference and last look, in bits
    result = Plan(
        title=f"{config.recipe}: {job}, {recipe.model.name} at {recipe.data.img_size} px, {recipe.sparse.pattern}",
        encoder=encoder, around=around, forwards=forwards,
        batches=batches, epochs=total / batches.steps_per_epoch, steps=steps, memory=memory,
        memory_title=f"{batches.micro_batch} images, {precision}, {'plain' if plain else 'fused'} attention, "
        "without torch.compile and the device's own context",
        checkpoint_bytes=memory.weights + memory.optimizer + topology_bytes,
        images_per_second=config.images_per_second,
    )  # fmt: skip
    print(result)
    return result


def _read_recipe(recipe: str, job: str | None) -> tuple[str, Recipe]:
    if job is not None and job not in KINDS:
        raise ValueError(f"job: wanted {' or '.join(KINDS)}, got {job}")
    named = [name for name in KINDS if name in Path(recipe).stem]
    found: dict[str, Recipe] = {}
    errors = []
    for name in [job] if job else named or KINDS:
        try:
            found[name] = read_config(KINDS[name], ["--config", recipe])
        except ValueError as error:
            errors.append(error)
    if not found:
        raise errors[0]
    if len(found) > 1:
        raise ValueError(f"{recipe}: wanted --job {' or '.join(KINDS)}, since its options are both jobs'")
    return next(iter(found.items()))


def _build(recipe: Recipe, classes: int) -> nn.Module:
    """The model that the job would train, on the meta device."""
    with torch.device("meta"):
        model: nn.Module
        if isinstance(recipe, PretrainConfig):
            model = build_autoencoder(recipe.model, recipe.decoder, recipe.data.img_size, recipe.seed)
        elif isinstance(recipe, SegmentConfig):
            size = recipe.data.img_size
            model = build_segmenter(recipe.model, recipe.head, recipe.taps, size, classes, recipe.seed)
        else:
            model = build_classifier(recipe.model, recipe.data.img_size, classes, recipe.seed)
    # a fixed mask takes no less memory than a moving one, and meta tensors have none to fix
    make_sparse(model, replace(recipe.sparse, mask="dynamic", init_weights="full"))
    return model


def _loss_of(recipe: Recipe, batch: int, classes: int) -> Any:
    """A function of the model: the loss of one micro-batch of bytes, as the job computes it."""
    data = recipe.data

    def images() -> Tensor:
        return normalize(torch.empty(batch, 3, data.img_size, data.img_size, dtype=torch.uint8), data.mean, data.std)

    def pretraining(model: Any) -> Tensor:
        noise = torch.rand(batch, model.encoder.patch_embed.num_patches)
        loss: Tensor = ConcurrentLoss(model, recipe.dense_loss_weight)(images(), recipe.mask_ratio, noise)  # type: ignore[union-attr]
        return loss

    def finetuning(model: Any) -> Tensor:
        return nn.functional.cross_entropy(model(images()).float(), torch.zeros(batch, dtype=torch.long))

    def segmentation(model: Any) -> Tensor:
        target = torch.zeros(batch, data.img_size, data.img_size, dtype=torch.uint8)
        return segmentation_loss(model(images()), target, recipe.head.auxiliary_weight, IGNORED)  # type: ignore[union-attr]

    return {PretrainConfig: pretraining, FinetuneConfig: finetuning, SegmentConfig: segmentation}[type(recipe)]


def _count(model: Any, mask_ratio: float | None) -> tuple[SparsitySummary, tuple[str, int] | None, list[Forward]]:
    """Encoder's (or classifier's) summary, what is around it, and the forwards of one image."""
    if isinstance(model, Segmenter):
        return (
            summarize(model.encoder),
            ("heads", _parameters(model) - _parameters(model.encoder)),
            count_segmenter(model),
        )
    use_plain_attention(model)  # matrix products, each of which the counter knows
    model.eval()
    encoder = model.encoder if isinstance(model, MaskedAutoencoder) else model
    patches, (height, width) = encoder.patch_embed.num_patches, encoder.patch_embed.img_size
    image = torch.empty(1, encoder.in_chans, height, width, device="meta")
    tokens = patches + encoder.num_prefix_tokens
    if mask_ratio is None:
        return summarize(model), None, [count_forward("the model", tokens, model, lambda: model(image))]
    noise = torch.empty(1, patches, device="meta")
    latent, _, ids_restore = model.forward_encoder(image, mask_ratio, noise)
    count = partial(count_forward, model=model)
    forwards = [
        count("the encoder", latent.shape[1], forward=lambda: model.forward_encoder(image, mask_ratio, noise)),
        count("the decoder", tokens, forward=lambda: model.forward_decoder(latent, ids_restore)),
        count("the encoder afterwards", tokens, forward=lambda: encoder.forward_features(image)),
    ]
    return summarize(encoder), ("decoder", _parameters(model) - _parameters(encoder)), forwards


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _size(size: int) -> str:
    return f"{size / 2**30:9.3f} GiB" if size >= 2**30 else f"{size / 2**20:9.1f} MiB"
