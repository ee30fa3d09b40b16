from __future__ import annotations

import pytest
import torch
from timm.layers import LayerNorm
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from sparsemae.models import MaskedAutoencoder
from sparsemae.models.mae import random_masking, sincos_pos_embed
from sparsemae.sparsity import sparsify


def make_encoder(**options) -> VisionTransformer:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0}
    return VisionTransformer(**{**sizes, "global_pool": "token", **options})


def make_mae(norm_pix_loss: bool = True, **options) -> MaskedAutoencoder:
    torch.manual_seed(0)
    decoder = {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}
    return MaskedAutoencoder(make_encoder(**options), **decoder, norm_pix_loss=norm_pix_loss)


# --- against transformers ------------------------------------------------------------------------------------------

SIZES = {
    "32px": {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
             "decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2},
    "48px": {"image_size": 48, "patch_size": 16, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
             "decoder_hidden_size": 96, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 6},
}  # fmt: skip


def make_pair(size: str, norm_pix_loss: bool, mask_ratio: float, dtype: torch.dtype):
    """Our autoencoder and transformers', every weight random and the same in both."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    sizes = SIZES[size]
    config = ViTMAEConfig(
        **sizes, intermediate_size=4 * sizes["hidden_size"], decoder_intermediate_size=4 * sizes["decoder_hidden_size"],
        layer_norm_eps=1e-6, norm_pix_loss=norm_pix_loss, mask_ratio=mask_ratio, attn_implementation="sdpa",
    )  # fmt: skip
    theirs = ViTMAEForPreTraining(config).to(dtype)
    encoder = VisionTransformer(
        img_size=sizes["image_size"], patch_size=sizes["patch_size"], embed_dim=sizes["hidden_size"],
        depth=sizes["num_hidden_layers"], num_heads=sizes["num_attention_heads"], num_classes=0, global_pool="token",
    )  # fmt: skip
    ours = MaskedAutoencoder(
        encoder, sizes["decoder_hidden_size"], sizes["decoder_num_hidden_layers"], sizes["decoder_num_attention_heads"],
        norm_pix_loss=norm_pix_loss,
    ).to(dtype)  # fmt: skip
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0  # zero biases would hide a lost one
            parameter.copy_(mean + 0.2 * torch.randn(parameter.shape, dtype=torch.float64))
    own = dict(ours.named_parameters())
    with torch.no_grad():
        for their_name, parameter in theirs.named_parameters():
            our_name, part = translate(their_name)
            value = own.pop(our_name) if part in (None, 2) else own[our_name]
            parameter.copy_(value if part is None else value.chunk(3)[part])
    assert not own, "every weight of ours has a counterpart"
    return ours, theirs


def translate(name: str) -> tuple[str, int | None]:
    """transformers' parameter name to ours, and which third of a fused qkv it is. Written for these tests alone."""
    fixed = {
        "vit.embeddings.cls_token": "encoder.cls_token",
        "vit.embeddings.position_embeddings": "encoder.pos_embed",
        "vit.embeddings.patch_embeddings.projection.weight": "encoder.patch_embed.proj.weight",
        "vit.embeddings.patch_embeddings.projection.bias": "encoder.patch_embed.proj.bias",
        "vit.layernorm.weight": "encoder.norm.weight",
        "vit.layernorm.bias": "encoder.norm.bias",
    }
    if name in fixed:
        return fixed[name], None
    side, kind, *rest = name.split(".")
    if not kind.endswith("layers"):
        assert side == "decoder"
        return ".".join([kind, *rest]), None
    blocks = {"vit": "encoder.blocks", "decoder": "decoder_blocks"}[side]
    index, *inner, leaf = rest
    member = {
        "layernorm_before": ("norm1", None), "layernorm_after": ("norm2", None),
        "attention.q_proj": ("attn.qkv", 0), "attention.k_proj": ("attn.qkv", 1), "attention.v_proj": ("attn.qkv", 2),
        "attention.o_proj": ("attn.proj", None), "mlp.fc1": ("mlp.fc1", None), "mlp.fc2": ("mlp.fc2", None),
    }[".".join(inner)]  # fmt: skip
    return f"{blocks}.{index}.{member[0]}.{leaf}", member[1]


def gradients_by_our_names(theirs: nn.Module) -> dict[str, torch.Tensor]:
    """Their gradients, q, k and v fused."""
    parts: dict[str, dict[int, torch.Tensor]] = {}
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            our_name, part = translate(name)
            parts.setdefault(our_name, {})[part or 0] = parameter.grad
    return {name: torch.cat([by_part[i] for i in sorted(by_part)]) for name, by_part in parts.items()}


@pytest.mark.holds("foundation.2")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("mask_ratio", [0.25, 0.75])
@pytest.mark.parametrize("norm_pix_loss", [True, False], ids=["norm", "pixels"])
@pytest.mark.parametrize("size", SIZES)
def test_loss_prediction_and_gradients_are_those_of_transformers(size, norm_pix_loss, mask_ratio, dtype):
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-5}[dtype]
    ours, theirs = make_pair(size, norm_pix_loss, mask_ratio, dtype)
    side, patch = SIZES[size]["image_size"], SIZES[size]["patch_size"]
    images = torch.randn(3, 3, side, side, dtype=torch.float64).to(dtype)
    noise = torch.rand(3, (side // patch) ** 2, dtype=torch.float64).to(dtype)

    output = ours(images, mask_ratio=mask_ratio, noise=noise)
    reference = theirs(images, noise=noise)
    assert torch.equal(output.mask, reference.mask.to(dtype))
    assert torch.equal(output.ids_restore, reference.ids_restore)
    output.loss.backward()
    reference.loss.backward()

    pairs = {"loss": (output.loss, reference.loss), "pred": (output.pred, reference.logits)}
    expected = gradients_by_our_names(theirs)
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters() if parameter.requires_grad}
    assert gradients.keys() == expected.keys()
    pairs |= {name: (gradients[name], expected[name]) for name in expected}
    for name, (got, wanted) in pairs.items():
        assert wanted.norm() > 0, name
        assert (got - wanted).norm() / wanted.norm() <= tolerance, name


@pytest.mark.holds("foundation.2")
@pytest.mark.parametrize("grid", [(5, 5), (2, 3)])
def test_positions_are_those_of_transformers(grid):
    """Their function gives rows first; MAE's files have columns first, and their model swaps the halves likewise."""
    from transformers.models.vit_mae.modeling_vit_mae import build_2d_sinusoidal_position_embedding

    reference = build_2d_sinusoidal_position_embedding(*grid, embed_dim=48, cls_token=True)
    reference = torch.cat((reference[:, 24:], reference[:, :24]), dim=1)
    torch.testing.assert_close(sincos_pos_embed(grid, 48), reference[None], rtol=1e-6, atol=1e-6)


# --- positions, patches, masking -----------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(3, 3), (2, 5), (4, 1)])
def test_positions_by_their_formula(grid):
    width = 16
    positions = sincos_pos_embed(grid, width)[0]
    assert positions.shape == (1 + grid[0] * grid[1], width)
    assert (positions[0] == 0).all()
    for row in range(grid[0]):
        for column in range(grid[1]):
            for i in range(4):
                frequency = torch.tensor(10000.0, dtype=torch.float64) ** (-i / 4)
                wanted = [(column * frequency).sin(), (column * frequency).cos(),
                          (row * frequency).sin(), (row * frequency).cos()]  # fmt: skip
                got = positions[1 + row * grid[1] + column, i::4]
                torch.testing.assert_close(got, torch.stack(wanted).float())


def test_position_embeddings_want_a_dimension_that_four_divides():
    with pytest.raises(
        ValueError, match=r"^sin-cos position embeddings: wanted an embedding dimension divisible by 4, got 30$"
    ):
        sincos_pos_embed((2, 2), 30)


@pytest.mark.parametrize(
    "options",
    [{}, {"img_size": (16, 40)}, {"img_size": (24, 16), "patch_size": (8, 4)}, {"in_chans": 1}],
    ids=["square", "wide", "oblong patches", "gray"],
)
def test_patches_and_back(options):
    model = make_mae(**options)
    (h, w), (p, q) = model.encoder.patch_embed.grid_size, model.encoder.patch_embed.patch_size
    channels = options.get("in_chans", 3)
    images = torch.randn(2, channels, h * p, w * q)
    patches = model.patchify(images)
    assert patches.shape == (2, h * w, p * q * channels)
    for row in range(h):
        for column in range(w):
            piece = images[1, :, row * p : (row + 1) * p, column * q : (column + 1) * q]
            assert torch.equal(patches[1, row * w + column], piece.permute(1, 2, 0).flatten())
    assert torch.equal(model.unpatchify(patches), images)
    output = model(images, mask_ratio=0.5)
    assert output.pred.shape == patches.shape
    assert model.reconstruct(images, output).shape == images.shape


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_reconstruction_of_a_perfect_prediction_is_the_image(norm_pix_loss):
    model = make_mae(norm_pix_loss)
    images = torch.rand(2, 3, 32, 32)
    target = model.patchify(images)
    if norm_pix_loss:
        std = (target.var(dim=-1, keepdim=True) + 1e-6).sqrt()
        target = (target - target.mean(dim=-1, keepdim=True)) / std
    output = model(images)._replace(pred=target)
    torch.testing.assert_close(model.reconstruct(images, output), images)
    assert model.forward_loss(images, target, output.mask) < 1e-10


def test_token_counts_of_a_vit_base_at_a_quarter_removed():
    """The encoder sees 147 of 196 patches and the class token, the decoder all."""
    with torch.device("meta"):
        encoder = VisionTransformer(img_size=224, patch_size=16, global_pool="token", num_classes=0)
        model = MaskedAutoencoder(encoder)
    seen = {}
    for name in ("encoder.blocks.0", "encoder.blocks.11", "decoder_blocks.0", "decoder_blocks.7"):
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: seen.update({name: tuple(args[0].shape)})
        )
    images = torch.empty(2, 3, 224, 224, device="meta")
    output = model(images)
    assert seen == {
        "encoder.blocks.0": (2, 148, 768), "encoder.blocks.11": (2, 148, 768),
        "decoder_blocks.0": (2, 197, 512), "decoder_blocks.7": (2, 197, 512),
    }  # fmt: skip
    assert output.pred.shape == (2, 196, 768)
    model(images, mask_ratio=0.75)
    assert seen["encoder.blocks.0"] == (2, 50, 768)


