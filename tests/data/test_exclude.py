import os
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from sparsemae.data.exclude import read_exclude, write_exclude
from sparsemae.data.sources import open_source
from sparsemae.data.tree import Split
from sparsemae.options import FinetuneConfig, ImageDataConfig, SourceConfig
from sparsemae.tasks.classification import Classification


def names(root: Path, split: Split, exclude: Path | None, limit: int | None = None) -> list[str]:
    data = SourceConfig("folder", str(root), exclude=None if exclude is None else str(exclude))
    source = open_source(data, split, limit)
    return [os.path.relpath(source.filename(i), root) for i in range(len(source))]


def test_listed_images_are_left_out_of_their_split_and_labels_stay(tmp_path: Path, image_folder: Path) -> None:
    file = tmp_path / "exclude.txt"
    file.write_text("train/cat/1.png\n./val/dog/2.png\r\n\n" + "".join(f"train/cat/{i}.png\n" for i in range(2, 8)))
    before = names(image_folder, "train", None)
    assert names(image_folder, "train", file) == [before[0], *before[8:]]
    limited = names(image_folder, "train", file, limit=2)
    assert len(limited) == 2
    assert set(limited) <= {before[0], *before[8:]}
    assert names(image_folder, "val", file) == [n for n in names(image_folder, "val", None) if n != "val/dog/2.png"]
    file.write_text("".join(f"train/cat/{i}.png\n" for i in range(8)))
    source = open_source(SourceConfig("folder", str(image_folder), exclude=str(file)), "train")
    assert source.class_names == ["cat", "dog"]
    assert {int(source.reader.labels[i]) for i in source.indices} == {1}


@pytest.mark.parametrize("option", ["exclude", "train_images"])
def test_classes_without_a_training_image_are_said(tmp_path: Path, image_folder: Path, option: str) -> None:
    file, root = tmp_path / "exclude.txt", str(image_folder)
    file.write_text("".join(f"train/cat/{i}.png\n" for i in range(8)))

    def said(**options: Any) -> list[str]:
        task = Classification(FinetuneConfig(data=ImageDataConfig("folder", root, **options)))
        task.open_data()
        return [note for note in task.notes(nn.Identity()) if "training image" in note]

    assert said() == []
    (note,) = said(**{option: {"exclude": str(file), "train_images": 1}[option]})
    assert note in {f"1 of 2 classes have no training image: {name}" for name in ("cat", "dog")}


def test_what_is_held_out_stays_the_same(tmp_path: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, file = image_folder / "train", tmp_path / "exclude.txt"
    train, val = names(root, "train", None), names(root, "val", None)
    file.write_text(f"{train[3]}\n")
    assert names(root, "val", file) == val
    assert names(root, "train", file) == train[:3] + train[4:]
    monkeypatch.chdir(root)
    assert names(Path("."), "train", file) == train[:3] + train[4:]
    monkeypatch.chdir(image_folder / "val")
    assert names(Path("..") / "train", "train", file) == train[:3] + train[4:]


def test_mistakes(tmp_path: Path, image_folder: Path) -> None:
    file = tmp_path / "exclude.txt"

    def refused(match: str) -> None:
        for split in ("train", "val"):
            with pytest.raises(ValueError, match=match):
                names(image_folder, split, file)

    refused(r"data\.exclude: .*exclude.txt: wanted a file with one path a line: No such file")
    file.write_text("train/cat/0.png\ntrain/cat/99.png\ncat/0.png\n")
    refused(r"got 2 that it does not hold: cat/0.png, train/cat/99.png")
    (image_folder / "train" / "notes.txt").write_text("mine")
    file.write_text("train/notes.txt\n")
    refused("got 1 that it does not hold: train/notes.txt")
    file.write_bytes(b"\x00\x01\x02")
    refused("got a binary one")
    file.unlink()
    file.mkdir()
    refused("Is a directory")
    file.rmdir()
    file.write_text("".join(f"train/{n}/{i}.png\n" for n in ("cat", "dog") for i in range(8)))
    with pytest.raises(ValueError, match="wanted some images left of 16, got none"):
        names(image_folder, "train", file)
    with pytest.raises(ValueError, match=r"data\.exclude: wanted none for images with classes with data\.source=emb"):
        open_source(SourceConfig(exclude=str(file)), "train")


def test_names_come_back_as_they_were_written(tmp_path: Path) -> None:
    file, root = str(tmp_path / "exclude.txt"), tmp_path / "set"
    odd = [os.fsdecode(name) for name in (b"a b.png", b"\xff.png", "ü\u2028.png".encode(), b"#1.png")]
    write_exclude(file, root, [str(root / name) for name in odd])
    assert read_exclude(file, root) == {str(root / name): name for name in odd}
    with pytest.raises(ValueError, match=r"wanted paths without line breaks, got 'a\\nb\.png'"):
        write_exclude(file, root, [str(root / "a\nb.png")])
    assert len(read_exclude(file, root)) == 4
    assert [path.name for path in tmp_path.iterdir()] == ["exclude.txt"]
