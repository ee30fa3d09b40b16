"""Every instruction set of this processor against the float64 twin, on the shapes that the format allows."""

import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import reference

from sparsemae.packing.codec import decode_positions, encode_mask
from sparsemae.packing.format import PackedModel
from sparsemae.runtime import native

ISAS = native.usable_isas()
INTEGER = ("amxvnni", "amx", "avx512vnni", "avxvnni")
"""Tables that multiply int8 files as integers."""
LIMIT = {"fp32": 2e-5, "bf16": 4e-2, "fp16": 4e-2, "int8": 4e-2}
"""Largest error over the standard deviation of the outputs. Narrow models average out little of bf16's rounding."""

SHAPES: dict[str, tuple[str | None, dict[str, Any]]] = {
    "plain": ("2:32", {}),
    "dense": (None, {}),
    "all kept": ("32:32", {}),
    "one of a group": ("1:64", {}),
    "odd n": ("3:32", {}),
    "m of 12": ("5:12", {"embed_dim": 48, "num_heads": 3, "mlp_hidden": 60}),
    "m of 7, odd heads": ("3:7", {"embed_dim": 35, "num_heads": 5, "mlp_hidden": 49}),
    "bitmap codes": ("40:80", {"embed_dim": 80, "num_heads": 5, "mlp_hidden": 160}),
    "wide groups": ("9:256", {"embed_dim": 256, "num_heads": 4, "mlp_hidden": 512}),
    "one token": ("2:32", {"image_height": 4, "image_width": 4, "class_token": False, "patch_size": 4}),
    "wide image, one channel": ("2:32", {"image_width": 36, "in_chans": 1}),
    "odd patches": ("2:32", {"patch_size": 5, "image_height": 35, "image_width": 25}),
    "many tokens": ("2:32", {"patch_size": 2, "image_height": 34, "image_width": 34, "depth": 1}),
    "registers": ("2:32", {"reg_tokens": 3, "global_pool": "token", "final_norm": True, "fc_norm": False}),
    "positions of patches only": ("2:32", {"reg_tokens": 1, "no_embed_class": True}),
    "layer scale, pre norm": ("2:32", {"layer_scale": True, "pre_norm": True}),
    "no biases": ("2:32", {"qkv_bias": False, "proj_bias": False, "patch_bias": False}),
    "encoder": ("2:32", {"num_classes": 0, "pool_include_prefix": True}),
    "all tokens": ("2:32", {"num_classes": 0, "global_pool": "", "fc_norm": False, "final_norm": True}),
    "one class": ("2:32", {"num_classes": 1}),
    "hidden of 100": ("2:4", {"mlp_hidden": 100}),
    "wide heads": ("2:32", {"embed_dim": 320, "num_heads": 2, "mlp_hidden": 64}),
}


def error(got: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(got - wanted).max() / max(float(wanted.std()), 0.3))


def images_for(model: PackedModel, batch: int) -> np.ndarray:
    vit = model.config.vit
    return np.random.default_rng(1).standard_normal(
        (batch, vit.in_chans, vit.image_height, vit.image_width), np.float32
    )


@cache
def twins(kind: str, dtype: str) -> tuple[PackedModel, np.ndarray, np.ndarray, np.ndarray]:
    """A model, images, and the twin's logits and tokens, for all instruction sets."""
    pattern, changes = SHAPES[kind]
    model = reference.random_model(reference.vit_shape(**changes), pattern, dtype)
    images = images_for(model, 3)
    return model, images, reference.forward(model, images), reference.forward(model, images, features=True)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.holds("packed.5")
def test_forward_agrees_with_the_twin(isa: str, kind: str) -> None:
    for dtype in ("fp32", "bf16", "int8"):
        model, images, wanted, tokens = twins(kind, dtype)
        for threads in (1, 2):
            vit = reference.native(model, threads, isa)
            assert error(vit(images, False), wanted) <= LIMIT[vit.math]
            assert error(vit(images, True), tokens) <= 2 * LIMIT[vit.math]


@pytest.mark.holds("fast.3")
@pytest.mark.parametrize("isa", ISAS)
def test_flat_surfaces_are_embedded_as_if_pixels_were_not_rounded(isa: str) -> None:
    """Every pixel of a column loses the same, and no weight makes up for it. The blocks add nothing."""
    for side in (4, 20):
        vit = reference.vit_shape(depth=1, patch_size=side, image_height=2 * side, image_width=2 * side)
        model = reference.random_model(vit, dense="bf16")
        for name, weight in model.tensors.items():
            if name.startswith(("blocks.0.attn.proj", "blocks.0.mlp.fc2")) and not name.endswith("codes"):
                weight[...] = 0
        model.tensors["patch_embed.proj.weight"] &= 0x7FFF  # its sign
        columns = 1 + np.random.default_rng(0).random((1, 3, 1, 2 * side), np.float32)
        images = np.ascontiguousarray(np.broadcast_to(columns, (1, 3, 2 * side, 2 * side)))
        wanted = reference.forward(model, images, features=True)
        assert np.abs(reference.native(model, 1, isa)(images, True) - wanted).max() <= 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize(
    ("isa", "dtype"), [*((isa, "bf16") for isa in ISAS), *((isa, "int8") for isa in ISAS if isa in INTEGER)]
)
def test_any_batch_and_thread_count_gives_the_same_bits(isa: str, dtype: str) -> None:
    """With more threads than parts of tokens, int8 inputs are rounded in a stage of their own."""
    model = reference.random_model(reference.TINY, dtype=dtype)
    images = images_for(model, 7)
    wanted = reference.native(model, 1, isa)(images, False)
    for threads in (2, 3, 5):
        vit = reference.native(model, threads, isa)
        for batch in (1, 2, 3, 7, 0):
            assert (vit(images[:batch], False) == wanted[:batch]).all()


