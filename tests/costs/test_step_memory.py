"""The fake step against a real one, and the categories against arithmetic."""

import pytest
import torch
from torch import nn

from sparsemae.costs.step_memory import StepMemory, _Live, step_memory
from sparsemae.data.sampling import BatchPlan
from sparsemae.options.data import ImageDataConfig
from sparsemae.options.model import DecoderConfig, ModelConfig
from sparsemae.options.tasks import PretrainConfig
from sparsemae.sparsity import Topology, add_srste_gradient, hold_masks, sparsify
from sparsemae.tasks.pretraining import Pretraining
from sparsemae.tasks.sparse import meta_model
from sparsemae.training.optim import make_optimizer

SPARSE = 2 * 12 * 64**2
"""Weights of two blocks 64 wide."""
TASK = Pretraining(
    PretrainConfig(
        model=ModelConfig(args={"patch_size": 7, "embed_dim": 64, "depth": 2, "num_heads": 2}, drop_path=0.0),
        decoder=DecoderConfig(32, 1, 2),
        data=ImageDataConfig(img_size=28),
    )
)


def autoencoder() -> nn.Module:
    model = TASK.build(TASK.card())
    sparsify(model, "2:32")
    return model


def memory(precision: str, accumulate: int = 1, world: int = 1) -> StepMemory:
    """Of a step of micro-batches of 32 images."""
    batches = BatchPlan.make(images=1000, global_batch=32 * accumulate * world, device_batch=32, world=world)
    return step_memory(TASK, meta_model(TASK), batches, precision)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.slow
def test_a_fake_step_takes_what_a_real_one_does(precision: str) -> None:
    model = autoencoder().train()
    with _Live(model) as live:
        live.optimizer = optimizer = make_optimizer(model, TASK.config.optim)
        masks = [Topology(model), Topology(model)]
        for _ in range(2):
            live.forget_peak()
            with hold_masks(model):
                with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                    loss = TASK.loss(TASK.wrapped(model), TASK.example_batch(model, 32))
                torch.autograd.backward(loss)
                del loss
                add_srste_gradient(model)
            optimizer.step()
            optimizer.zero_grad()
    assert len(masks) == 2
    planned = memory(precision)
    assert (live.peak.total, live.peak.optimizer, live.peak.masks) == (
        planned.total, planned.optimizer, planned.masks,
    )  # fmt: skip


@pytest.mark.slow
def test_categories_by_hand() -> None:
    model, single = autoencoder(), memory("fp32")
    numbers = [(p.numel(), p.requires_grad) for p in model.parameters()]
    trained, parameters = sum(n for n, trains in numbers if trains), sum(trains for _, trains in numbers)
    assert single.weights == 4 * sum(n for n, _ in numbers)
    assert single.optimizer == 4 * (2 * trained + parameters)  # moments, and a counter for each parameter
    assert single.masks == pytest.approx(SPARSE * (3 + 4), rel=0.01)  # three masks, the masked copies
    assert single.gradients == 0  # the peak lies at the end of the forward
    assert memory("fp32", accumulate=4).gradients == 4 * trained
    assert memory("fp32", world=2).gradients == 4 * trained
    assert memory("fp64").activations == pytest.approx(2 * single.activations, rel=0.03)
