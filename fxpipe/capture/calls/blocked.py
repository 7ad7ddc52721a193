"""What stops a recording: something in the user's code that cannot be written down, and where it is."""

from __future__ import annotations

import dis
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
    frame = _user_frame()
    return f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame is not None else ""


def asks_for_accelerator(name: str) -> bool:
    """Tell whether the user's own code looks at a property of a tensor that says on what kind of device it is.

    Args:
        name: The property. Of a ``"device"`` only the comparison of its type with an accelerator's or the CPU's counts:
            most code passes it on.
    """
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(_BETWEEN):
        frame = frame.f_back
    if frame.f_globals.get("__name__", "").split(".")[0] == "torch":
        return False
    code, at = frame.f_code, frame.f_lasti
    if name == "device" and (code, at) not in _ASKS:
        coming = [each for each in dis.get_instructions(code) if each.offset > at and each.opname != "CACHE"][:4]
        found = [each.argval for each in coming]
        kinds = {str(kind) for each in found for kind in (each if isinstance(each, tuple | frozenset) else (each,))}
        compared = any(each.opname in ("COMPARE_OP", "CONTAINS_OP") for each in coming)
        _ASKS[code, at] = found[:1] == ["type"] and compared and not kinds.isdisjoint(("cuda", "cpu", "xpu"))
    return name != "device" or _ASKS[code, at]


_BETWEEN = ("fxpipe", "torch.overrides", "torch.utils._device")
_ASKS: dict[tuple[types.CodeType, int], bool] = {}


def _user_frame() -> types.FrameType | None:
    frame: types.FrameType | None = sys._getframe(2)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.split(".")[0] not in ("torch", "fxpipe", "contextlib", "functools"):
            return frame
        frame = frame.f_back
    return None
