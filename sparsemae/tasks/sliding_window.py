"""How a segmenter looks at an image: at once or by a sliding window, at one scale or several.

Images are resized to the short side of the training, predictions back to the images' own size.
"""

import itertools
from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as transforms

from sparsemae.card import InputSpec
from sparsemae.data.mask_transforms import resized_size
from sparsemae.data.transforms import normalize
from sparsemae.options import InferenceConfig

Network = Callable[[Tensor], Tensor]
"""Normalized images ``[B, 3, H, W]`` to logits ``[B, C, H, W]``."""


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows of a side start along a length; the last ends with it, and a shorter length has one."""
    last = max(length - window, 0)
    return [*range(0, last, stride), last]


def slide(network: Network, images: Tensor, window: int, stride: int) -> Tensor:
    """Logits ``[B, C, H, W]``, the mean of all windows over a pixel. What is smaller than a window is one by itself."""
    height, width = images.shape[-2:]
    total, count = None, images.new_zeros(1, 1, height, width)
    for top, left in itertools.product(window_starts(height, window, stride), window_starts(width, window, stride)):
        part = (..., slice(top, top + window), slice(left, left + window))
        logits = network(images[part])
        if total is None:
            total = logits.new_zeros(*logits.shape[:2], height, width)
        total[part] += logits
        count[part] += 1
    assert total is not None
    return total / count


def resized(height: int, width: int, spec: InputSpec, scale: float) -> tuple[int, int]:
    """Size at which a network sees an image."""
    assert spec.short_side is not None
    assert spec.long_side is not None
    return resized_size(height, width, spec.short_side * scale, spec.long_side * scale)


def predict_scores(network: Network, images: Tensor, spec: InputSpec, inference: InferenceConfig) -> Tensor:
    """Scores ``[B, C, H, W]`` of bytes ``[B, 3, H, W]`` at their own size: their argmax is the prediction.

    One view's are its logits; of several scales and mirrored images it is the mean of their probabilities.
    """
    height, width = size = images.shape[-2:]
    inference = inference.of_window(spec.img_size)
    assert inference.stride is not None
    views = [(scale, flip) for scale in inference.scales for flip in (False, True)[: 1 + inference.flip]]
    total = None
    for scale, flip in views:
        view = transforms.resize(images, list(resized(height, width, spec, scale)), antialias=True)
        view = normalize(view.flip(-1) if flip else view, spec.mean, spec.std)
        logits = slide(network, view, spec.img_size, inference.stride) if inference.mode == "slide" else network(view)
        logits = F.interpolate(logits.flip(-1) if flip else logits, size=size, mode="bilinear", align_corners=False)
        if len(views) == 1:
            return logits
        probabilities = logits.softmax(dim=1) / len(views)
        total = probabilities if total is None else total.add_(probabilities)
    assert total is not None
    return total
