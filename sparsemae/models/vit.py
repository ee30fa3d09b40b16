"""Building timm ViTs: the encoder of both stages, and the classifier."""

import inspect
from collections.abc import Mapping
from typing import Any

import timm
from timm.models import is_model_in_modules
from timm.models.vision_transformer import VisionTransformer
from torch import nn

ARGUMENTS = inspect.signature(VisionTransformer).parameters.keys() - {
    "img_size", "in_chans", "num_classes", "drop_path_rate", "device", "dtype",
}  # fmt: skip
"""What ``model.args`` may name, which a file's card has too: not what follows from other options, and nothing more of
timm's factory, which would read or fetch weights."""


def build_vit(
    name: str, model_args: Mapping[str, Any], img_size: int, num_classes: int = 0, drop_path: float = 0.0
) -> VisionTransformer:
    """A timm ViT without weights: an encoder with its ``norm``, or with ``num_classes`` a mean-pooled classifier.

    The classifier has MAE's finetuning head: average of the patch tokens, ``fc_norm``, head of standard deviation 2e-5.
    Raises ValueError on an unknown name or argument, or an image smaller than a patch.
    """
    if not timm.is_model(name):
        raise ValueError(f"model.name: wanted a timm model, got {name!r}")
    if not is_model_in_modules(name, ("vision_transformer", "deit")):
        raise ValueError(f"model.name: wanted a timm VisionTransformer, got {name}")
    if foreign := sorted(model_args.keys() - ARGUMENTS):
        raise ValueError(f"model.args: {name} does not take {model_args}: has no {', '.join(foreign)}")
    patch = model_args.get("patch_size", _patch_size(name))
    numbers = [patch, *(value for value in model_args.values() if isinstance(value, int | float))]
    if not isinstance(patch, int | None) or any(number is not None and number < 0 for number in numbers):
        raise ValueError(f"model.args: {name} does not take {model_args}: wanted sides and sizes of 0 or more")
    args = {"img_size": img_size, "drop_path_rate": drop_path, **model_args}
    if patch and img_size < patch:
        raise ValueError(f"data.img_size: wanted at least one patch of {patch} px, got {img_size} px")
    if patch and img_size % patch:
        raise ValueError(f"data.img_size: wanted a multiple of the patch, {patch} px, got {img_size} px")
    if num_classes and not args.setdefault("global_pool", "avg"):
        raise ValueError("model.args: global_pool: wanted one for a classifier, got none")
    try:
        vit = timm.create_model(name, num_classes=num_classes, **args)
    except Exception as error:  # of wrong ones timm and torch raise what comes
        raise ValueError(f"model.args: {name} does not take {model_args}: {error or type(error).__name__}") from error
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


def patch_side(vit: VisionTransformer) -> int:
    """The longer side of a patch, px."""
    return int(max(vit.patch_embed.patch_size))


def use_plain_attention(model: nn.Module) -> None:
    """torch's fused attention takes 3 to 15 times as long as its own matrix products in bf16 on a CPU."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # type: ignore[assignment]
