"""Notices within seconds which process of a run is gone, and reports it in one line that names the process.

A process that waits for another one in a collective operation waits in C++, and learns nothing or only that a
connection was closed. Each process therefore has a thread and a connection to process 0, the hub:

- The kernel closes the connection of a process that dies. The hub sees it and tells all others.
- A process that fails by itself sends its error before it leaves.
- The processes of one machine look at each other's state in /proc. A process that stays stopped (SIGSTOP) is reported
to
  the hub and killed, since nothing waits for it any more. A process that a debugger has stopped is left alone.
- TCP's keep-alive, which the kernels answer, notices a machine that goes down.

A thread that knows of a loss ends its process soon, if the main thread does not do so by itself.
"""

import contextlib
import json
import os
import secrets
import select
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from avion.errors import USER_ERROR

from . import signals

_LOOK_EVERY_S = 0.5
_STOPPED_FOR_S = 2.5
_GRACE_S = 1.5  # for the main thread, to leave by itself
_LEAVING_S = 4.0  # once the main thread is about to leave because of the loss
_CLOSING_S = 60.0  # once all have agreed on an error: logs are closed and sent away
_KEEP_ALIVE_S = 10


@dataclass(frozen=True)
class Peer:
    """A process of the run as its operating system knows it; `boot` and `start` tell whether a pid is still that
    process.
    """

    rank: int
    host: str
    pid: int
    boot: str
    start: str


@dataclass(frozen=True)
class Loss:
    """A process that is gone.

    Attributes:
        rank: The number of the process.
        text: What is known about its end.
    """

    rank: int
    text: str


def this_process(rank: int) -> Peer:
    """Return what other processes must know to recognise this one."""
    boot = ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return Peer(rank, socket.gethostname(), os.getpid(), boot, _state(os.getpid())[1])


