import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from torch import nn

from sparsemae.card import InputSpec
from sparsemae.models import MaskedAutoencoder, hub, start
from sparsemae.models.start import input_of, start_from


def vit(img_size: int | tuple[int, int] = 28, **options) -> nn.Module:
    arguments = {"patch_size": 7, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 3, **options}
    return timm.create_model("vit_base_patch16_224", img_size=img_size, **arguments)


def save(tmp_path: Path, state: dict) -> str:
    torch.save(state, tmp_path / "weights.pth")
    return str(tmp_path / "weights.pth")


def test_a_timm_file_fills_the_encoder_and_leaves_the_head(tmp_path: Path) -> None:
    source, model = vit(), vit(global_pool="avg", num_classes=5)
    head = model.head.weight.clone()
    result = start_from(model, save(tmp_path, source.state_dict()))
    assert result.fraction == 1.0
    assert torch.equal(model.blocks[1].mlp.fc1.weight, source.blocks[1].mlp.fc1.weight)
    assert torch.equal(model.head.weight, head)
    assert "norm.weight" in result.loaded.unexpected
    assert not result.resized
    assert not result.notes


@pytest.mark.holds("imagenet.4")
@pytest.mark.parametrize("size", [56, (28, 42)])
def test_positions_are_resampled_as_timm_does(tmp_path: Path, size: int | tuple[int, int]) -> None:
    source, model = vit(), vit(size)
    result = start_from(model, save(tmp_path, {"model": source.state_dict()}))
    wanted = resample_abs_pos_embed(source.pos_embed, model.patch_embed.grid_size, num_prefix_tokens=1)
    assert torch.equal(model.pos_embed, wanted)
    assert result.resized == ["pos_embed"]
    assert "resampled: pos_embed" in str(result)


@pytest.mark.parametrize(
    ("name", "options", "before"),
    [
        ("vit_base_patch16_224", {"no_embed_class": True}, 0),
        ("deit_base_distilled_patch16_224", {}, 2),
        ("vit_base_patch16_224", {"class_token": False, "global_pool": "avg"}, 0),
    ],
)
def test_positions_of_other_tokens_are_told_from_those_of_patches(
    tmp_path: Path, name: str, options: dict, before: int
) -> None:
    small = {"patch_size": 7, "embed_dim": 32, "depth": 2, "num_heads": 2}
    source, model = timm.create_model(name, img_size=28, **small, **options), vit()
    result = start_from(model, save(tmp_path, source.state_dict()))
    assert result.resized == ["pos_embed"]
    assert "pos_embed" in result.loaded.used
    assert torch.equal(model.pos_embed[:, 1:], source.pos_embed[:, before:])
    assert torch.equal(model.pos_embed[:, :1], source.pos_embed[:, :1] * bool(before))


def test_an_encoder_whose_tokens_have_no_positions_has_them_added(tmp_path: Path) -> None:
    """Registers and the class token keep what the source added to them: the same features."""
    source, model = vit(reg_tokens=4), vit(reg_tokens=4, no_embed_class=True)
    torch.nn.init.normal_(source.pos_embed)
    result = start_from(model, save(tmp_path, source.state_dict()))
    assert result.resized == ["pos_embed"]
    images = torch.randn(2, 3, 28, 28)
    torch.testing.assert_close(model.eval().forward_features(images), source.eval().forward_features(images))


def test_positions_of_no_square_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no place for its pos_embed \[1, 33, 32\] for \[1, 17, 32\]; "):
        start_from(vit(), save(tmp_path, vit((28, 56)).state_dict()))


@pytest.mark.parametrize("full", [True, False])
def test_mae_files_full_and_encoder_only(tmp_path: Path, full: bool) -> None:
    source = MaskedAutoencoder(vit(num_classes=0), 16, 1, 2)
    state = {key.removeprefix("encoder."): value for key, value in source.state_dict().items()}
    if not full:
        state = {key: value for key, value in state.items() if not key.startswith(("decoder", "mask_token"))}
    result = start_from(vit(global_pool="avg"), save(tmp_path, {"model": state}))
    assert result.fraction == 1.0
    assert "as far as is known: cc-by-nc-4.0, not for commercial use" in str(result)


def test_a_mask_token_is_no_proof_that_weights_are_maes(tmp_path: Path) -> None:
    """DINOv2 and BEiT have one beside learned positions, others beside fixed ones; MAE's comes with its decoder."""
    whole = MaskedAutoencoder(vit(num_classes=0), 16, 1, 2)
    fixed = {key.removeprefix("encoder."): value for key, value in whole.state_dict().items() if "decoder" not in key}
    learned = {**vit().state_dict(), "mask_token": torch.zeros(1, 32)}
    for state in (learned, {**learned, "decoder_embed.weight": torch.zeros(16, 32)}, fixed):
        result = start_from(vit(global_pool="avg"), save(tmp_path, state))
        assert (result.license, result.notes) == ("", [])
    del fixed["mask_token"]
    result = start_from(vit(global_pool="avg"), save(tmp_path, fixed))
    assert result.license == "cc-by-nc-4.0"
    assert "MAE's, by its position embeddings; --license of pack and export names another" in str(result)


