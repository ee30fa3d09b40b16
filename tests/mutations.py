"""Damage and malice for safetensors files, by a generator: what a disk, a transfer, or somebody may do to them."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np

Random = np.random.Generator
HUGE = (-1, 0, 1, 2**31, 2**40, 2**62, 2**63, 2**64 - 1, 10**30)
DTYPES = ("F32", "F64", "F16", "BF16", "I64", "I32", "U16", "I8", "U8", "BOOL", "C64", "F8_E4M3", "F8_E5M2", "F4", "X9")
WIDTHS = {"F16": 2, "BF16": 2, "I32": 4, "F64": 8, "I64": 8, "C64": 8, "U8": 1, "BOOL": 1, "F8_E4M3": 1}
_DOCUMENTS = {"card": "sparsemae", "config": "config"}  # of weights files, of packed files


def scramble(rng: Random, data: bytes, end: int) -> bytes:
    """Bytes before ``end`` flipped, overwritten, cut out or doubled, or the file cut off there."""
    changed, at = bytearray(data), int(rng.integers(max(min(end, len(data)), 1)))
    kind = rng.integers(5)
    if kind == 0 and changed:
        changed[at] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        changed[at : at + 4] = rng.bytes(4)
    elif kind == 2:
        del changed[at : at + int(rng.integers(1, 64))]
    elif kind == 3:
        changed[at:at] = changed[at : at + int(rng.integers(1, 64))]
    else:
        del changed[at:]
    return bytes(changed)


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """A safetensors file's header, and its body."""
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def join(header: Any, body: bytes, length: int | None = None) -> bytes:
    """Inverse of `split`; ``length`` is what the file says of its header."""
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return (len(text) if length is None else length).to_bytes(8, "little") + text + body


def tensors_of(data: bytes) -> dict[str, bytes]:
    """The values of each tensor of a valid safetensors file, read in four lines."""
    header, body = split(data)
    header.pop("__metadata__", None)
    return {name: body[slice(*entry["data_offsets"])] for name, entry in header.items()}


def edit(rng: Random, data: bytes, where: str = "header") -> bytes:
    """A safetensors file with something else in its header, its card or its values."""
    header, body = split(data)
    names = [name for name in header if name != "__metadata__"]
    name = names[rng.integers(len(names))]
    if where in _DOCUMENTS:
        metadata, key = header.setdefault("__metadata__", {}), _DOCUMENTS[where]
        metadata[key] = json.dumps(graft(rng, json.loads(metadata.get(key, "{}"))))
        if rng.random() < 0.05:
            metadata[key] = "[" * 100_000
        return join(header, body)
    if where == "values":
        return join(header, _other_values(rng, header[name], body))
    if rng.random() < 0.1:
        most = [len(json.dumps(header)) + int(rng.integers(-9, 10)), len(data), *HUGE[1:-1]]
        return join(header, body, max(0, min(2**64 - 1, most[rng.integers(len(most))])))
    if rng.random() < 0.2:
        return join(graft(rng, header), body)
    changes = (_shape, _offsets, _type, _alike, _renamed, _crowded)
    changes[rng.integers(len(changes))](rng, header, name)
    return join(header, body)


def _shape(rng: Random, header: dict[str, Any], name: str) -> None:
    shape = header[name]["shape"]
    at = int(rng.integers(len(shape) + 1))
    shape[at : at + 1] = [_huge(rng)]


def _offsets(rng: Random, header: dict[str, Any], name: str) -> None:
    offsets, shift = header[name]["data_offsets"], int(rng.integers(-64, 65))
    if rng.random() < 0.5:
        offsets[rng.integers(2)] = _huge(rng)
    else:
        offsets[:] = [offset + shift for offset in offsets]


def _type(rng: Random, header: dict[str, Any], name: str) -> None:
    header[name]["dtype"] = DTYPES[rng.integers(len(DTYPES))]


def _alike(rng: Random, header: dict[str, Any], name: str) -> None:
    """As many bytes under another type, in one dimension or as many as before."""
    entry, dtypes = header[name], list(WIDTHS)
    dtype = dtypes[rng.integers(len(dtypes))]
    begin, end = entry["data_offsets"]
    *rows, _ = entry["shape"] or [1]
    rows = rows if rng.random() < 0.7 else []
    entry |= {"dtype": dtype, "shape": [*rows, (end - begin) // WIDTHS[dtype] // max(math.prod(rows), 1)]}


def _renamed(rng: Random, header: dict[str, Any], name: str) -> None:
    header[_word(rng)] = header.pop(name)


def _crowded(rng: Random, header: dict[str, Any], name: str) -> None:
    """Many tensors without values."""
    for i in range(int(rng.integers(1, 10_000))):
        header[f"none.{i}"] = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}


def _other_values(rng: Random, entry: dict[str, Any], body: bytes) -> bytes:
    """NaN, infinite, or very large numbers somewhere in a tensor."""
    changed, (begin, end) = bytearray(body), entry["data_offsets"]
    value = np.array([np.nan, np.inf, -np.inf, 3e38], np.float32)[rng.integers(4)].tobytes()
    if end - begin >= 4:
        at = begin + 4 * int(rng.integers((end - begin) // 4))
        changed[at : at + 4] = value
    return bytes(changed)


def graft(rng: Random, tree: Any) -> Any:
    """Plain values with one leaf or branch replaced, removed or added, at a random depth."""
    strange: tuple[Any, ...] = (
        _huge(rng),
        None,
        "x",
        [],
        {},
        [[]] * 1000,
        True,
        math.nan,
        "1" * 1000,
        {"a": {"b": 1}},
        [1, "2"],
    )
    if not tree or not isinstance(tree, dict | list) or rng.random() < 0.1:
        return strange[rng.integers(len(strange))]
    tree = dict(tree) if isinstance(tree, dict) else list(tree)
    keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
    key, kind = keys[rng.integers(len(keys))], rng.random()
    if kind < 0.15:
        del tree[key]
    elif kind < 0.25 and isinstance(tree, dict):
        tree[_word(rng)] = strange[rng.integers(len(strange))]
    else:
        tree[key] = graft(rng, tree[key])
    return tree


def _huge(rng: Random) -> int:
    return HUGE[rng.integers(len(HUGE))]


def _word(rng: Random) -> str:
    words = (
        "x",
        "",
        "optimizer",
        "optimizer/0",
        "optimizer/x/step",
        "../../x",
        "\ud800",
        "head.weight",
        "depth",
        "done",
    )
    return words[rng.integers(len(words))]
