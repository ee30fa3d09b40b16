"""Every kind of source gives the images, labels and splits that its users expect."""

import importlib.util
import io
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import photographs
import pytest
import torch
import torchvision
from PIL import Image

from sparsemae.cli import main
from sparsemae.data.dataset import ImageDataset
from sparsemae.data.libraries import HFReader
from sparsemae.data.loader import batches
from sparsemae.data.sampling import BatchPlan, EvaluationSampler, TrainingSampler
from sparsemae.data.sources import Source, find_source, open_source
from sparsemae.data.tree import SPLIT_WORDS, Split
from sparsemae.options.data import SPLITS, DataConfig, SourceConfig, source_of

COUNT = 75


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same 75 photographs as folder, tar and shards: 60 for training, 15 for validation or so."""
    folder = tmp_path_factory.mktemp("photographs")
    photographs.make(folder, COUNT)
    return folder


def content(source: Source, index: int) -> tuple[bytes, int]:
    file, label = source.open(index)
    with file:
        return file.read(), label


def folder(root: Path) -> SourceConfig:
    return SourceConfig("folder", str(root))


def test_folder_splits_and_classes(image_folder: Path) -> None:
    train, val = (open_source(folder(image_folder), split) for split in ("train", "val"))
    assert (len(train), len(val)) == (16, 6)
    assert train.class_names == val.class_names == ["cat", "dog"]
    assert Path(train.filename(0)) == image_folder / "train" / "cat" / "0.png"


def test_one_folder_holds_out_a_share_the_same_every_time(image_folder: Path) -> None:
    data = folder(image_folder / "train")
    train, val = open_source(data, "train"), open_source(data, "val")
    assert (len(train), len(val)) == (14, 2)  # one of each class
    assert {train.filename(i) for i in range(14)}.isdisjoint({val.filename(0), val.filename(1)})
    assert open_source(data, "val").filename(0) == val.filename(0)


def test_a_class_absent_from_validation_keeps_the_labels(image_folder: Path) -> None:
    for file in (image_folder / "val" / "cat").iterdir():
        file.unlink()
    val = open_source(folder(image_folder), "val")
    assert {val.read(i)[1] for i in range(len(val))} == {1}


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
    with pytest.raises(ValueError, match=r"data\.train_images: wanted at least 1, got 0"):
        DataConfig(train_images=0)


def cifar10(root: Path) -> Callable[..., Any]:
    """A class that stands in for torchvision's: its files cannot be fetched here."""

    class CIFAR10:
        classes = ("plane", "car", "bird")

        def __init__(self, root: str, train: bool = True, download: bool = False) -> None:
            if not Path(root).is_dir() and not download:
                raise RuntimeError("Dataset not found or corrupted. You can use download=True to download it")
            self.count = 30 if train else 7

        def __len__(self) -> int:
            return self.count

        def __getitem__(self, index: int) -> tuple[Image.Image, int]:
            if index >= self.count:
                raise IndexError(index)
            return Image.new("RGB", (32, 32), (index, 0, self.count)), index % 3

    return CIFAR10


