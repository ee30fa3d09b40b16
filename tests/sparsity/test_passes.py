"""The passes over the weights on a CPU against torch's own operations, bit for bit."""

import pytest
import torch
from torch import Tensor, nn

from sparsemae.sparsity import MaskSchedule, NMPattern, freeze, iter_sparse, passes, sparsify
from sparsemae.sparsity.linear import _StraightThrough
from sparsemae.sparsity.pattern import select_mask


def by_sort(weight: Tensor, pattern: NMPattern) -> Tensor:
    """Of each group the n first in a stable sort by magnitude."""
    groups = weight.abs().reshape(-1, pattern.m)
    order = groups.sort(dim=1, descending=True, stable=True).indices
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, order[:, : pattern.n], True).view(weight.shape)


def weights(rows: int, columns: int) -> Tensor:
    """Among them equal ones, both zeros, denormals, the largest and the smallest."""
    torch.manual_seed(0)
    weight = torch.randn(rows, columns)
    edges = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-40, 3e38, -3e38, 1.5, -1.5, 2**-126])
    weight[: rows // 2] = edges[torch.randint(len(edges), (rows // 2, columns))]
    weight[0], weight[1] = 0.0, -0.0
    return weight


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("pattern", ["1:2", "2:4", "1:32", "2:32", "4:32", "8:32", "3:8", "5:24", "9:32", "4:4"])
def test_masks_are_those_of_a_sort(pattern: str) -> None:
    parsed = NMPattern.parse(pattern)
    weight = weights(700, 96)
    assert passes.fits(weight)
    assert torch.equal(select_mask(weight, parsed), by_sort(weight, parsed))
    large = torch.randn(512, 96 * 8)  # in parts
    assert torch.equal(select_mask(large, parsed), by_sort(large, parsed))


@pytest.mark.usefixtures("threads")
def test_the_kept_weights_in_bf16_are_torchs() -> None:
    weight = weights(700, 96)
    mask = select_mask(weight, NMPattern(2, 32))
    wanted = torch.where(mask, weight, 0.0).bfloat16()
    got = passes.kept_bf16(weight, mask)
    assert torch.equal(got.view(torch.int16), wanted.view(torch.int16))
    for pattern in (NMPattern(2, 32), NMPattern(4, 32), NMPattern(3, 8), NMPattern(5, 24)):
        mask, kept = passes.select_kept_bf16(weight, pattern.n, pattern.m)
        assert torch.equal(mask, by_sort(weight, pattern))
        assert torch.equal(kept.view(torch.int16), torch.where(mask, weight, 0.0).bfloat16().view(torch.int16))


def test_held_in_bf16_two_forwards_are_what_they_are_without() -> None:
    found = []
    for in_bf16 in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 32))
        sparsify(model, "2:32", include=["*"])
        masks = MaskSchedule(model, in_bf16=in_bf16)
        with masks.step(0.0):
            assert all((layer.held_kept is not None) == in_bf16 for _, layer in iter_sparse(model))
            for images in torch.randn(2, 5, 64):
                with torch.autocast("cpu", torch.bfloat16):
                    model(images).float().square().sum().backward()
            freeze(model)  # which holds nothing any more
            assert all(layer.held_kept is None for _, layer in iter_sparse(model))
        assert all(layer.held_kept is None for _, layer in iter_sparse(model))
        found.append([parameter.grad for parameter in model.parameters()])
    assert all(map(torch.equal, *found))


@pytest.mark.usefixtures("threads")
def test_the_term_is_torchs_with_its_product_rounded() -> None:
    weight, gradient = weights(700, 96), torch.randn(700, 96)
    mask = select_mask(weight, NMPattern(2, 32))
    wanted = gradient + torch.where(mask, 0.0, weight * 2e-4)
    passes.pull_pruned(gradient, weight, mask, 2e-4)
    torch.testing.assert_close(gradient, wanted, rtol=0, atol=0)


def test_what_does_not_fit_takes_the_other_way() -> None:
    weight = weights(8, 64)
    doubles = weight.double()
    assert not passes.fits(doubles)
    assert not passes.fits(weight.t())
    assert torch.equal(select_mask(doubles, NMPattern(2, 32)), select_mask(weight, NMPattern(2, 32)))


@pytest.mark.parametrize("in_bf16", [True, False])
def test_forward_and_gradient_are_those_of_torchs_operations(in_bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def layer() -> tuple[Tensor, Tensor]:
        weight = weights(32, 64).clamp(-2, 2).requires_grad_()
        mask = by_sort(weight.detach(), NMPattern(2, 32))
        with torch.autocast("cpu", torch.bfloat16, enabled=in_bf16):
            out = torch.nn.functional.linear(torch.ones(3, 64), _StraightThrough.apply(weight, mask, None))
        out.float().pow(2).sum().backward()
        assert weight.grad is not None
        return out, weight.grad

    ours = layer()
    monkeypatch.setattr(passes, "fits", lambda *_: False)
    for got, wanted in zip(ours, layer(), strict=True):
        assert got.dtype is wanted.dtype
        assert torch.equal(got, wanted)
