"""What a rank is doing, written where the other ranks of its machine can read it even when it is stopped or killed."""

from __future__ import annotations

import mmap
import os
import secrets
import struct
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import IntEnum


class Doing(IntEnum):
    """What a rank does, as far as its pipeline is concerned."""

    OUTSIDE = 0
    """It is in no call of the pipeline: the script's own code runs."""
    WAITING = 1
    """It exchanges something with other ranks."""
    WORKING = 2
    """It computes: a stage's forward or backward, or what the action says."""
    BUSY = 3
    """It does what may take long, and has said so: others wait for as long as it lives."""
    LEFT = 4
    """It has closed the pipeline, or its script has ended."""


@dataclass(frozen=True, slots=True)
class Status:
    """What a rank did when it was looked at.

    Attributes:
        entered: Calls of the pipeline so far that exchange something.
        finished: How many of them are over.
        beats: Grows for as long as its process runs.
        beaten_at: When it grew last, by that machine's clock.
        since: Since when it does what it does, by that clock.
        doing: What it does.
        action: The last action: ``2F0``, or what is done in a word.
        call: The last call, by name.
        words: Why it left, where it had a reason.
    """

    entered: int
    finished: int
    beats: int
    beaten_at: float
    since: float
    doing: Doing
    action: str
    call: str
    words: str


_COUNTS = struct.Struct("<QQ")
_BEAT = struct.Struct("<Qd")
_DOING = struct.Struct("<dB")
_ACTION = struct.Struct("<32s")
_TEXTS = struct.Struct("<32s32s4096s")
_BEAT_AT = _COUNTS.size
_DOING_AT = _BEAT_AT + _BEAT.size
_ACTION_AT = _DOING_AT + _DOING.size
_CALL_AT = _ACTION_AT + 32
_WORDS_AT = _CALL_AT + 32
SIZE = _ACTION_AT + _TEXTS.size


def parse(block: bytes) -> Status:
    """Read what ``OwnStatus`` writes."""
    since, doing = _DOING.unpack_from(block, _DOING_AT)
    texts = (text.rstrip(b"\0").decode(errors="replace") for text in _TEXTS.unpack_from(block, _ACTION_AT))
    entered, finished = _COUNTS.unpack_from(block)
    beats, beaten_at = _BEAT.unpack_from(block, _BEAT_AT)
    action, call, words = texts
    return Status(entered, finished, beats, beaten_at, since, Doing(doing), action, call, words)


class OwnStatus:
    """This rank's status: some bytes of a file that the others of the machine map, and that then has no name any more.

    Where the system has files without a name it has none from the start: a rank that is killed leaves nothing behind.

    Writing to it costs under a microsecond, and asks nobody.

    Attributes:
        current: What is done now.
        since: Since when.
    """

    def __init__(self) -> None:
        self.token = secrets.token_hex(8)
        if hasattr(os, "memfd_create"):
            self._file: int | None = os.memfd_create(f"fxpipe-{self.token}")
            self.path = f"/proc/{os.getpid()}/fd/{self._file}"
        else:
            self._file, self.path = tempfile.mkstemp(prefix="fxpipe-", suffix=f"-{self.token}")
        os.ftruncate(self._file, SIZE)
        self._block = mmap.mmap(self._file, SIZE)
        self._entered = self._finished = self._beats = 0
        self._has_left = False
        self.current, self.since = Doing.OUTSIDE, time.monotonic()
        self.doing(Doing.OUTSIDE)
        self.beat()

    def unlink(self) -> None:
        """Let go of the file, once: what is mapped stays until the last rank lets go of it."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
            if not hasattr(os, "memfd_create"):
                os.unlink(self.path)

    def enter(self, call: str) -> None:
        """Begin a call."""
        self._entered += 1
        struct.pack_into("<32s", self._block, _CALL_AT, call.encode()[:32])
        self._count()
        self.doing(Doing.WORKING)

    def finish(self) -> None:
        """End a call."""
        self._finished = self._entered
        self._count()
        self.doing(Doing.OUTSIDE)

    def act(self, action: str) -> None:
        """Begin to compute something, by name."""
        self.doing(Doing.WORKING)
        _ACTION.pack_into(self._block, _ACTION_AT, action.encode())

    def doing(self, doing: Doing) -> None:
        """Say what is done now; others see it until this rank has left."""
        self.current, self.since = doing, time.monotonic()
        if not self._has_left:
            _DOING.pack_into(self._block, _DOING_AT, self.since, doing)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Say for a while that this rank waits for others."""
        before = self.current
        self.doing(Doing.WAITING)
        yield
        self.doing(before)

    @contextmanager
    def busy(self, action: str) -> Iterator[None]:
        """Say for a while that what is done may take long."""
        before = self.current
        self.act(action)
        self.doing(Doing.BUSY)
        try:
            yield
        finally:
            self.doing(before)

    def leave(self, words: str) -> None:
        """Say that this rank takes part no more."""
        struct.pack_into("<4096s", self._block, _WORDS_AT, words.encode()[:4096])
        if not self._has_left:
            self._has_left = True
            _DOING.pack_into(self._block, _DOING_AT, time.monotonic(), Doing.LEFT)

    def beat(self) -> None:
        """Show that this process runs."""
        self._beats += 1
        _BEAT.pack_into(self._block, _BEAT_AT, self._beats, time.monotonic())

    def read(self) -> Status:
        """Give what was written."""
        return parse(self.block())

    def block(self) -> bytes:
        """Give it as bytes."""
        return self._block[:]

    def _count(self) -> None:
        _COUNTS.pack_into(self._block, 0, self._entered, self._finished)


class OtherStatus:
    """The status of another rank: mapped where it is on this machine, else as it was last told of it.

    Args:
        path: Where that rank wrote it.
        token: What its name has in it: a file of that name is that rank's.

    Attributes:
        heard_at: When its process was last seen to have shown that it runs.
    """

    def __init__(self, path: str, token: str) -> None:
        self._block: mmap.mmap | bytes = b""
        self._beats, self.heard_at = -1, time.monotonic()
        with suppress(OSError, ValueError):
            if token in os.path.realpath(path):  # on another machine that place may be of anything
                file = os.open(path, os.O_RDONLY)
                try:
                    self._block = mmap.mmap(file, SIZE, prot=mmap.PROT_READ)
                finally:
                    os.close(file)
        self.is_here = bool(self._block)

    def tell(self, block: bytes) -> None:
        """Take what a rank of another machine says."""
        self._block = block

    def read(self) -> Status | None:
        """Give the status; None where nothing was heard yet."""
        if len(self._block) < SIZE:
            return None
        status = parse(self._block[:])
        if status.beats != self._beats:
            self._beats, self.heard_at = status.beats, time.monotonic()
        return status

    def idle_since(self, status: Status) -> float:
        """Give since when a rank does what it does, by this machine's clock."""
        if self.is_here:
            return status.since
        return self.heard_at - (status.beaten_at - status.since)
