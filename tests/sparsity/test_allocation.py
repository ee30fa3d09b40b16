"""A pattern for each layer at one total: against brute force, and through a run to a packed file."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Figure, tiny
from torch import nn

import sparsemae
from sparsemae.cli import main
from sparsemae.models.weights import card_of, read_metadata, read_weights
from sparsemae.sparsity import MaskSchedule, NMPattern, iter_sparse, nm_mask, sparsify
from sparsemae.sparsity.allocation import allocate, knapsack
from sparsemae.tasks.loading import load_model


@pytest.mark.holds("better.4")
def test_the_knapsack_is_brute_force(figure: Figure) -> None:
    generator, cases = np.random.default_rng(0), 40
    for _ in range(cases):
        items = int(generator.integers(1, 6))
        options = [
            [(int(cost), float(generator.integers(0, 9))) for cost in generator.integers(1, 7, 4)] for _ in range(items)
        ]
        sums: dict[int, float] = {}
        for taken in product(range(4), repeat=items):
            chosen = [options[i][index] for i, index in enumerate(taken)]
            cost = sum(cost for cost, _ in chosen)
            sums[cost] = max(sum(value for _, value in chosen), sums.get(cost, -1.0))
        for budget in range(1, 31):
            if budget not in sums:
                with pytest.raises(ValueError, match=f"cost {budget}, got none"):
                    knapsack(options, budget)
                continue
            chosen = [options[i][index] for i, index in enumerate(knapsack(options, budget))]
            assert sum(cost for cost, _ in chosen) == budget
            assert sum(value for _, value in chosen) == sums[budget]
    figure(f"{cases} sets of up to 5 items of 4 choices, every budget")


@pytest.mark.holds("better.4")
@pytest.mark.parametrize("pattern", ["2:32", "4:32", "2:4"])
def test_patterns_keep_the_most_that_masks_of_one_total_can(pattern: str) -> None:
    generator, wanted = torch.Generator().manual_seed(1), NMPattern.parse(pattern)
    shapes, sizes = [(24, 32), (8, 32), (32, 32), (8, 128)], [0.1, 3.0, 1.0, 0.5]
    layers = zip(shapes, sizes, strict=True)
    weights = {str(i): size * torch.randn(shape, generator=generator) for i, (shape, size) in enumerate(layers)}
    kept = [n for n in (wanted.n // 2, wanted.n, 2 * wanted.n, 4 * wanted.n) if n <= wanted.m]

    def total(chosen: list[NMPattern]) -> float:
        return sum(w.numel() * p.n / p.m for w, p in zip(weights.values(), chosen, strict=True))

    def squares(chosen: list[NMPattern]) -> float:
        return sum(sums[name, pattern] for name, pattern in zip(weights, chosen, strict=True))

    patterns = [NMPattern(n, wanted.m) for n in kept]
    sums = {(name, p): float(w.double()[nm_mask(w, p)].square().sum()) for name, w in weights.items() for p in patterns}
    possible = [list(taken) for taken in product(patterns, repeat=4)]
    best = max(squares(chosen) for chosen in possible if total(chosen) == total([wanted] * 4))
    found = list(allocate(weights, wanted).values())
    assert total(found) == total([wanted] * 4)
    assert squares(found) == pytest.approx(best, rel=1e-12)
    assert best > squares([wanted] * 4)


def three_layers() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(64, 8) for _ in range(3)))
    sparsify(net, "2:32", include=["*"])
    return net


def test_a_schedule_chooses_patterns_once_and_they_are_state() -> None:
    model = three_layers()
    masks = MaskSchedule(model, allocation_epoch=1.0, gradual_epochs=2.0)
    with masks.step(0.9):
        pass
    assert masks.state_dict() == {"masks": {}, "patterns": {}}
    with torch.no_grad():
        model[1].weight *= 10
    with masks.step(1.0):  # half-way from 32:32
        assert [layer.pattern.n for _, layer in iter_sparse(model)] == [8, 16, 8]
    with torch.no_grad():
        model[0].weight *= 1000
    with masks.step(3.0):
        kept = [layer.current_mask().view(-1, 32).sum(dim=1).unique().tolist() for _, layer in iter_sparse(model)]
    assert kept == [[1], [4], [1]]
    twin = masks.sync_to(three_layers())
    other = three_layers()
    again = MaskSchedule(other, allocation_epoch=1.0)
    again.load_state_dict(masks.state_dict())
    assert again.patterns == masks.patterns == {"0": "1:32", "1": "4:32", "2": "1:32"}
    for net in (twin, other):  # before any step, as a complete run is evaluated
        assert [layer.pattern.n for _, layer in iter_sparse(net)] == [1, 4, 1]


def test_what_cannot_be_allocated_is_refused_at_the_start() -> None:
    model = three_layers()
    for _, layer in iter_sparse(model):
        layer.pattern = NMPattern(3, 32)
    with pytest.raises(ValueError, match="wanted a pattern whose n can be halved, got 3:32"):
        MaskSchedule(model, allocation_epoch=5.0)
    with pytest.raises(ValueError, match="freeze_epoch: wanted at least allocation_epoch=2, got 1"):
        MaskSchedule(three_layers(), freeze_epoch=1.0, allocation_epoch=2.0)


@pytest.mark.slow
@pytest.mark.holds("better.4")
def test_layers_of_different_patterns_reach_the_packed_file(tmp_path: Path, runs: Path, figure: Figure) -> None:
    """Checkpoint, frozen file and packed file say the same patterns, of the uniform total; all compute the same."""
    run, options = tmp_path / "run", ["--init", str(runs / "pretrain"), "--sparse.allocation", "magnitude"]
    main(tiny("finetune", run, *options, "--trainer.epochs", "2", "--sparse.allocation_epoch", "0.5"))
    _, card = load_model(run)
    patterns = {name: NMPattern.parse(text) for name, text in card.patterns.items()}
    state, _ = read_weights(run)
    kept = {name: int(state[f"{name}.weight_mask"].sum()) for name in patterns}
    assert {name: state[f"{name}.weight"].numel() * p.n // p.m for name, p in patterns.items()} == kept
    assert sum(kept.values()) == sum(state[f"{name}.weight"].numel() for name in patterns) * 2 // 32
    assert len(set(patterns.values())) > 1
    for file in (run / "checkpoints").glob("step-*/model.safetensors"):
        assert card_of(read_metadata(file), file).patterns == card.patterns
    main(["pack", str(run), str(tmp_path / "packed.safetensors"), "--dtype", "fp32"])
    packed = sparsemae.load(tmp_path / "packed.safetensors")
    assert packed.card.patterns == card.patterns
    images = np.random.default_rng(0).standard_normal((2, 3, 28, 28), dtype=np.float32)
    np.testing.assert_allclose(packed(images), sparsemae.load(run)(images), atol=1e-4)
    figure(", ".join(sorted({str(pattern) for pattern in patterns.values()})))
