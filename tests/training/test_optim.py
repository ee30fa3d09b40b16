import copy
import math

import pytest
import timm
import torch
from conftest import Figure

from sparsemae.models import MaskedAutoencoder
from sparsemae.options.training import OptimConfig
from sparsemae.training.optim import in_epochs, learning_rate, make_optimizer, parameter_groups, set_learning_rate


@pytest.mark.holds("foundation.4")
@pytest.mark.parametrize(
    ("epoch", "wanted"), [(1, 4.8e-4), (5, 2.4e-3), (50, 2.32427703e-3), (199.5, 1.23351023e-3), (400, 1e-5), (0, 0.0)]
)
def test_table_1_schedule_reaches_every_group(epoch: float, wanted: float) -> None:
    model = MaskedAutoencoder(timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=0), 32, 1, 2)
    optim = OptimConfig()
    optimizer = make_optimizer(model, optim)
    set_learning_rate(optimizer, learning_rate(optim, epoch, 400))
    for group in optimizer.param_groups:
        assert group["lr"] == pytest.approx(wanted, rel=1e-8)


@pytest.mark.slow
@pytest.mark.holds("foundation.4")
def test_layer_decay_and_weight_decay_of_vit_base() -> None:
    model = timm.create_model("vit_base_patch16_224", global_pool="avg", num_classes=10)
    optim = OptimConfig(lr=1.0, warmup_epochs=0, min_lr=0.0, layer_decay=0.65)
    optimizer = make_optimizer(model, optim)
    set_learning_rate(optimizer, learning_rate(optim, 0, 1))
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        group = group_of[id(parameter)]
        first, _, rest = name.partition(".")
        if first in ("patch_embed", "cls_token", "pos_embed"):
            power = 13
        else:
            power = 12 - int(rest.split(".")[0]) if first == "blocks" else 0
        assert group["lr"] == pytest.approx(0.65**power, rel=1e-12), name
        exempt = name.endswith("bias") or "norm" in name or first in ("cls_token", "pos_embed")
        assert group["weight_decay"] == (0.0 if exempt else 0.05), name


def test_autoencoder_groups_cover_encoder_and_decoder_without_decaying_tokens() -> None:
    model = MaskedAutoencoder(timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=0), 32, 1, 2)
    groups = parameter_groups(model, 0.05, 0.5)
    by_id = {id(p): group for group in groups for p in group["params"]}
    names = dict(model.named_parameters())
    assert by_id[id(model.mask_token)]["weight_decay"] == 0.0
    assert by_id[id(model.encoder.cls_token)]["weight_decay"] == 0.0
    assert by_id[id(names["decoder_blocks.0.attn.qkv.weight"])] | {"params": []} == {
        "params": [], "weight_decay": 0.05, "lr_scale": 1.0,
    }  # fmt: skip
    assert by_id[id(names["encoder.blocks.0.attn.qkv.weight"])]["lr_scale"] == 0.5**2
    assert id(model.decoder_pos_embed) not in by_id


def test_schedule_is_a_closed_form_between_its_ends() -> None:
    optim = OptimConfig(lr=3.0, min_lr=1.0, warmup_epochs=2)
    assert learning_rate(optim, 1.0, 10) == 1.5
    assert learning_rate(optim, 6.0, 10) == pytest.approx(2.0)
    assert learning_rate(optim, 8.0, 10) == pytest.approx(1 + (1 + math.cos(math.pi * 0.75)))
    assert learning_rate(optim, 12.0, 10) == 1.0


def test_a_linear_schedule_in_steps() -> None:
    optim = OptimConfig(lr=3.0, min_lr=1.0, schedule="linear", warmup_steps=20, warmup_start=0.1)
    in_ten = in_epochs(optim, steps_per_epoch=10, total_steps=100)
    rates = {epoch: learning_rate(in_ten, epoch, 10) for epoch in (0, 1, 2, 6, 10, 12)}
    assert rates == pytest.approx({0: 0.3, 1: 1.65, 2: 3.0, 6: 2.0, 10: 1.0, 12: 1.0})
    with pytest.raises(ValueError, match=r"optim\.warmup_steps: wanted fewer than the schedule's 20 steps, got 20"):
        in_epochs(optim, 10, 20)


def test_every_trainable_parameter_is_covered_or_it_fails() -> None:
    model = MaskedAutoencoder(timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=0), 32, 1, 2)
    optimizer = make_optimizer(model, OptimConfig())
    covered = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    assert covered == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert isinstance(optimizer, torch.optim.AdamW)


@pytest.mark.holds("better.4")
def test_a_frozen_variance_is_adamw_written_out(figure: Figure) -> None:
    """Twelve steps, the second moment of the first five kept; from the eighth on with another state of the same."""
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", depth=1, embed_dim=12, num_classes=3, img_size=32).double()
    optim = OptimConfig(betas=(0.8, 0.9), eps=1e-3, weight_decay=0.1, layer_decay=0.5, freeze_variance_epoch=5.0)
    optimizer, twin = make_optimizer(vit, optim), {name: p.detach().clone() for name, p in vit.named_parameters()}
    m, v = ({name: torch.zeros_like(w) for name, w in twin.items()} for _ in range(2))
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for t in range(1, 13):
        if t == 8:
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer = make_optimizer(vit, optim)
            optimizer.load_state_dict({**optimizer.state_dict(), "state": saved["state"]})
            groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        set_learning_rate(optimizer, 0.01 * t, variance_frozen=t > 5)
        for name, p in vit.named_parameters():
            g, group = torch.randn_like(p), groups[id(p)]
            p.grad, w = g, twin[name]
            w -= group["lr"] * group["weight_decay"] * w
            m[name] = 0.8 * m[name] + 0.2 * g
            if t <= 5:
                v[name] = 0.9 * v[name] + 0.1 * g**2
            root = (v[name] / (1 - 0.9 ** min(t, 5))).sqrt()
            w -= group["lr"] * m[name] / (1 - 0.8**t) / (root + 1e-3)
        optimizer.step()
    worst = max(float((p.detach() - twin[name]).abs().max()) for name, p in vit.named_parameters())
    assert worst < 1e-6  # torch counts steps in fp32
    figure(f"largest difference {worst:.0e} after 12 steps, weights of about 1")


def test_a_variance_that_would_freeze_after_the_end_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"optim\.freeze_variance_epoch: wanted less than the training's 3 epochs, got 4"
    ):
        in_epochs(OptimConfig(warmup_epochs=1, freeze_variance_epoch=4.0), steps_per_epoch=2, total_steps=6)
