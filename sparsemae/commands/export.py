"""From a trained model to the files that other libraries open, each held against the model before it is called done."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from huggingface_hub.utils import validate_repo_id
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn

from sparsemae.card import ModelCard
from sparsemae.commands.model_card import model_card
from sparsemae.models.export import timm_config, vitmae_configs, vitmae_state
from sparsemae.models.hub import push
from sparsemae.models.weights import public_state
from sparsemae.options import ExportConfig
from sparsemae.sparsity import dense_weights, densify, freeze, iter_sparse
from sparsemae.tasks.loading import load_model
from sparsemae.tasks.task import encoder_of
from sparsemae.terminal import printable

Writer = Callable[[Any, ModelCard, Path], str]
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
LARGEST_ERROR = 1e-3
"""Of a logit elsewhere, of the logits' standard deviation: 1e-6 is usual."""


def export(config: ExportConfig) -> Path:
    """Write the folder, whole or not at all, print what was held against what, and push it where that is wanted."""
    if config.push is not None:
        validate_repo_id(config.push)
        if "/" not in config.push:
            raise ValueError(f"push: wanted OWNER/NAME, got {config.push}")
    model, card = load_model(config.model)
    card = replace(card, license=config.license or card.license)
    writer: Writer = _write_onnx if config.to == "onnx" else _write_timm
    if config.to == "hf" and card.task == "pretrain":
        writer = _write_vitmae
    if card.task == "segment" and config.to != "onnx":
        raise ValueError(f"to: wanted onnx for a segmenter, which timm and transformers do not have, got {config.to}")
    if config.masked and card.task != "pretrain":
        raise ValueError(f"masked: wanted a pretrained run, whose masks still move, got a model for {card.task}")
    layers = [layer for _, layer in iter_sparse(model)]
    zeros = bool(layers) and (config.masked or card.task != "pretrain" or layers[0].frozen)
    if zeros:
        freeze(model)
    text = model_card(model, card, config)
    if zeros:
        densify(model)
    with _appearing(Path(config.folder)) as folder, dense_weights(model):
        said = writer(model, card, folder)
        (folder / "README.md").write_text(text, encoding="utf-8")
    print(printable(f"{config.folder}: {said}"))
    if config.push is not None:
        print(printable(f"{config.push}: {push(Path(config.folder), config.push)}"))
    return Path(config.folder)


@contextmanager
def _appearing(folder: Path) -> Iterator[Path]:
    """A name beside a new folder, which takes its place if nothing is raised."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"folder: {folder}: wanted a new or an empty folder")
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_json(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _write_weights(folder: Path, state: dict[str, Tensor]) -> None:
    save_file({key: value.contiguous() for key, value in state.items()}, folder / "model.safetensors", {"format": "pt"})


def _write_timm(model: Any, card: ModelCard, folder: Path) -> str:
    vit = encoder_of(model)
    _write_json(folder / "config.json", timm_config(vit, card))
    _write_weights(folder, public_state(vit))
    reopened = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = _example(card)
    with torch.inference_mode():
        if not torch.equal(reopened(images), vit.eval()(images)):
            raise ValueError(f"{card.architecture}: wanted the same outputs in timm {timm.__version__}, got others")
    return "opened by timm and transformers; in timm its outputs are the model's, bit for bit"


def _write_vitmae(model: Any, card: ModelCard, folder: Path) -> str:
    for name, values in vitmae_configs(model, card).items():
        _write_json(folder / name, values)
    _write_weights(folder, vitmae_state(model))
    return "a ViTMAEForPreTraining of transformers"


class _Logits(nn.Module):
    """Of a segmenter, the logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        output = self.model(images)
        return getattr(output, "logits", output)  # type: ignore[no-any-return]


def _write_onnx(model: Any, card: ModelCard, folder: Path) -> str:
    if card.task == "pretrain":
        raise ValueError("to: wanted timm or hf for a pretrained run, which has no logits, got onnx")
    if missing := [name for name in ONNX_PACKAGES if find_spec(name) is None]:
        raise ValueError(f"to: onnx wants packages that are not installed: pip install {' '.join(missing)}")
    import onnxruntime

    network, images = _Logits(model).eval(), _example(card)
    batch = torch.export.Dim("batch", min=1, max=1024)
    program: Any = torch.onnx.export(
        network, (images,), dynamo=True, dynamic_shapes=({0: batch},), input_names=["images"], output_names=["logits"],
        verbose=False,
    )  # fmt: skip
    facts = {"task": card.task, "license": card.license, "preprocess": json.dumps(asdict(card.input))}
    named = {"class_names": json.dumps(card.class_names), "settings": json.dumps(card.settings)}
    program.model.metadata_props.update(facts | named)
    program.save(folder / "model.onnx", external_data=False)
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    with torch.inference_mode():
        wanted = network(images).numpy()
    (got,) = session.run(None, {"images": images.numpy()})
    return compared(got, wanted, f"onnxruntime {onnxruntime.__version__}")


def compared(got: NDArray[np.float32], wanted: NDArray[np.float32], where: str) -> str:
    """How far the logits of another library are from the model's. Raises ValueError if by more than rounding."""
    error, spread = float(np.abs(got - wanted).max()), float(wanted.std())
    if not error <= LARGEST_ERROR * spread:  # nan is not
        raise ValueError(
            f"wanted the same logits in {where}, got some that are off by {error:.1e}, their spread {spread:.1e}"
        )
    return f"in {where}, largest difference of a logit {error / (spread or 1):.1e} of the logits' standard deviation"


def _example(card: ModelCard) -> Tensor:
    side = card.input.img_size
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
