"""The packed file: what is written is read back, and whatever is damaged or hostile is refused with one line."""

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
from mutations import edit, scramble
from safetensors.numpy import load_file, save_file

from sparsemae.packing.format import PackedModel, from_bf16, read, to_bf16, unpack, write
from sparsemae.packing.metadata import parse_pattern
from sparsemae.runtime import load
from sparsemae.runtime.native import Vit


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    write(path, reference.random_model(reference.TINY, dense="bf16"))
    return path


def change(path: Path, tamper: Callable[[dict[str, Any], dict[str, np.ndarray], dict[str, str]], None]) -> None:
    """Rewrite a packed file after tamper(config, tensors, metadata)."""
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])
    metadata = header["__metadata__"]
    config, tensors = json.loads(metadata["config"]), load_file(path)
    tamper(config, tensors, metadata)
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
    with pytest.raises(ValueError, match=r"^head\.bias: wanted a tensor of this name, got none"):
        write(tmp_path / "m", PackedModel(model.config, {k: v for k, v in model.tensors.items() if k != "head.bias"}))
    with pytest.raises(ValueError, match="cls_token: wanted finite values"):
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
    "no metadata": (lambda c, t, m: m.clear() or m.update(other="x"), "wanted metadata of format"),
    "future version": (lambda c, t, m: m.update(version="4"), "version: wanted 1 to 3, got '4': update sparsemae"),
    "no version": (lambda c, t, m: m.update(version="x"), "version: wanted 1 to 3, got 'x'"),
    "huge depth": (set_vit(depth=10**9), "vit.depth: wanted at least 1 and at most 512, got 1e"),
    "huge image": (set_vit(image_height=1 << 14, image_width=1 << 14), "pos_embed: wanted"),
    "negative width": (set_vit(embed_dim=-64), "vit.embed_dim: wanted at least 1"),
    "width is text": (set_vit(embed_dim="64"), "vit.embed_dim: wanted int, got str"),
    "flag is a number": (set_vit(class_token=1), "vit.class_token: wanted bool, got int"),
    "heads": (set_vit(num_heads=3), "vit.embed_dim: wanted a multiple of num_heads 3, got 64"),
    "eps": (set_vit(norm_eps=0.0), "vit.norm_eps: wanted more than 0"),
    "pool": (set_vit(global_pool="map"), "vit.global_pool: wanted 'avg' or 'token', got 'map'"),
    "norm of a pool that is not": (
        lambda c, t, m: c["vit"].update(num_classes=0, global_pool=""),
        r"vit\.fc_norm: wanted false where nothing is pooled \(global_pool ''\), got true",
    ),
    "unknown field": (set_vit(extra=1), r"vit: wanted exactly the fields of the format, got \[\'extra\'\]"),
    "background": (lambda c, t, m: c["preprocess"].update(background=[1, 2]), "background: wanted three numbers"),
    "bits": (lambda c, t, m: c["preprocess"].update(bits=17), "preprocess.bits: wanted at least 9 and at most 16"),
    "pattern": (lambda c, t, m: c["patterns"].update({"blocks.0.mlp.fc1": "2:0"}), "pattern: wanted 'n:m'"),
    "pattern of another size": (lambda c, t, m: c["patterns"].update({"blocks.0.mlp.fc1": "4:32"}), "codes: wanted"),
    "sparse head": (lambda c, t, m: c["patterns"].update(head="2:32"), "patterns: wanted only attn.qkv, .* got 'head'"),
    "m does not divide": (
        lambda c, t, m: c["patterns"].update({"blocks.0.mlp.fc1": "2:48"}),
        "wanted rows of a multiple of the m of 2:48, got 64",
    ),
    "codes out of range": (
        fill("blocks.1.attn.qkv.weight.codes", 255),
        r"blocks\.1\.attn\.qkv\.weight\.codes: code of group 0",
    ),
    "NaN": (fill("head.weight", 0x7FC0), "head.weight: wanted finite values"),
    "infinite": (fill("blocks.0.mlp.fc1.weight.values", 0x7F80), "values: wanted finite values, got NaN or infinity"),
    "missing tensor": (lambda c, t, m: t.pop("norm.weight", None) or t.pop("head.bias"), "head.bias: wanted a tensor"),
    "extra tensor": (lambda c, t, m: t.update(more=np.zeros(3, np.float32)), "more: wanted the model's tensors only"),
    "wrong type": (lambda c, t, m: t.update({"head.bias": np.zeros(10, np.float64)}), "head.bias: wanted uint16"),
    "short codes": (
        lambda c, t, m: t.update({"blocks.0.mlp.fc1.weight.codes": np.zeros(3, np.uint8)}),
        "codes: wanted",
    ),
    "class names": (lambda c, t, m: c.update(class_names=["a"]), "class_names: wanted none or 10 strings, got 1"),
    "std 0": (lambda c, t, m: c["preprocess"].update(std=[0.0, 1.0, 1.0]), "preprocess.std: wanted"),
    "mean NaN": (lambda c, t, m: c["preprocess"].update(mean=[float("nan")] * 3), "preprocess.mean: wanted"),
    "crop": (lambda c, t, m: c["preprocess"].update(crop_pct=0.0), "preprocess.crop_pct: wanted at least 0.1"),
    "interpolation": (lambda c, t, m: c["preprocess"].update(interpolation=["bicubic"]), "interpolation: wanted str"),
    "number of 400 digits": (set_vit(depth=10**400), "not be used"),
}


