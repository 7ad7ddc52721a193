"""The connections between the ranks of a pipeline: which rank is at the other end, whether it is still there.

Gloo opens a connection between every two ranks of a group. Here they are found again among this process's sockets: a
connection that two ranks both see is theirs. The kernel tells both ends at once when one of them ends, also when its
process was killed, and shutting a connection ends every exchange that waits for it. So it is with the store.
"""

from __future__ import annotations

import hashlib
import os
import select
import socket
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from torch.distributed.distributed_c10d import PrefixStore

from fxpipe._torch import default_store

T = TypeVar("T")
STORE_S = 1.0
"""How long the store may take to answer: the rank that keeps it may be the one that stands still."""
_COMES_OUT_S = 5.0
"""How long a call of the store may take to end, once its connection has."""
_FOLDERS = ("/proc/self/fd", "/dev/fd")
_ENDED = getattr(select, "POLLRDHUP", 0) | select.POLLHUP | select.POLLERR
Address = tuple[tuple[object, ...], tuple[object, ...]]


class Connections:
    """Connections to other ranks, found as groups are made; live, until ``close``."""

    def __init__(self) -> None:
        self._found: dict[int, socket.socket] = {}  # by a number that both ends know
        self._ranks: dict[int, tuple[int, int]] = {}  # by file descriptor: that number, and the rank at the other end
        self._poll = select.poll()
        self._awake, self._waker = socket.socketpair()
        self._poll.register(self._awake, select.POLLIN)

    @contextmanager
    def made_here(self) -> Iterator[None]:
        """Note the connections that open while a group is made."""
        before = _open_now()
        yield
        for number, address in _open_now().items():
            if before.get(number) != address:
                with suppress(OSError):
                    self._found.setdefault(_both_know(address), _duplicate(number))

    def identify(self, own: int, gather: Callable[[list[int]], Sequence[Sequence[int]]], ranks: Sequence[int]) -> None:
        """Find out who is at the other end of what was noted; every rank calls this.

        Args:
            own: This rank.
            gather: Gives every rank's numbers, in the order of ``ranks``.
            ranks: Whom to ask.
        """
        known = {number for number, _ in self._ranks.values()}
        new = [number for number in self._found if number not in known]
        theirs = {n: rank for rank, ns in zip(ranks, gather(new), strict=True) if rank != own for n in ns}
        for number in new:
            connection = self._found[number]
            if number in theirs:
                self._ranks[connection.fileno()] = number, theirs[number]
                self._poll.register(connection, _ENDED)
            else:  # somebody else's
                self._found.pop(number).close()

    @property
    def ranks(self) -> set[int]:
        """The ranks that a connection leads to."""
        return {rank for _, rank in self._ranks.values()}

    def ended(self, timeout_s: float) -> set[int]:
        """Wait for connections to end; gives the ranks at their other ends, each once.

        Args:
            timeout_s: How long to wait at most; ``wake`` ends it too.
        """
        found: set[int] = set()
        for number, _ in self._poll.poll(timeout_s * 1e3):
            if number == self._awake.fileno():
                self._awake.recv(64)
            elif number in self._ranks:
                self._poll.unregister(number)
                found.add(self._ranks[number][1])
        return found

    def wake(self) -> None:
        """End a wait."""
        with suppress(OSError):
            self._waker.send(b"x")

    def shut(self) -> None:
        """End all of them: both ends learn of it at once, whatever they wait for."""
        for connection in self._found.values():
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Let go of them; a group's own ends stay open."""
        for connection in (*self._found.values(), self._awake, self._waker):
            connection.close()
        self._found.clear()
        self._ranks.clear()


class StoreLine:
    """The store that ranks share, over a connection of one's own; live, until ``end``.

    A call of the store may wait for ever, where the process that keeps it is stopped. A thread that comes out of such a
    call when the interpreter has ended aborts the process: who made the line ends it, and its calls, before that.

    Attributes:
        store: It; what waits in it raises a RuntimeError as the line ends.
    """

    def __init__(self) -> None:
        self.store = default_store()
        self._ends: list[socket.socket] = []
        self._late: list[threading.Thread] = []
        before = _open_now()
        with suppress(RuntimeError, NotImplementedError):  # a store of the user's that cannot: it is asked as it is
            self.store = self.store.clone()
        port = _port(self.store)
        for number, address in _open_now().items():
            if address[1][1] == port and before.get(number) != address:
                with suppress(OSError):
                    self._ends.append(_duplicate(number))

    def ask(self, call: Callable[[Any], T]) -> T | None:
        """Call something with the store, but not for ever; None where it did not answer, or has ended."""
        found: list[T] = []

        def ask() -> None:
            with suppress(RuntimeError, ValueError):
                found.append(call(self.store))

        thread = threading.Thread(target=ask, name="fxpipe-ask", daemon=True)
        thread.start()
        thread.join(STORE_S)
        if thread.is_alive():
            self._late.append(thread)
        return found[0] if found else None

    def end(self, *threads: threading.Thread) -> None:
        """End the connection, and wait for what comes out of it.

        Args:
            *threads: Who uses it, told to end.
        """
        for thread in threads:
            thread.join(STORE_S)
        for each in self._ends:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        self._ends.clear()
        for thread in (*self._late, *threads):
            thread.join(_COMES_OUT_S)


def _port(store: Any) -> int | None:
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    return getattr(store, "port", None)  # a TCPStore's


def _open_now() -> dict[int, Address]:
    """Give the two addresses of every connection of this process, by file descriptor."""
    folder = next((folder for folder in _FOLDERS if os.path.isdir(folder)), None)
    found: dict[int, Address] = {}
    for name in os.listdir(folder) if folder is not None else ():
        with suppress(OSError):
            if stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                with _duplicate(int(name)) as connection:
                    if connection.family in (socket.AF_INET, socket.AF_INET6):
                        found[int(name)] = connection.getsockname()[:2], connection.getpeername()[:2]
    return found


def _duplicate(number: int) -> socket.socket:
    """Give one more end of a connection that is somebody else's, and leave that one as it is.

    Under ``socket.setdefaulttimeout`` Python makes a connection it takes over non-blocking, for all who hold it: the
    store, and whatever else waits for an answer, would fail at once. It leaves alone what it is told is so already.
    """
    known = socket.SOCK_STREAM | getattr(socket, "SOCK_NONBLOCK", 0)
    return socket.socket(type=known, fileno=os.dup(number))


def _both_know(address: Address) -> int:
    """Give a number for a connection that is the same at both ends."""
    return int.from_bytes(hashlib.blake2b(repr(sorted(map(str, address))).encode(), digest_size=8).digest(), "little")
