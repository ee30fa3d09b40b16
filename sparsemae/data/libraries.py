"""Images of other libraries behind timm's reader interface: HF datasets, and torchvision's own sets."""

import importlib.util
import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torchvision.datasets
from timm.data.readers import create_reader

# The libraries' names for the two splits, best first.
HFDS_SPLITS = {"train": ("train",), "val": ("validation", "val", "valid", "test")}
TORCHVISION_SPLITS = {"train": ("train", "trainval", "train-standard"), "val": ("val", "valid", "validation", "test")}


class NumberedReader:
    """Images without names of their own."""

    def __init__(self, items: Any, name: str, class_names: list[str]) -> None:
        self.items, self.name, self.class_names = items, name, class_names

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        """The set as if it were a folder."""
        return f"{self.name}/{index:07d}"


Readers = dict[Literal["train", "val"], Callable[[], Any]]


def open_hfds(root: Path) -> Readers:
    """A folder that HF datasets loads. Raises ValueError naming it if it is none, or lacks a split or a column."""
    if importlib.util.find_spec("datasets") is None:
        raise ValueError("data.source: hfds wants the package datasets, which is not installed: pip install datasets")
    if (root / "dataset_dict.json").is_file() or (root / "state.json").is_file():
        raise ValueError(
            f"{root}: wanted a folder that datasets.load_dataset reads, got one of save_to_disk: write each split with "
            "to_parquet(ROOT/SPLIT.parquet)"
        )
    import datasets

    try:
        there = datasets.get_dataset_split_names(str(root))
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"{root}: wanted a folder that datasets.load_dataset reads: {error}") from error
    names = {split: next((name for name in HFDS_SPLITS[split] if name in there), None) for split in HFDS_SPLITS}
    if names["train"] is None:
        raise ValueError(f"{root}: wanted a split train, got {', '.join(there)}")

    def opened(name: str) -> NumberedReader:
        try:
            reader = create_reader(f"hfds/{root}", split=name)
        except (ValueError, KeyError, OSError, datasets.exceptions.DatasetsError) as error:
            raise ValueError(f"{root}: wanted the columns image and label in {name}: {error}") from error
        if not reader.class_to_idx:
            raise ValueError(f"{root}: wanted a column label with the names of its classes (ClassLabel) in {name}")
        return NumberedReader(reader, f"{root}/{name}", list(reader.class_to_idx))

    readers: Readers = {"train": partial(opened, names["train"])}
    return readers | ({"val": partial(opened, names["val"])} if names["val"] else {})


def open_torchvision(root: str, name: str | None, download: bool) -> Readers:
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
        return NumberedReader(dataset, f"{root}/{name}/{part}", list(map(str, names)))

    def by_word(split: str) -> NumberedReader:
        for word in TORCHVISION_SPLITS[split]:
            try:
                return opened(split, split=word)
            except ValueError as error:
                if "Unknown value" not in str(error):
                    raise
        raise ValueError(f"data.name: {name} has no split for {split}: none of {', '.join(TORCHVISION_SPLITS[split])}")

    if "train" in takes:
        return {"train": partial(opened, "train", train=True), "val": partial(opened, "val", train=False)}
    if "split" in takes:
        return {"train": partial(by_word, "train"), "val": partial(by_word, "val")}
    return {"train": partial(opened, "train")}
