"""The packed file: one safetensors file that holds a frozen N:M vision transformer, ready for the runtime.

What a reader would not guess:
- A sparse weight `L.weight` is stored as `L.weight.codes` (which n of every m are kept, see `codec`), `L.weight.values` [O, I * n / m]
  and, for int8, `L.weight.scale` [O]. Everything else keeps timm's name and shape.
- bf16 is stored as U16 bit patterns, because safetensors' numpy reader has no bfloat16; what a U16 tensor means is said by `dtypes`.
- The metadata is one JSON document; every tensor's name and shape follows from it, so a file is right as a whole or it is refused.
  Reading never trusts a number of the file before it is checked: a damaged or hostile file is a one-line ValueError.
- Nothing here imports torch; the layout of the kernels is made at load and never stored. The full specification: docs/packed-format.md.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from sparsemae.packing.codec import MAX_GROUP, code_bytes, decode_mask

FORMAT = "sparsemae-packed"
VERSION = 1
DTYPES = {"fp32": np.dtype(np.float32), "bf16": np.dtype(np.uint16), "int8": np.dtype(np.int8)}
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")
LINEARS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
"""The four linear layers of a block, the only ones that may be sparse."""

Array = NDArray[Any]


@dataclass(frozen=True)
class VitShape:
    """All that the forward of a plain pre-norm ViT depends on, beside its weights. The names are timm's where timm has one."""

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


@dataclass(frozen=True)
class PackedModel:
    """A packed file in memory: its metadata and its tensors as stored."""

    config: PackedConfig
    tensors: dict[str, Array]


def parse_pattern(text: str) -> tuple[int, int]:
    """(n, m) of 'n:m', n kept of every m."""
    match = re.fullmatch(r"([0-9]{1,4}):([0-9]{1,4})", text)
    n, m = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= n <= m <= MAX_GROUP:
        raise ValueError(f"pattern must be 'n:m' with 1 <= n <= m <= {MAX_GROUP}, got {text!r}")
    return n, m


def to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Bit patterns of the nearest bfloat16 (ties to even), as torch rounds. Values must be finite."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """The float32 with those upper 16 bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def dense_shapes(vit: VitShape) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of the dense model, by timm's name."""
    d, hidden = vit.embed_dim, vit.mlp_hidden
    shapes: dict[str, tuple[int, ...]] = {"patch_embed.proj.weight": (d, vit.in_chans, vit.patch_size, vit.patch_size)}
    shapes["pos_embed"] = (1, vit.patches if vit.no_embed_class else vit.tokens, d)
    if vit.patch_bias:
        shapes["patch_embed.proj.bias"] = (d,)
    if vit.class_token:
        shapes["cls_token"] = (1, 1, d)
    if vit.reg_tokens:
        shapes["reg_token"] = (1, vit.reg_tokens, d)
    norms = [
        name for name, used in (("norm_pre", vit.pre_norm), ("norm", vit.final_norm), ("fc_norm", vit.fc_norm)) if used
    ]
    for i in range(vit.depth):
        block = f"blocks.{i}"
        norms += [f"{block}.norm1", f"{block}.norm2"]
        for layer, rows, columns, bias in (
            ("attn.qkv", 3 * d, d, vit.qkv_bias),
            ("attn.proj", d, d, vit.proj_bias),
            ("mlp.fc1", hidden, d, vit.proj_bias),
            ("mlp.fc2", d, hidden, vit.proj_bias),
        ):
            shapes[f"{block}.{layer}.weight"] = (rows, columns)
            if bias:
                shapes[f"{block}.{layer}.bias"] = (rows,)
        if vit.layer_scale:
            shapes[f"{block}.ls1.gamma"] = shapes[f"{block}.ls2.gamma"] = (d,)
    for norm in norms:
        shapes[f"{norm}.weight"] = shapes[f"{norm}.bias"] = (d,)
    if vit.num_classes:
        shapes["head.weight"], shapes["head.bias"] = (vit.num_classes, d), (vit.num_classes,)
    return shapes


