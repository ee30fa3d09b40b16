"""A start from another network: refused by name, with the setting that takes it; and that setting does take it."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from torch import nn

from sparsemae.card import InputSpec, ModelCard
from sparsemae.models import MaskedAutoencoder, build_vit, hub, start
from sparsemae.models.architecture import architecture_of
from sparsemae.models.segmenter import Segmenter
from sparsemae.models.start import start_from
from sparsemae.models.weights import save_model
from sparsemae.options.model import HeadConfig
from sparsemae.sparsity import freeze, sparsify

pytestmark = pytest.mark.holds("right.1")
NAME = "vit_base_patch16_224"
SMALL = {"patch_size": 7, "embed_dim": 32, "depth": 4, "num_heads": 2}
SIDE = 28


def network(name: str = NAME, **options: Any) -> nn.Module:
    """A network of timm with random weights, none at its initial value."""
    torch.manual_seed(0)
    model = timm.create_model(name, **{"img_size": SIDE, "num_classes": 0, **SMALL, **options})
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def saved(tmp_path: Path, model: nn.Module, **more: Any) -> str:
    torch.save({"model": model.state_dict(), **more}, tmp_path / "weights.pth")
    return str(tmp_path / "weights.pth")


def classifier(args: dict[str, Any] | None = None, side: int = SIDE) -> nn.Module:
    return build_vit(NAME, SMALL if args is None else args, side, num_classes=3).eval()


FOREIGN: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "layer scale": (NAME, {"init_values": 0.1}, r"blocks\.0\.ls1\.gamma, blocks\.0\.ls2\.gamma", "init_values: 1e-05"),
    "DeiT III": ("deit3_base_patch16_224", {}, r"blocks\.0\.ls1\.gamma", "no_embed_class: true"),
    "depth": (NAME, {"depth": 8}, r"blocks\.4\.norm1\.weight, .* and 45 more", "depth: 8"),
    "registers": (NAME, {"reg_tokens": 4}, "reg_token", "reg_tokens: 4"),
    "qk_norm": (NAME, {"qk_norm": True}, r"blocks\.0\.attn\.q_norm\.weight", "qk_norm: true"),
    "scale_norm": (NAME, {"scale_mlp_norm": True}, r"blocks\.0\.mlp\.norm\.weight", "scale_mlp_norm: true"),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_item_12_what_the_model_cannot_use_is_refused_with_the_setting_that_takes_it(tmp_path: Path, what: str) -> None:
    name, options, lost, setting = FOREIGN[what]
    source = network(name, **options)
    file, model = saved(tmp_path, source), classifier()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"weights\.pth: .* the model has no place for its {lost}.*{setting}"):
        start_from(model, file)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    found = architecture_of(file, {"num_heads": 2})
    target = build_vit(found.name, found.args, SIDE, num_classes=3).eval()
    assert start_from(target, file).fraction == 1.0
    images = torch.randn(2, 3, SIDE, SIDE)
    wanted = source.forward_intermediates(images, norm=False, intermediates_only=True)[-1]
    got = target.forward_intermediates(images, norm=False, intermediates_only=True)[-1]
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_base_patch16_clip_224", r"no place for its norm_pre\.weight, norm_pre\.bias; .*_clip_quickgelu_224 or"),
        ("eva02_tiny_patch14_224", r"matched 69\.2%.*; no VisionTransformer of timm has blocks\.0\.attn\.q_bias"),
        ("vit_small_patch16_dinov3", r"no place for its reg_token, blocks\.0\.ls1\.gamma"),
        ("beit_base_patch16_224", r"no place for its .*; no VisionTransformer of timm has blocks\.0\.attn\.q_bias"),
    ],
)
def test_item_12_networks_that_no_argument_gives(tmp_path: Path, name: str, message: str) -> None:
    options = {"img_size": 32, "patch_size": 8} if name.startswith("beit") else {"mlp_ratio": 4}
    file = saved(tmp_path, network(name, **options))
    args = {**SMALL, **{key: value for key, value in options.items() if key == "patch_size"}}
    with pytest.raises(ValueError, match=message):
        start_from(classifier(args, options.get("img_size", SIDE)), file)


def test_item_12_rotary_positions_are_missed_where_nothing_else_tells_of_them(tmp_path: Path) -> None:
    source = network("vit_small_patch16_dinov3")
    file = saved(tmp_path, source)
    model = classifier({**SMALL, "init_values": 1e-5, "reg_tokens": 4, "no_embed_class": True, "qkv_bias": False})
    with pytest.raises(ValueError, match=r"wanted position embeddings, got none \(rotary or relative ones cannot"):
        start_from(model, file)


def test_item_12_a_stage_replaces_its_own_parts(tmp_path: Path) -> None:
    """Head, norms, decoder, mask token, distillation token, a frozen mask: neither lost nor wanted."""
    source = network("deit_base_distilled_patch16_224", num_classes=7)
    state = {**source.state_dict(), "mask_token": torch.ones(1, 1, 16), "decoder_embed.weight": torch.ones(16, 32)}
    torch.save(state, tmp_path / "weights.pth")
    for model in (
        classifier(),
        MaskedAutoencoder(build_vit(NAME, SMALL, SIDE), 16, 1, 2),
        Segmenter(build_vit(NAME, SMALL, SIDE), 3, (0, 1, 2, 3), HeadConfig(8, 8)),
    ):
        kept = {} if not isinstance(model, MaskedAutoencoder) else {"mask_token": 1, "decoder_embed.weight": 1}
        result = start_from(model, str(tmp_path / "weights.pth"))
        assert result.fraction == 1.0
        assert {"head.weight", "head_dist.weight", "dist_token"} <= {*result.loaded.unexpected}
        assert kept.keys() <= {*result.loaded.used}


def test_item_12_stages_start_from_each_other_as_before(tmp_path: Path) -> None:
    """pretrain -> finetune -> segment, each from the file of the one before, the second one frozen."""
    card = ModelCard("pretrain", NAME, SMALL, InputSpec(SIDE, (0.5,) * 3, (0.5,) * 3))
    pretrained = MaskedAutoencoder(build_vit(NAME, SMALL, SIDE), 16, 1, 2)
    save_model(tmp_path / "pretrained.safetensors", pretrained, card)
    finetuned = classifier()
    result = start_from(finetuned, str(tmp_path / "pretrained.safetensors"))
    assert result.fraction == 1.0
    assert result.notes == []
    sparsify(finetuned, "2:8", exclude=["blocks.*.mlp.fc2"])
    freeze(finetuned)
    save_model(tmp_path / "finetuned.safetensors", finetuned, card)
    segmenter = Segmenter(build_vit(NAME, SMALL, 56), 3, (0, 1, 2, 3), HeadConfig(8, 8))
    result = start_from(segmenter, str(tmp_path / "finetuned.safetensors"))
    assert result.fraction == 1.0
    assert result.resized == ["pos_embed"]
    assert torch.equal(segmenter.encoder.blocks[3].attn.qkv.weight, finetuned.blocks[3].attn.qkv.weight)
    save_model(tmp_path / "segmenter.safetensors", segmenter, card)
    other = Segmenter(build_vit(NAME, SMALL, 56), 5, (0, 1, 2, 3), HeadConfig(8, 8))
    result = start_from(other, str(tmp_path / "segmenter.safetensors"))
    assert "decode_head.classifier.weight" in result.loaded.unexpected
    assert architecture_of(str(tmp_path / "segmenter.safetensors")).args == SMALL


def test_item_12_weights_that_another_forward_reads_are_refused(tmp_path: Path) -> None:
    """What no tensor shows is known of our own files and of timm's: heads, activation, eps, the kind of block."""
    card = ModelCard("classify", NAME, {**SMALL, "num_heads": 4}, InputSpec(SIDE, (0.5,) * 3, (0.5,) * 3))
    save_model(tmp_path / "model.safetensors", network(num_heads=4), card)
    with pytest.raises(ValueError, match=r"num_heads 4 for 2; wanted --model\.name \S+ --model\.args .*num_heads: 4}"):
        start_from(classifier(), str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"act_layer": "quick_gelu"},
            r"activation QuickGELU\(\) for GELU\S*; wanted --model\.name vit_base_patch16_224",
        ),
        ({"norm_layer": nn.LayerNorm}, "norm LayerNorm for LayerNorm|norm's eps 1e-05 for 1e-06"),
    ],
)
def test_item_12_timms_own_forward(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str) -> None:
    monkeypatch.setattr(start, "pretrained", lambda source: network(**options))
    with pytest.raises(ValueError, match=message):
        start_from(classifier(), f"timm:{NAME}")


