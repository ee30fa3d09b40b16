"""Samples are functions of seed, epoch and index; what cannot be read is replaced and counted, or named."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sparsemae.data.dataset import ImageDataset, Unreadable
from sparsemae.data.images import DefaultRules
from sparsemae.data.loader import UnreadableImages, batches
from sparsemae.data.sampling import BatchPlan, EvaluationSampler, TrainingSampler
from sparsemae.data.sources import open_source
from sparsemae.data.transforms import training_transform
from sparsemae.options.data import ImageDataConfig


def folder(root: Path, **options: Any) -> ImageDataConfig:
    return ImageDataConfig(source="folder", root=str(root), img_size=32, **options)


def break_image(folder: Path, name: str) -> str:
    """Cut a PNG short; returns what is said of it."""
    file = folder / name
    file.write_bytes(file.read_bytes()[:200])
    return rf"{name}: unreadable image"


@pytest.mark.parametrize("workers", [0, 1])
def test_an_evaluation_stops_at_an_unreadable_image_with_one_line(image_folder: Path, workers: int) -> None:
    break_image(image_folder, "train/dog/3.png")
    data = folder(image_folder)
    dataset = ImageDataset(open_source(data, "train"), training_transform(data))
    for unreadable in (None, UnreadableImages(len(dataset), 0.0)):
        with pytest.raises(ValueError, match=r"^[^\n]*dog/3.png: unreadable image[^\n]*$"):
            list(batches(dataset, EvaluationSampler(len(dataset), 4), workers, unreadable=unreadable))


def test_a_broken_link_is_named(image_folder: Path) -> None:
    (image_folder / "train" / "dog" / "3.png").unlink()
    (image_folder / "train" / "dog" / "3.png").symlink_to(image_folder / "nowhere.png")
    data = folder(image_folder)
    dataset = ImageDataset(open_source(data, "train"), training_transform(data))
    with pytest.raises(ValueError, match=r"dog/3.png: unreadable image: No such file"):
        list(batches(dataset, EvaluationSampler(len(dataset), 4), 0))


def test_an_image_smaller_than_a_patch_is_named(image_folder: Path) -> None:
    Image.new("RGB", (40, 3)).save(image_folder / "train" / "dog" / "3.png")
    data = folder(image_folder)
    dataset = ImageDataset(open_source(data, "train"), training_transform(data), smallest=16)
    with pytest.raises(ValueError, match=r"3\.png: wanted at least one patch of 16 px, got 40 x 3 px"):
        list(batches(dataset, EvaluationSampler(len(dataset), 4), 0))


def run_epochs(data: ImageDataConfig, workers: int, world: int = 1) -> tuple[list[list[int]], list[str]]:
    """Indices taken in three epochs, micro-batch by micro-batch, and the lines said."""
    source = open_source(data, "train")
    said: list[str] = []
    dataset = ImageDataset(source, training_transform(data), seed=7, max_unreadable=0.2)
    plan = BatchPlan.make(len(source), 4, 2, world)
    feeds = []
    for rank in range(world):
        sampler = TrainingSampler(plan, 7, rank, 0, 3 * plan.steps_per_epoch)
        unreadable = UnreadableImages(len(source), 0.2, said.append)
        feeds.append([batch["index"].tolist() for batch in batches(dataset, sampler, workers, unreadable=unreadable)])
    return [feeds[k % world][k // world] for k in range(world * len(feeds[0]))], said


def test_an_unreadable_training_image_is_replaced_by_the_next_of_its_epoch(image_folder: Path) -> None:
    data = folder(image_folder)
    whole, said = run_epochs(data, 0)
    assert not said
    for name in ("train/cat/1.png", "train/dog/3.png"):  # indices 1 and 11 of 16
        break_image(image_folder, name)
    taken, said = run_epochs(data, 0)
    for epoch in range(3):
        before, after = ([i for one in part[8 * epoch : 8 * epoch + 8] for i in one] for part in (whole, taken))
        readable = [i for i in before + before if i not in (1, 11)]
        wanted = [i if i not in (1, 11) else next(k for k in (before + before)[at:] if k in readable)
                  for at, i in enumerate(before)]  # fmt: skip
        assert after == wanted
    assert len(said) == 2  # once each, in three epochs
    assert sorted(line.split(": unreadable image")[0][-9:] for line in said) == ["cat/1.png", "dog/3.png"]
    assert said[1].endswith("the next readable image takes its place (2 of 16 images so far)")
    assert run_epochs(data, 2) == (taken, said)
    assert run_epochs(data, 0, world=2)[0] == taken


def test_the_run_stops_once_more_images_are_unreadable_than_tolerated(image_folder: Path) -> None:
    for i in range(4):  # 0.2 of 16 is 3
        break_image(image_folder, f"train/cat/{i}.png")
    with pytest.raises(
        ValueError, match=r"cat/\d\.png: unreadable .*\(4 of 16 images cannot be read, more than data\.max"
    ):
        run_epochs(folder(image_folder), 0)
    with pytest.raises(ValueError, match=r"data\.max_unreadable: wanted at least 0 and below 1, got 1"):
        folder(image_folder, max_unreadable=1.0)


def as_array(image: Image.Image, target: int) -> tuple[np.ndarray, int]:
    return np.array(image), target


@pytest.mark.parametrize("exif", [False, True])
def test_exif_orientation_is_applied_only_when_asked_for(image_folder: Path, exif: bool) -> None:
    upright = np.zeros((20, 30, 3), np.uint8)
    upright[0] = 255  # a white line on top
    turned, tag = Image.fromarray(upright).transpose(Image.Transpose.ROTATE_90), Image.Exif()
    tag[0x0112] = 6  # to be shown turned clockwise by 90 degrees
    turned.save(image_folder / "train" / "cat" / "0.png", exif=tag)
    dataset = ImageDataset(open_source(folder(image_folder), "train"), as_array, rules=DefaultRules(exif))
    got = dataset[0]
    assert not isinstance(got, Unreadable)
    np.testing.assert_array_equal(got["image"], upright if exif else np.asarray(turned))


def all_batches(data: ImageDataConfig, workers: int, start: int = 0) -> list[dict]:
    source = open_source(data, "train")
    dataset = ImageDataset(source, training_transform(data), seed=7, patches=4)
    plan = BatchPlan.make(len(source), 4, None, 1)
    return list(batches(dataset, TrainingSampler(plan, 7, 0, start, 9), workers))


def same(one: dict, other: dict) -> bool:
    return all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("crop", ["resized", "shift"])
def test_samples_are_functions_of_seed_epoch_and_index(image_folder: Path, crop: str) -> None:
    data = folder(image_folder, crop=crop, auto_augment="rand-m9-mstd0.5-inc1" if crop == "resized" else None)
    alone = all_batches(data, 0)
    assert all(same(a, b) for a, b in zip(alone, all_batches(data, 2), strict=True))
    assert all(same(a, b) for a, b in zip(alone[5:], all_batches(data, 1, start=5), strict=True))
    by_key = {}
    for number, batch in enumerate(alone):  # the same image of two epochs differs
        for image, noise, index in zip(batch["image"], batch["noise"], batch["index"].tolist(), strict=True):
            by_key[number // 4, index] = image, noise
    index = next(i for e, i in by_key if e == 0 and (1, i) in by_key)
    assert not torch.equal(by_key[0, index][0], by_key[1, index][0])
    assert not torch.equal(by_key[0, index][1], by_key[1, index][1])


@pytest.mark.parametrize("kept", [0, 3, 100])
def test_images_in_memory_are_read_once_and_are_the_same(image_folder: Path, kept: int) -> None:
    """Of 0, 3 and all images that fit: equal samples in two epochs; only those that do not fit are read again."""
    data = folder(image_folder)
    source = open_source(data, "train")
    width, height = source.read(0)[0].size
    cached = ImageDataset(source, training_transform(data), cache_gigabytes=kept * width * height * 4 / 1e9)
    plain = ImageDataset(source, training_transform(data))
    keys = [(epoch, index) for epoch in range(2) for index in range(len(source))]
    wanted = [plain[key] for key in keys]
    first = [cached[key] for key in keys[: len(source)]]
    for index in range(min(kept, len(source))):
        Path(source.filename(index)).unlink()
    for ours, theirs in zip([*first, *(cached[key] for key in keys[len(source) :])], wanted, strict=True):
        assert isinstance(ours, dict)
        assert isinstance(theirs, dict)
        assert (ours["target"], ours["unreadable"]) == (theirs["target"], [])
        assert torch.equal(ours["image"], theirs["image"])
