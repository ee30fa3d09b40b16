"""The packed file: one safetensors file that holds a frozen N:M vision transformer, ready for the runtime.

What a reader would not guess:
- A sparse weight `L.weight` is stored as `L.weight.codes` (which n of every m are kept, see `codec`), `L.weight.values`
  [O, I * n / m] and, for int8, `L.weight.scale` [O]. Everything else keeps timm's name and shape.
- bf16 is stored as U16 bit patterns, because safetensors' numpy reader has no bfloat16; what a U16 tensor means is said
  by `dtypes`.
- The metadata is one JSON document; every tensor's name and shape follows from it, so a file is right as a whole or it
  is refused. Reading never trusts a number of the file before it is checked: a damaged or hostile file is a one-line
  ValueError.
- Nothing here imports torch; the layout of the kernels is made at load and never stored. The full specification:
  docs/packed-format.md.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from sparsemae.files import existing, oversized_header, write_atomic
from sparsemae.packing.codec import code_bytes, decode_mask
from sparsemae.packing.metadata import FORMAT, PackedConfig, VitShape, parse_pattern, read_metadata, write_metadata
from sparsemae.packing.segmenter import DenseHead

DTYPES: dict[str, np.dtype[Any]] = {
    "fp32": np.dtype(np.float32),
    "bf16": np.dtype(np.uint16),
    "int8": np.dtype(np.int8),
}
LINEARS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
"""The four linear layers of a block, the only ones that may be sparse."""

Array = NDArray[Any]


@dataclass(frozen=True)
class PackedModel:
    """A packed file in memory: its metadata and its tensors as stored."""

    config: PackedConfig
    tensors: dict[str, Array]


def to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Bit patterns of the nearest bfloat16 (ties to even), as torch rounds. Values must be finite."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """The float32 with those upper 16 bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def dense_shapes(vit: VitShape, head: DenseHead | None = None) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of the dense model, by timm's name, and of a segmenter's head."""
    d, hidden, patch = vit.embed_dim, vit.mlp_hidden, vit.patch_size
    parts: list[tuple[str, tuple[int, ...], bool]] = [  # whether the model has it at the end
        ("patch_embed.proj.weight", (d, vit.in_chans, patch, patch), True),
        ("pos_embed", (1, vit.patches if vit.no_embed_class else vit.tokens, d), True),
        ("patch_embed.proj.bias", (d,), vit.patch_bias),
        ("cls_token", (1, 1, d), vit.class_token),
        ("reg_token", (1, vit.reg_tokens, d), vit.reg_tokens > 0),
    ]
    norms = {"norm_pre": vit.pre_norm, "norm": vit.final_norm, "fc_norm": vit.fc_norm}
    for block in (f"blocks.{i}" for i in range(vit.depth)):
        norms |= {f"{block}.norm1": True, f"{block}.norm2": True}
        for layer, rows, columns, bias in (
            ("attn.qkv", 3 * d, d, vit.qkv_bias),
            ("attn.proj", d, d, vit.proj_bias),
            ("mlp.fc1", hidden, d, vit.proj_bias),
            ("mlp.fc2", d, hidden, vit.proj_bias),
        ):
            parts += [(f"{block}.{layer}.weight", (rows, columns), True), (f"{block}.{layer}.bias", (rows,), bias)]
        parts += [(f"{block}.{scale}.gamma", (d,), vit.layer_scale) for scale in ("ls1", "ls2")]
    parts += [(f"{norm}.{part}", (d,), used) for norm, used in norms.items() for part in ("weight", "bias")]
    classes = vit.num_classes
    parts += [("head.weight", (classes, d), classes > 0), ("head.bias", (classes,), classes > 0)]
    own = {name: shape for name, shape, there in parts if there}
    return own if head is None else own | head.shapes(d)


def stored_shapes(config: PackedConfig) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    """Shape and numpy type of every tensor of the file. Raises ValueError where the metadata contradicts itself."""
    stored: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {}
    sparse_names = {f"blocks.{i}.{layer}" for i in range(config.vit.depth) for layer in LINEARS}
    if extra := sorted(set(config.card.patterns) - sparse_names):
        raise ValueError(f"patterns: wanted only {', '.join(LINEARS)} of the blocks, got {extra[0]!r}")
    for name, shape in dense_shapes(config.vit, config.head).items():
        pattern = config.card.patterns.get(name.removesuffix(".weight"))
        key, kinds = (name, ("fp32", "bf16")) if pattern is None else (f"{name}.values", tuple(DTYPES))
        dtype = config.dtypes.get(key, "")
        if dtype not in kinds:
            raise ValueError(f"dtypes: {key}: wanted {' or '.join(kinds)}, got {dtype or None!r}")
        if pattern is None:
            stored[key] = shape, DTYPES[dtype]
        else:
            (n, m), (rows, columns) = parse_pattern(pattern), shape
            if columns % m:
                raise ValueError(f"{name}: wanted rows of a multiple of the m of {pattern}, got {columns}")
            stored[f"{name}.codes"] = (code_bytes(rows * columns // m, n, m),), np.dtype(np.uint8)
            stored[key] = (rows, columns // m * n), DTYPES[dtype]
        if dtype == "int8":
            stored[f"{name}.scale"] = shape[:1], np.dtype(np.float32)
    if extra := sorted(set(config.dtypes) - set(stored)):
        raise ValueError(f"dtypes: wanted the stored tensors only, got {extra[0]!r}")
    return stored


def to_bytes(model: PackedModel) -> bytes:
    """A packed file's content. Raises ValueError if the tensors do not fit the metadata, or the metadata the format."""
    _check(model)
    metadata = write_metadata(model.config)
    content: bytes = save({name: np.ascontiguousarray(one) for name, one in model.tensors.items()}, metadata)
    return content


