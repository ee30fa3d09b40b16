"""Building timm ViTs from a configuration: the encoder of both stages, and the classifier."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import timm
from timm.models import is_model_in_modules
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from sparsemae.limits import BELOW_1, check_limits

ARGUMENTS = inspect.signature(VisionTransformer).parameters.keys()
"""What ``model.args`` may name; timm's factory would take more, and read or fetch weights."""


@dataclass
class ModelConfig:
    """The vision transformer."""

    name: str = "vit_base_patch16_224"
    """Any timm VisionTransformer."""
    args: dict[str, Any] = field(default_factory=dict)
    """Arguments of timm's constructor that differ, for example {depth: 4, embed_dim: 128}."""
    drop_path: float = 0.1
    """Stochastic depth of the last block, 0 to below 1; linear from 0 at the first."""

    def __post_init__(self) -> None:
        check_limits(self, "model.", drop_path=BELOW_1)


def build_vit(model: ModelConfig, img_size: int, num_classes: int = 0) -> VisionTransformer:
    """A timm ViT without weights: an encoder with its ``norm``, or with ``num_classes`` a mean-pooled classifier.

    The classifier has MAE's finetuning head: average of the patch tokens, ``fc_norm``, head of standard deviation 2e-5.
    Raises ValueError on an unknown name or argument, or an image smaller than a patch.
    """
    if not timm.is_model(model.name):
        raise ValueError(f"model.name: wanted a timm model, got {model.name!r}")
    if not is_model_in_modules(model.name, ("vision_transformer", "deit")):
        raise ValueError(f"model.name: wanted a timm VisionTransformer, got {model.name}")
    if foreign := sorted(model.args.keys() - ARGUMENTS):
        raise ValueError(f"model.args: {model.name} does not take {model.args}: has no {', '.join(foreign)}")
    args = {"img_size": img_size, "drop_path_rate": model.drop_path, **model.args}
    patch = args.get("patch_size") or _patch_size(model.name)
    if patch is not None and img_size < patch:
        raise ValueError(f"data.img_size: wanted at least one patch of {patch} px, got {img_size} px")
    if patch is not None and img_size % patch:
        raise ValueError(f"data.img_size: wanted a multiple of the patch, {patch} px, got {img_size} px")
    if num_classes:
        args.setdefault("global_pool", "avg")
    try:
        vit = timm.create_model(model.name, num_classes=num_classes, **args)
    except (TypeError, AssertionError) as error:
        raise ValueError(f"model.args: {model.name} does not take {model.args}: {error}") from error
    assert isinstance(vit, VisionTransformer)
    if num_classes:
        nn.init.trunc_normal_(vit.head.weight, std=2e-5)
        nn.init.zeros_(vit.head.bias)
    return vit


def _patch_size(name: str) -> int | None:
    """Patch side that timm's name states (``vit_base_patch16_224``), in pixels."""
    for part in name.split("_"):
        if part.startswith("patch") and part[5:].isdigit():
            return int(part[5:])
    return None
