"""What a checkpoint of ViT-B with AdamW's state costs the loop: written in the background, and while the loop waits.

Both write the same files, fsynced and renamed, and take turns. A background save holds the loop up for a copy of the
state; then the thread that hashes and writes takes a core's time from the steps, where these use all cores. The second
is measured as well: how long the steps took that ran until the file was whole, against as many undisturbed ones.
"""

import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from sparsemae.benchmark.timing import aligned, seconds
from sparsemae.benchmark.training import Subject, subject, using
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
    rows: list[Saving] = []
    with (
        using(threads),
        tempfile.TemporaryDirectory(dir=folder or None) as temporary,
        suppress(KeyboardInterrupt),  # what there is until then is the result
    ):
        for name in RECIPES:
            rows.append(_measure(name, subject(name, step_batch, "2:32"), Path(temporary) / name, runs))
            print(f"{name}: held up {rows[-1].held_fraction:.1%} of a save", file=sys.stderr, flush=True)
    return rows


def table(rows: list[Saving]) -> str:
    """The figures as text."""
    head = ["recipe", "GB", "blocking s", "held up s", "share", "first s", "steps lose s", "a step s"]
    cells = [
        [
            row.subject, f"{row.gigabytes:.2f}", f"{row.blocking_seconds:.2f}", f"{row.held_seconds:.2f}",
            f"{row.held_fraction:.1%}", f"{row.first_seconds:.2f}", f"{row.slowed_seconds:.2f}",
            f"{row.step_seconds:.2f}",
        ]
        for row in rows
    ]  # fmt: skip
    return aligned([head, *cells], 1)


def _measure(name: str, subject: Subject, folder: Path, runs: int) -> Saving:
    model, optimizer, step = subject
    state = TrainingState(model, optimizer, None, MaskSchedule(model), Topology(model))
    folder.mkdir()
    saver = Saver(folder, keep=1, max_failures=1, info=print)
    blocking, held, slowed, steps = [], [], [], []
    for turn in range(runs + 1):
        steps += [seconds(step) for _ in range(3)][1:]
        blocking.append(seconds(lambda: save_checkpoint(checkpoint_path(folder, 1), *state.to_save(CARD))))
        step()
        held.append(seconds(lambda number=turn: saver.save(2 + number, *state.to_save(CARD))))  # type: ignore[misc]
        begin, taken = time.perf_counter(), 0
        while saver.writing:
            step()
            taken += 1
        slowed.append((time.perf_counter() - begin, taken))
        saver.wait()
        if saver.failure:
            raise ValueError(saver.failure)
    size, alone = sum(file.stat().st_size for file in checkpoint_path(folder, 2 + runs).iterdir()), median(steps)
    return Saving(
        name, size / 1e9, median(blocking[1:]), held[0], median(held[1:]), alone,
        median(time - taken * alone for time, taken in slowed[1:]),
    )  # fmt: skip