def stored_shapes(config: PackedConfig) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    """Shape and numpy type of every tensor of the file. Raises ValueError where the metadata contradicts itself."""
    stored: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {}
    shapes = dense_shapes(config.vit)
    sparse_names = {f"blocks.{i}.{layer}" for i in range(config.vit.depth) for layer in LINEARS}
    if extra := sorted(set(config.patterns) - sparse_names):
        raise ValueError(f"layer {extra[0]!r} cannot be sparse")
    for name, shape in shapes.items():
        pattern = config.patterns.get(name.removesuffix(".weight"))
        if pattern is None:
            dtype = config.dtypes.get(name)
            if dtype not in ("fp32", "bf16"):
                raise ValueError(f"dtype of {name} must be fp32 or bf16, got {dtype!r}")
            stored[name] = shape, DTYPES[dtype]
            continue
        n, m = parse_pattern(pattern)
        rows, columns = shape
        if columns % m:
            raise ValueError(f"{name} has rows of {columns}, no multiple of the m of its pattern {pattern}")
        dtype = config.dtypes.get(f"{name}.values")
        if dtype not in DTYPES:
            raise ValueError(f"dtype of {name}.values must be one of {', '.join(DTYPES)}, got {dtype!r}")
        stored[f"{name}.codes"] = (code_bytes(rows * columns // m, n, m),), np.dtype(np.uint8)
        stored[f"{name}.values"] = (rows, columns // m * n), DTYPES[dtype]
        if dtype == "int8":
            stored[f"{name}.scale"] = (rows,), np.dtype(np.float32)
    if extra := sorted(set(config.dtypes) - set(stored)):
        raise ValueError(f"dtype given for {extra[0]!r}, which the model does not have")
    return stored


def write(path: str | Path, model: PackedModel) -> None:
    """Write a packed file: to a temporary name beside it, then renamed, so that no torn file is ever seen.

    Raises:
        ValueError: the tensors do not fit the metadata.
    """
    path = Path(path)
    _check(model)
    metadata = {"format": FORMAT, "version": str(VERSION), "config": json.dumps(asdict(model.config))}
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        save_file({name: np.ascontiguousarray(t) for name, t in model.tensors.items()}, partial, metadata=metadata)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read(path: str | Path) -> PackedModel:
    """Read and check a packed file.

    The codes themselves are checked where they are decoded (the native library, or `unpack`).

    Raises:
        ValueError: not a packed file, damaged, or of a newer version; one line that names the file.
        OSError: the file cannot be opened.
    """
    path = Path(path)
    with path.open("rb"):  # a missing or unreadable file is an OSError of its own
        pass
    try:
        with safe_open(path, framework="numpy") as file:
            config = _read_metadata(file.metadata())
            wanted = stored_shapes(config)
            _check_names(set(file.keys()), set(wanted))
            tensors = {}
            for name, (shape, dtype) in wanted.items():
                if tuple(file.get_slice(name).get_shape()) != shape:
                    raise ValueError(f"{name} must be {list(shape)}, got {file.get_slice(name).get_shape()}")
                tensors[name] = file.get_tensor(name)
        model = PackedModel(config, tensors)
        _check(model)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, SafetensorError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path}: not a usable packed model: {reason[:300]}") from None
    return model


def is_packed(path: str | Path) -> bool:
    """Whether a file says of itself that it is a packed model; `read` tells whether it is a usable one."""
    try:
        with safe_open(Path(path), framework="numpy") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except (OSError, SafetensorError):
        return False


def unpack(model: PackedModel) -> dict[str, NDArray[np.float32]]:
    """The dense masked weights, float32, by timm's names. Exact for fp32, and for bf16 of weights that were bf16.

    Raises:
        ValueError: a code is out of range.
    """
    weights = {}
    for name, shape in dense_shapes(model.config.vit).items():
        pattern = model.config.patterns.get(name.removesuffix(".weight"))
        if pattern is None:
            stored = model.tensors[name]
            weights[name] = stored if stored.dtype == np.float32 else from_bf16(stored)
            continue
        try:
            mask = decode_mask(model.tensors[f"{name}.codes"], *shape, *parse_pattern(pattern))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        values = model.tensors[f"{name}.values"]
        if values.dtype == np.uint16:
            values = from_bf16(values)
        elif values.dtype == np.int8:
            values = values * model.tensors[f"{name}.scale"][:, None]
        weights[name] = np.zeros(shape, np.float32)
        weights[name][mask] = values.ravel()
    return weights


def _check_names(got: set[str], wanted: set[str]) -> None:
    if missing := sorted(wanted - got):
        raise ValueError(f"tensor {missing[0]} is missing")
    if extra := sorted(got - wanted):
        raise ValueError(f"tensor {extra[0]} is not part of the model")


def _check(model: PackedModel) -> None:
    wanted = stored_shapes(model.config)
    _check_names(set(model.tensors), set(wanted))
    for name, (shape, dtype) in wanted.items():
        tensor = model.tensors[name]
        if tensor.shape != shape or tensor.dtype != dtype:
            raise ValueError(f"{name} must be {dtype} {list(shape)}, got {tensor.dtype} {list(tensor.shape)}")
        if dtype == np.float32:
            finite = bool(np.isfinite(tensor).all())
        elif dtype == np.uint16:
            finite = int((tensor & 0x7FFF).max(initial=0)) < 0x7F80
        else:
            finite = True
        if not finite:
            raise ValueError(f"{name} holds NaN or infinite values")
        if name.endswith(".scale") and not (tensor > 0).all():
            raise ValueError(f"{name} must be positive")


def _read_metadata(metadata: dict[str, str] | None) -> PackedConfig:
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
