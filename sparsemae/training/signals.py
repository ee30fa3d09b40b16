"""Asked to end: SIGTERM, SIGUSR1 (Slurm's warning) and the first SIGINT let the step finish, so that it is saved."""

import os
import signal
import threading
from typing import Any

STOPPED_STATUS = 75
"""Exit status of a run that was asked to end and saved: the same command continues it (EX_TEMPFAIL of sysexits.h)."""


class StopSignals:
    """Within: the signals that ask for an end only set `received`. A second SIGINT raises KeyboardInterrupt.

    Args:
        announce: say on stderr that the signal was heard.
    """

    def __init__(self, announce: bool = True) -> None:
        self.received: str | None = None
        """Name of the first signal."""
        self._announce, self._previous = announce, dict[signal.Signals, Any]()

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # nobody else may
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        name = signal.Signals(number).name
        self.received = self.received or name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if self._announce:  # no console here: the signal may have come in the middle of its own printing
            again = " (once more stops at once)" if number == signal.SIGINT else ""
            os.write(2, f"\n{name}: finishing the step, then saving{again}\n".encode())
