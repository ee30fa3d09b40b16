"""Starting from somebody's weights: which of them fit, what was resampled, when it is another network."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from sparsemae.card import InputSpec, ModelCard
from sparsemae.files import existing
from sparsemae.models.architecture import Architecture, described
from sparsemae.models.export import PILLOW
from sparsemae.models.hub import fetched, file_beside, pretrained, timm_name
from sparsemae.models.mae import sincos_pos_embed
from sparsemae.models.names import public_names
from sparsemae.models.vit import build_vit
from sparsemae.models.weights import (
    Loaded,
    card_of,
    find_weights,
    kept_alone,
    load_weights,
    public_state,
    read_metadata,
    read_weights,
)

NEW = ("head.*", "fc_norm.*", "*.weight_mask")
"""Never taken over: the head and its norm are new in each stage, and a frozen mask moves again."""
REPLACED = (
    *NEW, "head_dist.*", "pre_logits.*", "attn_pool.*", "classifier.*", "pooler.*", "mask_token", "dist_token",
    "decoder*", "pyramid.*", "decode_head.*", "auxiliary_head.*",
)  # fmt: skip
"""What a stage has in place of the source's own, by design: everything else of the source must find its place."""
KNOWN = re.compile(
    r"cls_token|reg_token|pos_embed|(patch_embed\.proj|norm_pre|norm)\.(weight|bias)|blocks\.\d+\.(ls[12]\.gamma|"
    r"(norm[12]|attn\.(qkv|proj|norm|q_norm|k_norm)|mlp\.(fc1|fc2|norm))\.(weight|bias))"
)
"""What some VisionTransformer of timm has."""
WANTED_FRACTION = 0.9
MAE_LICENSE = "cc-by-nc-4.0"
"""Of the weights that MAE's authors have published."""
SPEC_FILES = {
    "config.json": ("mean", "std", "interpolation", "bicubic"),
    "preprocessor_config.json": ("image_mean", "image_std", "resample", "bilinear"),
}
"""Of timm and of transformers, beside weights: names of what was done to their images, and the resampling unless said.
"""


@dataclass
class Start:
    """What `start_from` did."""

    loaded: Loaded
    fraction: float
    """Parameters of the encoder that the source filled, as a fraction of all of them."""
    resized: list[str] = field(default_factory=list)
    """Position embeddings that were resampled to another grid."""
    notes: list[str] = field(default_factory=list)
    license: str = ""
    """Of the source, where it is known, as the hub names it."""
    card: ModelCard | None = None
    """The source's, if it is of ours."""

    def __str__(self) -> str:
        resized = f"; resampled: {', '.join(self.resized)}" if self.resized else ""
        return "; ".join([f"{self.fraction:.1%} of the encoder's parameters; {self.loaded}{resized}", *self.notes])


def start_from(model: nn.Module, source: str, sparse: bool = False) -> Start:
    """Load a starting point into a classifier or an autoencoder, its head left new.

    Args:
        model: a timm ViT, or a module with one as ``encoder``.
        source: a run folder, a file (MAE encoder-only or full, timm, HF ViTMAE, our own), or ``timm:NAME`` for
            timm's pretrained weights, which are downloaded.
        sparse: take the kept weights alone, where the source has fixed masks beside latent ones.

    Raises:
        ValueError: the source cannot be read, or is of another network: fewer than 90 % of the encoder's parameters
            match by name and shape (says how many), or something of it has no place in the model; names the source
            and, where that is known, the settings that would take it.
    """
    encoder = model if isinstance(model, VisionTransformer) else model.encoder
    assert isinstance(encoder, VisionTransformer)
    origin = _open(source)
    state = kept_alone(origin.state) if sparse else dict(origin.state)
    try:
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
    own = {name: value.shape for name, value in public_state(model).items()}
    pooled = model is not encoder or not isinstance(encoder.fc_norm, nn.Identity)
    unfit = [name for name, value in state.items() if own.get(name) != value.shape]
    lost = [name for name in unfit if not any(fnmatchcase(name, glob) for glob in REPLACED + ("norm.*",) * pooled)]
    wrong, setting = f"{source}: checkpoint of another architecture: ", _setting(origin, lost)
    if fraction < WANTED_FRACTION:
        raise ValueError(
            f"{wrong}wanted at least {WANTED_FRACTION:.0%} of the encoder's parameters, matched {fraction:.1%}; "
            f"{_difference(state, wanted, fits)}{setting}"
        )
    if lost:
        raise ValueError(f"{wrong}the model has no place for its {_some(lost, state, own)}{setting}")
    if "pos_embed" in wanted and "pos_embed" not in state:
        raise ValueError(f"{wrong}wanted position embeddings, got none (rotary or relative ones cannot be taken over)")
    _check_forward(origin, encoder)
    beside = f"beside it and left out: {len(origin.beside)} tensors ({', '.join(origin.beside[:3])})"
    said = f"license of {source}, as far as is known: {origin.license}" + ", not for commercial use" * (
        "-nc-" in origin.license
    )
    if origin.card is None and origin.network is None:
        said += " (MAE's, by its position embeddings; --license of pack and export names another)"
    notes = [said] * bool(origin.license) + [beside] * bool(origin.beside)
    loaded = load_weights(model, state, ignore=[*NEW, *unfit], name=source)
    return Start(loaded, fraction, resized, notes, origin.license, origin.card)


