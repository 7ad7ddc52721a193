"""When a rank fails while ranks work together: it leaves word why, and the others raise that instead of waiting.

One guard goes around every call in which ranks meet. Whether an error is this rank's own, or the end of a connection to
a rank that failed, is told by the state of the connections and by what the ranks have said, never by its words.
"""

from __future__ import annotations

import atexit
import sys
import threading
import traceback
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress

from torch import nn

from fxpipe.errors import FxpipeError, RankError
from fxpipe.runtime.ranks.record import Record
from fxpipe.runtime.ranks.status import Doing
from fxpipe.runtime.ranks.watch import RankWatch

PATIENCE_S = 0.5
"""How long a rank whose exchange ended waits for the connection's state to show why."""
SHORT_PATIENCE_S = 0.05
"""Likewise, where a stage was at work: it may exchange something itself, as sharded modules do."""

END_S = 5.0
"""How long the end of a script waits for its groups to end: an exchange may be under way that nothing ends."""

LetGo = Callable[[BaseException | None], None]
_AGREED = "_fxpipe_agreed"


def mark_agreed(error: BaseException) -> None:
    """Note that all ranks raise an error together: nobody waits for anybody, and the pipeline goes on."""
    setattr(error, _AGREED, True)


class Failures:
    """What this rank does when it, or another one, fails; live, as long as its groups.

    Args:
        rank: This rank.
        watch: What it knows of the others.
        close: Ends the groups; ``Groups.close``.

    Attributes:
        cause: Why the pipeline ended; None as long as it lives.
    """

    def __init__(self, rank: int, watch: RankWatch, close: Callable[..., None]) -> None:
        self.watch = watch
        self.cause: str | None = None
        self._rank = rank
        self._close = close
        self._is_inside = False
        self._place: str | None = None  # where this rank's own work failed
        self._let_go: list[LetGo] = []
        if not _live:
            atexit.register(_leave)
        _live.add(self)

    def before_closing(self, let_go: LetGo) -> None:
        """Have something called before the groups end.

        Args:
            let_go: Drops what else refers to the groups, or to an exchange under way; gets the error of a rank that
                failed, None where the pipeline is closed.
        """
        self._let_go.append(let_go)

    def let_go(self, error: BaseException | None = None) -> None:
        """Drop what else refers to the groups."""
        while self._let_go:
            self._let_go.pop()(error)

    def check(self) -> None:
        """Refuse to go on after a failure.

        Raises:
            RankError: Says why the pipeline ended.
        """
        if self.cause is not None:
            raise RankError(f"the pipeline ended earlier: {self.cause}\n  start the script again")

    def end(self) -> None:
        """End the groups, at the end of a script."""
        self._close(aborts=False)

    def leave(self, error: BaseException | None) -> None:
        """Tell the others why this rank takes part no more: its script has failed between two calls, or has ended."""
        if self.cause is not None:
            return
        text = f"rank {self._rank} has ended its script"
        if error is not None:
            text = f"rank {self._rank} failed between two calls: {type(error).__name__}: {error}"
        self.watch.leave(Record(self._rank, text, silent=error is None, is_farewell=error is None).to_json())

    @contextmanager
    def guard(self, call: str) -> Iterator[None]:
        """Guard a call in which ranks meet; one within another does nothing.

        Args:
            call: Its name.

        Raises:
            RankError: Another rank failed, now or before. An error of this rank's own passes as it is.
        """
        self.check()
        if self._is_inside:
            yield
            return
        self._is_inside, self._place = True, None
        self.watch.status.enter(call)
        try:
            yield
        except GeneratorExit:
            raise
        except BaseException as error:
            self._is_inside = False
            self.watch.status.doing(Doing.WORKING)
            if getattr(error, _AGREED, False):
                self.watch.status.finish()
                raise
            raised = self._fail(error, call)
            if raised is error:
                raise
            raise raised from error
        self._is_inside = False
        self.watch.status.finish()

    def work(self, stage: int, kind: str, microbatch: int, module: nn.Module) -> AbstractContextManager[None]:
        """Say that a stage's own work is under way, and take note where it fails.

        Args:
            stage: Index of the stage.
            kind: As torch's schedules name it: ``F``, ``B``, ``I``, ``W``.
            microbatch: Its index; below 0 for what belongs to none.
            module: The stage.
        """
        return _Work(self, stage, kind, microbatch, module)

    def failed_at(self, place: str) -> None:
        """Take note where this rank's own work failed."""
        self._place = place

    def told(self, error: BaseException) -> BaseException:
        """Give what to raise for an error of exchanges beside the pipeline's calls, in another thread.

        Returns:
            The error, or a RankError where it means that another rank failed.
        """
        record = self.watch.why(PATIENCE_S) if _may_be_lost(error) else None
        return error if record is None else RankError(f"{record.text}\n  {_way_out(record)}")

    def _fail(self, error: BaseException, call: str) -> BaseException:
        patience_s = PATIENCE_S if self._place is None else SHORT_PATIENCE_S
        record = self.watch.why(patience_s) if _may_be_lost(error) else None
        if record is None:
            where = self._place or f"in {call}"
            text = f"rank {self._rank} ({where}) failed: {type(error).__name__}: {error}"
            record = self.watch.settle(Record(self._rank, text))
        self.cause = record.text
        self.let_go(error)
        self._close()
        if record.rank == self._rank and not record.silent:
            return error
        return RankError(f"{self.cause}\n  {_way_out(record)}")


