"""Which network somebody's weights are of: timm's name and arguments for it, read from names and shapes of tensors.

They say everything but the number of heads, which is timm's for a usual embedding dimension, and what has no weights
at all (the activation, the norms' eps), which is timm's default.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from sparsemae.models.hub import fetched, timm_name
from sparsemae.models.names import public_names
from sparsemae.models.weights import card_of, read_weights

SIZES = {
    192: ("vit_tiny_patch16_224", 12, 16, 3),
    384: ("vit_small_patch16_224", 12, 16, 6),
    768: ("vit_base_patch16_224", 12, 16, 12),
    1024: ("vit_large_patch16_224", 24, 16, 16),
    1280: ("vit_huge_patch14_224", 32, 14, 16),
}
"""Embedding dimension -> timm's name, depth, patch side and heads."""


@dataclass(frozen=True)
class Architecture:
    """As in ``model.name`` and ``model.args``."""

    name: str
    args: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    """What the source does not say, and was taken for granted."""

    def __str__(self) -> str:
        args = ", ".join(f"{name}: {json.dumps(value)}" for name, value in self.args.items())
        return f"--model.name {self.name} --model.args '{{{args}}}'"


def architecture_of(source: str, given: Mapping[str, Any] | None = None) -> Architecture:
    """The network of a starting point (as `start_from` takes them), without loading it into one.

    Args:
        given: arguments that the user has set, and that take precedence.

    Raises:
        ValueError: the source cannot be read, or does not say which network it is of; names the source.
    """
    given = dict(given or {})
    if source.startswith("timm:"):
        found = Architecture(timm_name(source).replace("_distilled", ""))  # a stage replaces its second head and token
    else:
        state, metadata = read_weights(fetched(source))
        if metadata:
            card = card_of(metadata, Path(source))
            found = Architecture(card.architecture, card.model_args)
        else:
            try:
                found = described(public_names(state)[0], given.get("num_heads"))
            except ValueError as error:
                raise ValueError(f"{source}: {error}") from error
    return Architecture(found.name, {**found.args, **given}, found.note)


def described(state: Mapping[str, Tensor], num_heads: int | None = None) -> Architecture:
    """The VisionTransformer of weights under public names. Raises ValueError on what they do not say."""
    patch, hidden = state.get("patch_embed.proj.weight"), state.get("blocks.0.mlp.fc1.weight")
    if patch is None or hidden is None or patch.dim() != 4 or not hidden.dim() or not patch.numel():
        raise ValueError("wanted weights of a ViT, got no patch_embed.proj.weight or blocks.0.mlp.fc1.weight")
    if "norm_pre.weight" in state:
        raise ValueError(
            "wanted --model.name with norm_pre, as a CLIP has it, whose activation its weights do not say: "
            "vit_base_patch16_clip_quickgelu_224 or the like for OpenAI's, vit_base_patch16_clip_224 for others"
        )
    width, (height, side) = len(patch), patch.shape[2:]
    name, depth, usual_side, heads = SIZES.get(width, SIZES[768])
    tokens = {key: state[key].numel() // width for key in ("cls_token", "dist_token", "reg_token") if key in state}
    positions = state["pos_embed"].numel() // width if "pos_embed" in state else 0
    patches = positions - sum(tokens.values())
    first = {key.removeprefix("blocks.0.") for key in state}
    class_token = "cls_token" in tokens
    got_and_usual = {
        "embed_dim": (width, width if width in SIZES else None),
        "depth": (len({key.split(".")[1] for key in state if key.startswith("blocks.")}), depth),
        "patch_size": (side if height == side else [height, side], usual_side),
        "mlp_ratio": (len(hidden) / width, 4.0),
        "qkv_bias": ("attn.qkv.bias" in first, True),
        "proj_bias": ("attn.proj.bias" in first, True),
        "qk_norm": ("attn.q_norm.weight" in first, False),
        "scale_attn_norm": ("attn.norm.weight" in first, False),
        "scale_mlp_norm": ("mlp.norm.weight" in first, False),
        "init_values": (1e-5 if "ls1.gamma" in first else None, None),
        "reg_tokens": (tokens.get("reg_token", 0), 0),
        "class_token": (class_token, True),
        "global_pool": ("token" if class_token else "avg", "token"),
        "no_embed_class": (positions > 0 and (patches < 1 or math.isqrt(patches) ** 2 != patches), False),
    }
    args = {argument: got for argument, (got, usual) in got_and_usual.items() if got != usual}
    if num_heads is None and width not in SIZES:
        wanted = str(Architecture(name, {**args, "num_heads": 0})).replace("num_heads: 0", "num_heads: N")
        raise ValueError(f"weights of an unusual embedding dimension do not say their number of heads: wanted {wanted}")
    note = f"{heads} heads, as {name} has; --model.args {{num_heads: N}} if it has others"
    return Architecture(name, args, note if num_heads is None else "")
