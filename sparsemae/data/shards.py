"""WebDataset shards: a sample is the members whose names are the same up to the first dot of the last part.

The image is ``KEY.jpg`` (or another of our formats), its class an integer in ``KEY.cls``. Such numbers are names: the
classes are the numbers that occur, in order, as if each had a folder of its own.
"""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from sparsemae.data.images import SUFFIXES
from sparsemae.data.tars import Member, Members, TarReader, scan

_NAME = re.compile(r"^((?:.*/)?[^./][^./]*)\.([^/]*)$")
_PREFERRED = ("jpg", "jpeg", "png", *(suffix[1:] for suffix in SUFFIXES))


def read_shards(files: Sequence[Path]) -> TarReader:
    """Samples of shards; without any class in any of them, all of one without a name.

    Raises ValueError, naming shard and member, if one is no plain tar, a class is missing or no integer, or an image's
    key has dots.
    """
    images: list[Member] = []
    found: list[str | None] = []
    endings, twice = Counter[str](), list[str]()
    for file in files:
        members = scan(file)
        chosen, classes = _samples(file, members, endings, twice)
        for key, row in chosen.items():
            name = members.names[row]
            images.append(Member(file, name, name, int(members.offsets[row]), int(members.sizes[row])))
            found.append(classes.get(key))
    if not images:
        raise ValueError(f"{files[0]}: wanted KEY.jpg (or another image) with KEY.cls in it, found {_shown(endings)}")
    notes = [f"{len(twice):,} samples have two images, of which one is read: {twice[0]}, ..."] if twice else []
    if all(text is None for text in found):
        reader = TarReader(images, [0] * len(images), [""], notes)
        reader.no_classes = (
            f"{images[0].file}/{images[0].name}: wanted its class, an integer, in a member of that name ending in "
            f".cls, got none in any shard (they hold {_shown(endings)})"
        )
        return reader
    for image, text in zip(images, found, strict=True):
        if text is None or not text.isdecimal():
            raise ValueError(
                f"{image.file}/{image.name}: wanted its class, an integer, in a member of that name ending in .cls, "
                f"got {text or 'none'}" + f" (the shards hold {_shown(endings)})" * (text is None)
            )
    numbers = [int(text or 0) for text in found]
    there = sorted(set(numbers))
    if there[-1] >= len(there):
        notes.append(f"class numbers are names: {len(there):,} occur between {there[0]} and {there[-1]}, with gaps")
    label = {number: i for i, number in enumerate(there)}
    return TarReader(images, [label[number] for number in numbers], [str(number) for number in there], notes)


def _samples(
    file: Path, members: Members, endings: Counter[str], twice: list[str]
) -> tuple[dict[str, int], dict[str, str]]:
    """The member that is the image of each key, and the text of each key's class."""
    chosen: dict[str, int] = {}
    classes: dict[str, str] = {}
    dotted: dict[str, str] = {}
    rank = {ending: i for i, ending in reversed(list(enumerate(_PREFERRED)))}
    ranks: dict[str, int] = {}
    for row, (name, text) in enumerate(zip(members.names, members.classes, strict=True)):
        if not (match := _NAME.match(name)):
            continue
        key, ending = match[1], match[2].lower()
        endings[ending] += 1
        if ending == "cls":
            classes[key] = text
        elif ending in rank:
            if key in chosen:
                twice.append(f"{file}/{name}")
            if rank[ending] < ranks.get(key, len(rank)):
                chosen[key], ranks[key] = row, rank[ending]
        elif ending.rpartition(".")[2] in rank:
            dotted.setdefault(key, name)
    for key, name in dotted.items():
        if key not in chosen:
            raise ValueError(f"{file}/{name}: wanted KEY.jpg, a key without dots, got the key {key.rpartition('/')[2]}")
    return chosen, classes


def _shown(endings: Counter[str]) -> str:
    return ", ".join(f"{count:,} .{ending}" for ending, count in endings.most_common(5)) or "nothing"