class _Work(AbstractContextManager[None]):
    """Goes around a stage's own work, twice a microbatch: a generator's would take three times as long."""

    __slots__ = ("_failures", "_kind", "_microbatch", "_module", "_stage")

    def __init__(self, failures: Failures, stage: int, kind: str, microbatch: int, module: nn.Module) -> None:
        self._failures, self._stage, self._kind = failures, stage, kind
        self._microbatch, self._module = microbatch, module

    def __enter__(self) -> None:
        number = self._microbatch if self._microbatch >= 0 else ""
        self._failures.watch.status.act(f"{self._stage}{self._kind}{number}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: types.TracebackType | None
    ) -> None:
        if error is None:
            self._failures.watch.status.doing(Doing.WAITING)
        elif not isinstance(error, GeneratorExit):
            self._failures.failed_at(named_place(error, self._stage, self._microbatch, self._module))


def named_place(error: BaseException, stage: int, microbatch: int, module: nn.Module) -> str:
    """Give the stage, microbatch and layer where an error came up; an error that is not fxpipe's gets it as a note.

    Args:
        error: What was raised.
        stage: Index of the stage.
        microbatch: Its index; below 0 for none.
        module: The stage.
    """
    part = f", microbatch {microbatch}" if microbatch >= 0 else ""
    fqn = _layer_of(error, module)
    place = f"stage {stage}{part}{f', layer {fqn}' if fqn else ''}"
    if not isinstance(error, FxpipeError):
        error.add_note(f"in {place}")
    return place


_live: weakref.WeakSet[Failures] = weakref.WeakSet()


def _leave() -> None:
    """At the end of a script: say whether an error ended it, before the connections close.

    The groups end too: a thread of theirs lets go of the last exchange's tensors a moment after that is over. Where the
    interpreter has ended by then, the thread cannot, and the process aborts whatever its script came to.
    """
    atexit.unregister(_leave)
    error = getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)
    for failures in list(_live):
        failures.leave(error)
    ending = threading.Thread(target=_end_all, name="fxpipe-end", daemon=True)
    ending.start()
    ending.join(END_S)


def _end_all() -> None:
    for failures in list(_live):
        with suppress(RuntimeError, ValueError):
            failures.end()


def _may_be_lost(error: BaseException) -> bool:
    """Tell whether an error may be that of an exchange, a RuntimeError; so are some errors of a rank's own."""
    return isinstance(error, RuntimeError) and not isinstance(error, FxpipeError)


def _layer_of(error: BaseException, stage: nn.Module) -> str:
    """Give the FQN of the innermost module of a stage that an error passed through; nothing where it met none."""
    names: dict[int, str] = {}
    found = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            names = names or {id(module): fqn for fqn, module in stage.named_modules()}
            found = names.get(id(owner), found)
    return found


def _way_out(record: Record) -> str:
    if not record.silent:
        return "see the output of that rank, then start the script again"
    if record.rank is None:
        return "see that every rank makes the same calls in the same order"
    return "see the output of that rank and its machine; materialize(timeout=) is how long a rank is waited for"
