"""The metadata of a packed file: what a model is, beside its weights, and how its JSON is read without trusting it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from sparsemae.packing.codec import MAX_GROUP

FORMAT = "sparsemae-packed"
VERSION = 1
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")


@dataclass(frozen=True)
class VitShape:
    """All that the forward of a plain pre-norm ViT depends on, beside its weights; timm's names where it has one."""

    embed_dim: int
    depth: int
    num_heads: int
    mlp_hidden: int
    patch_size: int
    image_height: int
    image_width: int
    in_chans: int
    num_classes: int
    """0: an encoder; the model returns the pooled features."""
    reg_tokens: int
    class_token: bool
    no_embed_class: bool
    """Positions are added to the patch tokens only."""
    pre_norm: bool
    final_norm: bool
    fc_norm: bool
    layer_scale: bool
    qkv_bias: bool
    proj_bias: bool
    """Of attn.proj, mlp.fc1 and mlp.fc2."""
    patch_bias: bool
    pool_include_prefix: bool
    global_pool: str
    """'token', 'avg', or '' (all tokens)."""
    norm_eps: float

    @property
    def prefix_tokens(self) -> int:
        return int(self.class_token) + self.reg_tokens

    @property
    def patches(self) -> int:
        return (self.image_height // self.patch_size) * (self.image_width // self.patch_size)

    @property
    def tokens(self) -> int:
        """L: prefix and patch tokens."""
        return self.prefix_tokens + self.patches


@dataclass(frozen=True)
class Preprocess:
    """timm's evaluation transform: resize the shorter side to input / crop_pct, crop the centre, normalise."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float
    exif_transpose: bool
    """Turn the image upright by its EXIF orientation first. timm does not: off agrees with its accuracy figures."""


@dataclass(frozen=True)
class PackedConfig:
    """The metadata of a packed file."""

    architecture: str
    """timm's model name."""
    overrides: dict[str, Any]
    """Arguments that differ from timm's defaults for that name."""
    vit: VitShape
    preprocess: Preprocess
    class_names: tuple[str, ...]
    """One per class, or none at all."""
    source: str
    """The run or checkpoint that was packed."""
    license: str
    patterns: dict[str, str]
    """Layer name (without `.weight`) -> 'n:m'."""
    dtypes: dict[str, str]
    """Stored tensor name -> 'fp32', 'bf16' or 'int8', for all but codes and scales."""


def parse_pattern(text: str) -> tuple[int, int]:
    """(n, m) of 'n:m', n kept of every m."""
    match = re.fullmatch(r"([0-9]{1,4}):([0-9]{1,4})", text)
    n, m = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= n <= m <= MAX_GROUP:
        raise ValueError(f"pattern must be 'n:m' with 1 <= n <= m <= {MAX_GROUP}, got {text!r}")
    return n, m


def read_metadata(metadata: dict[str, str] | None) -> PackedConfig:
    """The configuration that a file's metadata holds. Raises ValueError (or KeyError) where it is not one of ours."""
    if not metadata or metadata.get("format") != FORMAT:
        raise ValueError(f"its metadata does not say format {FORMAT!r}")
    version = metadata.get("version", "")
    if version != str(VERSION):
        newer = version.isdecimal() and int(version[:9]) > VERSION
        raise ValueError(
            f"format version must be {VERSION}, got {version[:20]!r}" + (": update sparsemae" if newer else "")
        )
    document = json.loads(metadata["config"])
    _check_keys("metadata", document, PackedConfig)
    vit = _read_vit(document["vit"])
    preprocess = _read_preprocess(document["preprocess"], vit.in_chans)
    for key in ("architecture", "source", "license"):
        _check_type(key, document[key], str)
    _check_type("overrides", document["overrides"], dict)
    names = document["class_names"]
    if (
        not isinstance(names, list)
        or not all(isinstance(n, str) for n in names)
        or len(names) not in (0, vit.num_classes)
    ):
        raise ValueError(f"class_names must be none or {vit.num_classes} strings")
    for key in ("patterns", "dtypes"):
        _check_type(key, document[key], dict)
        if not all(isinstance(value, str) for value in document[key].values()):
            raise ValueError(f"{key} must map names to strings")
    return PackedConfig(**(document | {"vit": vit, "preprocess": preprocess, "class_names": tuple(names)}))


_LIMITS = {
    "embed_dim": (1, 1 << 14),
    "depth": (1, 512),
    "num_heads": (1, 1 << 10),
    "mlp_hidden": (1, 1 << 17),
    "patch_size": (1, 1 << 10),
    "image_height": (1, 1 << 14),
    "image_width": (1, 1 << 14),
    "in_chans": (1, 64),
    "num_classes": (0, 1 << 20),
    "reg_tokens": (0, 1 << 10),
}


def _read_vit(document: Any) -> VitShape:
    _check_keys("vit", document, VitShape)
    for key, (low, high) in _LIMITS.items():
        _check_type(key, document[key], int)
        if not low <= document[key] <= high:
            raise ValueError(f"{key} must be in [{low}, {high}], got {document[key]}")
    for field in fields(VitShape):
        if field.type == "bool":
            _check_type(field.name, document[field.name], bool)
    _check_type("norm_eps", document["norm_eps"], float)
    vit = VitShape(**document)
    if vit.global_pool not in ("token", "avg", "") or (vit.global_pool == "token" and not vit.class_token):
        raise ValueError(f"global_pool must be avg, '', or token with a class token, got {vit.global_pool!r}")
    if vit.global_pool == "" and vit.num_classes:
        raise ValueError("a classifier must have a global_pool")
    if vit.embed_dim % vit.num_heads or vit.image_height % vit.patch_size or vit.image_width % vit.patch_size:
        raise ValueError("embed_dim must be a multiple of num_heads, and the image sides of patch_size")
    if not 0.0 < vit.norm_eps < 1.0:
        raise ValueError(f"norm_eps must be in (0, 1), got {vit.norm_eps}")
    return vit


def _read_preprocess(document: Any, channels: int) -> Preprocess:
    _check_keys("preprocess", document, Preprocess)
    for key in ("mean", "std"):
        values = document[key]
        if not isinstance(values, list) or len(values) != channels or not all(type(v) is float for v in values):
            raise ValueError(f"{key} must be {channels} numbers")
        if not np.isfinite(values).all() or (key == "std" and min(values) <= 0):
            raise ValueError(f"{key} must be finite, and std positive, got {values}")
    _check_type("crop_pct", document["crop_pct"], float)
    _check_type("exif_transpose", document["exif_transpose"], bool)
    if document["interpolation"] not in INTERPOLATIONS or not 0.1 <= document["crop_pct"] <= 1.0:
        raise ValueError("interpolation or crop_pct is not one that the runtime knows")
    return Preprocess(**(document | {"mean": tuple(document["mean"]), "std": tuple(document["std"])}))


def _check_keys(where: str, document: Any, kind: type) -> None:
    _check_type(where, document, dict)
    if set(document) != (names := {field.name for field in fields(kind)}):
        raise ValueError(f"{where} must have exactly the fields {', '.join(sorted(names))}")


def _check_type(key: str, value: Any, kind: type) -> None:
    if type(value) is not kind:
        raise ValueError(f"{key} must be {kind.__name__}, got {type(value).__name__}")
