"""What stops a recording: something in the user's code that cannot be written down, and where it is."""

from __future__ import annotations

import sys
import types
from collections.abc import Sequence


class Blocked(BaseException):
    """The forward does something here that cannot be recorded.

    Not an ``Exception``: the user's own ``except Exception`` must not turn it into another path through the model.

    Args:
        reason: What it is, as a clause.
        fqn: The module it happens in.
        opens: Modules, recorded as one call, to be opened; empty where one that is opened should be closed.
        way_out: What the user can do about it, where neither helps.
    """

    def __init__(self, reason: str, fqn: str, *, opens: Sequence[str] = (), way_out: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.fqn = fqn
        self.opens = tuple(opens)
        self.way_out = way_out
        self.where = ""


def user_line() -> str:
    """Give file and line of the user's code that is running: the innermost frame outside of torch and fxpipe."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.split(".")[0] not in ("torch", "fxpipe", "contextlib", "functools"):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back
    return ""
