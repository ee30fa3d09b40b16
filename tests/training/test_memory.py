"""The fake step against a real one, and the categories against arithmetic."""

from typing import Any

import pytest
import torch
from torch import Tensor

from sparsemae.models import ModelConfig
from sparsemae.sparsity import Topology, add_srste_gradient, hold_masks, sparsify
from sparsemae.tasks.build import DecoderConfig, build_autoencoder
from sparsemae.costs.step_memory import StepMemory, _Live, step_memory
from sparsemae.training.optim import OptimConfig, make_optimizer

SPARSE = 2 * 12 * 64**2
"""Weights of two blocks 64 wide."""


def autoencoder(device: str) -> Any:
    config = ModelConfig(args={"patch_size": 7, "embed_dim": 64, "depth": 2, "num_heads": 2})
    with torch.device(device):
        model = build_autoencoder(config, DecoderConfig(32, 1, 2), 28, 0)
    sparsify(model, "2:32")
    return model


def loss_of(model: Any) -> Tensor:
    return model(torch.empty(32, 3, 28, 28).fill_(0.5), 0.25, torch.rand(32, 16)).loss


def memory(**options: Any) -> StepMemory:
    return step_memory(autoencoder("meta"), loss_of, OptimConfig(), srste_strength=2e-4, **options)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_fake_step_takes_what_a_real_one_does(precision: str) -> None:
    model = autoencoder("cpu").train()
    with _Live(model) as live:
        live.optimizer = optimizer = make_optimizer(model, OptimConfig())
        masks = [Topology(model), Topology(model)]
        for _ in range(2):
            live.forget_peak()
            with hold_masks(model):
                with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                    loss = loss_of(model)
                loss.backward()
                del loss
                add_srste_gradient(model)
            optimizer.step()
            optimizer.zero_grad()
    assert len(masks) == 2
    planned = memory(precision=precision)
    assert (live.peak.total, live.peak.optimizer, live.peak.masks) == (
        planned.total, planned.optimizer, planned.masks,
    )  # fmt: skip


def test_categories_by_hand() -> None:
    model, single = autoencoder("meta"), memory(precision="fp32")
    numbers = [(p.numel(), p.requires_grad) for p in model.parameters()]
    trained, parameters = sum(n for n, trains in numbers if trains), sum(trains for _, trains in numbers)
    assert single.weights == 4 * sum(n for n, _ in numbers)
    assert single.optimizer == 4 * (2 * trained + parameters)  # moments, and a counter for each parameter
    assert single.masks == pytest.approx(SPARSE * (3 + 4), rel=0.01)  # three masks, the masked copies
    assert single.gradients == 0  # the peak lies at the end of the forward
    assert memory(precision="fp32", accumulate=4).gradients == 4 * trained
    assert memory(precision="fp32", world=2).gradients == 4 * trained
    assert memory(precision="fp64").activations == pytest.approx(2 * single.activations, rel=0.03)
