"""Multiply-adds of a forward, counted while it runs on the meta device, not by formulas beside the model."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sparsemae.sparsity import NMLinear

COUNTED = nn.Linear | nn.Conv2d | nn.ConvTranspose2d


class MultiplyAdds(NamedTuple):
    """Multiply-adds of one part of a forward."""

    part: str
    dense: int
    kept: int
    """With the kept weights alone, as a packed model computes; in training the masked weights are multiplied whole."""


@dataclass(frozen=True)
class Forward:
    """One image's way through a model, or through a part of it."""

    title: str
    tokens: int
    """Class token included."""
    parts: list[MultiplyAdds]

    @property
    def total(self) -> MultiplyAdds:
        """Sum of the parts."""
        return MultiplyAdds("total", sum(part.dense for part in self.parts), sum(part.kept for part in self.parts))


def count_forward(title: str, tokens: int, model: nn.Module, forward: Callable[[], object]) -> Forward:
    """Count ``forward()``, which runs layers of ``model``: linear layers and convolutions by kind, the rest is the
    attention's.

    The attention must be matrix products, each of which the counter knows (`use_plain_attention`).
    """
    found: dict[str, list[int]] = {}

    def note(layer: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        weight: Any = module.weight
        positions = args[0] if isinstance(module, nn.ConvTranspose2d) else output
        dense = positions.numel() // weight.shape[0] * weight.numel()
        kind = "dense linear" if isinstance(module, nn.Linear) else "convolutions"
        name, kept = "patch embedding" if "patch_embed" in layer else kind, dense
        if isinstance(module, NMLinear):
            name, kept = "sparse linear", dense * module.pattern.n // module.pattern.m
        sums = found.setdefault(name, [0, 0])
        sums[0], sums[1] = sums[0] + dense, sums[1] + kept

    handles = [
        module.register_forward_hook(partial(note, name))
        for name, module in model.named_modules()
        if isinstance(module, COUNTED)
    ]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        forward()
    for handle in handles:
        handle.remove()
    parts = [MultiplyAdds(name, dense, kept) for name, (dense, kept) in found.items()]
    products = counter.get_total_flops() // 2 - sum(part.dense for part in parts)
    return Forward(title, tokens, [*parts, *([MultiplyAdds("attention", products, products)] if products else [])])
