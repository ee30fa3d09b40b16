"""From a data set to batches on the CPU, and what becomes of the samples that could not be read."""

import ctypes
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from sparsemae.data.crops import Crop, Crops
from sparsemae.data.dataset import Unreadable, tolerated


class UnreadableImages:
    """The training images that could not be read, over all processes: each is named once in a process's life.

    Args:
        images: in the training set.
        max_unreadable: fraction of them that is tolerated.
        info: writes a line to the run's log.
        at_end: `synchronize` is called once, when all images have been looked at.
    """

    def __init__(
        self, images: int, max_unreadable: float, info: Callable[[str], None] = lambda text: None, at_end: bool = False
    ) -> None:
        self.images, self.max_unreadable, self.info, self.at_end = images, max_unreadable, info, at_end
        self.named: set[str] = set()
        self._new: list[str] = []

    def add(self, reasons: Sequence[str]) -> None:
        """Note what this process found; alone it synchronizes at once."""
        self._new += reasons
        if self._new and not self.at_end and not _several_processes():
            self.synchronize()

    def synchronize(self) -> None:
        """Bring the processes together: all call it at the same place, and all raise, or none.

        Raises ValueError, naming the first file, once more than the tolerated fraction is unreadable.
        """
        found: list[list[str]] = [self._new]
        if _several_processes():
            found = [[] for _ in range(dist.get_world_size())]
            dist.all_gather_object(found, self._new)
        self._new = []
        if self.at_end and (all_new := [reason for reasons in found for reason in reasons]):
            hint = "sparsemae check --write-exclude FILE lists them all for data.exclude"
            raise ValueError(f"{all_new[0]} ({len(all_new):,} of {self.images:,} images cannot be used: {hint})")
        for reason in dict.fromkeys(reason for reasons in found for reason in reasons):
            if reason in self.named:
                continue
            self.named.add(reason)
            count = f"{len(self.named):,} of {self.images:,} images"
            if len(self.named) > tolerated(self.images, self.max_unreadable):
                hint = (
                    f" ({count} cannot be read, more than data.max_unreadable={self.max_unreadable:g}: sparsemae check "
                    "--write-exclude FILE lists them all for data.exclude)"
                )
                raise ValueError(reason + hint * bool(self.max_unreadable))
            self.info(f"{reason}: the next readable image takes its place ({count} so far)")


def _several_processes() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def batches(
    dataset: Dataset[Any],
    sampler: Sampler[Any],
    workers: int,
    pin_memory: bool = False,
    unreadable: UnreadableImages | None = None,
    timeout: float = 0.0,
) -> Iterator[Any]:
    """Batches in the sampler's order, on the CPU, of the images that could be read.

    The others are noted in ``unreadable``; without it the first one raises ValueError naming the file. Raises
    ConnectionError if the source is gone, and torch's RuntimeError if a worker dies or gives nothing for ``timeout``
    seconds (0: however long it takes).
    """
    loader = DataLoader(
        dataset, batch_sampler=sampler, num_workers=workers, collate_fn=_collate, pin_memory=pin_memory,
        timeout=timeout if workers else 0, worker_init_fn=begin_worker,
        generator=torch.Generator(),  # or starting the iterator would draw from the global one
    )  # fmt: skip
    for batch in loader:
        if isinstance(batch, Unreadable):
            raise ConnectionError(batch.reason)
        reasons = batch.pop("unreadable")
        if reasons and unreadable is None:
            raise ValueError(reasons[0])
        if unreadable is not None:
            unreadable.add(reasons)
        if batch:
            yield batch


def _collate(samples: list[Any]) -> dict[str, Any] | Unreadable:
    """A batch of what could be read, and ``"unreadable"``: what could not, one line each."""
    missed = [sample for sample in samples if isinstance(sample, Unreadable)]
    for sample in missed:
        if sample.unreachable:
            return sample
    readable = [sample for sample in samples if not isinstance(sample, Unreadable)]
    reasons = [sample.reason for sample in missed]
    reasons += [reason for sample in readable for reason in sample.pop("unreadable", ())]
    if not readable:
        return {"unreadable": reasons}
    crops = {}
    if isinstance(readable[0]["image"], Crop):
        crops["image"] = Crops.of([sample.pop("image") for sample in readable])
    return {**default_collate(readable), **crops, "unreadable": reasons}


def end_with_parent(number: int = signal.SIGKILL) -> None:
    """Have the system send this process a signal when its parent has ended, 0 for none; Linux only, others do nothing.

    Else a process whose parent was killed may wait for ever to hand over what it has made.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, int(number))  # PR_SET_PDEATHSIG


def begin_worker(worker: int) -> None:
    """In a loader process: end with its parent, and let Pillow keep its memory from image to image.

    Page faults took 3 % of the time.
    """
    end_with_parent()
    Image.core.set_blocks_max(8)  # type: ignore[attr-defined]
