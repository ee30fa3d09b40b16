"""A model in the words of others: the files that timm and transformers open.

A classifier is one folder for both: transformers opens timm's with its TimmWrapper (its own ViT cannot pool by mean).
A masked autoencoder becomes transformers' ViTMAEForPreTraining, under the names of the published files.
"""

import re
from typing import Any

from timm.layers import GELU
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from sparsemae.card import InputSpec, ModelCard
from sparsemae.models.mae import MaskedAutoencoder
from sparsemae.models.weights import public_state

_BLOCK = {
    "norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense",
}  # fmt: skip
_FIXED = {
    "cls_token": "vit.embeddings.cls_token", "pos_embed": "vit.embeddings.position_embeddings",
    "patch_embed.proj": "vit.embeddings.patch_embeddings.projection", "norm": "vit.layernorm",
    "mask_token": "decoder.mask_token",
}  # fmt: skip
PILLOW = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}
"""Pillow's numbers of interpolations, which transformers writes."""


def timm_config(vit: VisionTransformer, card: ModelCard) -> dict[str, Any]:
    """``config.json`` beside the weights of a ViT, as `timm.models.save_for_hf` writes it for its own models.

    Raises ValueError if the card names no architecture.
    """
    if not card.architecture:
        raise ValueError("wanted a model with the name of its architecture, got a packed file without")
    spec, classes = card.input, vit.num_classes
    prepared = {name: getattr(spec, name) for name in ("interpolation", "crop_pct", "mean", "std")}
    return {
        "architecture": card.architecture,
        "num_classes": classes,  # not in model_args, where transformers would pass it twice
        "num_features": vit.num_features,
        "global_pool": vit.global_pool,
        "label_names": list(card.class_names) or [str(i) for i in range(classes)],  # or 1,000 would be ImageNet's
        "model_args": {"img_size": spec.img_size, "global_pool": vit.global_pool, **card.model_args},
        "pretrained_cfg": {
            "input_size": [3, spec.img_size, spec.img_size], "fixed_input_size": True, "crop_mode": "center",
            **prepared, "num_classes": classes, "first_conv": "patch_embed.proj", "classifier": "head",
        },
    }  # fmt: skip


def vitmae_configs(model: MaskedAutoencoder, card: ModelCard) -> dict[str, dict[str, Any]]:
    """Files beside the weights of a `ViTMAEForPreTraining`, by name. Raises ValueError on another activation."""
    vit, decoder = model.encoder, model.decoder_blocks[0]
    block: Any
    for i, block in enumerate(vit.blocks):
        act = block.mlp.act
        if not isinstance(act, nn.GELU | GELU) or getattr(act, "approximate", "none") != "none":
            raise ValueError(f"blocks.{i}.mlp.act: wanted GELU, not approximated, as ViTMAE has it, got {act}")
    spec: InputSpec = card.input
    config = {
        "architectures": ["ViTMAEForPreTraining"], "model_type": "vit_mae",
        "hidden_size": vit.embed_dim, "num_hidden_layers": len(vit.blocks), "num_attention_heads": block.attn.num_heads,
        "intermediate_size": block.mlp.fc1.out_features, "hidden_act": "gelu", "layer_norm_eps": block.norm1.eps,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "qkv_bias": block.attn.qkv.bias is not None,
        "image_size": spec.img_size, "patch_size": vit.patch_embed.patch_size[0], "num_channels": vit.in_chans,
        "decoder_hidden_size": model.decoder_embed.out_features, "decoder_num_hidden_layers": len(model.decoder_blocks),
        "decoder_num_attention_heads": decoder.attn.num_heads,  # type: ignore[union-attr]
        "decoder_intermediate_size": decoder.mlp.fc1.out_features,  # type: ignore[union-attr]
        "mask_ratio": card.settings["mask_ratio"], "norm_pix_loss": model.norm_pix_loss,
    }  # fmt: skip
    processor = {
        "image_processor_type": "ViTImageProcessor", "do_resize": True, "do_rescale": True, "do_normalize": True,
        "size": {"height": spec.img_size, "width": spec.img_size}, "resample": PILLOW[spec.interpolation],
        "rescale_factor": 1 / 255, "image_mean": spec.mean, "image_std": spec.std,
    }  # fmt: skip
    return {"config.json": config, "preprocessor_config.json": processor}


def vitmae_state(model: MaskedAutoencoder) -> dict[str, Tensor]:
    """The weights under transformers' names, q, k and v apart. Raises ValueError on what it has no place for."""
    state: dict[str, Tensor] = {}
    for key, value in public_state(model).items():
        layer, _, kind = key.rpartition(".") if "." in key else (key, "", "")
        match = re.fullmatch(r"(decoder_)?blocks\.(\d+)\.(.+)", layer)
        if match is None:
            name = _FIXED.get(layer, f"decoder.{layer}" * layer.startswith("decoder_"))
        else:
            stem = "decoder.decoder_layers" if match[1] else "vit.encoder.layer"
            if match[3] == "attn.qkv":
                for part, third in zip(("query", "key", "value"), value.chunk(3), strict=True):
                    state[f"{stem}.{match[2]}.attention.attention.{part}.{kind}"] = third
                continue
            name = f"{stem}.{match[2]}.{_BLOCK[match[3]]}" if match[3] in _BLOCK else ""
        if not name:
            raise ValueError(f"wanted a ViT as transformers' ViTMAE is, got one with {key}")
        state[f"{name}.{kind}".rstrip(".")] = value
    return state
