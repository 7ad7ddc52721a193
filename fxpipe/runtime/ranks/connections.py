"""The connections between the ranks of a pipeline: which rank is at the other end, whether it is still there.

Gloo opens a connection between every two ranks of a group. Here they are found again among this process's sockets: a
connection that two ranks both see is theirs. The kernel tells both ends at once when one of them ends, also when its
process was killed, and shutting a connection ends every exchange that waits for it.
"""

from __future__ import annotations

import hashlib
import os
import select
import socket
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

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
