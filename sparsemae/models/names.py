"""The public names of weights: MAE's and timm's, whatever a file calls them.

A file may hold the network under a prefix (``module.`` of DDP, ``backbone.``, ``visual.trunk.``), and more than one
network (a model and its average, a teacher and a student). Its prefix is what stands before the patch embedding.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

WRAPPERS = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""Of torch.compile, FSDP and activation checkpoints: anywhere in a name."""
PATCH_EMBEDDING = re.compile(
    r"(.*?)(?:patch_embed\.proj\.weight|(?:(?:vit|vit_mae)\.)?embeddings\.patch_embeddings\.projection\.weight)"
)
SECOND_CHOICE = ("model_ema", "state_dict_ema", "ema", "teacher", "momentum_encoder", "student")
"""Of several networks the one without such a part in its prefix is taken, else the first in this order."""
_OTHER_NAMES = (
    (r"^(blocks\.\d+)\.gamma_([12])$", r"\1.ls\2.gamma"),  # DeiT III
    (r"^register_tokens$", "reg_token"),  # DINOv2
)


def prefixes(keys: Iterable[str]) -> set[str]:
    """What stands before each patch embedding among the names of tensors; empty if there is none."""
    return {match[1] for key in keys if (match := PATCH_EMBEDDING.fullmatch(key))}


def public_names(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """A network's weights under MAE's and timm's names, and the names of the tensors beside it.

    Prefixes are taken off, also that of a module named ``encoder``; HF ViTMAE's names are translated, q, k, v fused.

    Raises:
        ValueError: the state holds several networks, two tensors have one name, or q, k and v are not alike.
    """
    bare = {WRAPPERS.sub("", key): value for key, value in state.items()}
    found = prefixes(bare)
    prefix = _chosen(found)
    parent = prefix.removesuffix("encoder.") if f".{prefix}".endswith(".encoder.") else prefix
    inside = {
        key: value
        for key, value in bare.items()
        if key.startswith(parent) and not any(key.startswith(other) for other in found if len(other) > len(prefix))
    }
    named = {
        _translated(key.removeprefix(parent).removeprefix("encoder."), _OTHER_NAMES): value
        for key, value in inside.items()
    }
    outside = [key for key in bare if key not in inside]
    if len(named) + len(outside) < len(state):
        raise ValueError("wanted one tensor for each name, got several that differ in a prefix only")
    return _from_transformers(named), outside


def _chosen(found: set[str]) -> str:
    """The prefix of the network to take."""

    def rank(prefix: str) -> int:
        return max((SECOND_CHOICE.index(part) + 1 for part in prefix.split(".") if part in SECOND_CHOICE), default=0)

    best = sorted(prefix for prefix in found if rank(prefix) == min(map(rank, found)))
    if len(best) > 1 and best[0]:
        raise ValueError(f"wanted one network, got several: {', '.join(best)} (keep one of them)")
    return best[0] if best else ""


def _translated(key: str, table: Iterable[tuple[str, Any]]) -> str:
    for pattern, replacement in table:
        key = re.sub(pattern, replacement, key)
    return key


# HF ViTMAE -> MAE. Both the names of transformers >= 5 and the older ones of the published files.
_HF_NAMES: list[tuple[str, Any]] = [
    (r"^(vit|vit_mae)\.", ""),
    (r"^encoder\.", ""),
    (r"^embeddings\.cls_token", "cls_token"),
    (r"^embeddings\.position_embeddings", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
    (r"^layers?\.(\d+)\.", r"blocks.\1."),
    (r"^layernorm\.", "norm."),
    (
        r"^decoder\.decoder_(layers|encoder\.layer)\.(\d+)\.",
        r"decoder_blocks.\2.",
    ),  # the latter: saved by transformers 5
    (r"^decoder\.(mask_token|decoder_)", r"\1"),
    (r"layernorm_before", "norm1"),
    (r"layernorm_after", "norm2"),
    (r"attention\.attention\.(query|key|value)", r"attn.\1"),
    (r"attention\.([qkv])_proj", lambda m: "attn." + {"q": "query", "k": "key", "v": "value"}[m[1]]),
    (r"attention\.(output\.dense|o_proj)", "attn.proj"),
    (r"(intermediate\.dense|mlp\.fc1)", "mlp.fc1"),
    (r"(?<!attn\.)(output\.dense|mlp\.fc2)", "mlp.fc2"),
]


def _from_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """HF ViTMAE's names translated, q, k and v fused; others as they are."""
    if not any("embeddings.patch_embeddings" in key for key in state):
        return state
    renamed = {_translated(key, _HF_NAMES): value for key, value in state.items()}
    for key in [key for key in renamed if ".attn.query." in key]:
        names = [key.replace("query", part) for part in ("query", "key", "value")]
        parts = [renamed.pop(name) for name in names if name in renamed]
        if len(parts) < 3 or len({(part.shape, part.dtype) for part in parts}) > 1 or not parts[0].dim():
            raise ValueError(f"checkpoint of another architecture: wanted {', '.join(names)} of one shape and type")
        renamed[key.replace("query", "qkv")] = torch.cat(parts)
    return renamed
