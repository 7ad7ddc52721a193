"""A thread beside each pipeline: sees when another rank is lost or stands still, and ends what waits for it.

It asks nobody while all goes well: connections say themselves that they ended, and what the ranks of a machine do lies
in memory that all of them read. Only ranks of other machines are asked through the store.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from fxpipe.runtime.ranks.awake import Awake
from fxpipe.runtime.ranks.connections import STORE_S, Connections, StoreLine
from fxpipe.runtime.ranks.place import machine, runs
from fxpipe.runtime.ranks.record import Record
from fxpipe.runtime.ranks.status import Doing, OtherStatus, OwnStatus, Status

TICK_S = 0.5
"""How often a process shows that it runs, and looks whether others do."""
SILENT_S = 3.0
"""After how long without such a sign a process counts as one that does not run."""
GRACE_S = 2.0
"""How long an exchange may go on once every connection of the pipeline has ended."""
EXIT_CODE = 70
"""Of a process that such an exchange keeps."""
_READ_S = 0.5
"""How long ranks of other machines have to read why the pipeline ended."""
_STAGE = re.compile(r"(\d+)[A-Z]\d+")
_MOST_SHOWN = 16


class RankWatch:
    """What one rank knows of the others; live, from ``start`` to ``close``.

    Args:
        members: Global ranks of the pipelines that go together.
        own: This one.
        timeout_s: How long a rank may do the same thing, without being busy, while another waits for it.
        key: Of this pipeline in the store.
        interrupt: Ends what shut connections do not end.

    Attributes:
        status: What this rank does, to be kept up to date.
        connections: To the other ranks.
    """

    def __init__(
        self, members: Sequence[int], own: int, timeout_s: float, key: str, interrupt: Callable[[], None] = lambda: None
    ) -> None:
        self.status = OwnStatus()
        self.connections = Connections()
        self.timeout_s = timeout_s
        self._members, self._own, self._key, self._interrupt = tuple(members), own, key, interrupt
        self._others: dict[int, OtherStatus] = {}
        self._pids: dict[int, int] = {}  # of ranks on this machine
        self._lost: dict[int, float] = {}
        self._record: Record | None = None
        self._decided_at = 0.0
        self._awake = Awake(TICK_S)
        self._line: StoreLine | None = None  # where ranks of other machines are
        self._decided = threading.Event()
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._teller: threading.Thread | None = None

    def start(self, gather: Callable[[Any], list[Any]]) -> None:
        """Meet the other ranks' watches; every rank calls this.

        Args:
            gather: Gives what each member has, in their order.
        """
        told = gather((self.status.path, self.status.token, os.getpid(), machine()))
        for rank, (path, token, pid, where) in zip(self._members, told, strict=True):
            if rank != self._own:
                self._others[rank] = OtherStatus(path, token)
                if where and where == machine():
                    self._pids[rank] = pid
        self.connections.identify(self._own, gather, self._members)
        self.status.unlink()  # `identify` has gathered: all have mapped it
        self._thread = threading.Thread(target=self._run, name="fxpipe-watch", daemon=True)
        self._thread.start()
        if not all(other.is_here for other in self._others.values()):
            self._line = StoreLine()
            self._teller = threading.Thread(target=self._tell, name="fxpipe-tell", daemon=True)
            self._teller.start()

    def adopt(self, gather: Callable[[Any], list[Any]], ranks: Sequence[int]) -> None:
        """Watch the connections of one more group, noted by ``connections.made_here``; every rank calls this."""
        self.connections.identify(self._own, gather, ranks)
        self.connections.wake()

    def why(self, patience_s: float) -> Record | None:
        """Say why an exchange ended, by the state of its connections; waits a while for that to show.

        Returns:
            None where every other rank is there and has left no word.
        """
        self.connections.wake()
        if self._decided.wait(patience_s) or not self._lost:
            return self._record
        return self.settle(self._gone(min(self._lost)))

    def settle(self, record: Record) -> Record:
        """Say why the pipeline ended, unless another rank did first; ends every exchange of this rank.

        Returns:
            What all ranks say: the first record.
        """
        with self._lock:
            if self._record is None:
                first = self._said() or self._asked(lambda store: _written(store, self._key, record))
                self._record = first if first is not None else record
                self.status.leave(self._record.to_json())
                self._decided_at = time.monotonic()
                self._decided.set()
                self._interrupt()
                self.connections.shut()
            return self._record

    def leave(self, words: str) -> None:
        """Say that this rank takes part no more; to ranks of other machines too."""
        if self.status.read().doing != Doing.LEFT:
            self.status.leave(words)
            self._asked(lambda store: store.set(self._status_key(self._own), self.status.block()))

    def close(self) -> None:
        """End the threads and let go of the connections."""
        farewell = Record(self._own, f"rank {self._own} has closed the pipeline", silent=True, is_farewell=True)
        self.leave(farewell.to_json())
        self._stopped.set()
        self.connections.wake()
        if self._record is not None and self._teller is not None and self._own == self._members[0]:
            time.sleep(_READ_S)  # this rank may keep the store
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(STORE_S)
        if self._line is not None and self._teller is not None:
            self._line.end(self._teller)
        self.connections.close()
        self.status.unlink()
        self._interrupt = lambda: None  # it refers to the groups

    # --- in the thread ---

    def _run(self) -> None:
        while not self._stopped.is_set():
            for rank in sorted(self.connections.ended(TICK_S)):
                self._lost.setdefault(rank, time.monotonic())
            for rank in [rank for rank, pid in self._pids.items() if rank not in self._lost and not runs(pid)]:
                self._lost[rank] = time.monotonic()  # a process that it forked may hold its connections open
            self._awake.tick()
            self.status.beat()
            if self._decided.is_set():
                self._leave_what_never_ends()
            if self._stopped.is_set() or self._decided.is_set():
                continue
            found = self._judge()
            if found is not None:
                record = self.settle(found)
                if record.silent:  # no rank raises it as its own, and a launcher may end this one at any moment
                    logging.getLogger("fxpipe").error("%s", record.text)

    def _leave_what_never_ends(self) -> None:
        """End the process where an exchange goes on although every connection it could use has ended.

        Gloo forgets, rarely, an exchange that begins just as its connection ends: nothing would wake that thread.
        """
        start = max(self.status.since, self._decided_at)
        if self.status.current == Doing.WAITING and self._awake.since(start) > GRACE_S and self._record is not None:
            print(f"fxpipe: rank {self._own} ends: {self._record.text}", file=sys.stderr, flush=True)
            os._exit(EXIT_CODE)

    def _judge(self) -> Record | None:
        own = self.status.read()
        if own.entered == own.finished:
            return None
        for rank in self._lost:
            other = self._others[rank].read()
            if other is None or other.finished < own.entered:
                return self._gone(rank)
        waited_s = self._awake.since(own.since)
        return self._standing_still(waited_s) if own.doing == Doing.WAITING and waited_s >= self.timeout_s else None

    def _gone(self, rank: int) -> Record:
        """Say why a connection ended: in the words of the rank itself, where it left any."""
        told = self._said(rank) or self._asked(lambda store: _read(store, self._key))
        if told is not None:
            return told
        status = self._others[rank].read()
        where = f" in {status.call}" if status is not None and status.call else ""
        return Record(rank, f"{_named(rank, status)} ended without a word{where}{self._last_actions()}", silent=True)

    def _said(self, first: int | None = None) -> Record | None:
        """Give what another rank has said of the end of the pipeline.

        Args:
            first: A rank whose leaving needs a reason: whatever it said is one.
        """
        for rank in ([first] if first is not None else []) + list(self._others):
            status = self._others[rank].read()
            if status is not None and status.doing == Doing.LEFT:
                with suppress(ValueError, KeyError):
                    record = Record.from_json(status.words)
                    if rank == first or not record.is_farewell:
                        return record
        return None

    def _standing_still(self, waited_s: float) -> Record | None:
        """Say which rank the others wait for; None as long as one is busy, or goes on."""
        stopped, stuck, going = [], [], 0
        for rank, other in self._others.items():
            status = other.read()
            silent_s = self._awake.since(other.heard_at)
            idle_s = self._awake.since(other.idle_since(status)) if status is not None else silent_s
            if silent_s > SILENT_S or status is None:
                stopped.append((silent_s, rank))
            elif status.doing == Doing.BUSY or idle_s < self.timeout_s:
                going += 1
            elif status.doing != Doing.WAITING:
                stuck.append((idle_s, rank))
        if not stopped and going:
            return None
        if not stopped and not stuck:
            text = f"all ranks wait for each other since {self.timeout_s:g} s{self._last_actions()}"
            return Record(None, text, silent=True)
        seconds, rank = max(stopped or stuck)
        status = self._others[rank].read()
        seconds = max(seconds, waited_s)
        text = f"{_named(rank, status)} has not answered for {seconds:.0f} s (timeout={self.timeout_s:g}): "
        return Record(rank, text + self._what(rank, status, bool(stopped)) + self._last_actions(), silent=True)

    def _what(self, rank: int, status: Status | None, is_stopped: bool) -> str:
        if status is None:
            return "nothing was heard of it"
        if is_stopped:
            return "its process is stopped" if self._is_stopped(rank) else "its process does not run"
        if status.doing == Doing.OUTSIDE:
            return f"it is in no call of the pipeline; its last one was {status.call or 'materialize'}"
        return f"it is at {status.action} of {status.call}"

    def _is_stopped(self, rank: int) -> bool:
        if rank not in self._pids:
            return False
        with suppress(OSError, IndexError), open(f"/proc/{self._pids[rank]}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] in ("T", "t")
        return False

    def _last_actions(self) -> str:
        """List what each rank did last."""
        parts = []
        for rank in self._members[:_MOST_SHOWN]:
            status = self.status.read() if rank == self._own else self._others[rank].read()
            if status is not None and status.action:
                parts.append(f"rank {rank} {status.action}")
        more = len(self._members) - _MOST_SHOWN
        return f"; last actions: {', '.join(parts)}{f' and {more} more' if more > 0 else ''}" if parts else ""

    # --- to and from other machines ---

    def _tell(self) -> None:
        """Exchange statuses with ranks of other machines, in a thread of its own: the store may not answer."""
        assert self._line is not None
        store, told = self._line.store, -1
        while not self._stopped.wait(TICK_S):
            status, block = self.status.read(), self.status.block()
            is_calling = status.entered != status.finished
            if not is_calling and status.finished == told:
                continue
            with suppress(RuntimeError, ValueError):
                store.set(self._status_key(self._own), block)
                told = status.finished
                for rank, other in self._others.items() if is_calling else ():
                    if not other.is_here and store.check([self._status_key(rank)]):
                        other.tell(store.get(self._status_key(rank)))

    def _asked(self, call: Callable[[Any], Record | None]) -> Record | None:
        return self._line.ask(call) if self._line is not None else None

    def _status_key(self, rank: int) -> str:
        return f"{self._key}/status/{rank}"


def _named(rank: int, status: Status | None) -> str:
    found = _STAGE.fullmatch(status.action) if status is not None and status.doing == Doing.WORKING else None
    return f"rank {rank} (stage {found[1]})" if found else f"rank {rank}"


def _written(store: Any, key: str, record: Record) -> Record:
    first = store.compare_set(key, "", record.to_json())
    return Record.from_json(first)


def _read(store: Any, key: str) -> Record | None:
    return Record.from_json(store.get(key)) if store.check([key]) else None
