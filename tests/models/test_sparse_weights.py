"""Sparse and frozen models in their files."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from small import CARD, MAE_KEYS, make_classifier, make_mae

from sparsemae.models import load_weights
from sparsemae.models.weights import public_state, read_weights, save_model
from sparsemae.sparsity import freeze, sparsify


@pytest.mark.holds("foundation.5")
@pytest.mark.parametrize("frozen", [False, True])
def test_a_sparse_autoencoder_survives_its_file(tmp_path, frozen):
    model = make_mae()
    sparsify(model, "2:8")
    if frozen:
        freeze(model)
    save_model(tmp_path / "m.safetensors", model, CARD)
    state, _ = read_weights(tmp_path / "m.safetensors")
    masks = {key for key in state if key.endswith(".weight_mask")}
    assert len(masks) == (8 if frozen else 0)
    assert sorted(state.keys() - masks) == MAE_KEYS
    assert "blocks.1.mlp.fc2.weight_mask" in masks or not frozen
    other = make_mae(seed=1)
    sparsify(other, "2:8")
    loaded = load_weights(other, tmp_path / "m.safetensors", strict=True)
    assert sorted(loaded.used) == sorted(state)
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    assert torch.equal(other(images, noise=noise).pred, model(images, noise=noise).pred)
    assert other.encoder.blocks[0].attn.qkv.frozen is frozen


@pytest.mark.holds("foundation.5")
def test_a_frozen_autoencoder_into_a_sparse_classifier():
    model, classifier = make_mae(), make_classifier()
    for net in (model, classifier):
        sparsify(net, "2:8")
    freeze(model)
    loaded = load_weights(classifier, public_state(model))
    assert sum(key.endswith(".weight_mask") for key in loaded.used) == 8
    assert not any(key.endswith(".weight_mask") for key in loaded.unexpected)
    assert torch.equal(classifier.blocks[1].mlp.fc1.weight_mask, model.encoder.blocks[1].mlp.fc1.weight_mask)


def test_a_frozen_file_into_a_dense_model_says_that_masks_are_unused():
    model, other = make_mae(), make_mae(seed=1)
    sparsify(model, "2:8")
    freeze(model)
    loaded = load_weights(other, public_state(model))
    assert sum(key.endswith(".weight_mask") for key in loaded.unexpected) == 8
    assert sorted(loaded.used) == MAE_KEYS


@pytest.mark.holds("foundation.5")
def test_a_frozen_file_that_breaks_the_pattern_is_refused_naming_the_layer(tmp_path):
    model = make_mae()
    sparsify(model, "2:8")
    freeze(model)
    layer = model.encoder.blocks[1].mlp.fc1
    with torch.no_grad():
        layer.weight[5, int((~layer.weight_mask[5]).nonzero()[0])] = 0.25
    save_model(tmp_path / "broken.safetensors", model, CARD)
    other = make_mae(seed=1)
    sparsify(other, "2:8")
    with pytest.raises(
        ValueError, match=r"blocks\.1\.mlp\.fc1: wanted pruned weights to be 0, got 0\.25 in row 5, group "
    ):
        load_weights(other, tmp_path / "broken.safetensors")


FRESH = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from small import make_mae
from sparsemae.models import load_weights
from sparsemae.sparsity import iter_sparse, sparsify
folder = sys.argv[2]
model = make_mae(seed=9)
sparsify(model, "2:8")
load_weights(model, folder + "/m.safetensors", strict=True)
torch.manual_seed(3)
images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
masks = {name: layer.current_mask() for name, layer in iter_sparse(model)}
torch.save({"pred": model(images, noise=noise).pred.detach(), "masks": masks}, folder + "/out.pt")
"""


@pytest.mark.slow
@pytest.mark.holds("foundation.5")
@pytest.mark.parametrize("frozen", [False, True])
def test_train_save_and_load_in_a_fresh_process(tmp_path, frozen, request):
    model = make_mae()
    sparsify(model, "2:8")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    torch.manual_seed(3)
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    model(images, noise=noise).loss.backward()
    optimizer.step()
    if frozen:
        freeze(model)
    save_model(tmp_path / "m.safetensors", model, CARD)
    subprocess.run([sys.executable, "-c", FRESH, str(request.path.parent), str(tmp_path)], check=True, timeout=120)
    out = torch.load(tmp_path / "out.pt", weights_only=True)
    assert torch.equal(out["pred"], model(images, noise=noise).pred)
    for name, mask in out["masks"].items():
        assert torch.equal(mask, model.get_submodule(name).current_mask())
    assert len(out["masks"]) == 8
