"""Frozen layers: what freezing keeps, and that zeros stay zeros."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from nets import PATTERN, is_plus_zero, sparse_layer, sparse_mlp, train

from sparsemae.sparsity import densify, freeze, hold_masks, linear as linear_module, nm_mask


def test_freeze_gives_plus_zero_and_keeps_the_rest_bit_for_bit():
    layer = sparse_layer()
    with torch.no_grad():
        layer.weight[0] = -layer.weight[0].abs()
        layer.weight[1] = -0.0
        layer.weight[2] = layer.weight[2] * 1e-300
    weight, mask = layer.weight.detach().clone(), nm_mask(layer.weight, PATTERN)
    parameter = layer.weight
    assert freeze(layer) == [""]
    assert layer.weight is parameter
    assert torch.equal(layer.weight_mask, mask)
    assert torch.equal(layer.weight[mask], weight[mask])
    assert is_plus_zero(layer.weight[~mask])
    assert torch.equal(layer.current_mask(), mask)
    x = torch.randn(3, 16, dtype=torch.float64)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


def test_a_frozen_mask_does_not_follow_the_weight():
    """A kept weight that reaches 0 ties with the pruned ones, and a fresh mask would take the lower index."""
    layer = sparse_layer()
    freeze(layer)
    mask = layer.weight_mask.clone()
    with torch.no_grad():
        layer.weight.zero_()
    assert not torch.equal(nm_mask(layer.weight, PATTERN), mask)
    assert torch.equal(layer.current_mask(), mask)
    layer(torch.randn(4, 16, dtype=torch.float64)).sum().backward()
    assert torch.equal(layer.weight.grad != 0, mask)


def test_freeze_takes_the_held_masks():
    layer = sparse_layer()
    mask = nm_mask(layer.weight, PATTERN)
    with hold_masks(layer):
        with torch.no_grad():
            layer.weight.copy_(layer.weight.roll(1, dims=1))
        freeze(layer)
    assert torch.equal(layer.weight_mask, mask)
    assert layer.held_mask is None


def test_freeze_clears_the_gradients_of_pruned_weights():
    layer = sparse_layer()
    layer(torch.randn(4, 16, dtype=torch.float64)).sum().backward()
    grad = layer.weight.grad.clone()
    freeze(layer)
    assert is_plus_zero(layer.weight.grad[~layer.weight_mask])
    assert torch.equal(layer.weight.grad[layer.weight_mask], grad[layer.weight_mask])


def test_gradients_of_pruned_weights_are_zero_after_freezing():
    layer = sparse_layer()
    freeze(layer)
    x, g = torch.randn(5, 16, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)
    layer(x).backward(g)
    torch.testing.assert_close(layer.weight.grad, (g.T @ x) * layer.weight_mask, rtol=1e-12, atol=1e-12)
    assert (layer.weight.grad[layer.weight_mask] != 0).all()


OPTIMIZERS = {
    "adamw fused": partial(torch.optim.AdamW, lr=0.05, weight_decay=0.3, fused=True),
    "adamw foreach": partial(torch.optim.AdamW, lr=0.05, weight_decay=0.3, foreach=True),
    "adamw plain": partial(torch.optim.AdamW, lr=0.05, weight_decay=0.3, foreach=False),
    "sgd momentum": partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.3),
    "sgd nesterov": partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True),
    "adagrad": partial(torch.optim.Adagrad, lr=0.05),
}


@pytest.mark.holds("foundation.5")
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_zeros_stay_through_ten_more_steps_with_old_momentum(kind):
    model = sparse_mlp()
    optimizer = OPTIMIZERS[kind](model.parameters())
    train(model, optimizer, 5)  # straight through: momentum of weights that will be pruned
    freeze(model)
    masks = {index: model[index].weight_mask.clone() for index in (0, 2)}
    before = model[0].weight.detach().clone()
    for step in range(10):
        train(model, optimizer, 1, seed=step)
        for index, mask in masks.items():
            assert is_plus_zero(model[index].weight[~mask])
            assert is_plus_zero(model[index].weight.grad[~mask].abs())
            assert torch.equal(model[index].weight_mask, mask)
    assert (model[0].weight[masks[0]] != before[masks[0]]).any()


@pytest.mark.holds("foundation.5")
def test_zeros_stay_in_a_deepcopy_of_a_frozen_model():
    model = sparse_mlp()
    optimizer = OPTIMIZERS["sgd momentum"](model.parameters())
    train(model, optimizer, 3)
    freeze(model)
    twin = copy.deepcopy(model)
    twin_optimizer = OPTIMIZERS["sgd momentum"](twin.parameters())
    twin_optimizer.load_state_dict(optimizer.state_dict())
    train(twin, twin_optimizer, 10)
    for index in (0, 2):
        assert is_plus_zero(twin[index].weight[~model[index].weight_mask])
        assert torch.equal(twin[index].weight_mask, model[index].weight_mask)


def test_a_densified_layer_learns_in_every_weight():
    model = sparse_mlp()
    freeze(model)
    densify(model)
    pruned = model[0].weight == 0
    assert pruned.any()
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), 1)
    assert (model[0].weight[pruned] != 0).any()


def test_frozen_weights_do_not_leak():
    layer = sparse_layer()
    freeze(layer)
    entries = len(linear_module._frozen_layers)
    del layer
    assert len(linear_module._frozen_layers) == entries - 1
