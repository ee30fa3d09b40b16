"""Starting from somebody's weights: which of them fit, what was resampled, when it is another network."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from sparsemae.models.mae import sincos_pos_embed
from sparsemae.models.weights import Loaded, load_weights, read_weights, to_public_names

NEW = ("head.*", "fc_norm.*", "*.weight_mask")
"""Never taken over: the head and its norm are new in each stage, and a frozen mask moves again."""
WANTED_FRACTION = 0.9
MAE_LICENSE = "weights published by MAE's authors are under CC BY-NC 4.0: not for commercial use"


@dataclass
class Start:
    """What `start_from` did."""

    loaded: Loaded
    fraction: float
    """Parameters of the encoder that the source filled, as a fraction of all of them."""
    resized: list[str] = field(default_factory=list)
    """Position embeddings that were resampled to another grid."""
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        resized = f"; resampled: {', '.join(self.resized)}" if self.resized else ""
        return "; ".join([f"{self.fraction:.1%} of the encoder's parameters; {self.loaded}{resized}", *self.notes])


def start_from(model: nn.Module, source: str) -> Start:
    """Load a starting point into a classifier or an autoencoder, its head left new.

    Args:
        model: a timm ViT, or a module with one as ``encoder``.
        source: a run folder, a file (MAE encoder-only or full, timm, HF ViTMAE, our own), or ``timm:NAME`` for
            timm's pretrained weights, which are downloaded.

    Raises:
        ValueError: the source cannot be read, or used, or fewer than 90 % of the encoder's parameters match by name and
            shape (says how many); names the source.
    """
    encoder = model if isinstance(model, VisionTransformer) else model.encoder
    assert isinstance(encoder, VisionTransformer)
    try:
        state, license = _state(source)
        resized = _resample_positions(state, encoder)
    except RuntimeError as error:  # torch's, on position embeddings that are no grid of numbers
        raise ValueError(f"{source}: {error}") from error
    wanted = {
        name: parameter.shape
        for name, parameter in encoder.named_parameters()
        if not any(fnmatchcase(name, glob) for glob in NEW)
    }
    fits = {name for name, shape in wanted.items() if name in state and state[name].shape == shape}
    fraction = sum(wanted[name].numel() for name in fits) / sum(shape.numel() for shape in wanted.values())
    if fraction < WANTED_FRACTION:
        raise ValueError(
            f"{source}: checkpoint of another architecture: wanted at least {WANTED_FRACTION:.0%} of the encoder's "
            f"parameters, matched {fraction:.1%}; {_difference(state, wanted, fits)}"
        )
    unfit = [name for name in wanted if name in state and name not in fits]
    loaded = load_weights(model, state, ignore=[*NEW, *unfit], name=source)
    return Start(loaded, fraction, resized, [license] if license else [])


def _state(source: str) -> tuple[dict[str, Tensor], str]:
    """Tensors under public names, and what to say of their license."""
    name = source.removeprefix("timm:")
    if name == source:
        tensors, metadata = read_weights(source)
        try:
            state = to_public_names(tensors)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
        return state, MAE_LICENSE if not metadata and _is_of_mae(state) else ""
    if not timm.is_model(name):
        raise ValueError(f"{source}: wanted a timm model after timm:, got {name!r}")
    create: Callable[..., nn.Module] = timm.create_model
    model = create(name, pretrained=True)
    license = getattr(model, "pretrained_cfg", {}).get("license")
    return dict(model.state_dict()), f"license of {source}, as timm names it: {license}" if license else ""


def _is_of_mae(state: Mapping[str, Tensor]) -> bool:
    """A decoder's mask token, or in a file of the encoder alone position embeddings that are still MAE's fixed ones."""
    positions = state.get("pos_embed")
    if "mask_token" in state or positions is None or positions.ndim != 3 or positions.shape[-1] % 4:
        return "mask_token" in state
    side = math.isqrt(positions.shape[1] - 1)
    if side * side != positions.shape[1] - 1:
        return False
    return torch.allclose(positions.float(), sincos_pos_embed((side, side), positions.shape[-1]), atol=1e-3)


def _resample_positions(state: dict[str, Tensor], encoder: VisionTransformer) -> list[str]:
    """Bring a square grid of position embeddings to the encoder's own, as timm does (bicubic, antialiased).

    Before it come those of as many other tokens as leave a square: one for a class token, two in distilled DeiTs, none
    where tokens take none (DeiT III), which is as good as a zero. What does not fit is left as it is.
    """
    positions, own = state.get("pos_embed"), encoder.pos_embed
    if positions is None or own is None or positions.dim() != 3 or positions.shape[-1] != own.shape[-1]:
        return []
    if positions.shape == own.shape:
        return []
    tokens = [state[name].shape[1] for name in ("cls_token", "dist_token", "reg_token") if name in state]
    sides = {before: math.isqrt(positions.shape[1] - before) for before in (0, sum(tokens[:1]), sum(tokens))}
    before = next((before for before, side in sides.items() if side**2 == positions.shape[1] - before), None)
    prefix = 0 if encoder.no_embed_class else encoder.num_prefix_tokens
    if before is None or prefix > max(before, 1):
        return []
    first = positions[:, :prefix] if before else positions.new_zeros(1, prefix, positions.shape[-1])
    state["pos_embed"] = resample_abs_pos_embed(
        torch.cat((first, positions[:, before:]), dim=1), new_size=list(encoder.patch_embed.grid_size),
        old_size=[sides[before]] * 2, num_prefix_tokens=prefix,
    )  # fmt: skip
    return ["pos_embed"]


def _difference(state: Mapping[str, Tensor], wanted: Mapping[str, object], fits: set[str]) -> str:
    for name, shape in wanted.items():
        if name not in fits and name in state:
            return f"{name} is {list(state[name].shape)} for {list(shape)}"  # type: ignore[call-overload]
    return f"lacks {', '.join([name for name in wanted if name not in state][:3])}"