def input_of(source: str) -> tuple[InputSpec | None, Literal["dense", "sparse"]]:
    """How the images of somebody's weights were prepared, where that is known, and whether they are sparse.

    Of foreign weights the files beside them are asked that timm and transformers write, but for the size (0).

    Raises ValueError as `start_from`.
    """
    if source.startswith("timm:"):
        found = timm.get_pretrained_cfg(timm_name(source))
        if found is None:
            return None, "dense"
        return InputSpec(found.input_size[-1], found.mean, found.std, found.interpolation), "dense"
    path = find_weights(fetched(source))
    metadata = read_metadata(path) if path.suffix == ".safetensors" else {}
    card = card_of(metadata, path) if metadata else None
    if card is not None:
        return card.input, "sparse" if card.patterns else "dense"
    specs = (_spec_in(file) for name in SPEC_FILES if (file := file_beside(source, path, name)) is not None)
    return next((spec for spec in specs if spec is not None), None), "dense"


def _spec_in(file: Path) -> InputSpec | None:
    """What one of `SPEC_FILES` says; None: nothing of images. Raises ValueError, naming it, if that cannot be used."""
    *names, usual = SPEC_FILES[file.name]
    try:
        document = json.loads(existing(file).read_text(encoding="utf-8"))
        found = (document.get("pretrained_cfg") or document) if isinstance(document, dict) else {}
        mean, std, way = (found.get(name) for name in names)
        if mean is None or std is None:
            return None
        if not found.get("do_normalize", True):
            mean, std = [0] * 3, [1] * 3
        way = str(next((name for name, number in PILLOW.items() if number == way), way or usual))
        spec = InputSpec(0, tuple(map(float, mean)), tuple(map(float, std)), way)
    except Exception as error:  # it may hold anything
        raise ValueError(f"{file}: wanted {', '.join(names)} of images as JSON, got {error!r:.200}") from error
    fits = len(spec.mean) == len(spec.std) == 3 and all(map(math.isfinite, spec.mean + spec.std)) and min(spec.std) > 0
    if not fits or way not in PILLOW:
        raise ValueError(f"{file}: wanted {', '.join(names)} of RGB images, got {mean}, {std}, {way}"[:300])
    return spec


@dataclass(frozen=True)
class _Origin:
    """Somebody's weights under public names, and what is known of them."""

    source: str
    state: dict[str, Tensor]
    license: str = ""
    """As the hub names it."""
    beside: list[str] = field(default_factory=list)
    """Tensors of the file that are no part of the network."""
    card: ModelCard | None = None
    network: VisionTransformer | None = None
    """Where timm made it."""


def _open(source: str) -> _Origin:
    if source.startswith("timm:"):
        network = pretrained(source)
        license = getattr(network, "pretrained_cfg", {}).get("license") or ""
        return _Origin(source, dict(network.state_dict()), license, network=network)
    tensors, metadata = read_weights(fetched(source))
    card = card_of(metadata, Path(source)) if metadata else None
    try:
        state, beside = public_names(tensors)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    license = card.license if card is not None else MAE_LICENSE if _is_of_mae(state) else ""
    return _Origin(source, state, license, beside, card)


def _check_forward(origin: _Origin, encoder: VisionTransformer) -> None:
    """Refuse a source whose forward is known and computes something else with the same weights."""
    network = origin.network
    if (card := origin.card) is not None:
        try:
            with torch.device("meta"):
                network = build_vit(card.architecture, {**card.model_args, "depth": 1}, card.input.img_size)
        except Exception as error:  # whatever timm makes of what a file says
            raise ValueError(f"{origin.source}: wanted a card of a model that can be built: {error!r:.200}") from error
    if network is None:
        return
    theirs, ours = _forward(network), _forward(encoder)
    if changed := [f"{name} {value} for {ours[name]}" for name, value in theirs.items() if value != ours[name]]:
        raise ValueError(f"{origin.source}: checkpoint of another architecture: {', '.join(changed)}{_setting(origin)}")


