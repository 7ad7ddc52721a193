"""What stops a recording: something in the user's code that cannot be written down, and where it is."""

from __future__ import annotations

import builtins
import dis
import sys
import threading
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any


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


class Untold(BaseException):
    """A number cannot be told as a function of the inputs' sizes; the text says why.

    Not an ``Exception``: the user's own ``except Exception`` must not turn it into another path through the model.
    """


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


# --- the kind of a number -------------------------------------------------------------------------------------------

_type, _isinstance = type, isinstance


def asked_by_user(depth: int = 2) -> bool:
    """Whether what calls the caller is neither torch's code nor ours, which know symbols."""
    return str(sys._getframe(depth).f_globals.get("__name__", "")).partition(".")[0] not in ("torch", "sympy", "fxpipe")


@contextmanager
def numbers_by_type(stands_for: Mapping[type, Any]) -> Iterator[None]:
    """Let symbols be what they stand for where the user's code asks by ``isinstance``, and refuse ``type``.

    Both answer without a word to the symbol, so nothing else sees the question.

    Args:
        stands_for: A number for each class of symbols.
    """

    recording = threading.get_ident()  # builtins are every thread's

    def is_asked(value: Any) -> bool:
        return _type(value) in stands_for and threading.get_ident() == recording and asked_by_user(3)

    def asks(value: Any, kinds: Any) -> bool:
        return _isinstance(stands_for[_type(value)] if is_asked(value) else value, kinds)

    class Asking(type):
        """What stands for ``type``; a class of classes that is made meanwhile inherits from it, and is itself."""

        def __call__(cls, *args: Any, **kwargs: Any) -> Any:
            if cls is not stand_in:
                return _type.__call__(cls, *args, **kwargs)
            if len(args) == 1 and is_asked(args[0]):
                raise Untold("Python asks for the type of a size")
            return _type(*args, **kwargs)

        def __instancecheck__(cls, instance: Any) -> bool:
            return _type.__instancecheck__(_type if cls is stand_in else cls, instance)

        def __subclasscheck__(cls, subclass: Any) -> bool:
            return _type.__subclasscheck__(_type if cls is stand_in else cls, subclass)

        def __eq__(cls, other: object) -> bool:
            return other is cls or (cls is stand_in and other is _type)

        def __hash__(cls) -> int:
            return hash(_type) if cls is stand_in else _type.__hash__(cls)

    stand_in: Any = Asking("type", (type,), {})
    try:
        vars(builtins).update(isinstance=asks, type=stand_in)
        yield
    finally:
        vars(builtins).update(isinstance=_isinstance, type=_type)
