"""Models from a configuration or from a file: what every task does before its own work."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from sparsemae.data.sampling import INIT, BatchPlan, seed_all
from sparsemae.data.segmentation import MaskDataConfig
from sparsemae.data.transforms import DataConfig
from sparsemae.limits import ABOVE_0, AT_LEAST_0, check_limits
from sparsemae.models import MaskedAutoencoder, ModelConfig, build_vit
from sparsemae.models.segmenter import HeadConfig, Segmenter
from sparsemae.models.weights import find_weights, load_weights, read_description, read_weights
from sparsemae.sparsity import MaskSchedule, drop_pruned, freeze, iter_sparse, sparsify
from sparsemae.training.config import TrainerConfig

Model = TypeVar("Model", bound=nn.Module)
PREPARATION = ("img_size", "mean", "std", "interpolation", "eval_crop", "short_side", "long_side", "exif")
"""Fields of a data configuration that say how an image becomes the model's input."""


@dataclass
class SparseConfig:
    """N:M sparse training of the encoder."""

    pattern: str = "2:32"
    """n kept of every m input features; "dense" trains without sparsity."""
    strength: float = 2e-4
    """SR-STE's lambda: pull of the pruned weights to 0; 0 is plain straight-through."""
    term: Literal["gradient", "decoupled"] = "gradient"
    """Where SR-STE's term acts: inside the gradient (as published), or as a shrink after the step (try 0.5)."""
    init_weights: Literal["full", "sparse"] = "full"
    """full: start from all latent weights; sparse: from the sparse network alone, the pruned weights set to 0."""
    schedule: Literal["constant", "gradual"] = "constant"
    """gradual: keep m of m at first and halve n in stages, for a start from a dense model."""
    gradual_epochs: float | None = None
    """Epochs until a gradual schedule reaches the pattern; None: half of the training."""
    dense_epochs: float = 0.0
    """Epochs of dense warm-up before sparsity starts."""
    freeze_epoch: float | None = None
    """Epoch from which the mask stays as it is; None: it moves to the end."""
    mask: Literal["dynamic", "fixed"] = "dynamic"
    """dynamic: the mask follows the latent weights; fixed: the mask of the starting weights, frozen (a baseline)."""
    exclude: list[str] = field(default_factory=list)
    """Glob patterns on encoder layers that stay dense, for example blocks.0.*"""

    def __post_init__(self) -> None:
        times = {"gradual_epochs": ABOVE_0, "dense_epochs": AT_LEAST_0, "freeze_epoch": AT_LEAST_0}
        check_limits(self, "sparse.", strength=AT_LEAST_0, **times)
        if self.gradual_epochs is not None and self.schedule != "gradual":
            raise ValueError("sparse.gradual_epochs: wanted sparse.schedule=gradual with it, got constant")
        if self.mask == "fixed" and (self.schedule == "gradual" or self.dense_epochs or self.freeze_epoch is not None):
            raise ValueError(
                "sparse.mask: wanted dynamic with sparse.schedule=gradual, dense_epochs or freeze_epoch, got fixed"
            )


@dataclass
class DecoderConfig:
    """MAE's decoder, dense, used in pretraining only."""

    embed_dim: int = 512
    """Width."""
    depth: int = 8
    """Blocks."""
    num_heads: int = 16
    """Attention heads."""


def build_autoencoder(model: ModelConfig, decoder: DecoderConfig, img_size: int, seed: int) -> MaskedAutoencoder:
    """A freshly initialised autoencoder; the same for the same seed."""
    seed_all(seed, INIT)
    encoder = build_vit(model, img_size)
    return MaskedAutoencoder(encoder, decoder.embed_dim, decoder.depth, decoder.num_heads)


def build_classifier(model: ModelConfig, img_size: int, num_classes: int, seed: int) -> VisionTransformer:
    """A freshly initialised classifier; the same for the same seed."""
    seed_all(seed, INIT)
    return build_vit(model, img_size, num_classes)


def build_segmenter(
    model: ModelConfig, head: HeadConfig, taps: Sequence[int], img_size: int, num_classes: int, seed: int
) -> Segmenter:
    """A freshly initialised segmenter for images of any size; the same for the same seed."""
    seed_all(seed, INIT)
    any_size = {"dynamic_img_size": True, "dynamic_img_pad": True}
    return Segmenter(build_vit(replace(model, args={**model.args, **any_size}), img_size), num_classes, taps, head)


def make_sparse(model: nn.Module, sparse: SparseConfig) -> list[str]:
    """`sparsify` as configured; does nothing for the pattern "dense"."""
    if sparse.pattern == "dense":
        return []
    if sparse.term == "gradient" and sparse.strength > 1e-3:
        warnings.warn(f"sparse.strength {sparse.strength:g} in the gradient: above 1e-3 accuracy is lost", stacklevel=2)
    prefix = "encoder." if isinstance(model, MaskedAutoencoder | Segmenter) else ""
    names = sparsify(model, sparse.pattern, exclude=[prefix + glob for glob in sparse.exclude])
    if sparse.init_weights == "sparse":
        drop_pruned(model)
    if sparse.mask == "fixed":
        freeze(model)
    return names


