"""From a frozen torch model to a packed file: what it is, or why it cannot be packed, and its weights as codes.

Every property of timm's VisionTransformer that changes the forward is either recorded in `VitShape` or refused here by
name, so that the runtime never computes something else than the model that was trained.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from timm.data import resolve_model_data_config
from timm.layers import LayerNorm, Mlp, PatchEmbed
from timm.models.vision_transformer import Attention, Block, LayerScale, VisionTransformer
from torch import nn

from sparsemae.card import InputSpec, ModelCard
from sparsemae.packing.codec import encode_mask
from sparsemae.packing.format import LINEARS, Array, PackedModel, dense_shapes, to_bf16, write
from sparsemae.packing.metadata import PackedConfig, VitShape, parse_pattern
from sparsemae.packing.segmenter import KINDS, DenseHead

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
    card: ModelCard | None = None,
    dtype: Dtype = "bf16",
    patterns: Mapping[str, str] | None = None,
) -> PackReport:
    """Write a frozen N:M sparse timm VisionTransformer, or a segmenter with a light head, as one packed file.

    Args:
        card: what the file is to say of the model, see `PackedConfig`. Default: the input that timm says it has, no
            names of classes.
        dtype: of the sparse values; int8 has one scale per output row. Everything dense becomes bf16 (fp32 with fp32).
        patterns: layer name -> "n:m". Default: that of every frozen `NMLinear`.

    Returns:
        The sizes of its parts.

    Raises:
        ValueError: the architecture is not supported (what is named), a layer is not frozen, a weight is not N:M
            (layer, row, group), or NaN or infinite, or the card is that of another task, or of another size.
        OSError: the file cannot be written.
    """
    encoder, head = _parts(model)
    vit = vit_shape(encoder, segmenter=head is not None)
    patterns = _frozen_patterns(encoder) if patterns is None else patterns
    if not patterns:
        raise ValueError("pack: wanted a model with N:M sparse layers, got none")
    card = card or ModelCard("classify", "", {}, _input_spec(model, vit))
    task = "classify" if head is None else "segment"
    if card.task != task:
        raise ValueError(f"pack: card.task: wanted {task}, got {card.task}")
    masks = {
        name: module.weight_mask
        for name, module in encoder.named_modules()
        if isinstance(getattr(module, "weight_mask", None), torch.Tensor)
    }
    state = {name.removeprefix("encoder."): value for name, value in model.state_dict().items()}
    tensors: dict[str, Array] = {}
    dtypes: dict[str, str] = {}
    for name in dense_shapes(vit, head):
        layer = name.removesuffix(".weight")
        weight = state[name].detach().to("cpu", torch.float32).numpy()
        if not np.isfinite(weight).all():
            raise ValueError(f"pack: {name}: wanted finite values, got NaN or infinity")
        if layer in patterns:
            mask = masks[layer].cpu().numpy() if layer in masks else None
            _pack_layer(tensors, name, weight, mask, patterns[layer], dtype)
            dtypes[f"{name}.values"] = dtype
        else:
            dtypes[name] = "fp32" if dtype == "fp32" else "bf16"
            tensors[name] = weight if dtype == "fp32" else to_bf16(weight)
    write(path, PackedModel(PackedConfig(replace(card, patterns=dict(patterns)), vit, dtypes, head), tensors))
    dense = 4 * sum(int(np.prod(shape)) for shape in dense_shapes(vit, head).values())
    return _report(tensors, Path(path).stat().st_size, dense)


def require_light(kind: str) -> None:
    """Raises ValueError unless a packed file can hold a segmenter's head of that kind."""
    if kind not in KINDS:
        raise ValueError(
            f"pack: wanted a light head (trained with --head.kind {' or '.join(KINDS)}), got {kind}, which leaves by "
            "sparsemae export --to onnx"
        )


def _parts(model: Any) -> tuple[nn.Module, DenseHead | None]:
    """The ViT, which may be all of it, and of a segmenter its head."""
    if not hasattr(model, "decode_head"):
        return model, None
    require_light(model.head.kind)
    classes = model.decode_head.classifier.out_features
    return model.encoder, DenseHead(model.head.kind, model.head.width, classes, tuple(model.out_indices))