BUILT: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "ViT-B": (NAME, {}, NAME, {}),
    "DeiT-Ti": ("deit_tiny_distilled_patch16_224", {}, "vit_tiny_patch16_224", {}),
    "small, patches of 8": ("vit_small_patch8_224", {}, "vit_small_patch16_224", {"patch_size": 8}),
    "8 blocks": ("vit_small_patch16_224", {"depth": 8}, "vit_small_patch16_224", {"depth": 8}),
    "DeiT III": (
        "deit3_small_patch16_224", {}, "vit_small_patch16_224", {"init_values": 1e-5, "no_embed_class": True}
    ),
    "DINOv2 with registers": (
        "vit_small_patch14_reg4_dinov2", {"img_size": 28}, "vit_small_patch16_224",
        {"patch_size": 14, "init_values": 1e-5, "reg_tokens": 4, "no_embed_class": True},
    ),
    "no class token": (
        "vit_base_patch16_siglip_gap_224", {}, NAME, {"class_token": False, "global_pool": "avg"}
    ),
    "qk_norm, mlp_ratio": (
        "vit_tiny_patch16_224", {"qk_norm": True, "mlp_ratio": 3, "qkv_bias": False}, "vit_tiny_patch16_224",
        {"qk_norm": True, "mlp_ratio": 3.0, "qkv_bias": False},
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BUILT)
@pytest.mark.slow
def test_item_12_the_target_is_built_from_the_source(tmp_path: Path, what: str) -> None:
    name, options, wanted, args = BUILT[what]
    source = timm.create_model(name, num_classes=0, **{"img_size": 32, **options})
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    found = architecture_of(str(tmp_path / "weights.pth"))
    assert (found.name, found.args) == (wanted, args)
    assert f"{source.blocks[0].attn.num_heads} heads, as {wanted} has" in found.note
    target = build_vit(found.name, found.args, 56 if args.get("patch_size") == 14 else 64, num_classes=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert start_from(target, str(tmp_path / "weights.pth")).fraction >= 0.999


def test_item_12_heads_that_nobody_says_are_asked_for(tmp_path: Path) -> None:
    file = saved(tmp_path, network())
    with pytest.raises(ValueError, match=r"do not say their number of heads: wanted (.*)") as error:
        architecture_of(file)
    name, args = str(error.value).partition("--model.name ")[2].split(" --model.args ")
    args = yaml.safe_load(args.strip("'").replace(": N", ": 2"))
    assert (name, args) == (NAME, {**SMALL})
    assert start_from(build_vit(name, args, SIDE, num_classes=3), file).fraction == 1.0
    assert architecture_of(file, {"num_heads": 2}).args == SMALL


def test_item_12_timms_name_is_the_architecture() -> None:
    assert architecture_of("timm:vit_small_patch14_dinov2.lvd142m").name == "vit_small_patch14_dinov2.lvd142m"
    assert architecture_of("timm:deit_tiny_distilled_patch16_224").name == "deit_tiny_patch16_224"
    for name in ("vit_small_patch16_dinov3", "beit_base_patch16_224", "resnet18"):
        with pytest.raises(ValueError, match=rf"^timm:{name}: wanted a timm VisionTransformer, got another network"):
            architecture_of(f"timm:{name}")
        with pytest.raises(ValueError, match=rf"^timm:{name}: wanted a timm VisionTransformer, got another network"):
            start_from(classifier(), f"timm:{name}")


def test_item_16_an_unreachable_hub_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, float]] = []
    model = classifier()

    def refuse(url: str, timeout: float) -> None:
        asked.append((url, timeout))
        raise ConnectionError("[Errno -2] Name or service not known")

    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda repository, file: None)
    monkeypatch.setattr(hub, "get_hf_file_metadata", refuse)
    monkeypatch.setattr(timm, "create_model", lambda *args, **options: pytest.fail("tried to download"))
    wanted = (
        r"^--init timm:vit_base_patch16_224\.mae: its weights cannot be fetched from the hub: \[Errno -2\] Name or .*"
        r"wanted a connection, HF_ENDPOINT of a mirror, HF_HOME of a filled cache, the file itself \(--init FILE\), or "
        r"a pretraining of your own images\)$"
    )
    with pytest.raises(ValueError, match=wanted):
        start_from(model, "timm:vit_base_patch16_224.mae")
    assert asked == [("https://huggingface.co/timm/vit_base_patch16_224.mae/resolve/main/model.safetensors", 10)]
    with pytest.raises(
        ValueError, match=r"^--init timm:vit_base_patch16_18x2_224: wanted the name of weights, got one"
    ):
        start_from(model, "timm:vit_base_patch16_18x2_224")
