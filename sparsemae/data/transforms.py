"""What is done to an image before the model sees it: training and evaluation transforms, and normalization."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import posterize
from torch import Tensor
from torchvision import transforms

from sparsemae.card import InputSpec
from sparsemae.data.crops import Crop, resized
from sparsemae.data.images import center_crop
from sparsemae.data.jpeg import Decoded
from sparsemae.options import ImageDataConfig


@dataclass(frozen=True)
class ImageTransform:
    """Changes the image and passes its class on."""

    steps: Callable[[Image.Image], Any]
    """PIL image to uint8 ``[3, H, W]``, an array or a tensor."""

    def __call__(self, image: Image.Image, target: Any) -> tuple[Tensor, Any]:
        return torch.as_tensor(self.steps(image)), target


LARGEST_CROP = 16
"""Pixels of a crop for each that it will have; of larger ones a batch would be of gigabytes: a loader resizes them."""


@dataclass(frozen=True)
class CropTransform:
    """Cuts out what the device will resize, with the draws of an `ImageTransform`, and passes the image's class on."""

    crop: Any
    """RandomResizedCropAndInterpolation."""
    options: ImageDataConfig

    def __call__(self, image: Image.Image | Decoded, target: Any) -> tuple[Crop, Any]:
        given, options = image.pixels if isinstance(image, Decoded) else image, self.options
        top, left, height, width = self.crop.get_params(given, self.crop.scale, self.crop.ratio)
        top, left = min(top, image.height - 1), min(left, image.width - 1)  # a part of a tiny image may have no pixel
        height, width = max(height, 1), max(width, 1)
        if isinstance(image, Decoded):
            part = image.part((top, left, height, width))
        else:
            part = torch.from_numpy(np.array(image.crop((left, top, left + width, top + height))))
        if height * width > LARGEST_CROP * options.img_size**2:
            part = resized(part, options.img_size, options.interpolation).permute(1, 2, 0)
        return Crop(part, bool(torch.rand(1) < options.hflip), options.img_size, options.interpolation), target


def training_transform(options: ImageDataConfig) -> ImageTransform | CropTransform:
    """To ``img_size`` px, drawing from the global generators. Raises ValueError on an unknown policy."""
    if options.crop == "resized":
        try:
            steps = create_transform(
                options.img_size, is_training=True, scale=options.crop_scale, hflip=options.hflip, color_jitter=0.0,
                auto_augment=options.auto_augment, interpolation=options.interpolation, mean=options.mean,
                use_prefetcher=True,
            )  # fmt: skip
        except Exception as error:  # timm reads its policy with assertions, and as numbers what follows a letter
            raise ValueError(f"data.auto_augment: wanted a policy of timm's, got {options.auto_augment!r}") from error
        _patch_posterize(steps)
        if options.resize_on == "device":
            return CropTransform(steps.transforms[0], options)
        steps.transforms[0] = _FirstStep(steps.transforms[0], options)
        return ImageTransform(steps)
    return ImageTransform(
        transforms.Compose(
            [
                _FirstStep(_center_crop(options.img_size, 1.0, options.interpolation), options),
                _RandomShift(options.crop_shift),
                transforms.RandomHorizontalFlip(options.hflip),
                transforms.PILToTensor(),
            ]
        )
    )


def _patch_posterize(steps: Any) -> None:
    """Let timm's policies keep 0 bits of an image, as they do at full magnitude: Pillow 13 refuses it.

    ``rand-m9-mstd0.5-inc1`` draws that for one image in 700.
    """
    for step in steps.transforms:
        policies = [getattr(step, "ops", ()), *getattr(step, "policy", ())]
        for operation in (operation for policy in policies for operation in policy):
            if operation.name.startswith("Posterize"):
                operation.aug_fn = _posterize


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    return posterize(image, bits) if bits else Image.new(image.mode, image.size)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class _FirstStep:
    """To a PIL image of ``img_size`` px, drawn alike whichever library has decoded it."""

    step: Any
    """That of a PIL image: RandomResizedCropAndInterpolation, or `_center_crop`."""
    options: ImageDataConfig

    def __call__(self, image: Image.Image | Decoded) -> Image.Image:
        if isinstance(image, Image.Image):
            return self.step(image)  # type: ignore[no-any-return]
        if self.options.crop == "shift":
            whole = image.part((0, 0, image.height, image.width))
            return self.step(Image.fromarray(whole.numpy()))  # type: ignore[no-any-return]
        box = self.step.get_params(image.pixels, self.step.scale, self.step.ratio)
        return image.resized(box, self.options.img_size, self.options.interpolation)


class _RandomShift:
    """Move a PIL image by up to ``pixels`` each way, black where it leaves: RandomCrop(padding), in one PIL call."""

    def __init__(self, pixels: int) -> None:
        self.pixels = pixels

    def __call__(self, image: Image.Image) -> Image.Image:
        x, y = (random.randint(-self.pixels, self.pixels) for _ in range(2))
        return image.transform(image.size, Image.Transform.AFFINE, (1, 0, x, 0, 1, y))


def evaluation_transform(spec: InputSpec) -> ImageTransform:
    """Resize the shorter side to ``img_size / crop_pct`` px, crop the center."""
    crop = _center_crop(spec.img_size, spec.crop_pct, spec.interpolation)
    return ImageTransform(transforms.Compose([crop, transforms.PILToTensor()]))


def _center_crop(side: int, crop_pct: float, interpolation: str) -> Callable[[Image.Image], Image.Image]:
    return partial(center_crop, height=side, width=side, crop_pct=crop_pct, interpolation=interpolation)


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 ``[B, 3, H, W]`` to float32 of mean 0 and standard deviation 1, on the images' device.

    The batch travels from the workers, and to the device, as bytes: a quarter of the floats.
    """
    middle, scale = _bytes_of(mean, images), _bytes_of(std, images)
    return images.float().sub_(middle).div_(scale)  # in place: a third of the time on a CPU


def denormalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """The inverse of `normalize`; what lies beyond bytes is clipped."""
    return (images * _bytes_of(std, images) + _bytes_of(mean, images)).round().clamp(0, 255).byte()


def _bytes_of(values: Sequence[float], images: Tensor) -> Tensor:
    """A fraction for each channel as ``[1, 3, 1, 1]``, 0 to 255; filled on the device: a copy would wait for it."""
    return 255 * torch.stack([torch.full((1, 1), value, device=images.device) for value in values]).unsqueeze(0)
