"""Run a job and print, in bytes, what its optimizer steps took at their highest.

The figure is VmHWM after the last optimizer step less VmRSS before the job: what the process really took. Before that
the same job runs with a tiny model, so that libraries that load at their first use are not in the figure; what that
left in the allocator goes back to the system first, or the job would use it unseen. Words: a folder for the runs, the
job, its options.
"""

import ctypes
import gc
import sys
from pathlib import Path

from torch.optim.optimizer import register_optimizer_step_post_hook

from sparsemae.commands.train import train
from sparsemae.config import read_config
from sparsemae.jobs import training_jobs

TINY = ("--data.img_size", "32", "--model.args", "{embed_dim: 64, depth: 1, num_heads: 2}")


def kibibytes(field: str) -> int:
    """A line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


class Enough(Exception):
    """Ends the job after its third step: evaluations and checkpoints are no part of the figure."""


def run(job: str, words: list[str]) -> int:
    """Three optimizer steps of a job; VmHWM after the last, KiB."""
    peaks: list[int] = []

    def note(*_: object) -> None:
        peaks.append(kibibytes("VmHWM"))
        if len(peaks) == 3:
            raise Enough

    hook = register_optimizer_step_post_hook(note)
    try:
        train(read_config(training_jobs()[job], words))
    except Enough:
        return peaks[-1]
    finally:
        hook.remove()
    raise AssertionError(f"wanted three optimizer steps, got {len(peaks)}")


if __name__ == "__main__":
    folder, name, *words = sys.argv[1:]
    run(name, [*words, *TINY, "--out", f"{folder}/tiny"])
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = kibibytes("VmRSS")
    print((run(name, [*words, "--out", f"{folder}/run"]) - before) * 1024)
