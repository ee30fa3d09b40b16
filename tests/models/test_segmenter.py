"""The heads against transformers' with copied weights, the pyramid, the loss, and who is trained how."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import nn
from transformers import UperNetConfig
from transformers.models.upernet.modeling_upernet import UperNetFCNHead, UperNetHead as TheirHead

from sparsemae.models.segmenter import (
    FCNHead,
    HeadConfig,
    Segmenter,
    SegmenterOutput,
    UperNetHead,
    segmentation_loss,
)
from sparsemae.training.optim import parameter_groups

WIDTHS, CLASSES = (24, 24, 24, 24), 7


def segmenter(size: int = 32, **args: object) -> Segmenter:
    encoder = timm.create_model(
        "vit_base_patch16_224", img_size=size, patch_size=8, embed_dim=32, depth=4, num_heads=2, num_classes=0,
        dynamic_img_size=True, dynamic_img_pad=True,
    )  # fmt: skip
    return Segmenter(encoder, CLASSES, (0, 1, 2, 3), HeadConfig(16, 8), **args)


def maps(sizes: list[int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 24, size, size, generator=generator) for size in sizes]


def compare(ours: nn.Module, theirs: nn.Module, inputs: list[torch.Tensor], of_ours: Callable[..., Any]) -> float:
    """Copies our weights into theirs; the largest relative difference of outputs, inputs' and weights' gradients."""
    generator = torch.Generator().manual_seed(1)
    for tensor in (*ours.parameters(), *ours.buffers()):
        if tensor.is_floating_point():
            tensor.data.copy_(torch.rand(tensor.shape, generator=generator) / math.sqrt(tensor[0].numel() + 1) + 0.01)
    own, other = list(ours.state_dict().values()), theirs.state_dict()
    assert sorted(map(str, (t.shape for t in own))) == sorted(map(str, (t.shape for t in other.values())))
    pairs = dict(zip(order(ours), order(theirs), strict=True))
    theirs.load_state_dict({their_name: ours.state_dict()[name] for name, their_name in pairs.items()})
    results = []
    for module, arguments in ((ours, of_ours), (theirs, lambda x: (x,))):
        module.train()
        x = [entry.clone().requires_grad_() for entry in inputs]
        out = module(*arguments(x))
        (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
        results.append((out, x, dict(module.named_parameters())))
    (out, x, weights), (their_out, their_x, their_weights) = results
    tensors = [(out, their_out), *((a.grad, b.grad) for a, b in zip(x, their_x, strict=True) if a.grad is not None)]
    tensors += [(weight.grad, their_weights[pairs[name]].grad) for name, weight in weights.items()]
    assert len(tensors) > len(weights)
    return max(float((a - b).detach().norm() / b.detach().norm()) for a, b in tensors)


def order(module: nn.Module) -> list[str]:
    """Names of a head's tensors in an order that both libraries share."""
    roles = [
        "psp_modules",
        "pooled",
        "bottleneck",
        "lateral_convs",
        "fpn_convs",
        "convs",
        "fpn_bottleneck",
        "classifier",
    ]

    def key(name: str) -> tuple[object, ...]:
        first, _, rest = name.partition(".")
        role = "pooled" if first == "psp_modules" else first
        number = int(rest.split(".")[0]) if role in ("pooled", "lateral_convs", "fpn_convs") else 0
        norm = "batch_norm" in name or name.split(".")[-2] == "1"
        return roles.index(role), number, norm, name.rpartition(".")[2]

    return sorted(module.state_dict(), key=key)


@pytest.mark.holds("ade20k.2")
@pytest.mark.parametrize("sizes", [[16, 8, 4, 2], [28, 14, 7, 4]])
def test_upernets_head_is_transformers(sizes: list[int], figure: Any) -> None:
    config = UperNetConfig(hidden_size=16, pool_scales=[1, 2, 3, 6], num_labels=CLASSES)
    error = compare(UperNetHead(WIDTHS, 16, CLASSES), TheirHead(config, WIDTHS), maps(sizes), lambda x: (x,))
    figure(f"largest relative difference of a tensor {error:.1e}")
    assert error < 1e-5


