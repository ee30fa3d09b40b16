"""A segmenter: a ViT read at four depths, and a head over these maps: UperNet's over a pyramid, or a light one.

UperNet: the ViT's four maps all have the patch's stride. Transposed convolutions bring the first two to a quarter and
a half of it, max pooling the last to twice: strides 4, 8, 16, 32 for patches of 16 px (as BEiT and MAE do). The head is
UperNet (Xiao et al., arXiv 1807.10221): pyramid pooling on the coarsest map, then a feature pyramid. An auxiliary FCN
head on the third map helps training and is not run otherwise. The appendix names neither the head nor its channels.

The light ones (`light_heads`) read the same maps as they are.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from sparsemae.models.light_heads import LinearHead, SegFormerHead
from sparsemae.options import HeadConfig

POOL_SCALES = (1, 2, 3, 6)
AUXILIARY_MAP = 2
MAPS = 4


class SegmenterOutput(NamedTuple):
    """Logits float32 ``[B, C, H, W]`` at the size of the images."""

    logits: Tensor
    auxiliary: Tensor | None
    """Of the auxiliary head, in training; else None."""


class Segmenter(nn.Module):
    """A timm ViT with a head over four of its maps.

    Args:
        encoder: a timm ViT without a head. Its last norm is taken out, because all maps are read before it; but the
            linear head, which reads the last one alone, reads it after that norm.
        out_indices: blocks after which it is read, counted from 0; the last must be its last.

    Raises:
        ValueError: on out_indices that are not four ascending blocks.
    """

    def __init__(
        self,
        encoder: VisionTransformer,
        num_classes: int,
        out_indices: Sequence[int] = (3, 5, 7, 11),
        head: HeadConfig | None = None,
    ) -> None:
        super().__init__()
        head = head or HeadConfig()
        last, width = len(encoder.blocks) - 1, encoder.embed_dim
        indices = list(out_indices)
        if len(indices) != MAPS or sorted({*indices}) != indices or indices[0] < 0 or indices[-1] != last:
            raise ValueError(f"out_indices: wanted {MAPS} ascending blocks up to the last, {last}, got {indices}")
        encoder.fc_norm = nn.Identity()
        if head.kind != "linear":
            encoder.norm = nn.Identity()
        self.encoder, self.out_indices, self.head = encoder, indices, head
        self.pyramid: Pyramid | None = None
        self.auxiliary_head: FCNHead | None = None
        self.decode_head: LinearHead | SegFormerHead | UperNetHead
        if head.kind == "linear":
            self.decode_head = LinearHead(width, num_classes, head.dropout)
        elif head.kind == "segformer":
            eps = encoder.blocks[0].norm1.eps
            self.decode_head = SegFormerHead(width, MAPS, head.width, num_classes, head.dropout, eps)
        else:
            self.pyramid = Pyramid(width)
            self.decode_head = UperNetHead([width] * MAPS, head.width, num_classes, head.dropout)
            self.auxiliary_head = FCNHead(width, head.auxiliary_width, num_classes, head.dropout)
            part: UperNetHead | FCNHead
            for part in (self.decode_head, self.auxiliary_head):
                _init(part)

    def forward(self, images: Tensor) -> SegmenterOutput:
        """Normalized images ``[B, 3, H, W]``; an encoder with dynamic_img_pad takes any size."""
        (height, width), (p, q) = images.shape[-2:], self.encoder.patch_embed.patch_size
        padded = [-(-height // p) * p, -(-width // q) * q]

        def to_image(logits: Tensor) -> Tensor:
            resized = F.interpolate(logits.float(), size=padded, mode="bilinear", align_corners=False)
            return resized[..., :height, :width]

        maps = self.forward_maps(images)
        extra = self.auxiliary_head if self.training else None
        auxiliary = None if extra is None else to_image(extra(maps[AUXILIARY_MAP]))
        return SegmenterOutput(to_image(self.decode_head(maps)), auxiliary)

    def forward_maps(self, images: Tensor) -> list[Tensor]:
        """Maps ``[B, D, h, w]`` of those blocks; for UperNet from a quarter of the patch's stride to twice it."""
        maps: list[Tensor] = self.encoder.forward_intermediates(
            images, indices=self.out_indices, norm=self.head.kind == "linear", output_fmt="NCHW",
            intermediates_only=True,
        )  # fmt: skip
        pyramid: list[Tensor] = maps if self.pyramid is None else self.pyramid(maps)
        return pyramid


