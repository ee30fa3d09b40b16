"""Tars that are damaged or hostile: refused in one line that names the file, in little time and memory."""

import gzip
import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import tiny
from watched import memory_now, memory_peak

from sparsemae.data import tars
from sparsemae.data.shards import read_shards
from sparsemae.data.tars import read_tars, scan
from sparsemae.options.data import source_of

BLOCK = tarfile.BLOCKSIZE
END = bytes(20 * BLOCK)


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE, **fields: Any) -> bytes:
    """One block; a size below 0 in GNU's binary form, its checksum right."""
    member = tarfile.TarInfo(name)
    member.type = kind
    for field, value in fields.items():
        setattr(member, field, value)
    block = bytearray(member.tobuf(tarfile.USTAR_FORMAT)[:BLOCK])
    if size < 0:
        block[124:136] = size.to_bytes(12, "big", signed=True)
    else:
        block[124:136] = b"%011o\0" % size if size < 8**11 else b"\x80" + size.to_bytes(11, "big")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def member(name: str, content: bytes, kind: bytes = tarfile.REGTYPE, **fields: Any) -> bytes:
    return header(name, len(content), kind, **fields) + content + bytes(-len(content) % BLOCK)


def pax(**records: str) -> bytes:
    content = b""
    for key, value in records.items():
        rest = f" {key.replace('_', '.')}={value}\n".encode()
        length = next(n for n in range(len(rest), len(rest) + 9) if len(str(n)) + len(rest) == n)
        content += str(length).encode() + rest
    return member("pax", content, tarfile.XHDTYPE)


def nested(depth: int) -> bytes:
    content = member("cat/1.png", b"x") + END
    for _ in range(depth):
        content = member("in.tar", content) + END
    return content


FIRST = member("cat/0.png", b"0123")
HOSTILE: dict[str, tuple[bytes, str]] = {
    "size below 0": (FIRST + header("cat/1.png", -BLOCK) + END, "damaged header of cat/1.png, of -512 bytes"),
    "size below 0 by pax": (FIRST + pax(size="-1024") + header("cat/1.png", 0) + END, "of -1,024 bytes"),
    "size beyond the file": (FIRST + header("cat/1.png", 2**70) + END, "damaged header of cat/1.png"),
    "header of 1 GiB of names": (FIRST + header("pax", 2**30, tarfile.XHDTYPE) + END, "wanted a header of 0 to"),
    "header of less than 0": (FIRST + header("pax", -5 * BLOCK, tarfile.XHDTYPE) + END, "whole, uncompressed tar"),
    "headers of headers": (FIRST + member("g", b"9 a=bcd\n\n", tarfile.XGLTYPE) * 2000 + END, "uncompressed tar file"),
    "sparse by pax": (
        FIRST + pax(GNU_sparse_major="1", GNU_sparse_minor="0") + member("cat/1.png", b"9" * 500 + b"\n") + END,
        "uncompressed tar file",
    ),
    "sparse member": (
        FIRST + pax(GNU_sparse_map="0,1", GNU_sparse_size="1") + member("cat/1.png", b"1") + END,
        "cat/1.png: wanted its bytes in one piece, got a sparse member",
    ),
    "NUL in a name": (FIRST + pax(path="cat/1.png\0.txt") + member("x", b"1") + END, "damaged header of cat/1.png"),
    "100 tars in one another": (nested(100), "wanted at most 8 tars in one another"),
    "cut inside a header": (FIRST + header("cat/1.png", 4)[:300], "no end mark at byte 1,024, but a header"),
    "cut before a header": (FIRST, "no end mark at byte 1,024"),
    "cut inside a member": (FIRST + header("cat/1.png", 4), "uncompressed tar file: unexpected end of data"),
    "damaged header": (FIRST + b"\1" * BLOCK + member("cat/2.png", b"2") + END, "no end mark at byte 1,024"),
    "inner tar that is cut": (member("in.tar", nested(0)[:700]) + END, "uncompressed tar file: unexpected end of data"),
}


@pytest.mark.holds("held.1")
def test_each_is_refused_in_one_line_with_its_name(tmp_path: Path, came_out: Any) -> None:
    file = tmp_path / "train.tar"
    for kind, (content, message) in HOSTILE.items():
        file.write_bytes(content)
        for read in (read_tars, read_shards):
            with pytest.raises(ValueError, match=r"train\.tar") as caught:
                read([file])
            assert message in str(caught.value), kind
            assert "\n" not in str(caught.value), kind
    said = f"each its own line: {caught.value}"
    came_out("hostile or damaged tar", "; ".join(HOSTILE), 2, said, times=len(HOSTILE))


def test_what_is_whole_is_read(tmp_path: Path) -> None:
    file = tmp_path / "train.tar"
    file.write_bytes(nested(8))
    assert read_tars([file])[0][0].read() == b"x"
    file.write_bytes(FIRST + member("dog/1.png", b"1") + bytes(BLOCK))
    assert read_tars([file]).class_names == ["cat", "dog"]


