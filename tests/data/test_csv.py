"""Tables of images and classes: equal to the class folders of the same files, or refused by line."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny
from photographs import class_folders
from PIL import Image

from sparsemae.cli import main
from sparsemae.data.sources import find_source
from sparsemae.data.tables import TableReader, open_tables
from sparsemae.models.weights import read_weights
from sparsemae.options import SourceConfig


def table(
    file: Path, rows: list[tuple[str, ...]], header: tuple[str, ...] = ("id", "breed"), delimiter: str = ","
) -> Path:
    with file.open("w", newline="") as stream:
        csv.writer(stream, delimiter=delimiter).writerows([header, *rows] if header else rows)
    return file


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 small photographs: folders/CLASS/N.jpg, and the same files flat in kaggle/train with kaggle/train.csv."""
    root = tmp_path_factory.mktemp("tables")
    class_folders(root / "folders", 24)
    (root / "kaggle" / "train").mkdir(parents=True)
    rows = []
    for file in sorted((root / "folders").glob("*/*.jpg")):
        (root / "kaggle" / "train" / file.name).write_bytes(file.read_bytes())
        rows.append((file.stem, file.parent.name))
    order = np.random.default_rng(0).permutation(len(rows))
    table(root / "kaggle" / "train.csv", [rows[i] for i in order])
    return root


@pytest.mark.holds("own.4")
def test_a_table_and_folders_of_the_same_images_are_equal(photos: Path, tmp_path: Path) -> None:
    """The same images in the same order and parts, and after a training the same weights, bit for bit."""
    folder, listed = (find_source(SourceConfig("auto", str(photos / name))) for name in ("folders", "kaggle"))
    assert listed.data.source == "csv"
    for split in ("train", "val"):
        a, b = folder.open(split), listed.open(split)  # type: ignore[arg-type]
        assert a.class_names == b.class_names
        assert len(a) == len(b) == {"train": 20, "val": 4}[split]
        for i in range(len(a)):
            (one, first), (other, second) = a.read(i), b.read(i)
            assert first == second
            assert np.array_equal(np.asarray(one), np.asarray(other))
    for name, root in (("a", "folders"), ("b", "kaggle/train.csv")):
        words = tiny("finetune", tmp_path / name, "--data.source", "auto", "--data.root", str(photos / root),
                     "--data.train_images", "null", "--trainer.global_batch", "4", "--data.workers", "0")  # fmt: skip
        main([*words, "--trainer.max_steps", "3"])
    weights = [read_weights(tmp_path / name)[0] for name in ("a", "b")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())
    main(["evaluate", str(tmp_path / "b"), "--data.workers", "0"])


def test_columns_and_delimiters(photos: Path, tmp_path: Path) -> None:
    names = [(f"{file.parent.name}/{file.name}", file.parent.name) for file in (photos / "folders").glob("*/*.jpg")]
    wanted = TableReader(photos / "kaggle" / "train.csv")
    for header, rows, options in (
        ((), names, {}),
        (("file", "label"), names, {}),
        (("label", "n", "path"), [(label, str(i), name) for i, (name, label) in enumerate(names)], {}),
        (("x", "y", "z"), [("-", label, name) for name, label in names], {"image_column": "z", "label_column": "y"}),
    ):
        for ending, delimiter in ((".csv", ";"), (".tsv", "\t")):
            file = table(photos / "folders" / f"list{ending}", rows, header, delimiter)  # type: ignore[arg-type]
            found = TableReader(file, **options)  # type: ignore[arg-type]
            file.unlink()
            assert found.labels.tolist() == wanted.labels.tolist(), header
            assert [Path(str(path)).name for path in found.paths] == [Path(str(path)).name for path in wanted.paths]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("00000", "")], "line 2: wanted a file and a class, got '00000', ''"),
        ([("00000", "cat"), ("00000", "dog")], "line 3: wanted one class of 00000, got cat and dog"),
        ([("00000", "cat"), ("nowhere", "dog")], "wanted an image file nowhere beside it or in the folder train"),
        ([], "wanted a header and rows of a file and its class"),
    ],
)
def test_mistakes_are_named(photos: Path, rows: list[tuple[str, ...]], message: str) -> None:
    kept = (photos / "kaggle" / "train.csv").read_bytes()
    try:
        with pytest.raises(ValueError, match=r"train\.csv") as error:
            TableReader(table(photos / "kaggle" / "train.csv", rows))
    finally:
        (photos / "kaggle" / "train.csv").write_bytes(kept)
    assert message in str(error.value)


def test_a_repeated_row_counts_once(photos: Path) -> None:
    file = table(photos / "kaggle" / "twice.csv", [("train/00000", "a"), ("train/00001", "b"), ("train/00000", "a")])
    reader = TableReader(file)
    file.unlink()
    assert len(reader) == 2
    assert "1 rows repeat an image, which counts once" in reader.notes[0]
    with pytest.raises(ValueError, match="wanted a column nothing, got id, breed"):
        TableReader(photos / "kaggle" / "train.csv", "nothing")


