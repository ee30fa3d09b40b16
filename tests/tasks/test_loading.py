"""Models from the files of runs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

from sparsemae.models.weights import load_weights, read_weights, save_model
from sparsemae.sparsity import sparsify
from sparsemae.tasks.loading import load_model


@pytest.mark.slow
@pytest.mark.holds("foundation.5")
def test_a_trained_model_is_the_same_in_a_fresh_process(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = """
import sys, torch
from sparsemae.sparsity import iter_sparse, freeze
from sparsemae.tasks.loading import load_model
torch.manual_seed(0)
images, noise = torch.randn(2, 3, 28, 28), torch.rand(2, 16)
mae, classifier = load_model(sys.argv[1], "pretrain")[0], load_model(sys.argv[2], "classify")[0]
masks = {name: layer.current_mask() for name, layer in [*iter_sparse(mae), *iter_sparse(classifier)]}
with torch.no_grad():
    torch.save([masks, mae(images, 0.5, noise).pred, classifier(images)], sys.argv[3])
"""
    outputs = []
    for name in ("here", "fresh"):
        words = [str(runs / "pretrain"), str(runs / "finetune"), str(runs / f"{name}.pt")]
        if name == "here":
            monkeypatch.setattr(sys, "argv", ["", *words])
            exec(script, {})
        else:
            environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
            subprocess.run([sys.executable, "-c", script, *words], check=True, env=environment)
        outputs.append(torch.load(runs / f"{name}.pt", weights_only=True))
    (masks, *predictions), (other_masks, *other_predictions) = outputs
    assert len(masks) == 16
    assert all(torch.equal(masks[name], other_masks[name]) for name in masks)
    assert all(torch.equal(a, b) for a, b in zip(predictions, other_predictions, strict=True))


@pytest.mark.holds("foundation.5")
def test_a_frozen_file_that_breaks_nm_is_refused_naming_the_layer(runs: Path, tmp_path: Path) -> None:
    state = read_weights(runs / "finetune")[0]
    layer = "blocks.1.mlp.fc1"
    state[f"{layer}.weight"][3, :5] = 1.0
    model, card = load_model(runs / "finetune")
    for name, parameter in model.named_parameters():
        parameter.data.copy_(state[name])
    save_model(tmp_path / "broken.safetensors", model, card)
    with pytest.raises(
        ValueError, match=f"broken.safetensors: {layer}: wanted pruned weights to be 0.* row 3, group 0"
    ):
        load_model(tmp_path / "broken.safetensors")


def test_our_files_start_any_timm_vit(runs: Path) -> None:
    model = timm.create_model(
        "vit_base_patch16_224", img_size=28, patch_size=7, embed_dim=32, depth=2, num_heads=2, num_classes=0
    )
    names = sparsify(model, "2:32")
    loaded = load_weights(model, runs / "pretrain")
    assert not loaded.missing
    assert all(key.startswith(("decoder", "mask_token")) for key in loaded.unexpected)
    assert len(names) == 8