def test_a_class_number_takes_no_memory(tmp_path: Path) -> None:
    file = tmp_path / "s.tar"
    shown = {"99999999999": 0, "7": 1, "9" * 60: 2}
    file.write_bytes(
        b"".join(member(f"{i}.jpg", b"x") + member(f"{i}.cls", c.encode()) for c, i in shown.items()) + END
    )
    reader = read_shards([file])
    assert reader.class_names == ["7", "99999999999", "9" * 60]
    assert reader.labels.tolist() == [1, 0, 2]
    file.write_bytes(member("1.jpg", b"x") + member("1.cls", b"-1") + END)
    with pytest.raises(ValueError, match=r"s\.tar/1\.jpg: wanted its class, an integer, .* got -1"):
        read_shards([file])


def test_a_chain_of_links_is_followed_once(tmp_path: Path) -> None:
    count = 3000
    links = (member(f"cat/{i}.png", b"", tarfile.SYMTYPE, linkname=f"{i + 1}.png") for i in range(1, count))
    file = tmp_path / "train.tar"
    file.write_bytes(b"".join(links) + member(f"cat/{count}.png", b"end") + END)
    steps, plain = [], tars._Scan()
    with file.open("rb") as stream:
        plain.read(stream, file.stat().st_size, "", 0)

    class Counted(dict[str, str]):
        def __getitem__(self, name: str) -> str:
            steps.append(name)
            return super().__getitem__(name)

    plain.links = Counted(plain.links)
    plain.follow_links()
    assert {row[0] for row in plain.rows.values()} == {plain.rows[f"cat/{count}.png"][0]}
    assert len(steps) < 4 * count
    loop = member("cat/1.png", b"", tarfile.SYMTYPE, linkname="2.png")
    file.write_bytes(loop + member("cat/2.png", b"", tarfile.SYMTYPE, linkname="1.png") + END)
    with pytest.raises(ValueError, match=r"train\.tar/cat/1\.png: wanted a file, or a link to one in the same tar"):
        scan(file)


@pytest.mark.holds("held.1")
def test_a_torn_scan_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, came_out: Any) -> None:
    monkeypatch.setattr(tars, "CACHE_SECONDS", -1.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    synced: list[Path] = []
    monkeypatch.setattr(tars, "fsync", synced.append)
    file = tmp_path / "train.tar"
    file.write_bytes(FIRST + member("dog/1.png", b"1") + END)
    fresh = scan(file)
    (kept,) = (tmp_path / "cache" / "sparsemae").iterdir()
    assert [path.name for path in synced] == [f"{kept.stem}.{os.getpid()}.npz", "sparsemae"]
    whole, again = kept.read_bytes(), 0
    for end in range(0, len(whole), 21):
        kept.write_bytes(whole[:end])
        assert scan(file).names == fresh.names
        again += kept.read_bytes() == whole
    for at in range(0, len(whole), 31):
        kept.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        found = scan(file)
        assert (found.names, found.offsets.tolist()) == (fresh.names, fresh.offsets.tolist())
    stream = io.BytesIO()
    np.savez(stream, names=np.zeros(0, np.uint8), classes=np.zeros(0, np.uint8), tars=np.zeros(0, np.uint8),
             offsets=fresh.offsets, sizes=fresh.sizes)  # fmt: skip
    kept.write_bytes(stream.getvalue())
    assert scan(file).names == fresh.names
    assert again == len(range(0, len(whole), 21))
    came_out("scan of a tar in the cache, torn", "cut off at each 21st byte, each 31st changed", 0, times=again)


def test_the_command_line_says_it_in_one_line(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "train.tar").write_bytes(HOSTILE["size below 0"][0])
    words = tiny("pretrain", tmp_path / "run", "--data.source", "tar", "--data.root", str(tmp_path / "train.tar"))
    at = words.index("--data.train_images")
    assert "train.tar: wanted a whole, uncompressed tar file" in refused(*words[:at], *words[at + 2 :])


def test_a_look_at_the_first_members_believes_no_size(tmp_path: Path) -> None:
    """As it is taken to tell shards from tars of folders, before anything is scanned."""
    file = tmp_path / "set.tar"
    file.write_bytes(member("1.jpg", b"x") + member("1.cls", b"0") + END)
    assert source_of(str(file)) == "wds"
    file.write_bytes(header("x", 1 << 30, tarfile.XHDTYPE))
    os.truncate(file, (1 << 30) + len(END))  # a hole
    before = memory_now()
    assert source_of(str(file)) == "tar"
    assert memory_peak() - before < 8 << 20
    with gzip.open(file, "wb") as stream:
        stream.write(member("1.jpg", b"x") + member("1.cls", b"0") + END)
    assert source_of(str(file)) == "tar"