def mask_schedule(model: nn.Module, sparse: SparseConfig, trainer: TrainerConfig, plan: BatchPlan) -> MaskSchedule:
    """The schedule of the masks over a training, whose length may be given in optimizer steps."""
    epochs = trainer.schedule_steps(plan.steps_per_epoch) / plan.steps_per_epoch
    for name in ("gradual_epochs", "dense_epochs", "freeze_epoch"):
        value = getattr(sparse, name)
        if value is not None and value > epochs:
            raise ValueError(f"sparse.{name}: wanted at most the training's {epochs:g} epochs, got {value:g}")
    gradual = sparse.gradual_epochs if sparse.gradual_epochs is not None else epochs / 2
    return MaskSchedule(
        model, sparse.dense_epochs, gradual if sparse.schedule == "gradual" else 0.0, sparse.freeze_epoch
    )


def describe(
    task: str,
    model: nn.Module,
    config: ModelConfig,
    data: DataConfig | MaskDataConfig,
    class_names: Sequence[str] = (),
    **extra: Any,
) -> dict[str, Any]:
    """What a weights file says of itself: enough to build the model and to prepare its input."""
    prepared = {name: value for name, value in asdict(data).items() if name in PREPARATION}
    return {
        "version": 1,
        "task": task,
        "model": asdict(config),
        "sparse": {name: str(layer.pattern) for name, layer in iter_sparse(model)},
        "input": {name: list(value) if isinstance(value, tuple) else value for name, value in prepared.items()},
        "class_names": list(class_names),
        **extra,
    }


def load_classifier(source: str | Path) -> tuple[VisionTransformer, dict[str, Any]]:
    """A finetuned model from its file or run folder, in evaluation mode, with its description.

    Raises ValueError if the file is foreign, of another task, or does not fit its own description.
    """

    def build(says: dict[str, Any]) -> VisionTransformer:
        return build_classifier(
            ModelConfig(**says["model"]), says["input"]["img_size"], len(says["class_names"]), seed=0
        )

    return _load(source, "classify", build)


def load_autoencoder(source: str | Path) -> tuple[MaskedAutoencoder, dict[str, Any]]:
    """A pretrained autoencoder, as `load_classifier`."""

    def build(says: dict[str, Any]) -> MaskedAutoencoder:
        config, decoder = ModelConfig(**says["model"]), DecoderConfig(**says["decoder"])
        model = build_autoencoder(config, decoder, says["input"]["img_size"], seed=0)
        model.norm_pix_loss = says["norm_pix_loss"]
        return model

    return _load(source, "pretrain", build)


def load_encoder(source: str | Path) -> tuple[VisionTransformer, dict[str, Any]]:
    """The ViT of a pretrained or a finetuned model, as `load_classifier`."""
    if task_of(source) != "pretrain":
        return load_classifier(source)
    model, description = load_autoencoder(source)
    return model.encoder, description


def load_segmenter(source: str | Path) -> tuple[Segmenter, dict[str, Any]]:
    """A finetuned segmenter, as `load_classifier`."""

    def build(says: dict[str, Any]) -> Segmenter:
        config, head, classes = ModelConfig(**says["model"]), HeadConfig(**says["head"]), len(says["class_names"])
        return build_segmenter(config, head, says["taps"], says["input"]["img_size"], classes, seed=0)

    return _load(source, "segment", build)


def task_of(source: str | Path) -> str | None:
    """What a weights file or a run is for, as it says itself; None: it is not ours."""
    task: str | None = read_description(source).get("task")
    return task


def _load(source: str | Path, task: str, build: Callable[[dict[str, Any]], Model]) -> tuple[Model, dict[str, Any]]:
    """Build what a file describes, and fill it; only once it is known to be as large as what the file holds."""
    path = find_weights(source)
    state, description = read_weights(path)
    if description.get("version") != 1:
        raise ValueError(f"{path}: wanted a sparsemae weights file of version 1, got one without our description")
    if description.get("task") != task:
        raise ValueError(f"{path}: wanted a model for {task}, got one for {description.get('task')}")
    try:
        description["input"].setdefault("exif", False)  # files written before the option
        _check_depth(state, description["model"]["args"], "blocks")
        _check_depth(state, description.get("decoder", {}), "decoder_blocks")
        with torch.device("meta"):
            described = sum(parameter.numel() for parameter in build(description).parameters())
        if described > (held := sum(value.numel() for value in state.values())):
            raise ValueError(f"wanted {described:,} parameters, as its description says, got {held:,}")
        model = build(description)
        for pattern in sorted(set(description["sparse"].values())):
            sparsify(model, pattern, include=[name for name, own in description["sparse"].items() if own == pattern])
        load_weights(model, state, strict=True, name=path)
    except ValueError as error:
        said = " ".join(str(error).split())  # torch's go over many lines
        raise ValueError(f"{path}: {said.removeprefix(f'{path}: ')}") from error
    except (LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, AssertionError) as error:
        raise ValueError(f"{path}: wanted a model that can be built as described, got {error!r:.200}") from error
    moving = [name for name, layer in iter_sparse(model) if not layer.frozen]
    if description.get("frozen") and moving:
        raise ValueError(f"{path}: wanted a frozen model, as its description says, got no mask for {moving[0]}")
    return model.eval(), description


def _check_depth(state: dict[str, Tensor], says: dict[str, Any], blocks: str) -> None:
    """A depth from a file is how often something is built: that many blocks it must hold."""
    held = len({key.split(".")[1] for key in state if key.startswith(f"{blocks}.")})
    if says.get("depth", held) != held:
        raise ValueError(f"wanted {blocks} as its description says, {says['depth']!r:.40}, got {held}")
