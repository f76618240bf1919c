"""Whether all processes of a training live: each learns within seconds that another has ended.

A collective operation waits for all processes, with some backends for many minutes after one has
died. So every process holds a connection to the first one, which the kernel closes whatever its
process dies of. The first tells the others who is gone. A process that is then still waiting
after some seconds is ended from here, by its own thread, as nothing else can reach it.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import selectors
import socket
import threading
import time
from contextlib import suppress
from typing import Any

import torch.distributed as dist

from dyhead_cuda.detection.training.checkpoint_file import one_line

GRACE_S = 5.0  # for a process to end by itself after another one has
NEWS_S = 2.0  # that news may take to come
STATUS = 1  # with which a process is ended from here
_CONNECT_S = 30.0
_POLL_S = 0.2
_LINE_BYTES = 4096

_logger = logging.getLogger("dyhead_cuda.detection")
_open: set[socket.socket] = set()


def _close_in_child() -> None:
    """A forked worker that outlives its process must not keep the connections open."""
    for each in _open:
        each.close()
    _open.clear()


os.register_at_fork(after_in_child=_close_in_child)


class RankWatch:
    """The connections of this process, and what they say; made by all processes of the group.

    Args:
        rank: of this process.
        count: of all processes.
    """

    def __init__(self, rank: int, count: int) -> None:
        self.rank = rank
        self._names: dict[int, str] = {}
        self._lost: str | None = None
        self._news, self._ended = threading.Event(), threading.Event()
        self._peers: dict[socket.socket, int] = {}  # rank by connection
        self._left: set[int] = set()
        self._server: socket.socket | None = None
        self._selector = selectors.DefaultSelector()
        self._token = ""
        self._connect(count)
        self._thread = threading.Thread(target=self._watch, name="rank-watch", daemon=True)
        self._thread.start()

    def lost(self) -> str | None:
        """Which other process has ended, in one line; waits a moment for the news."""
        self._news.wait(NEWS_S)
        return self._lost

    def leaving(self, error: BaseException | None) -> None:
        """Tells the others that this process ends its part, and whether by an error."""
        if self._lost is None:
            why = None if error is None else f"{type(error).__name__}: {one_line(error)}"
            self._send({"rank": self.rank, "left": why})

    def close(self) -> None:
        """Ends the watch of this process, and the danger of being ended by it."""
        self._ended.set()
        self._thread.join()
        for each in (*self._peers, *([self._server] if self._server else [])):
            _open.discard(each)
            each.close()
        self._selector.close()

    def _connect(self, count: int) -> None:
        me = f"pid {os.getpid()} on {socket.gethostname()}"
        place: list[Any] = [None]
        if self.rank == 0:
            host = os.environ.get("MASTER_ADDR", "localhost")
            here = host in ("localhost", "127.0.0.1")  # then no other host needs to come in
            self._server = socket.create_server(("127.0.0.1" if here else "", 0), backlog=count)
            self._keep(self._server)
            self._token = secrets.token_hex(16)
            place = [(host, self._server.getsockname()[1], self._token, me)]
        dist.broadcast_object_list(place)
        if self.rank == 0:
            return
        host, port, token, self._names[0] = place[0]
        try:
            peer = socket.create_connection((host, port), _CONNECT_S)
            hello = {"rank": self.rank, "token": token, "name": me}
            peer.sendall(json.dumps(hello).encode() + b"\n")
        except OSError as error:
            _logger.warning(
                "rank %d has no connection to rank 0 at %s:%d (%s): should a process die, this one "
                "may wait for long",
                *(self.rank, host, port, error),
            )
            return
        self._add(peer, 0)

    def _keep(self, each: socket.socket) -> None:
        _open.add(each)
        self._selector.register(each, selectors.EVENT_READ)

    def _add(self, peer: socket.socket, rank: int) -> None:
        # So that a host without power is noticed too.
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, seconds in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), seconds)
        peer.settimeout(NEWS_S)
        self._peers[peer] = rank
        self._keep(peer)

    def _watch(self) -> None:
        while not self._ended.is_set():
            for key, _ in self._selector.select(_POLL_S):
                each: Any = key.fileobj
                if each is self._server:
                    self._accept()
                else:
                    self._read(each)
            if self._news.is_set():
                self._end_if_still_waiting()
                return

    def _end_if_still_waiting(self) -> None:
        if not self._ended.wait(GRACE_S):
            _logger.critical("%s", self._lost)
            os._exit(STATUS)

    def _accept(self) -> None:
        assert self._server is not None
        peer, _ = self._server.accept()
        peer.settimeout(NEWS_S)
        hello = {}
        with suppress(OSError):
            hello = _parse(_line(peer))
        if not secrets.compare_digest(str(hello.get("token")).encode(), self._token.encode()):
            peer.close()  # no process of this training
            return
        self._names[hello["rank"]] = hello["name"]
        self._add(peer, hello["rank"])

    def _read(self, peer: socket.socket) -> None:
        """Takes one message; without one the process at the other end is gone."""
        try:
            line = _line(peer)
        except OSError:
            line = b""
        message, rank = _parse(line), self._peers[peer]
        if "lost" in message:
            self._tell(message["lost"])
        elif message.get("left") is not None:
            self._tell(self._gone(rank, f"has failed with {message['left']}"))
        elif "left" in message:
            self._left.add(rank)
        else:
            self._selector.unregister(peer)
            if rank not in self._left:
                self._tell(
                    self._gone(rank, "is gone without a word: it was killed, or its host is away")
                )

    def _gone(self, rank: int, what: str) -> str:
        return f"the process of rank {rank} ({self._names[rank]}) {what}"

    def _tell(self, what: str) -> None:
        """Notes the first loss, and passes it on."""
        if self._lost is None:
            self._lost = (
                f"{what}; so rank {self.rank} ends too. Run the same command again: a training "
                "goes on from its last checkpoint"
            )
            self._send({"lost": what})
            self._news.set()

    def _send(self, message: dict[str, Any]) -> None:
        data = json.dumps(message).encode() + b"\n"
        for peer in list(self._peers):
            with suppress(OSError):  # it is gone, as the reading of it will show
                peer.sendall(data)


def _line(peer: socket.socket) -> bytes:
    """One line of a connection; what came of it where the connection has ended."""
    line = b""
    stop = time.monotonic() + NEWS_S
    while not line.endswith(b"\n") and len(line) < _LINE_BYTES and time.monotonic() < stop:
        byte = peer.recv(1)  # messages are few and short
        if not byte:
            break
        line += byte
    return line


def _parse(line: bytes) -> dict[str, Any]:
    try:
        message = json.loads(line)
    except ValueError:
        return {}
    return message if isinstance(message, dict) else {}
