"""Images and masks cut, turned and resized together: training and evaluation transforms of segmentation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from sparsemae.data.masks import IGNORED
from sparsemae.options import MaskDataConfig

CROP_TRIES = 10


@dataclass(frozen=True)
class MaskTransform:
    """Changes an image and the classes of its pixels together."""

    steps: Callable[[Any, Any], Any]
    """Of ``tv_tensors``: an image uint8 ``[3, H, W]`` and a mask uint8 ``[H, W]``."""

    def __call__(self, image: Image.Image, classes: np.ndarray) -> tuple[Tensor, Tensor]:
        pixels, mask = mask_evaluation_transform(image, classes)
        pixels, mask = self.steps(tv_tensors.Image(pixels), tv_tensors.Mask(mask))
        return pixels.as_subclass(Tensor), mask.as_subclass(Tensor)


def mask_training_transform(options: MaskDataConfig) -> MaskTransform:
    """To ``img_size`` px, drawing from the global generators."""
    steps: list[Any] = [
        _RandomScale(options.short_side, options.long_side, options.scale),
        _RandomCrop(options.img_size, options.mean, options.cat_max_ratio),
        v2.RandomHorizontalFlip(options.hflip),
    ]
    return MaskTransform(v2.Compose([*steps, _Photometric(hue=(-0.1, 0.1))] if options.photometric else steps))


def mask_evaluation_transform(image: Image.Image, classes: np.ndarray) -> tuple[Tensor, Tensor]:
    """Both as they are, as tensors: a segmenter is measured on the pixels of the mask file."""
    return F.pil_to_tensor(image), torch.from_numpy(classes.copy())


def resized_size(height: int, width: int, short_side: float, long_side: float) -> tuple[int, int]:
    """Height and width with this shorter side, or a smaller one where the longer would pass ``long_side``."""
    factor = min(short_side / min(height, width), long_side / max(height, width))
    return max(1, round(height * factor)), max(1, round(width * factor))


class _RandomScale(v2.Transform):  # type: ignore[misc]
    """Resize both, the mask to the nearest pixel, by one scale."""

    def __init__(self, short_side: int, long_side: int, scale: tuple[float, float]) -> None:
        super().__init__()
        self.short_side, self.long_side, self.scale = short_side, long_side, scale

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        scale = float(torch.empty(()).uniform_(*self.scale))
        height, width = flat_inputs[0].shape[-2:]
        return {"size": resized_size(height, width, self.short_side * scale, self.long_side * scale)}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return self._call_kernel(F.resize, inpt, size=list(params["size"]), antialias=True)


class _RandomCrop(v2.RandomCrop):  # type: ignore[misc]
    """A crop with labels, of which no class has more than ``cat_max_ratio``, if it finds one.

    What is smaller than the crop is filled up, the image with the mean color, the mask with `IGNORED`.
    """

    def __init__(self, size: int, mean: Sequence[float], cat_max_ratio: float) -> None:
        fill = {tv_tensors.Image: [round(255 * value) for value in mean], tv_tensors.Mask: IGNORED}
        super().__init__(size, pad_if_needed=True, fill=fill)
        self.cat_max_ratio = cat_max_ratio

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        mask = next(entry for entry in flat_inputs if isinstance(entry, tv_tensors.Mask))
        for _ in range(CROP_TRIES):
            params: dict[str, Any] = super().make_params(flat_inputs)
            counts = torch.bincount(self.transform(mask, params).flatten().long(), minlength=IGNORED + 1)[:IGNORED]
            if 0 < counts.max() <= self.cat_max_ratio * counts.sum():
                break
        return params


class _Photometric(v2.RandomPhotometricDistort):  # type: ignore[misc]
    """torchvision's, without its permutation of the channels, which segmentation recipes do not have."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        return {**super().make_params(flat_inputs), "channel_permutation": None}
