"""The connection of the processes: what one says reaches the others, a stranger is not heard, an end is noticed."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest

from sparsemae.training import connection, group
from sparsemae.training.connection import LEFT, Connection, Member, Sign, Verdict
from sparsemae.training.group import Group


class Store:
    """torch's, as far as it is used."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}

    def set(self, key: str, value: str) -> None:
        self.values[key] = value

    def get(self, key: str) -> bytes:
        return self.values[key].encode()


def until(condition: Callable[[], Any]) -> None:
    """Wait for it."""
    pause = threading.Event()
    for _ in range(2000):
        if condition():
            return
        pause.wait(0.01)
    pytest.fail("waited in vain")


@pytest.fixture
def three(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[list[Connection], Store]]:
    """Three processes in this one."""
    monkeypatch.setattr(connection, "BEAT_SECONDS", 0.01)
    store = Store()
    lines = [Connection(rank, 3, "127.0.0.1", store, 10.0) for rank in range(3)]
    yield lines, store
    for line in lines[::-1]:
        line.now(LEFT)
        line.all_left = True
        line.close()
    until(lambda: not any(member.connected for member in lines[0].members.values()))


def test_what_one_says_reaches_the_others(three: tuple[list[Connection], Store]) -> None:
    (first, second, third), _ = three
    until(lambda: first.complete and second.complete and third.complete)
    second.sign.place, second.sign.where = 3, "forward"
    until(lambda: (first.members[1].sign.place, first.members[1].sign.where) == (3, "forward"))
    assert first.verdict is None
    third.judge(Verdict(2, "process 2 of 3 failed: why", alive=True))
    until(lambda: first.verdict and second.verdict)
    assert first.verdict == second.verdict == Verdict(2, "process 2 of 3 failed: why", alive=True)
    second.judge(Verdict(1, "later"))
    assert second.verdict.rank == 2


def test_a_stranger_is_not_heard(three: tuple[list[Connection], Store]) -> None:
    (first, *_), store = three
    until(lambda: first.complete)
    port, token = store.get("connection").decode().split()
    sign = {"rank": 1, "pid": 1, "where": "forged"}
    forged = json.dumps({"token": token[::-1], "sign": sign, "verdict": {"rank": 1, "text": "forged"}})
    for words in (
        b"GET / HTTP/1.1\r\n\r\n",
        b"[" * 20_000 + b"\n",
        b"{}\n",
        b"[1]\n",
        b"\xff\n",
        forged.encode() + b"\n",
    ):
        # the stranger may be shown out before it is done
        with suppress(OSError), socket.create_connection(("127.0.0.1", int(port))) as stranger:
            stranger.sendall(words)
            stranger.shutdown(socket.SHUT_WR)
            assert not stranger.makefile("rb").read()
    assert first.verdict is None
    assert first.members.keys() == {1, 2}
    assert first.members[1].sign.where == ""


def test_an_end_without_a_word_is_noticed(three: tuple[list[Connection], Store]) -> None:
    (first, second, third), _ = three
    until(lambda: first.complete and second.complete and third.complete)
    third._token = "lost"
    until(lambda: first.verdict and second.verdict and third.verdict)
    assert first.verdict is not None
    assert (first.verdict.rank, first.verdict.alive, first.verdict.saver) == (2, False, 0)
    assert "process 2 of 3 (pid" in first.verdict.text
    assert "ended without a word" in first.verdict.text


def test_the_process_that_saves() -> None:
    assert [Verdict(rank, "").saver for rank in (0, 1, None)] == [1, 0, 0]
    assert Verdict(0, "", alive=True).saver == 0


def watching(monkeypatch: pytest.MonkeyPatch, rank: int = 0, limit: float = 10.0) -> tuple[Group, Any]:
    """A group of two whose connection is a record of it; 45 s is the limit of other machines."""
    from sparsemae.options import TrainerConfig

    monkeypatch.setenv("LOCAL_RANK", str(rank))
    monkeypatch.setenv("MASTER_PORT", "1")
    found = Group(TrainerConfig(devices=2, hang_timeout_seconds=limit))

    class Record:
        sign, members, verdict, complete = Sign(rank, 1), {1 - rank: Member(Sign(1 - rank, 2))}, None, True

        def judge(self, verdict: Verdict) -> None:
            self.verdict = self.verdict or verdict

    found._line = line = Record()  # type: ignore[assignment]
    return found, line


@pytest.mark.parametrize(("place", "machine", "beats"), [(1, "", 10), (0, "", 10), (1, "elsewhere", 10)])
def test_silence_is_counted_in_own_beats(monkeypatch: pytest.MonkeyPatch, place: int, machine: str, beats: int) -> None:
    """A job that is stopped as a whole, and goes on, has not been silent."""
    found, line = watching(monkeypatch)
    member = line.members[1]
    member.sign.place, member.sign.machine = place, machine or member.sign.machine
    for _ in range(beats):
        found._look_at(member)
    assert line.verdict is None
    found._look_at(member)
    verdict: Any = line.verdict
    assert verdict.silent
    assert "gave no sign for 10 s" in verdict.text


def test_another_machine_is_lost_sooner_than_hung(monkeypatch: pytest.MonkeyPatch) -> None:
    found, line = watching(monkeypatch, limit=1000.0)
    here, there = Member(Sign(1, 2)), Member(Sign(1, 2, "elsewhere 1", place=1))
    for _ in range(int(group.LOST_SECONDS) + 1):
        found._look_at(here)
    assert line.verdict is None
    for _ in range(int(group.LOST_SECONDS) + 1):
        found._look_at(there)
    verdict: Any = line.verdict
    assert "process 1 of 2 (pid 2 on elsewhere) gave no sign for 45 s" in verdict.text


@pytest.mark.parametrize(
    ("places", "rank", "text"),
    [
        ((4, 3), 1, "process 1 of 2 has been at the data of step 2 for 10 s"),
        ((3, 4), 0, "process 0 of 2 has been at the data of step 2 for 10 s"),
        ((3, 3), None, "each of the 2 processes has been at the data of step 2 for 10 s"),
    ],
)
def test_who_is_stuck(monkeypatch: pytest.MonkeyPatch, places: tuple[int, int], rank: int | None, text: str) -> None:
    found, line = watching(monkeypatch)
    for sign, place in zip((line.sign, line.members[1].sign), places, strict=True):
        sign.place, sign.where = place, "data of step 2" if place == min(places) else "forward of step 2"
    found._judge_stuck()
    assert (line.verdict.rank, line.verdict.alive) == (rank, False)
    assert line.verdict.text == f"{text} (trainer.hang_timeout_seconds)"
