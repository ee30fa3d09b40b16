from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
from nets import Block, Net, assert_untouched
from torch import nn

from sparsemae.sparsity import (
    NMLinear,
    NMPattern,
    densify,
    freeze,
    iter_sparse,
    nm_mask,
    sparsify,
)

LAYERS = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
TINY = {"img_size": 28, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
TIMM = [
    ("vit_tiny_patch16_224", {**TINY, "patch_size": 7}),
    ("deit3_small_patch16_224", {**TINY, "patch_size": 7}),
    ("deit_tiny_distilled_patch16_224", {**TINY, "patch_size": 7}),
    ("vit_small_patch14_dinov2", TINY),
    ("vit_small_patch14_reg4_dinov2", TINY),
    (
        "eva02_tiny_patch14_224",
        {**TINY, "mlp_ratio": 4},
    ),  # like BEiT, hands qkv.weight to F.linear unless told otherwise
    ("beit_base_patch16_224", {**TINY, "img_size": 32}),
    ("vit_small_patch16_dinov3", {**TINY, "patch_size": 7}),
]


def masked(layer: nn.Linear, pattern: NMPattern) -> torch.Tensor:
    return layer.weight.detach() * nm_mask(layer.weight, pattern)


def prune_by_hand(model: nn.Module, names: list[str], pattern: str) -> nn.Module:
    """The reference: an untouched dense model whose weights are masked once."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name in names:
            layer = twin.get_submodule(name)
            layer.weight.copy_(masked(layer, NMPattern.parse(pattern)))
    return twin


@pytest.mark.parametrize(("name", "args"), TIMM, ids=[name for name, _ in TIMM])
def test_timm_models_of_any_pretraining(name, args):
    torch.manual_seed(0)
    model = timm.create_model(name, **args).double().eval()
    for parameter in model.parameters():  # layer scale, zero biases and a tiny head would hide the blocks
        nn.init.normal_(parameter, std=0.2)
    keys = list(model.state_dict())
    parameters = {key: id(value) for key, value in model.named_parameters()}
    dense = copy.deepcopy(model)
    names = sparsify(model, "2:8")
    assert [f"blocks.{i}.{layer}" for i in range(2) for layer in LAYERS] == names
    assert list(model.state_dict()) == keys
    assert {key: id(value) for key, value in model.named_parameters()} == parameters
    x = torch.randn(2, 3, args["img_size"], args["img_size"], dtype=torch.float64)
    torch.testing.assert_close(model(x), prune_by_hand(dense, names, "2:8")(x), rtol=1e-9, atol=1e-9)
    for layer in LAYERS:  # each of them counts: pruning all but this one gives another result
        others = [other for other in names if not other.endswith(layer)]
        assert not torch.allclose(model(x), prune_by_hand(dense, others, "2:8")(x), rtol=1e-3, atol=1e-3), layer


def test_only_blocks_by_default():
    assert sparsify(Net(), "2:8") == ["blocks.0.fc1", "blocks.0.fc2", "blocks.1.fc1", "blocks.1.fc2"]


def test_blocks_deeper_in_the_tree_and_sequential():
    model = nn.ModuleDict({"encoder": Net(), "stages": nn.Sequential()})
    model["stages"].blocks = nn.Sequential(Block())
    names = sparsify(model, "2:8")
    assert names[0] == "encoder.blocks.0.fc1"
    assert names[-1] == "stages.blocks.0.fc2"
    assert len(names) == 6


def test_a_single_module_named_blocks_is_no_module_list():
    model = nn.ModuleDict({"blocks": nn.Linear(8, 8)})
    with pytest.raises(ValueError, match="below a module list named `blocks`"):
        sparsify(model, "2:8")


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (["head"], [], ["head"]),
        (["*.fc1"], [], ["blocks.0.fc1", "blocks.1.fc1", "decoder_blocks.0.fc1"]),
        (["blocks.*", "head"], ["*.1.*"], ["blocks.0.fc1", "blocks.0.fc2", "head"]),
        (None, ["*.fc2", "blocks.0.*"], ["blocks.1.fc1"]),
        (["decoder_blocks.?.fc[12]"], [], ["decoder_blocks.0.fc1", "decoder_blocks.0.fc2"]),
    ],
)
def test_include_and_exclude(include, exclude, expected):
    model = Net()
    assert sparsify(model, "2:8", include=include, exclude=exclude) == expected
    assert [name for name, _ in iter_sparse(model)] == expected
    for name, module in model.named_modules():
        assert (type(module) is NMLinear) == (name in expected)


def test_pattern_as_text_or_object():
    first, second = Net(), Net()
    sparsify(first, "2:8")
    sparsify(second, NMPattern(2, 8))
    assert {str(layer.pattern) for net in (first, second) for _, layer in iter_sparse(net)} == {"2:8"}
    with pytest.raises(ValueError, match='wanted "n:m"'):
        sparsify(Net(), "2-8")


def test_the_dense_pattern_changes_nothing_in_the_forward():
    model = Net()
    x = torch.randn(2, 16)
    before = model(x)
    sparsify(model, "16:16")
    assert torch.equal(model(x), before)


def test_a_second_call_adds_layers_and_leaves_the_first_ones_alone():
    model = Net()
    sparsify(model, "2:8")
    assert sparsify(model, "1:4", include=["*"]) == ["decoder_blocks.0.fc1", "decoder_blocks.0.fc2", "head"]
    assert str(model.blocks[0].fc1.pattern) == "2:8"
    with pytest.raises(ValueError, match=r"wanted at least one nn\.Linear"):
        sparsify(model, "1:4")


def test_nothing_matched():
    with pytest.raises(
        ValueError, match=r"^sparsify: wanted at least one nn.Linear below a module list named `blocks`"
    ):
        sparsify(nn.Sequential(nn.Linear(8, 8)), "2:8")
    with pytest.raises(ValueError, match=r"^sparsify: wanted at least one nn.Linear matching \['\*\.norm'\], got none"):
        sparsify(Net(), "2:8", include=["*.norm"])


@pytest.mark.parametrize("where", ["include", "exclude"])
def test_a_glob_that_matches_nothing(where):
    model = Net()
    with pytest.raises(ValueError, match=r"^sparsify: no module matches '\*\.fc3'; names look like blocks, "):
        sparsify(model, "2:8", **{where: ["*.fc1", "*.fc3"]})  # type: ignore[arg-type]
    assert_untouched(model)


def test_a_width_that_does_not_divide_converts_nothing():
    model = Net()
    model.blocks[1].fc2 = nn.Linear(36, 16)
    with pytest.raises(
        ValueError, match=r"^blocks\.1\.fc2: pattern 2:8 wants in_features divisible by 8, got in_features=36$"
    ):
        sparsify(model, "2:8")
    assert_untouched(model)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_convert_nothing(bad):
    model = Net()
    with torch.no_grad():
        model.blocks[1].fc1.weight[3, 4] = bad
    with pytest.raises(ValueError, match=rf"^blocks\.1\.fc1: wanted finite weights, got {bad} at \[3, 4\]$"):
        sparsify(model, "2:8")
    assert_untouched(model)


def test_layers_inside_a_transformer_encoder_layer_are_refused():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.ModuleDict({"blocks": nn.ModuleList([layer])})
    for include in (None, ["*linear1"]):
        with pytest.raises(
            ValueError, match=r"^blocks\.0\.\S+: wanted .* own forward runs, got one inside nn.TransformerEncoderLayer"
        ):
            sparsify(model, "2:8", include=include)
    with pytest.raises(ValueError, match=r"^linear1: .* inside nn.TransformerEncoderLayer"):
        sparsify(layer, "2:8", include=["linear1"])
    assert_untouched(model)


def test_layers_inside_a_multihead_attention_are_refused():
    block = nn.ModuleDict({"attn": nn.MultiheadAttention(16, 2), "fc": nn.Linear(16, 16)})
    model = nn.ModuleDict({"blocks": nn.ModuleList([block])})
    with pytest.raises(ValueError, match=r"^blocks\.0\.attn\.out_proj: .* inside nn.MultiheadAttention, .*exclude it"):
        sparsify(model, "2:8")
    assert_untouched(model)
    assert sparsify(model, "2:8", exclude=["*.attn.*"]) == ["blocks.0.fc"]


@pytest.mark.holds("right.1")
def test_item_15_a_chosen_subclass_of_linear_is_refused():
    class Special(nn.Linear):
        pass

    model = nn.Sequential(Special(8, 8), nn.Linear(8, 8))
    with pytest.raises(ValueError, match=r"^0: wanted a plain nn\.Linear, got a \S+Special, .*exclude it"):
        sparsify(model, "2:8", include=["*"])
    assert_untouched(model)
    assert sparsify(model, "2:8", include=["*"], exclude=["0"]) == ["1"]
    assert type(model[0]) is Special
    assert sparsify(nn.Sequential(Special(8, 8), nn.Linear(8, 8)), "2:8", include=["1"]) == ["1"]


def test_shared_modules_and_tied_weights_stay_shared():
    shared = nn.Linear(16, 16)
    tied = nn.Linear(16, 16)
    tied.weight = shared.weight
    model = nn.Sequential(shared, nn.Tanh(), shared, tied).double()
    dense = copy.deepcopy(model)
    assert sparsify(model, "2:8", include=["*"]) == ["0", "3"]
    assert model[0] is model[2]
    assert model[0].weight is model[3].weight
    assert [name for name, _ in iter_sparse(model)] == ["0", "3"]
    x = torch.randn(4, 16, dtype=torch.float64)
    assert torch.equal(model(x), prune_by_hand(dense, ["0"], "2:8")(x))
    freeze(model)
    before = model(x)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(x).sum().backward()
    optimizer.step()
    assert not torch.equal(model(x), before)
    assert torch.equal(model[0].weight_mask, model[3].weight_mask)
    assert (model[0].weight[~model[0].weight_mask] == 0).all()


def test_hooks_dtype_mode_and_other_members_are_kept():
    model = Net().to(torch.bfloat16).eval()
    layer = model.blocks[0].fc1
    calls: list[object] = []
    layer.register_forward_hook(lambda module, args, output: calls.append(type(module)))
    layer.register_forward_pre_hook(lambda module, args: calls.append("pre"))
    layer.weight.requires_grad_(False)
    layer.register_buffer("extra", torch.ones(1))
    layer.note = "mine"
    model.blocks[1].train()
    sparsify(model, "2:8")
    assert model.blocks[0].fc1 is layer
    model(torch.randn(2, 16, dtype=torch.bfloat16))
    assert calls == ["pre", NMLinear]
    assert layer.weight.dtype == torch.bfloat16
    assert not layer.weight.requires_grad
    assert layer.note == "mine"
    assert "extra" in layer.state_dict()
    assert not layer.training
    assert model.blocks[1].fc1.training
    assert model.double().blocks[0].fc1(torch.randn(1, 16, dtype=torch.float64)).dtype == torch.float64


def test_meta_models_can_be_sparsified():
    with torch.device("meta"):
        model = Net()
    assert len(sparsify(model, "2:8")) == 4
    assert model.blocks[0].fc1.weight.is_meta


def test_a_criterion_goes_with_the_layer_through_copies_and_leaves_with_its_mask():
    model = torch.nn.Sequential(torch.nn.Linear(16, 4))
    wanted = nm_mask(model[0].weight, NMPattern(2, 8), criterion=torch.neg)
    with pytest.raises(ValueError, match=r"^0: criterion: wanted finite scores"):
        sparsify(model, "2:8", include=["0"], criterion=torch.sqrt)
    assert type(model[0]) is torch.nn.Linear
    sparsify(model, "2:8", include=["0"], criterion=torch.neg)
    for layer in (model[0], copy.deepcopy(model)[0], pickle.loads(pickle.dumps(model))[0]):
        assert torch.equal(layer.current_mask(), wanted)
    freeze(model)
    assert torch.equal(model[0].weight_mask, wanted)
    assert densify(model) == ["0"]
    assert not hasattr(model[0], "criterion")
