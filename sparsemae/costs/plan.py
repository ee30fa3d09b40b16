"""What a recipe costs, before it runs: parameters, multiply-adds, steps, memory, hours, checkpoint size.

Everything is counted on the models that the job would build, on the meta device, not by formulas beside them.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightning_fabric import Fabric
from torch import nn

from sparsemae.config import check_paths, read_config
from sparsemae.costs.multiply_adds import Forward
from sparsemae.costs.rate import loader_rate, measured_rate
from sparsemae.costs.step_memory import StepMemory, step_memory
from sparsemae.data.embedded import TRAIN_IMAGES
from sparsemae.data.sampling import BatchPlan
from sparsemae.jobs import JOBS, training_jobs
from sparsemae.models import use_plain_attention
from sparsemae.options import DataConfig, ImageDataConfig, PlanConfig, TrainingConfig
from sparsemae.sparsity import SparsitySummary, summarize
from sparsemae.tasks import task_class
from sparsemae.tasks.derived import settle
from sparsemae.tasks.sparse import meta_model
from sparsemae.tasks.task import encoder_of
from sparsemae.terminal import printable
from sparsemae.training.device import resolved_precision


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
    machine: str = ""
    """Where that was measured, if it was."""
    loaders: int = 1
    """Loader processes on all devices together."""
    loader_rate: float | None = None
    """Images per second that one of them gives on this machine, where the plan knows the images."""
    faster: str = ""
    """What makes a loader process faster."""

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
            how = (
                f"{self.images:,} images / (N images per second x 3600): give --images-per-second N, or --measure true"
            )
        else:
            hours, where = f"{self.hours:,.{1 if self.hours >= 1 else 3}f}", f"images/s{self.machine} on all devices"
            how = f"{hours} at {self.images_per_second:,g} {where}, evaluations not counted"
        lines.append(f"hours            {how}")
        return "\n".join(lines + self._loaders())

    def _loaders(self) -> list[str]:
        """What the loader must deliver for that rate, and whether it will."""
        if self.images_per_second is None:
            return []
        each = self.images_per_second / self.loaders
        line = (
            f"loader           {each:,.0f} images/s from each of {self.loaders} processes (data.workers), a core each"
        )
        if self.loader_rate is None:
            return [line]
        enough, wanted = self.loader_rate >= each, math.ceil(self.images_per_second / self.loader_rate)
        short = f", too slow: wanted {wanted:,} of them{self.faster}"
        return [line, f"  one gives      {self.loader_rate:,.0f} images/s here{'' if enough else short}"]


def plan(config: PlanConfig) -> Plan:
    """Print and return what a recipe costs. Raises ValueError if the recipe cannot run on that many devices."""
    if config.words is None:
        job, recipe = _read_recipe(config.recipe, config.job)
    else:
        job, recipe = config.recipe, _read_words(config.recipe, config.words)
    task, notes = task_class(recipe.task)(recipe), list[str]()
    usual = (TRAIN_IMAGES, task.embedded_classes) if recipe.data.source == "embedded" else task.dataset_size
    if recipe.data.root is not None and config.words is not None:
        task.open_data()
        recipe, notes = settle(recipe, task)
        task.config = recipe
        usual = len(task.sources["train"]), len(task.class_names)
    trainer = recipe.trainer
    images, classes = (given or own for given, own in zip((config.images, config.classes), usual, strict=True))
    if len(task.class_names) != classes:
        task.class_names = [str(number) for number in range(classes)]
    batches = BatchPlan.make(
        min(images, recipe.data.train_images or images),
        trainer.global_batch,
        config.device_batch or trainer.device_batch,
        (config.devices or trainer.devices) * trainer.num_nodes,
    )
    total = trainer.schedule_steps(batches.steps_per_epoch)

    counted, model = meta_model(task), meta_model(task)
    task.prepare(model, Fabric(accelerator="cpu", devices=1), batches)
    encoder, forwards = summarize(encoder_of(counted)), task.forwards(counted)
    around = (task.around, _parameters(counted) - _parameters(encoder_of(counted))) if task.around else None
    # auto: the plan may be made on a machine without the devices it is for; what is measured runs on this one
    elsewhere = trainer.precision == "auto" and trainer.accelerator != "cpu" and not config.measure
    precision = "bf16" if elsewhere else resolved_precision(trainer)
    plain = trainer.accelerator == "cpu" and precision == "bf16"  # as in the loop
    if plain:
        use_plain_attention(model)
    memory = step_memory(task, model, batches, precision)
    if trainer.ema_decay is not None:
        memory = replace(memory, weights=2 * memory.weights)
    result = Plan(
        title=f"{config.recipe}: {job}, {recipe.model.name} at {recipe.data.img_size} px, {recipe.sparse.pattern}",
        encoder=encoder, around=around, forwards=forwards,
        batches=batches, epochs=total / batches.steps_per_epoch,
        steps=min(total, trainer.max_steps or total), memory=memory,
        memory_title=f"{batches.micro_batch} images, {precision}, {'plain' if plain else 'fused'} attention, "
        "without torch.compile and the device's own context",
        # and the topology's reference and last look, in bits
        checkpoint_bytes=memory.weights + memory.optimizer + 2 * encoder.sparse_total // 8,
        images_per_second=config.images_per_second, loaders=max(1, recipe.data.workers) * batches.world,
    )  # fmt: skip
    if config.measure:
        rate, machine = measured_rate(task, batches, precision)
        said = "measured" if batches.world == 1 else f"one of {batches.world} processes measured"
        result = replace(result, images_per_second=rate, machine=f" ({machine}, {said})")
    if result.images_per_second is not None and task.sources:
        result = replace(result, loader_rate=loader_rate(task, model), faster=_faster(recipe.data))
    print(*map(printable, [*notes, *str(result).splitlines()]), sep="\n")
    return result


def _faster(data: DataConfig) -> str:
    """The option that takes work from the loader processes, if one is left."""
    if not isinstance(data, ImageDataConfig):
        return ""
    if data.jpeg == "pillow":
        return ", or --data.jpeg torchvision"
    on_device = data.resize_on == "loader" and data.crop == "resized" and data.auto_augment is None
    return ", or --data.resize_on device" if on_device else ""


def _read_words(job: str, words: list[str]) -> TrainingConfig:
    recipe: Any = read_config(JOBS[job].options, words, "sparsemae plan", JOBS[job].recipe)
    if hasattr(recipe, "teacher"):
        recipe.teacher = None  # not counted, and perhaps not trained yet
    check_paths(recipe)
    return recipe  # type: ignore[no-any-return]


def _read_recipe(recipe: str, job: str | None) -> tuple[str, TrainingConfig]:
    kinds = training_jobs()
    if job is not None and job not in kinds:
        raise ValueError(f"job: wanted {' or '.join(kinds)}, got {job}")
    named = [name for name in kinds if name in Path(recipe).stem]
    found: dict[str, TrainingConfig] = {}
    errors = []
    for name in [job] if job else named or kinds:
        try:
            found[name] = read_config(kinds[name], ["--config", recipe])
        except ValueError as error:
            errors.append(error)
    if not found:
        raise errors[0]
    if len(found) > 1:
        raise ValueError(f"{recipe}: wanted --job {' or '.join(kinds)}, since its options are those of several")
    return next(iter(found.items()))


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _size(size: int) -> str:
    return f"{size / 2**30:9.3f} GiB" if size >= 2**30 else f"{size / 2**20:9.1f} MiB"
