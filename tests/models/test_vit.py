from __future__ import annotations

import pytest
import torch
from torch import nn

from sparsemae.models import MaskedAutoencoder, build_vit

NAME = "vit_base_patch16_224"
TINY = {"patch_size": 7, "embed_dim": 32, "depth": 3, "num_heads": 2}


def test_an_encoder_suits_the_autoencoder():
    encoder = build_vit(NAME, TINY, img_size=28)
    assert isinstance(encoder.norm, nn.LayerNorm)
    assert isinstance(encoder.head, nn.Identity)
    assert encoder.patch_embed.grid_size == (4, 4)
    MaskedAutoencoder(encoder, 16, 1, 2)


def test_a_classifier_has_maes_finetuning_head():
    model = build_vit(NAME, {**TINY, "embed_dim": 256}, img_size=28, num_classes=100)
    assert isinstance(model.norm, nn.Identity)
    assert isinstance(model.fc_norm, nn.LayerNorm)
    assert model.head.weight.shape == (100, 256)
    assert model.head.weight.std().item() == pytest.approx(2e-5, rel=0.05)
    assert (model.head.bias == 0).all()
    assert model(torch.randn(2, 3, 28, 28)).shape == (2, 100)

    seen = []
    model.fc_norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    images = torch.randn(2, 3, 28, 28)
    tokens = model.eval().forward_features(images)
    model(images)
    torch.testing.assert_close(seen[0], tokens[:, 1:].mean(dim=1))


def test_drop_path_grows_linearly_from_zero():
    model = build_vit(NAME, TINY, img_size=28, drop_path=0.2)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2])


@pytest.mark.parametrize(
    ("name", "args", "img_size", "message"),
    [
        ("vit_gigantic", {}, 224, r"^model\.name: wanted a timm model, got 'vit_gigantic'$"),
        ("resnet18", {}, 224, r"^model\.\w+: .*resnet18"),
        ("vit_tiny_patch16_224", {"widht": 3}, 224, r"^model\.args: vit_tiny_patch16_224 does not take {'widht': 3}: "),
        ("vit_tiny_patch16_224", {}, 8, r"^data\.img_size: wanted at least one patch of 16 px, got 8 px$"),
        (
            "vit_tiny_patch16_224",
            {"patch_size": 32},
            28,
            r"^data\.img_size: wanted at least one patch of 32 px, got 28",
        ),
    ],
)
def test_refusals(name, args, img_size, message):
    with pytest.raises(ValueError, match=message):
        build_vit(name, args, img_size)