def _forward(vit: VisionTransformer) -> dict[str, object]:
    """What the forward of a block depends on beside its weights."""
    block = vit.blocks[0]
    attention, mlp, norm = (getattr(block, name, block) for name in ("attn", "mlp", "norm1"))
    return {
        "block": type(block).__name__,
        "attention": type(attention).__name__,
        "num_heads": getattr(attention, "num_heads", None),
        "activation": repr(getattr(mlp, "act", None)),
        "norm": type(norm).__name__,
        "norm's eps": getattr(norm, "eps", None),
    }


def _setting(origin: _Origin, lost: Sequence[str] = ()) -> str:
    """How to build a model that takes the source, as far as it is known."""
    if strange := [name for name in lost if not KNOWN.fullmatch(name)]:
        return f"; no VisionTransformer of timm has {strange[0]}"
    try:
        if origin.network is not None:
            return f"; wanted --model.name {origin.source.removeprefix('timm:')}"
        if origin.card is not None:
            return f"; wanted {Architecture(origin.card.architecture, origin.card.model_args)}"
        return f"; wanted {described(origin.state)}"
    except ValueError as error:
        return f"; {error}"


def _some(names: list[str], got: Mapping[str, Tensor], own: Mapping[str, torch.Size]) -> str:
    shapes = {name: f" {list(got[name].shape)} for {list(own[name])}" for name in names if name in own}
    first = ", ".join(f"{name}{shapes.get(name, '')}" for name in names[:3])
    return f"{first} and {len(names) - 3} more" if len(names) > 3 else first


def _is_of_mae(state: Mapping[str, Tensor]) -> bool:
    """Position embeddings that are still MAE's fixed ones, and a decoder beside a mask token, which others have too.

    A guess: whoever pretrains in MAE's way has the same.
    """
    positions = state.get("pos_embed")
    if positions is None or positions.ndim != 3 or positions.shape[-1] % 4:
        return False
    if "mask_token" in state and "decoder_embed.weight" not in state:
        return False
    side = math.isqrt(max(positions.shape[1] - 1, 0))
    if not positions.numel() or side * side != positions.shape[1] - 1:
        return False
    return torch.allclose(positions.float(), sincos_pos_embed((side, side), positions.shape[-1]), atol=1e-3)


def _resample_positions(state: dict[str, Tensor], encoder: VisionTransformer) -> list[str]:
    """Bring a square grid of position embeddings to the encoder's own, as timm does (bicubic, antialiased).

    Before it come those of as many other tokens as leave a square: one for a class token, two in distilled DeiTs, none
    where tokens take none (DeiT III), which is as good as a zero. What does not fit is left as it is.
    """
    positions, own = state.get("pos_embed"), encoder.pos_embed
    if positions is None or own is None or positions.dim() != 3 or positions.shape[::2] != own.shape[::2]:
        return []
    if positions.shape == own.shape:
        return []
    width, count = positions.shape[-1], positions.shape[1]
    tokens = [state[name].numel() // width for name in ("cls_token", "dist_token", "reg_token") if name in state]
    sides = {before: math.isqrt(max(count - before, 0)) for before in (0, sum(tokens[:1]), sum(tokens))}
    before = next((before for before, side in sides.items() if side and side**2 == count - before), None)
    if before is None:
        return []
    first = positions[:, :before]
    if "dist_token" in state and not hasattr(encoder, "dist_token"):
        first = first[:, :1]
    if encoder.no_embed_class:  # the tokens hold their own position embeddings
        for name, of_token in (("cls_token", first[:, :1]), ("reg_token", first[:, 1:])):
            if name in state and of_token.numel():
                state[name] = state[name] + of_token
        first = first[:, :0]
    else:
        first = torch.cat((first, first.new_zeros(1, encoder.num_prefix_tokens, width)), dim=1)
        first = first[:, : encoder.num_prefix_tokens]
    state["pos_embed"] = resample_abs_pos_embed(
        torch.cat((first, positions[:, before:]), dim=1), new_size=list(encoder.patch_embed.grid_size),
        old_size=[sides[before]] * 2, num_prefix_tokens=first.shape[1],
    )  # fmt: skip
    return ["pos_embed"]


def _difference(state: Mapping[str, Tensor], wanted: Mapping[str, object], fits: set[str]) -> str:
    for name, shape in wanted.items():
        if name not in fits and name in state:
            return f"{name} is {list(state[name].shape)} for {list(shape)}"  # type: ignore[call-overload]
    return f"lacks {', '.join([name for name in wanted if name not in state][:3])}"
