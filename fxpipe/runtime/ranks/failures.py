"""When a rank fails in the middle of a step: it leaves word why, and the others raise that instead of waiting."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch.distributed as dist

from fxpipe._torch import default_store
from fxpipe.errors import RankError
from fxpipe.runtime.ranks.groups import Groups

_LOST = ("Connection", "connection", "gloo", "NCCL", "timed out", "Timed out", "Broken pipe")


class Failures:
    """What this rank does when it, or another one, fails."""

    def __init__(self, groups: Groups, let_go: Callable[[BaseException], None], patience_s: float = 0.5) -> None:
        """Store what to do.

        Args:
            groups: Closed at a failure.
            let_go: Drops what else refers to them, or to an exchange under way, after an error.
            patience_s: How long to wait for word from a rank whose connection was lost.
        """
        self._groups = groups
        self._let_go = let_go
        self._patience_s = patience_s
        self._key = f"fxpipe/failure/{groups.everyone.group_name}"
        self._cause: str | None = None

    @contextmanager
    def watch(self, failed_stage: Callable[[], int | None] = lambda: None) -> Iterator[None]:
        """Guard communication.

        Args:
            failed_stage: Gives the stage whose own work failed, None where none did.

        Raises:
            RankError: Another rank failed, now or before. An error of this rank's own passes as it is.
        """
        if self._cause is not None:
            raise RankError(f"the pipeline ended earlier: {self._cause}\n  start the script again")
        try:
            yield
        except (Exception, KeyboardInterrupt, SystemExit) as error:
            stage = failed_stage()
            raised = self._fail(error, stage)
            if raised is error:
                raise
            raise raised from error

    def _fail(self, error: BaseException, stage: int | None) -> BaseException:
        rank = self._groups.ranks[self._groups.position]
        lost = stage is None and (isinstance(error, dist.DistError) or any(word in str(error) for word in _LOST))
        record = self._read(self._patience_s if lost else 0.0)
        if record is None and lost:
            record = {"text": f"rank {rank} lost the connection to another rank, which left no word"}
            self._write(record)
        elif record is None:
            where = f"rank {rank}" if stage is None else f"rank {rank} (stage {stage})"
            record = {"rank": rank, "text": f"{where} failed: {type(error).__name__}: {error}"}
            self._write(record)
        self._cause = self._groups.cause = str(record["text"])
        # Whoever waits for this rank learns of it by its closed connection, and reads the record.
        self._let_go(error)
        self._groups.close()
        self._leave_together()
        if record.get("rank") == rank:
            return error
        return RankError(f"{self._cause}\n  see the output of that rank, then start the script again")

    def _write(self, record: dict[str, object]) -> None:
        with suppress(RuntimeError, ValueError):  # the rank that keeps the store may be gone as well
            default_store().compare_set(self._key, "", json.dumps(record))

    def _read(self, patience_s: float) -> dict[str, object] | None:
        """Read the record, waiting for it a while."""
        with suppress(RuntimeError, ValueError):
            if _wait(lambda: default_store().check([self._key]), patience_s):
                found: dict[str, object] = json.loads(default_store().get(self._key))
                return found
        return None

    def _leave_together(self) -> None:
        """Say that the record was read; the first rank, which may keep the store, waits for the others."""
        key = f"{self._key}/read"
        with suppress(RuntimeError, ValueError):
            default_store().add(key, 1)
            if self._groups.ranks[self._groups.position] == self._groups.members[0]:
                _wait(lambda: default_store().add(key, 0) >= len(self._groups.members), self._patience_s)


def _wait(condition: Callable[[], bool], patience_s: float) -> bool:
    end = time.monotonic() + patience_s
    while not condition():
        if time.monotonic() >= end:
            return False
        time.sleep(0.01)
    return True