def vit_shape(model: nn.Module, segmenter: bool = False) -> VitShape:
    """What the runtime must know of a timm VisionTransformer, which may be a segmenter's encoder.

    Raises ValueError naming what it does not support.
    """
    if type(model) is not VisionTransformer:
        raise ValueError(f"pack: wanted timm's plain VisionTransformer, got {type(model).__name__}")
    _refuse_unsupported(model, segmenter)
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
        global_pool="" if segmenter else vit.global_pool,
        norm_eps=float(block.norm1.eps),
    )


def build_vit(vit: VitShape) -> VisionTransformer:
    """A timm ViT of a shape, its weights at random. Raises ValueError if timm has none that is so."""
    model = VisionTransformer(
        img_size=(vit.image_height, vit.image_width), patch_size=vit.patch_size, in_chans=vit.in_chans,
        num_classes=vit.num_classes, global_pool=vit.global_pool, embed_dim=vit.embed_dim, depth=vit.depth,
        num_heads=vit.num_heads, mlp_ratio=vit.mlp_hidden / vit.embed_dim, qkv_bias=vit.qkv_bias,
        proj_bias=vit.proj_bias, init_values=1.0 if vit.layer_scale else None, class_token=vit.class_token,
        no_embed_class=vit.no_embed_class, reg_tokens=vit.reg_tokens, pre_norm=vit.pre_norm,
        final_norm=vit.final_norm or vit.fc_norm, fc_norm=vit.fc_norm, pool_include_prefix=vit.pool_include_prefix,
        norm_layer=partial(LayerNorm, eps=vit.norm_eps),
    )  # fmt: skip
    if (built := vit_shape(model)) != vit:
        raise ValueError(f"wanted a ViT that timm can build, got {vit} (timm's: {built})")
    return model


def _input_spec(model: nn.Module, vit: VitShape) -> InputSpec:
    data = resolve_model_data_config(model)
    wanted = "a card, since a packed file's images are resized as they are and cropped at their center"
    _require(data["crop_mode"] == "center", "crop_mode", wanted, data["crop_mode"])
    return InputSpec(vit.image_height, data["mean"], data["std"], data["interpolation"], data["crop_pct"])


def _frozen_patterns(model: nn.Module) -> dict[str, str]:
    patterns = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and hasattr(module, "pattern"):
            if not isinstance(getattr(module, "weight_mask", None), torch.Tensor):
                raise ValueError(
                    f"pack: {name}: wanted a frozen mask, got one that follows the weight (call freeze first)"
                )
            patterns[name] = str(module.pattern)
    return patterns


