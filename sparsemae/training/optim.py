"""Learning rates: the schedule, layer-wise decay, and who takes weight decay."""

import math
from dataclasses import replace
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import Tensor, nn

from sparsemae.options import OptimConfig
from sparsemae.sparsity import iter_sparse


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

    Raises ValueError if the warm-up is not shorter than the schedule of ``total_steps``, or the second moment is to
    freeze after it.
    """
    name = "warmup_epochs" if optim.warmup_steps is None else "warmup_steps"
    steps = optim.warmup_epochs * steps_per_epoch if optim.warmup_steps is None else optim.warmup_steps
    if steps >= total_steps:
        raise ValueError(f"optim.{name}: wanted fewer than the schedule's {total_steps} steps, got {steps:g} steps")
    if (epoch := optim.freeze_variance_epoch) is not None and epoch * steps_per_epoch >= total_steps:
        epochs = total_steps / steps_per_epoch
        raise ValueError(
            f"optim.freeze_variance_epoch: wanted less than the training's {epochs:g} epochs, got {epoch:g}"
        )
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


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float, variance_frozen: bool = False) -> None:
    """Every group gets ``lr`` times its own ``lr_scale``, and whether its second moment is to stay as it is."""
    for group in optimizer.param_groups:
        group["lr"], group["variance_frozen"] = lr * group["lr_scale"], variance_frozen


class FrozenVarianceAdamW(torch.optim.AdamW):
    """AdamW whose second moment stays as it is from the step on at which its groups have ``variance_frozen``.

    Then, with v of the steps before, corrected for its bias (STEP, arXiv 2302.01172, mask learning phase):
    ``W = (1 - lr * weight_decay) * W - lr * m / (1 - beta1 ** t) / (sqrt(v) + eps)``. That v is the state ``variance``
    and takes the place of ``exp_avg_sq``, so that a checkpoint says whether it is frozen.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step; of AdamW as it is before the freeze, and while there is no second moment."""
        first: dict[str, Tensor] = next(iter(self.state.values()), {})
        if not first or not (self.param_groups[0].get("variance_frozen") or "variance" in first):
            return super().step(closure)
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for weight in (weight for weight in group["params"] if weight.grad is not None):
                state = self.state[weight]
                if "exp_avg_sq" in state:
                    state["variance"] = state.pop("exp_avg_sq") / (1 - beta2 ** state["step"])
                state["step"] += 1
                state["exp_avg"].lerp_(weight.grad, 1 - beta1)
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                rate = group["lr"] / (1 - beta1 ** state["step"])
                weight.sub_(rate * state["exp_avg"] / (state["variance"].sqrt() + group["eps"]))
        return None


def srste_pull(optimizer: torch.optim.AdamW, model: nn.Module, strength: float) -> dict[str, float]:
    """Of each sparse layer, ``strength / sqrt(v)`` with v the mean of Adam's second moment, corrected for its bias.

    By so much of itself, times the learning rate, SR-STE's term inside the gradient shrinks a pruned weight in a step.
    The gradient, and v with it, gets smaller with the batch, so that one strength means another thing at each.
    Layers without a second moment, frozen ones among them, are left out.
    """
    betas = {id(weight): group["betas"][1] for group in optimizer.param_groups for weight in group["params"]}
    pulls = {}
    for name, layer in iter_sparse(model):
        state = optimizer.state.get(layer.weight, {})
        if layer.frozen or not state:
            continue
        if "variance" in state:
            mean = state["variance"].mean()
        else:
            mean = state["exp_avg_sq"].mean() / (1 - betas[id(layer.weight)] ** float(state["step"]))
        if mean > 0:
            pulls[name] = strength / math.sqrt(float(mean))
    return pulls


def make_optimizer(model: nn.Module, optim: OptimConfig) -> torch.optim.AdamW:
    """AdamW over every trainable parameter, at learning rate 0 until the schedule sets one."""
    kind = torch.optim.AdamW if optim.freeze_variance_epoch is None else FrozenVarianceAdamW
    return kind(
        parameter_groups(model, optim.weight_decay, optim.layer_decay),
        lr=0.0, betas=optim.betas, eps=optim.eps, fused=True,
    )  # fmt: skip


def parameter_groups(model: nn.Module, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """Groups with ``lr_scale``: timm's layer decay on the ViT, scale 1 for all around it (decoder, heads).

    The ViT is ``model`` itself or its ``encoder``: timm's grouping gives a wrapper no decay at all.
    For L blocks: patch embedding, tokens and position embeddings ``decay**(L+1)``, block i ``decay**(L-i)``, head 1.
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
