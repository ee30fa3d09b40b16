"""What a checkpoint of ViT-B with AdamW's state costs the loop: written in the background, and while the loop waits.

Both write the same files, fsynced and renamed, and take turns. A background save holds the loop up for a copy of the
state; then the thread that hashes and writes takes a core's time from the steps, where these use all cores. The second
is measured as well: how long the steps took that ran until the file was whole, against as many undisturbed ones.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from sparsemae.benchmark.training import Subject, subject
from sparsemae.card import InputSpec, ModelCard
from sparsemae.sparsity import MaskSchedule, Topology
from sparsemae.training.checkpoint import checkpoint_path, save_checkpoint
from sparsemae.training.saver import Saver
from sparsemae.training.state import TrainingState

RECIPES = ("pretrain_t", "finetune_t")
CARD = ModelCard("classify", "vit_base_patch16_224", {}, InputSpec(224, (), ()))


@dataclass
class Saving:
    """One recipe's checkpoint: medians, seconds."""

    subject: str
    gigabytes: float
    """Of the files, GB = 10^9 bytes."""
    blocking_seconds: float
    """Of a save that the loop waits for."""
    first_seconds: float
    """That the loop is held up by the first save in the background, which makes the buffers."""
    held_seconds: float
    """That it is held up by each later one."""
    step_seconds: float
    """Of an undisturbed optimizer step."""
    slowed_seconds: float
    """That the steps lose while the thread writes."""

    @property
    def held_fraction(self) -> float:
        """Of the time of a blocking save."""
        return self.held_seconds / self.blocking_seconds


def measure(step_batch: int, threads: int, runs: int, folder: str) -> list[Saving]:
    """Measure each recipe, in a temporary folder on the disk of ``folder``; none: where such folders are made."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with tempfile.TemporaryDirectory(dir=folder or None) as temporary:
            return [_measure(name, subject(name, step_batch, "2:32"), Path(temporary) / name, runs) for name in RECIPES]
    finally:
        torch.set_num_threads(before)


def table(rows: list[Saving]) -> str:
    """The figures as text."""
    lines = [
        f"{'recipe':<14}{'GB':>6}{'blocking s':>12}{'held up s':>11}{'share':>8}{'first s':>9}{'steps lose s':>14}"
        f"{'a step s':>10}"
    ]
    for row in rows:
        lines.append(
            f"{row.subject:<14}{row.gigabytes:6.2f}{row.blocking_seconds:12.2f}{row.held_seconds:11.2f}"
            f"{row.held_fraction:8.1%}{row.first_seconds:9.2f}{row.slowed_seconds:14.2f}{row.step_seconds:10.2f}"
        )
    return "\n".join(lines)


def _measure(name: str, subject: Subject, folder: Path, runs: int) -> Saving:
    model, optimizer, step = subject
    state = TrainingState(model, optimizer, None, MaskSchedule(model), Topology(model))
    saver = Saver(folder, keep=1, max_failures=1, info=print)
    blocking, held, slowed, steps = [], [], [], []
    for turn in range(runs + 1):
        steps += [_seconds(step) for _ in range(3)][1:]
        blocking.append(_seconds(lambda: save_checkpoint(checkpoint_path(folder, 1), *state.to_save(CARD))))
        step()
        held.append(_seconds(lambda number=turn: saver.save(2 + number, *state.to_save(CARD))))  # type: ignore[misc]
        begin, taken = time.perf_counter(), 0
        while saver.writing:
            step()
            taken += 1
        slowed.append((time.perf_counter() - begin, taken))
        saver.wait()
        if saver.failure:
            raise ValueError(saver.failure)
    files = checkpoint_path(folder, 2 + runs).iterdir()
    alone = median(steps)
    return Saving(
        name, sum(file.stat().st_size for file in files) / 1e9, median(blocking[1:]), held[0], median(held[1:]), alone,
        median(seconds - taken * alone for seconds, taken in slowed[1:]),
    )  # fmt: skip


def _seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin
