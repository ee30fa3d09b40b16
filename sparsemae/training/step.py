"""One optimizer step: the same for the loop, for the plan of its memory and for the benchmark."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sparsemae.data.sampling import BatchPlan
from sparsemae.options import OptimConfig, SparseConfig
from sparsemae.sparsity import add_srste_gradient, shrink_pruned


def optimizer_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    masks: AbstractContextManager[bool],
    backward: Callable[[], object],
    sparse: SparseConfig,
    optim: OptimConfig,
    accept: Callable[[Tensor], bool] = lambda norm: True,
) -> bool:
    """Hold the masks, make the gradients, add SR-STE's term once, clip and step; the gradients are gone afterwards.

    Args:
        masks: holds the masks of the step, as `MaskSchedule.step` does, and gives False while the forward is dense.
        backward: forward and backward of all micro-batches.
        accept: takes the gradient's norm, SR-STE's term included; False leaves weights and optimizer as they are.

    Returns:
        Whether the step was taken.
    """
    decoupled = sparse.term == "decoupled"
    with masks as masked:
        backward()
        pull = masked and sparse.strength > 0
        if pull and not decoupled:
            add_srste_gradient(model, sparse.strength)
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters])
        if accepted := accept(norm):
            if optim.clip_grad is not None:
                nn.utils.clip_grads_with_norm_(parameters, optim.clip_grad, norm)
            optimizer.step()
            if pull and decoupled:
                shrink_pruned(optimizer, model, sparse.strength)
    optimizer.zero_grad()
    return accepted


def memory_advice(plan: BatchPlan, device: torch.device) -> str:
    """What to say when a step does not fit in the device's memory."""
    batch, images = plan.micro_batch, plan.micro_batch * plan.accumulate
    smaller = [size for size in range(1, batch // 2 + 1) if images % size == 0]
    advice = (
        f"--trainer.device_batch {smaller[-1]} takes about half of the activations' memory at the same global "
        f"batch of {plan.global_batch}, by accumulation (with --trainer.resume anyway in a run that has begun)"
        if smaller else "wanted a smaller model, more processes, or a larger device"
    )  # fmt: skip
    return f"out of memory on {device} with {batch} images per forward: {advice}"


class StepVerdict(NamedTuple):
    """What all processes know of a step before they take it."""

    loss: float
    """Mean over all processes."""
    norm: float
    """Of the gradient."""
    ending: float
    """More than 0: some process wants the run to end after this step."""
    no_data: float
    """More than 0: some process had no data, and the step is none."""

    @property
    def good(self) -> bool:
        """Whether the optimizer may see this gradient."""
        return not self.no_data and math.isfinite(self.loss) and math.isfinite(self.norm)
