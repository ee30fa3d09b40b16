"""Micro-batches for a run, from a loader that may die, hang, or lose its source for a while.

What the loader would give is a function of the step (`TrainingSampler`), so that it can be started again at any
micro-batch, as often as need be, without a difference in the data.
"""

import multiprocessing
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

LONGEST_PAUSE_SECONDS = 60.0
HALF_WAY = (EOFError, BrokenPipeError, ConnectionRefusedError, ConnectionResetError)


class Feed:
    """Micro-batches by optimizer step and number within it, in order.

    Args:
        open_at: a fresh loader's micro-batches from an optimizer step on.
        retries: how often in a row the loader is started again, after 1, 2, 4, ... seconds.
        info: told of each failure.
        in_a_hurry: True gives up at once: the run has been asked to end.
        hang_timeout: seconds after which loader processes are killed; the loader's own time-out does not see one that
            stops with a batch half handed over.
    """

    def __init__(
        self,
        open_at: Callable[[int], Iterator[Any]],
        retries: int,
        info: Callable[[str], None],
        in_a_hurry: Callable[[], bool] = bool,
        hang_timeout: float | None = None,
    ) -> None:
        self._open_at, self._retries, self._info, self._in_a_hurry = open_at, retries, info, in_a_hurry
        self._hang_timeout = hang_timeout
        self._loader: Iterator[Any] | None = None
        self._on_child_death: Any = signal.SIG_DFL

    def __enter__(self) -> "Feed":
        self._on_child_death = signal.getsignal(signal.SIGCHLD)
        return self

    def __exit__(self, *error: object) -> None:
        self._loader = None
        _set_child_handler(self._on_child_death)

    def micro_batch(self, step: int, number: int) -> Any:
        """The next one, which is ``number`` of ``step``. Raises ValueError when all retries have failed."""
        for attempt in range(self._retries + 1):
            try:
                with self._worker_death_raises(), self._hung_workers_are_killed():
                    if self._loader is None:
                        self._loader = self._open_at(step)
                        for _ in range(number):
                            next(self._loader)
                    return next(self._loader)
            except (OSError, EOFError, RuntimeError) as error:
                if isinstance(error, RuntimeError) and not str(error).startswith("DataLoader"):
                    raise  # somebody's mistake, which would come again
                self._loader, reason = None, _reason(error)
            pause = min(2.0**attempt, LONGEST_PAUSE_SECONDS)
            if attempt == self._retries or self._in_a_hurry():
                break
            self._info(f"{reason}; trying again in {pause:g} s ({attempt + 1} of {self._retries})")
            time.sleep(pause)
        raise ValueError(f"no data at step {step}: {reason} (tried {attempt + 1} times)")

    @contextmanager
    def _worker_death_raises(self) -> Iterator[None]:
        """torch's handler raises wherever the main thread happens to be, half-way through an optimizer step too.

        So it is in place here only; a death that came at another time is asked for.
        """
        _set_child_handler(self._on_child_death)
        try:
            if callable(self._on_child_death):
                self._on_child_death(signal.SIGCHLD, None)
            yield
        finally:
            self._on_child_death = signal.getsignal(signal.SIGCHLD)
            _set_child_handler(signal.SIG_DFL)

    @contextmanager
    def _hung_workers_are_killed(self) -> Iterator[None]:
        if self._hang_timeout is None:
            yield
            return
        watch = threading.Timer(self._hang_timeout, _kill_children)
        watch.daemon = True
        watch.start()
        try:
            yield
        finally:
            watch.cancel()


def _reason(error: Exception) -> str:
    """One line; what the pipes and sockets to a worker say when it ends with a batch half handed over is explained."""
    text = " ".join(str(error).split())
    if isinstance(error, HALF_WAY) or text == "got end of file during message":
        return "DataLoader worker ended half-way" + (f" ({text})" if text else "")
    return text


def _kill_children() -> None:
    for process in multiprocessing.active_children():
        process.kill()


def _set_child_handler(handler: Any) -> None:
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, handler)
