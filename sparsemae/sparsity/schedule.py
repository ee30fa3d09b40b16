"""How the masks change over a training: dense at first, sparser in stages, fixed in the end; a function of the epoch.

All three are off by default: SparseMAE's masks move from the first step to the last. Only a fixed mask is state; it
travels in checkpoints as bits.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from sparsemae.sparsity.convert import dense_weights, hold_masks, iter_sparse
from sparsemae.sparsity.pattern import NMPattern
from sparsemae.sparsity.topology import pack_masks, unpack_masks


class MaskSchedule:
    """Applies a schedule to the sparse layers of a model; `step` is entered around every optimizer step.

    Args:
        dense_epochs: forward with the full weights until then.
        gradual_epochs: halve the kept weights in equal stages, m:m -> ... -> n:m, until then
            (Progressive Gradient Flow, arXiv 2402.04744).
        freeze_epoch: keep the masks of this epoch from there on; None: never.

    Raises:
        ValueError: if the masks were to freeze before a gradual schedule has reached the pattern.
    """

    def __init__(
        self,
        model: nn.Module,
        dense_epochs: float = 0.0,
        gradual_epochs: float = 0.0,
        freeze_epoch: float | None = None,
    ) -> None:
        if freeze_epoch is not None and freeze_epoch < gradual_epochs:
            raise ValueError(
                f"freeze_epoch: wanted at least gradual_epochs={gradual_epochs:g}, when the pattern is reached, "
                f"got {freeze_epoch:g}"
            )
        self._model = model
        self._final = {name: layer.pattern for name, layer in iter_sparse(model)}
        self._dense_epochs, self._gradual_epochs, self._freeze_epoch = dense_epochs, gradual_epochs, freeze_epoch
        self._fixed = False

    @contextmanager
    def step(self, epoch: float) -> Iterator[bool]:
        """Within: the masks of ``epoch``, held. Yields False while the forward is dense (no SR-STE term then)."""
        for name, layer in iter_sparse(self._model):
            layer.pattern = pattern_at(self._final[name], epoch, self._gradual_epochs)
        if self._freeze_epoch is not None and epoch >= self._freeze_epoch and not self._fixed:
            self._fix({name: layer.current_mask() for name, layer in iter_sparse(self._model)})
        dense = epoch < self._dense_epochs
        with dense_weights(self._model) if dense else hold_masks(self._model):
            yield not dense

    def finish(self) -> None:
        """Bring the layers to their final patterns, for a run that ends before its schedule does."""
        for name, layer in iter_sparse(self._model):
            layer.pattern = self._final[name]

    @property
    def reached(self) -> bool:
        """Whether the layers have their final patterns, so that what is evaluated now is what would be written."""
        return all(layer.pattern == self._final[name] for name, layer in iter_sparse(self._model))

    def sync_to(self, twin: nn.Module) -> nn.Module:
        """Give a copy of the model (an average of its weights) the pattern of now and the masks once fixed; returns it.

        Masks that move are not synced: the copy's follow from its own weights.
        """
        for (_, own), (_, other) in zip(iter_sparse(self._model), iter_sparse(twin), strict=True):
            other.pattern, other.held_mask = own.pattern, own.held_mask
        return twin

    def _fix(self, masks: dict[str, Tensor]) -> None:
        for name, layer in iter_sparse(self._model):
            if not layer.frozen:
                layer.held_mask = masks[name]
        self._fixed = True

    def state_dict(self) -> dict[str, Tensor]:
        """The fixed masks as bits; empty while the masks move."""
        return pack_masks({name: layer.current_mask() for name, layer in iter_sparse(self._model) if self._fixed})

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Inverse of `state_dict`; masks fixed since then move again."""
        if self._fixed:
            for _, layer in iter_sparse(self._model):
                layer.held_mask = None
            self._fixed = False
        if state:
            self._fix(unpack_masks(state, dict(iter_sparse(self._model))))


def pattern_at(final: NMPattern, epoch: float, gradual_epochs: float) -> NMPattern:
    """The pattern of a gradual schedule at ``epoch``: ``n`` doubled as often as stages are left, at most ``m``."""
    if epoch >= gradual_epochs:
        return final
    stages = [final.m]
    while (kept := stages[-1] // 2) > final.n:
        stages.append(kept)
    return NMPattern(stages[int(epoch / gradual_epochs * len(stages))], final.m)
