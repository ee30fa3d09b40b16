"""What a packed segmenter has beside its ViT: a light head, and how it looks at an image. Version 3 of the format."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sparsemae.card import InputSpec, ModelCard
from sparsemae.limits import check_limits

KINDS = ("linear", "segformer")
MAPS = 4
"""Of the ViT, which a head reads."""


@dataclass(frozen=True)
class DenseHead:
    """All that the head's forward depends on, beside its weights. Raises ValueError if there is no such head."""

    kind: str
    width: int
    """Channels of segformer's fused map; linear has none."""
    num_classes: int
    out_indices: tuple[int, ...]
    """Blocks after which the ViT is read, counted from 0; the linear head reads the last alone."""

    def __post_init__(self) -> None:
        check_limits(self, "segment.head.", width=(1, 1 << 14), num_classes=(1, 255))  # 255 marks what has no class
        if self.kind not in KINDS:
            raise ValueError(f"segment.head.kind: wanted {' or '.join(KINDS)}, got {self.kind!r}")

    def check(self, depth: int) -> None:
        """Raises ValueError unless the ViT has these blocks."""
        taps = list(self.out_indices)
        ascending = all(type(tap) is int for tap in taps) and sorted({*taps}) == taps
        if len(taps) != MAPS or not ascending or taps[0] < 0 or taps[-1] != depth - 1:
            raise ValueError(
                f"segment.head.out_indices: wanted {MAPS} ascending blocks up to the last, {depth - 1}, got {taps}"
            )

    def shapes(self, embed_dim: int) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter, by the torch model's name."""
        width = embed_dim if self.kind == "linear" else self.width
        shapes: dict[str, tuple[int, ...]] = {}
        if self.kind == "segformer":
            for k in range(MAPS):
                shapes |= {f"norms.{k}.weight": (embed_dim,), f"norms.{k}.bias": (embed_dim,)}
                shapes[f"projections.{k}.weight"] = (width, embed_dim)
            shapes |= {"norm.weight": (width,), "norm.bias": (width,)}
            shapes |= {"fuse.weight": (width, width), "fuse.bias": (width,)}
        shapes |= {"classifier.weight": (self.num_classes, width), "classifier.bias": (self.num_classes,)}
        return {f"decode_head.{name}": shape for name, shape in shapes.items()}


_SEGMENT: dict[str, Any] = {
    "head": dict, "short_side": int, "long_side": int, "inference": dict, "palette": list, "reduce_zero_label": bool,
}  # fmt: skip
_HEAD: dict[str, Any] = {"kind": str, "width": int, "num_classes": int, "out_indices": list}
_INFERENCE: dict[str, Any] = {"mode": str, "stride": int, "scales": list, "flip": bool}


def write_segment(card: ModelCard, head: DenseHead) -> dict[str, Any]:
    """The part of the document; `read_segment` takes it back."""
    settings, inference = card.settings, card.settings["inference"]
    return {
        "head": asdict(head),
        "short_side": card.input.short_side,
        "long_side": card.input.long_side,
        "inference": {**inference, "scales": [float(scale) for scale in inference["scales"]]},
        "palette": [list(color) for color in settings["palette"]],
        "reduce_zero_label": settings["reduce_zero_label"],
    }


def read_segment(document: Any, depth: int, window: int) -> tuple[DenseHead, dict[str, Any]]:
    """The head, and the card's settings. Raises ValueError where it is not one of ours."""
    check_fields("segment", document, _SEGMENT)
    check_fields("segment.head", document["head"], _HEAD)
    check_fields("segment.inference", document["inference"], _INFERENCE)
    head = DenseHead(**{**document["head"], "out_indices": tuple(document["head"]["out_indices"])})
    head.check(depth)
    inference, palette = document["inference"], document["palette"]
    sizes = InputSpec(window, (), (), short_side=document["short_side"], long_side=document["long_side"])
    check_limits(sizes, "segment.", short_side=(1, 1 << 14), long_side=(1, 1 << 16))
    scales = inference["scales"]
    if not 1 <= len(scales) <= 16 or not all(type(scale) is float and 0 < scale <= 16 for scale in scales):
        raise ValueError(f"segment.inference.scales: wanted 1 to 16 numbers above 0 and up to 16, got {scales!r:.100}")
    if inference["mode"] not in ("slide", "whole"):
        raise ValueError(f"segment.inference.mode: wanted slide or whole, got {inference['mode']!r:.40}")
    most = window if inference["mode"] == "slide" else 1 << 16
    if not 1 <= inference["stride"] <= most:
        raise ValueError(f"segment.inference.stride: wanted 1 to {most} px, got {inference['stride']}")
    colors = all(type(color) is list and len(color) == 3 for color in palette)
    if len(palette) != head.num_classes or not colors or not all(_is_byte(x) for color in palette for x in color):
        raise ValueError(f"segment.palette: wanted a color of three bytes for each of {head.num_classes} classes")
    return head, {
        "head": {"kind": head.kind, "width": head.width}, "out_indices": list(head.out_indices),
        "inference": inference, "palette": palette, "reduce_zero_label": document["reduce_zero_label"],
    }  # fmt: skip


def _is_byte(value: Any) -> bool:
    return type(value) is int and 0 <= value <= 255


def check_fields(where: str, document: Any, kinds: Mapping[str, type | tuple[type, ...]]) -> None:
    """Raises ValueError unless it is a JSON object of exactly these fields, of these types."""
    if type(document) is not dict:
        raise ValueError(f"{where}: wanted a JSON object, got {type(document).__name__}")
    if odd := sorted(set(document) ^ set(kinds)):
        raise ValueError(f"{where}: wanted exactly the fields of the format, got {odd} missing or unknown")
    for key, kind in kinds.items():
        wanted = kind if isinstance(kind, tuple) else (kind,)
        if type(document[key]) not in wanted:
            names = " or ".join(each.__name__ for each in wanted)
            raise ValueError(f"{where}.{key}: wanted {names}, got {type(document[key]).__name__}")