def _state(pid: int) -> tuple[str, str]:
    """Return (the letter of the state, the time of the start) of a process; empty where there is no process, or no
    /proc.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return "", ""
    return fields[0], fields[19]


class Watch:
    """The thread that watches the other processes, and what it knows.

    Args:
        rank: The number of this process.
        size: The number of processes.
        gather: Gathers a value of every process, in rank order. It is called while the object is built.
        hub: The host name or address of process 0; "" where it is not known, and then no process watches.
    """

    def __init__(self, rank: int, size: int, gather: Callable[[Any], list[Any]], hub: str):
        self.rank, self.size = rank, size
        self.loss: Loss | None = None
        self._known, self._ended = threading.Event(), threading.Event()
        self._leaving = self._agreed = False
        self._links: dict[int, socket.socket] = {}
        self._unread: dict[int, bytes] = {}
        self._thread = threading.Thread(target=self._run, name="peers", daemon=True)
        self._woken, self._wakes = os.pipe()
        server = _listen() if rank == 0 and hub else None
        port = server.getsockname()[1] if server is not None else 0
        facts = gather({"peer": asdict(this_process(rank)), "port": port, "word": secrets.token_hex(16)})
        self.peers = [Peer(**f["peer"]) for f in facts]
        here = self.peers[rank]
        self._beside = [p for p in self.peers if p.rank != rank and p.boot and p.boot == here.boot and _is_there(p)]
        fine = self._meet(server, hub, facts[0]["port"], facts[0]["word"])
        self.works = all(gather(fine))
        if self.works:
            self._thread.start()
        else:
            self._close()

    # --- meeting

    def _meet(self, server: socket.socket | None, hub: str, port: int, word: str) -> bool:
        try:
            if server is not None:
                with server:
                    self._accept(server, word)
            elif self.rank > 0 and port:
                link = socket.create_connection((hub, port), timeout=30)
                link.sendall(f"{word} {self.rank:8d}".encode())
                self._add(0, link)
            else:
                return False
        except (OSError, ValueError):
            return False
        return True

    def _accept(self, server: socket.socket, word: str) -> None:
        """Accept the connection of every other process; a process that does not know the secret word is not of this
        run.
        """
        server.settimeout(30)
        while len(self._links) < self.size - 1:
            link, _ = server.accept()
            link.settimeout(10)
            with contextlib.suppress(OSError, ValueError):
                said, _, rank = _exactly(link, len(word) + 9).decode("ascii", "replace").partition(" ")
                if secrets.compare_digest(said, word) and 0 < int(rank) < self.size:
                    self._add(int(rank), link)
                    continue
            link.close()

    def _add(self, rank: int, link: socket.socket) -> None:
        link.settimeout(5)
        link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPIDLE", _KEEP_ALIVE_S), ("TCP_KEEPINTVL", _KEEP_ALIVE_S), ("TCP_KEEPCNT", 3)):
            if hasattr(socket, name):
                link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._links[rank], self._unread[rank] = link, b""

    # --- the thread

    def _run(self) -> None:
        stopped_for: dict[int, float] = {}
        last = time.monotonic()
        while not self._ended.is_set():
            links = {link.fileno(): rank for rank, link in self._links.items()}
            poll = select.poll()
            for fd in (*links, self._woken):
                poll.register(fd, select.POLLIN)
            heard = [links[fd] for fd, _ in poll.poll(1000 * _LOOK_EVERY_S) if fd in links]
            if self._ended.is_set():
                return
            for rank in heard:
                self._hear(rank)
            now = time.monotonic()
            self._look(stopped_for, now - last)
            last = now
            if self.loss is not None:
                self._end_soon()

    def _hear(self, rank: int) -> None:
        link = self._links.get(rank)
        if link is None:
            return
        data = b""
        with contextlib.suppress(OSError):
            data = link.recv(65536)
        if not data:
            self._drop(rank)
            self._conclude(rank, "died: it crashed, or was killed (is there memory enough?)")
            return
        *lines, self._unread[rank] = (self._unread[rank] + data).split(b"\n")
        for line in lines:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                self._take(rank, json.loads(line))

    def _take(self, rank: int, message: dict[str, Any]) -> None:
        if message["kind"] == "bye":
            self._drop(rank)
        elif message["kind"] == "loss":
            self._conclude(int(message["rank"]), str(message["text"]))

    def _drop(self, rank: int) -> None:
        link = self._links.pop(rank, None)
        if link is not None:
            link.close()

    def _look(self, stopped_for: dict[int, float], seconds: float) -> None:
        """Look at the processes of this machine; `seconds` is the time since the last look."""
        if seconds > 4 * _LOOK_EVERY_S:  # this process was stopped too, or got no CPU time
            stopped_for.clear()
            return
        for peer in self._beside:
            state, start = _state(peer.pid)
            stopped = state == "T" and start == peer.start
            stopped_for[peer.rank] = stopped_for.get(peer.rank, 0.0) + seconds if stopped else 0.0
            if stopped_for[peer.rank] >= _STOPPED_FOR_S and self.loss is None:
                self._conclude(peer.rank, "was stopped (SIGSTOP) and is killed now")
                with contextlib.suppress(OSError):
                    os.kill(peer.pid, signal.SIGKILL)

    def _conclude(self, rank: int, text: str) -> None:
        """Note that a process is gone: remember the first one, and tell the others."""
        if self.loss is not None or self._ended.is_set():
            return
        self.loss = Loss(rank, text)
        self._send({"kind": "loss", "rank": rank, "text": text})
        self._known.set()

    def _end_soon(self) -> None:
        line = f"stopped because {self.line()}" if self.tells() else ""
        if not self._ended.wait(_GRACE_S) and not (self._leaving or self._agreed):
            signals.leave(line, USER_ERROR)
        if not self._ended.wait(_CLOSING_S if self._agreed else _LEAVING_S):
            # The main thread has said nothing yet: it signs off before it does.
            signals.leave("" if self._agreed else line, USER_ERROR)

    # --- for the main thread

    def _send(self, message: dict[str, Any]) -> None:
        data = json.dumps(message).encode() + b"\n"
        for link in list(self._links.values()):
            with contextlib.suppress(OSError):
                link.sendall(data)

    def find_loss(self, seconds: float = 3.0) -> Loss | None:
        """Find out which process is gone, once a connection to one was lost.

        Args:
            seconds: How long to wait for the answer.

        Returns:
            The loss; None where none is known.
        """
        self._known.wait(seconds if self.works else 0.0)
        if self.loss is not None:
            self._leaving = True
        return self.loss

    def agreed(self) -> None:
        """Note that all processes know of an error and leave because of it."""
        self._agreed = True

    def line(self) -> str:
        """Return the loss in words."""
        assert self.loss is not None
        peer = self.peers[self.loss.rank]
        return f"process {peer.rank} of {self.size} (pid {peer.pid} on {peer.host}) {self.loss.text}"

    def tells(self) -> bool:
        """Return whether this process is the one that reports the loss: the first one left, as far as is known."""
        assert self.loss is not None
        if self.loss.rank != 0:
            return self.rank == 0
        return self.rank == min(p.rank for p in self.peers if p.rank and p.host == self.peers[self.rank].host)

    def leave(self, error: str | None) -> None:
        """Sign off from the other processes.

        Args:
            error: The error in one line, if this process leaves because of an error that the others do not know.
        """
        if self._ended.is_set():
            return
        self._leaving = True
        if self.loss is None:
            if error is not None:
                self._send({"kind": "loss", "rank": self.rank, "text": f"failed: {error[:1000]}"})
            self._send({"kind": "bye"})
        self._ended.set()
        if self.works:
            os.write(self._wakes, b"\0")
            self._thread.join()
        self._close()

    def _close(self) -> None:
        for rank in list(self._links):
            self._drop(rank)
        os.close(self._woken)
        os.close(self._wakes)


def _is_there(peer: Peer) -> bool:
    """Return whether the pid on this machine is that process; in a container, it may be another process or none."""
    return bool(peer.start) and _state(peer.pid)[1] == peer.start


def _listen() -> socket.socket | None:
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096)
        return socket.create_server(("", 0), backlog=4096)
    except OSError:
        return None


def _exactly(link: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = link.recv(count - len(data))
        if not part:
            raise ValueError("the connection was closed")
        data += part
    return data
