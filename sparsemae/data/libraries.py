"""Images of other libraries behind timm's reader interface: HF datasets, and torchvision's own sets."""

import importlib.util
import inspect
import io
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torchvision.datasets

from sparsemae.data.folders import Openers
from sparsemae.data.tree import Split, find_splits, natural_order, one_form

PARTS: tuple[Split, Split] = ("train", "val")
# torchvision's names for the two splits, best first.
TORCHVISION_SPLITS: dict[str, tuple[str, ...]] = {
    "train": ("train", "trainval", "train-standard"),
    "val": ("val", "valid", "validation", "test"),
}


class NumberedReader:
    """Images without names of their own."""

    def __init__(self, items: Any, name: str, class_names: list[str], notes: Sequence[str] = ()) -> None:
        self.items, self.name, self.class_names, self.notes = items, name, class_names, notes

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        """The set as if it were a folder."""
        return f"{self.name}/{index:07d}"


class HFReader(NumberedReader):
    """Rows of an HF dataset; the image is decoded by us."""

    def __init__(self, rows: Any, root: Path, split: str, image_column: str | None, label_column: str | None) -> None:
        """Raises ValueError, naming the columns, if there is no one column of images, or of classes."""
        import datasets

        kinds, where = rows.features, f"{root}: {split}"
        shown = ", ".join(f"{name} ({_kind(kind)})" for name, kind in kinds.items())

        def column(option: str, wanted: str | None, usual: str, fit: Callable[[Any], bool], what: str) -> str:
            fitting: list[str] = [name for name, kind in kinds.items() if fit(kind)]
            if wanted is None and usual in fitting:
                return usual
            if wanted is None and len(fitting) == 1:
                return fitting[0]
            if wanted is None or wanted not in fitting:
                got = f"{wanted} among {shown}" if wanted else shown
                raise ValueError(f"{where}: wanted {what} (--data.{option} names it), got {got}")
            return wanted

        image = column(
            "image_column", image_column, "image", lambda kind: isinstance(kind, datasets.Image), "a column of images"
        )
        label = column(
            "label_column", label_column, "label", _is_class, "a column with the names of classes (ClassLabel or text)"
        )
        values, kind = rows.with_format(None)[label], kinds[label]
        if isinstance(kind, datasets.ClassLabel):
            composed, notes = one_form(kind.names)
            class_names = list(dict.fromkeys(composed[name] for name in kind.names))
            written = [kind.names[v] if v in range(len(kind.names)) else None for v in values]
        else:
            composed, notes = one_form(value for value in values if value is not None)
            class_names, written = natural_order(set(composed.values())), values
        number = {name: i for i, name in enumerate(class_names)}
        self.labels = np.array([number[composed[name]] if name in composed else -1 for name in written], np.int64)
        if (missing := np.flatnonzero(self.labels < 0)).size:
            raise ValueError(f"{where}: row {missing[0]}: wanted a class in {label}, got {values[int(missing[0])]}")
        super().__init__(rows.cast_column(image, datasets.Image(decode=False)), f"{root}/{split}", class_names, notes)
        self.image = image

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = self.items[index][self.image]
        content = Path(image["path"]).read_bytes() if image["bytes"] is None else image["bytes"]
        return io.BytesIO(content), int(self.labels[index])


def _is_class(kind: Any) -> bool:
    return hasattr(kind, "names") or getattr(kind, "dtype", None) in ("string", "large_string")


def _kind(kind: Any) -> str:
    return type(kind).__name__ if type(kind).__name__ != "Value" else str(kind.dtype)


def open_hfds(root: Path, image_column: str | None = None, label_column: str | None = None) -> Openers:
    """A folder that HF datasets loads. Raises ValueError naming it if it is none, or lacks a split or a column."""
    if importlib.util.find_spec("datasets") is None:
        raise ValueError("data.source: hfds wants the package datasets, which is not installed: pip install datasets")
    if (root / "dataset_dict.json").is_file() or (root / "state.json").is_file():
        raise ValueError(
            f"{root}: wanted a folder that datasets.load_dataset reads, got one of save_to_disk: write each split with "
            "to_parquet(ROOT/SPLIT.parquet)"
        )
    import datasets

    failures = (ValueError, KeyError, OSError, datasets.exceptions.DatasetsError)
    try:
        there = datasets.get_dataset_split_names(str(root))
    except failures as error:
        raise ValueError(f"{root}: wanted a folder that datasets.load_dataset reads: {error}") from error

    def opened(name: str) -> HFReader:
        try:
            rows = datasets.load_dataset(str(root), split=name)
        except failures as error:
            raise ValueError(f"{root}: wanted images and classes in {name}: {error}") from error
        return HFReader(rows, root, name, image_column, label_column)

    found = find_splits(root, there)
    if "train" not in found:
        raise ValueError(f"{root}: wanted a split train, got {', '.join(there)}")
    return {split: (name, partial(opened, name)) for split, name in found.items()}


def open_torchvision(root: str, name: str | None, download: bool) -> Openers:
    """One of torchvision's sets. Raises ValueError naming the option or the set if it is none, or not there."""
    known = {cls: getattr(torchvision.datasets, cls) for cls in torchvision.datasets.__all__}
    if name == "ImageFolder":
        raise ValueError("data.name: wanted data.source=folder for class folders, got torchvision's ImageFolder")
    if name not in known or "root" not in (takes := inspect.signature(known[name]).parameters):
        raise ValueError(f"data.name: wanted torchvision's name of a set (CIFAR10, Food101, ...), got {name}")
    fetch = {"download": download} if "download" in takes else {}

    def opened(part: str, **chosen: Any) -> NumberedReader:
        try:
            dataset = known[name](root, **chosen, **fetch)
            label = dataset[0][1]
        except (RuntimeError, OSError) as error:  # torchvision's ways of saying that a set is not there
            hint = "" if download else " (fetch it with --data.download true)"
            raise ValueError(f"data.root: {root}: wanted torchvision's {name}{hint}: {error}") from error
        if not isinstance(label, int | np.integer):
            raise ValueError(f"data.name: wanted a set with one class an image, got {name}")
        names = getattr(dataset, "classes", None) or getattr(dataset, "categories", None)
        if names is None:
            names = [str(i) for i in range(1 + max(int(label) for _, label in dataset))]
        tested = part == "val" and (chosen.get("split") == "test" or "train" in chosen)
        said = ["validation: torchvision's test, the only other split, so that the best epoch is chosen by it"] * tested
        return NumberedReader(dataset, f"{root}/{name}/{part}", list(map(str, names)), said)

    def by_word(split: str) -> NumberedReader:
        for word in TORCHVISION_SPLITS[split]:
            try:
                return opened(split, split=word)
            except ValueError as error:
                if "Unknown value" not in str(error):
                    raise
        raise ValueError(f"data.name: {name} has no split for {split}: none of {', '.join(TORCHVISION_SPLITS[split])}")

    if "train" in takes:
        return {split: (split, partial(opened, split, train=split == "train")) for split in PARTS}
    if "split" in takes:
        return {split: (split, partial(by_word, split)) for split in PARTS}
    return {"train": ("", partial(opened, "train"))}
