"""The options of N:M sparse training, applied to a model."""

import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from sparsemae.data.sampling import BatchPlan
from sparsemae.options import SparseConfig, TrainerConfig
from sparsemae.sparsity import MaskSchedule, freeze, sparsify, zero_pruned
from sparsemae.tasks.task import Task
from sparsemae.training.device import resolved_precision


def make_sparse(model: nn.Module, sparse: SparseConfig) -> list[str]:
    """`sparsify` as configured; does nothing for the pattern "dense". Returns the names of the sparse layers."""
    if sparse.pattern == "dense":
        return []
    if sparse.term == "gradient" and sparse.strength > 1e-3:
        warnings.warn(
            f"sparse.strength {sparse.strength:g} in the gradient: more than 1e-3 may cost accuracy", stacklevel=2
        )
    prefix = "encoder." if hasattr(model, "encoder") else ""
    names = sparsify(model, sparse.pattern, exclude=[prefix + glob for glob in sparse.exclude])
    if sparse.init_weights == "sparse":
        zero_pruned(model)
    if sparse.mask == "fixed":
        freeze(model)
    return names


def meta_model(task: Task[Any]) -> nn.Module:
    """The model that a task would train, on the meta device, to be counted."""
    with torch.device("meta"):
        model = task.build(task.card(), task.config.model.drop_path)
    # a fixed mask costs no less than a moving one, and meta tensors have none to fix
    make_sparse(model, replace(task.config.sparse, mask="dynamic", init_weights="full"))
    return model


def mask_schedule(model: nn.Module, sparse: SparseConfig, trainer: TrainerConfig, plan: BatchPlan) -> MaskSchedule:
    """The schedule of the masks over a training, whose length may be given in optimizer steps."""
    epochs = trainer.schedule_steps(plan.steps_per_epoch) / plan.steps_per_epoch
    for name in ("gradual_epochs", "dense_epochs", "decay_epochs", "allocation_epoch", "freeze_epoch"):
        value = getattr(sparse, name)
        if value is not None and value + (name == "decay_epochs") * sparse.dense_epochs > epochs:
            after = f" after {sparse.dense_epochs:g} dense ones" if name == "decay_epochs" else ""
            raise ValueError(f"sparse.{name}: wanted at most the training's {epochs:g} epochs, got {value:g}{after}")
    gradual = sparse.gradual_epochs if sparse.gradual_epochs is not None else epochs / 2
    if sparse.schedule == "gradual" and 0 < gradual <= sparse.dense_epochs:
        raise ValueError(
            f"sparse.dense_epochs: wanted fewer than the {gradual:g} epochs in which a gradual schedule, which counts "
            f"from the start, reaches the pattern, got {sparse.dense_epochs:g}"
        )
    return MaskSchedule(
        model, sparse.dense_epochs, gradual if sparse.schedule == "gradual" else 0.0, sparse.freeze_epoch,
        sparse.decay_epochs, None if sparse.allocation == "uniform" else sparse.allocation_epoch,
        resolved_precision(trainer) == "bf16",
    )  # fmt: skip