@pytest.mark.holds("packed.8")
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_file_is_refused_with_one_line(kind: str, packed: Path) -> None:
    tamper, message = HOSTILE[kind]
    change(packed, tamper)
    with pytest.raises(ValueError, match=message) as refusal:
        load(packed, threads=1)
    assert str(packed) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_the_library_by_itself_refuses_the_norm_of_a_pool_that_is_not(packed: Path) -> None:
    change(packed, HOSTILE["norm of a pool that is not"][0])
    with pytest.raises(
        ValueError, match=r"cannot be used: vit\.fc_norm: wanted false where nothing is pooled, got true"
    ):
        Vit(packed.read_bytes(), 1)


@pytest.mark.holds("packed.8")
def test_int8_scale_must_be_positive(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    write(path, reference.random_model(reference.TINY, dtype="int8"))
    change(path, fill("blocks.0.mlp.fc1.weight.scale", 0))
    with pytest.raises(ValueError, match="scale: wanted more than 0"):
        read(path)


@pytest.mark.slow
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


@pytest.mark.holds("packed.8")
@pytest.mark.slow
def test_documents_with_anything_in_them_are_refused_or_harmless(packed: Path) -> None:
    """1,000 files whose metadata has a leaf or branch replaced, removed or added."""
    rng = np.random.default_rng(1)
    original = packed.read_bytes()
    refused = []
    for _ in range(1000):
        packed.write_bytes(edit(rng, original, "config"))
        try:
            model = load(packed, threads=1)
        except ValueError as error:
            refused.append(str(error))
        else:
            model(np.zeros((1, 3, 16, 16), np.float32))
    assert len(refused) > 500
    assert all(str(packed) in message and "\n" not in message for message in refused)


def test_a_card_that_the_format_cannot_hold_is_not_written(tmp_path: Path) -> None:
    model = reference.random_model(reference.TINY)
    card, spec = model.config.card, model.config.card.input
    for other, message in (
        (replace(card, input=replace(spec, img_size=17)), "wanted a classifier's input with img_size=16, got .*17"),
        (replace(card, input=replace(spec, short_side=16)), "wanted a classifier's input"),
        (replace(card, input=replace(spec, interpolation="random")), "interpolation: wanted one of nearest"),
        (replace(card, class_names=("a",)), "class_names: wanted none or 10"),
    ):
        with pytest.raises(ValueError, match=message):
            write(tmp_path / "m", PackedModel(replace(model.config, card=other), model.tensors))
    assert not list(tmp_path.iterdir())


def test_the_fields_of_version_2_and_the_reading_of_version_1(packed: Path, tmp_path: Path) -> None:
    """Names and their order, which `ModelCard` does not have; what version 1 did not say is as models of before were
    trained."""
    raw = packed.read_bytes()
    metadata = json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])["__metadata__"]
    document = json.loads(metadata["config"])
    assert list(document) == [
        "architecture", "overrides", "vit", "preprocess", "class_names", "source", "license", "patterns", "dtypes",
        "data",
    ]  # fmt: skip
    assert document["preprocess"] == {
        "mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bicubic", "crop_pct": 0.875, "exif_transpose": False,
        "background": None, "bits": None,
    }  # fmt: skip
    del document["data"], document["preprocess"]["background"], document["preprocess"]["bits"]
    metadata |= {"version": "1", "config": json.dumps(document)}
    save_file(load_file(packed), tmp_path / "old.safetensors", metadata)
    old, new = read(tmp_path / "old.safetensors"), read(packed)
    assert old.config == new.config
    assert (old.config.card.input.background, old.config.card.input.bits) == (None, None)


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "absent")
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(ValueError, match="empty: wanted a packed model"):
        read(tmp_path / "empty")


def test_patterns_are_read_strictly() -> None:
    assert parse_pattern("2:32") == (2, 32)
    for text in ("", "2", "2/32", "0:32", "33:32", "2:32 ", "-1:4", "1:257", "٢:٣٢"):
        with pytest.raises(ValueError, match="pattern: wanted"):
            parse_pattern(text)


def test_unpack_names_the_layer_of_a_bad_code() -> None:
    model = reference.random_model(reference.TINY)
    model.tensors["blocks.0.attn.proj.weight.codes"].fill(255)
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.proj\.weight: code of group 0: wanted less than 496"):
        unpack(model)
