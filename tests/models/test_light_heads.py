"""The light heads token by token, against ten lines of numpy, and that each trains and takes any size."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sparsemae.config import read_config
from sparsemae.models import build_vit
from sparsemae.models.segmenter import Segmenter
from sparsemae.options import HeadConfig, SegmentConfig

KINDS = ("linear", "segformer")
ARGS = {"patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "dynamic_img_size": True, "dynamic_img_pad": True}


def segmenter(kind: Any, classes: int = 7) -> Segmenter:
    torch.manual_seed(0)
    model = Segmenter(build_vit("vit_base_patch16_224", ARGS, 32), classes, (0, 1, 2, 3), HeadConfig(16, kind=kind))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def normalized(x: np.ndarray, norm: Any) -> np.ndarray:
    weight, bias = (tensor.detach().double().numpy() for tensor in (norm.weight, norm.bias))
    return (x - x.mean()) / np.sqrt(x.var() + norm.eps) * weight + bias


def by_hand(model: Segmenter, tokens: list[np.ndarray]) -> np.ndarray:
    """Logits [C] of one token, from what the blocks gave for it."""
    head: Any = model.decode_head
    weights = {name: value.detach().double().numpy() for name, value in head.named_parameters()}
    if model.head.kind == "linear":
        x = normalized(tokens[-1], model.encoder.norm)
    else:
        parts = [weights[f"projections.{k}.weight"] @ normalized(x, head.norms[k]) for k, x in enumerate(tokens)]
        y = weights["fuse.weight"] @ normalized(np.sum(parts, axis=0), head.norm) + weights["fuse.bias"]
        x = np.array([v * (1 + math.erf(v / math.sqrt(2))) / 2 for v in y])
    result: np.ndarray = weights["classifier.weight"] @ x + weights["classifier.bias"]
    return result


@pytest.mark.parametrize("kind", KINDS)
def test_each_token_by_itself(kind: str) -> None:
    model, seen = segmenter(kind).eval(), list[torch.Tensor]()
    for block in model.encoder.blocks:
        block.register_forward_hook(lambda _, __, out: seen.append(out[0, 1:]))
    with torch.inference_mode():
        maps = model.forward_maps(torch.randn(1, 3, 24, 40))  # 3 x 5 tokens
        logits = model.decode_head(maps)[0].flatten(1).T.numpy()
    assert logits.shape == (15, 7)
    for token in range(15):
        wanted = by_hand(model, [block[token].double().numpy() for block in seen])
        assert np.abs(logits[token] - wanted).max() < 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_image_trains_every_weight(kind: str) -> None:
    model = segmenter(kind).train()
    output = model(torch.randn(1, 3, 37, 50))
    assert output.logits.shape == (1, 7, 37, 50)
    assert output.auxiliary is None
    output.logits.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize("size", ["t", "s"])
def test_the_light_recipes_are_the_papers_but_for_the_head(size: str) -> None:
    paper, light = (read_config(SegmentConfig, ["--config", f"segment_{size}{x}"]) for x in ("", "_light"))
    assert (light.head.kind, 64 <= light.head.width <= 256, light.out) == (
        "segformer", True, f"runs/segment_{size}_light",
    )  # fmt: skip
    light.head, light.out = paper.head, paper.out
    assert light == paper
