"""How the masks change over a training: dense at first, sparser in stages, fixed in the end; a function of the epoch.

All of it is off by default: SparseMAE's masks move from the first step to the last. Only two things are state, and
travel in checkpoints: a fixed mask, as bits, and patterns that were chosen for each layer.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sparsemae.sparsity.allocation import allocate, choices
from sparsemae.sparsity.convert import dense_weights, hold_masks, iter_sparse
from sparsemae.sparsity.linear import whole
from sparsemae.sparsity.pattern import NMPattern
from sparsemae.sparsity.topology import pack_masks, unpack_masks


class MaskSchedule:
    """Applies a schedule to the sparse layers of a model; `step` is entered around every optimizer step.

    Args:
        dense_epochs: forward with the full weights until then.
        gradual_epochs: halve the kept weights in equal stages, m:m -> ... -> n:m, until then
            (Progressive Gradient Flow, arXiv 2402.04744).
        freeze_epoch: keep the masks of this epoch from there on; None: never.
        decay_epochs: from the dense epochs' end on, and for so long, let the pruned weights fade: the forward sees
            (M + s * (1 - M)) * W, s falling linearly from 1 to 0 (the same paper's MdGf-Linear).
        allocation_epoch: give each layer its own n then, see `allocate`; None: all keep theirs.
        in_bf16: forwards run under autocast to it, see `hold_masks`.

    Raises:
        ValueError: if the masks were to freeze before a gradual schedule has reached the pattern or before there are
            patterns for each layer, or if those cannot be chosen.
    """

    def __init__(
        self,
        model: nn.Module,
        dense_epochs: float = 0.0,
        gradual_epochs: float = 0.0,
        freeze_epoch: float | None = None,
        decay_epochs: float = 0.0,
        allocation_epoch: float | None = None,
        in_bf16: bool = False,
    ) -> None:
        if freeze_epoch is not None and freeze_epoch < gradual_epochs:
            raise ValueError(
                f"freeze_epoch: wanted at least gradual_epochs={gradual_epochs:g}, when the pattern is reached, "
                f"got {freeze_epoch:g}"
            )
        if freeze_epoch is not None and allocation_epoch is not None and freeze_epoch < allocation_epoch:
            raise ValueError(
                f"freeze_epoch: wanted at least allocation_epoch={allocation_epoch:g}, got {freeze_epoch:g}"
            )
        self._model = model
        self._final = {name: layer.pattern for name, layer in iter_sparse(model)}
        self._dense_epochs, self._gradual_epochs, self._freeze_epoch = dense_epochs, gradual_epochs, freeze_epoch
        self._decay_epochs, self._allocation_epoch = decay_epochs, allocation_epoch
        self._fixed, self._allocated, self._in_bf16 = False, False, in_bf16
        if allocation_epoch is not None:
            choices(next(iter(self._final.values())))
            self._allocate_at(0.0)

    @property
    def patterns(self) -> dict[str, str]:
        """Layer -> 'n:m' that the schedule ends with, as far as is known now."""
        return {name: str(pattern) for name, pattern in self._final.items()}

    @contextmanager
    def step(self, epoch: float) -> Iterator[bool]:
        """Within: the masks of ``epoch``, held. Yields False while the forward is dense (no SR-STE term then)."""
        self._allocate_at(epoch)
        scale = pruned_scale_at(epoch - self._dense_epochs, self._decay_epochs)
        layers = dict(iter_sparse(self._model))
        for name, layer in layers.items():
            layer.pattern = pattern_at(self._final[name], epoch, self._gradual_epochs)
            weight = layer.weight  # as a tensor: a number would have torch.compile start over at each step
            layer.pruned_scale = torch.full((), scale, dtype=weight.dtype, device=weight.device) if scale else None
        if self._freeze_epoch is not None and epoch >= self._freeze_epoch and not self._fixed:
            self._fix({name: layer.current_mask() for name, layer in layers.items()})
        dense = epoch < self._dense_epochs
        try:
            with dense_weights(self._model) if dense else hold_masks(self._model, self._in_bf16):
                yield not dense
        finally:
            for layer in layers.values():
                layer.pruned_scale = None

    @property
    def fixed(self) -> dict[str, Tensor]:
        """Layer -> its mask, bool ``[O, I]``, once they are fixed; empty before."""
        return {name: layer.current_mask() for name, layer in iter_sparse(self._model) if self._fixed}

    def finish(self) -> None:
        """Bring the layers to their final patterns, for a run that ends before its schedule does."""
        for name, layer in iter_sparse(self._model):
            layer.pattern = self._final[name]

    @property
    def reached(self) -> bool:
        """Whether the layers have their final patterns, so that what is evaluated now is what would be written."""
        settled = self._allocated or self._allocation_epoch is None
        return settled and all(layer.pattern == self._final[name] for name, layer in iter_sparse(self._model))

    def sync_to(self, twin: nn.Module) -> nn.Module:
        """Give a copy of the model (an average of its weights) the pattern of now and the masks once fixed; returns it.

        Masks that move are not synced: the copy's follow from its own weights.
        """
        for (_, own), (_, other) in zip(iter_sparse(self._model), iter_sparse(twin), strict=True):
            other.pattern, other.held_mask = own.pattern, own.held_mask
        return twin

    def _allocate_at(self, epoch: float) -> None:
        if self._allocation_epoch is not None and epoch >= self._allocation_epoch and not self._allocated:
            layers = dict(iter_sparse(self._model))
            pattern = next(iter(self._final.values()))
            self._final = allocate({name: whole(layer.weight) for name, layer in layers.items()}, pattern)
            self._allocated = True
            self.finish()

    def _fix(self, masks: dict[str, Tensor]) -> None:
        for name, layer in iter_sparse(self._model):
            if not layer.frozen:
                layer.held_mask = masks[name]
        self._fixed = True

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """The fixed masks as bits, and each layer's n where it was chosen; empty while there are none."""
        kept = {name: torch.tensor(pattern.n) for name, pattern in self._final.items() if self._allocated}
        return {"masks": pack_masks(self.fixed), "patterns": kept}

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Inverse of `state_dict`; masks fixed since then move again."""
        if self._fixed:
            for _, layer in iter_sparse(self._model):
                layer.held_mask = None
            self._fixed = False
        if kept := state.get("patterns"):
            self._final = {name: NMPattern(int(kept[name]), final.m) for name, final in self._final.items()}
            self._allocated = True
            self.finish()
        if masks := state.get("masks"):
            self._fix(unpack_masks(masks, dict(iter_sparse(self._model))))


def pattern_at(final: NMPattern, epoch: float, gradual_epochs: float) -> NMPattern:
    """The pattern of a gradual schedule at ``epoch``: ``n`` doubled as often as stages are left, at most ``m``."""
    if epoch >= gradual_epochs:
        return final
    stages = [final.m]
    while (kept := stages[-1] // 2) > final.n:
        stages.append(kept)
    return NMPattern(stages[int(epoch / gradual_epochs * len(stages))], final.m)


def pruned_scale_at(epoch: float, decay_epochs: float) -> float:
    """What pruned weights are multiplied by, so many epochs after they began to fade: 1 at first, 0 in the end."""
    return min(1.0, 1 - epoch / decay_epochs) if decay_epochs and epoch < decay_epochs else 0.0
