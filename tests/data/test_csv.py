"""Tables of images and classes: equal to the class folders of the same files, or refused by line."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny
from photographs import class_folders

from sparsemae.cli import main
from sparsemae.data.sources import find_source
from sparsemae.data.tables import TableReader
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
