"""The kernels of each instruction set, one by one, at ViT-B's shapes, and how near to the processor's best they come.

One thread, one block of ViT-B/16 at 224² (197 tokens), random weights: speed does not depend on them. The peak is what
the instructions of a product reach on registers alone; it is measured in between, so that a busy machine slows both.
`refresh` puts the rows into the table of native/README.md and leaves the rows of other processors there alone.
"""

import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np

from sparsemae.card import InputSpec, ModelCard
from sparsemae.files import write_atomic
from sparsemae.packing.codec import encode_mask
from sparsemae.packing.format import DTYPES, LINEARS, Array, PackedModel, dense_shapes, to_bf16, to_bytes
from sparsemae.packing.metadata import PackedConfig, VitShape, parse_pattern
from sparsemae.runtime import native

BLOCK = VitShape(
    embed_dim=768, depth=1, num_heads=12, mlp_hidden=3072, patch_size=16, image_height=224, image_width=224,
    in_chans=3, num_classes=0, reg_tokens=0, class_token=True, no_embed_class=False, pre_norm=False, final_norm=False,
    fc_norm=False, layer_scale=False, qkv_bias=True, proj_bias=True, patch_bias=True, pool_include_prefix=False,
    global_pool="avg", norm_eps=1e-6,
)  # fmt: skip
PATTERNS = ("2:32", "4:32")
_HEAD = (
    "processor", "kernels", "weights", "qkv", "proj", "fc1", "fc2", "GMAC/s", "of the peak", "attention",
    "of its peak", "norm",
)  # fmt: skip
_MARKS = re.compile(r"(<!-- table of make kernels -->\n).*?(<!-- end -->)", re.DOTALL)


@dataclass
class KernelRow:
    """One table of kernels with one kind of weights."""

    processor: str
    """Vendor, family/model/stepping, generation where it is known, instruction sets."""
    isa: str
    weights: str
    """Pattern and type of the sparse weights."""
    milliseconds: dict[str, float]
    """Of one image in one block, by kernel: norm, qkv, attention, proj, fc1, fc2."""
    instructions: str
    """What the products of the linear layers are made of."""
    gmacs: float
    """Kept multiply-adds of the linear layers, 10^9 per second."""
    share: float
    """Of the peak of these instructions."""
    attention_share: float
    """Of the peak of attention's instructions."""


def measure(runs: int, vit: VitShape = BLOCK) -> list[KernelRow]:
    """Every table that this processor can run, with bf16 weights, and with int8 ones where it multiplies integers."""
    rows: list[KernelRow] = []
    with suppress(KeyboardInterrupt):  # what there is until then is the result
        for isa, pattern, dtype in product(native.usable_isas(), PATTERNS, ("bf16", "int8")):
            block = _random_block(vit, isa, pattern, dtype)
            if block.isa != isa:
                continue  # avxvnni has int8 products only
            row = _measure(vit, block, pattern, dtype, runs)
            other = (isa, f"{pattern} bf16", row.instructions)  # int8 weights multiplied as bf16 are no second row
            if dtype == "bf16" or not rows or (rows[-1].isa, rows[-1].weights, rows[-1].instructions) != other:
                rows.append(row)
                print(f"{isa}, {row.weights}: {row.gmacs:.0f} GMAC/s", file=sys.stderr, flush=True)
    return rows


def table(rows: Sequence[KernelRow]) -> str:
    """The figures as text."""
    lines = [f"{'kernels':<12}{'weights':<11}" + "".join(f"{name:>13}" for name in _HEAD[3:]) + "  instructions"]
    for row in rows:
        cells = (f"{row.isa:<12}{row.weights:<11}", *(f"{cell:>13}" for cell in _cells(row)[3:]))
        lines.append("".join(cells) + f"  {row.instructions}")
    return "\n".join(lines)


