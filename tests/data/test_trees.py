"""Over trees of nasty names: a folder, its tar and shards written from it are the same set, in any process."""

import io
import json
import os
import random
import subprocess
import sys
import tarfile
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from cases import write_tar
from hypothesis import HealthCheck, given, settings, strategies as st

NAMES = [
    "a", "A", "b", "1", "01", "10", "2", "caf\u00e9", "cafe\u0301", "x y", "-d", "#", "\u72ac", "'q'", "a.b", "\u00b2",
    "n\u0131",    ".hidden", "__MACOSX", "@eaDir", "._a", "x.tar", "train", "Test",
]  # fmt: skip
FILES = ["1.jpg", "01.jpg", "1.JPG", "10.png", "2.webp", "._1.jpg", ".DS_Store", "notes.txt", "a b.jpeg", "\u72ac.gif"]
KINDS = ["file", "file", "file", "twice", "hard link", "link"]
Tree = list[tuple[str, str]]
"""Path and kind of each file, in the order of the tar."""


@st.composite
def trees(draw: st.DrawFn) -> Tree:
    """Two class folders or more, none of them named as a split."""
    # two of them visible: a tar's only folder would be one that all members share, and no class
    several = st.lists(st.sampled_from(NAMES[:-2]), min_size=2, max_size=4, unique=True)
    tops = draw(several.filter(lambda names: sum(name[0] not in "._@" for name in names) > 1))
    below = st.lists(st.sampled_from(NAMES), max_size=3)
    found = {}
    for top in tops:
        for parts in draw(st.lists(st.tuples(below, st.sampled_from(FILES), st.sampled_from(KINDS)), max_size=4)):
            folders, file, kind = parts
            found["/".join([top, *folders, file])] = kind
        found.setdefault(f"{top}/sure.jpg", "file")
    return draw(st.permutations(sorted(found.items())))


def write(root: Path, tree: Tree) -> None:
    """The tree as a folder, and as a tar."""
    (root / "folder").mkdir(parents=True)
    plain: list[str] = []
    with tarfile.open(root / "set.tar", "w") as archive:
        for number, (path, kind) in enumerate(tree):
            file = root / "folder" / path
            file.parent.mkdir(parents=True, exist_ok=True)
            member, content = tarfile.TarInfo(path), f"{number:04d}".encode()
            if kind in ("link", "hard link") and plain:
                target = plain[0]
                member.type = tarfile.SYMTYPE if kind == "link" else tarfile.LNKTYPE
                member.linkname = os.path.relpath(target, os.path.dirname(path)) if kind == "link" else target
                file.symlink_to(member.linkname) if kind == "link" else file.hardlink_to(root / "folder" / target)
                archive.addfile(member)
                continue
            file.write_bytes(content)
            for body in [b"old!", content] if kind == "twice" else [content]:
                member.size = len(body)
                archive.addfile(member, io.BytesIO(body))
            if all(not part.startswith((".", "__", "@")) for part in path.split("/")):
                plain.append(path)


LIST = """
import json, os, random, sys
from sparsemae.data.sources import find_source
from sparsemae.options.data import SourceConfig
scandir, order = os.scandir, random.Random(os.environ["PYTHONHASHSEED"])
class Shuffled:
    def __init__(self, path):
        with scandir(path) as entries:
            self.entries = list(entries)
        order.shuffle(self.entries)
    def __enter__(self):
        return iter(self.entries)
    def __exit__(self, *_):
        pass
os.scandir = Shuffled
def listed(source, root):
    try:
        found = find_source(SourceConfig(source, root)).open("all")
    except ValueError as error:
        return str(error)
    rows = []
    for index in range(len(found)):
        file, label = found.open(index)
        with file:
            rows.append([found.target(label), file.read().decode()])
    return [found.class_names, rows]
roots = sorted(os.listdir(sys.argv[1]), key=int)
kinds = {"folder": "folder", "tar": "set.tar", "wds": "shards"}
found = [[listed(kind, f"{sys.argv[1]}/{root}/{name}") for kind, name in kinds.items()] for root in roots]
print(json.dumps(found))
"""


def list_all(root: Path, seed: int) -> Any:
    said = subprocess.run(
        [sys.executable, "-c", LIST, str(root)], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONHASHSEED": str(seed)},
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    return json.loads(said.stdout)


def expected(tree: Tree) -> set[tuple[str, str]]:
    """Class and content of what is seen, by ten lines of another kind."""
    plain: list[str] = []
    found = set()
    for number, (path, kind) in enumerate(tree):
        parts, content = path.split("/"), f"{number:04d}"
        seen = not any(part.startswith(".") or part in ("__MACOSX", "@eaDir") for part in parts)
        if kind in ("link", "hard link") and plain:
            content = plain[0]
        elif all(not part.startswith((".", "__", "@")) for part in parts):
            plain.append(content)
        if seen and parts[-1].lower().endswith((".jpg", ".png", ".webp", ".jpeg", ".gif")):
            found.add((unicodedata.normalize("NFC", parts[0]), content))
    return found


@pytest.mark.filterwarnings("ignore:get_state and legacy")  # hypothesis asks numpy, whose generator is ours
@pytest.mark.slow
@pytest.mark.holds("right.2")
def test_folder_tar_and_shards_are_one_set_under_any_hash_seed(tmp_path: Path, figure: Any) -> None:
    found: list[Tree] = []

    @settings(max_examples=150, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(trees())
    def collect(tree: Tree) -> None:
        found.append(tree)

    collect()
    for number, tree in enumerate(found):
        root = tmp_path / str(number)
        write(root, tree)
        numbers = {name: i for i, name in enumerate(sorted({name for name, _ in expected(tree)}))}
        samples = random.Random(number).sample(sorted(expected(tree)), len(expected(tree)))
        members = [
            (f"{i}.{ending}", body.encode())
            for i, (name, content) in enumerate(samples)
            for ending, body in (("jpg", content), ("cls", str(numbers[name])))
        ]
        write_tar(root / "shards" / "train.tar", members)
    one, *others = (list_all(tmp_path, seed) for seed in (0, 1, 2))
    assert all(other == one for other in others)
    for tree, (folder, tar, shards) in zip(found, one, strict=True):
        assert not isinstance(folder, str), (tree, folder)
        wanted = sorted(expected(tree))
        for names, rows in (folder, tar):
            assert sorted({(names[label], content) for label, content in rows}) == wanted, tree
        assert folder[0] == tar[0], tree
        assert sorted(folder[1]) == sorted(tar[1]), tree
        partition = {frozenset(c for k, c in shards[1] if k == label) for label, _ in shards[1]}
        assert partition == {frozenset(c for n, c in wanted if n == name) for name, _ in wanted}, tree
    figure(f"{len(found)} trees, 3 hash seeds")
