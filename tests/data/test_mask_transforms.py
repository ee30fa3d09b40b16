"""Pairs are found, cut and turned together, and are functions of seed, epoch and index alone."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from sparsemae.data import embedded
from sparsemae.data.dataset import ImageDataset, Unreadable
from sparsemae.data.loader import UnreadableImages, batches
from sparsemae.data.mask_transforms import mask_evaluation_transform, mask_training_transform, resized_size
from sparsemae.data.pairs import open_masks
from sparsemae.data.sampling import BatchPlan, TrainingSampler
from sparsemae.data.sources import Source
from sparsemae.options.data import MaskDataConfig


def scene(root: Path, train: int = 4, val: int = 2, size: tuple[int, int] = (60, 44), values: int = 151) -> Path:
    """A folder laid out as SceneParse150; the image's red channel is the mask's value."""
    generator = np.random.default_rng(0)
    for split, count in (("training", train), ("validation", val)):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for i in range(count):
            mask = (
                generator.integers(0, values, (size[1] // 4, size[0] // 4)).repeat(4, 0).repeat(4, 1).astype(np.uint8)
            )
            pixels = np.stack([mask, mask, np.full_like(mask, 90)], axis=-1)
            Image.fromarray(pixels).save(root / "images" / split / f"ADE_{i:08d}.png")
            Image.fromarray(mask).save(root / "annotations" / split / f"ADE_{i:08d}.png")
    return root


def files(source: Source) -> set[str]:
    return {source.filename(i) for i in range(len(source))}


def config(root: Path, **options: Any) -> MaskDataConfig:
    usual: dict[str, Any] = {"img_size": 32, "short_side": 44, "photometric": False, "workers": 0}
    return MaskDataConfig("sceneparse", str(root), **(usual | options))


def sample_of(dataset: ImageDataset, epoch: int, index: int) -> dict[str, Any]:
    sample = dataset[epoch, index]
    assert not isinstance(sample, Unreadable), sample.reason
    return sample


@pytest.mark.parametrize("inside", ["", "ADEChallengeData2016"])
def test_sceneparse_as_downloaded(tmp_path: Path, inside: str) -> None:
    scene(tmp_path / inside)
    train, val = (open_masks(config(tmp_path), split) for split in ("train", "val"))
    assert train.legend is not None
    assert (len(train), len(val), len(train.legend.class_names)) == (4, 2, 150)
    image, classes = train.read(1)
    red = np.asarray(image)[..., 0].astype(int)
    assert np.array_equal(classes, np.where(red == 0, 255, red - 1))
    assert len(open_masks(config(tmp_path), "train", 3)) == 3


def test_a_users_folder_without_splits_holds_out_a_tenth(tmp_path: Path) -> None:
    scene(tmp_path / "a", train=20)
    root = tmp_path / "mine"
    root.mkdir()
    for kind, name in (("images", "images"), ("annotations", "masks")):
        (tmp_path / "a" / kind / "training").rename(root / name)
    (tmp_path / "classes.txt").write_text("".join(f"c{i}\n" for i in range(151)))
    data = MaskDataConfig("folder", str(root), classes=str(tmp_path / "classes.txt"))
    train, val = (files(open_masks(data, split)) for split in ("train", "val"))
    assert (len(train), len(val), train & val) == (18, 2, set())


@pytest.mark.parametrize(("scale", "wanted"), [(1.0, 1.0), (2.0, 0.5)])
def test_image_and_mask_are_cut_and_turned_together(tmp_path: Path, scale: float, wanted: float) -> None:
    data = config(scene(tmp_path, values=150), scale=(scale, scale), cat_max_ratio=1.0)
    dataset = ImageDataset(open_masks(data, "train"), mask_training_transform(data))
    flipped = set()
    for epoch in range(8):
        sample = sample_of(dataset, epoch, 0)
        image, target = sample["image"], sample["target"]
        assert (image.shape, target.shape, image.dtype, target.dtype) == (
            (3, 32, 32),
            (32, 32),
            torch.uint8,
            torch.uint8,
        )
        value = torch.where(target == 255, 0, target.int() + 1)
        near = (image[0].int() - value).abs() <= 2  # a resized image blends its squares at their edges
        assert near.float().mean() >= wanted
        flipped.add(image.numpy().tobytes())
    assert len(flipped) == 8


def test_samples_are_functions_of_seed_epoch_and_index(tmp_path: Path) -> None:
    data = config(scene(tmp_path), photometric=True)
    one, two = (ImageDataset(open_masks(data, "train"), mask_training_transform(data), seed=5) for _ in range(2))
    two[3, 1], two[0, 0]
    a, b = sample_of(one, 2, 1), sample_of(two, 2, 1)
    assert torch.equal(a["image"], b["image"])
    assert torch.equal(a["target"], b["target"])
    other = sample_of(ImageDataset(open_masks(data, "train"), mask_training_transform(data), seed=6), 2, 1)
    assert not torch.equal(a["image"], other["image"])


def test_small_images_are_filled_up(tmp_path: Path) -> None:
    data = config(scene(tmp_path), scale=(0.25, 0.25))
    sample = sample_of(ImageDataset(open_masks(data, "train"), mask_training_transform(data)), 0, 0)
    filled = sample["target"] == 255
    mean = torch.tensor([round(255 * value) for value in data.mean], dtype=torch.uint8)
    assert 0.3 < filled.float().mean() < 0.95
    corners = sample["image"][:, [0, 0, -1, -1], [0, -1, 0, -1]].T
    assert any(torch.equal(corner, mean) for corner in corners)


def test_crops_of_one_class_are_drawn_anew(tmp_path: Path) -> None:
    root = scene(tmp_path, train=1, size=(320, 64))
    mask = np.ones((64, 320), np.uint8)
    mask[:, 280:] = 2  # one class on seven eighths
    Image.fromarray(mask).save(next((root / "annotations" / "training").iterdir()))

    def mixed(share: float) -> int:
        data = config(root, scale=(1.0, 1.0), short_side=64, img_size=48, cat_max_ratio=share)
        dataset = ImageDataset(open_masks(data, "train"), mask_training_transform(data))
        return sum(len(sample_of(dataset, epoch, 0)["target"].unique()) > 1 for epoch in range(40))

    assert mixed(0.75) > 2 * mixed(1.0)


def test_crops_without_a_label_are_drawn_anew(tmp_path: Path) -> None:
    root = scene(tmp_path, train=1, size=(320, 64))
    mask = np.zeros((64, 320), np.uint8)
    mask[:, 200:220] = np.arange(1, 21)
    Image.fromarray(mask).save(next((root / "annotations" / "training").iterdir()))
    data = config(root, scale=(1.0, 1.0), short_side=64, img_size=48)
    dataset = ImageDataset(open_masks(data, "train"), mask_training_transform(data))
    labelled = [bool((sample_of(dataset, epoch, 0)["target"] != 255).any()) for epoch in range(40)]
    assert sum(labelled) >= 36  # of one crop 10


def test_an_unreadable_pair_is_replaced_by_the_next_of_its_epoch(tmp_path: Path) -> None:
    data = config(scene(tmp_path, train=16))
    said: list[str] = []

    def taken() -> list[int]:
        source = open_masks(data, "train")
        dataset = ImageDataset(source, mask_training_transform(data), seed=7, max_unreadable=0.2)
        sampler = TrainingSampler(BatchPlan.make(16, 4, None, 1), 7, 0, 0, 4)
        feed = batches(dataset, sampler, 0, unreadable=UnreadableImages(16, 0.2, said.append))
        return [int(index) for batch in feed for index in batch["index"]]

    before = taken()
    (tmp_path / "images" / "training" / "ADE_00000003.png").write_bytes(b"torn")
    Image.new("L", (60, 44), 151).save(tmp_path / "annotations" / "training" / "ADE_00000005.png")
    readable = [i for i in before + before if i not in (3, 5)]
    assert taken() == [
        i if i in readable else next(k for k in (before + before)[at:] if k in readable) for at, i in enumerate(before)
    ]
    assert len(said) == 2
    assert "takes its place (2 of 16 images so far)" in said[1]
    for i in range(6, 9):
        (tmp_path / "images" / "training" / f"ADE_{i:08d}.png").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"4 of 16 images cannot be read, more than data\.max_unreadable=0\.2"):
        taken()


def test_what_is_wrong_with_a_pair_travels_to_the_training_process(tmp_path: Path) -> None:
    dataset = ImageDataset(open_masks(config(scene(tmp_path)), "val"), mask_evaluation_transform)
    folder = tmp_path / "annotations" / "validation"
    Image.new("L", (44, 60)).save(folder / "ADE_00000000.png")
    Image.new("L", (60, 44), 151).save(folder / "ADE_00000001.png")
    reasons = [sample.reason for sample in dataset.__getitems__([0, 1]) if isinstance(sample, Unreadable)]
    assert "wanted the size of its image, 60 x 44 px, got 44 x 60 px (turned by the image's EXIF" in reasons[0]
    assert "label value 151: wanted 0 to 150" in reasons[1]


@pytest.mark.parametrize(
    ("size", "wanted"),
    [((683, 1024), (512, 768)), ((400, 300), (683, 512)), ((100, 1000), (205, 2048)), ((9, 9), (512, 512))],
)
def test_the_resize_of_the_test(size: tuple[int, int], wanted: tuple[int, int]) -> None:
    assert resized_size(*size, 512, 2048) == wanted


def test_the_embedded_masks_are_filled_thresholds() -> None:
    reader, masks = embedded.EmbeddedReader("val"), embedded.masks("val")
    for index in range(0, 400):
        filled = ndimage.binary_fill_holes(reader.pixels[index] > 12)
        assert np.array_equal(masks[index], filled * (reader.labels[index] + 1))
    source = open_masks(MaskDataConfig(train_images=7), "train", 7)
    assert source.legend is not None
    assert (len(source), source.legend.class_names[:2]) == (7, ["Background", "T-shirt/top"])
