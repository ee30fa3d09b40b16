"""The processes of a training stand and fall together: what ends one ends all, in one line each, the last step saved.

A collective waits for a process that is lost; with NCCL, for ever. So a thread of each process watches the others on a
`Connection` of their own. A verdict (who failed, is gone or hangs) reaches all on it; a main thread that waits in a
collective, or in a loop without an end, is not needed then.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from types import TracebackType
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from sparsemae.data.loader import end_with_parent
from sparsemae.options import TrainerConfig
from sparsemae.training.connection import BEAT_SECONDS, LEFT, MACHINE, RUNNING, SAVED, Connection, Member, Verdict
from sparsemae.training.launch import PARENT, find_place

GRACE_SECONDS = 3.0
"""For a main thread to end its process itself, once there is a verdict."""
SAVING_SECONDS = 25.0
"""For the process that saves; torchrun kills all of them 30 seconds after the first one has ended."""
JOIN_SECONDS = 600.0
"""For all processes to begin."""
LOST_SECONDS = 45.0
"""Without a word from another machine, after which it is lost."""


class Ended(Exception):
    """Raised in the main thread of a process when all are to end."""


def last_line(error: Exception) -> str:
    """Of its text: that of an error in a loader process is its traceback."""
    return (str(error).splitlines() or [""])[-1]


class Group:
    """The processes of one training, seen from one of them; within it they stand and fall together.

    Raises ValueError if a launcher started other processes than the options say; on entering, if they cannot meet.
    """

    def __init__(self, trainer: TrainerConfig) -> None:
        self._place = find_place(trainer)
        self.rank, self.world = self._place.rank, self._place.world
        self.environment = self._place.environment if self.world > 1 else None
        """What Fabric is to know of it."""
        self.rescue: Callable[[bool], str] = lambda saves: ""
        """Saves the last whole step, if this process is the one that does, and says which the last checkpoint is."""
        self.succeeded = self.world == 1
        """All processes have done what they had to do."""
        self._limit = trainer.hang_timeout()
        self._line: Connection
        self._store: Any = None
        self._port = 0
        self._children: list[Any] = []
        self._over, self._ending, self._ended = threading.Event(), threading.Lock(), False

    def __enter__(self) -> "Group":
        if self.world == 1:
            return self
        place, agent = self._place, os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        if PARENT in os.environ:
            end_with_parent()
            if os.getppid() != int(os.environ[PARENT]):  # it had ended before
                raise SystemExit(1)
        try:
            store = dist.TCPStore(
                place.address, place.port, is_master=self.rank == 0 and not agent, wait_for_workers=False,
                timeout=timedelta(seconds=JOIN_SECONDS),
            )  # fmt: skip
            self._port = store.port
            self._store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
            self._line = Connection(self.rank, self.world, place.address, self._store, JOIN_SECONDS)
        except (RuntimeError, OSError) as error:
            raise ValueError(
                f"process {self.rank} of {self.world} could not meet the others at {place.address}:{place.port}: "
                f"{str(error).splitlines()[0]}"
            ) from error
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def launch(self, device: torch.device) -> None:
        """Start the other processes, unless a launcher has, and make the group of their collectives.

        Raises ValueError if one does not come.
        """
        if self.world == 1:
            return
        self._children = self._place.start_others(self._port)
        end, line = time.monotonic() + JOIN_SECONDS, self._line
        while not line.complete:
            for number, child in zip(self._place.to_start, self._children, strict=True):
                if child.poll() is not None:
                    line.judge(Verdict(None, f"process {number} ended with status {child.returncode} as it began"))
            if line.verdict is not None:
                raise Ended
            if time.monotonic() > end:
                came = f", {1 + len(line.members)} came" * (self.rank == 0)
                raise ValueError(f"trainer.devices: waited {JOIN_SECONDS:g} s for {self.world} processes{came}")
            time.sleep(0.05)
        if PARENT in os.environ:
            end_with_parent(0)  # the connection will tell, and what can be saved is saved
        cuda = device.type == "cuda"
        if cuda:
            torch.cuda.set_device(device)
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            store=dist.PrefixStore("torch", self._store), rank=self.rank, world_size=self.world,
            timeout=timedelta(seconds=self._limit + SAVING_SECONDS + 2 * GRACE_SECONDS),  # `_watch` is to come first
            device_id=device if cuda else None,
        )  # fmt: skip

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self.world == 1:
            return
        try:
            if error is None or isinstance(error, SystemExit):
                self._leave()
            elif not isinstance(error, Exception):  # Ctrl-C
                self._line.judge(Verdict(self.rank, f"process {self.rank} of {self.world} was interrupted", alive=True))
                time.sleep(2 * BEAT_SECONDS)
            elif not self._ended:
                self.fail(error)
        finally:
            self._over.set()
            self.rescue = lambda saves: ""  # with it go the loop, DDP's modules and gloo's threads
            self._wait_for_children()
            self._line.close()

    def _leave(self) -> None:
        """Wait until all have done what they had to do."""
        line = self._line
        line.now(LEFT)
        while not line.all_left:
            if line.verdict is not None:
                self.fail(Ended())
            line.all_left = self.rank == 0 and all(member.sign.state == LEFT for member in line.members.values())
            time.sleep(0.01)
        end = time.monotonic() + GRACE_SECONDS
        while self.rank == 0 and any(m.connected for m in line.members.values()) and time.monotonic() < end:
            time.sleep(0.01)
        self.succeeded = True

    def _wait_for_children(self) -> None:
        end = time.monotonic() + SAVING_SECONDS + GRACE_SECONDS
        for child in self._children:
            with suppress(Exception):
                child.wait(max(0.0, end - time.monotonic()))
            child.kill()

    def at(self, where: str = "") -> None:
        """The main thread goes on: to ``where``, a point that all processes come to, or with what it is doing.

        Raises Ended if all processes are to end.
        """
        if self.world == 1:
            return
        sign = self._line.sign
        sign.progress += 1
        if where:
            sign.place += 1
            sign.where = where
        if self._line.verdict is not None:
            raise Ended

    def agree(self, values: Callable[[], Mapping[str, Any]]) -> None:
        """Raises ValueError, in all processes, naming what differs and where, if they do not have the same values.

        Nothing is saved then.
        """
        if self.world == 1:
            return
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, dict(values()))
        first = found[0]
        differ = [
            f"{name} is {first.get(name)!s:.80} in process 0, {other.get(name)!s:.80} in process {rank}"
            for rank, other in enumerate(found)
            for name in first | other
            if first.get(name) != other.get(name)
        ]
        if differ:
            self.rescue = lambda saves: ""
            more = f" (and {len(differ) - 2} more)" * (len(differ) > 2)
            raise ValueError(f"wanted the same in all processes, got: {'; '.join(differ[:2])}{more}")

    def fail(self, error: Exception) -> NoReturn:
        """End all processes for an error of this one: the last whole step is saved, and each says one line.

        Raises ValueError; where there is one process only, and the error is not the user's, that error.
        """
        users = isinstance(error, (ValueError, OSError))
        if self.world == 1:
            last = self.rescue(True)
            if users:
                raise ValueError(f"{error}{last}") from error
            raise error
        line, end = self._line, time.monotonic() + GRACE_SECONDS
        while isinstance(error, RuntimeError) and line.verdict is None and time.monotonic() < end:
            time.sleep(0.05)  # a collective's error follows from another process's, which will tell
        text = " ".join(str(error).split()) if users else f"{type(error).__name__}: {last_line(error)}"
        line.judge(Verdict(self.rank, f"process {self.rank} of {self.world} failed: {text}", alive=True))
        if not self._ending.acquire(blocking=False):
            threading.Event().wait()  # `_watch` is ending this process
        self._ended = True
        if line.verdict is not None and line.verdict.rank != self.rank and not users:
            text = line.verdict.text
        raise ValueError(self._saved(text)) from error

    def _saved(self, text: str) -> str:
        """Save, or wait for the process that does; the line to say."""
        line = self._line
        saver = line.verdict.saver if line.verdict is not None else 0
        if saver == 0 != self.rank:
            first, end = line.members[0], time.monotonic() + SAVING_SECONDS
            while first.connected and first.sign.state == RUNNING and time.monotonic() < end:
                time.sleep(0.05)
            time.sleep(BEAT_SECONDS)  # it speaks first: a launcher may end it when this process has ended
        text += self.rescue(saver == self.rank)
        line.now(SAVED)
        return text

    def _watch(self) -> None:
        """In a thread of its own: who is gone or hangs, and this process's end if its main thread does not see to it.

        Time is counted in beats of this thread: a job that is stopped as a whole, and goes on, has lost none.
        """
        line, still, before, late = self._line, 0, -1, 0.0
        while not self._over.wait(BEAT_SECONDS):
            if line.verdict is None:
                signs = [line.sign, *(member.sign for member in line.members.values())]
                progress = sum(sign.progress for sign in signs)
                still, before = (still + 1 if progress == before else 0), progress
                for member in line.members.values():
                    self._look_at(member)
                if self.rank == 0 and still * BEAT_SECONDS > self._limit and all(sign.place for sign in signs):
                    self._judge_stuck()
                continue
            late += BEAT_SECONDS
            verdict = line.verdict
            lost = not verdict.alive and (verdict.silent or late > 3 * GRACE_SECONDS)
            if lost and verdict.rank in line.members:
                self._kill(line.members[verdict.rank])
            patience = GRACE_SECONDS + SAVING_SECONDS + 3 * GRACE_SECONDS if self._ending.locked() else GRACE_SECONDS
            if late > patience or (verdict.rank == self.rank and not verdict.alive):
                self._end_process(verdict)

    def _look_at(self, member: Member) -> None:
        member.beats += 1
        sign = member.sign
        lost = sign.machine != MACHINE and sign.place  # before the loop, sorting millions of names stops all threads
        limit = min(self._limit, LOST_SECONDS) if lost else self._limit
        if member.beats * BEAT_SECONDS > limit and member.connected and self._line.complete:
            who = f"process {sign.rank} of {self.world} (pid {sign.pid} on {sign.machine.split()[0]})"
            self._line.judge(Verdict(sign.rank, f"{who} gave no sign for {limit:g} s", silent=True))

    def _judge_stuck(self) -> None:
        signs = [self._line.sign, *(member.sign for member in self._line.members.values())]
        first = min((sign for sign in signs if sign.state != LEFT), key=lambda sign: sign.place)
        known = first.place < max(sign.place for sign in signs)
        who = f"process {first.rank} of {self.world}" if known else f"each of the {self.world} processes"
        said = f"{who} has been at the {first.where} for {self._limit:g} s (trainer.hang_timeout_seconds)"
        self._line.judge(Verdict(first.rank if known else None, said))

    def _kill(self, member: Member) -> None:
        """One that is stopped cannot end itself."""
        if member.connected and member.sign.machine == MACHINE:
            with suppress(ProcessLookupError):
                os.kill(member.sign.pid, signal.SIGKILL)

    def _end_process(self, verdict: Verdict) -> NoReturn:
        """In place of a main thread that does not come."""
        said, mine = [verdict.text], self._ending.acquire(blocking=False)
        if mine and (verdict.rank != self.rank or verdict.alive):
            saving = threading.Thread(target=lambda: said.append(self._saved(verdict.text)), daemon=True)
            saving.start()
            saving.join(SAVING_SECONDS + GRACE_SECONDS)  # a device or a disk may be stuck, too
        os.write(2, f"sparsemae: error: {said[-1]}\n".encode())
        time.sleep(2 * BEAT_SECONDS)  # the others hear of it
        self._wait_for_children()
        os._exit(2)
