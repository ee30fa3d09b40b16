"""Tar files by index, against timm's own tar reader and Python's tarfile."""

import io
import pickle
import tarfile
from pathlib import Path

import pytest
from PIL import Image
from timm.data.readers.reader_image_in_tar import ReaderImageInTar

from sparsemae.data import tars
from sparsemae.data.shards import read_shards
from sparsemae.data.tars import read_tars, scan


def jpeg(shade: int) -> bytes:
    content = io.BytesIO()
    Image.new("L", (8, 8), shade).save(content, "JPEG")
    return content.getvalue()


def write(file: Path, members: dict[str, bytes]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file


CLASSES = {"cat2": [1, 2, 3], "cat10": [4, 5], "dog": [6, 7, 8, 9]}
ENTRIES = [(name, shade) for name, shades in CLASSES.items() for shade in shades]


def one_tar(folder: Path) -> list[Path]:
    members = {f"./set/{name}/{shade}.jpg": jpeg(shade) for name, shade in ENTRIES}
    return [write(folder / "train.tar", members | {"./set/notes.txt": b"mine"})]


def tar_per_class(folder: Path) -> list[Path]:
    return [
        write(folder / f"{name}.tar", {f"{shade}.jpg": jpeg(shade) for shade in shades})
        for name, shades in CLASSES.items()
    ]


def tar_of_tars(folder: Path) -> list[Path]:
    """As ImageNet's training images are published."""
    inner = {file.name: file.read_bytes() for file in tar_per_class(folder / "inner")}
    return [write(folder / "ILSVRC2012_img_train.tar", inner)]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # timm leaves its tar open
@pytest.mark.parametrize("layout", [one_tar, tar_per_class, tar_of_tars])
def test_images_and_classes_are_those_of_timms_reader(tmp_path: Path, layout) -> None:
    files = layout(tmp_path / "set")
    ours = read_tars(sorted(files))
    theirs = ReaderImageInTar(str(files[0] if len(files) == 1 else tmp_path / "set"))
    assert ours.class_names == list(theirs.class_name_to_idx) == list(CLASSES)
    wanted = sorted((file.read(), int(label)) for file, label in (theirs[i] for i in range(len(theirs))))
    assert sorted((file.read(), label) for file, label in (ours[i] for i in range(len(ours)))) == wanted
    assert len(wanted) == len(ENTRIES)
    assert len({ours.filename(i) for i in range(len(ours))}) == len(ENTRIES)
    assert [file.read() for file, _ in (pickle.loads(pickle.dumps(ours))[i] for i in range(3))] == [
        file.read() for file, _ in (ours[i] for i in range(3))
    ]


def test_members_are_named_as_if_the_tar_were_a_folder(tmp_path: Path) -> None:
    reader = read_tars(one_tar(tmp_path))
    assert reader.filename(0) == f"{tmp_path}/train.tar/set/cat2/1.jpg"
    nested = read_tars(tar_of_tars(tmp_path))
    assert nested.filename(0) == f"{tmp_path}/ILSVRC2012_img_train.tar/cat2.tar/1.jpg"


def shard(number: int) -> dict[str, bytes]:
    """Webdataset's layout: members of one sample share the name up to the first dot."""
    return {
        f"a.b/{number}.jpg": jpeg(number), f"a.b/{number}.cls": str(number).encode(), f"a.b/{number}.json": b"{}",
        f"c{number}.JPEG": jpeg(9 * number), f"c{number}.cls": b"0\n",
    }  # fmt: skip


def test_shards_pair_images_with_their_classes(tmp_path: Path) -> None:
    files = [write(tmp_path / f"s-{i}.tar", shard(i)) for i in range(3)]
    reader = read_shards(files)
    found = {Path(reader.filename(i)).relative_to(tmp_path).as_posix(): reader[i] for i in range(len(reader))}
    assert {name: label for name, (_, label) in found.items()} == {
        "s-0.tar/a.b/0.jpg": 0, "s-0.tar/c0.JPEG": 0, "s-1.tar/a.b/1.jpg": 1, "s-1.tar/c1.JPEG": 0,
        "s-2.tar/a.b/2.jpg": 2, "s-2.tar/c2.JPEG": 0,
    }  # fmt: skip
    assert found["s-2.tar/c2.JPEG"][0].read() == jpeg(18)
    assert reader.class_names == ["0", "1", "2"]


def test_shards_without_classes_serve_pretraining(tmp_path: Path) -> None:
    reader = read_shards([write(tmp_path / "s.tar", {"1.jpg": jpeg(1), "2.png": jpeg(2)})])
    assert (reader.class_names, [reader[i][1] for i in range(2)]) == ([""], [0, 0])


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"1.jpg": b"", "1.cls": b"cat"}, r"s\.tar/1\.jpg: wanted its class, an integer, .* got cat"),
        ({"1.jpg": b"", "1.cls": b"3", "2.jpg": b""}, r"s\.tar/2\.jpg: wanted its class, an integer, .* got none"),
        ({"1.txt": b""}, r"s\.tar: wanted KEY\.jpg .* found 1 \.txt"),
    ],
)
def test_mistakes_in_shards_are_named(tmp_path: Path, members: dict[str, bytes], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_shards([write(tmp_path / "s.tar", members)])


def test_torn_and_compressed_tars_are_refused(tmp_path: Path) -> None:
    (file,) = one_tar(tmp_path)
    content = file.read_bytes()
    file.write_bytes(content[:4000])
    with pytest.raises(ValueError, match=r"train\.tar: wanted a whole, uncompressed tar file"):
        read_tars([file])
    file.write_bytes(content)
    assert len(read_tars([file])) == len(ENTRIES)
    with tarfile.open(file, "w:gz") as archive:
        archive.add(__file__)
    with pytest.raises(ValueError, match=r"train\.tar: wanted a whole, uncompressed tar file"):
        read_tars([file])


def test_a_long_scan_is_kept_until_the_tar_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tars, "CACHE_SECONDS", -1.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = write(tmp_path / "s.tar", shard(1))
    fresh = scan(file)
    (kept,) = (tmp_path / "cache" / "sparsemae").iterdir()
    monkeypatch.setattr(tars, "_Scan", dict)  # the file is not read again
    again = scan(file)
    assert (again.names, again.classes) == (fresh.names, fresh.classes)
    assert (again.offsets.tolist(), again.sizes.tolist()) == (fresh.offsets.tolist(), fresh.sizes.tolist())
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    kept.write_bytes(b"torn")
    assert scan(file).names == fresh.names
    write(file, shard(2))
    assert "a.b/2.jpg" in scan(file).names
