from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from small import CARD, ENCODER_KEYS, MAE_KEYS, leaves, make_classifier, make_mae, make_vit, randomized
from torch import nn

from sparsemae.card import ModelCard
from sparsemae.models import load_weights
from sparsemae.models.weights import find_weights, public_state, read_weights, save_model


def to_hf_names(state: dict[str, torch.Tensor], style: str) -> dict[str, torch.Tensor]:
    """A state of MAE's names under transformers': the published old names, or those in memory since version 5.

    ``saved by 5`` is what its `save_pretrained` writes: the old names, but decoder layers with a name of their own.
    """
    encoder_block = "vit.layers" if style == "new" else "vit.encoder.layer"
    decoder_block = "decoder.decoder_encoder.layer" if style == "saved by 5" else "decoder.decoder_layers"
    fixed = {"cls_token": "vit.embeddings.cls_token", "pos_embed": "vit.embeddings.position_embeddings",
             "patch_embed.proj": "vit.embeddings.patch_embeddings.projection", "norm": "vit.layernorm"}  # fmt: skip
    old = {"attn.proj": "attention.output.dense", "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}
    new = {"attn.proj": "attention.o_proj", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    inner = {"norm1": "layernorm_before", "norm2": "layernorm_after", **(new if style == "new" else old)}
    query = ["q_proj", "k_proj", "v_proj"] if style == "new" else [f"attention.{x}" for x in ("query", "key", "value")]
    result = {}
    for key, value in state.items():
        name, _, leaf = key.rpartition(".")
        if name.startswith(("blocks.", "decoder_blocks.")):
            side, index, member = name.split(".", 2)
            stem = f"{encoder_block if side == 'blocks' else decoder_block}.{index}"
            if member == "attn.qkv":
                for part, chunk in zip(query, value.chunk(3), strict=True):
                    result[f"{stem}.attention.{part}.{leaf}"] = chunk.clone()
            else:
                result[f"{stem}.{inner[member]}.{leaf}"] = value
        elif key in fixed:
            result[fixed[key]] = value
        elif name in fixed:
            result[f"{fixed[name]}.{leaf}"] = value
        else:
            result[f"decoder.{key}"] = value
    return result


def assert_same(model: nn.Module, state: dict[str, torch.Tensor], keys: list[str]) -> None:
    own = public_state(model)
    for key in keys:
        assert torch.equal(own[key], state[key]), key


@pytest.fixture
def mae_file(tmp_path):
    path = tmp_path / "model.safetensors"
    save_model(path, make_mae(), CARD)
    return path


# --- our own files -------------------------------------------------------------------------------------------------


def test_a_file_has_the_keys_of_a_published_full_checkpoint(mae_file):
    with safe_open(mae_file, framework="pt") as file:
        assert sorted(file.keys()) == MAE_KEYS
        assert json.loads(file.metadata()["sparsemae"]) == json.loads(json.dumps(CARD.to_dict()))
        assert list(file.get_tensor("blocks.0.attn.qkv.weight").shape) == [96, 32]
        assert list(file.get_tensor("decoder_pos_embed").shape) == [1, 17, 16]
    assert [path.name for path in mae_file.parent.iterdir()] == [mae_file.name], "no temporary file is left"


def test_save_and_read_are_inverse(tmp_path):
    model = make_mae()
    card = replace(CARD, settings={"nested": {"list": [1, 2.5, None, "é"]}})
    save_model(tmp_path / "a.safetensors", model, card)
    state, read = read_weights(tmp_path / "a.safetensors")
    assert ModelCard.from_dict(read) == card
    assert state.keys() == public_state(model).keys()
    assert_same(model, state, MAE_KEYS)


def test_saving_replaces_a_file_and_takes_any_layout_and_tied_weights(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    model[0].bias = nn.Parameter(torch.arange(8.0)[::2])
    path = tmp_path / "model.safetensors"
    path.write_text("old")
    save_model(path, model, CARD)
    state, _ = read_weights(path)
    assert torch.equal(state["0.weight"], state["1.weight"])
    assert state["0.bias"].tolist() == [0, 2, 4, 6]
    assert model[1].weight is model[0].weight


@pytest.mark.parametrize("kind", ["file", "text path", "state dict"])
def test_our_own_file_into_a_fresh_model(mae_file, kind):
    source = {"file": mae_file, "text path": str(mae_file), "state dict": public_state(make_mae())}[kind]
    model = make_mae(seed=1)
    loaded = load_weights(model, source, strict=True)
    assert sorted(loaded.used) == MAE_KEYS
    assert loaded.missing == loaded.unexpected == []
    assert_same(model, public_state(make_mae()), MAE_KEYS)


def test_a_state_dict_as_it_is_in_memory():
    model = make_mae(seed=1)
    loaded = load_weights(model, make_mae().state_dict(), strict=True)
    assert sorted(loaded.used) == MAE_KEYS
    assert_same(model, public_state(make_mae()), MAE_KEYS)
    with pytest.raises(ValueError, match=r"another architecture: got \S+ \[1, 1, 32\] for \[1, 1, 48\]"):
        load_weights(make_mae(embed_dim=48), make_mae().encoder.state_dict(prefix="encoder."))


def test_an_autoencoder_into_a_classifier(mae_file):
    """The decoder and the encoder's norm have no place there; fc_norm and the head stay at their initial values."""
    model = make_classifier()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    loaded = load_weights(model, mae_file)
    assert sorted(loaded.used) == sorted(ENCODER_KEYS)
    assert sorted(loaded.missing) == sorted(leaves(["fc_norm", "head"]))
    assert sorted(loaded.unexpected) == sorted(set(MAE_KEYS) - set(ENCODER_KEYS))
    assert_same(model, public_state(make_mae()), ENCODER_KEYS)
    for key in loaded.missing:
        assert torch.equal(model.state_dict()[key], before[key])
    assert str(loaded).startswith("28 tensors used, 4 missing (fc_norm.weight, fc_norm.bias, head.weight, ...), ")


def test_a_classifier_keeps_timms_names(tmp_path):
    model = make_classifier()
    save_model(tmp_path / "c.safetensors", model, CARD)
    state, _ = read_weights(tmp_path / "c.safetensors")
    assert state.keys() == model.state_dict().keys()
    plain = make_classifier(seed=2)
    plain.load_state_dict(state)


# --- other people's files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapper", ["model", "state_dict", None])
def test_a_torch_file_like_maes(tmp_path, wrapper):
    state = public_state(make_mae())
    torch.save({wrapper: state, "epoch": 800} if wrapper else dict(state), tmp_path / "mae_full.pth")
    model = make_mae(seed=1)
    assert sorted(load_weights(model, tmp_path / "mae_full.pth", strict=True).used) == MAE_KEYS
    assert_same(model, state, MAE_KEYS)


def test_the_encoder_alone_as_mae_publishes_it(tmp_path):
    state = {key: v for key, v in public_state(make_mae()).items() if key in ENCODER_KEYS or key.startswith("norm.")}
    torch.save({"model": state}, tmp_path / "mae_pretrain.pth")
    model = make_mae(seed=1)
    loaded = load_weights(model, tmp_path / "mae_pretrain.pth")
    assert sorted(loaded.used) == sorted(state)
    assert sorted(loaded.missing) == sorted(set(MAE_KEYS) - set(state))
    assert loaded.unexpected == []
    assert_same(model, state, list(state))


@pytest.mark.parametrize("style", ["new", "old", "saved by 5"])
def test_transformers_names(tmp_path, style):
    state = public_state(make_mae())
    hf = to_hf_names(state, style)
    example = {
        "new": "vit.layers.0.attention.q_proj.weight",
        "old": "vit.encoder.layer.0.attention.attention.query.weight",
        "saved by 5": "decoder.decoder_encoder.layer.0.attention.output.dense.bias",
    }[style]
    assert example in hf
    save_file(hf, tmp_path / "hf.safetensors")
    model = make_mae(seed=1)
    loaded = load_weights(model, tmp_path / "hf.safetensors", strict=True)
    assert sorted(loaded.used) == MAE_KEYS
    assert_same(model, state, MAE_KEYS)


@pytest.mark.parametrize("style", ["new", "old"])
def test_transformers_bare_encoder_names(style):
    """ViTMAEModel alone has no ``vit.`` in front."""
    state = {k: v for k, v in public_state(make_mae()).items() if k in ENCODER_KEYS or k.startswith("norm.")}
    hf = {key.removeprefix("vit."): value for key, value in to_hf_names(state, style).items()}
    model = make_mae(seed=1)
    loaded = load_weights(model, hf)
    assert sorted(loaded.used) == sorted(state)
    assert_same(model, state, list(state))


@pytest.mark.parametrize("written", [False, True], ids=["in memory", "save_pretrained"])
def test_transformers_own_model(tmp_path, written):
    """The names above are the real ones, in memory and in the file that transformers writes."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = ViTMAEConfig(image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                          intermediate_size=128, decoder_hidden_size=16, decoder_num_hidden_layers=1,
                          decoder_num_attention_heads=2, decoder_intermediate_size=64)  # fmt: skip
    reference = randomized(ViTMAEForPreTraining(config))
    source = reference.state_dict()
    if written:
        reference.save_pretrained(tmp_path)
        source = tmp_path / "model.safetensors"
    model = make_mae(seed=1)
    assert sorted(load_weights(model, source, strict=True).used) == MAE_KEYS
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    wanted = reference(images, noise=noise).logits  # the prediction does not see the loss's settings
    torch.testing.assert_close(model(images, config.mask_ratio, noise).pred, wanted, rtol=1e-4, atol=1e-4)


def test_timms_weights():
    source = randomized(make_vit(num_classes=7))
    model = make_mae(seed=1)
    loaded = load_weights(model, source.state_dict())
    assert loaded.unexpected == ["head.weight", "head.bias"]
    assert set(ENCODER_KEYS) < set(loaded.used)
    assert all(key.startswith(("decoder_", "mask_token")) for key in loaded.missing)
    assert_same(model, source.state_dict(), ENCODER_KEYS)

    classifier = make_vit(seed=1, num_classes=7)
    load_weights(classifier, source.state_dict(), strict=True)
    assert torch.equal(classifier.head.weight, source.head.weight)


# --- ignore, strict and refusals -----------------------------------------------------------------------------------


def test_ignored_keys_are_left_out(mae_file):
    model = make_mae(seed=1)
    before = copy.deepcopy(public_state(model))
    loaded = load_weights(model, mae_file, ignore=["decoder_*", "mask_token"])
    assert not any(key.startswith(("decoder_", "mask_token")) for key in loaded.used)
    ignored = {key for key in MAE_KEYS if key.startswith(("decoder_", "mask_token"))}
    assert set(loaded.missing) == set(loaded.unexpected) == ignored
    assert_same(model, before, sorted(ignored))


def test_an_ignored_head_may_have_another_shape():
    source = make_vit(num_classes=7)
    model = make_classifier()
    loaded = load_weights(model, source.state_dict(), ignore=["head.*"])
    assert {"head.weight", "head.bias"} <= set(loaded.missing) & set(loaded.unexpected)


def test_another_architecture_is_refused_with_keys_and_shapes(mae_file):
    model = make_mae(seed=1, embed_dim=48)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="checkpoint of another architecture: got ") as error:
        load_weights(model, mae_file)
    message = str(error.value)
    assert message.startswith(f"{mae_file}: ")
    assert "blocks.0.attn.proj.weight [32, 32] for [48, 48]" in message
    assert message.endswith(" and 28 more")  # 31 tensors have the encoder's width
    assert len(message.splitlines()) == 1
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def test_another_number_of_classes_is_refused():
    with pytest.raises(
        ValueError, match=r"^state dict: .*: got head\.weight \[7, 32\] for \[5, 32\], head\.bias \[7\] for"
    ):
        load_weights(make_classifier(), make_vit(num_classes=7).state_dict())


def test_strict_refuses_missing_and_unexpected_keys():
    full = public_state(make_mae())
    short = {key: value for key, value in full.items() if not key.startswith("decoder_pred")}
    with pytest.raises(ValueError, match=r"another architecture: lacks decoder_pred\.weight, decoder_pred\.bias$"):
        load_weights(make_mae(seed=1), short, strict=True)
    with pytest.raises(ValueError, match=r"another architecture: has no place for blocks\.2\.norm1\.weight$"):
        load_weights(make_mae(seed=1), {**full, "blocks.2.norm1.weight": torch.ones(32)}, strict=True)
    with pytest.raises(ValueError, match=r"another architecture: lacks decoder_pred\.weight"):
        load_weights(make_mae(seed=1), full, ignore=["decoder_pred.*"], strict=True)


@pytest.mark.parametrize("state", [{"conv1.weight": torch.ones(2)}, {}])
def test_nothing_fits(state):
    got = "conv1.weight" if state else "none"
    wanted = rf"^state dict: no weight fits the model; wanted keys like mask_token, .*, got {got}$"
    with pytest.raises(ValueError, match=wanted):
        load_weights(make_mae(), state)


class Trap:
    """Pickles to a call that leaves a trace."""

    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_pickle_with_code_is_refused_and_not_executed(tmp_path):
    trace = tmp_path / "executed"
    torch.save({"model": public_state(make_mae()), "extra": Trap(trace)}, tmp_path / "trap.pth")
    with pytest.raises(
        ValueError, match=r"trap\.pth: wanted a torch file of tensors only, got one that needs \S+open "
    ):
        load_weights(make_mae(), tmp_path / "trap.pth")
    assert not trace.exists()


DAMAGES = {
    "empty": "wanted a model, as a safetensors or a torch file, got a file of another kind",
    "text": "wanted a model, as a safetensors or a torch file, got a file of another kind",
    "truncated": "wanted a torch file of tensors only, got one that cannot be read: File is not a zip file",
    "flipped": r"wanted a torch file of tensors only, got one that cannot be read: damaged/data/\d+ differs from its "
    "checksum",
}


@pytest.mark.parametrize("content", DAMAGES)
def test_a_damaged_torch_file(tmp_path, content):
    path = tmp_path / "damaged.pth"
    torch.save(public_state(make_mae()), path)
    whole = path.read_bytes()
    half = len(whole) // 2
    flipped = whole[:half] + bytes([whole[half] ^ 1]) + whole[half + 1 :]
    damaged = {"empty": b"", "text": b"<html>not found</html>", "truncated": whole[:half], "flipped": flipped}
    path.write_bytes(damaged[content])
    with pytest.raises(ValueError, match=rf"damaged\.pth: {DAMAGES[content]}$"):
        read_weights(path)


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, {"model": {}}, torch.ones(2)], ids=str)
def test_a_torch_file_without_a_state_dict(tmp_path, content):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt: wanted a state dict, got no tensors$"):
        read_weights(tmp_path / "other.pt")


@pytest.mark.parametrize("damage", ["empty", "truncated", "header", "text", "card"])
def test_a_damaged_safetensors_file(mae_file, damage):
    whole = mae_file.read_bytes()
    if damage == "card":
        save_file({"a": torch.ones(2)}, mae_file, {"sparsemae": "{"})
    else:
        mae_file.write_bytes(
            {
                "empty": b"",
                "truncated": whole[:-7],
                "header": b"\xff" * 8 + whole[8:],
                "text": b"<html>not found</html>",
            }[damage]
        )
    with pytest.raises(ValueError, match=r"model\.safetensors: not a readable safetensors file: "):
        read_weights(mae_file)


def test_foreign_safetensors_have_no_card(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "foreign.safetensors", {"format": "pt"})
    state, metadata = read_weights(tmp_path / "foreign.safetensors")
    assert list(state) == ["a"]
    assert metadata == {}


# --- files and folders ---------------------------------------------------------------------------------------------


def test_a_missing_file(tmp_path):
    for path in (tmp_path / "none.safetensors", tmp_path / "none", str(tmp_path / "none.pth")):
        with pytest.raises(ValueError, match=r"none\S*: no such file or run folder$"):
            load_weights(make_mae(), path)


def test_a_folder_without_weights(tmp_path):
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"wanted a run folder with model\.safetensors or checkpoints/, found neither"):
        find_weights(tmp_path)


def test_a_run_folder_gives_its_last_checkpoint_and_its_model_once_it_is_done(tmp_path):
    for step in (2, 10, 9):
        folder = tmp_path / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        save_file({"step": torch.tensor(step)}, folder / "model.safetensors")
    assert read_weights(tmp_path)[0]["step"] == 10
    assert read_weights(tmp_path / "checkpoints" / "step-00000002")[0]["step"] == 2
    (tmp_path / "checkpoints" / "step-00000011").mkdir()  # without weights: not a checkpoint
    assert read_weights(str(tmp_path))[0]["step"] == 10
    save_file({"step": torch.tensor(99)}, tmp_path / "model.safetensors")
    assert read_weights(tmp_path)[0]["step"] == 99
    assert find_weights(tmp_path / "model.safetensors") == tmp_path / "model.safetensors"