@pytest.mark.parametrize("kind", ["tar", "wds"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_tars_and_shards_hold_what_the_folder_holds(photos: Path, kind: Any, split: Split) -> None:
    folder = open_source(SourceConfig("folder", str(photos / "folder")), split)
    other = open_source(SourceConfig(kind, str(photos / kind)), split)
    pairs = [sorted(content(s, i) for i in range(len(s))) for s in (folder, other)]
    assert pairs[0] == pairs[1]
    if kind == "tar":
        assert other.class_names == folder.class_names
    else:
        assert other.class_names == [str(i) for i in range(len(folder.class_names))]


def test_where_tars_of_the_splits_may_lie(photos: Path, tmp_path: Path) -> None:
    def opened(kind: Any, root: Path) -> tuple[int, int]:
        data = SourceConfig(kind, str(root))
        return len(open_source(data, "train")), len(open_source(data, "val"))

    train, val = opened("folder", photos / "folder")
    assert train + val == COUNT
    for split in ("train", "validation"):
        (tmp_path / "nested" / split).mkdir(parents=True)
    shutil.copy(photos / "tar" / "train.tar", tmp_path / "nested" / "train" / "00.tar")
    shutil.copy(photos / "tar" / "val.tar", tmp_path / "nested" / "validation" / "00.tar")
    assert opened("tar", tmp_path / "nested") == (train, val)
    assert opened("tar", photos / "tar" / "train.tar") == (train - 8, 8)  # one of each class
    for name in ("carnival", "constraints"):
        shutil.copy(photos / "tar" / "val.tar", tmp_path / f"{name}.tar")
    assert sum(opened("tar", tmp_path)) == 2 * val  # no word for a split in either: both, and a tenth held out


@pytest.mark.parametrize(("split", "tar"), [("train", "train"), ("Validation", "val"), ("test", "train/a")])
def test_tars_beside_class_folders_are_named(photos: Path, tmp_path: Path, split: str, tar: str) -> None:
    for name in ("a", "b"):
        (tmp_path / split / name).mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / split / name / "0.png")
    file = tmp_path / f"{tar}.tar"
    file.parent.mkdir(exist_ok=True)
    shutil.copy(photos / "tar" / "train.tar", file)
    message = rf"data\.source: wanted folder, tar or wds for .* both {file} and the folder .*/{split}/[ab], got auto$"
    with pytest.raises(ValueError, match=message):
        SourceConfig(root=str(tmp_path))
    assert SourceConfig("tar", str(tmp_path)).source == "tar"
    assert source_of(str(tmp_path)) is None
    file.unlink()
    assert SourceConfig(root=str(tmp_path)).source == "folder"
    assert sorted(SPLITS) == sorted(word for words in SPLIT_WORDS.values() for word in words)


def read_by_process(data: SourceConfig, rank: int, world: int, batch: int) -> tuple[list[tuple[int, int]], list[int]]:
    """What one of ``world`` processes takes in three epochs, and in an evaluation."""
    torch.set_num_threads(1)
    train, val = open_source(data, "train"), open_source(data, "val")
    plan = BatchPlan.make(len(train), batch * world, batch, world)
    steps = plan.steps_per_epoch
    feed = batches(ImageDataset(train, _small), TrainingSampler(plan, 0, rank, 0, 3 * steps), workers=1)
    epochs = [(number // steps, int(index)) for number, taken in enumerate(feed) for index in taken["index"]]
    feed = batches(ImageDataset(val, _small), EvaluationSampler(len(val), batch, rank, world), workers=1)
    return epochs, [int(index) for taken in feed for index in taken["index"]]


def _small(image: Image.Image, target: int) -> tuple[torch.Tensor, int]:
    return torch.from_numpy(np.asarray(image.resize((4, 4))).copy()), target


@pytest.fixture(scope="module")
def two_processes() -> Iterator[Executor]:
    """Not forked: a process with threads would not survive it."""
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        yield pool


@pytest.mark.holds("imagenet.2")
@pytest.mark.parametrize("kind", ["folder", "tar", "wds", "torchvision"])
@pytest.mark.slow
@pytest.mark.holds_only
def test_each_image_exactly_once_over_two_processes(
    photos: Path, tmp_path: Path, kind: Any, figure: Any, monkeypatch: pytest.MonkeyPatch, two_processes: Executor
) -> None:
    root = photos / kind if kind != "torchvision" else tmp_path
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", cifar10(tmp_path))
    data = SourceConfig(kind, str(root), name="CIFAR10" if kind == "torchvision" else None)
    train, val = open_source(data, "train"), open_source(data, "val")
    batch = 4
    both = map if kind == "torchvision" else two_processes.map  # the patched class is in this process alone
    taken = list(both(read_by_process, [data] * 2, range(2), [2] * 2, [batch] * 2))
    left = len(train) % (2 * batch)
    for epoch in range(3):
        seen = [index for epochs, _ in taken for number, index in epochs if number == epoch]
        assert len(seen) == len(set(seen)) == len(train) - left
        assert set(seen) <= set(range(len(train)))
    assert f"{left} left over" in str(BatchPlan.make(len(train), 2 * batch, batch, 2))
    assert sorted(index for _, evaluated in taken for index in evaluated) == list(range(len(val)))
    figure(
        f"{kind}: {len(train) - left} of {len(train)} images an epoch, 0 twice, {left} left over by 2 x {batch}, "
        f"others each time; evaluation {len(val)} of {len(val)}"
    )


def test_listed_members_of_tars_are_left_out(photos: Path, tmp_path: Path) -> None:
    file = tmp_path / "exclude.txt"
    everything = open_source(SourceConfig("tar", str(photos / "tar")), "train")
    names = [Path(everything.filename(i)).relative_to(photos / "tar").as_posix() for i in range(len(everything))]
    assert names[0] == "train.tar/astronaut/0000.jpg"
    file.write_text(f"{names[0]}\n{names[5]}\nval.tar/chelsea/0033.jpg\n")
    data = SourceConfig("tar", str(photos / "tar"), exclude=str(file))
    source = open_source(data, "train")
    kept = [Path(source.filename(i)).relative_to(photos / "tar").as_posix() for i in range(len(source))]
    assert kept == [name for i, name in enumerate(names) if i not in (0, 5)]
    file.write_text("train.tar/astronaut/9999.jpg\n")
    with pytest.raises(ValueError, match=r"got 1 that it does not hold: train\.tar/astronaut/9999\.jpg"):
        open_source(data, "train")


def test_torchvision_splits_by_flag_by_word_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base: Any = cifar10(tmp_path)

    class Flowers102(base):
        def __init__(self, root: str, split: str = "train") -> None:
            if split not in ("train", "test"):
                raise ValueError(f"Unknown value '{split}' for argument split. Valid values are {{'train', 'test'}}.")
            super().__init__(root, train=split == "train")

    class EuroSAT(base):
        def __init__(self, root: str, transform: Any = None) -> None:
            super().__init__(root)

    for made in (base, Flowers102, EuroSAT):
        monkeypatch.setattr(torchvision.datasets, made.__name__, made)

    def sizes(name: str) -> list[int]:
        data = SourceConfig("torchvision", str(tmp_path), name=name)
        return [len(open_source(data, split)) for split in ("train", "val")]

    assert (sizes("CIFAR10"), sizes("Flowers102"), sizes("EuroSAT")) == ([30, 7], [30, 7], [27, 3])
    source = open_source(SourceConfig("torchvision", str(tmp_path), name="Flowers102"), "val")
    assert source.class_names == ["plane", "car", "bird"]
    assert source.filename(3) == f"{tmp_path}/Flowers102/val/0000003"


@pytest.mark.parametrize("words", [(), ("train", "test"), ("train", "valid", "test")])
def test_where_the_test_split_of_torchvision_validates_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    base: Any = cifar10(tmp_path)

    class DTD(base):
        def __init__(self, root: str, split: str = "train") -> None:
            if split not in words:
                raise ValueError(f"Unknown value '{split}' for argument split.")
            super().__init__(root, train=split == "train")

    monkeypatch.setattr(torchvision.datasets, "DTD", DTD if words else base)
    notes = find_source(SourceConfig("torchvision", str(tmp_path), name="DTD")).notes()
    said = "validation: torchvision's test, the only other split, so that the best epoch is chosen by it"
    assert notes[1:] == [said] * ("valid" not in words)


def test_a_set_of_torchvision_from_its_own_files(tmp_path: Path) -> None:
    """SVHN's checksums forbid made-up files; EuroSAT takes any images in class folders."""
    for i in range(20):
        file = tmp_path / "eurosat" / "2750" / ("Forest" if i % 2 else "River") / f"{i}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), (i, 0, 0)).save(file)
    train, val = (
        open_source(SourceConfig("torchvision", str(tmp_path), name="EuroSAT"), split) for split in ("train", "val")
    )
    assert (len(train), len(val), train.class_names) == (18, 2, ["Forest", "River"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "torchvision"}, r"data\.name: wanted torchvision's name of a set \(CIFAR10, .* got None"),
        ({"source": "torchvision", "name": "cifar"}, r"data\.name: wanted torchvision's name .* got cifar"),
        ({"source": "torchvision", "name": "ImageFolder"}, r"data\.name: wanted data\.source=folder for class folders"),
        ({"source": "torchvision", "name": "CIFAR10"}, r"wanted torchvision's CIFAR10 \(fetch it with --data\.downl"),
        ({"source": "torchvision", "name": "CelebA"}, r"wanted torchvision's CelebA"),
        ({"source": "wds", "root": "https://host/set"}, r"data\.root: wanted a local path, got https://host/set"),
        ({"source": "wds", "root": "pipe:cat set.tar"}, r"data\.root: wanted a local path, got pipe:cat"),
        ({"source": "tar"}, r"wanted \.tar files in it, or in its folders train and val, found none"),
        ({"source": "tar", "root": "nowhere.tar"}, r"nowhere\.tar: no such folder"),
    ],
)
def test_mistakes(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_source(SourceConfig(**{"root": str(tmp_path), **options}), "train")


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "datasets" else find(name, *rest)
    )
    with pytest.raises(ValueError, match=r"hfds wants the package datasets, .* pip install datasets"):
        open_source(SourceConfig("hfds", str(tmp_path)), "train")


@pytest.mark.parametrize("kind", ["text", "class"])
@pytest.mark.filterwarnings("ignore")  # the library's own
def test_forms_of_a_class_name_in_hf_datasets_are_one(kind: str) -> None:
    datasets = pytest.importorskip("datasets")
    names = ["tea", "cafe\u0301", "caf\u00e9"]
    features = datasets.Features(
        image=datasets.Image(), label=datasets.Value("string") if kind == "text" else datasets.ClassLabel(names=names)
    )
    images = [Image.new("L", (8, 8))] * 3
    rows = datasets.Dataset.from_dict({"image": images, "label": names}, features=features)
    reader = HFReader(rows, Path("set"), "train", None, None)
    wanted = (["caf\u00e9", "tea"], [1, 0, 0]) if kind == "text" else (["tea", "caf\u00e9"], [0, 1, 1])
    assert (reader.class_names, reader.labels.tolist()) == wanted
    assert reader.notes[0].startswith("class caf\u00e9: its name is written in 2 ways")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the library's own
def test_hf_datasets_from_a_folder_of_parquet_files(tmp_path: Path, photos: Path, monkeypatch) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["x", "y", "z"])})
    for split, count in (("train", 12), ("validation", 5)):
        images = [Image.linear_gradient("L").resize((20, 20)).convert("RGB") for _ in range(count)]
        for i, image in enumerate(images):
            image.putpixel((0, 0), (i, 0, 0))
        rows = datasets.Dataset.from_dict({"image": images, "label": [i % 3 for i in range(count)]}, features=features)
        rows.to_parquet(tmp_path / "set" / f"{split}.parquet")
    data = SourceConfig("hfds", str(tmp_path / "set"))
    train, val = open_source(data, "train"), open_source(data, "val")
    assert (len(train), len(val), train.class_names) == (12, 5, ["x", "y", "z"])
    png, label = content(train, 7)
    assert (Image.open(io.BytesIO(png)).getpixel((0, 0)), label) == ((7, 0, 0), 1)
    assert train.filename(7) == f"{tmp_path}/set/train/0000007"
    main(["check", "--data.source", "hfds", "--data.root", str(tmp_path / "set"), "--data.workers", "0"])
    rows.save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match="got one of save_to_disk: write each split with to_parquet"):
        open_source(SourceConfig("hfds", str(tmp_path / "saved")), "train")