@pytest.mark.parametrize(("mask_ratio", "kept"), [(0.25, 147), (0.75, 49), (0.5, 98), (0.3, 137)])
def test_mask_is_one_where_a_patch_is_removed(mask_ratio, kept):
    x = torch.arange(196.0).view(1, 196, 1).repeat(4, 1, 2)
    noise = torch.rand(4, 196, generator=torch.Generator().manual_seed(0))
    visible, mask, ids_restore = random_masking(x, mask_ratio, noise)
    assert visible.shape == (4, kept, 2)
    assert mask.unique().tolist() == [0, 1]
    assert (mask == 0).sum(dim=1).tolist() == [kept] * 4
    for i in range(4):
        order = noise[i].argsort()
        assert visible[i, :, 0].tolist() == order[:kept].tolist()
        assert mask[i, order[:kept]].sum() == 0
        assert mask[i, order[kept:]].sum() == 196 - kept
        assert torch.equal(order[ids_restore[i]], torch.arange(196))


def test_masked_patches_do_not_reach_the_encoder_and_kept_ones_do_not_reach_the_loss():
    model = make_mae(norm_pix_loss=False)
    images, noise = torch.randn(1, 3, 32, 32), torch.rand(1, 16)
    output = model(images, 0.5, noise)
    removed = model.unpatchify(output.mask[..., None].expand(-1, -1, 8 * 8 * 3))
    assert removed.unique().tolist() == [0, 1]

    other = model(torch.where(removed.bool(), torch.randn_like(images), images), 0.5, noise)
    assert torch.equal(other.pred, output.pred)
    assert not torch.equal(other.loss, output.loss)
    pred = torch.where(output.mask[..., None].bool(), output.pred, 1e3)
    assert torch.equal(model.forward_loss(images, pred, output.mask), output.loss)