def refresh(file: Path, rows: Sequence[KernelRow]) -> None:
    """Replace this processor's rows of the table in a Markdown file.

    Raises:
        ValueError: the file has no such table.
    """
    text = file.read_text()
    found = _MARKS.search(text)
    if found is None:
        raise ValueError(
            f"{file}: wanted a table between '<!-- table of make kernels -->' and '<!-- end -->', got none"
        )
    own = {row.processor.split(":")[0] for row in rows}
    lines = [line for line in found[0].splitlines() if line.startswith("| ")]
    kept = [line for line in lines[1:] if line[2:].split(":")[0] not in own]
    lines = ["| " + " | ".join(_HEAD) + " |", "|---" * 3 + "|---:" * (len(_HEAD) - 3) + "|", *kept]
    lines += ["| " + " | ".join(_cells(row)) + " |" for row in rows]
    write_atomic(file, _MARKS.sub(lambda match: match[1] + "\n" + "\n".join(lines) + "\n\n" + match[2], text))


def _cells(row: KernelRow) -> list[str]:
    times = {kernel: f"{value:.3f}" for kernel, value in row.milliseconds.items()}
    return [
        row.processor, row.isa, row.weights, times["qkv"], times["proj"], times["fc1"], times["fc2"],
        f"{row.gmacs:.0f}", f"{row.share:.0%}", times["attention"], f"{row.attention_share:.0%}", times["norm"],
    ]  # fmt: skip


def _measure(vit: VitShape, block: native.Vit, pattern: str, dtype: str, runs: int) -> KernelRow:
    n, m = parse_pattern(pattern)
    timings = {timing.kernel: timing for timing in block.time_kernels(runs)}
    weights = {
        layer: shape[0] * shape[1] * n / m
        for layer in ("qkv", "proj", "fc1", "fc2")
        for name, shape in dense_shapes(vit).items()
        if name.endswith(f".{layer}.weight")
    }
    linear = [timings[layer] for layer in weights]
    rate = vit.tokens * sum(weights.values()) / sum(timing.seconds for timing in linear)
    attention = timings["attention"]
    return KernelRow(
        processor=native.processor_name(),
        isa=block.isa,
        weights=f"{pattern} {dtype}",
        milliseconds={kernel: 1e3 * timing.seconds for kernel, timing in timings.items()},
        instructions=linear[0].instructions,
        gmacs=rate / 1e9,
        share=rate / (linear[0].peak * (n / m if linear[0].zeros else 1.0)),
        attention_share=2 * vit.tokens**2 * vit.embed_dim / attention.seconds / attention.peak,
    )


def _random_block(vit: VitShape, isa: str, pattern: str, dtype: str) -> native.Vit:
    """A model with random sparse weights, on one thread."""
    n, m = parse_pattern(pattern)
    rng, tensors = np.random.default_rng(0), dict[str, Array]()
    patterns, dtypes = dict[str, str](), dict[str, str]()
    for name, shape in dense_shapes(vit).items():
        if not name.endswith(tuple(f"{layer}.weight" for layer in LINEARS)):
            tensors[name], dtypes[name] = rng.standard_normal(shape, np.float32), "fp32"
            continue
        rows, columns = shape
        order = rng.random((rows * columns // m, m)).argsort(axis=1)
        patterns[name.removesuffix(".weight")], dtypes[f"{name}.values"] = pattern, dtype
        tensors[f"{name}.codes"] = encode_mask((order < n).reshape(rows, columns), n, m)
        values = rng.standard_normal((rows, columns // m * n), np.float32) / columns**0.5
        if dtype == "int8":
            scale = tensors[f"{name}.scale"] = np.abs(values).max(axis=1) / np.float32(127)
            values = np.rint(values / scale[:, None])
        tensors[f"{name}.values"] = to_bf16(values) if dtype == "bf16" else values.astype(DTYPES[dtype])
    spec = InputSpec(vit.image_height, (0.5,) * vit.in_chans, (0.5,) * vit.in_chans)
    card = ModelCard("classify", "random weights", {}, spec, patterns=patterns)
    return native.Vit(to_bytes(PackedModel(PackedConfig(card, vit, dtypes), tensors)), 1, isa, quantize=True)
