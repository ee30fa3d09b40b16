"""Wrong arguments and files that change: one line, and never a signal."""

import importlib
import itertools
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from conftest import tiny
from harness import SERVER
from safetensors.torch import save_file

import sparsemae
from sparsemae.cli import main
from sparsemae.commands import predict
from sparsemae.models.vit import build_vit
from sparsemae.models.weights import read_weights
from sparsemae.packing.format import read, write
from sparsemae.runtime import load, native
from sparsemae.runtime.model import IMAGES_PER_THREAD, Model


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packed") / "m.safetensors"
    write(path, reference.random_model(reference.TINY))
    return path


@pytest.mark.holds("held.1")
def test_7_every_wrong_argument_is_a_value_error_of_one_line(packed: Path, tmp_path: Path, came_out: Any) -> None:
    os.mkfifo(tmp_path / "pipe")
    model, zeros = load(packed, np.int64(1)), np.zeros((1, 3, 16, 16), np.float32)  # type: ignore[arg-type]
    threads = -1, 0, 1.5, 10**30, "2", True, [1], float("nan"), 1025
    images = [[1.0], [2.0, 3.0]], zeros.tolist(), None, 3, "x", zeros[0], zeros.astype(">f4"), zeros.astype(object)
    paths = 3, None, b"x", tmp_path / "pipe", "/dev/zero", "/dev/null"
    wrong: list[tuple[str, Callable[[], Any]]] = [
        *(("threads: wanted", lambda x=x: load(packed, x)) for x in threads),
        *(("images: wanted", lambda x=x: model(x)) for x in images),
        *(("images: wanted", lambda x=x: model.features(x)) for x in images),
        *(("wanted a", lambda x=x, f=f: f(x)) for x in paths for f in (load, read, sparsemae.load, read_weights)),
    ]
    for message, call in wrong:
        with pytest.raises(ValueError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
    came_out(
        "wrong arguments of the runtime", "threads, arrays, lists, pipes and devices", "ValueError", times=len(wrong)
    )


def test_7_misaligned_and_odd_arrays_give_the_same(packed: Path) -> None:
    model = load(packed, 1)
    plain = np.random.default_rng(0).standard_normal((2, 3, 16, 16)).astype(np.float32)
    shifted = np.empty(plain.nbytes + 1, np.uint8)[1:].view(np.float32).reshape(plain.shape)
    shifted[:] = plain
    assert not shifted.flags.aligned
    frozen = plain.copy()
    frozen.flags.writeable = False
    for images in (shifted, frozen, np.ma.masked_array(plain), np.asfortranarray(plain)):
        np.testing.assert_array_equal(model(images), model(plain))


@pytest.mark.holds("held.1")
def test_7_ctrl_c_is_heard_between_images(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(packed, 2)
    images = np.random.default_rng(0).standard_normal((35, 3, 16, 16)).astype(np.float32)
    whole, seen = model(images), list[int]()

    class Interrupted:
        threads = 2

        def __call__(self, part: Any, features: bool) -> Any:
            seen.append(len(part))
            if len(seen) == 3:
                raise KeyboardInterrupt
            return model._native(part, features)

    with pytest.raises(KeyboardInterrupt):
        Model.__call__(_with_native(model, Interrupted()), images)
    assert seen == [2 * IMAGES_PER_THREAD] * 3
    np.testing.assert_array_equal(whole, np.concatenate([model(image[None]) for image in images]))
    assert model(images[:0]).shape == (0, 10)


def _with_native(model: Model, native: Any) -> Model:
    other = object.__new__(Model)
    other.__dict__.update(model.__dict__ | {"_native": native})
    return other


def _cut_after(module_name: str, name: str, path: Path, load: Callable[[Path], Any], refused: bool) -> None:
    """Load a file that is cut off once a function of the loader's has looked at it."""
    module = importlib.import_module(module_name)
    look = getattr(module, name)

    def cut(*arguments: Any, **options: Any) -> Any:
        found = look(*arguments, **options)
        os.truncate(path, path.stat().st_size // 4)
        return found

    setattr(module, name, cut)
    if refused:
        with pytest.raises(ValueError, match=path.name) as caught:
            load(path)
        assert "\n" not in str(caught.value)
    else:
        for tensor in load(path)[0].values():
            assert tensor.sum() == tensor.numel()


@pytest.mark.slow
@pytest.mark.holds("held.1")
@pytest.mark.parametrize("kind", ["packed", "safetensors", "pth"])
def test_7_a_file_that_is_cut_off_while_it_is_read(tmp_path: Path, kind: str, came_out: Any) -> None:
    path = tmp_path / f"m.{kind}"
    tensors = {f"blocks.{i}.norm1.weight": torch.ones(50_000) for i in range(20)}
    if kind == "pth":
        torch.save(tensors, path)
        arguments: Any = "sparsemae.models.torch_file", "_names", path, read_weights, False
    elif kind == "safetensors":
        save_file(tensors, path)
        arguments = "sparsemae.models.weights", "safe_open", path, read_weights, True
    else:
        write(path, reference.random_model(reference.vit_shape(embed_dim=192, mlp_hidden=768, depth=4)))
        arguments = "sparsemae.packing.format", "safe_open", path, read, True
    process = SERVER.Process(target=_cut_after, args=arguments)
    process.start()
    process.join(120)
    assert process.exitcode == 0
    came_out(f"file cut off while it is read: .{kind}", "to a quarter, once it was opened", 0)


@pytest.mark.slow
@pytest.mark.holds("held.1")
def test_7_logits_that_are_not_finite_are_refused_with_the_files_name(
    runs: Path, image_folder: Path, tmp_path: Path, refused: Callable[..., str], came_out: Any
) -> None:
    packed_model = reference.random_model(reference.TINY)
    packed_model.tensors["head.weight"][:] = 3e38
    write(tmp_path / "packed.safetensors", packed_model)
    state, metadata = read_weights(runs / "finetune")
    state["head.weight"] = torch.full_like(state["head.weight"], 3e38)
    save_file(state, tmp_path / "torch.safetensors", {"sparsemae": json.dumps(metadata)})
    for name in ("packed", "torch"):
        model, one = str(tmp_path / f"{name}.safetensors"), image_folder / "val" / "cat" / "0.png"
        line = refused("predict", model, str(one))
        assert line == f"sparsemae predict: error: {one}: wanted finite logits, got NaN or infinite ones"
        with pytest.raises(SystemExit):
            main(["predict", model, str(image_folder / "val")])
    with pytest.raises(ValueError, match=r"0\.png: wanted finite logits"):
        load(tmp_path / "packed.safetensors", 1).predict([str(one)])
    came_out("logits that are not finite", "head weights of 3e38, packed and in torch", 2, line)


def test_7_nothing_is_mapped(packed: Path) -> None:
    model = load(packed, 1)
    assert isinstance(model._native, native.Vit)
    assert str(packed) not in Path("/proc/self/maps").read_text()


NETWORKS: list[dict[str, Any]] = [
    {"img_size": 7}, {"in_chans": 1}, {"drop_path_rate": 2}, {"device": "x"}, {"global_pool": ""}, {"patch_size": 0},
    {"patch_size": -8}, {"patch_size": [8, 4]}, {"patch_size": "8"}, {"embed_dim": 0}, {"embed_dim": -4}, {"depth": -1},
    {"depth": 1.5}, {"num_heads": 0}, {"num_heads": -2}, {"num_heads": 3}, {"mlp_ratio": -1}, {"mlp_ratio": 1e15},
    {"mlp_ratio": "a"}, {"norm_layer": "x"}, {"act_layer": "x"}, {"reg_tokens": -1}, {"pos_embed": "x"}, {"nothing": 1},
]  # fmt: skip


@pytest.mark.holds("held.1")
def test_7_no_network_of_a_card_or_an_option_is_a_traceback(came_out: Any) -> None:
    small = {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
    for args in NETWORKS:
        with pytest.raises(ValueError, match=r"model\.args: ") as caught:
            build_vit("vit_tiny_patch16_224", small | args, 32, 2)
    assert build_vit("vit_tiny_patch16_224", small, 32, 2)(torch.zeros(1, 3, 32, 32)).shape == (1, 2)
    came_out("impossible network", "; ".join(map(str, NETWORKS)), 2, str(caught.value), times=len(NETWORKS))


@pytest.mark.holds("held.1")
@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (["--data.workers", "100000"], "data.workers: wanted at least 0 and at most 1024, got 100000"),
        (["--trainer.devices", "100000"], "trainer.devices: wanted at least 1 and at most 1024, got 100000"),
        (["--decoder.num_heads", "0"], "decoder.num_heads: wanted at least 1, got 0"),
        (["--decoder.depth", "-1"], "decoder.depth: wanted at least 0, got -1"),
        (["--mask_ratio", "-1"], "mask_ratio: wanted at least 0 and at most 1, got -1"),
        (["--data.auto_augment", "__import__"], "data.auto_augment: wanted a policy of timm's, got '__import__'"),
    ],
)
def test_7_options_that_would_start_or_build_what_cannot_be(
    tmp_path: Path, refused: Callable[..., str], options: list[str], wanted: str
) -> None:
    assert wanted in refused(*tiny("pretrain", tmp_path / "run", "--data.crop", "resized", *options))


@pytest.mark.holds("held.1")
@pytest.mark.parametrize(
    ("error", "line"),
    [
        (MemoryError(), "out of memory"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to\nallocate 9 bytes"),
            "tried to allocate 9",
        ),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"), "CUDA out of memory"),
        (RecursionError("maximum recursion depth exceeded"), "maximum recursion depth exceeded"),
    ],
    ids=repr,
)
def test_7_no_memory_is_one_line(
    packed: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str], error: Exception, line: str
) -> None:
    def raises(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(predict, "image_files", raises)
    assert line in refused("predict", str(packed), str(packed.parent))
    monkeypatch.setattr(predict, "image_files", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["predict", str(packed), str(packed.parent)])


def edits(card: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """A card with one of its values, or of its input's, replaced by what JSON can say."""
    odd: list[Any] = [None, -1, 0, 1e308, math.nan, "x", "", [], {}, [1], True, 2**70, "\x1b[2J\n", ["a"] * 3, [[]]]
    for name, value in itertools.product(card, odd):
        yield f"{name}: {value!r}", {**card, name: value}
    for name, value in itertools.product(card["input"], odd):
        yield f"input.{name}: {value!r}", {**card, "input": {**card["input"], name: value}}


@pytest.mark.slow
@pytest.mark.holds("held.1")
def test_7_a_card_says_what_can_be_or_is_refused_with_the_files_name(
    runs: Path, image_folder: Path, tmp_path: Path, came_out: Any
) -> None:
    state, card = read_weights(runs / "finetune")
    path, image = tmp_path / "m.safetensors", image_folder / "val" / "cat" / "0.png"
    refusals, tried, said = 0, 0, ""
    for made, edited in edits(card):
        tried += 1
        save_file(state, path, {"sparsemae": json.dumps(edited)})
        try:
            sparsemae.load(path).predict([image])
        except ValueError as error:
            refusals, said = refusals + 1, str(error)
            assert "\n" not in said, made
            assert path.name in said or image.name in said, (made, said)
    assert 50 < refusals < tried
    came_out("card of others", "each value, and each of its input's, replaced by 15", 2, said, times=tried)
