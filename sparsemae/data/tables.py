"""Images listed in a CSV file with their classes, as Kaggle's competitions have them.

The order is that of the class folders that the same files would make, so that one seed gives one result for both.
"""

import csv
import os
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from sparsemae.data.folders import Openers
from sparsemae.data.images import SUFFIXES
from sparsemae.data.tree import find_splits, natural_order
from sparsemae.files import existing

ENDINGS = (".csv", ".tsv")
IMAGE_COLUMNS = ("image", "file", "filename", "file_name", "path", "image_id", "id")
LABEL_COLUMNS = ("label", "class", "category", "target")


class TableReader:
    """timm's reader interface over the files that a table names."""

    def __init__(self, table: Path, image_column: str | None = None, label_column: str | None = None) -> None:
        """Raises ValueError, naming the table and the line, where a row has no file, no class, or another one."""
        rows, classes = _rows(table, image_column, label_column), dict[str, str]()
        for line, name, label in rows:
            if not name or not label:
                raise ValueError(f"{table}: line {line}: wanted a file and a class, got {name!r:.40}, {label!r:.40}")
            if (before := classes.setdefault(name, label)) != label:
                raise ValueError(f"{table}: line {line}: wanted one class of {name}, got {before} and {label}")
        files = {name: _file(table, name) for name in classes}
        if missing := [name for name, file in files.items() if file is None]:
            raise ValueError(
                f"{table}: wanted an image file {missing[0]} beside it or in the folder {table.stem}, found none, of "
                f"{len(missing):,} of {len(files):,} names"
            )
        self.class_names = natural_order(set(classes.values()))
        by_class = {f"{label}/{name.removeprefix(f'{label}/')}": name for name, label in classes.items()}
        if len(by_class) < len(classes):  # the same name in the class's folder and outside it
            by_class = {f"{label}/{name}": name for name, label in classes.items()}
        ordered = [by_class[path] for path in natural_order(by_class)]
        number, repeated = {name: i for i, name in enumerate(self.class_names)}, len(rows) - len(classes)
        self.paths = [files[name] for name in ordered]
        self.labels = np.array([number[classes[name]] for name in ordered], np.int64)
        self.notes = [f"{table}: {repeated:,} rows repeat an image, which counts once"] * bool(repeated)

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


def _rows(table: Path, image_column: str | None, label_column: str | None) -> list[tuple[int, str, str]]:
    """Line, file and class of each row below the header; a first line that names an image is no header."""
    try:
        text = existing(table).read_text("utf-8-sig")
        first = text.partition("\n")[0]
        lines = list(csv.reader(text.splitlines(), delimiter=max("\t;,", key=first.count), strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{table}: wanted a table in UTF-8: {error}") from error
    if len(lines) < 2 or len(lines[0]) < 2:
        raise ValueError(f"{table}: wanted a header and rows of a file and its class, got {first!r:.80}")
    header = [name.strip() for name in lines[0]]
    if image_column is None and label_column is None and _file(table, header[0]) is not None:
        return [(line, row[0].strip(), row[1].strip()) for line, row in enumerate(lines, 1) if len(row) > 1]
    image = _column(table, header, image_column, IMAGE_COLUMNS, 0)
    label = _column(table, header, label_column, LABEL_COLUMNS, 1)
    cells = [(line, [*row, *[""] * len(header)]) for line, row in enumerate(lines[1:], 2) if any(row)]
    return [(line, row[image].strip(), row[label].strip()) for line, row in cells]


def _column(table: Path, header: list[str], wanted: str | None, usual: tuple[str, ...], default: int) -> int:
    if wanted is not None:
        if wanted not in header:
            raise ValueError(f"{table}: wanted a column {wanted}, got {', '.join(header)}")
        return header.index(wanted)
    lower = [name.lower() for name in header]
    return next((lower.index(name) for name in usual if name in lower), default)


def _file(table: Path, name: str) -> Path | None:
    """The file of a name, which may lack its ending, beside the table or in a folder that is called so."""
    folders = (table.parent, table.parent / table.stem, table.parent / "images", table.parent / "train")
    for folder, ending in product(folders, ("", *SUFFIXES)):
        if os.path.isfile(file := folder / f"{name}{ending}"):  # of a name too long, too
            return file
    return None


def open_tables(root: Path, image_column: str | None, label_column: str | None) -> Openers:
    """Readers of a table, or of those in a folder that are named as splits. One without classes is no split."""
    if root.is_file():
        return {"train": ("", partial(TableReader, root, image_column, label_column))}
    tables = {file.stem: file for ending in ENDINGS for file in sorted(root.glob(f"*{ending}"))}
    found = find_splits(root, tables)
    if "train" not in found:
        raise ValueError(f"{root}: wanted a table train.csv, got {', '.join(map(str, tables.values())) or 'none'}")
    return {
        split: (tables[name].name, partial(TableReader, tables[name], image_column, label_column))
        for split, name in found.items()
        if split != "test" or len(existing(tables[name]).read_text("utf-8-sig").partition("\n")[0].split(",")) > 1
    }
