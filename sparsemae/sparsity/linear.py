"""The sparse linear layer: a plain ``nn.Linear`` whose forward sees only the kept weights.

The mask lives nowhere: in training it is recomputed from the latent weight at each forward, because the
layer cannot know when an optimizer has changed the weight (fused AdamW does not bump ``Tensor._version``).
Three states replace that recomputation: a mask *held* for the micro-batches of one optimizer step, *dense*
(the full latent weight, for a moment), and *frozen* (the tensor ``weight_mask``, for good).

A frozen mask is saved and moved like a buffer, but is none: DDP broadcasts buffers at each forward.

Not ``torch.nn.utils.parametrize``: it renames ``weight`` in the state dict and breaks ``deepcopy`` and
compile under DDP.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, Self
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from sparsemae.sparsity import passes
from sparsemae.sparsity.pattern import Criterion, NMPattern, check_finite, check_holds, magnitude, select_mask


class _StraightThrough(torch.autograd.Function):
    """M * W forward, the gradient of W~ passed unchanged to *all* of W backward (SR-STE with strength 0).

    With a scale, (M + scale * (1 - M)) * W forward. ``kept`` is M * W in bf16, where that is there.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, mask: Tensor, scale: Tensor | None, kept: Tensor | None = None) -> Tensor:
        device = "cuda" if weight.is_cuda else "cpu"
        in_bf16 = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) is torch.bfloat16
        if scale is None and in_bf16 and kept is not None:
            return kept
        if scale is None and in_bf16 and passes.fits(weight) and mask.is_contiguous():
            made: Tensor = passes.kept_bf16(weight, mask)  # what autocast would make of it, in one pass
            return made
        return torch.where(mask, weight, 0.0 if scale is None else weight * scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None: ...

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return grads[0], None, None, None


class NMLinear(nn.Linear):
    """``nn.Linear`` with an N:M sparse weight ``[O, I]``; made by `sparsemae.sparsity.sparsify`.

    ``weight`` stays the full latent parameter, so state-dict keys are those of ``nn.Linear``. A frozen layer
    has one more key, the bool ``weight_mask`` ``[O, I]``, and its pruned weights are exactly +0. Under FSDP2 the weight
    is a DTensor outside the forward, the mask always whole.
    """

    pattern: NMPattern
    criterion: Criterion = staticmethod(magnitude)
    """What of each group is kept."""
    weight_mask: Tensor
    """Only on a frozen layer."""
    held_mask: Tensor | None = None
    """Mask that stands in for the recomputed one inside `hold_masks`; never saved."""
    held_kept: Tensor | None = None
    """The kept weights in bf16, where they were made with ``held_mask``."""
    use_dense: bool = False
    """True inside `dense_weights`."""
    pruned_scale: Tensor | None = None
    """What the pruned weights are multiplied by while `MaskSchedule` lets them fade, 0-dim; None: 0."""

    @property
    def frozen(self) -> bool:
        """True once `freeze` has made the mask permanent."""
        return "weight_mask" in self.__dict__

    def current_mask(self) -> Tensor:
        """The mask that the next forward uses, bool ``[O, I]``, True = kept."""
        if self.frozen:
            return self.weight_mask
        if self.held_mask is not None:
            return self.held_mask
        return select_mask(whole(self.weight), self.pattern, self.criterion)

    def hold_mask(self, in_bf16: bool = False) -> None:
        """Keep the mask of now as ``held_mask``, and for forwards in bf16, where one pass makes both, ``held_kept``."""
        n, m = self.pattern.n, self.pattern.m
        if self.criterion is not magnitude or self.pruned_scale is not None:
            self.held_mask = self.current_mask()
        elif passes.fits_kernel(self.weight, n, m):
            from sparsemae.sparsity.kernel import select_in_one_pass

            self.held_mask, self.held_kept = select_in_one_pass(self.weight.detach(), n, m)
        elif in_bf16 and passes.selects(self.weight, n, m):
            self.held_mask, self.held_kept = passes.select_kept_bf16(self.weight.detach(), n, m)
        else:
            self.held_mask = self.current_mask()

    def forward(self, input: Tensor) -> Tensor:
        """``input [..., I]`` to ``[..., O]``."""
        if self.use_dense and not self.frozen:
            weight: Tensor = self.weight
        elif self.frozen:
            weight = torch.where(self.weight_mask, self.weight, 0.0)  # not straight-through: pruned gradients are 0
        else:
            weight = _StraightThrough.apply(self.weight, self.current_mask(), self.pruned_scale, self.held_kept)
        return F.linear(input, weight, self.bias)

    def freeze(self, name: str = "layer") -> None:
        """Make the current mask permanent and set the pruned weights to exactly +0; again, if they are not any more."""
        mask = self.current_mask()
        self.weight_mask = mask if self.frozen else mask.clone()
        self.zero_pruned()
        if self.weight.grad is not None:
            self.weight.grad.masked_fill_(~divided(mask, self.weight), 0.0)
        check_holds(whole(self.weight), mask, self.pattern, name)
        self.held_mask = self.held_kept = None
        _keep_zero_after_steps(self)

    @torch.no_grad()
    def zero_pruned(self) -> None:
        """Set the weights outside the mask of now to exactly +0."""
        self.weight.copy_(torch.where(divided(self.current_mask(), self.weight), self.weight, 0.0))

    def drop_mask(self) -> None:
        """Undo the permanence of `freeze`: the weight keeps its zeros, and optimizers may move them again."""
        _frozen_layers.discard(self)
        del self.weight_mask

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, pattern={self.pattern}{', frozen' if self.frozen else ''}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "held_mask": None, "held_kept": None, "use_dense": False, "pruned_scale": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self.frozen:
            _keep_zero_after_steps(self)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.frozen:
            self.weight_mask = fn(self.weight_mask)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.frozen:
            destination[prefix + "weight_mask"] = self.weight_mask

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, missing: list[str],
        unexpected: list[str], errors: list[str],
    ) -> None:  # fmt: skip
        """A state dict with a mask makes the layer frozen; one that breaks N:M is refused, naming the layer."""
        key, name = prefix + "weight_mask", prefix.rstrip(".")
        weight, mask = state_dict.get(prefix + "weight"), state_dict.get(key)
        if weight is not None:
            check_finite(whole(weight), name)
        if mask is None and self.frozen:
            missing.append(key)
            mask = self.weight_mask
        if mask is not None:
            check_holds(whole(self.weight if weight is None else weight), mask.bool(), self.pattern, name)
            if mask.shape == self.weight.shape:  # else the weight is refused as well
                self.weight_mask = mask.detach().to(self.weight.device, torch.bool, copy=True)
                _keep_zero_after_steps(self)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        if key in unexpected:
            unexpected.remove(key)


def whole(weight: Tensor) -> Tensor:
    """All of a weight that FSDP2 has divided among processes (which must all ask); any other as it is."""
    gathered: Tensor = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
    return gathered


def divided(mask: Tensor, weight: Any) -> Tensor:
    """A mask divided as its weight is, without communication."""
    if not hasattr(weight, "device_mesh"):
        return mask
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(mask, weight.device_mesh, weight.placements, src_data_rank=None)


# Momentum gathered before a freeze would move pruned weights after it, whatever their gradient. No layer sees the
# optimizer, so a hook on every optimizer's step puts the zeros back. The layers are known, not their weights: a move to
# another device, loading and FSDP may replace those.
_frozen_layers: WeakSet[NMLinear] = WeakSet()


def _keep_zero_after_steps(layer: NMLinear) -> None:
    _watch_optimizers()
    _frozen_layers.add(layer)


@cache
def _watch_optimizers() -> None:
    register_optimizer_step_post_hook(_zero_pruned)


def _zero_pruned(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    stepped = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
    for layer in list(_frozen_layers):
        if id(layer.weight) in stepped:
            layer.zero_pruned()