TIMM = {"mean": [0.5, 0.4, 0.3], "std": [0.1, 0.2, 0.3], "interpolation": "bilinear", "input_size": [3, 28, 28]}
HF = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.1, 0.2, 0.3], "resample": 2, "size": {"shortest_edge": 28}}


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({"config.json": {"architecture": "x", "pretrained_cfg": TIMM}}, "as said"),
        ({"config.json": TIMM}, "as said"),  # timm's older files
        ({"config.json": {"model_type": "vit"}, "preprocessor_config.json": HF}, "as said"),
        ({"preprocessor_config.json": {**HF, "resample": 3}}, "bicubic"),
        ({"preprocessor_config.json": {**HF, "resample": None}}, "as said"),  # transformers' own default
        ({"preprocessor_config.json": {**HF, "do_normalize": False}}, "not normalized"),
        ({"config.json": {"model_type": "vit"}, "preprocessor_config.json": {"size": 28}}, "nothing"),
        ({"config.json": ["mine"]}, "nothing"),
        ({}, "nothing"),
    ],
)
def test_files_beside_foreign_weights_say_how_images_were_prepared(tmp_path: Path, files: dict, wanted: str) -> None:
    source = save(tmp_path, vit().state_dict())
    for name, values in files.items():
        (tmp_path / name).write_text(json.dumps(values))
    told, kind = input_of(source)
    assert kind == "dense"
    if wanted == "nothing":
        assert told is None
        return
    assert told is not None
    normalized = ((0.5, 0.4, 0.3), (0.1, 0.2, 0.3)) if wanted != "not normalized" else ((0.0,) * 3, (1.0,) * 3)
    assert (told.mean, told.std) == normalized
    assert told.interpolation == ("bicubic" if wanted == "bicubic" else "bilinear")


@pytest.mark.parametrize(
    "text",
    [
        "{", json.dumps({**TIMM, "mean": [0.5]}), json.dumps({**TIMM, "std": [0.1, 0, 0.1]}),
        json.dumps({**TIMM, "mean": [0.5, 0.5, float("nan")]}), json.dumps({**TIMM, "mean": "gray"}),
        json.dumps({**TIMM, "interpolation": "no such"}),
    ],
)  # fmt: skip
def test_files_beside_foreign_weights_that_cannot_be_used_are_named(tmp_path: Path, text: str) -> None:
    source = save(tmp_path, vit().state_dict())
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"^\S*/config\.json: wanted mean, std, interpolation of .*images.*, got .*$"):
        input_of(source)


def test_files_on_the_hub_say_how_images_were_prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = tmp_path / "there"
    there.mkdir()
    (tmp_path / "fetched").mkdir()
    save_file(vit().state_dict(), there / "model.safetensors")

    def download(repository: str, file: str, revision: str | None) -> str:
        assert (repository, revision) == ("lab/model", "v1")
        if not (there / file).exists():
            raise EntryNotFoundError(file)
        return str(shutil.copy(there / file, tmp_path / "fetched"))

    monkeypatch.setattr(hub, "_ask_once", lambda *_: None)
    monkeypatch.setattr(hub, "hf_hub_download", download)
    assert input_of("hf-hub:lab/model@v1") == (None, "dense")
    (there / "preprocessor_config.json").write_text(json.dumps(HF))
    told, _ = input_of("hf-hub:lab/model@v1")
    assert told == InputSpec(0, (0.5, 0.4, 0.3), (0.1, 0.2, 0.3), "bilinear")
    (there / "preprocessor_config.json").unlink()  # it has been fetched
    assert input_of("hf-hub:lab/model@v1")[0] == told


def test_the_license_of_timms_weights_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    source, model = vit(), vit(global_pool="avg")
    source.pretrained_cfg = {"license": "cc-by-nc-4.0"}
    monkeypatch.setattr(start, "pretrained", lambda name: source)
    result = start_from(model, "timm:vit_base_patch16_224.mae")
    assert "license of timm:vit_base_patch16_224.mae, as far as is known: cc-by-nc-4.0, not for commercial use" in str(
        result
    )


def test_another_architecture_is_refused_with_the_share_matched(tmp_path: Path) -> None:
    file = save(tmp_path, vit(depth=1).state_dict())
    with pytest.raises(ValueError, match=r"wanted at least 90%.* matched [45]\d\.\d%; lacks blocks.1.norm1.weight"):
        start_from(vit(), file)
    model = vit(embed_dim=64)
    before = model.pos_embed.clone()
    with pytest.raises(ValueError, match=r"matched 0\.0%; cls_token is \[1, 1, 32\] for \[1, 1, 64\]"):
        start_from(model, file)
    assert torch.equal(model.pos_embed, before)
    with pytest.raises(ValueError, match="wanted a timm model after timm:, got 'vit_giant'"):
        start_from(vit(), "timm:vit_giant")


def test_one_tensor_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    state = vit().state_dict()
    state["patch_embed.proj.bias"] = torch.ones(7)
    with pytest.raises(ValueError, match=r"the model has no place for its patch_embed.proj.bias \[7\] for \[32\]; "):
        start_from(vit(), save(tmp_path, state))


@pytest.mark.parametrize("shape", [(1, 0, 32), (0, 17, 32), (3, 17, 32), (1, 17, 0), (17, 32)], ids=str)
def test_strange_positions_are_refused_naming_the_file(tmp_path: Path, shape: tuple[int, ...]) -> None:
    state = {**vit().state_dict(), "pos_embed": torch.zeros(shape)}
    with pytest.raises(ValueError, match=r"weights\.pth: .* no place for its pos_embed"):
        start_from(vit(), save(tmp_path, state))
