"""From a frozen torch model to a packed file: what it is, or why it cannot be packed, and its weights as codes.

Every property of timm's VisionTransformer that changes the forward is either recorded in `VitShape` or refused here by
name, so that the runtime never computes something else than the model that was trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from timm.layers import Mlp, PatchEmbed
from timm.models.vision_transformer import Attention, Block, LayerScale, VisionTransformer
from torch import nn

from sparsemae.packing.codec import encode_mask
from sparsemae.packing.format import (
    LINEARS,
    Array,
    PackedConfig,
    PackedModel,
    Preprocess,
    VitShape,
    dense_shapes,
    parse_pattern,
    to_bf16,
    write,
)

Dtype = Literal["bf16", "fp32", "int8"]


@dataclass(frozen=True)
class PackReport:
    """What a packed file is made of, in bytes."""

    parts: dict[str, int]
    """Part -> bytes; they add up to `packed`."""
    packed: int
    """The file."""
    dense: int
    """All parameters in float32."""

    def __str__(self) -> str:
        lines = [f"{part:<22}{size / 1e6:9.3f} MB" for part, size in self.parts.items()]
        ratio = f"{self.dense / self.packed:.1f}x smaller than {self.dense / 1e6:.3f} MB of dense fp32"
        return "\n".join([*lines, f"{'packed file':<22}{self.packed / 1e6:9.3f} MB, {ratio}"])


def pack(
    model: nn.Module,
    path: str | Path,
    preprocess: Preprocess,
    dtype: Dtype = "bf16",
    patterns: Mapping[str, str] | None = None,
    architecture: str = "",
    overrides: Mapping[str, Any] | None = None,
    class_names: Sequence[str] = (),
    source: str = "",
    license: str = "",
) -> PackReport:
    """Write a frozen N:M sparse timm VisionTransformer as one packed file.

    Args:
        dtype: of the sparse values; int8 has one scale per output row. Everything dense becomes bf16 (fp32 with fp32).
        patterns: layer name -> "n:m". Default: that of every frozen `NMLinear`.
        architecture: timm's model name, with `overrides` of its arguments; recorded, not used.

    Returns:
        The sizes of its parts.

    Raises:
        ValueError: the architecture is not supported (what is named), a layer is not frozen, a weight is not N:M
            (layer, row, group), or NaN or infinite.
    """
    vit = vit_shape(model)
    if patterns is None:
        patterns = _frozen_patterns(model)
    if not patterns:
        raise ValueError("pack: no layer of the model is N:M sparse")
    masks = {
        name: module.weight_mask
        for name, module in model.named_modules()
        if isinstance(getattr(module, "weight_mask", None), torch.Tensor)
    }
    state = model.state_dict()
    tensors: dict[str, Array] = {}
    dtypes: dict[str, str] = {}
    for name in dense_shapes(vit):
        layer = name.removesuffix(".weight")
        weight = state[name].detach().to("cpu", torch.float32).numpy()
        if not np.isfinite(weight).all():
            raise ValueError(f"{name} holds NaN or infinite values")
        if layer in patterns:
            mask = masks[layer].cpu().numpy() if layer in masks else None
            _pack_layer(tensors, name, weight, mask, patterns[layer], dtype)
            dtypes[f"{name}.values"] = dtype
        else:
            dtypes[name] = "fp32" if dtype == "fp32" else "bf16"
            tensors[name] = weight if dtype == "fp32" else to_bf16(weight)
    config = PackedConfig(
        architecture,
        dict(overrides or {}),
        vit,
        preprocess,
        tuple(class_names),
        source,
        license,
        dict(patterns),
        dtypes,
    )
    write(path, PackedModel(config, tensors))
    dense = 4 * sum(int(np.prod(shape)) for shape in dense_shapes(vit).values())
    return _report(tensors, Path(path).stat().st_size, dense)


def vit_shape(model: nn.Module) -> VitShape:
    """What the runtime must know of a timm VisionTransformer. Raises ValueError naming what it does not support."""
    if type(model) is not VisionTransformer:
        raise ValueError(f"pack: {type(model).__name__} is not supported, only timm's plain VisionTransformer")
    _refuse_unsupported(model)
    vit: Any = model
    block, embed = vit.blocks[0], vit.patch_embed
    return VitShape(
        embed_dim=vit.embed_dim,
        depth=len(vit.blocks),
        num_heads=block.attn.num_heads,
        mlp_hidden=block.mlp.fc1.out_features,
        patch_size=embed.patch_size[0],
        image_height=embed.img_size[0],
        image_width=embed.img_size[1],
        in_chans=embed.proj.in_channels,
        num_classes=vit.head.out_features if isinstance(vit.head, nn.Linear) else 0,
        reg_tokens=vit.num_reg_tokens,
        class_token=vit.cls_token is not None,
        no_embed_class=vit.no_embed_class,
        pre_norm=not isinstance(vit.norm_pre, nn.Identity),
        final_norm=not isinstance(vit.norm, nn.Identity),
        fc_norm=not isinstance(vit.fc_norm, nn.Identity),
        layer_scale=isinstance(block.ls1, LayerScale),
        qkv_bias=block.attn.qkv.bias is not None,
        proj_bias=block.attn.proj.bias is not None,
        patch_bias=embed.proj.bias is not None,
        pool_include_prefix=vit.pool_include_prefix,
        global_pool=vit.global_pool,
        norm_eps=float(block.norm1.eps),
    )


def _frozen_patterns(model: nn.Module) -> dict[str, str]:
    patterns = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and hasattr(module, "pattern"):
            if not isinstance(getattr(module, "weight_mask", None), torch.Tensor):
                raise ValueError(f"pack: {name} is not frozen: its mask still follows the weight (call freeze first)")
            patterns[name] = str(module.pattern)
    return patterns


def _pack_layer(
    tensors: dict[str, Array], name: str, weight: Array, mask: Array | None, pattern: str, dtype: Dtype
) -> None:
    n, m = parse_pattern(pattern)
    layer = name.removesuffix(".weight")
    if not layer.startswith("blocks.") or layer.split(".", 2)[-1] not in LINEARS:
        raise ValueError(f"pack: {layer} cannot be sparse, only {', '.join(LINEARS)} of the blocks")
    if weight.shape[1] % m:
        raise ValueError(f"pack: {layer} has {weight.shape[1]} inputs, no multiple of the m of {pattern}")
    if mask is None:
        mask = _mask_of(weight, n, m, layer)
    elif (stray := (weight != 0) & ~mask).any():
        row, column = np.argwhere(stray)[0]
        raise ValueError(
            f"pack: {layer} is not {pattern}: row {row}, group {column // m} has a weight outside its mask"
        )
    try:
        tensors[f"{name}.codes"] = encode_mask(mask, n, m)
    except ValueError as error:
        raise ValueError(f"pack: {layer}: {error}") from None
    values = weight[mask].reshape(len(weight), -1)
    if dtype == "int8":
        largest = np.abs(values).max(axis=1)
        scale = np.where(largest > 0, largest / 127, 1).astype(np.float32)
        tensors[f"{name}.scale"] = scale
        tensors[f"{name}.values"] = np.clip(np.rint(values / scale[:, None]), -127, 127).astype(np.int8)
    else:
        tensors[f"{name}.values"] = to_bf16(values) if dtype == "bf16" else values


def _mask_of(weight: Array, n: int, m: int, layer: str) -> NDArray[np.bool_]:
    """The weights that are not zero; where a group has fewer than n, its first zeros are kept too."""
    kept = (weight != 0).reshape(-1, m)
    counts = kept.sum(axis=1)
    if (counts > n).any():
        bad = int(np.flatnonzero(counts > n)[0])
        row, group = divmod(bad, weight.shape[1] // m)
        raise ValueError(
            f"pack: {layer} is not {n}:{m}: row {row}, group {group} has {counts[bad]} weights that are not zero"
        )
    order = np.argsort(~kept, axis=1, kind="stable")[:, :n]
    mask: NDArray[np.bool_] = np.zeros_like(kept)
    np.put_along_axis(mask, order, True, axis=1)
    return mask.reshape(weight.shape)


def _refuse_unsupported(model: VisionTransformer) -> None:
    def require(holds: bool, what: str) -> None:
        if not holds:
            raise ValueError(f"pack: {what} is not supported")

    embed = model.patch_embed
    require(
        type(embed) is PatchEmbed and isinstance(embed.norm, nn.Identity), f"patch embedding {type(embed).__name__}"
    )
    require(embed.patch_size[0] == embed.patch_size[1], f"patch size {embed.patch_size}")
    require(
        embed.img_size is not None and not getattr(embed, "dynamic_img_pad", False), "a padded or unknown image size"
    )
    require(model.pos_embed is not None, "a model without position embedding")
    require(model.attn_pool is None and model.global_pool in ("token", "avg", ""), f"global_pool {model.global_pool!r}")
    require(isinstance(model.head, nn.Linear | nn.Identity), f"head {type(model.head).__name__}")
    require(model.global_pool != "" or isinstance(model.head, nn.Identity), "a head without pooling")
    first: Any = model.blocks[0]
    eps = first.norm1.eps
    for name, module in model.named_modules():
        if "norm" in name.rsplit(".", 1)[-1] and not isinstance(module, nn.Identity):
            require(isinstance(module, nn.LayerNorm), f"{name}: {type(module).__name__}")
            require(module.eps == eps and module.weight is not None, f"{name}: another eps or no weight")
    block: Any
    for i, block in enumerate(model.blocks):
        attn, mlp = block.attn, block.mlp
        require(type(block) is Block, f"blocks.{i}: {type(block).__name__}")
        require(type(attn) is Attention, f"blocks.{i}.attn: {type(attn).__name__}")
        require(
            isinstance(attn.q_norm, nn.Identity) and isinstance(attn.norm, nn.Identity),
            f"blocks.{i}.attn: qk_norm or scale_norm",
        )
        require(getattr(attn, "gate", None) is None, f"blocks.{i}.attn: gated attention")
        require(type(mlp) is Mlp and isinstance(mlp.norm, nn.Identity), f"blocks.{i}.mlp: {type(mlp).__name__}")
        require(isinstance(mlp.act, nn.GELU) and mlp.act.approximate == "none", f"blocks.{i}.mlp.act: {mlp.act}")
        require(attn.qkv.out_features == 3 * model.embed_dim, f"blocks.{i}.attn: heads of another width")


def _report(tensors: Mapping[str, Array], packed: int, dense: int) -> PackReport:
    parts: dict[str, int] = {}
    for name, tensor in tensors.items():
        if name.endswith((".codes", ".values", ".scale")):
            part = f"sparse {name.rsplit('.', 1)[1]}"
        elif name.startswith(("patch_embed", "head")):
            part = name.split(".")[0]
        elif "embed" in name or "token" in name:
            part = "positions and tokens"
        else:
            part = "dense linear" if name.startswith("blocks") and tensor.ndim > 1 else "norms and biases"
        parts[part] = parts.get(part, 0) + tensor.nbytes
    parts["metadata"] = packed - sum(parts.values())
    return PackReport(parts, packed, dense)