def gray(*files: Path) -> None:
    for number, file in enumerate(files):
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), number).save(file)


@pytest.mark.parametrize(
    ("name", "folder"),
    [("val", "validation"), ("val", "Val"), ("test", "test"), ("val_labels", "dev"), ("labels", "train")],
)
def test_images_of_a_split_are_sought_in_folders_of_that_split(tmp_path: Path, name: str, folder: str) -> None:
    """Of names that repeat in every split no other's are read."""
    gray(*(tmp_path / part / f"{i}.png" for part in (folder, "train", "images") for i in range(2)))
    if name == "labels":
        (tmp_path / "images").rename(tmp_path / "pictures")
    reader = TableReader(table(tmp_path / f"{name}.csv", [("0", "a"), ("1", "b")]))
    assert [Path(reader.filename(i)).parent.name for i in range(2)] == [folder] * 2


def test_a_table_of_validation_takes_no_images_of_training(tmp_path: Path) -> None:
    gray(tmp_path / "train" / "0.png", tmp_path / "train" / "1.png")
    file = table(tmp_path / "val.csv", [("0.png", "a"), ("1.png", "b")])
    with pytest.raises(
        ValueError, match=r"val\.csv: wanted an image file 0\.png beside it or in the folder val or images"
    ):
        TableReader(file)
    gray(*(tmp_path / folder / f"{i}.png" for folder in ("valid", "dev") for i in range(2)))  # which, is not said
    with pytest.raises(ValueError, match=r"wanted an image file 0\.png"):
        TableReader(file)


@pytest.mark.parametrize(("ending", "delimiter"), [(".csv", ","), (".csv", ";"), (".tsv", "\t")])
def test_a_test_table_with_classes_is_a_split(tmp_path: Path, ending: str, delimiter: str) -> None:
    rows: list[tuple[str, ...]] = [("0", "a"), ("1", "b")]
    for split in ("train", "test"):
        gray(*(tmp_path / split / f"{i}.png" for i in range(2)))
        table(tmp_path / f"{split}{ending}", rows, delimiter=delimiter)
    splits = find_source(SourceConfig("csv", str(tmp_path)))
    assert len(splits.open("val")) == 2
    assert f"test{ending} (2 images), the only other split" in splits.notes()[0]
    table(tmp_path / f"test{ending}", [("0",), ("1",)], ("id",), delimiter)
    splits = find_source(SourceConfig("csv", str(tmp_path)))
    assert splits.notes()[1] == f"test{ending} has no column of classes: it is no split, and left"
    assert splits.openers.keys() == {"train"}


def test_two_tables_of_a_split_are_refused(tmp_path: Path) -> None:
    for name in ("notes.csv", "notes.tsv", "train.csv"):
        table(tmp_path / name, [("0", "a"), ("1", "b")])
    assert open_tables(tmp_path, None, None)["train"][0] == "train.csv"
    table(tmp_path / "train.tsv", [("0", "a"), ("1", "b")], delimiter="\t")
    with pytest.raises(ValueError, match=r"wanted one table for train, got train\.csv and train\.tsv$"):
        open_tables(tmp_path, None, None)


@pytest.mark.parametrize(
    ("header", "rows", "message"),
    [
        (("9.png", "c"), [], r"wanted an image file 9\.png .*, of 1 of 3 names"),
        (("9", "b"), [], r"wanted an image file 9 .*, of 1 of 3 names"),
        (("0.png", "a"), [("2.png",)], r"line 4: wanted a file and a class, got '2\.png', ''"),
        ((), [("./0.png", "c")], r"line 3: wanted one class of 0 and \./0\.png, got a and c"),
        (("lesion_id", "image_id", "dx"), [("x", "0", "c")],
         r"of images and of classes .*image_column and --data\.label_column .*got image_id for both among lesion_id, "),
    ],
)  # fmt: skip
def test_a_row_is_not_lost_nor_misread(
    tmp_path: Path, header: tuple[str, ...], rows: list[tuple[str, ...]], message: str
) -> None:
    gray(tmp_path / "0.png", tmp_path / "1.png")
    with pytest.raises(ValueError, match=message):
        TableReader(table(tmp_path / "labels.csv", [("0", "a"), ("1", "b"), *rows], header))


def test_names_of_one_file_and_forms_of_a_class_are_one(tmp_path: Path) -> None:
    gray(*(tmp_path / f"{i}.png" for i in range(3)))
    rows: list[tuple[str, ...]] = [("0", "caf\u00e9"), ("./0.png", "cafe\u0301"), ("1", "cafe\u0301"), ("2", "tea")]
    reader = TableReader(table(tmp_path / "labels.csv", rows))
    assert (reader.class_names, reader.labels.tolist()) == (["caf\u00e9", "tea"], [0, 0, 1])
    assert reader.notes[0].startswith("class caf\u00e9: its name is written in 2 ways")
    assert reader.notes[1].endswith("labels.csv: 1 rows repeat an image, which counts once")
