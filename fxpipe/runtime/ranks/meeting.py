"""The time in which ranks first meet, before there are connections to watch: who is gone is told through the store."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from fxpipe.errors import FxpipeError, RankError
from fxpipe.runtime.ranks.awake import Awake
from fxpipe.runtime.ranks.connections import StoreLine
from fxpipe.runtime.ranks.place import key_of, machine, runs

TICK_S = 0.25
"""How often a rank shows that it is there, and looks whether its neighbour is."""
GRACE_S = 2.0
"""How long a rank may stay in an exchange with one that is gone: making a group would wait for it for ever."""
EXIT_CODE = 70
_meetings = itertools.count()
"""Of this process; every rank meets the others in the same order."""


class Meeting:
    """Shows that this rank is there, and watches the next one, in a thread; live, from ``start`` to ``end``.

    A rank that is gone is found by its neighbour, which tells all: nobody asks for every rank. On one machine it is its
    process that is looked at; ranks of other machines must show themselves.

    Args:
        call: In which ranks meet, by name.
        timeout: How long a rank that has come may not show itself.
    """

    def __init__(self, call: str, timeout: timedelta) -> None:
        self._call, self._timeout, self._timeout_s = call, timeout, timeout.total_seconds()
        self._key = key_of(f"meeting/{next(_meetings)}")
        self._cause: str | None = None
        self._decided, self._over = threading.Event(), threading.Event()
        self._awake = Awake(TICK_S)
        self._heard: tuple[object, float] | None = None
        self._thread: threading.Thread | None = None
        self._line: StoreLine | None = None
        self._rank, self._world = 0, 1

    def start(self) -> None:
        """Begin, once there is a default process group."""
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._line = StoreLine()
        if self._world > 1:
            self._thread = threading.Thread(
                target=self._run, args=(self._line.store,), name="fxpipe-meeting", daemon=True
            )
            self._thread.start()

    def compare(self, value: str, device: torch.device) -> list[str] | None:
        """Wait until all ranks have come, and give what each of them has; None where it is the same.

        What they have goes through the store: a group of the user's may still hold tensors of its last exchange as the
        interpreter ends, which aborts the process, and here scripts end that are wrong. A barrier holds none.

        Args:
            value: What this rank has.
            device: Where the default process group exchanges.
        """
        everyone = dist.group.WORLD
        assert self._line is not None
        assert everyone is not None
        store, own = self._line.store, value.encode()
        alike = f"{self._key}/alike/{hashlib.blake2b(own, digest_size=16).hexdigest()}"
        store.set(f"{self._key}/has/{self._rank}", own)
        store.add(alike, 1)
        options = dist.BarrierOptions()
        options.timeout = self._timeout
        options.device = torch.device("cpu") if "cpu:" in dist.get_backend_config() else device
        everyone.barrier(options).wait()
        found = None
        if store.add(alike, 0) != self._world:
            found = [bytes(store.get(f"{self._key}/has/{rank}")).decode() for rank in range(self._world)]
        everyone.barrier(options).wait()  # the rank that keeps the store may end now
        return found

    def end(self, error: BaseException | None = None) -> None:
        """End the thread; the others learn of an error that is this rank's own."""
        self._over.set()
        if self._line is None:
            return
        if self._thread is not None:
            self._thread.join(GRACE_S)
        text = f"rank {self._rank} failed in {self._call}: {type(error).__name__}: {error}"
        is_news = error is not None and not isinstance(error, FxpipeError | RuntimeError) and self._cause is None

        def leave(store: Any) -> None:
            if is_news:
                self._settle(store, text)
            store.set(f"{self._key}/{self._rank}", json.dumps({"left": True}))

        self._line.ask(leave)
        self._line.end(*(() if self._thread is None else (self._thread,)))

    def why(self) -> str | None:
        """Say which rank is gone, where that is why an exchange ended; None where nothing is known."""
        if self._thread is None or self._line is None:
            return None
        self._decided.wait(4 * TICK_S)
        if self._cause is None:
            absent = self._line.ask(
                lambda store: [rank for rank in range(self._world) if not store.check([f"{self._key}/{rank}"])]
            )
            if absent:
                return f"rank {absent[0]} ended, or left the others, before it came to {self._call}"
        return self._cause

    # --- in the thread ---

    def _run(self, store: Any) -> None:
        for beat in itertools.count():
            self._awake.tick()
            try:
                shown = {"where": [machine(), os.getpid()], "beat": beat}
                store.set(f"{self._key}/{self._rank}", json.dumps(shown))
                found = self._said(store) or self._look(store)
                if found is not None and self._cause is None:
                    self._cause = self._settle(store, found)
            except (RuntimeError, ValueError):  # the rank that keeps the store is gone
                self._cause = self._cause or "the process that keeps the store, as a rule rank 0, ended"
            if self._cause is not None:
                self._decided.set()
                if not self._over.wait(GRACE_S):
                    print(f"fxpipe: rank {self._rank} ends: {self._cause}", file=sys.stderr, flush=True)
                    os._exit(EXIT_CODE)
                return
            if self._over.wait(TICK_S):
                return

    def _settle(self, store: Any, text: str) -> str:
        return bytes(store.compare_set(f"{self._key}/cause", "", text)).decode()

    def _said(self, store: Any) -> str | None:
        key = f"{self._key}/cause"
        return bytes(store.get(key)).decode() if store.check([key]) else None

    def _look(self, store: Any) -> str | None:
        """Look at the next rank."""
        other = (self._rank + 1) % self._world
        key = f"{self._key}/{other}"
        if not store.check([key]):  # it has not come yet: whoever waits for it knows how long
            return None
        shown = json.loads(store.get(key))
        if shown.get("left"):
            return None
        if self._heard is None or self._heard[0] != shown["beat"]:
            self._heard = shown["beat"], time.monotonic()
        here, pid = shown["where"]
        if here == machine() and not runs(pid):
            return f"rank {other} ended without a word in {self._call}"
        silent_s = self._awake.since(self._heard[1])
        if silent_s > self._timeout_s:
            return f"rank {other} has not answered for {silent_s:.0f} s in {self._call} (timeout={self._timeout_s:g})"
        return None


@contextmanager
def meeting(call: str, timeout: timedelta, error: Exception | None = None) -> Iterator[Meeting]:
    """Say what it means where ranks that start to exchange something do not meet.

    Args:
        call: In which they meet, by name.
        timeout: How long a rank waits for another one.
        error: What is wrong on this rank already: passes as it is.

    Raises:
        RankError: Another rank did not come, or ended meanwhile.
    """
    met = Meeting(call, timeout)
    try:
        yield met
    except BaseException as failed:
        if failed is error or isinstance(failed, FxpipeError) or not isinstance(failed, RuntimeError):
            met.end(failed)
            raise
        cause = met.why()
        met.end(failed)
        if cause is not None:
            raise RankError(f"{cause}\n  see the output of that rank, then start the script again") from failed
        raise RankError(
            f"rank {os.environ.get('RANK', '0')} did not meet the other ranks in {call}: {failed}\n"
            f"  see their output; {call}(timeout=) is how long they are waited for"
        ) from failed
    met.end()
