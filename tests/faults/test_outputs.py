"""What is written appears whole, as a regular file, or not at all; what cannot be replaced is refused."""

import os
import re
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, tiny
from harness import fill, small_disk
from PIL import Image

from sparsemae import files
from sparsemae.cli import main
from sparsemae.files import replacing, write_atomic


def link_to_a_pipe(path: Path) -> None:
    os.mkfifo(path.with_name("real"))
    path.symlink_to("real")


MAKE: dict[str, Callable[[Path], None]] = {
    "pipe": os.mkfifo,
    "folder": os.mkdir,
    "device": lambda path: os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3)),  # as /dev/null
    "link to a pipe": link_to_a_pipe,
}
ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: makes a device")
KINDS = [pytest.param(kind, marks=ROOT_ONLY) if kind == "device" else kind for kind in MAKE]


def test_windows_writes_files_to_the_disk_that_are_open_for_writing_and_no_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = os.open

    def as_there(path: str | Path, flags: int, *more: int) -> int:
        if os.path.isdir(path) or not flags & (os.O_RDWR | os.O_WRONLY):
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, flags, *more)

    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(os, "open", as_there)
    write_atomic(tmp_path / "out", "text")
    assert (tmp_path / "out").read_text() == "text"


@pytest.mark.holds("held.1")
@pytest.mark.parametrize("kind", KINDS)
def test_15_what_is_no_file_is_refused_and_left_as_it_is(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "out"
    MAKE[kind](path)
    before = {name: os.lstat(tmp_path / name) for name in os.listdir(tmp_path)}
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}: wanted a file, got a "):
        write_atomic(path, "text")
    after = {name: os.lstat(tmp_path / name) for name in os.listdir(tmp_path)}
    assert {name: status.st_ino for name, status in after.items()} == {
        name: status.st_ino for name, status in before.items()
    }
    assert after["out"].st_mode == before["out"].st_mode


@pytest.mark.holds("held.1")
def test_15_a_links_target_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    link, target = tmp_path / "link", tmp_path / "there" / "target"
    link.symlink_to("there/target")
    for content in ("dangling at first", "then not"):
        write_atomic(link, content)
        assert link.is_symlink()
        assert target.read_text() == content
        assert not target.is_symlink()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["link", "target", "there"]


@pytest.mark.holds("held.1")
def test_15_somebodys_link_under_the_temporary_name_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("secrets.token_hex", lambda size: "guessed")
    (tmp_path / "precious").write_text("precious")
    (tmp_path / ".out.sparsemae-guessed.tmp").symlink_to("precious")
    with pytest.raises(OSError, match=r"out: File exists$"):
        write_atomic(tmp_path / "out", "text")
    assert (tmp_path / "precious").read_text() == "precious"


def test_two_writers_of_one_file_publish_each_their_own(tmp_path: Path) -> None:
    out = tmp_path / "out"
    first, second = replacing(out), replacing(out)
    first.__enter__().write_text("the first, whole")
    (later := second.__enter__()).write_text("half")
    first.__exit__(None, None, None)
    assert out.read_text() == "the first, whole"
    later.write_text("the second, whole")
    second.__exit__(None, None, None)
    assert out.read_text() == "the second, whole"
    assert list(tmp_path.iterdir()) == [out]


def test_what_killed_writers_left_goes_after_a_day(tmp_path: Path) -> None:
    names = (".out.sparsemae-1.tmp", ".out.sparsemae-2.tmp", ".others.tmp")
    for name in names:
        (tmp_path / name).write_text("half")
    for name in (names[0], names[2]):
        os.utime(tmp_path / name, (0, 0))
    write_atomic(tmp_path / "out", "text")
    assert sorted(os.listdir(tmp_path)) == [".others.tmp", ".out.sparsemae-2.tmp", "out"]


