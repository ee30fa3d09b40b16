"""Learning rates: the schedule, layer-wise decay, and who takes weight decay."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn

from sparsemae.limits import ABOVE_0, AT_LEAST_0, BELOW_1, SHARE, UP_TO_1, check_limits


@dataclass
class OptimConfig:
    """AdamW and its schedule. The defaults are Table 1's."""

    lr: float = 2.4e-3
    """Peak learning rate, for the global batch as it is (no hidden scaling)."""
    lr_batch: int | None = None
    """The global batch, in images, that lr and min_lr are given for; only trainer.scale_lr uses it."""
    min_lr: float = 1e-5
    """Learning rate at the end of the schedule."""
    schedule: Literal["cosine", "linear"] = "cosine"
    """How the learning rate falls from its peak to min_lr."""
    warmup_epochs: float = 5.0
    """Epochs of linear warm-up."""
    warmup_steps: int | None = None
    """Length of the warm-up in optimizer steps instead of epochs."""
    warmup_start: float = 0.0
    """Where the warm-up begins, as a share of the peak."""
    weight_decay: float = 0.05
    """Decoupled weight decay; biases, norms, positions, class and mask tokens take none."""
    layer_decay: float = 1.0
    """Learning-rate factor per layer from the head down; 1 switches it off."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's beta."""
    eps: float = 1e-8
    """Adam's epsilon."""
    clip_grad: float | None = None
    """Largest norm of the gradient; None: no clipping."""

    def __post_init__(self) -> None:
        rates = {"lr": AT_LEAST_0, "lr_batch": ABOVE_0, "min_lr": AT_LEAST_0, "warmup_start": SHARE}
        warmup = {"warmup_epochs": AT_LEAST_0, "warmup_steps": AT_LEAST_0}
        adam = {"weight_decay": AT_LEAST_0, "betas": BELOW_1, "eps": ABOVE_0, "clip_grad": ABOVE_0}
        check_limits(self, "optim.", layer_decay=UP_TO_1, **rates, **warmup, **adam)


def scaled_to_batch(optim: OptimConfig, global_batch: int) -> OptimConfig:
    """The linear rule: lr and min_lr times ``global_batch / lr_batch``. Raises ValueError if lr_batch is not given."""
    if optim.lr_batch is None:
        raise ValueError(
            "trainer.scale_lr: wanted optim.lr_batch, the global batch that optim.lr is given for, got none"
        )
    factor = global_batch / optim.lr_batch
    return replace(optim, lr=optim.lr * factor, min_lr=optim.min_lr * factor)


def in_epochs(optim: OptimConfig, steps_per_epoch: int, total_steps: int) -> OptimConfig:
    """The same with its warm-up in epochs, where it is given in steps.

    Raises ValueError if the warm-up is not shorter than the schedule of ``total_steps``.
    """
    name = "warmup_epochs" if optim.warmup_steps is None else "warmup_steps"
    steps = optim.warmup_epochs * steps_per_epoch if optim.warmup_steps is None else optim.warmup_steps
    if steps >= total_steps:
        raise ValueError(f"optim.{name}: wanted fewer than the schedule's {total_steps} steps, got {steps:g} steps")
    return optim if optim.warmup_steps is None else replace(optim, warmup_epochs=steps / steps_per_epoch)


def learning_rate(optim: OptimConfig, epoch: float, epochs: float) -> float:
    """Linear warm-up, then cosine or linear, at a fraction of epochs: ``epoch = step / steps_per_epoch``.

    For e < w, lr = start + (peak - start) * e / w; then, with p = (e - w) / (E - w),
    min + (peak - min) * (1 + cos(pi * p)) / 2, or min + (peak - min) * (1 - p).
    """
    if epoch < optim.warmup_epochs:
        start = optim.lr * optim.warmup_start
        return start + (optim.lr - start) * epoch / optim.warmup_epochs
    progress = min((epoch - optim.warmup_epochs) / (epochs - optim.warmup_epochs), 1.0)
    left = 1 - progress if optim.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return optim.min_lr + (optim.lr - optim.min_lr) * left


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Every group gets ``lr`` times its own ``lr_scale``."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def make_optimizer(model: nn.Module, optim: OptimConfig) -> torch.optim.AdamW:
    """AdamW over every trainable parameter, at learning rate 0 until the schedule sets one."""
    groups = parameter_groups(model, optim.weight_decay, optim.layer_decay)
    return torch.optim.AdamW(groups, lr=0.0, betas=optim.betas, eps=optim.eps, fused=True)


def parameter_groups(model: nn.Module, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """Groups with ``lr_scale``: timm's layer decay on the ViT, scale 1 for all around it (decoder, heads).

    The ViT is ``model`` itself or its ``encoder``: timm's grouping gives a wrapper no decay at all.
    For L blocks: patch embedding, tokens and positions ``decay**(L+1)``, block i ``decay**(L-i)``, head 1.
    """
    encoder = model if isinstance(model, VisionTransformer) else model.encoder
    assert isinstance(encoder, VisionTransformer)
    groups: list[dict[str, Any]] = param_groups_layer_decay(
        encoder, weight_decay, encoder.no_weight_decay(), layer_decay=layer_decay
    )
    if encoder is not model:  # the head, whose scale is 1, lies outside: timm took the last block for it
        groups = [{**group, "lr_scale": group["lr_scale"] * layer_decay} for group in groups]
        inside = {id(parameter) for parameter in encoder.parameters()}
        around = nn.Module()
        for name, parameter in model.named_parameters():
            if id(parameter) not in inside:
                around.register_parameter(name.replace(".", "/"), parameter)
        fixed: set[str] = getattr(model, "no_weight_decay", set)()
        outer = param_groups_weight_decay(around, weight_decay, no_weight_decay_list=fixed)
        groups += [{**group, "lr_scale": 1.0} for group in outer]
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    trainable = [id(parameter) for parameter in model.parameters() if parameter.requires_grad]
    assert sorted(grouped) == sorted(trainable), "parameter groups must cover every trainable parameter once"
    return groups
