"""Other people's checkpoints: what stands around the weights, and before their names."""

import argparse
import os
import pathlib
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small import MAE_KEYS, make_classifier, make_mae, make_vit, randomized
from torch import Tensor

from sparsemae.models import load_weights
from sparsemae.models.start import start_from
from sparsemae.models.weights import public_state, read_weights

pytestmark = pytest.mark.holds("right.1")


def around(state: dict[str, Tensor]) -> dict[str, Any]:
    """What MAE's and DeiT's training scripts save beside the weights."""
    arguments = argparse.Namespace(
        lr=1.5e-4, betas=(0.9, 0.95), output_dir="out", seed=np.int64(0), data=pathlib.PurePosixPath("/data"), dist=None
    )
    return {
        "model": state,
        "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": np.float64(1e-3)}]},
        "scaler": {"scale": 65536.0},
        "epoch": np.int64(799),
        "max_accuracy": np.float64(0.83),
        "flags": np.bool_(True),
        "mean": np.array([0.485, 0.456, 0.406]),
        "namespace": types.SimpleNamespace(a=1),
        "args": arguments,
    }


@pytest.mark.parametrize("kind", ["zip", "before torch 1.6", "before torch 1.6, numpy 1"])
def test_item_13_maes_and_deits_own_files(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    state, file = public_state(make_mae()), tmp_path / "checkpoint.pth"
    torch.save(around(state), file, _use_new_zipfile_serialization=kind == "zip")
    if kind.endswith("numpy 1"):  # which has another name for its core
        file.write_bytes(file.read_bytes().replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    monkeypatch.setattr(argparse.Namespace, "__init__", lambda *args, **options: pytest.fail("was made"))
    monkeypatch.setattr(np, "frombuffer", lambda *args, **options: pytest.fail("was made"))
    model = make_mae(seed=1)
    assert sorted(load_weights(model, file, strict=True).used) == MAE_KEYS
    assert all(torch.equal(value, state[key]) for key, value in public_state(model).items())


class Trap:
    """Pickles to a call that leaves a trace."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_item_13_code_among_the_arguments_is_refused(tmp_path: Path, zipped: bool) -> None:
    trace, file = tmp_path / "executed", tmp_path / "trap.pth"
    content = {**around(public_state(make_mae())), "args": argparse.Namespace(lr=Trap(trace))}
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"trap\.pth: wanted a torch file of tensors only, .* that needs \S*system "):
        read_weights(file)
    assert not trace.exists()


PREFIXES = (
    "module.", "model.", "_orig_mod.", "backbone.", "visual.", "visual.trunk.", "teacher.", "student.",
    "model_ema.module.", "module._orig_mod.", "model.backbone.", "encoder.", "module.encoder.", "teacher.backbone.",
    "base_encoder.",
)  # fmt: skip


@pytest.mark.parametrize("prefix", PREFIXES)
def test_item_13_prefixes_are_taken_off(tmp_path: Path, prefix: str) -> None:
    source = randomized(make_vit())
    state = {f"{prefix}{key}": value for key, value in source.state_dict().items()}
    torch.save(state, tmp_path / "prefixed.pth")
    model = make_classifier()
    assert start_from(model, str(tmp_path / "prefixed.pth")).fraction == 1.0
    assert torch.equal(model.blocks[1].mlp.fc1.weight, source.blocks[1].mlp.fc1.weight)


def test_item_13_wrappers_inside_of_names(tmp_path: Path) -> None:
    source = randomized(make_vit())
    state = {key.replace("blocks.0.", "blocks.0._orig_mod."): value for key, value in source.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "compiled.pth")
    assert start_from(make_classifier(), str(tmp_path / "compiled.pth")).fraction == 1.0


NETWORKS: dict[str, tuple[tuple[str, ...], str]] = {
    "a model and its average": (("model", "model_ema"), "model"),
    "teacher and student": (("student", "teacher"), "teacher"),
    "the average alone": (("state_dict_ema",), "state_dict_ema"),
}


@pytest.mark.parametrize("what", NETWORKS)
def test_item_13_of_several_networks_one_is_taken_and_the_others_are_named(tmp_path: Path, what: str) -> None:
    names, taken = NETWORKS[what]
    networks = {name: randomized(make_vit(seed)) for seed, name in enumerate(names)}
    content = {
        name: {f"module.{key}" if "ema" in name else key: value for key, value in vit.state_dict().items()}
        for name, vit in networks.items()
    }
    torch.save({**content, "epoch": 3}, tmp_path / "several.pth")
    model = make_classifier()
    result = start_from(model, str(tmp_path / "several.pth"))
    assert result.fraction == 1.0
    assert torch.equal(model.blocks[1].attn.qkv.weight, networks[taken].blocks[1].attn.qkv.weight)
    left = [name for name in names if name != taken]
    assert all(f"beside it and left out: 30 tensors ({name}." in str(result) for name in left)
    assert left or "left out" not in str(result)


def test_item_13_networks_beside_each_other_that_nothing_ranks_are_refused(tmp_path: Path) -> None:
    state = make_vit().state_dict()
    both = {f"{name}.{key}": value for name in ("left", "right") for key, value in state.items()}
    torch.save(both, tmp_path / "both.pth")
    with pytest.raises(ValueError, match=r"both\.pth: wanted one network, got several: left\., right\. \(keep one of "):
        start_from(make_classifier(), str(tmp_path / "both.pth"))


def test_item_13_two_tensors_of_one_name_are_refused() -> None:
    state = dict(make_vit().state_dict())
    with pytest.raises(ValueError, match=r"^state dict: wanted one tensor for each name, got several that differ in"):
        load_weights(make_classifier(), {**state, "encoder.norm.weight": torch.ones(32)})
