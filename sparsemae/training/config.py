"""A run's settings as the machine resolves them, and how those of two runs differ."""

from collections.abc import Collection, Mapping
from typing import Any

import torch

from sparsemae.limits import flatten
from sparsemae.options import TrainerConfig

PRECISIONS: dict[str, Any] = {"bf16": "bf16-mixed", "fp32": "32-true", "fp64": "64-true"}
"""What Fabric calls them."""


def resolved_precision(trainer: TrainerConfig) -> str:
    """What trainer.precision comes to on this machine.

    auto is bf16 on CUDA and on processors with AVX512-BF16; elsewhere a CPU emulates it, several times slower.
    """
    if trainer.precision != "auto":
        return trainer.precision
    if trainer.accelerator != "cpu" and torch.cuda.is_available():
        return "bf16"
    return "bf16" if getattr(torch.cpu, "_is_avx512_bf16_supported", bool)() else "fp32"


def differences(
    before: Mapping[str, Any], now: Mapping[str, Any], defaults: Mapping[str, Any], may_change: Collection[str]
) -> list[str]:
    """Settings that differ and must not, as ``name was X, is Y``.

    A setting that ``before`` does not know, because it was made by an older version, counts as its default; one that
    ``now`` does not know was an older version's, which no longer matters.
    """
    defaults, old, new = flatten_config(defaults), flatten_config(before), flatten_config(now)
    old = {key: value for key, value in defaults.items() if key in new} | old
    return [
        f"{key} was {old.get(key)}, is {new.get(key)}"
        for key in sorted(old | new)
        if key not in may_change and old.get(key) != new.get(key)
    ]


def flatten_config(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A tree of settings as one dictionary, names joined by dots."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in flatten(tree).items()}
