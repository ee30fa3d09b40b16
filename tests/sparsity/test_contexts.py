"""Held masks, dense weights, freezing and densifying, and SR-STE's term, on whole models."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from nets import Net, assert_untouched
from torch import nn

from sparsemae.sparsity import (
    NMPattern,
    add_srste_gradient,
    dense_weights,
    densify,
    freeze,
    hold_masks,
    iter_sparse,
    linear as linear_module,
    nm_mask,
    sparsify,
)


@pytest.fixture
def counted(monkeypatch):
    """Counts the masks that layers compute."""
    calls = []
    original = linear_module.select_mask

    def select_mask(weight, *how):
        calls.append(weight)
        return original(weight, *how)

    monkeypatch.setattr(linear_module, "select_mask", select_mask)
    return calls


def test_hold_masks_computes_each_mask_once(counted):
    model = Net()
    sparsify(model, "2:8")
    x = torch.randn(2, 16)
    with hold_masks(model):
        assert len(counted) == 4
        for _ in range(3):
            model(x).sum().backward()
        add_srste_gradient(model)
        with hold_masks(model):
            model(x)
        model(x)
        assert len(counted) == 4
    model(x)
    assert len(counted) == 8


def leave_by_an_error(context) -> None:
    with context:
        raise RuntimeError("stop")


@pytest.mark.parametrize("context", [hold_masks, dense_weights])
def test_contexts_are_left_by_an_error_too(context):
    model = Net()
    sparsify(model, "2:8")
    with pytest.raises(RuntimeError, match="stop"):
        leave_by_an_error(context(model))
    assert not any(layer.use_dense or layer.held_mask is not None for _, layer in iter_sparse(model))


def test_held_masks_are_those_of_entry():
    model = Net().double()
    sparsify(model, "2:8")
    layer = model.blocks[0].fc1
    before = nm_mask(layer.weight, layer.pattern)
    x = torch.randn(2, 16, dtype=torch.float64)
    with hold_masks(model):
        with torch.no_grad():
            layer.weight.copy_(layer.weight.roll(1, dims=1))
        assert torch.equal(layer.current_mask(), before)
        assert torch.equal(layer(x), F.linear(x, layer.weight * before, layer.bias))
    assert torch.equal(layer.current_mask(), nm_mask(layer.weight, layer.pattern))
    assert not torch.equal(layer.current_mask(), before)


def test_dense_weights_forward_and_gradient_are_those_of_the_full_model():
    model = Net().double()
    dense = copy.deepcopy(model)
    sparsify(model, "2:8")
    x = torch.randn(2, 16, dtype=torch.float64)
    sparse = model(x)
    with dense_weights(model):
        with dense_weights(model):
            pass
        assert torch.equal(model(x), dense(x))
        model(x).sum().backward()
    dense(x).sum().backward()
    for ours, theirs in zip(model.parameters(), dense.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    assert torch.equal(model(x), sparse)


def test_dense_weights_wins_over_held_masks_and_spares_frozen_layers():
    model = Net().double()
    dense = copy.deepcopy(model)
    sparsify(model, "2:8")
    x = torch.randn(2, 16, dtype=torch.float64)
    with hold_masks(model), dense_weights(model):
        assert torch.equal(model(x), dense(x))
    freeze(model)
    before = model(x)
    with hold_masks(model), dense_weights(model):
        assert torch.equal(model(x), before)


def test_freeze_returns_names_and_can_be_repeated():
    model = Net()
    names = sparsify(model, "2:8")
    assert freeze(model) == names
    state = {key: value.clone() for key, value in model.state_dict().items()}
    assert sum(key.endswith(".weight_mask") for key in state) == 4
    assert freeze(model) == names
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])


@pytest.mark.parametrize("function", [freeze, densify])
def test_a_dense_model_can_be_neither_frozen_nor_densified(function):
    with pytest.raises(ValueError, match=rf"^{function.__name__}: wanted a model with sparse layers, got none"):
        function(Net())


def test_freeze_refuses_weights_that_are_not_finite_and_freezes_nothing():
    model = Net()
    sparsify(model, "2:8")
    with torch.no_grad():
        model.blocks[1].fc1.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"^blocks\.1\.fc1: wanted finite weights, got nan"):
        freeze(model)
    assert not any(layer.frozen for _, layer in iter_sparse(model))


def test_densify_gives_plain_layers_with_the_same_output():
    model = Net().double()
    dense_keys = list(model.state_dict())
    calls = []
    model.blocks[0].fc1.register_forward_hook(lambda *args: calls.append(1))
    names = sparsify(model, "2:8")
    freeze(model)
    x = torch.randn(2, 16, dtype=torch.float64)
    with hold_masks(model):
        before = model(x)
    assert densify(model) == names
    assert_untouched(model)
    assert all(type(model.get_submodule(name)) is nn.Linear for name in names)
    assert list(model.state_dict()) == dense_keys
    assert torch.equal(model(x), before)
    assert len(calls) == 2
    assert (model.blocks[0].fc1.weight == 0).sum() == model.blocks[0].fc1.weight.numel() * 3 // 4
    assert vars(model.blocks[0].fc1).keys() == vars(nn.Linear(1, 1)).keys()


def test_densify_refuses_a_moving_mask():
    model = Net()
    sparsify(model, "2:8")
    with pytest.raises(ValueError, match=r"^densify: wanted a frozen model, got blocks\.0\.fc1 with a moving mask"):
        densify(model)
    freeze(model)
    sparsify(model, "2:8", include=["head"])
    with pytest.raises(ValueError, match=r"^densify: wanted a frozen model, got head"):
        densify(model)
    assert model.blocks[0].fc1.frozen


@pytest.mark.holds("foundation.3")
@pytest.mark.parametrize("strength", [None, 2e-4, 0.5, 0.0])
def test_srste_term_equals_its_closed_form(strength):
    """The gradient grows by strength * (1 - M) * W, 2e-4 by default, and by nothing else."""
    torch.manual_seed(0)
    model = Net().double()
    names = sparsify(model, "2:8")
    model(torch.randn(4, 16, dtype=torch.float64)).square().sum().backward()
    before = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    add_srste_gradient(model, *([] if strength is None else [strength]))
    factor = 2e-4 if strength is None else strength
    for name, parameter in model.named_parameters():
        expected = before[name]
        if name.removesuffix(".weight") in names:
            mask = nm_mask(parameter, NMPattern(2, 8)).double()
            expected = expected + factor * (1 - mask) * parameter.detach()
        torch.testing.assert_close(parameter.grad, expected, rtol=0, atol=1e-14)
        assert torch.equal(parameter, weights[name])


def test_srste_term_of_a_tied_weight_is_added_once():
    first, second = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)
    second.weight = first.weight
    model = nn.Sequential(first, second, first).double()
    sparsify(model, "2:8", include=["*"])
    first.weight.grad = torch.zeros_like(first.weight)
    add_srste_gradient(model, 0.1)
    pruned = first.weight.detach() * ~nm_mask(first.weight, NMPattern(2, 8))
    torch.testing.assert_close(first.weight.grad, 0.1 * pruned, rtol=0, atol=1e-15)


def test_srste_term_skips_frozen_layers_and_layers_without_a_gradient():
    model = Net().double()
    sparsify(model, "2:8", include=["blocks.0.*"])
    freeze(model)
    sparsify(model, "2:8", include=["blocks.1.*"])
    model(torch.randn(4, 16, dtype=torch.float64)).square().sum().backward()
    frozen = model.blocks[0].fc1.weight.grad.clone()
    model.blocks[1].fc2.weight.grad = None
    moving = model.blocks[1].fc1.weight.grad.clone()
    add_srste_gradient(model, 1.0)
    assert torch.equal(model.blocks[0].fc1.weight.grad, frozen)
    assert model.blocks[1].fc2.weight.grad is None
    assert not torch.equal(model.blocks[1].fc1.weight.grad, moving)


@pytest.mark.holds("foundation.3")
@pytest.mark.parametrize("accumulation", [2, 4])
def test_srste_term_does_not_depend_on_accumulation(accumulation):
    torch.manual_seed(0)
    whole = Net().double()
    sparsify(whole, "2:8")
    parts = copy.deepcopy(whole)
    x = torch.randn(8, 16, dtype=torch.float64)
    whole(x).square().mean().backward()
    with hold_masks(parts):
        for chunk in x.chunk(accumulation):
            (parts(chunk).square().mean() / accumulation).backward()
        add_srste_gradient(parts, 0.1)
    add_srste_gradient(whole, 0.1)
    for ours, theirs in zip(parts.parameters(), whole.parameters(), strict=True):
        assert (ours.grad - theirs.grad).norm() <= 1e-10 * theirs.grad.norm()


def test_srste_term_uses_the_held_mask():
    layer = nn.Linear(8, 4, bias=False).double()
    model = nn.Sequential(layer)
    sparsify(model, "2:8", include=["0"])
    mask = nm_mask(layer.weight, NMPattern(2, 8))
    layer.weight.grad = torch.zeros_like(layer.weight)
    with hold_masks(model):
        with torch.no_grad():
            layer.weight.copy_(layer.weight.roll(1, dims=1))
        add_srste_gradient(model, 1.0)
    assert torch.equal(layer.weight.grad, layer.weight.detach().masked_fill(mask, 0.0))
