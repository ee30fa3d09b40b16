"""The metadata of a packed file: what a model is, beside its weights, and how its JSON is read without trusting it.

The document is older than `ModelCard` and has names of its own; they are translated here, and only here.
"""

import json
import re
from dataclasses import asdict, dataclass, field
from types import NoneType
from typing import Any, get_type_hints

from sparsemae.card import INTERPOLATIONS, InputSpec, ModelCard
from sparsemae.limits import ABOVE_0, BELOW_1, check_limits
from sparsemae.packing.codec import MAX_GROUP
from sparsemae.packing.segmenter import DenseHead, check_fields, read_segment, write_segment

FORMAT = "sparsemae-packed"
VERSION = 3
"""The newest that is read. A classifier's file is of version 2, which earlier readers know; 3 has segmenters, too."""


@dataclass(frozen=True)
class VitShape:
    """All that the forward of a plain pre-norm ViT depends on, beside its weights; timm's names where it has one.

    Raises ValueError, naming the field, if there is no such ViT.
    """

    embed_dim: int
    depth: int
    num_heads: int
    mlp_hidden: int
    patch_size: int
    image_height: int
    image_width: int
    in_chans: int
    num_classes: int
    """0: an encoder; the model returns the pooled features."""
    reg_tokens: int
    class_token: bool
    no_embed_class: bool
    """Position embeddings are added to the patch tokens only."""
    pre_norm: bool
    final_norm: bool
    fc_norm: bool
    layer_scale: bool
    qkv_bias: bool
    proj_bias: bool
    """Of attn.proj, mlp.fc1 and mlp.fc2."""
    patch_bias: bool
    pool_include_prefix: bool
    global_pool: str
    """'token', 'avg', or '' (all tokens)."""
    norm_eps: float

    def __post_init__(self) -> None:
        check_limits(
            self, "vit.", embed_dim=(1, 1 << 14), depth=(1, 512), num_heads=(1, 1 << 10), mlp_hidden=(1, 1 << 17),
            patch_size=(1, 1 << 10), image_height=(1, 1 << 14), image_width=(1, 1 << 14), in_chans=(1, 64),
            num_classes=(0, 1 << 20), reg_tokens=(0, 1 << 10), norm_eps=(ABOVE_0[0], BELOW_1[1]),
        )  # fmt: skip
        for whole, part in (("embed_dim", "num_heads"), ("image_height", "patch_size"), ("image_width", "patch_size")):
            if getattr(self, whole) % getattr(self, part):
                raise ValueError(
                    f"vit.{whole}: wanted a multiple of {part} {getattr(self, part)}, got {getattr(self, whole)}"
                )
        pools = ("avg",) + ("token",) * self.class_token + ("",) * (not self.num_classes)
        if self.global_pool not in pools:
            raise ValueError(f"vit.global_pool: wanted {' or '.join(map(repr, pools))}, got {self.global_pool!r}")
        if self.fc_norm and not self.global_pool:
            raise ValueError("vit.fc_norm: wanted false where nothing is pooled (global_pool ''), got true")

    @property
    def prefix_tokens(self) -> int:
        """Class token and registers."""
        return int(self.class_token) + self.reg_tokens

    @property
    def patches(self) -> int:
        """Patch tokens."""
        return (self.image_height // self.patch_size) * (self.image_width // self.patch_size)

    @property
    def tokens(self) -> int:
        """L: prefix and patch tokens."""
        return self.prefix_tokens + self.patches


@dataclass(frozen=True)
class PackedConfig:
    """The metadata of a packed file."""

    card: ModelCard
    """Of it the file keeps architecture, model_args, input, class_names, patterns, source and license, of a segmenter
    its settings; the masks are frozen, and the input's img_size is the height."""
    vit: VitShape
    dtypes: dict[str, str]
    """Stored tensor name -> 'fp32', 'bf16' or 'int8', for all but codes and scales."""
    head: DenseHead | None = None
    """A segmenter's; its ViT is an encoder that pools nothing."""
    document: str = field(default="", compare=False, repr=False)
    """The JSON that it was read from."""


def parse_pattern(text: str) -> tuple[int, int]:
    """(n, m) of 'n:m', n kept of every m."""
    match = re.fullmatch(r"([0-9]{1,4}):([0-9]{1,4})", text)
    n, m = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= n <= m <= MAX_GROUP:
        raise ValueError(f"pattern: wanted 'n:m' with 1 <= n <= m <= {MAX_GROUP}, got {text!r}")
    return n, m


def write_metadata(config: PackedConfig) -> dict[str, str]:
    """The configuration as a file's metadata. Raises ValueError if the format has no place for its card."""
    card, spec, height = config.card, config.card.input, config.vit.image_height
    if spec.img_size != height or (config.head is None) != (spec.short_side is None):
        kind = "classifier" if config.head is None else "segmenter"
        raise ValueError(f"card: wanted a {kind}'s input with img_size={height}, got {spec}")
    document: dict[str, Any] = {
        "architecture": card.architecture,
        "overrides": card.model_args,
        "vit": asdict(config.vit),
        "preprocess": {
            "mean": [float(value) for value in spec.mean],
            "std": [float(value) for value in spec.std],
            "interpolation": spec.interpolation,
            "crop_pct": float(spec.crop_pct),
            "exif_transpose": spec.exif if config.head is not None else bool(spec.exif),
            "background": None if spec.background is None else list(spec.background),
            "bits": spec.bits,
        },
        "class_names": card.class_names,
        "source": card.source,
        "license": card.license,
        "patterns": card.patterns,
        "dtypes": config.dtypes,
        "data": card.data,
    }
    if config.head is not None:
        document["segment"] = write_segment(card, config.head)
    version = "2" if config.head is None else "3"
    metadata = {"format": FORMAT, "version": version, "config": json.dumps(document)}
    read_metadata(metadata)  # nothing is written that would be refused when it is read
    return metadata


def read_metadata(metadata: dict[str, str] | None) -> PackedConfig:
    """The configuration that a file's metadata holds. Raises ValueError (or KeyError) where it is not one of ours."""
    if not metadata or metadata.get("format") != FORMAT:
        raise ValueError(f"wanted metadata of format {FORMAT!r}, got none")
    version = metadata.get("version", "")
    if version not in map(str, range(1, VERSION + 1)):
        raise ValueError(
            f"format version: wanted 1 to {VERSION}, got {version[:20]!r}"
            + ": update sparsemae" * (version.isdecimal() and int(version[:9]) > VERSION)
        )
    document = json.loads(metadata["config"])
    if version == "1":
        document = _with_fields_of_2(document)
    segmenter = version == "3"
    check_fields("config", document, _DOCUMENT | ({"segment": dict} if segmenter else {}))
    check_fields("vit", document["vit"], get_type_hints(VitShape))
    vit = VitShape(**document["vit"])
    head, settings = None, dict[str, Any]()
    if segmenter:
        head, settings = read_segment(document["segment"], vit.depth, vit.image_height)
        plain = not (vit.num_classes or vit.global_pool or vit.fc_norm) and vit.image_height == vit.image_width
        if not plain or vit.final_norm != (head.kind == "linear"):
            raise ValueError(f"vit: wanted a segmenter's encoder, square and without a pool and a head, got {vit}")
    names, numbers = document["class_names"], (0, vit.num_classes) if head is None else (head.num_classes,)
    if len(names) not in numbers or not all(isinstance(name, str) for name in names):
        wanted = f"none or {vit.num_classes}" if head is None else str(head.num_classes)
        raise ValueError(f"class_names: wanted {wanted} strings, got {len(names)} values")
    for key in ("patterns", "dtypes"):
        if not all(isinstance(value, str) for value in document[key].values()):
            raise ValueError(f"{key}: wanted strings by name, got {document[key]}")
    card = ModelCard(
        "classify" if head is None else "segment", document["architecture"], document["overrides"],
        _read_input(document["preprocess"], vit, document.get("segment")), tuple(names), document["patterns"], settings,
        frozen=True, source=document["source"], license=document["license"], data=document["data"],
    )  # fmt: skip
    return PackedConfig(card, vit, document["dtypes"], head, metadata["config"])


_DOCUMENT = {
    "architecture": str, "overrides": dict, "vit": dict, "preprocess": dict, "class_names": list, "source": str,
    "license": str, "patterns": dict, "dtypes": dict, "data": dict,
}  # fmt: skip
_PREPROCESS: dict[str, type | tuple[type, ...]] = {
    "mean": list, "std": list, "interpolation": str, "crop_pct": float, "exif_transpose": bool,
    "background": (list, NoneType), "bits": (int, NoneType),
}  # fmt: skip


def _with_fields_of_2(document: Any) -> Any:
    """Version 1 knew no rules of pixels: alpha was dropped, 16-bit gray clipped."""
    if type(document) is dict and type(document.get("preprocess")) is dict:
        return {"data": {}} | document | {"preprocess": {"background": None, "bits": None} | document["preprocess"]}
    return document


def _read_input(document: Any, vit: VitShape, segment: dict[str, Any] | None) -> InputSpec:
    turned = {} if segment is None else {"exif_transpose": (bool, NoneType)}
    check_fields("preprocess", document, _PREPROCESS | turned)
    sides = {} if segment is None else {name: segment[name] for name in ("short_side", "long_side")}
    for key in ("mean", "std"):
        if len(values := document[key]) != vit.in_chans or not all(type(value) is float for value in values):
            raise ValueError(f"preprocess.{key}: wanted {vit.in_chans} numbers, one per channel, got {values}")
    if document["interpolation"] not in INTERPOLATIONS:
        raise ValueError(
            f"preprocess.interpolation: wanted one of {', '.join(INTERPOLATIONS)}, got {document['interpolation']!r}"
        )
    spec = InputSpec(
        vit.image_height, tuple(document["mean"]), tuple(document["std"]), document["interpolation"],
        document["crop_pct"], exif=document["exif_transpose"], background=_read_color(document["background"]),
        bits=document["bits"], **sides,
    )  # fmt: skip
    check_limits(spec, "preprocess.", mean=(-1e6, 1e6), std=(1e-6, 1e6), crop_pct=(0.1, 1.0), bits=(9, 16))
    return spec


def _read_color(color: list[Any] | None) -> tuple[int, ...] | None:
    if color is None:
        return None
    if len(color) != 3 or not all(type(value) is int and 0 <= value <= 255 for value in color):
        raise ValueError(f"preprocess.background: wanted three numbers from 0 to 255, got {color}")
    return tuple(color)
