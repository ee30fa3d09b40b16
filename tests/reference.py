"""A slow twin of the whole packed forward, in numpy and float64, and random packed models to hold against it."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from sparsemae.card import InputSpec, ModelCard
from sparsemae.packing.codec import encode_mask
from sparsemae.packing.format import LINEARS, PackedModel, dense_shapes, to_bf16, to_bytes, unpack
from sparsemae.packing.metadata import PackedConfig, VitShape, parse_pattern
from sparsemae.packing.segmenter import DenseHead
from sparsemae.runtime.native import Vit

TINY = VitShape(
    embed_dim=64,
    depth=2,
    num_heads=2,
    mlp_hidden=128,
    patch_size=4,
    image_height=16,
    image_width=16,
    in_chans=3,
    num_classes=10,
    reg_tokens=0,
    class_token=True,
    no_embed_class=False,
    pre_norm=False,
    final_norm=False,
    fc_norm=True,
    layer_scale=False,
    qkv_bias=True,
    proj_bias=True,
    patch_bias=True,
    pool_include_prefix=False,
    global_pool="avg",
    norm_eps=1e-6,
)


def vit_shape(**changes: object) -> VitShape:
    return replace(TINY, **changes)  # type: ignore[arg-type]


def native(model: PackedModel, threads: int = 1, isa: str = "", quantize: bool | None = True) -> Vit:
    """The same in the native library."""
    return Vit(to_bytes(model), threads, isa, quantize)


def random_model(
    vit: VitShape, pattern: str | None = "2:32", dtype: str = "bf16", dense: str = "fp32", seed: int = 0,
    head: DenseHead | None = None,
) -> PackedModel:  # fmt: skip
    """Random weights of a size that keeps every layer's output near 1. `pattern` None: nothing is sparse."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}
    dtypes, patterns = {}, {}
    for name, shape in dense_shapes(vit, head).items():
        layer = name.removesuffix(".weight")
        weight = rng.standard_normal(shape, np.float32)
        if pattern and name.endswith(tuple(f"{x}.weight" for x in LINEARS)):
            n, m = parse_pattern(pattern)
            rows, columns = shape
            order = np.argsort(rng.random((rows * columns // m, m)), axis=1)
            mask = (order < n).reshape(rows, columns)
            values = (weight[mask] / math.sqrt(columns * n / m)).reshape(rows, -1).astype(np.float32)
            patterns[layer] = pattern
            dtypes[f"{name}.values"] = dtype
            tensors[f"{name}.codes"] = encode_mask(mask, n, m)
            if dtype == "int8":
                scale = np.abs(values).max(axis=1) / 127
                tensors[f"{name}.scale"] = scale.astype(np.float32)
                values = np.rint(values / scale[:, None]).astype(np.int8)
            tensors[f"{name}.values"] = to_bf16(values) if dtype == "bf16" else values
            continue
        if len(shape) > 1 and name.endswith(".weight"):
            weight /= math.sqrt(math.prod(shape[1:]))
        elif name.endswith(("norm1.weight", "norm2.weight", "norm.weight", "norm_pre.weight")):
            weight = 1 + 0.1 * weight
        else:
            weight *= 0.5
        dtypes[name] = dense
        tensors[name] = to_bf16(weight) if dense == "bf16" else weight
    spec = InputSpec(vit.image_height, (0.5,) * vit.in_chans, (0.25,) * vit.in_chans, crop_pct=0.875)
    card = ModelCard("classify", "vit_test", {}, spec, (), patterns, frozen=True, source="random", license="Apache-2.0")
    return PackedModel(PackedConfig(card, vit, dtypes, head), tensors)


def random_segmenter(kind: str, dtype: str = "bf16") -> PackedModel:
    """Of 5 classes and windows of 16 px, at random."""
    vit = vit_shape(num_classes=0, fc_norm=False, global_pool="", final_norm=kind == "linear", depth=4)
    model = random_model(vit, dtype=dtype, head=DenseHead(kind, 32, 5, (0, 1, 2, 3)))
    model.tensors["pos_embed"] *= 4  # tokens of several classes
    model.tensors["decode_head.classifier.bias"] *= 0
    card = model.config.card
    settings = {
        "head": {"kind": kind, "width": 32}, "out_indices": [0, 1, 2, 3], "palette": [[i, i, i] for i in range(5)],
        "inference": {"mode": "slide", "stride": 11, "scales": [1.0], "flip": False}, "reduce_zero_label": False,
    }  # fmt: skip
    names = tuple(f"class {i}" for i in range(5))
    spec = replace(card.input, short_side=16, long_side=40)
    card = replace(card, task="segment", settings=settings, input=spec, class_names=names)
    return PackedModel(replace(model.config, card=card), model.tensors)


def forward(model: PackedModel, images: np.ndarray, features: bool = False) -> np.ndarray:
    """The forward of timm's VisionTransformer in float64."""
    vit = model.config.vit
    w = {name: weight.astype(np.float64) for name, weight in unpack(model).items()}
    b, c, height, width = images.shape
    p, d = vit.patch_size, vit.embed_dim
    cut = images.astype(np.float64).reshape(b, c, height // p, p, width // p, p).transpose(0, 2, 4, 1, 3, 5)
    x = cut.reshape(b, -1, c * p * p) @ w["patch_embed.proj.weight"].reshape(d, -1).T + w.get(
        "patch_embed.proj.bias", 0.0
    )
    prefix = [np.broadcast_to(w[name], (b, *w[name].shape[1:])) for name in ("cls_token", "reg_token") if name in w]
    if vit.no_embed_class:
        x = np.concatenate([*prefix, x + w["pos_embed"]], axis=1)
    else:
        x = np.concatenate([*prefix, x], axis=1) + w["pos_embed"]
    if vit.pre_norm:
        x = _norm(x, w, "norm_pre", vit)
    for i in range(vit.depth):
        block = f"blocks.{i}"
        x = x + _attention(_norm(x, w, f"{block}.norm1", vit), w, f"{block}.attn", vit) * w.get(
            f"{block}.ls1.gamma", 1.0
        )
        h = _linear(_norm(x, w, f"{block}.norm2", vit), w, f"{block}.mlp.fc1")
        h = h * 0.5 * (1 + np.vectorize(math.erf)(h / math.sqrt(2)))
        x = x + _linear(h, w, f"{block}.mlp.fc2") * w.get(f"{block}.ls2.gamma", 1.0)
    if vit.final_norm:
        x = _norm(x, w, "norm", vit)
    if features or vit.global_pool == "":
        return x
    first = 0 if vit.pool_include_prefix else vit.prefix_tokens
    pooled = x[:, first:].mean(axis=1) if vit.global_pool == "avg" else x[:, 0]
    if vit.fc_norm:
        pooled = _norm(pooled, w, "fc_norm", vit)
    return _linear(pooled, w, "head") if vit.num_classes else np.asarray(pooled)


def _linear(x: np.ndarray, w: dict[str, np.ndarray], name: str) -> np.ndarray:
    return np.asarray(x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0))


def _norm(x: np.ndarray, w: dict[str, np.ndarray], name: str, vit: VitShape) -> np.ndarray:
    centered = x - x.mean(axis=-1, keepdims=True)
    scale = np.sqrt((centered**2).mean(axis=-1, keepdims=True) + vit.norm_eps)
    return np.asarray(centered / scale * w[f"{name}.weight"] + w[f"{name}.bias"])


def _attention(x: np.ndarray, w: dict[str, np.ndarray], name: str, vit: VitShape) -> np.ndarray:
    b, tokens, d = x.shape
    qkv = _linear(x, w, f"{name}.qkv").reshape(b, tokens, 3, vit.num_heads, -1).transpose(2, 0, 3, 1, 4)
    scores = qkv[0] @ qkv[1].swapaxes(-1, -2) / math.sqrt(d // vit.num_heads)
    scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
    out = (scores / scores.sum(axis=-1, keepdims=True)) @ qkv[2]
    return _linear(out.transpose(0, 2, 1, 3).reshape(b, tokens, d), w, f"{name}.proj")