def _pack_layer(
    tensors: dict[str, Array], name: str, weight: Array, mask: Array | None, pattern: str, dtype: Dtype
) -> None:
    n, m = parse_pattern(pattern)
    layer = name.removesuffix(".weight")
    if not layer.startswith("blocks.") or layer.split(".", 2)[-1] not in LINEARS:
        raise ValueError(f"pack: wanted only {', '.join(LINEARS)} of the blocks to be sparse, got {layer}")
    if weight.shape[1] % m:
        raise ValueError(f"pack: {layer}: wanted inputs of a multiple of the m of {pattern}, got {weight.shape[1]}")
    if mask is None:
        mask = _mask_of(weight, n, m, layer)
    elif (stray := (weight != 0) & ~mask).any():
        row, column = np.argwhere(stray)[0]
        raise ValueError(
            f"pack: {layer}: row {row}, group {column // m}: wanted 0 outside the mask, got {weight[row, column]}"
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
    if (bad := np.flatnonzero(counts > n)).size:
        row, group = divmod(int(bad[0]), weight.shape[1] // m)
        raise ValueError(
            f"pack: {layer}: row {row}, group {group}: wanted {n}:{m}, got {counts[bad[0]]} nonzero weights"
        )
    mask: NDArray[np.bool_] = np.zeros_like(kept)
    np.put_along_axis(mask, np.argsort(~kept, axis=1, kind="stable")[:, :n], True, axis=1)
    return mask.reshape(weight.shape)


def _require(holds: bool, where: str, wanted: str, got: object) -> None:
    if not holds:
        what = type(got).__name__ if isinstance(got, nn.Module) else got
        raise ValueError(f"pack: {where}: wanted {wanted}, got {what}")


def _refuse_unsupported(model: VisionTransformer, segmenter: bool) -> None:
    embed, head, pool = model.patch_embed, model.head, model.global_pool
    _require(
        type(embed) is PatchEmbed and isinstance(embed.norm, nn.Identity),
        "patch_embed", "PatchEmbed without norm", embed,
    )  # fmt: skip
    _require(embed.patch_size[0] == embed.patch_size[1], "patch_embed", "square patches", embed.patch_size)
    _require(
        embed.img_size is not None and (segmenter or not getattr(embed, "dynamic_img_pad", False)),
        "patch_embed", "a fixed image size without padding", f"img_size={embed.img_size}",
    )  # fmt: skip
    _require(model.pos_embed is not None, "pos_embed", "a position embedding", None)
    _require(model.attn_pool is None and pool in ("token", "avg", ""), "global_pool", "token, avg or ''", repr(pool))
    _require(isinstance(head, nn.Linear | nn.Identity), "head", "Linear or Identity", head)
    for name, module in (("head", head), ("fc_norm", model.fc_norm)):
        _require(pool != "" or isinstance(module, nn.Identity), name, "Identity, as nothing is pooled", module)
    check_blocks(model)
    first: Any = model.blocks[0]
    eps = first.norm1.eps
    for name, module in model.named_modules():
        if "norm" in name.rsplit(".", 1)[-1] and not isinstance(module, nn.Identity):
            _require(isinstance(module, nn.LayerNorm), name, "LayerNorm", module)
            _require(module.eps == eps and module.weight is not None, name, f"eps={eps} and a weight", str(module))


def check_blocks(model: VisionTransformer) -> None:
    """Raises ValueError, naming the block, if one computes what the runtime does not: it can be trained, not packed."""
    block: Any
    for i, block in enumerate(model.blocks):
        name = f"blocks.{i}"
        _require(type(block) is Block, name, "Block", block)
        attn, mlp = block.attn, block.mlp
        _require(type(attn) is Attention, f"{name}.attn", "Attention", attn)
        _require(
            isinstance(attn.q_norm, nn.Identity) and isinstance(attn.norm, nn.Identity),
            f"{name}.attn", "neither qk_norm nor scale_norm", "one of them",
        )  # fmt: skip
        _require(getattr(attn, "gate", None) is None, f"{name}.attn", "no gate", "one")
        _require(type(mlp) is Mlp and isinstance(mlp.norm, nn.Identity), f"{name}.mlp", "Mlp without norm", mlp)
        _require(
            isinstance(mlp.act, nn.GELU) and mlp.act.approximate == "none",
            f"{name}.mlp.act", "GELU, not approximated", str(mlp.act),
        )  # fmt: skip
        _require(
            attn.qkv.out_features == 3 * model.embed_dim,
            f"{name}.attn.qkv", f"{3 * model.embed_dim} outputs", attn.qkv.out_features,
        )  # fmt: skip


def _report(tensors: Mapping[str, Array], packed: int, dense: int) -> PackReport:
    parts: dict[str, int] = {}
    for name, tensor in tensors.items():
        if name.endswith((".codes", ".values", ".scale")):
            part = f"sparse {name.rsplit('.', 1)[1]}"
        elif name.startswith(("patch_embed", "head", "decode_head")):
            part = name.split(".")[0]
        elif "embed" in name or "token" in name:
            part = "embeddings and tokens"
        else:
            part = "dense linear" if name.startswith("blocks") and tensor.ndim > 1 else "norms and biases"
        parts[part] = parts.get(part, 0) + tensor.nbytes
    parts["metadata"] = packed - sum(parts.values())
    return PackReport(parts, packed, dense)
