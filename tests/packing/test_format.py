"""The packed file: what is written is read back, and whatever is damaged or hostile is refused with one line."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
from mutations import scramble
from safetensors.numpy import load_file, save_file

from sparsemae.packing.format import PackedModel, from_bf16, parse_pattern, read, to_bf16, unpack, write
from sparsemae.runtime import load


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    write(path, reference.random_model(reference.TINY, dense="bf16"))
    return path


def change(path: Path, edit: Callable[[dict[str, Any], dict[str, np.ndarray], dict[str, str]], None]) -> None:
    """Rewrite a packed file after edit(config, tensors, metadata)."""
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])
    metadata = header["__metadata__"]
    config, tensors = json.loads(metadata["config"]), load_file(path)
    edit(config, tensors, metadata)
    metadata["config"] = json.dumps(config)
    save_file(tensors, path, metadata)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_round_trip(dtype: str, tmp_path: Path) -> None:
    model = reference.random_model(reference.TINY, dtype=dtype)
    write(tmp_path / "m.safetensors", model)
    again = read(tmp_path / "m.safetensors")
    assert again.config == model.config
    assert all((again.tensors[name] == tensor).all() for name, tensor in model.tensors.items())
    assert list(tmp_path.iterdir()) == [tmp_path / "m.safetensors"]


def test_tensors_are_aligned_to_their_type(packed: Path) -> None:
    raw = packed.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    sizes = {"F32": 4, "U16": 2, "U8": 1, "I8": 1}
    header = json.loads(raw[8 : 8 + length])
    assert all(
        (8 + length + t["data_offsets"][0]) % sizes[t["dtype"]] == 0 for name, t in header.items() if name[0] != "_"
    )


def test_bf16_rounds_to_nearest_even() -> None:
    values = np.array([1.0, 1.00390625, 1.01171875, -3.14159, 1e-40, 65504.0], np.float32)
    bits = to_bf16(values)
    assert (
        from_bf16(bits) == np.array([1.0, 1.0, 1.015625, -3.140625, 1e-40, 65536.0], np.float32).round(12)
    ).sum() >= 5
    assert (to_bf16(from_bf16(bits)) == bits).all()


def test_wrong_tensors_are_not_written(tmp_path: Path) -> None:
    model = reference.random_model(reference.TINY)
    with pytest.raises(ValueError, match=r"tensor head\.bias is missing"):
        write(tmp_path / "m", PackedModel(model.config, {k: v for k, v in model.tensors.items() if k != "head.bias"}))
    with pytest.raises(ValueError, match="cls_token holds NaN"):
        write(
            tmp_path / "m",
            PackedModel(model.config, model.tensors | {"cls_token": np.full((1, 1, 64), np.nan, np.float32)}),
        )
    assert not list(tmp_path.iterdir())


def set_vit(**changes: Any) -> Callable[..., None]:
    return lambda config, tensors, metadata: config["vit"].update(changes)


def fill(name: str, value: int) -> Callable[..., None]:
    return lambda config, tensors, metadata: tensors[name].fill(value)


HOSTILE: dict[str, tuple[Callable[..., None], str]] = {
    "no metadata": (lambda c, t, m: m.clear() or m.update(other="x"), "does not say format"),
    "future version": (lambda c, t, m: m.update(version="2"), "version must be 1, got '2': update sparsemae"),
    "no version": (lambda c, t, m: m.update(version="x"), "version must be 1"),
    "huge depth": (set_vit(depth=10**9), "depth must be in"),
    "huge image": (set_vit(image_height=1 << 14, image_width=1 << 14), "pos_embed must be"),
    "negative width": (set_vit(embed_dim=-64), "embed_dim must be in"),
    "width is text": (set_vit(embed_dim="64"), "embed_dim must be int, got str"),
    "flag is a number": (set_vit(class_token=1), "class_token must be bool"),
    "heads": (set_vit(num_heads=3), "multiple of num_heads"),
    "eps": (set_vit(norm_eps=0.0), "norm_eps"),
    "pool": (set_vit(global_pool="map"), "global_pool"),
    "unknown field": (set_vit(extra=1), "exactly the fields"),
    "pattern": (lambda c, t, m: c["patterns"].update({"blocks.0.mlp.fc1": "2:0"}), "pattern must be"),
    "pattern of another size": (lambda c, t, m: c["patterns"].update({"blocks.0.mlp.fc1": "4:32"}), "must be"),
    "sparse head": (lambda c, t, m: c["patterns"].update(head="2:32"), "'head' cannot be sparse"),
    "m does not divide": (lambda c, t, m: c["patterns"].update({"blocks.0.mlp.fc1": "2:48"}), "no multiple of the m"),
    "codes out of range": (
        fill("blocks.1.attn.qkv.weight.codes", 255),
        r"blocks\.1\.attn\.qkv\.weight: code of group 0 is out of range",
    ),
    "NaN": (fill("head.weight", 0x7FC0), "head.weight holds NaN"),
    "infinite": (fill("blocks.0.mlp.fc1.weight.values", 0x7F80), "holds NaN or infinite"),
    "missing tensor": (lambda c, t, m: t.pop("norm.weight", None) or t.pop("head.bias"), "head.bias is missing"),
    "extra tensor": (lambda c, t, m: t.update(more=np.zeros(3, np.float32)), "more is not part"),
    "wrong type": (lambda c, t, m: t.update({"head.bias": np.zeros(10, np.float64)}), "head.bias must be"),
    "short codes": (
        lambda c, t, m: t.update({"blocks.0.mlp.fc1.weight.codes": np.zeros(3, np.uint8)}),
        "codes must be",
    ),
    "class names": (lambda c, t, m: c.update(class_names=["a"]), "class_names must be none or 10"),
    "std 0": (lambda c, t, m: c["preprocess"].update(std=[0.0, 1.0, 1.0]), "std positive"),
    "mean NaN": (lambda c, t, m: c["preprocess"].update(mean=[float("nan")] * 3), "mean must be finite"),
    "crop": (lambda c, t, m: c["preprocess"].update(crop_pct=0.0), "crop_pct"),
}


@pytest.mark.holds("packed.8")
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_file_is_refused_with_one_line(kind: str, packed: Path) -> None:
    edit, message = HOSTILE[kind]
    change(packed, edit)
    with pytest.raises(ValueError, match=message) as refusal:
        load(packed, threads=1)
    assert str(packed) in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.holds("packed.8")
def test_int8_scale_must_be_positive(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    write(path, reference.random_model(reference.TINY, dtype="int8"))
    change(path, fill("blocks.0.mlp.fc1.weight.scale", 0))
    with pytest.raises(ValueError, match="scale must be positive"):
        read(path)


@pytest.mark.holds("packed.8")
def test_mutated_files_are_refused_or_harmless(packed: Path) -> None:
    """2,000 files with bytes flipped, cut out, doubled, or cut off: each runs, or is refused with one line."""
    rng = np.random.default_rng(0)
    original = packed.read_bytes()
    header = 8 + struct.unpack("<Q", original[:8])[0]
    images = np.zeros((1, 3, 16, 16), np.float32)
    refused = []
    for _ in range(2000):
        end = header if rng.random() < 0.6 else len(original)  # most of what can go wrong is in the header
        packed.write_bytes(scramble(rng, original, end))
        try:
            model = load(packed, threads=1)
        except ValueError as error:
            refused.append(str(error))
        else:
            model(images)
    assert len(refused) > 1000
    assert all(str(packed) in message and "\n" not in message for message in refused)


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "absent")
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(ValueError, match="not a usable packed model"):
        read(tmp_path / "empty")


def test_patterns_are_read_strictly() -> None:
    assert parse_pattern("2:32") == (2, 32)
    for text in ("", "2", "2/32", "0:32", "33:32", "2:32 ", "-1:4", "1:257", "٢:٣٢"):
        with pytest.raises(ValueError, match="pattern must be"):
            parse_pattern(text)


def test_unpack_names_the_layer_of_a_bad_code() -> None:
    model = reference.random_model(reference.TINY)
    model.tensors["blocks.0.attn.proj.weight.codes"].fill(255)
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.proj\.weight: code 511"):
        unpack(model)
