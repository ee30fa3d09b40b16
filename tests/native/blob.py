"""A packed model as one flat file for programs that call the C interface: forward.cpp and forward.mjs."""

import struct

import numpy as np

from sparsemae.packing.format import PackedModel, dense_shapes, from_bf16
from sparsemae.packing.metadata import parse_pattern

TYPES = {np.dtype(np.float32): 0, np.dtype(np.uint16): 1, np.dtype(np.int8): 2}
VECTOR, DENSE, SPARSE = range(3)


def blob(model: PackedModel) -> bytes:
    """The shape as c_api.h has it, then a record per tensor: kind, sizes, and its parts padded to 8 bytes."""
    vit = model.config.vit
    out = struct.pack(
        "<19If",
        vit.embed_dim, vit.depth, vit.num_heads, vit.mlp_hidden, vit.patch_size, vit.image_height, vit.image_width,
        vit.in_chans, vit.num_classes, vit.reg_tokens, vit.class_token, vit.no_embed_class, vit.pre_norm,
        vit.final_norm, vit.fc_norm, vit.patch_bias, vit.pool_include_prefix, vit.global_pool == "avg",
        vit.global_pool == "", vit.norm_eps,
    )  # fmt: skip
    for name, shape in dense_shapes(vit).items():
        pattern = model.config.card.patterns.get(name.removesuffix(".weight"))
        rows, columns = shape[0], int(np.prod(shape[1:]))
        if pattern is None:
            stored = model.tensors[name]
            values = stored if stored.dtype == np.float32 else from_bf16(stored)
            kind = DENSE if name.endswith(".weight") and len(shape) > 1 and name != "head.weight" else VECTOR
            out += _record(kind, name, rows, columns, 0, 0, 0, b"", values.tobytes(), b"")
            continue
        codes, values = model.tensors[f"{name}.codes"], model.tensors[f"{name}.values"]
        scale = model.tensors.get(f"{name}.scale")
        out += _record(
            SPARSE, name, rows, columns, *parse_pattern(pattern), TYPES[values.dtype], codes.tobytes(),
            values.tobytes(), b"" if scale is None else scale.tobytes(),
        )  # fmt: skip
    return out


def _record(
    kind: int, name: str, rows: int, columns: int, n: int, m: int, dtype: int, codes: bytes, values: bytes, scale: bytes
) -> bytes:
    parts = (name.encode(), codes, values, scale)
    head = struct.pack("<10I", kind, rows, columns, n, m, dtype, *map(len, parts))
    return head + b"".join(part + bytes(-len(part) % 8) for part in parts)
