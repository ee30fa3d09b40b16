from __future__ import annotations

import io

import pytest
import timm
import torch
from torch import nn

from sparsemae.sparsity import Topology, freeze, hold_masks, nm_mask, sparsify, summarize


def two_layers() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(4, 2, bias=False), nn.Linear(8, 1, bias=False))
    sparsify(model, "1:4", include=["*"])
    set_kept(model, [0, 0], [0, 0])
    return model


def set_kept(model: nn.Sequential, first: list[int], second: list[int]) -> None:
    """Give each group of four (two per layer) its one kept position."""
    for layer, kept in ((model[0], first), (model[1], second)):
        groups = torch.full((2, 4), 0.1)
        groups[range(2), kept] = 1.0
        layer.weight.data.copy_(groups.view_as(layer.weight))


def test_flip_rate_and_sad_by_hand():
    """A group whose kept position moves changes two mask entries; each layer has 8 entries."""
    model = two_layers()
    topology = Topology(model)
    steps = [
        # kept positions           flips since last look   entries that differ from the start
        (([0, 0], [0, 0]), (0, 0), (0, 0)),
        (([1, 0], [0, 0]), (2, 0), (2, 0)),
        (([2, 3], [1, 0]), (4, 2), (4, 2)),
        (([2, 3], [1, 0]), (0, 0), (4, 2)),
        (([0, 3], [0, 1]), (2, 4), (2, 2)),
        (([0, 0], [0, 0]), (2, 2), (0, 0)),
    ]
    for kept, flips, sad in steps:
        set_kept(model, *kept)
        report = topology.update()
        assert list(report.layers) == ["0", "1"]
        assert [movement.flip_rate for movement in report.layers.values()] == [flip / 8 for flip in flips]
        assert [movement.sad for movement in report.layers.values()] == list(sad)
        assert report.total.flip_rate == sum(flips) / 16
        assert report.total.sad == sum(sad)


def test_total_flip_rate_weighs_layers_by_their_size():
    model = nn.Sequential(nn.Linear(4, 1), nn.Linear(4, 15))
    sparsify(model, "1:4", include=["*"])
    topology = Topology(model)
    with torch.no_grad():
        model[0].weight.copy_(model[0].weight.roll(1, dims=1))
    report = topology.update()
    assert report.layers["0"].flip_rate == 0.5
    assert report.total.flip_rate == 2 / 64


def test_against_a_hand_count_in_training():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 16), nn.GELU(), nn.Linear(16, 32))
    sparsify(model, "2:16", include=["*"])
    optimizer = torch.optim.SGD(model.parameters(), lr=3.0)
    masks = [[nm_mask(model[i].weight, model[i].pattern) for i in (0, 2)]]
    topology = Topology(model)
    for _ in range(4):
        x = torch.randn(8, 32)
        (model(x) - x).square().mean().backward()
        optimizer.step()
        masks.append([nm_mask(model[i].weight, model[i].pattern) for i in (0, 2)])
        report = topology.update()
        for name, now, last, start in zip(("0", "2"), *(masks[i] for i in (-1, -2, 0)), strict=True):
            assert report.layers[name].flip_rate == pytest.approx((now != last).double().mean().item())
            assert report.layers[name].sad == (now != start).sum()
    assert report.total.sad > 0


def test_state_round_trip_continues_as_if_uninterrupted():
    model = two_layers()
    topology = Topology(model)
    set_kept(model, [1, 0], [0, 0])
    topology.update()
    buffer = io.BytesIO()
    torch.save(topology.state_dict(), buffer)
    buffer.seek(0)

    set_kept(model, [1, 2], [3, 0])
    resumed = Topology(model)  # built from the weights of now, as a resume does
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    expected = topology.update()
    assert resumed.update() == expected
    assert expected.total.sad == 6
    assert expected.total.flip_rate == 4 / 16


def test_saved_state_is_not_changed_by_later_looks():
    model = two_layers()
    topology = Topology(model)
    state = topology.state_dict()
    set_kept(model, [1, 1], [1, 1])
    topology.update()
    assert torch.equal(state["last"]["0"], state["reference"]["0"])


def test_frozen_and_held_masks_do_not_move():
    model = two_layers()
    topology = Topology(model)
    with hold_masks(model):
        set_kept(model, [1, 1], [1, 1])
        assert topology.update().total.sad == 0
    assert topology.update().total.sad == 8
    freeze(model)
    assert topology.update().total == type(topology.update().total)(0.0, 8)


def test_a_dense_model_has_no_topology():
    with pytest.raises(ValueError, match=r"^Topology: wanted a model with sparse layers, got none"):
        Topology(nn.Linear(4, 4))


# --- summary -------------------------------------------------------------------------------------------------------


def vit_base(num_classes: int = 0) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model("vit_base_patch16_224", num_classes=num_classes)


@pytest.mark.parametrize(
    ("pattern", "kept", "encoder"), [("2:32", 5_308_416, 6_172_416), ("4:32", 10_616_832, 11_480_832)]
)
def test_summary_reproduces_the_arithmetic_of_the_method(pattern, kept, encoder):
    model = vit_base()
    sparsify(model, pattern)
    summary = summarize(model)
    assert len(summary.sparse) == 48
    assert summary.sparse_total == 84_934_656
    assert summary.kept == kept
    assert summary.kept + summary.dense_total == encoder
    assert summary.sparse_total + summary.dense_total == 85_798_656
    assert summary.sparse_total + summary.dense_total == sum(p.numel() for p in model.parameters())

    lines = str(summary).splitlines()
    assert lines[0].split() == ["layer", "pattern", "kept", "total"]
    assert lines[1].split() == ["blocks.0.attn.qkv", pattern, f"{kept * 3 // 144:,}", "1,769,472"]
    assert f"sparse weights {kept:,} 84,934,656" in [" ".join(line.split()) for line in lines]
    assert lines[-1].split() == ["all", "parameters", f"{encoder:,}", "85,798,656"]
    assert len({len(line) for line in lines}) == 1, "columns are aligned"


def test_summary_of_a_classifier_has_the_head():
    model = vit_base(num_classes=1000)
    sparsify(model, "2:32")
    summary = summarize(model)
    assert dict(summary.dense)["head"] == 769_000
    assert summary.kept + summary.dense_total == 6_172_416 + 769_000
    assert "head dense 769,000 769,000" in [" ".join(line.split()) for line in str(summary).splitlines()]


def test_summary_of_a_dense_model():
    summary = summarize(vit_base())
    assert summary.sparse == []
    assert (summary.kept, summary.sparse_total, summary.dense_total) == (0, 0, 85_798_656)
    assert "85,798,656" in str(summary)


def test_summary_counts_shared_parameters_once_and_frozen_layers_alike():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8))
    model[1].weight = model[0].weight
    sparsify(model, "2:8", include=["0", "1"])
    before = summarize(model)
    assert before.sparse == [("0", "2:8", 16, 64)]
    assert before.dense_total == 8 + 8 + 16
    freeze(model)
    assert summarize(model) == before
    assert (model[0].weight != 0).sum() == before.kept


def test_summary_says_what_stays_dense():
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)]), "norm": nn.LayerNorm(8)})
    model.register_parameter("token", nn.Parameter(torch.zeros(3)))
    sparsify(model, "2:8")
    assert summarize(model).dense == [("token", 3), ("blocks.*", 16), ("norm", 16)]