@pytest.mark.holds("ade20k.2")
def test_the_auxiliary_head_is_transformers(figure: Any) -> None:
    config = UperNetConfig(auxiliary_channels=16, num_labels=CLASSES, auxiliary_in_channels=None)
    error = compare(FCNHead(24, 16, CLASSES), UperNetFCNHead(config, WIDTHS), maps([16, 8, 4, 2]), lambda x: (x[2],))
    figure(f"largest relative difference of a tensor {error:.1e}")
    assert error < 1e-5


def test_the_pyramids_strides_and_the_logits_size() -> None:
    model = segmenter().eval()
    strides = [32 / x.shape[-1] for x in model.forward_maps(torch.randn(1, 3, 32, 32))]
    assert strides == [2, 4, 8, 16]
    out = model(torch.randn(1, 3, 37, 50))
    assert out.logits.shape == (1, CLASSES, 37, 50)
    assert out.auxiliary is None
    trained = model.train()(torch.randn(2, 3, 32, 32))
    assert trained.auxiliary.shape == trained.logits.shape == (2, CLASSES, 32, 32)


def test_out_indices_are_the_blocks_outputs() -> None:
    model = segmenter().eval()
    seen: dict[int, torch.Tensor] = {}
    for i, block in enumerate(model.encoder.blocks):
        block.register_forward_hook(lambda _, __, out, i=i: seen.__setitem__(i, out))
    image = torch.randn(1, 3, 32, 32)
    third = model.forward_maps(image)[2]  # the pyramid leaves the third map as it is
    assert torch.equal(third, seen[2][:, 1:].transpose(1, 2).reshape(1, 32, 4, 4))


@pytest.mark.parametrize(
    "out_indices", [(0, 1, 2), (0, 1, 1, 3), (0, 1, 2, 4), (3, 2, 1, 0), (0, 1, 2, 2), (-1, 0, 1, 3)]
)
def test_out_indices_that_cannot_be(out_indices: tuple[int, ...]) -> None:
    encoder = timm.create_model("vit_tiny_patch16_224", depth=4, num_classes=0)
    with pytest.raises(ValueError, match="out_indices: wanted 4 ascending blocks up to the last, 3, got"):
        Segmenter(encoder, CLASSES, out_indices)
    with pytest.raises(ValueError, match=r"head\.width: wanted at least 1, got 0"):
        Segmenter(encoder, CLASSES, (0, 1, 2, 3), HeadConfig(width=0))


def test_the_loss_is_a_mean_over_all_pixels() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, auxiliary = torch.randn(2, 4, CLASSES, 3, 5, generator=generator).unbind()
    target = torch.randint(0, CLASSES, (4, 3, 5), generator=generator).to(torch.uint8)
    target[0, 0], target[3] = 255, 255
    by_hand = 0.0
    for weight, x in ((1.0, logits), (0.4, auxiliary)):
        for b, i, j in (target != 255).nonzero().tolist():
            by_hand -= weight * float(x[b, :, i, j].log_softmax(0)[int(target[b, i, j])]) / 60
    loss = segmentation_loss(SegmenterOutput(logits, auxiliary), target, 0.4, 255)
    assert float(loss) == pytest.approx(by_hand, rel=1e-5)
    halves = [
        segmentation_loss(SegmenterOutput(logits[h], auxiliary[h]), target[h], 0.4, 255)
        for h in (slice(0, 2), slice(2, 4))
    ]
    assert float(sum(halves) / 2) == pytest.approx(float(loss), rel=1e-6)
    assert float(segmentation_loss(SegmenterOutput(logits, auxiliary), torch.full_like(target, 255), 0.4, 255)) == 0


def test_every_parameter_has_its_scale_and_gets_a_gradient() -> None:
    model = segmenter()
    groups = parameter_groups(model, 0.05, 0.5)
    group_of = {id(p): group for group in groups for p in group["params"]}
    segmentation_loss(model(torch.randn(2, 3, 32, 32)), torch.zeros(2, 32, 32), 0.4, 255).backward()
    for name, parameter in model.named_parameters():
        part, _, rest = name.partition(".")
        power = 0
        if part == "encoder":
            power = 4 - int(rest.split(".")[1]) if rest.startswith("blocks") else 5
        group = group_of[id(parameter)]
        assert group["lr_scale"] == pytest.approx(0.5**power), name
        exempt = parameter.ndim == 1 or rest in ("cls_token", "pos_embed")
        assert group["weight_decay"] == (0.0 if exempt else 0.05), name
        assert parameter.grad is not None, name
