"""Training crops that are resized and flipped on the device: a loader process only decodes, and cuts out.

The draws, and so the crops, are those of `training_transform`; pixels differ from Pillow's by less than 1 of 255 in the
mean, since torchvision resizes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F


@dataclass(frozen=True)
class Crop:
    """A part of an image, and what is still to be done to it."""

    pixels: Tensor
    """uint8 ``[H, W, 3]``."""
    flipped: bool
    """Whether left and right will change places."""
    side: int
    """Its height and width then, px."""
    interpolation: str
    """bicubic or bilinear."""


@dataclass(frozen=True)
class Crops:
    """A batch of crops; moved to a device it becomes the batch of images."""

    pixels: Tensor
    """uint8 ``[N]``, the crops end to end."""
    shapes: tuple[torch.Size, ...]
    flipped: tuple[bool, ...]
    side: int
    interpolation: str

    @classmethod
    def of(cls, crops: Sequence[Crop]) -> Crops:
        """Those of a loader's samples, which agree in side and interpolation."""
        return cls(
            torch.cat([crop.pixels.flatten() for crop in crops]), tuple(crop.pixels.shape for crop in crops),
            tuple(crop.flipped for crop in crops), crops[0].side, crops[0].interpolation,
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.shapes)

    def pin_memory(self) -> Crops:
        """For torch's `DataLoader`."""
        return replace(self, pixels=self.pixels.pin_memory())

    def to(self, device: torch.device | str) -> Tensor:
        """uint8 ``[B, 3, side, side]`` there."""
        parts = torch.split(self.pixels.to(device, non_blocking=True), [shape.numel() for shape in self.shapes])
        images = [resized(part.view(shape), self.side, self.interpolation)
                  for part, shape in zip(parts, self.shapes, strict=True)]  # fmt: skip
        return torch.stack([image.flip(-1) if flip else image
                            for image, flip in zip(images, self.flipped, strict=True)])  # fmt: skip


def resized(pixels: Tensor, side: int, interpolation: str) -> Tensor:
    """uint8 ``[H, W, 3]`` by torchvision to ``[3, side, side]``, on the same device."""
    part = pixels.contiguous().permute(2, 0, 1).unsqueeze(0)  # as the bytes lie: half the time of a view's
    images: Tensor = F.resize(part, [side, side], F.InterpolationMode(interpolation), antialias=True)
    return images[0]