@pytest.mark.holds("fast.3")
@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa in INTEGER])
def test_inputs_are_rounded_in_networks_from_192_on(isa: str) -> None:
    """Unless told otherwise."""
    for width, hidden, heads, wide in ((64, 256, 2, False), (192, 192, 3, True)):
        model = reference.random_model(
            reference.vit_shape(embed_dim=width, num_heads=heads, mlp_hidden=hidden, depth=1), dtype="int8"
        )
        images = images_for(model, 2)
        left, rounded, chosen = (
            reference.native(model, 1, isa, quantize)(images, False) for quantize in (False, True, None)
        )
        assert (left != rounded).any()
        assert (chosen == (rounded if wide else left)).all()


def test_fp32_files_are_computed_in_fp32() -> None:
    for isa in ISAS:
        assert reference.native(reference.random_model(reference.TINY, dtype="fp32"), 1, isa).math == "fp32"


@pytest.mark.skipif("avx512fp16" not in ISAS, reason="needs AVX512-FP16")
def test_fp16_is_taken_where_it_is_fastest_and_cannot_overflow() -> None:
    model = reference.random_model(reference.TINY)
    images = images_for(model, 2)
    assert reference.native(model, 1, "").isa == "avx512fp16"
    assert reference.native(reference.random_model(reference.TINY, "4:32"), 1, "").isa == "amx"
    assert reference.native(reference.random_model(reference.TINY, dtype="int8"), 1, "").isa == "amxvnni"
    assert reference.native(reference.random_model(reference.TINY, "4:32", dtype="int8"), 1, "").isa == "amx"
    exact = reference.native(reference.random_model(reference.TINY, dtype="int8"), quantize=False)
    assert exact.isa == "avx512fp16"
    for factor, isa in ((300.0, "avx512fp16"), (1e5, "amx")):
        outlier = reference.random_model(reference.TINY)
        outlier.tensors["blocks.0.norm2.weight"][3] = factor
        for name in ("", "avx512fp16"):
            vit = reference.native(outlier, 1, name)
            assert vit.isa == isa
            assert error(vit(images, False), reference.forward(outlier, images)) <= LIMIT[vit.math]


def test_unknown_instruction_set_is_named() -> None:
    with pytest.raises(ValueError, match=r"instruction set must be one of .*portable.* got 'sse9'"):
        reference.native(reference.random_model(reference.TINY), 1, "sse9")
    with pytest.raises(ValueError, match=r"threads must be in \[1, 1024\], got 0"):
        reference.native(reference.random_model(reference.TINY), 0, "")


@pytest.mark.parametrize(
    ("n", "m"),
    [(1, 1), (2, 4), (2, 32), (4, 32), (31, 32), (16, 32), (32, 64), (33, 67), (40, 80), (1, 256), (255, 256)],
)
def test_codes_are_decoded_as_numpy_does(n: int, m: int) -> None:
    groups = 613
    order = np.argsort(np.random.default_rng(0).random((groups, m)), axis=1)
    codes = encode_mask((order < n).reshape(1, -1), n, m)
    found = np.frombuffer(native.decode_positions(codes, groups, n, m), np.uint8).reshape(groups, n)
    assert (found == decode_positions(codes, groups, n, m)).all()
    for bad in (codes[:-1], np.append(codes, np.uint8(0))):
        for decode in (decode_positions, native.decode_positions):
            with pytest.raises(ValueError, match="bytes"):
                decode(bad, groups, n, m) if codes.size else decode(np.zeros(1, np.uint8), groups, n, m)
    for bad in (np.full_like(codes, 255), np.full_like(codes, 170)):
        assert refused(decode_positions, bad, groups, n, m) == refused(native.decode_positions, bad, groups, n, m)


def refused(decode: Callable[..., Any], *args: Any) -> bool:
    try:
        decode(*args)
    except ValueError:
        return True
    return False


@pytest.mark.holds("packed.6")
def test_models_and_callers_in_parallel_do_not_mix() -> None:
    models = [reference.random_model(reference.TINY, seed=seed) for seed in range(3)]
    images = images_for(models[0], 5)
    natives = [reference.native(model, 2, "") for model in models]
    wanted = [vit(images, False) for vit in natives]
    failures: list[int] = []

    def call(i: int) -> None:
        for _ in range(30):
            if not (natives[i % 3](images, False) == wanted[i % 3]).all():
                failures.append(i)

    callers = [threading.Thread(target=call, args=(i,)) for i in range(6)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not failures