def test_noise_decides_and_the_global_generator_stands_in_for_it():
    model, images = make_mae(), torch.randn(2, 3, 32, 32)
    noise = torch.rand(2, 16)
    assert torch.equal(model(images, noise=noise).loss, model(images, noise=noise).loss)
    torch.manual_seed(5)
    first = model(images)
    torch.manual_seed(5)
    assert torch.equal(model(images).mask, first.mask)
    assert not torch.equal(model(images).mask, first.mask)


def test_loss_is_full_precision_under_autocast():
    model, images, noise = make_mae(), torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    reference = model(images, noise=noise)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(images, noise=noise)
    assert output.loss.dtype == torch.float32
    assert torch.equal(output.mask, reference.mask)
    assert output.pred.dtype == torch.bfloat16
    assert torch.equal(output.loss, model.forward_loss(images, output.pred.float(), output.mask))
    torch.testing.assert_close(output.loss, reference.loss, rtol=0.05, atol=0)
    output.loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_a_constant_patch_gives_a_finite_loss():
    output = make_mae()(torch.zeros(1, 3, 32, 32))
    assert output.loss.isfinite()


# --- initial values ------------------------------------------------------------------------------------------------


def test_initial_values():
    model = make_mae(embed_dim=128, num_heads=4)
    encoder = model.encoder
    assert torch.equal(encoder.pos_embed.detach(), sincos_pos_embed((4, 4), 128))
    assert torch.equal(model.decoder_pos_embed.detach(), sincos_pos_embed((4, 4), 16))
    assert not encoder.pos_embed.requires_grad
    assert not model.decoder_pos_embed.requires_grad
    fixed = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert sorted(fixed) == ["decoder_pos_embed", "encoder.pos_embed"]
    assert encoder.cls_token.std().item() == pytest.approx(0.02, rel=0.3)
    assert 0 < model.mask_token.std() < 0.05
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            fan_out, fan_in = module.weight.shape
            bound = (6 / (fan_in + fan_out)) ** 0.5  # Xavier; MAE takes the fused qkv as one matrix
            assert module.weight.abs().max() <= bound, name
            assert module.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1), name
            assert (module.bias == 0).all(), name
        elif isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all(), name
            assert (module.bias == 0).all(), name
            assert module.eps == 1e-6, name
    bound = (6 / (128 + 3 * 8 * 8)) ** 0.5  # the patch embedding as a linear layer
    assert encoder.patch_embed.proj.weight.abs().max() <= bound
    assert encoder.patch_embed.proj.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)


