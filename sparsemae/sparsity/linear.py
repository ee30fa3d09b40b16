"""The sparse linear layer: a plain ``nn.Linear`` whose forward sees only the kept weights.

The mask lives nowhere: in training it is recomputed from the latent weight at each forward, because the
layer cannot know when an optimizer has changed the weight (fused AdamW does not bump ``Tensor._version``).
Three states replace that recomputation: a mask *held* for the micro-batches of one optimizer step, *dense*
(the full latent weight, for a moment), and *frozen* (the buffer ``weight_mask``, for good).

Not ``torch.nn.utils.parametrize``: it renames ``weight`` in the state dict and breaks ``deepcopy`` and
compile under DDP.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary

from sparsemae.sparsity.pattern import NMPattern, check_finite, check_holds, select_mask


class _StraightThrough(torch.autograd.Function):
    """M * W forward, the gradient of W~ passed unchanged to *all* of W backward (SR-STE with strength 0)."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask, weight, 0.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class NMLinear(nn.Linear):
    """``nn.Linear`` with an N:M sparse weight ``[O, I]``; made by `sparsemae.sparsity.sparsify`.

    ``weight`` stays the full latent parameter, so state-dict keys are those of ``nn.Linear``. A frozen layer
    has one more key, the bool buffer ``weight_mask`` ``[O, I]``, and its pruned weights are exactly +0.
    """

    pattern: NMPattern
    weight_mask: Tensor
    """Only on a frozen layer."""
    held_mask: Tensor | None = None
    """Mask that stands in for the recomputed one inside `hold_masks`; never saved."""
    use_dense: bool = False
    """True inside `dense_weights`."""

    @property
    def frozen(self) -> bool:
        """True once `freeze` has made the mask permanent."""
        return "weight_mask" in self._buffers

    def current_mask(self) -> Tensor:
        """The mask that the next forward uses, bool ``[O, I]``, True = kept."""
        if self.frozen:
            return self.weight_mask
        return select_mask(self.weight, self.pattern) if self.held_mask is None else self.held_mask

    def forward(self, input: Tensor) -> Tensor:
        """``input [..., I]`` to ``[..., O]``."""
        if self.use_dense and not self.frozen:
            weight: Tensor = self.weight
        elif self.frozen:
            _keep_zero_after_steps(self.weight, self.weight_mask)
            weight = torch.where(self.weight_mask, self.weight, 0.0)  # not straight-through: pruned gradients are 0
        else:
            weight = _StraightThrough.apply(self.weight, self.current_mask())
        return F.linear(input, weight, self.bias)

    def freeze(self, name: str = "layer") -> None:
        """Make the current mask permanent and set the pruned weights to exactly +0."""
        mask = self.current_mask().clone()
        with torch.no_grad():
            self.weight.copy_(torch.where(mask, self.weight, 0.0))
            if self.weight.grad is not None:
                self.weight.grad.masked_fill_(~mask, 0.0)
        check_holds(self.weight, mask, self.pattern, name)
        self.register_buffer("weight_mask", mask)
        self.held_mask = None
        _keep_zero_after_steps(self.weight, mask)

    def drop_mask(self) -> None:
        """Undo the permanence of `freeze`: the weight keeps its zeros, and optimizers may move them again."""
        _frozen_weights.pop(self.weight, None)
        del self.weight_mask

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, pattern={self.pattern}{', frozen' if self.frozen else ''}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "held_mask": None, "use_dense": False}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """A state dict with a mask makes the layer frozen; one that breaks N:M is refused, naming the layer."""
        mask = state_dict.get(prefix + "weight_mask")
        weight = state_dict.get(prefix + "weight")
        if weight is not None:
            check_finite(weight, prefix.rstrip("."))
        if mask is None and self.frozen:
            mask = self.weight_mask
        if mask is not None and weight is not None:
            check_holds(weight, mask.bool(), self.pattern, prefix.rstrip("."))
            if not self.frozen:
                self.register_buffer("weight_mask", torch.empty_like(self.weight, dtype=torch.bool))
        super()._load_from_state_dict(state_dict, prefix, *args)


# Momentum gathered before a freeze would move pruned weights after it, whatever their gradient. No layer sees the
# optimizer, so a hook on every optimizer's step puts the zeros back. Keys are weights, by identity.
_frozen_weights: Any = WeakIdKeyDictionary()


def _keep_zero_after_steps(weight: Tensor, mask: Tensor) -> None:
    if torch.compiler.is_compiling():
        return
    _watch_optimizers()
    _frozen_weights[weight] = mask


@cache
def _watch_optimizers() -> None:
    register_optimizer_step_post_hook(_zero_pruned)


def _zero_pruned(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    with torch.no_grad():
        for group in optimizer.param_groups:
            for weight in group["params"]:
                mask = _frozen_weights.get(weight)
                if mask is not None:
                    weight.copy_(torch.where(mask, weight, 0.0))
