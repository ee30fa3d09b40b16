"""Saving while the run goes on: a copy of the state, then a thread that writes it.

Nothing here holds Python's lock for long: the copy is one pass over memory into buffers that are kept, and hashing
and writing (safetensors) release it; ``torch.save`` would stop the loop for about a second per gigabyte.
"""

import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsemae.training.checkpoint import (
    Tensors,
    best_step,
    checkpoint_path,
    list_checkpoints,
    point_to_best,
    remove_old_checkpoints,
    save_checkpoint,
)


class Saver:
    """Writes a run's checkpoints, one at a time, and keeps the last few and the best.

    A checkpoint that cannot be written does not end the run: `info` tells of it, and `failure` when it is enough.

    Args:
        folder: of the checkpoints.
        keep: number of latest checkpoints to keep.
        max_failures: failures in a row that are enough.
    """

    def __init__(self, folder: Path, keep: int, max_failures: int, info: Callable[[str], None]) -> None:
        self._folder, self._keep, self._max_failures, self._info = folder, keep, max_failures, info
        self._buffers: dict[tuple[str, str], Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._failures = 0
        self.best = best_step(folder)
        """The last best step whose checkpoint is there: another could not be written."""
        self.step = -1
        """The last one that was asked for."""

    def save(
        self,
        step: int,
        files: Mapping[str, Mapping[str, Tensor]],
        metadata: Mapping[str, Mapping[str, Any]],
        best: int | None = None,
    ) -> None:
        """Copy the state of ``step`` and start to write it, as `save_checkpoint`; waits for the one before.

        ``best`` is the step to keep whatever comes.
        """
        self.wait()
        copies = {
            name: {key: self._copy(name, key, t) for key, t in tensors.items()} for name, tensors in files.items()
        }
        if any(tensor.is_cuda for tensors in files.values() for tensor in tensors.values()):
            torch.cuda.current_stream().synchronize()  # others may be stuck in a collective
        self.step = step
        self._thread = threading.Thread(target=self._write, args=(step, copies, metadata, best), daemon=True)
        self._thread.start()

    def _copy(self, file: str, key: str, tensor: Tensor) -> Tensor:
        """The tensor's values in a buffer of ours: fresh memory would cost the loop more time than the copy."""
        if (file, key) not in self._buffers:
            # elsewhere than in the main thread that one is stuck, and to pin memory waits for the whole device
            pinned = tensor.is_cuda and threading.current_thread() is threading.main_thread()
            self._buffers[file, key] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
        return self._buffers[file, key].copy_(tensor, non_blocking=True)

    def _write(
        self, step: int, files: Mapping[str, Tensors], metadata: Mapping[str, Mapping[str, Any]], best: int | None
    ) -> None:
        try:
            save_checkpoint(checkpoint_path(self._folder, step), files, metadata)
            if best is not None and checkpoint_path(self._folder, best).is_dir():
                self.best = best
                with suppress(OSError):  # a file system without links
                    point_to_best(self._folder, best)
            remove_old_checkpoints(self._folder, self._keep, self.best)
        except Exception as error:  # it comes out in the main thread
            self._error = error

    @property
    def writing(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._thread is not None and self._thread.is_alive()

    def poll(self) -> None:
        """Report on a write that has ended; does not wait."""
        if not self.writing:
            self.wait()

    def wait(self) -> None:
        """Wait for the write under way and report on it. Raises what was no failure to write (a mistake of ours)."""
        if self._thread is None:
            return
        self._thread.join()
        self._thread, error, self._error = None, self._error, None
        if error is None:
            self._failures = 0
        elif isinstance(error, OSError):
            self._failures += 1
            self._info(
                f"warning: the checkpoint of step {self.step} could not be written: {error}; {self._last_good()}; "
                f"failure {self._failures} of {self._max_failures} in a row"
            )
        else:
            raise error

    @property
    def failed(self) -> bool:
        """Whether the last write failed."""
        return self._failures > 0

    @property
    def failure(self) -> str | None:
        """Why to end the run, if the writes have failed too often."""
        if self._failures < self._max_failures:
            return None
        return f"{self._folder}: {self._failures} checkpoints in a row could not be written; {self._last_good()}"

    def _last_good(self) -> str:
        found = list_checkpoints(self._folder)
        return f"the last good one is {found[-1]}" if found else "there is no good one yet"