def segmentation_loss(output: SegmenterOutput, target: Tensor, auxiliary_weight: float, ignore: int) -> Tensor:
    """Cross-entropy of both heads, averaged over *all* pixels of ``target [B, H, W]``, ignored ones included.

    So (as mmsegmentation does) neither accumulation nor the number of processes changes it, and a batch without a label
    gives 0.
    """

    def mean(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits, target.long(), ignore_index=ignore, reduction="sum") / target.numel()

    loss = mean(output.logits)
    return loss if output.auxiliary is None else loss + auxiliary_weight * mean(output.auxiliary)


class Pyramid(nn.Module):
    """Four maps of one stride ``[B, D, h, w]`` to a quarter, a half, once and twice that stride."""

    def __init__(self, width: int) -> None:
        super().__init__()

        def halve_stride() -> nn.Module:
            return nn.ConvTranspose2d(width, width, 2, stride=2)

        self.scales = nn.ModuleList(
            [
                nn.Sequential(halve_stride(), nn.BatchNorm2d(width), nn.GELU(), halve_stride()),
                halve_stride(),
                nn.Identity(),
                nn.MaxPool2d(2, ceil_mode=True),
            ]
        )

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        return [scale(x) for scale, x in zip(self.scales, maps, strict=True)]


class UperNetHead(nn.Module):
    """Maps from fine to coarse to logits ``[B, C, h, w]`` at the finest's size."""

    def __init__(self, in_channels: Sequence[int], width: int, num_classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        *finer, coarsest = in_channels
        self.pooled = nn.ModuleList(
            [nn.Sequential(nn.AdaptiveAvgPool2d(scale), _conv_norm(coarsest, width, 1)) for scale in POOL_SCALES]
        )
        self.bottleneck = _conv_norm(coarsest + len(POOL_SCALES) * width, width, 3)
        self.lateral_convs = nn.ModuleList([_conv_norm(channels, width, 1) for channels in finer])
        self.fpn_convs = nn.ModuleList([_conv_norm(width, width, 3) for _ in finer])
        self.fpn_bottleneck = _conv_norm(len(in_channels) * width, width, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(width, num_classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        *finer, coarsest = maps
        pooled = [_resize(branch(coarsest), coarsest) for branch in self.pooled]
        top = self.bottleneck(torch.cat([coarsest, *pooled], dim=1))
        laterals = [conv(x) for conv, x in zip(self.lateral_convs, finer, strict=True)] + [top]
        for i in range(len(laterals) - 1, 0, -1):
            laterals[i - 1] = laterals[i - 1] + _resize(laterals[i], laterals[i - 1])
        levels = [conv(x) for conv, x in zip(self.fpn_convs, laterals[:-1], strict=True)] + [top]
        fused = self.fpn_bottleneck(torch.cat([_resize(level, levels[0]) for level in levels], dim=1))
        logits: Tensor = self.classifier(self.dropout(fused))
        return logits


class FCNHead(nn.Module):
    """One map to logits ``[B, C, h, w]`` of its size."""

    def __init__(self, in_channels: int, width: int, num_classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.convs = _conv_norm(in_channels, width, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(width, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.dropout(self.convs(x)))
        return logits


def _conv_norm(in_channels: int, out_channels: int, side: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, side, padding=side // 2, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    )


def _init(head: UperNetHead | FCNHead) -> None:
    for module in head.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    nn.init.normal_(head.classifier.weight, std=0.01)
    assert head.classifier.bias is not None
    nn.init.zeros_(head.classifier.bias)


def _resize(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=False)
