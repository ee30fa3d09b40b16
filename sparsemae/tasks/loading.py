"""Models from their files: built as the card says, filled, and ready to be used."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sparsemae.card import ModelCard
from sparsemae.data.inputs import results_of
from sparsemae.limits import MAX_PIXELS
from sparsemae.models.weights import card_of, find_weights, kept_alone, load_weights, read_weights
from sparsemae.packing.format import is_packed, read, unpack
from sparsemae.packing.pack import build_vit
from sparsemae.predictor import Inputs, checked, raised
from sparsemae.processors import processors
from sparsemae.sparsity import densify, freeze, iter_sparse, sparsify
from sparsemae.tasks import task_class
from sparsemae.tasks.task import encoder_of, smallest_side


class TorchPredictor:
    """A trained model in torch, computed with the kept weights alone."""

    def __init__(self, model: nn.Module, card: ModelCard) -> None:
        if any(iter_sparse(model)):  # computed as a plain model with zeros; a checkpoint's mask is that of now
            freeze(model)
            densify(model)
        self.model, self.card = model, card

    @property
    def smallest_side(self) -> int:
        """The shorter side that an image needs, px."""
        return smallest_side(self.model)

    @torch.inference_mode()
    def __call__(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits of normalized images ``[B, 3, H, W]``: ``[B, C]``, or ``[B, C, H, W]`` of a segmenter."""
        if self.card.task == "pretrain":
            raise ValueError("wanted a finetuned model, got a pretrained one, which has features but no logits")
        output = self.model(self._input(images))
        logits: NDArray[np.float32] = getattr(output, "logits", output).float().numpy()
        return logits

    @torch.inference_mode()
    def features(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """All tokens of the ViT after its last block and norm, ``[B, L, D]``."""
        tokens: NDArray[np.float32] = encoder_of(self.model).forward_features(self._input(images)).float().numpy()
        return tokens

    def predict(self, images: Inputs, top_k: int = 5) -> list[Any]:
        """One result for each image, in order: the ``top_k`` `Prediction` s, best first, or a segmenter's class map."""
        return raised(self.stream(images, top_k))

    def stream(self, images: Inputs, top_k: int = 5, max_pixels: int = MAX_PIXELS) -> Iterator[Any]:
        """As `predict`, each as soon as it is known; of an image that cannot be read, its ValueError."""
        task = task_class(self.card.task)

        @torch.inference_mode()
        def run(batch: list[Any]) -> list[Any]:
            return task.predict(self.model, self.card, batch, top_k)

        threads = processors()
        return results_of(images, self.card.input, lambda image: image, run, task.at_once, threads, max_pixels)

    def _input(self, images: NDArray[np.float32]) -> Tensor:
        encoder = encoder_of(self.model)
        size = None if encoder.dynamic_img_size else encoder.patch_embed.img_size
        return torch.from_numpy(np.require(checked(images, encoder.in_chans, size), requirements="W"))


def load_model(source: str | Path, task: str | None = None) -> tuple[Any, ModelCard]:
    """A model in torch from its file (a packed one, too) or run folder, in evaluation mode, with its card.

    It is built only once it is known to be as large as what the file holds. Raises ValueError, naming the file, if it
    is foreign, of another ``task``, or does not fit its own card.
    """
    path = find_weights(source)
    packed = read(path) if is_packed(path) else None
    state, metadata = ({}, {}) if packed is not None else read_weights(path)
    card = card_of(metadata, path) if packed is None else replace(packed.config.card, frozen=True)
    if card.task == "segment" and packed is not None:
        card = replace(card, patterns={f"encoder.{name}": own for name, own in card.patterns.items()})
    if task is not None and card.task != task:
        raise ValueError(f"{path}: wanted a model for {task}, got one for {card.task}")
    try:
        if not card.frozen:  # a fixed mask
            state = kept_alone(state)
        if packed is not None:
            state = {name: torch.from_numpy(value) for name, value in unpack(packed, masks=True).items()}
        as_is = packed is not None and packed.config.head is None  # its shape says all
        model = build_vit(packed.config.vit) if packed is not None and as_is else _built(card, state)
        for pattern in sorted(set(card.patterns.values())):
            sparsify(model, pattern, include=[name for name, own in card.patterns.items() if own == pattern])
        load_weights(model, state, strict=True, name=path)
    except ValueError as error:
        said = " ".join(str(error).split())  # torch's go over many lines
        raise ValueError(f"{path}: {said.removeprefix(f'{path}: ')}") from error
    except (LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, AssertionError) as error:
        raise ValueError(f"{path}: wanted a model that can be built as described, got {error!r:.200}") from error
    moving = [name for name, layer in iter_sparse(model) if not layer.frozen]
    if card.frozen and moving:
        raise ValueError(f"{path}: wanted a frozen model, as its card says, got no mask for {moving[0]}")
    return model.eval(), card


def _built(card: ModelCard, state: dict[str, Tensor]) -> Any:
    build = task_class(card.task).build
    _check_depth(state, card.model_args, "blocks")
    _check_depth(state, card.settings.get("decoder", {}), "decoder_blocks")
    with torch.device("meta"):
        described = sum(parameter.numel() for parameter in build(card).parameters())
    if described > (held := sum(value.numel() for value in state.values())):
        raise ValueError(f"wanted {described:,} parameters, as its card says, got {held:,}")
    return build(card)


def _check_depth(state: dict[str, Tensor], args: dict[str, Any], blocks: str) -> None:
    """A depth from a file is how often something is built: that many blocks it must hold."""
    held = len({key.split(".")[1] for key in state if key.startswith(f"{blocks}.")})
    if args.get("depth", held) != held:
        raise ValueError(f"wanted {blocks} as its card says, {args['depth']!r:.40}, got {held}")