def test_no_weight_decay_names_exist():
    model = make_mae()
    assert model.no_weight_decay() == {"mask_token", "decoder_pos_embed"}
    assert model.no_weight_decay() <= dict(model.named_parameters()).keys()


def test_the_encoder_is_the_very_module_that_was_given_and_can_be_sparse():
    encoder = make_encoder()
    model = MaskedAutoencoder(encoder, 16, 1, 2)
    assert model.encoder is encoder
    names = sparsify(model, "2:8")
    assert len(names) == 8
    assert all(name.startswith("encoder.blocks.") for name in names)
    model(torch.randn(2, 3, 32, 32)).loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_training_lowers_the_loss():
    model, images, noise = make_mae(), torch.rand(4, 3, 32, 32), torch.rand(4, 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = model(images, 0.5, noise).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask_ratio", [0.0, 1.0, 0.95, -0.5, 1.5, 0])
def test_ratios_that_mask_nothing_or_all(mask_ratio):
    wanted = rf"^mask_ratio: wanted a fraction that keeps and masks at least one of 16 patches, got {mask_ratio}$"
    with pytest.raises(ValueError, match=wanted):
        make_mae()(torch.randn(1, 3, 32, 32), mask_ratio=mask_ratio)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_token": False, "global_pool": "avg"}, "a class token"),
        ({"reg_tokens": 4}, "no register tokens"),
        ({"no_embed_class": True}, "learned position embeddings, the class token's included"),
        ({"pos_embed": "none"}, "learned position embeddings, the class token's included"),
        ({"dynamic_img_size": True}, "a fixed input size"),
        ({"global_pool": "avg"}, r"a final `norm` \(global_pool='token'\)"),
    ],
)
def test_encoders_that_mae_cannot_take(options, message):
    with pytest.raises(ValueError, match=f"^encoder: MAE pretraining wants a ViT with {message}$"):
        MaskedAutoencoder(make_encoder(**options), 16, 1, 2)


def test_an_encoder_that_is_no_vit():
    with pytest.raises(ValueError, match=r"^encoder: wanted a timm VisionTransformer, got Linear$"):
        MaskedAutoencoder(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("width", "heads", "message"),
    [
        (20, 3, r"^decoder: wanted decoder_embed_dim divisible by decoder_num_heads, got 20 and 3$"),
        (18, 2, r"^sin-cos position embeddings: wanted an embedding dimension divisible by 4, got 18$"),
    ],
)
def test_decoder_dimensions_that_do_not_divide(width, heads, message):
    with pytest.raises(ValueError, match=message):
        MaskedAutoencoder(make_encoder(), width, 1, heads)


def test_an_encoder_dimension_that_four_does_not_divide():
    with pytest.raises(
        ValueError, match=r"^sin-cos position embeddings: wanted an embedding dimension divisible by 4, got 30$"
    ):
        MaskedAutoencoder(make_encoder(embed_dim=30), 16, 1, 2)


def test_the_decoder_normalizes_like_the_encoder():
    model = make_mae()
    assert isinstance(model.decoder_norm, LayerNorm)
    assert model.decoder_norm.eps == model.encoder.norm.eps == 1e-6
