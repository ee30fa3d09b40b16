"""Small ViTs and autoencoders of random weights, and the names that their files must have."""

import timm
import torch
from torch import nn

from sparsemae.card import InputSpec, ModelCard
from sparsemae.models import MaskedAutoencoder

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
CARD = ModelCard("pretrain", "vit_tiny_patch16_224", {}, InputSpec(32, (0.5,) * 3, (0.5,) * 3))
BLOCK = ["norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"]


def leaves(names: list[str]) -> list[str]:
    return [f"{name}.{leaf}" for name in names for leaf in ("weight", "bias")]


ENCODER_KEYS = [
    "cls_token",
    "pos_embed",
    *leaves(["patch_embed.proj", *(f"blocks.{i}.{x}" for i in range(2) for x in BLOCK)]),
]
MAE_KEYS = sorted(
    [
        *ENCODER_KEYS,
        *leaves(["norm"]),
        "mask_token",
        "decoder_pos_embed",
        *leaves(["decoder_embed", *(f"decoder_blocks.0.{x}" for x in BLOCK), "decoder_norm", "decoder_pred"]),
    ]
)
"""Keys of MAE's published full checkpoints, for an encoder of two blocks and a decoder of one."""


def make_vit(seed: int = 0, **options) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model("vit_tiny_patch16_224", **{**VIT, "num_classes": 0, **options})


def make_mae(seed: int = 0, **options) -> MaskedAutoencoder:
    return randomized(MaskedAutoencoder(make_vit(seed, **options), 16, 1, 2))


def make_classifier(seed: int = 1) -> nn.Module:
    return make_vit(seed, num_classes=5, global_pool="avg")


def randomized(model: nn.Module) -> nn.Module:
    """Every parameter random: no weight fits by its initial value."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model
