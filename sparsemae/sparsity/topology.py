"""How the sparse network moves: mask flip rate and SAD, and the summary of what is sparse."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparsemae.sparsity.convert import _sparse_layers
from sparsemae.sparsity.linear import NMLinear


@dataclass(frozen=True)
class Movement:
    """Change of one mask, or of all of them together."""

    flip_rate: float
    """Fraction of mask entries that changed since the last look, 0 to 1."""
    sad: int
    """Sparse architecture divergence: number of entries that differ from the reference mask."""


@dataclass(frozen=True)
class TopologyReport:
    """Movement per layer and of the whole network."""

    layers: dict[str, Movement]
    total: Movement


class Topology:
    """Watches the masks of a sparsified model.

    The reference, and the first "last look", are the masks at construction. SAD is SR-STE's measure
    (arXiv 2102.04010, section 3.3) against that earlier step.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = _sparse_layers(model, "Topology")
        self._reference = self._masks()
        self._last = self._reference

    def _masks(self) -> dict[str, Tensor]:
        return {name: layer.current_mask() for name, layer in self._layers}

    def update(self) -> TopologyReport:
        """Compare the masks of now with the last look and with the reference, then remember them."""
        now = self._masks()
        flips = {name: int((now[name] ^ self._last[name]).sum()) for name in now}
        sad = {name: int((now[name] ^ self._reference[name]).sum()) for name in now}
        self._last = now
        entries = sum(mask.numel() for mask in now.values())
        return TopologyReport(
            {name: Movement(flips[name] / now[name].numel(), sad[name]) for name in now},
            Movement(sum(flips.values()) / entries, sum(sad.values())),
        )

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Reference and last masks as bits, so that a resumed run reports what an uninterrupted one would."""
        return {"reference": pack_masks(self._reference), "last": pack_masks(self._last)}

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Inverse of `state_dict`."""
        layers = dict(self._layers)
        self._reference = unpack_masks(state["reference"], layers)
        self._last = unpack_masks(state["last"], layers)


def pack_masks(masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Bool masks by layer name to uint8 tensors of eight bits each."""
    return {name: torch.from_numpy(np.packbits(mask.cpu().numpy())) for name, mask in masks.items()}


def unpack_masks(bits: Mapping[str, Tensor], layers: Mapping[str, NMLinear]) -> dict[str, Tensor]:
    """Inverse of `pack_masks`, each mask in its layer's shape and on its device.

    Raises ValueError, naming the layer, if its bits are missing or of another number.
    """
    masks = {}
    for name, layer in layers.items():
        wanted, got = torch.Size([(layer.weight.numel() + 7) // 8]), bits.get(name)
        if got is None or got.dtype != torch.uint8 or got.shape != wanted:
            found = "none" if got is None else f"{got.dtype} {list(got.shape)}"
            raise ValueError(f"mask of {name}: wanted {torch.uint8} {list(wanted)}, got {found}")
        mask = np.unpackbits(bits[name].numpy(), count=layer.weight.numel()).view(bool)
        masks[name] = torch.from_numpy(mask).view_as(layer.weight).to(layer.weight.device)
    return masks


@dataclass
class SparsitySummary:
    """What is sparse and what is not; ``str()`` gives the table."""

    sparse: list[tuple[str, str, int, int]] = field(default_factory=list)
    """(layer, pattern, kept weights, all weights)"""
    dense: list[tuple[str, int]] = field(default_factory=list)
    """(parameter group, parameters), everything that stays dense, sparse layers' biases included"""

    @property
    def kept(self) -> int:
        """Kept weights of the sparse layers."""
        return sum(kept for _, _, kept, _ in self.sparse)

    @property
    def sparse_total(self) -> int:
        """All weights of the sparse layers."""
        return sum(total for *_, total in self.sparse)

    @property
    def dense_total(self) -> int:
        """Parameters outside the sparse weights."""
        return sum(count for _, count in self.dense)

    def line(self) -> str:
        """In few words."""
        patterns = ", ".join(dict.fromkeys(pattern for _, pattern, *_ in self.sparse)) or "dense"
        return (
            f"{self.sparse_total + self.dense_total:,} parameters, of which {self.kept + self.dense_total:,} are kept: "
            f"{len(self.sparse)} layers {patterns}, the rest dense"
        )

    def __str__(self) -> str:
        rows: list[tuple[str, str, Any, Any]] = [("layer", "pattern", "kept", "total"), *self.sparse]
        rows.append(("sparse weights", "", self.kept, self.sparse_total))
        rows += [(name, "dense", count, count) for name, count in self.dense]
        rows.append(("all parameters", "", self.kept + self.dense_total, self.sparse_total + self.dense_total))
        width = max(len(row[0]) for row in rows)
        number = "{:,}".format
        return "\n".join(
            f"{name:<{width}}  {pattern:>7}  {kept if isinstance(kept, str) else number(kept):>12}"
            f"  {total if isinstance(total, str) else number(total):>12}"
            for name, pattern, kept, total in rows
        )


def summarize(model: nn.Module) -> SparsitySummary:
    """Count what is kept: per sparse layer, and the parameters that stay dense by top-level name.

    Each shared parameter counts once. Works on dense models too (then all is dense).
    """
    seen: set[int] = set()
    sparse: list[tuple[str, str, int, int]] = []
    dense: dict[str, int] = {}
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if isinstance(module, NMLinear) and key == "weight":
                kept = parameter.numel() // module.pattern.m * module.pattern.n
                sparse.append((name, str(module.pattern), kept, parameter.numel()))
            else:
                group = _dense_group(f"{name}.{key}" if name else key)
                dense[group] = dense.get(group, 0) + parameter.numel()
    return SparsitySummary(sparse, list(dense.items()))


def _dense_group(path: str) -> str:
    """`blocks.3.norm1.weight` counts under `blocks.*.norm1`, other parameters under their module."""
    parts = ["*" if part.isdigit() else part for part in path.split(".")]
    return ".".join(parts[:-1]) if len(parts) > 1 else parts[0]
