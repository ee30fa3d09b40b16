from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from nets import PATTERN, is_plus_zero, masked, sparse_layer, sparse_mlp, train
from torch import nn

from sparsemae.sparsity import NMLinear, freeze, hold_masks, nm_mask, sparsify


@pytest.mark.parametrize("bias", [True, False])
def test_forward_is_that_of_the_masked_weight(bias):
    layer = sparse_layer(bias=bias)
    x = torch.randn(2, 3, 16, dtype=torch.float64)
    assert torch.equal(layer(x), F.linear(x, masked(layer), layer.bias))
    assert (masked(layer) == 0).sum() == layer.weight.numel() * 3 // 4


@pytest.mark.holds("foundation.3")
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_straight_through_gradient_equals_its_closed_form(seed):
    """For L = sum(G * Y), Y = X (M*W)^T + b: dL/dW = G^T X for *all* of W, dL/dX = G (M*W), dL/db = sum G."""
    layer = sparse_layer(seed=seed)
    x = torch.randn(5, 16, dtype=torch.float64, requires_grad=True)
    g = torch.randn(5, 6, dtype=torch.float64)
    layer(x).backward(g)
    torch.testing.assert_close(layer.weight.grad, g.T @ x.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x.grad, g @ masked(layer), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.bias.grad, g.sum(dim=0), rtol=1e-12, atol=1e-12)
    assert (layer.weight.grad[~nm_mask(layer.weight, PATTERN)] != 0).all()


