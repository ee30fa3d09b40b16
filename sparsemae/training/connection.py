"""What the processes of a training tell each other once a second, besides the collectives: how far each has come.

Process 0 listens; each other one has a connection to it, which also tells that a process is gone: the system closes it.
torch's store would not serve: calls of its clients wait without a limit for a server that is stopped.
"""

import json
import os
import secrets
import socket
import socketserver
import threading
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

BEAT_SECONDS = 1.0
RUNNING, SAVED, LEFT = "running", "saved", "left"
_NAMESPACE = "/proc/self/ns/pid"  # of process numbers
MACHINE = f"{socket.gethostname()} {os.stat(_NAMESPACE).st_ino if os.path.exists(_NAMESPACE) else ''}"


@dataclass(frozen=True)
class Verdict:
    """Why all processes end."""

    rank: int | None
    """The process that is to blame, if that is known."""
    text: str
    """One line."""
    alive: bool = False
    """That process can still act: it has failed, and is not gone or stuck."""
    silent: bool = False
    """It gives no sign, and is killed."""

    @property
    def saver(self) -> int:
        """The process that saves the last whole step: the first one that can."""
        return 1 if self.rank == 0 and not self.alive else 0


@dataclass
class Sign:
    """What a process says of itself."""

    rank: int
    pid: int
    machine: str = MACHINE
    place: int = 0
    """How many points of the loop, which all processes pass, its main thread has passed; 0: it is not in the loop."""
    progress: int = 0
    """The same, with those that each process passes by itself."""
    where: str = ""
    """The last of these points."""
    state: str = RUNNING
    """RUNNING; SAVED: the last whole step is on disk; LEFT: it has no more to do."""


@dataclass
class Member:
    """What is known of another process."""

    sign: Sign
    beats: int = 0
    """Of ours, since it last gave a sign."""
    connected: bool = True


class Connection:
    """This process's side of it.

    Args:
        rank: of this process.
        world: number of processes.
        address: machine of process 0.
        store: torch's, where process 0 leaves the port, and a token without which nobody is heard.
        timeout: of the first contact, seconds.
    """

    def __init__(self, rank: int, world: int, address: str, store: Any, timeout: float) -> None:
        self.sign = Sign(rank, os.getpid())
        self.members: dict[int, Member] = {}
        """Of process 0: the others, as they come. Of each other one: process 0."""
        self.verdict: Verdict | None = None
        self.complete = self.all_left = False
        self._world, self._news = world, threading.Event()
        self._server = _Server(self) if rank == 0 else None
        if self._server is not None:
            self._token = secrets.token_hex()
            threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True).start()
            store.set("connection", f"{self._server.server_address[1]} {self._token}")
        else:
            port, self._token = store.get("connection").decode().split()
            stream = socket.create_connection((address, int(port)), timeout)
            stream.settimeout(None)
            self.members[0] = Member(Sign(0, 0, ""))
            threading.Thread(target=self._speak, args=(stream,), daemon=True).start()

    def judge(self, verdict: Verdict) -> None:
        """The first verdict is that of all."""
        self.verdict = self.verdict or verdict
        self._news.set()

    def now(self, state: str) -> None:
        """Tell a new state of this process at once."""
        self.sign.state = state
        self._news.set()

    def close(self) -> None:
        """Hear nobody new."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()

    def gone(self, member: Member) -> None:
        """The connection to a process has ended."""
        member.connected = False
        if member.sign.state == RUNNING and not self.all_left:
            who = f"process {member.sign.rank} of {self._world} (pid {member.sign.pid})"
            text = f"{who} ended without a word, as by kill -9 or for want of memory"
            self.judge(Verdict(member.sign.rank, text))

    def hear(self, stream: socketserver.StreamRequestHandler) -> None:
        """What one process says to process 0, until its connection ends."""
        member: Member | None = None
        try:
            while line := stream.rfile.readline(10_000):
                said = json.loads(line)
                if not secrets.compare_digest(said["token"], self._token):
                    return
                sign = Sign(**said["sign"])
                if member is None:
                    self.members[sign.rank] = member = Member(sign)
                    self.complete = len(self.members) == self._world - 1
                member.sign, member.beats = sign, 0
                stream.wfile.write(self._line(complete=self.complete, all_left=self.all_left))
                self._take(said)
        finally:
            if member is not None:
                self.gone(member)

    def _speak(self, stream: socket.socket) -> None:
        """What another process says to process 0, once a beat and at once when there is news."""
        first = self.members[0]
        with suppress(OSError, ValueError), stream, stream.makefile("rwb") as file:
            while not self.all_left:
                file.write(self._line(token=self._token))
                file.flush()
                if not (line := file.readline()):
                    break
                answer = json.loads(line)
                first.sign, first.beats = Sign(**answer["sign"]), 0
                self.complete, self.all_left = answer["complete"], answer["all_left"]
                self._take(answer)
                self._news.wait(BEAT_SECONDS if self.complete and self.sign.state == RUNNING else 0.05)
                self._news.clear()
        self.gone(first)

    def _line(self, **more: Any) -> bytes:
        verdict = None if self.verdict is None else asdict(self.verdict)
        return json.dumps({"sign": asdict(self.sign), "verdict": verdict, **more}).encode() + b"\n"

    def _take(self, said: dict[str, Any]) -> None:
        if said["verdict"] is not None and self.verdict is None:
            self.judge(Verdict(**said["verdict"]))


class _Server(socketserver.ThreadingTCPServer):
    """Listens on all addresses of this machine, on any port."""

    daemon_threads = True
    block_on_close = False
    address_family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        super().__init__(("", 0), _Handler)

    def server_bind(self) -> None:
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()


class _Handler(socketserver.StreamRequestHandler):
    server: _Server

    def handle(self) -> None:
        with suppress(OSError, ValueError, TypeError, KeyError, RecursionError):  # a stranger's words
            self.server.connection.hear(self)
