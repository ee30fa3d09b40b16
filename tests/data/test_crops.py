"""Crops that are resized on the device: the loader's draws, its pixels to a rounding, and a whole training."""

import json
import random
from pathlib import Path
from typing import Any

import photographs
import pytest
import torch
from conftest import Figure, tiny
from PIL import Image

from sparsemae.cli import main
from sparsemae.data.crops import Crops
from sparsemae.data.dataset import ImageDataset
from sparsemae.data.jpeg import decoded_by
from sparsemae.data.loader import batches
from sparsemae.data.sampling import BatchPlan, TrainingSampler
from sparsemae.data.sources import open_source
from sparsemae.data.transforms import training_transform
from sparsemae.options.data import ImageDataConfig


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 JPEGs of 500 x 375 px in class folders."""
    folder = tmp_path_factory.mktemp("jpegs")
    photographs.make(folder, 20)
    return folder / "folder"


def images_of(options: ImageDataConfig, workers: int = 0) -> tuple[torch.Tensor, type]:
    """Those of two epochs as a training has them, and the type of what its loader gives."""
    source = open_source(options, "train")
    dataset = ImageDataset(decoded_by(options.jpeg, source), training_transform(options))
    sampler = TrainingSampler(BatchPlan.make(len(source), 4, None, 1), 0, 0, 0, 8)
    found = [batch["image"] for batch in batches(dataset, sampler, workers)]
    return torch.cat([images.to("cpu") for images in found]), type(found[0])


@pytest.mark.holds("fast.8")
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("jpeg", ["pillow", "torchvision"])
def test_pixels_are_the_references_to_a_rounding(jpeg: Any, interpolation: str, jpegs: Path, figure: Figure) -> None:
    options: dict[str, Any] = {"source": "folder", "root": str(jpegs), "img_size": 96, "interpolation": interpolation}
    wanted, kind = images_of(ImageDataConfig(**options))
    assert kind is torch.Tensor
    for workers in (0, 1):
        got, kind = images_of(ImageDataConfig(**options, jpeg=jpeg, resize_on="device"), workers)
        assert kind is Crops
        assert got.shape == wanted.shape
        assert got.dtype == torch.uint8
        differences = (got.float() - wanted.float()).abs().mean(dim=(1, 2, 3))
        assert differences.max() < 1
        assert sum(map(torch.equal, got, wanted)) < len(got)  # else it would be the loader's own resize
    figure(f"{jpeg}, {interpolation}: {differences.mean():.3f} of 255 in the mean, at most {differences.max():.3f}")


@pytest.mark.slow
def test_a_training_sees_the_same_crops_and_resumes(jpegs: Path, tmp_path: Path) -> None:
    def losses(name: str, *more: str) -> list[float]:
        where = [
            "--data.source",
            "folder",
            "--data.root",
            str(jpegs),
            "--data.img_size",
            "28",
            "--trainer.global_batch",
            "4",
            "--data.crop",
            "resized",
            *more,
        ]
        main(tiny("pretrain", tmp_path / name, *where))
        rows = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        return [row["loss"] for row in rows if "loss" in row]

    device = ("--data.resize_on", "device")
    here, there = losses("loader"), losses("whole", *device)
    assert len(there) == len(here)
    assert there == pytest.approx(here, abs=0.01)
    losses("resumed", *device, "--trainer.max_steps", "1")
    assert losses("resumed", *device) == there


@pytest.mark.parametrize("option", ["auto_augment", "crop"])
def test_what_wants_the_resized_image_is_refused(option: str) -> None:
    other: Any = {"auto_augment": "rand-m9-mstd0.5-inc1", "crop": "shift"}[option]
    with pytest.raises(ValueError, match=rf"^data\.resize_on: wanted loader with data\.{option}.*, got device$"):
        ImageDataConfig(resize_on="device", **{option: other})


def test_large_crops_are_resized_by_the_loader_and_tiny_ones_have_a_pixel() -> None:
    transform = training_transform(ImageDataConfig(img_size=8, crop_scale=(0.9, 1.0), resize_on="device"))
    for width, height, large in ((200, 200, True), (20, 20, False), (1, 1, False)):
        for seed in range(50):
            torch.manual_seed(seed)
            random.seed(seed)
            crop, target = transform(Image.new("RGB", (width, height), (9, 8, 7)), 3)
            assert target == 3
            assert (crop.pixels.shape == (8, 8, 3)) == large
            assert crop.pixels.numel() >= 3
            assert (Crops.of([crop]).to("cpu")[0, :, 0, 0] == torch.tensor([9, 8, 7])).all()
