"""Transforms of images are timm's where timm has them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from sparsemae.card import InputSpec
from sparsemae.config import read_config, recipe_names
from sparsemae.data.sampling import seeding
from sparsemae.data.transforms import evaluation_transform, normalize, training_transform
from sparsemae.jobs import training_jobs
from sparsemae.options.data import ImageDataConfig


def test_the_evaluation_transform_is_timms(image_folder: Path) -> None:
    image = Image.open(image_folder / "val" / "cat" / "0.png").convert("RGB")
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    wanted = create_transform(32, interpolation="bicubic", crop_pct=0.875, mean=mean, std=std)(image)
    got = evaluation_transform(InputSpec(32, mean, std, "bicubic", 0.875))(image, 3)[0]
    assert got.dtype == torch.uint8
    torch.testing.assert_close(normalize(got[None], mean, std)[0], wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("policy", [None, "rand-m9-mstd0.5-inc1"])
@pytest.mark.holds("fast.9")
def test_the_training_transform_is_timms(policy: str | None) -> None:
    """Without a wish for anything faster, bit for bit."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8))
    data = ImageDataConfig(img_size=32, auto_augment=policy)
    theirs = create_transform(
        32, is_training=True, scale=data.crop_scale, hflip=0.5, color_jitter=0.0, auto_augment=policy,
        interpolation="bicubic", mean=data.mean, use_prefetcher=True,
    )  # fmt: skip
    ours: Any = training_transform(data)
    for seed in range(10):
        both = []
        for transform in (lambda x: torch.as_tensor(theirs(x)), lambda x: ours(x, 0)[0]):
            with seeding(seed, [(0, 0)]) as keys:
                both += [transform(image) for _ in keys]
        assert torch.equal(*both)


@pytest.mark.holds("fast.9")
def test_recipes_keep_the_reference_pipeline() -> None:
    configs = [read_config(kind, ["--config", name]) for name in recipe_names() for job, kind in training_jobs().items()
               if job in name]  # fmt: skip
    choices = [(data.jpeg, data.resize_on) for data in (c.data for c in configs) if isinstance(data, ImageDataConfig)]
    assert len(choices) > 5
    assert set(choices) == {(ImageDataConfig().jpeg, ImageDataConfig().resize_on)} == {("pillow", "loader")}


def test_shift_moves_by_at_most_the_pixels_given_and_fills_with_black() -> None:
    transform: Any = training_transform(ImageDataConfig(img_size=8, crop="shift", crop_shift=1, hflip=0.0))
    pixels = np.arange(1, 65, dtype=np.uint8).reshape(8, 8)
    seen = set()
    for _ in range(200):
        moved = transform(Image.fromarray(pixels).convert("RGB"), 0)[0][0].numpy()
        padded = np.pad(pixels, 1)
        matches = [(y, x) for y in range(3) for x in range(3) if (padded[y : y + 8, x : x + 8] == moved).all()]
        assert len(matches) == 1
        seen.add(matches[0])
    assert len(seen) == 9


@pytest.mark.parametrize("size", [(40, 20), (21, 33), (28, 28)])
def test_shift_sees_what_an_evaluation_sees(size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    options = ImageDataConfig(img_size=16, crop="shift", crop_shift=0, hflip=0.0)
    wanted = evaluation_transform(InputSpec(16, options.mean, options.std, options.interpolation, crop_pct=1.0))
    for transform in (training_transform(options), wanted):
        assert torch.equal(transform(Image.fromarray(pixels), 0)[0], wanted(Image.fromarray(pixels), 0)[0])


def test_randaugment_at_full_magnitude_keeps_no_bits_as_it_did() -> None:
    """Pillow 13 refuses to posterize to 0 bits, which timm asks of one image in 700; Pillow 12 gave black."""
    transform: Any = training_transform(ImageDataConfig(auto_augment="rand-m10-inc1-n15", img_size=8))
    image = Image.new("RGB", (8, 8), (200, 100, 50))
    operations = [op for step in transform.steps.transforms for op in getattr(step, "ops", ())]
    (posterize,) = [op for op in operations if op.name == "PosterizeIncreasing"]
    posterize.prob = 1.0
    assert np.asarray(posterize(image)).max() == 0
    posterize.magnitude = 5  # 2 bits
    assert np.asarray(posterize(image))[0, 0].tolist() == [192, 64, 0]
