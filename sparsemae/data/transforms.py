"""What is done to an image before the model sees it: settings, training and evaluation transforms, normalisation."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import posterize
from torch import Tensor
from torchvision import transforms

from sparsemae.data.sources import SourceConfig
from sparsemae.limits import ABOVE_0, AT_LEAST_0, AT_LEAST_1, BELOW_1, SHARE, UP_TO_1, check_limits


@dataclass
class DataConfig(SourceConfig):
    """Images, their preparation and their augmentation."""

    train_images: int | None = None
    """Use at most this many training images: a fixed random choice, of Fashion-MNIST the first; None: all."""
    max_unreadable: float = 0.001
    """Share of the training images that may turn out unreadable, each replaced by the next of its epoch, before the run
    stops; 0 stops at the first."""
    img_size: int = 224
    """Side of the model's input, px."""
    exif: bool = False
    """Turn images as their EXIF orientation says; the field does not. Goes with the model's file."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Channel means, for pixels in 0 to 1."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Channel standard deviations, for pixels in 0 to 1."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """Resampling of every resize."""
    crop: Literal["resized", "shift"] = "resized"
    """Training crop. resized: RandomResizedCrop; shift: resize to img_size, then shift by up to crop_shift px."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Area of a resized crop, as a share of the image."""
    crop_shift: int = 1
    """Largest shift, px."""
    hflip: float = 0.5
    """Probability of a horizontal flip."""
    auto_augment: str | None = None
    """timm's policy string, for example rand-m9-mstd0.5-inc1."""
    eval_crop: float = 0.875
    """Evaluation: the shorter side is resized to img_size / eval_crop px, then the centre is cropped."""

    def __post_init__(self) -> None:
        shares = {"max_unreadable": BELOW_1, "crop_scale": UP_TO_1, "hflip": SHARE, "eval_crop": UP_TO_1}
        check_limits(self, "data.", img_size=AT_LEAST_1, crop_shift=AT_LEAST_0, std=ABOVE_0, **shares)


def training_transform(data: DataConfig) -> Any:
    """PIL image to uint8 ``[3, H, W]``, drawing from the global generators."""
    if data.crop == "resized":
        transform = create_transform(
            data.img_size, is_training=True, scale=data.crop_scale, hflip=data.hflip, color_jitter=0.0,
            auto_augment=data.auto_augment, interpolation=data.interpolation, mean=data.mean, use_prefetcher=True,
        )  # fmt: skip
        _mend_posterize(transform)
        return transform
    if data.auto_augment:
        raise ValueError(f"data.auto_augment: wanted none with data.crop=shift, got {data.auto_augment}")
    return transforms.Compose(
        [
            transforms.Resize((data.img_size, data.img_size), transforms.InterpolationMode(data.interpolation)),
            _RandomShift(data.crop_shift),
            transforms.RandomHorizontalFlip(data.hflip),
            transforms.PILToTensor(),
        ]
    )


def _mend_posterize(transform: Any) -> None:
    """Let timm's policies keep 0 bits of an image, as they do at full magnitude: Pillow 13 refuses it.

    ``rand-m9-mstd0.5-inc1`` draws that for one image in 700.
    """
    for step in transform.transforms:
        policies = [getattr(step, "ops", ()), *getattr(step, "policy", ())]
        for operation in (operation for policy in policies for operation in policy):
            if operation.name.startswith("Posterize"):
                operation.aug_fn = _posterize


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    return posterize(image, bits) if bits else Image.new(image.mode, image.size)  # type: ignore[no-any-return]


class _RandomShift:
    """Move a PIL image by up to ``pixels`` each way, black where it leaves: RandomCrop(padding), in one PIL call."""

    def __init__(self, pixels: int) -> None:
        self.pixels = pixels

    def __call__(self, image: Image.Image) -> Image.Image:
        x, y = (random.randint(-self.pixels, self.pixels) for _ in range(2))
        return image.transform(image.size, Image.Transform.AFFINE, (1, 0, x, 0, 1, y))


def evaluation_transform(img_size: int, interpolation: str, eval_crop: float) -> Any:
    """PIL image to uint8 ``[3, H, W]``: resize the shorter side to ``img_size / eval_crop``, crop the centre."""
    return create_transform(
        img_size, is_training=False, interpolation=interpolation, crop_pct=eval_crop, use_prefetcher=True
    )


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 ``[B, 3, H, W]`` to float32 of mean 0 and deviation 1, on the images' device.

    The batch travels from the workers, and to the device, as bytes: a quarter of the floats.
    """
    middle, scale = (255 * torch.tensor(values, device=images.device).view(1, 3, 1, 1) for values in (mean, std))
    return images.float().sub_(middle).div_(scale)  # in place: a third of the time on a CPU