def write(path: str | Path, model: PackedModel) -> None:
    """Write a packed file, whole or not at all.

    Raises:
        ValueError: the tensors do not fit the metadata, or the metadata the format.
        OSError: it cannot be written.
    """
    write_atomic(path, to_bytes(model))


def read(path: str | Path) -> PackedModel:
    """Read and check a packed file.

    The codes themselves are checked where they are decoded (the native library, or `unpack`).

    Raises:
        ValueError: not a packed file, damaged, or of a newer version; one line that names the file.
        OSError: the file cannot be opened.
    """
    path = existing(path)
    if path.is_dir():
        raise ValueError(f"{path}: wanted a packed model, as sparsemae pack makes one of a run, got a folder")
    path.open("rb").close()  # a missing or unreadable file is an OSError of its own
    try:
        with safe_open(path, framework="numpy", backend="pread") as file:  # a map of a file that is cut off kills
            config = read_metadata(file.metadata())
            wanted = stored_shapes(config)
            _check_names(set(file.keys()), set(wanted))
            for name, (shape, _) in wanted.items():
                if tuple(file.get_slice(name).get_shape()) != shape:
                    raise ValueError(f"{name}: wanted {list(shape)}, got {file.get_slice(name).get_shape()}")
            model = PackedModel(config, {name: file.get_tensor(name) for name in wanted})
        _check(model)
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError, SafetensorError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path}: wanted a packed model, got one that cannot be used: {reason[:300]}") from None
    return model


def is_packed(path: str | Path) -> bool:
    """Whether a file says of itself that it is a packed model; `read` tells whether it is a usable one.

    Raises ValueError, naming it, if it is not there, a device or a pipe, or a damaged safetensors file by its name.
    """
    path = existing(path)
    if not path.exists():
        raise ValueError(f"{path}: no such file or run folder")
    try:
        if header := oversized_header(path):
            raise SafetensorError(f"its header of {header:,} bytes is too large beside its data")
        with safe_open(path, framework="numpy", backend="pread") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except OSError:
        return False
    except SafetensorError as error:
        if path.suffix != ".safetensors":
            return False
        raise ValueError(f"{path}: not a readable safetensors file: {error}") from error


def unpack(model: PackedModel, masks: bool = False) -> dict[str, Array]:
    """The dense masked weights, float32, by timm's names. Exact for fp32, and for bf16 of weights that were bf16.

    Args:
        masks: also `LAYER.weight_mask` of the sparse layers, bool: True = kept.

    Raises:
        ValueError: a code is out of range.
    """
    weights: dict[str, Array] = {}
    for name, shape in dense_shapes(model.config.vit, model.config.head).items():
        pattern = model.config.card.patterns.get(name.removesuffix(".weight"))
        stored = model.tensors[name if pattern is None else f"{name}.values"]
        values = from_bf16(stored) if stored.dtype == np.uint16 else stored
        if pattern is None:
            weights[name] = values
            continue
        try:
            mask = decode_mask(model.tensors[f"{name}.codes"], shape[0], shape[1], *parse_pattern(pattern))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        weights[name] = np.zeros(shape, np.float32)
        scale = model.tensors.get(f"{name}.scale")
        weights[name][mask] = (values if scale is None else values * scale[:, None]).ravel()
        if masks:
            weights[f"{name}_mask"] = mask
    return weights


def _check_names(got: set[str], wanted: set[str]) -> None:
    if missing := sorted(wanted - got):
        raise ValueError(f"{missing[0]}: wanted a tensor of this name, got none")
    if extra := sorted(got - wanted):
        raise ValueError(f"{extra[0]}: wanted the model's tensors only, got one more")


def _check(model: PackedModel) -> None:
    wanted = stored_shapes(model.config)
    _check_names(set(model.tensors), set(wanted))
    for name, (shape, dtype) in wanted.items():
        tensor = model.tensors[name]
        if tensor.shape != shape or tensor.dtype != dtype:
            raise ValueError(f"{name}: wanted {dtype} {list(shape)}, got {tensor.dtype} {list(tensor.shape)}")
        finite = (tensor & 0x7FFF).max(initial=0) < 0x7F80 if dtype == np.uint16 else np.isfinite(tensor).all()
        if not finite:
            raise ValueError(f"{name}: wanted finite values, got NaN or infinity")
        if name.endswith(".scale") and not (tensor > 0).all():
            raise ValueError(f"{name}: wanted more than 0, got {tensor.min()}")
