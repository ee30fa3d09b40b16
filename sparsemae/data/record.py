"""What a run is trained on, in a few digests: compared among its processes, and with what it was when it is resumed."""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch.distributed as dist

from sparsemae.data.splits import Source, names_digest
from sparsemae.data.tree import Split


def record(sources: Mapping[Split, Source], root: str | None) -> dict[str, Any]:
    """Class names in order, and of each split the number of images, a digest of their names and classes, and, on the
    first process, one of their sizes where the source has them.

    Raises ValueError, on all processes, if they have found different images.
    """
    found: dict[str, Any] = {
        "class_names": list(next(iter(sources.values())).class_names),
        "splits": {
            split: {"images": len(source), "names": names_digest(source, root)} for split, source in sources.items()
        },
    }
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if several:
        others: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(others, found)
        for rank, other in enumerate(others):
            if changes := differences(others[0], other):
                raise ValueError(
                    f"{root}: wanted the same images in all processes, got in {rank}: {'; '.join(changes)}"
                )
    if not several or dist.get_rank() == 0:
        for split, source in sources.items():
            found["splits"][split]["sizes"] = _sizes_digest(source)
    return found


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """How a data set differs from what it was, in a few words each."""
    changes = []
    if before["class_names"] != now["class_names"]:
        old, new = (list(each["class_names"]) for each in (before, now))
        at = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
        was, got = (", ".join(names[at : at + 3]) or "none" for names in (old, new))
        changes.append(f"{len(old)} classes are now {len(new)}, from number {at} on {got} instead of {was}")
    for split, now_split in now["splits"].items():
        was_split = before["splits"].get(split, {})
        if was_split.get("images") != now_split["images"]:
            changes.append(f"{split}: {was_split.get('images', 0):,} images are now {now_split['images']:,}")
        elif was_split["names"] != now_split["names"]:
            changes.append(f"{split}: images have other names or classes")
        elif None not in (sizes := (was_split.get("sizes"), now_split.get("sizes"))) and sizes[0] != sizes[1]:
            changes.append(f"{split}: images have other sizes in bytes")
    return changes


def _sizes_digest(source: Source) -> str | None:
    if not hasattr(source.reader, "size"):
        return None
    sizes = []
    for index in source.indices:
        try:
            sizes.append(source.reader.size(int(index)))
        except OSError:  # a broken link, which is named when it is read
            sizes.append(-1)
    return hashlib.sha256(np.array(sizes, np.int64).tobytes()).hexdigest()