@pytest.mark.holds("foundation.3")
def test_straight_through_gradient_of_two_layers_equals_its_closed_form():
    """A squared loss through tanh, worked out by hand: the mask of the second layer acts on the first's gradient."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8, dtype=torch.float64), nn.Tanh(), nn.Linear(8, 3, dtype=torch.float64))
    sparsify(model, PATTERN, include=["*"])
    x, y = torch.randn(7, 16, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
    (0.5 * (model(x) - y).square().sum()).backward()

    first, second = masked(model[0]), masked(model[2])
    h = torch.tanh(x @ first.T + model[0].bias.detach())
    error = h @ second.T + model[2].bias.detach() - y
    torch.testing.assert_close(model[2].weight.grad, error.T @ h, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model[0].weight.grad, ((error @ second) * (1 - h**2)).T @ x, rtol=1e-12, atol=1e-12)


def test_autocast_takes_the_mask_of_the_full_precision_weight():
    layer = sparse_layer(out_features=1, in_features=8, dtype=torch.float32, bias=False)
    with torch.no_grad():  # in bf16 all eight are 1, and a mask of that copy would keep the first two
        layer.weight.copy_(1 + torch.arange(8) * 2.0**-12)
    assert (layer.weight.bfloat16() == 1).all()
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(torch.eye(8))
    assert out.dtype == torch.bfloat16
    assert out[:, 0].tolist() == [0, 0, 0, 0, 0, 0, 1, 1]
    out.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32
    assert torch.equal(layer.weight.grad, torch.ones(1, 8))


def test_autocast_sees_weights_that_changed_inside_it():
    layer = sparse_layer(dtype=torch.float32)
    x = torch.randn(4, 16)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(3):
            expected = F.linear(x.bfloat16(), masked(layer).bfloat16(), layer.bias.detach().bfloat16())
            assert torch.equal(layer(x).detach(), expected)
            with torch.no_grad():
                layer.weight.copy_(layer.weight.roll(1, dims=1))


def test_low_precision_weights():
    layer = sparse_layer(dtype=torch.bfloat16)
    x = torch.randn(4, 16, dtype=torch.bfloat16)
    assert torch.equal(layer(x), F.linear(x, masked(layer), layer.bias))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_independent_and_equal(copier, frozen):
    model = sparse_mlp()
    if frozen:
        freeze(model)
    x = torch.randn(3, 16, dtype=torch.float64)
    before = model(x)
    twin = copier(model)
    assert isinstance(twin[0], NMLinear)
    assert twin[0].pattern == PATTERN
    assert twin[0].frozen is frozen
    assert torch.equal(twin(x), before)
    train(twin, torch.optim.SGD(twin.parameters(), lr=0.5), 3)
    assert not torch.equal(twin(x), before)
    assert torch.equal(model(x), before)
    if frozen:
        assert is_plus_zero(twin[0].weight[~twin[0].weight_mask])


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_made_while_masks_are_held_does_not_hold_them(copier):
    model = sparse_mlp()
    x = torch.randn(3, 16, dtype=torch.float64)
    with hold_masks(model):
        twin = copier(model)
        assert model[0].held_mask is not None
    assert twin[0].held_mask is None
    with torch.no_grad():
        twin[0].weight.copy_(twin[0].weight.roll(1, dims=1))
        twin[2].weight.copy_(twin[2].weight.roll(1, dims=1))
    hidden = F.gelu(F.linear(x, masked(twin[0]), twin[0].bias))
    assert torch.equal(twin(x), F.linear(hidden, masked(twin[2]), twin[2].bias))


def test_whole_module_goes_through_torch_save():
    layer = sparse_layer()
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    twin = torch.load(buffer, weights_only=False)
    x = torch.randn(3, 16, dtype=torch.float64)
    assert torch.equal(twin(x), layer(x))


def test_weight_without_gradient():
    layer = sparse_layer()
    layer.weight.requires_grad_(False)
    x = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    layer(x).sum().backward()
    assert layer.weight.grad is None
    torch.testing.assert_close(x.grad, masked(layer).sum(dim=0).expand(3, -1))
    assert layer.bias.grad is not None
    layer.bias.requires_grad_(False)
    assert not layer(x.detach()).requires_grad


def test_inference_mode_and_eval_stay_sparse():
    layer = sparse_layer().eval()
    x = torch.randn(3, 16, dtype=torch.float64)
    with torch.inference_mode():
        assert torch.equal(layer(x), F.linear(x, masked(layer), layer.bias))


ADAMW = {"fused": {"fused": True}, "foreach": {"foreach": True}, "plain": {"foreach": False, "fused": False}}


@pytest.mark.parametrize("kind", ADAMW)
def test_every_adamw_trains_like_the_recipe_written_out(kind):
    """Thirty steps against a plain twin that masks, differentiates and decays by hand; every step sees a fresh mask.

    Fused AdamW changes a weight without bumping ``Tensor._version``: a mask cached by version would go stale.
    """
    model = sparse_mlp()
    lr, decay = 0.03, 0.1
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=decay, **ADAMW[kind])
    weights = [p.detach().clone() for p in model.parameters()]  # w0 b0 w2 b2
    first, second = [torch.zeros_like(w) for w in weights], [torch.zeros_like(w) for w in weights]
    start = nm_mask(weights[0], PATTERN)
    generator = torch.Generator().manual_seed(1)
    for step in range(1, 31):
        x = torch.randn(8, 16, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

        leaves = [(w * nm_mask(w, PATTERN) if w.dim() == 2 else w.clone()).requires_grad_() for w in weights]
        hidden = F.gelu(F.linear(x, leaves[0], leaves[1]))
        grads = torch.autograd.grad(F.linear(hidden, leaves[2], leaves[3]).square().mean(), leaves)
        for w, g, m, v in zip(weights, grads, first, second, strict=True):
            m.mul_(0.9).add_(g, alpha=0.1)
            v.mul_(0.999).add_(g.square(), alpha=0.001)
            w.mul_(1 - lr * decay)
            w.sub_(lr * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8))
        for parameter, w in zip(model.parameters(), weights, strict=True):
            torch.testing.assert_close(parameter.detach(), w, rtol=1e-9, atol=1e-9)
        assert torch.equal(model[0].current_mask(), nm_mask(weights[0], PATTERN))
    assert not torch.equal(nm_mask(weights[0], PATTERN), start), "the mask never moved: the test sees nothing"


def test_the_mask_follows_a_weight_whose_version_does_not_move():
    layer = sparse_layer()
    x = torch.randn(3, 16, dtype=torch.float64)
    layer(x)
    version = layer.weight._version
    layer.weight.data.copy_(layer.weight.data.roll(3, dims=1).clone())
    assert layer.weight._version == version
    assert torch.equal(layer(x), F.linear(x, masked(layer), layer.bias))


def test_state_dict_keys_are_those_of_a_linear():
    layer = sparse_layer()
    assert list(layer.state_dict()) == ["weight", "bias"]
    with hold_masks(layer):
        assert list(layer.state_dict()) == ["weight", "bias"]
    freeze(layer)
    assert list(layer.state_dict()) == ["weight", "bias", "weight_mask"]
    assert layer.weight_mask.dtype == torch.bool
    assert "pattern=2:8, frozen" in repr(layer)


def test_latent_weights_survive_saving_and_loading():
    model, other = sparse_mlp(seed=0), sparse_mlp(seed=1)
    other.load_state_dict(model.state_dict())
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert not other[0].frozen
    dense = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 4)).double()
    dense.load_state_dict(model.state_dict())
    assert torch.equal(dense[0].weight, model[0].weight)


@pytest.mark.holds("foundation.5")
@pytest.mark.parametrize("target_frozen", [False, True])
def test_a_frozen_state_makes_the_model_frozen(target_frozen):
    model, other = sparse_mlp(seed=0), sparse_mlp(seed=1)
    freeze(model)
    if target_frozen:
        freeze(other)
    other.load_state_dict(model.state_dict())
    x = torch.randn(3, 16, dtype=torch.float64)
    assert torch.equal(other(x), model(x))
    for index in (0, 2):
        assert other[index].frozen
        assert torch.equal(other[index].weight_mask, model[index].weight_mask)
        assert other[index].weight_mask.data_ptr() != model[index].weight_mask.data_ptr()
    train(other, torch.optim.AdamW(other.parameters(), lr=0.1, weight_decay=0.5), 10)
    assert is_plus_zero(other[2].weight[~model[2].weight_mask])


@pytest.mark.holds("foundation.5")
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("too many", r"^2: wanted 2 kept of every 8, got 3 in row 3, group 1$"),
        ("too few", r"^2: wanted 2 kept of every 8, got 1 in row 3, group 1$"),
        ("stray", r"^2: wanted pruned weights to be 0, got 0\.5 in row 3, group 1$"),
        ("nan", r"^2: wanted finite weights, got nan at \[3, 9\]$"),
        ("shape", r"^2: wanted a mask of shape \[4, 24\], got \[4, 16\]$"),
    ],
)
def test_a_frozen_state_that_breaks_the_pattern_is_refused(fault, message):
    model = sparse_mlp()
    freeze(model)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    weight, mask = state["2.weight"], state["2.weight_mask"]
    group = mask[3, 8:16]
    pruned, kept = 8 + int((~group).nonzero()[0]), 8 + int(group.nonzero()[0])
    if fault == "too many":
        mask[3, pruned] = True
    elif fault == "too few":
        mask[3, kept], weight[3, kept] = False, 0.0
    elif fault == "stray":
        weight[3, pruned] = 0.5
    elif fault == "nan":
        weight[3, 9] = float("nan")
    else:
        state["2.weight_mask"] = mask[:, :16]
    with pytest.raises(ValueError, match=message):
        sparse_mlp(seed=1).load_state_dict(state)


def test_a_frozen_state_of_another_pattern_is_refused():
    model = sparse_mlp()
    freeze(model)
    torch.manual_seed(1)
    other = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 4)).double()
    sparsify(other, "1:8", include=["*"])
    with pytest.raises(ValueError, match=r"^0: wanted 1 kept of every 8, got 2 in row 0, group 0$"):
        other.load_state_dict(model.state_dict())
