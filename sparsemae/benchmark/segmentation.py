"""A photograph of 512 x 512 px to the class of each pixel: packed segmenters against a dense ViT-B with the same head.

All begin with the pixels' bytes and end with classes of the same size, 150 of them; the dense one's graph in OpenVINO
has the normalization, the resizing and the argmax, too. Weights are random: speed does not depend on them. The packed
classes are counted by `predict`, with all that it does.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsemae.benchmark import packed
from sparsemae.benchmark.packed import Measurement, Runner

SIDE, CLASSES, WIDTH, OUT_INDICES = 512, 150, 256, [3, 5, 7, 11]
DENSE = f"dense ViT-B, SegFormer head {WIDTH} wide"


def measure(files: list[str], engines: list[str], threads: int, runs: int, artifacts: str) -> list[Measurement]:
    """Run the packed files, none: SparseMAE-T and -S with random weights; and OpenVINO, in each precision named."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(artifacts or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        subjects = [("packed", file) for file in files or _random_files(folder)]
        subjects += [(engine, DENSE) for engine in engines if engine.startswith("openvino")]
        return packed.compare(subjects, "sparsemae.benchmark.segmentation", folder, [1], threads, runs)


table = packed.table


def _random_files(folder: Path) -> list[str]:
    from sparsemae.card import InputSpec, ModelCard
    from sparsemae.packing.pack import pack
    from sparsemae.sparsity import freeze, sparsify

    spec = InputSpec(SIDE, (0.5,) * 3, (0.25,) * 3, short_side=SIDE, long_side=4 * SIDE)
    settings = {
        "head": {"kind": "segformer", "width": WIDTH}, "out_indices": OUT_INDICES, "reduce_zero_label": True,
        "inference": {"mode": "slide", "stride": 341, "scales": [1.0], "flip": False},
        "palette": [[0, 0, 0]] * CLASSES,
    }  # fmt: skip
    names, files = tuple(map(str, range(CLASSES))), []
    card = ModelCard("segment", "vit_base_patch16_224", {}, spec, names, settings=settings)
    for name, pattern in (("SparseMAE-T", "2:32"), ("SparseMAE-S", "4:32")):
        model = _model()
        sparsify(model, pattern)
        freeze(model)
        for dtype in ("bf16", "int8"):
            files.append(str(folder / f"{name} light {dtype}.safetensors"))
            pack(model, files[-1], card, dtype)
    return files


def _model() -> Any:
    from sparsemae.models import build_vit
    from sparsemae.models.segmenter import Segmenter
    from sparsemae.options import HeadConfig

    vit = build_vit("vit_base_patch16_224", {}, SIDE)
    return Segmenter(vit, CLASSES, OUT_INDICES, HeadConfig(WIDTH, kind="segformer")).eval()


def _export(engine: str, folder: str, threads: int) -> None:
    """The dense model's graph, from pixels [1, 3, H, W] of 0 to 255 to classes [1, H, W]."""
    import openvino
    import torch

    torch.set_num_threads(threads)

    class ClassMap(torch.nn.Module):
        """A segmenter between bytes and classes."""

        def __init__(self) -> None:
            super().__init__()
            self.model = _model()

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            classes: torch.Tensor = self.model((pixels - 127.5) / 63.75).logits.argmax(dim=1)
            return classes.to(torch.uint8)

    example = torch.rand(1, 3, SIDE, SIDE) * 255
    converted = openvino.convert_model(ClassMap().eval(), example_input=example, input=[1, 3, SIDE, SIDE])
    if engine.endswith("int8"):
        import nncf

        samples = nncf.Dataset([example.numpy() for _ in range(2)])
        converted = nncf.quantize(converted, samples, model_type=nncf.ModelType.TRANSFORMER, subset_size=2)
    openvino.save_model(converted, f"{folder}/{DENSE} {engine}.xml")
    print("= 0", flush=True)


def _load(engine: str, model: str, folder: str, threads: int) -> Runner:
    if engine == "packed":
        from sparsemae.runtime import load

        return load(model, threads).predict
    run = packed.load_openvino(f"{folder}/{model} {engine}", engine, threads)
    return lambda pixels: run(np.ascontiguousarray(pixels.transpose(2, 0, 1)[None], np.float32))


def _example(_: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


if __name__ == "__main__":
    _, job, engine, model, folder, threads = sys.argv
    if job == "export":
        _export(engine, folder, int(threads))
    else:
        packed.serve(_load(engine, model, folder, int(threads)), _example)
