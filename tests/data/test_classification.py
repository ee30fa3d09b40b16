from pathlib import Path

import numpy as np
import pytest
import timm.data
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.readers import create_reader

from sparsemae.data.classification import ImageDataset, UnreadableImages, batches, decode_rgb, load_image
from sparsemae.data.sampling import BatchPlan, EvaluationSampler, TrainingSampler
from sparsemae.data.sources import SourceConfig, open_source
from sparsemae.data.transforms import DataConfig, evaluation_transform, normalize, training_transform


def folder(root: Path, **options: object) -> DataConfig:
    return DataConfig(source="folder", root=str(root), img_size=32, **options)


def test_folder_splits_and_classes(image_folder: Path) -> None:
    train, val = (open_source(folder(image_folder), split) for split in ("train", "val"))
    assert (len(train), len(val)) == (16, 6)
    assert train.class_names == val.class_names == ["cat", "dog"]
    assert Path(train.filename(0)) == image_folder / "train" / "cat" / "0.png"


def test_one_folder_holds_out_a_tenth_the_same_every_time(image_folder: Path) -> None:
    data = folder(image_folder / "train")
    train, val = open_source(data, "train"), open_source(data, "val")
    assert (len(train), len(val)) == (15, 1)
    assert {train.filename(i) for i in range(15)}.isdisjoint({val.filename(0)})
    assert open_source(data, "val").filename(0) == val.filename(0)


def test_a_class_absent_from_validation_keeps_the_labels(image_folder: Path) -> None:
    for file in (image_folder / "val" / "cat").iterdir():
        file.unlink()
    val = open_source(folder(image_folder), "val")
    assert {load_image(val, i)[1] for i in range(len(val))} == {1}


def test_mistakes_name_the_folder(tmp_path: Path, image_folder: Path) -> None:
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        open_source(folder(tmp_path / "nowhere"), "train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: wanted images"):
        open_source(folder(tmp_path / "empty"), "train")
    with pytest.raises(ValueError, match=r"data\.root: wanted a folder"):
        open_source(SourceConfig(source="folder"), "train")
    (image_folder / "val" / "cat").rename(image_folder / "val" / "horse")
    with pytest.raises(ValueError, match="got another: horse"):
        open_source(folder(image_folder), "val")
    with pytest.raises(ValueError, match="train_images: wanted at least 1, got 0"):
        open_source(SourceConfig(), "train", 0)


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


def run_epochs(data: DataConfig, workers: int, world: int = 1) -> tuple[list[list[int]], list[str]]:
    """Indices taken in three epochs, micro-batch by micro-batch, and the lines said."""
    source, said = open_source(data, "train"), []
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


MODES = {  # of Pillow, and a file format that keeps it
    "1": "png", "L": "jpg", "LA": "png", "P": "png", "RGB": "jpg", "RGBA": "png", "CMYK": "jpg", "YCbCr": "jpg",
    "I;16": "png", "I": "tif", "F": "tif",
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # timm leaves its files open
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_the_rgb_of_timm(tmp_path: Path, mode: str) -> None:
    gradient = np.linspace(0, 511 if mode in ("I;16", "I", "F") else 255, 16 * 16 * 3).reshape(16, 16, 3)
    if mode in ("I;16", "I", "F"):
        kind = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
        image = Image.fromarray(gradient[:, :, 0].astype(kind))
    else:
        image = Image.fromarray(gradient.astype(np.uint8)).convert(mode)
    file = tmp_path / f"image.{MODES[mode]}"
    image.save(file)
    assert Image.open(file).mode == ("RGB" if mode == "YCbCr" else mode)
    reader = create_reader("", str(tmp_path), class_map={"": 0}) if file.suffix != ".tif" else None
    got = np.asarray(decode_rgb(file, str(file)))
    assert got.shape == (16, 16, 3)
    if reader is not None:
        theirs = timm.data.ImageDataset(str(tmp_path), reader=reader)[0][0]
        np.testing.assert_array_equal(got, np.asarray(theirs))
    if mode in ("L", "LA"):
        np.testing.assert_array_equal(got[:, :, 0], np.asarray(Image.open(file).convert("L")))
    if mode in ("I;16", "I", "F"):  # clipped, not scaled
        np.testing.assert_array_equal(got[:, :, 1], np.asarray(image).astype(np.int64).clip(0, 255))


@pytest.mark.parametrize("exif", [False, True])
def test_exif_orientation_is_applied_only_when_asked_for(image_folder: Path, exif: bool) -> None:
    upright = np.zeros((20, 30, 3), np.uint8)
    upright[0] = 255  # a white line on top
    turned, tag = Image.fromarray(upright).transpose(Image.Transpose.ROTATE_90), Image.Exif()
    tag[0x0112] = 6  # to be shown turned clockwise by 90 degrees
    turned.save(image_folder / "train" / "cat" / "0.png", exif=tag)
    dataset = ImageDataset(open_source(folder(image_folder), "train"), np.array, exif=exif)
    got = dataset[0]["image"].numpy()
    np.testing.assert_array_equal(got, upright if exif else np.asarray(turned))


def all_batches(data: DataConfig, workers: int, start: int = 0) -> list[dict]:
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


def test_the_evaluation_transform_is_timms(image_folder: Path) -> None:
    image = Image.open(image_folder / "val" / "cat" / "0.png").convert("RGB")
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    wanted = create_transform(32, interpolation="bicubic", crop_pct=0.875, mean=mean, std=std)(image)
    got = torch.as_tensor(evaluation_transform(32, "bicubic", 0.875)(image))
    assert got.dtype == torch.uint8
    torch.testing.assert_close(normalize(got[None], mean, std)[0], wanted, rtol=0, atol=1e-6)


def test_shift_moves_by_at_most_the_pixels_given_and_fills_with_black() -> None:
    transform = training_transform(DataConfig(img_size=8, crop="shift", crop_shift=1, hflip=0.0))
    pixels = np.arange(1, 65, dtype=np.uint8).reshape(8, 8)
    seen = set()
    for _ in range(200):
        moved = np.asarray(transform(Image.fromarray(pixels).convert("RGB")))[0]
        padded = np.pad(pixels, 1)
        matches = [(y, x) for y in range(3) for x in range(3) if (padded[y : y + 8, x : x + 8] == moved).all()]
        assert len(matches) == 1
        seen.add(matches[0])
    assert len(seen) == 9


def test_randaugment_at_full_magnitude_keeps_no_bits_as_it_did() -> None:
    """Pillow 13 refuses to posterize to 0 bits, which timm asks of one image in 700; Pillow 12 gave black."""
    transform = training_transform(DataConfig(auto_augment="rand-m10-inc1-n15", img_size=8))
    image = Image.new("RGB", (8, 8), (200, 100, 50))
    operations = [op for step in transform.transforms for op in getattr(step, "ops", ())]
    (posterize,) = [op for op in operations if op.name == "PosterizeIncreasing"]
    posterize.prob = 1.0
    assert np.asarray(posterize(image)).max() == 0
    posterize.magnitude = 5  # 2 bits
    assert np.asarray(posterize(image))[0, 0].tolist() == [192, 64, 0]
