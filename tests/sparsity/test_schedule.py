import pytest
import torch
from torch import nn

from sparsemae.sparsity import MaskSchedule, NMPattern, iter_sparse, nm_mask, shrink_pruned, sparsify, zero_pruned
from sparsemae.sparsity.schedule import pattern_at


def sparse_model(pattern: str = "2:32") -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 64), nn.Linear(64, 4))
    sparsify(model, pattern, include=["0", "2"])
    return model


def test_gradual_patterns_halve_and_end_at_the_pattern() -> None:
    final = NMPattern(2, 32)
    seen = [str(pattern_at(final, epoch / 10, 1.0)) for epoch in range(10)]
    assert list(dict.fromkeys(seen)) == ["32:32", "16:32", "8:32", "4:32"]
    assert seen == sorted(seen, key=lambda text: -int(text.split(":")[0]))
    assert pattern_at(final, 1.0, 1.0) == pattern_at(final, 0.0, 0.0) == final
    assert pattern_at(NMPattern(32, 32), 0.0, 1.0) == NMPattern(32, 32)


def test_a_gradual_schedule_sets_what_the_forward_keeps() -> None:
    model = sparse_model()
    masks = MaskSchedule(model, gradual_epochs=1.0)
    layer = model[0]
    for epoch, kept in [(0.0, 32), (0.3, 16), (0.9, 4), (1.0, 2), (5.0, 2)]:
        with masks.step(epoch) as sparse:
            assert sparse
            assert (layer.current_mask().view(-1, 32).sum(1) == kept).all()
    with masks.step(0.0):
        pass
    masks.finish()
    assert layer.pattern == NMPattern(2, 32)


def test_freezing_before_the_pattern_is_reached_is_refused() -> None:
    with pytest.raises(ValueError, match=r"freeze_epoch: wanted at least gradual_epochs=2, .* got 1"):
        MaskSchedule(sparse_model(), gradual_epochs=2.0, freeze_epoch=1.0)


@pytest.mark.holds("better.4")
def test_pruned_weights_fade_linearly_and_have_the_whole_gradient() -> None:
    model, x = sparse_model(), torch.randn(3, 64)
    masks, layer = MaskSchedule(model, dense_epochs=1.0, decay_epochs=4.0), model[0]
    mask = nm_mask(layer.weight, NMPattern(2, 32))
    for epoch, scale in [(1.0, 1.0), (2.0, 0.75), (4.5, 0.125), (5.0, 0.0), (9.0, 0.0)]:
        with masks.step(epoch) as sparse:
            assert sparse
            output = layer(x)
        seen = torch.where(mask, layer.weight, scale * layer.weight).detach().requires_grad_()
        wanted = nn.functional.linear(x, seen, layer.bias)
        torch.testing.assert_close(output, wanted)
        (own,), (straight_through,) = (
            torch.autograd.grad(y.square().sum(), weight) for y, weight in ((output, layer.weight), (wanted, seen))
        )
        torch.testing.assert_close(own, straight_through)
        assert torch.equal(layer(x), nn.functional.linear(x, layer.weight * mask, layer.bias))  # outside a step


def test_dense_epochs_use_the_full_weights() -> None:
    model = sparse_model()
    x = torch.randn(3, 64)
    masks = MaskSchedule(model, dense_epochs=2.0)
    with masks.step(1.9) as sparse:
        assert not sparse
        assert torch.equal(model[0](x), nn.functional.linear(x, model[0].weight, model[0].bias))
    with masks.step(2.0) as sparse:
        assert sparse
        kept = model[0].weight * nm_mask(model[0].weight, NMPattern(2, 32))
        assert torch.equal(model[0](x), nn.functional.linear(x, kept, model[0].bias))


def test_a_fixed_mask_outlives_changes_of_the_weights_and_travels_as_bits() -> None:
    model = sparse_model()
    masks = MaskSchedule(model, freeze_epoch=1.0)
    with masks.step(0.5):
        pass
    assert masks.state_dict()["masks"] == {}
    with masks.step(1.0):
        before = model[0].current_mask().clone()
    with torch.no_grad():
        model[0].weight.normal_()
    with masks.step(3.0):
        assert torch.equal(model[0].current_mask(), before)
    state = masks.state_dict()
    assert state["masks"]["0"].dtype == torch.uint8
    assert state["masks"]["0"].numel() == model[0].weight.numel() // 8
    other = sparse_model()
    again = MaskSchedule(other, freeze_epoch=1.0)
    again.load_state_dict(state)
    with again.step(9.0):
        assert torch.equal(other[0].current_mask(), before)


@pytest.mark.parametrize("strength", [0.5, 2.0])
def test_the_decoupled_term_is_a_shrink_at_each_groups_rate(strength: float) -> None:
    model = sparse_model()
    groups = [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[2].parameters(), "lr": 0.01}]
    optimizer = torch.optim.SGD(groups)
    before = {name: layer.weight.clone() for name, layer in iter_sparse(model)}
    shrink_pruned(optimizer, model, strength)
    for (name, layer), rate in zip(iter_sparse(model), (0.1, 0.01), strict=True):
        mask = nm_mask(before[name], NMPattern(2, 32))
        torch.testing.assert_close(layer.weight[~mask], before[name][~mask] * (1 - rate * strength))
        assert torch.equal(layer.weight[mask], before[name][mask])


def test_zero_pruned_leaves_the_sparse_network_alone() -> None:
    model = sparse_model()
    x = torch.randn(2, 64)
    wanted = model(x)
    zero_pruned(model)
    assert (model[0].weight.view(-1, 32) != 0).sum(1).eq(2).all()
    assert torch.equal(model(x), wanted)
