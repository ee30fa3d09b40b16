"""What a model is, beside its weights: the card that every file of ours carries, whatever its format.

Weights files hold it as JSON in safetensors' metadata, packed files in their own. A model can be built, and an image
prepared for it, from the card alone; nothing here imports torch.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from types import NoneType
from typing import Any

from sparsemae.limits import AT_LEAST_1, UP_TO_1, check_limits
from sparsemae.renamed import CARD, renamed

VERSION = 3


@dataclass(frozen=True)
class InputSpec:
    """How an image becomes a model's input; timm's names.

    A classifier's: the shorter side is resized to ``img_size / crop_pct``, then the center is cropped. A segmenter's:
    the shorter side is resized to ``short_side``, or less where the longer would pass ``long_side``.
    """

    img_size: int
    """Side of the model's input (of a segmenter's window), px."""
    mean: tuple[float, ...]
    """Channel means, for pixels in 0 to 1."""
    std: tuple[float, ...]
    """Channel standard deviations, for pixels in 0 to 1."""
    interpolation: str = "bicubic"
    crop_pct: float = 1.0
    short_side: int | None = None
    long_side: int | None = None
    exif: bool | None = False
    """Turn images as their EXIF orientation says. timm does not: off agrees with its accuracy figures. None: a
    segmenter that never saw one to turn."""
    background: tuple[int, ...] | None = None
    """RGB color that transparent images are drawn on; None: alpha is dropped, as models of before were trained."""
    bits: int | None = None
    """Of 16-bit gray, scaled to 8; None: values are clipped at 255, as models of before were trained."""

    @classmethod
    def of(cls, options: Any) -> "InputSpec":
        """From the options that prepare a training's images, where they have a field of the name."""
        return cls(**{f.name: getattr(options, f.name) for f in fields(cls) if hasattr(options, f.name)})


@dataclass(frozen=True)
class ModelCard:
    """A model's architecture, input, classes and sparsity."""

    task: str
    """Which entry of `sparsemae.tasks.TASKS` it is a model for; only ever looked up there."""
    architecture: str
    """timm's name of the ViT."""
    model_args: dict[str, Any]
    """Arguments of timm's constructor that differ from that name's."""
    input: InputSpec
    class_names: tuple[str, ...] = ()
    patterns: dict[str, str] = field(default_factory=dict)
    """Sparse layer -> 'n:m'."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What else the task needs to build the model and to use it, JSON values."""
    frozen: bool = False
    """The masks are part of the weights; the pruned ones are 0 for good."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Of the last evaluation, fractions."""
    ema_decay: float | None = None
    """The weights are a moving average with this decay."""
    step: int | None = None
    """Of a checkpoint: optimizer steps taken."""
    source: str = ""
    """The run or checkpoint that it was packed from."""
    license: str = ""
    """License of the weights."""
    data: dict[str, Any] = field(default_factory=dict)
    """Which images it was trained on: digests of their names and of where they lay, the rule of the held-out part, and
    of a segmenter the masks' ignore_label; empty of a model of before."""

    def with_settings(self, **settings: Any) -> "ModelCard":
        """The same with some of its task's settings changed."""
        return replace(self, settings={**self.settings, **settings})

    def to_dict(self) -> dict[str, Any]:
        """JSON values; `from_dict` reads them back."""
        return {"version": VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> "ModelCard":
        """Raises ValueError if it is not what `to_dict`, or an earlier version of it, gives."""
        version = document.get("version")
        if version not in range(1, VERSION + 1):
            newer = isinstance(version, int) and version > VERSION
            raise ValueError(
                f"wanted a sparsemae weights file of version 1 to {VERSION}, got "
                + (f"version {version}: update sparsemae" if newer else "one without our card")
            )
        values = renamed(document, CARD) if version == 1 else dict(document)
        del values["version"]
        try:
            spec: dict[str, Any] = {
                name: tuple(value) if isinstance(value, list) else value for name, value in values["input"].items()
            }
            card = cls(**{**values, "input": InputSpec(**spec), "class_names": tuple(values["class_names"])})
        except (TypeError, LookupError, AttributeError) as error:
            raise ValueError(f"wanted a model's card, got one that cannot be read: {error!r:.200}") from error
        for name, kind in _KINDS.items():
            if not isinstance(getattr(card, name), kind):
                raise ValueError(f"card: {name}: wanted {kind.__name__}, got {getattr(card, name)!r:.60}")
        _check_input(card.input)
        return card


def _check_input(spec: InputSpec) -> None:
    for name, kinds in _INPUT_KINDS.items():
        value = getattr(spec, name)
        three = not isinstance(value, tuple) or [isinstance(part, int | float) for part in value] == [True] * 3
        if not isinstance(value, kinds) or not three:
            wanted = " or ".join("three numbers" if kind is tuple else kind.__name__ for kind in kinds)
            raise ValueError(f"card: input.{name}: wanted {wanted}, got {value!r:.60}")
    if spec.interpolation not in INTERPOLATIONS:
        raise ValueError(
            f"card: input.interpolation: wanted one of {', '.join(INTERPOLATIONS)}, got {spec.interpolation!r:.60}"
        )
    check_limits(spec, "card: input.", **_INPUT_LIMITS)


INTERPOLATIONS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")
"""Pillow's."""
_INPUT_KINDS: dict[str, tuple[type, ...]] = {
    "img_size": (int,), "mean": (tuple,), "std": (tuple,), "interpolation": (str,), "crop_pct": (int, float),
    "short_side": (int, NoneType), "long_side": (int, NoneType), "exif": (bool, NoneType),
    "background": (tuple, NoneType), "bits": (int, NoneType),
}  # fmt: skip
_INPUT_LIMITS = {
    "img_size": (1, 1 << 14), "mean": (-1e6, 1e6), "std": (1e-6, 1e6), "crop_pct": UP_TO_1, "short_side": AT_LEAST_1,
    "long_side": AT_LEAST_1, "background": (0, 255), "bits": (9, 16),
}  # fmt: skip
_KINDS: dict[str, type] = {
    "task": str, "architecture": str, "model_args": dict, "patterns": dict, "settings": dict, "frozen": bool,
    "metrics": dict, "source": str, "license": str, "data": dict,
}  # fmt: skip