@pytest.mark.holds("held.1")
def test_15_file_and_folder_are_on_the_disk_before_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    fsync, replace = files.fsync, Path.replace

    def noted_fsync(path: Path) -> None:
        order.append(f"fsync {path.name}")
        fsync(path)

    def noted_replace(path: Path, target: Path) -> Path:
        order.append(f"replace {path.name}")
        return replace(path, target)

    monkeypatch.setattr(files, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    write_atomic(tmp_path / "out", "text")
    told = re.sub(r"-[0-9a-f]{8}\b", "", " ".join(order))
    assert told == f"fsync .out.sparsemae.tmp replace .out.sparsemae.tmp fsync {tmp_path.name}"


@pytest.mark.holds("held.1")
def test_15_a_failure_names_the_file_and_leaves_what_was_there(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 0.1) as disk:
        write_atomic(disk / "out", "before")
        fill(disk / "ballast")
        with pytest.raises(OSError, match=f"^{re.escape(str(disk / 'out'))}: No space left on device$"):
            write_atomic(disk / "out", b"0" * 100_000)
        with pytest.raises(OSError, match=r"picture\.png: "), replacing(disk / "picture.png") as temporary:  # noqa: PT012
            noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
            Image.fromarray(noise).save(temporary, "PNG")
        assert (disk / "out").read_text() == "before"
        assert sorted(path.name for path in disk.iterdir()) == ["ballast", "out"]
    with pytest.raises(OSError, match="elsewhere: wrong"), replacing(tmp_path / "out"):
        raise OSError("elsewhere: wrong")


@pytest.mark.holds("held.1")
@pytest.mark.slow
def test_15_commands_refuse_and_name_what_they_cannot_write(
    tmp_path: Path, image_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    main(tiny("finetune", tmp_path / "run", "--trainer.max_steps", "1"))
    pipe, run = tmp_path / "pipe", str(tmp_path / "run")
    os.mkfifo(pipe)
    (image_folder / "train" / "cat" / "0.png").write_bytes(b"")
    check = ["check", "--data.source", "folder", "--data.root", str(image_folder), "--write-exclude"]
    commands = [["report", run, "--out"], ["pack", run], check]
    for words in commands:
        with pytest.raises(SystemExit) as exit_:
            main([*words, str(pipe)])
        assert exit_.value.code == 2
        assert f"{pipe}: wanted a file, got a device or pipe" in capfd.readouterr().err.splitlines()[-1]
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    with small_disk(tmp_path / "disk", 0.1) as disk:
        fill(disk / "ballast")
        for words in (["report", run, "--out"], ["pack", run]):
            with pytest.raises(SystemExit):
                main([*words, str(disk / "out")])
            assert f"{disk / 'out'}: No space left on device" in capfd.readouterr().err.splitlines()[-1]


OWN_WAY = {
    "sparsemae/files.py",
    "sparsemae/data/embedded.py",  # makes the file that ships
    "sparsemae/data/tars.py",  # a cache
    "sparsemae/commands/export.py",  # a folder, which is renamed
    "sparsemae/commands/predict.py",  # lines, into what `replacing` gives
    "sparsemae/study/stages.py",  # a log, which grows
    "sparsemae/study/command.py",  # images, whose folder is renamed
    "sparsemae/study/results.py",  # the null device
    "sparsemae/training/logs.py",  # lines, which are appended
    "sparsemae/training/fit.py",  # checkpoints, whose folders are renamed
    "sparsemae/benchmark/saving.py",  # the same
}


@pytest.mark.holds("held.1")
def test_15_all_outputs_go_the_same_way() -> None:
    opens, saves = r"""open\([^)]*["'][wax]b?\+?["']""", r"\.savez?(?:fig)?\((?!temporary|stream)\w+"
    writes = re.compile(rf"\.write_(?:text|bytes)\(|{opens}|{saves}")
    found = {
        str(path.relative_to(ROOT)): writes.findall(path.read_text()) for path in (ROOT / "sparsemae").rglob("*.py")
    }
    assert {name for name, hits in found.items() if hits} <= OWN_WAY
