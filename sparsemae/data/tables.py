"""Images listed in a CSV file with their classes, as Kaggle's competitions have them.

The order is that of the class folders that the same files would make, so that one seed gives one result for both.
"""

import csv
import os
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from sparsemae.data.folders import Openers
from sparsemae.data.images import SUFFIXES
from sparsemae.data.tree import find_splits, is_image, natural_order, one_form, split_of, splits_said, subfolders
from sparsemae.files import existing

ENDINGS = (".csv", ".tsv")
IMAGE_COLUMNS = ("image", "file", "filename", "file_name", "path", "image_id", "id")
LABEL_COLUMNS = ("label", "class", "category", "target")


class TableReader:
    """timm's reader interface over the files that a table names."""

    def __init__(
        self, table: Path, image_column: str | None = None, label_column: str | None = None, notes: Sequence[str] = ()
    ) -> None:
        """Raises ValueError, naming the table and the line, where a row has no file, no class, or another one."""
        folders = _folders(existing(table))
        rows = _rows(table, folders, image_column, label_column)
        for line, name, label in rows:
            if not name or not label:
                raise ValueError(f"{table}: line {line}: wanted a file and a class, got {name!r:.40}, {label!r:.40}")
        files = {name: _file(folders, name) for _, name, _ in rows}
        if missing := [name for name, file in files.items() if file is None]:
            raise ValueError(
                f"{table}: wanted an image file {missing[0]} beside it or in the folder "
                f"{' or '.join(folder.name for folder in folders[1:])}, found none, of {len(missing):,} of "
                f"{len(files):,} names"
            )
        composed, said = one_form(label for *_, label in rows)
        first, classes = dict[str, str](), dict[str, str]()  # a file's first name, and the class of that
        for line, name, label in rows:
            known = first.setdefault(os.path.normpath(str(files[name])), name)
            if composed[before := classes.setdefault(known, label)] != composed[label]:
                names = " and ".join(dict.fromkeys((known, name)))
                raise ValueError(f"{table}: line {line}: wanted one class of {names}, got {before} and {label}")
        self.class_names = natural_order(set(composed.values()))
        by_class = {f"{label}/{name.removeprefix(f'{label}/')}": name for name, label in classes.items()}
        if len(by_class) < len(classes):  # the same name in the class's folder and outside it
            by_class = {f"{label}/{name}": name for name, label in classes.items()}
        ordered = [by_class[path] for path in natural_order(by_class)]
        number, repeated = {name: i for i, name in enumerate(self.class_names)}, len(rows) - len(classes)
        self.paths = [files[name] for name in ordered]
        self.labels = np.array([number[composed[classes[name]]] for name in ordered], np.int64)
        twice = [f"{table}: {repeated:,} rows repeat an image, which counts once"] * bool(repeated)
        self.notes = [*notes, *said, *twice]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return open(self.filename(index), "rb"), int(self.labels[index])

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        """Its path."""
        return str(self.paths[index])

    def size(self, index: int) -> int:
        """Bytes of an image."""
        return os.stat(self.filename(index)).st_size


def _lines(table: Path) -> list[list[str]]:
    """Of tabs, semicolons and commas the one that the first line has most often is between the cells."""
    try:
        text = existing(table).read_text("utf-8-sig")
        delimiter = max("\t;,", key=text.partition("\n")[0].count)
        return list(csv.reader(text.splitlines(), delimiter=delimiter, strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{table}: wanted a table in UTF-8: {error}") from error


def _rows(
    table: Path, folders: Sequence[Path], image_column: str | None, label_column: str | None
) -> list[tuple[int, str, str]]:
    """Line, file and class of each row below the header; a first line with an image or a class of others is none."""
    lines = _lines(table)
    if len(lines) < 2 or len(lines[0]) < 2:
        first = " ".join(cell for row in lines[:1] for cell in row)
        raise ValueError(f"{table}: wanted a header and rows of a file and its class, got {first!r:.80}")
    header, image, label = [name.strip() for name in lines[0]], 0, 1
    below = {row[1].strip() for row in lines[1:] if len(row) > 1}
    named = is_image(header[0]) or _file(folders, header[0]) is not None or header[1] in below
    headed = not named or image_column is not None or label_column is not None
    if headed:
        image = _column(table, header, image_column, IMAGE_COLUMNS, 0)
        label = _column(table, header, label_column, LABEL_COLUMNS, 1)
    if image == label:
        raise ValueError(
            f"{table}: wanted two columns, of images and of classes (--data.image_column and --data.label_column name "
            f"them), got {header[image]} for both among {', '.join(header)}"
        )
    cells = [(line, [*row, *[""] * len(header)]) for line, row in enumerate(lines, 1) if any(row)]
    return [(line, row[image].strip(), row[label].strip()) for line, row in cells[headed:]]


def _column(table: Path, header: list[str], wanted: str | None, usual: tuple[str, ...], default: int) -> int:
    if wanted is not None:
        if wanted not in header:
            raise ValueError(f"{table}: wanted a column {wanted}, got {', '.join(header)}")
        return header.index(wanted)
    lower = [name.lower() for name in header]
    return next((lower.index(name) for name in usual if name in lower), default)


def _folders(table: Path) -> list[Path]:
    """Where its images may lie: beside it, in a folder called so or, if that is but one, as its split, or in images.

    In train only if its name says no other split: names like 0.png are in every split.
    """
    said = splits_said(table.stem)
    own = [name for name in subfolders(table.parent) if split_of(name) in said]
    names = (table.stem, *own * (len(own) == 1), "images") if said else (table.stem, "images", "train")
    return [table.parent, *(table.parent / name for name in dict.fromkeys(names))]


def _file(folders: Sequence[Path], name: str) -> Path | None:
    """The file of a name, which may lack its ending, in the first folder that has it."""
    for folder, ending in product(folders, ("", *SUFFIXES)):
        if os.path.isfile(file := folder / f"{name}{ending}"):  # of a name too long, too
            return file
    return None


def open_tables(root: Path, image_column: str | None, label_column: str | None) -> Openers:
    """Readers of a table, or of those in a folder that are named as splits. A test without classes is none, and said.

    Raises ValueError, naming them, if none is train, or two are the same split.
    """
    if root.is_file():
        return {"train": ("", partial(TableReader, root, image_column, label_column))}
    tables = dict[str, Path]()
    for file in (file for ending in ENDINGS for file in sorted(root.glob(f"*{ending}"))):
        if tables.setdefault(file.stem, file) != file and split_of(file.stem):
            raise ValueError(f"{root}: wanted one table for {file.stem}, got {tables[file.stem].name} and {file.name}")
    found = find_splits(root, tables)
    if "train" not in found:
        raise ValueError(f"{root}: wanted a table train.csv, got {', '.join(map(str, tables.values())) or 'none'}")
    notes = list[str]()
    if "test" in found and all(len(row) < 2 for row in _lines(tables[found["test"]])[:1]):
        notes.append(f"{tables[found.pop('test')].name} has no column of classes: it is no split, and left")
    return {
        split: (tables[name].name, partial(TableReader, tables[name], image_column, label_column, notes))
        for split, name in found.items()
    }
