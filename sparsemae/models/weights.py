"""Weights in and out. Files have the field's public names, whatever our modules are called.

A pretraining file has the keys of MAE's published full checkpoints (encoder keys as in timm, then ``mask_token``,
``decoder_*``); a classifier's file has timm's. Our own files are safetensors whose metadata entry ``sparsemae`` (JSON)
is a `ModelCard`.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sparsemae.card import ModelCard
from sparsemae.files import existing, oversized_header, replacing
from sparsemae.models.names import public_names
from sparsemae.models.torch_file import load_torch_file


@dataclass
class Loaded:
    """What `load_weights` did, in the file's (public) names."""

    used: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    """In the model, not in the source: left at their initial values."""
    unexpected: list[str] = field(default_factory=list)
    """In the source, not in the model, or ignored on request."""

    def __str__(self) -> str:
        def some(keys: list[str]) -> str:
            return f" ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})" if keys else ""

        return (
            f"{len(self.used)} tensors used, {len(self.missing)} missing{some(self.missing)}, "
            f"{len(self.unexpected)} unused{some(self.unexpected)}"
        )


def public_state(model: nn.Module, masks: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The state dict under public names: a module named ``encoder`` loses its prefix.

    Args:
        masks: of layers whose mask is fixed, beside latent weights; a frozen layer's is in the state dict itself.
    """
    state = model.state_dict() | {f"{name}.weight_mask": mask for name, mask in (masks or {}).items()}
    return {key.removeprefix("encoder."): value.detach() for key, value in state.items()}


def kept_alone(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same with zeros where a mask beside latent weights prunes them. Raises ValueError if they do not fit."""
    masks = {key.removesuffix("_mask"): mask for key, mask in state.items() if key.endswith(".weight_mask")}
    try:
        kept = {key: state[key].masked_fill(~mask.bool(), 0.0) for key, mask in masks.items()}
    except (LookupError, RuntimeError) as error:
        raise ValueError(f"wanted masks of the weights beside them: {error}") from error
    return {**state, **kept}


def load_weights(
    model: nn.Module,
    source: str | Path | Mapping[str, Tensor],
    ignore: Sequence[str] = (),
    strict: bool = False,
    name: str | Path | None = None,
) -> Loaded:
    """Copy weights into ``model`` by public name: MAE, timm, HF ViTMAE and our own files.

    Args:
        source: a file (.safetensors, or a torch file of tensors only), a run folder, or a state dict.
        ignore: glob patterns on public names to leave out.
        strict: refuse missing and unexpected keys as well.
        name: what messages call a state dict.

    Raises:
        ValueError: nothing fits, a tensor's shape or kind of number differs, or a value is not finite; names the source
            and the keys.
    """
    name = (name or "state dict") if isinstance(source, Mapping) else source
    found = source if isinstance(source, Mapping) else read_weights(source)[0]
    try:
        state, outside = public_names(found)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    ignored = [key for key in state if any(fnmatchcase(key, glob) for glob in ignore)]
    state = {key: value for key, value in state.items() if key not in ignored}

    own = {key.removeprefix("encoder."): key for key in model.state_dict()}
    wanted = public_state(model)
    if wrong := [key for key in state if key in wanted and state[key].shape != wanted[key].shape]:
        first = ", ".join(f"{key} {list(state[key].shape)} for {list(wanted[key].shape)}" for key in wrong[:3])
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(f"{name}: checkpoint of another architecture: got {first}{more}")
    for key in state.keys() & wanted.keys():
        if reason := _unusable(state[key], wanted[key].dtype):
            raise ValueError(f"{name}: {key}: {reason}")
    prefix = "encoder." if any(key.startswith("encoder.") for key in own.values()) else ""
    # a public key that the fresh model lacks: a frozen layer's ``weight_mask``
    new = {key: prefix + key if key.startswith("blocks.") else key for key in state}
    missing = [key for key in wanted if key not in state]
    if strict and missing:
        raise ValueError(f"{name}: checkpoint of another architecture: lacks {', '.join(missing[:3])}")
    if not state.keys() & wanted.keys():
        raise ValueError(
            f"{name}: no weight fits the model; wanted keys like {', '.join(list(wanted)[:3])}, "
            f"got {', '.join(list(state)[:3]) or 'none'}"
        )
    try:
        result = model.load_state_dict({own.get(key, new[key]): value for key, value in state.items()}, strict=False)
    except (ValueError, RuntimeError) as error:  # a mask that does not hold, or has no place
        raise ValueError(f"{name}: {error}") from error
    unexpected = [key.removeprefix(prefix) for key in result.unexpected_keys] + outside
    if strict and unexpected:
        raise ValueError(f"{name}: checkpoint of another architecture: has no place for {', '.join(unexpected[:3])}")
    return Loaded([key for key in state if key not in unexpected], missing, unexpected + ignored)


def _unusable(value: Tensor, dtype: torch.dtype) -> str | None:
    """Why a tensor cannot be one of ``dtype``: another kind of number, or values that are not finite."""
    kinds = [(kind.is_floating_point, kind.is_complex, kind == torch.bool) for kind in (value.dtype, dtype)]
    if kinds[0] != kinds[1]:
        return f"wanted {dtype}, got {value.dtype}"
    if dtype.is_floating_point and not value.to(dtype).isfinite().all():
        return "wanted finite values, got NaN or infinite ones"
    return None


def save_model(path: Path, model: nn.Module, card: ModelCard, masks: Mapping[str, Tensor] | None = None) -> None:
    """Write `public_state` as safetensors, with the card as JSON metadata; appears whole or not at all."""
    save_tensors(path, public_state(model, masks), card.to_dict())


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """As `save_model`, with any JSON values. Raises OSError if it cannot be written; nothing is left of it then."""
    try:
        with replacing(path) as temporary:
            save_file(_unshared(tensors), temporary, {"sparsemae": json.dumps(metadata)})
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """safetensors refuses tensors that share storage (tied weights): give each later one its own copy."""
    state = {key: value.cpu().contiguous() for key, value in tensors.items()}
    first = {value.data_ptr(): key for key, value in reversed(state.items())}
    return {key: value if first[value.data_ptr()] == key else value.clone() for key, value in state.items()}


def find_weights(source: str | Path) -> Path:
    """The weights file of a run folder, a checkpoint folder (the average where there is one), or the file itself.

    Raises ValueError if there is none.
    """
    path = existing(source)
    if path.is_dir():
        for folder in (path, *sorted(path.glob("checkpoints/step-*"), reverse=True)):
            for name in ("ema", "model"):
                if (file := folder / f"{name}.safetensors").is_file():
                    return file
        raise ValueError(f"{path}: wanted a run folder with model.safetensors or checkpoints/, found neither")
    if not path.is_file():
        raise ValueError(f"{path}: no such file or run folder")
    return path


def read_metadata(path: Path) -> dict[str, Any]:
    """Our metadata of a safetensors file; empty for foreign ones. Raises ValueError as `read_weights`."""
    with _opened(path) as file:
        return _metadata(file)


def card_of(metadata: Mapping[str, Any], path: Path) -> ModelCard:
    """The card in a file's metadata. Raises ValueError, naming the file, if it is not one."""
    try:
        return ModelCard.from_dict(metadata)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_weights(source: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and our metadata (empty for foreign files) of a weights file. Never runs pickled code.

    Raises ValueError, naming the file, if it cannot be read as tensors.
    """
    path = find_weights(source)
    if path.suffix != ".safetensors":
        return load_torch_file(path), {}
    with _opened(path) as file:
        return {key: file.get_tensor(key) for key in list(file.keys())}, _metadata(file)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file; a ValueError that names it says what is wrong with it, an OSError what with the disk."""
    try:
        if header := oversized_header(path):
            raise ValueError(f"its header of {header:,} bytes is too large beside its data")
        with safe_open(path, framework="pt", backend="pread") as file:  # a map of a file that is cut off kills
            yield file
    except (SafetensorError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a readable safetensors file: {error}") from error


def _metadata(file: Any) -> dict[str, Any]:
    metadata = json.loads((file.metadata() or {}).get("sparsemae", "{}"))
    if not isinstance(metadata, dict):
        raise ValueError(f"wanted a card in the metadata entry sparsemae, got {metadata!r:.60}")
    return metadata
