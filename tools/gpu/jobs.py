"""Small jobs of our own recipes: options without the command line, images as files, what a run wrote."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints
from unittest.mock import patch

import torch
import yaml
from PIL import Image

from gpu import ROOT
from gpu.bench import Bench
from sparsemae.commands.train import train as full_train
from sparsemae.data.embedded import CLASS_NAMES, EmbeddedReader, masks
from sparsemae.models.weights import read_weights
from sparsemae.options.tasks import FinetuneConfig, PretrainConfig, SegmentConfig, TrainingConfig

KINDS: dict[str, type[TrainingConfig]] = {
    "pretrain": PretrainConfig, "finetune": FinetuneConfig, "segment": SegmentConfig
}  # fmt: skip
TINY = {"name": "vit_base_patch16_224", "args": {"patch_size": 7, "embed_dim": 64, "depth": 4, "num_heads": 2}}


def options(kind: type[Any], tree: dict[str, Any]) -> Any:
    """A dataclass of options from nested settings, as the command line makes it."""
    hints, values = get_type_hints(kind), {}
    base = kind()
    for member in fields(kind):
        if member.name not in tree:
            continue
        value, default = tree[member.name], getattr(base, member.name)
        if is_dataclass(default):
            value = options_over(default, value)
        elif isinstance(value, list) and "tuple" in str(hints[member.name]):
            value = tuple(value)
        values[member.name] = value
    return replace(base, **values)


def options_over(default: Any, tree: dict[str, Any]) -> Any:
    """The same on top of given defaults."""
    hints = get_type_hints(type(default))
    values = {
        name: tuple(value) if isinstance(value, list) and "tuple" in str(hints[name]) else value
        for name, value in tree.items()
    }
    return replace(default, **values)


def recipe(name: str, **changes: Any) -> Any:
    """A recipe's options, with some groups' settings changed."""
    tree = yaml.safe_load((ROOT / f"sparsemae/recipes/{name}.yaml").read_text())
    job = name.removeprefix("demo_").split("_")[0]
    for group, settings in changes.items():
        tree[group] = {**tree.get(group, {}), **settings} if isinstance(settings, dict) else settings
    return options(KINDS[job], tree)


def write_images(root: Path) -> None:
    """The first embedded images as files, with classes and with masks: an evaluation of all 10,000 would take long."""
    for split, count in (("train", 128), ("val", 32)):
        reader, classes = EmbeddedReader(split), masks(split)
        for index in range(count):
            image, label = reader[index]
            where = {
                root / f"classes/{split}/{label}/{index}.png": image, root / f"masks/images/{split}/{index}.png": image,
                root / f"masks/masks/{split}/{index}.png": Image.fromarray(classes[index]),
            }  # fmt: skip
            for file, picture in where.items():
                file.parent.mkdir(parents=True, exist_ok=True)
                picture.save(file)
    (root / "masks/classes.txt").write_text("\n".join(["Background", *CLASS_NAMES]))


def small(bench: Bench, job: str, out: str, **trainer: Any) -> Any:
    """A demo job of a few steps on these images, in fp32."""
    root = bench.out / "images"
    if not root.exists():
        write_images(root)
    where = {"root": str(root / "classes")}
    if job == "segment":
        where = {"root": str(root / "masks"), "classes": str(root / "masks/classes.txt")}
    settings = {
        "accelerator": bench.device, "precision": "fp32", "global_batch": 32, "epochs": 2, "save_every_steps": 3,
        "log_every_steps": 1, "evaluate_every_epochs": 100, "compile": False, "steps": None, **trainer,
    }  # fmt: skip
    return recipe(
        f"demo_{job}", out=out, init=None, model={**TINY, "drop_path": 0.1}, trainer=settings,
        data={"source": "folder", **where, "train_images": None, "workers": 0},
        # epsilon 1: AdamW's first steps would else be signs of gradients, of rounding noise where these are nearly 0
        optim={"warmup_epochs": 0.5, "warmup_steps": None, "eps": 1.0, "lr": 1.0, "min_lr": 0.0, "weight_decay": 0.0},
    )  # fmt: skip


def train(config: Any) -> None:
    """A training without its page."""
    with patch("sparsemae.commands.train.collect"):
        full_train(config)


def weights(run: str) -> dict[str, torch.Tensor]:
    """What a run wrote."""
    return read_weights(run)[0]


def difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Largest relative difference of two models' weights, in the norm, over their tensors."""
    assert a.keys() == b.keys()
    return max(float((a[k].double() - b[k].double()).norm() / a[k].double().norm().clamp_min(1e-12)) for k in a)
