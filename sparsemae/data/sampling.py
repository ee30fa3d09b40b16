"""Which sample when, and with which randomness: all functions of the seed and of counters, never of hidden state.

A sample's augmentation depends on (seed, epoch, index) only. The *sampler* yields epoch and index together, so that
loader workers know the epoch, however long they live; their number changes nothing, and a resume needs the counters
only. Micro-batch ``k`` of an optimizer step is the same set of images whether it is the k-th process's or the k-th
accumulation step's.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler

from sparsemae.data.draws import ORDER, SAMPLE, stream

Key = tuple[int, int]
"""(epoch, index) of one training sample."""


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, images: int) -> np.ndarray:
    """The indices of an epoch's images in the order in which they are taken."""
    order = stream(seed, ORDER, epoch).permutation(images)
    order.flags.writeable = False  # it is shared
    return order


def seed_all(seed: int, *counters: int) -> None:
    """Set the global generators of python, numpy and torch (all devices) to a function of the arguments."""
    if seed < 0:
        raise ValueError(f"seed: wanted 0 or more, got {seed}")
    torch.manual_seed(_seed_cpu(_derive_seeds(seed, *counters)))


_Seeds = tuple[int, int, dict[str, Any]]
"""What python's and torch's global generators are seeded with, and numpy's state."""


def _derive_seeds(seed: int, *counters: int) -> _Seeds:
    """Seeds of the global generators, as a function of the arguments."""
    sequence = np.random.SeedSequence((seed, *counters))
    python_seed, torch_seed = (int(word) for word in sequence.generate_state(2))
    philox = {
        "bit_generator": "Philox", "has_uint32": 0, "uinteger": 0, "buffer": np.zeros(4, np.uint64), "buffer_pos": 4,
        "state": {"counter": np.zeros(4, np.uint64), "key": sequence.generate_state(2, np.uint64)},
    }  # fmt: skip
    return python_seed, torch_seed, philox  # numpy's is the state of Philox(sequence)


def _seed_cpu(seeds: _Seeds) -> int:
    """Seed the global CPU generators that library transforms draw from; returns torch's seed."""
    python_seed, torch_seed, philox = seeds
    random.seed(python_seed)
    torch.default_generator.manual_seed(torch_seed)
    if not isinstance(np.random.get_bit_generator(), np.random.Philox):  # type: ignore[attr-defined]
        np.random.set_bit_generator(np.random.Philox())  # type: ignore[attr-defined]
    np.random.set_state(philox)  # a new generator would make its 50 methods anew
    return torch_seed


@contextmanager
def seeding(seed: int, keys: Sequence[int | Key]) -> Iterator[Iterator[int | Key]]:
    """Yields a batch's keys, the global CPU generators seeded for each sample; puts their states back in the end.

    A key of evaluation is the index alone. Seeds are derived in one go: between two images that finds nothing in the
    caches, and takes four times as long. numpy's generator is swapped rather than saved: copying its state takes longer
    than most transforms.
    """
    seeds = [_derive_seeds(seed, SAMPLE, *(key if isinstance(key, tuple) else (0, key))) for key in keys]

    def seeded() -> Iterator[int | Key]:
        for key, own in zip(keys, seeds, strict=True):
            _seed_cpu(own)
            yield key

    states = random.getstate(), torch.get_rng_state(), np.random.get_bit_generator()  # type: ignore[attr-defined]
    np.random.set_bit_generator(np.random.Philox())  # type: ignore[attr-defined]
    try:
        yield seeded()
    finally:
        random.setstate(states[0])
        torch.set_rng_state(states[1])
        np.random.set_bit_generator(states[2])  # type: ignore[attr-defined]


@dataclass(frozen=True)
class BatchPlan:
    """How the global batch is cut: ``global_batch = micro_batch * accumulate * world``."""

    images: int
    """Images in one epoch's source."""
    global_batch: int
    """Images per optimizer step, over all devices."""
    micro_batch: int
    """Images per device and forward."""
    accumulate: int
    """Micro-batches per device and optimizer step."""
    world: int
    """Processes."""

    @classmethod
    def make(cls, images: int, global_batch: int, device_batch: int | None, world: int) -> BatchPlan:
        """Derive accumulation from the numbers a recipe and a machine give.

        ``device_batch`` None: as large as it can be without accumulation.
        Raises ValueError, with all numbers, if they do not divide or the source is smaller than a batch.
        """
        if global_batch < 1 or global_batch % world:
            raise ValueError(
                f"trainer.global_batch: wanted a multiple of the {world} processes, got {global_batch} images"
            )
        micro_batch = device_batch or global_batch // world
        if micro_batch < 1 or global_batch % (world * micro_batch):
            raise ValueError(
                f"trainer.global_batch: wanted devices x device_batch x accumulation = {global_batch}, "
                f"but {world} x {micro_batch} does not divide it"
            )
        if images < global_batch:
            raise ValueError(f"trainer.global_batch: wanted at most the {images} training images, got {global_batch}")
        return cls(images, global_batch, micro_batch, global_batch // (world * micro_batch), world)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch; what the global batch leaves over differs from epoch to epoch."""
        return self.images // self.global_batch

    def __str__(self) -> str:
        left = self.images - self.steps_per_epoch * self.global_batch
        cut = f"; {self.world} processes x {self.micro_batch} x {self.accumulate} accumulation"
        return (
            f"{self.images:,} images: {self.steps_per_epoch:,} steps of {self.global_batch:,} in an epoch, "
            f"{left:,} left over, others each time" + cut * (self.micro_batch < self.global_batch)
        )

    def micro_batch_number(self, accumulation: int, rank: int) -> int:
        """Counter of a micro-batch within its optimizer step, the same on any number of processes."""
        return accumulation * self.world + rank


class TrainingSampler(Sampler[list[Key]]):
    """Yields this process's micro-batches of keys for optimizer steps ``start`` to ``stop``, in order.

    One iterator serves the whole run: no epoch boundary stalls the workers.
    """

    def __init__(self, plan: BatchPlan, seed: int, rank: int, start: int, stop: int) -> None:
        self.plan, self.seed, self.rank, self.start, self.stop = plan, seed, rank, start, stop

    def __len__(self) -> int:
        return (self.stop - self.start) * self.plan.accumulate

    def __iter__(self) -> Iterator[list[Key]]:
        plan = self.plan
        for step in range(self.start, self.stop):
            epoch, within = divmod(step, plan.steps_per_epoch)
            order = epoch_order(self.seed, epoch, plan.images)
            for accumulation in range(plan.accumulate):
                number = plan.micro_batch_number(accumulation, self.rank)
                first = within * plan.global_batch + number * plan.micro_batch
                yield [(epoch, int(index)) for index in order[first : first + plan.micro_batch]]


class EvaluationSampler(Sampler[list[int]]):
    """Every image exactly once over all processes: process ``rank`` takes every ``world``-th."""

    def __init__(self, images: int, batch: int, rank: int = 0, world: int = 1) -> None:
        self.indices, self.batch = range(rank, images, world), batch

    def __len__(self) -> int:
        return math.ceil(len(self.indices) / self.batch)

    def __iter__(self) -> Iterator[list[int]]:
        for first in range(0, len(self.indices), self.batch):
            yield list(self.indices[first : first + self.batch])
