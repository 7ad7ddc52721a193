"""What is said of a forward that fails while it is recorded."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fxpipe.batch.inputs import Inputs
from fxpipe.capture.places import place_of
from fxpipe.errors import CaptureError


def failed_forward(name: str, forward: Callable[..., Any], inputs: Inputs, error: Exception) -> CaptureError:
    """Give what to raise: the call's arguments are named where they do not fit, else the user's line.

    Args:
        name: What messages call the model.
        forward: Its forward.
        inputs: What it was run with.
        error: What it raised.
    """
    takes = _unfit(forward, inputs.args, inputs.kwargs) if isinstance(error, TypeError) else ""
    if takes:
        return CaptureError(f"the forward of {name} cannot be called so: {error}\n  {takes}")
    return CaptureError(
        f"the forward of {name} failed: {type(error).__name__}: {error}{place_of(error)}\n"
        f"  it was run with {', '.join(inputs.described()) or 'no tensors'}; check the inputs"
    )


def _unfit(forward: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """Say what a forward takes, where arguments do not fit its signature; ``""`` where they do.

    >>> _unfit(lambda ids, mask=None: ids, (), {"ids": 1, "maks": 2})
    'it takes ids, mask; it was given ids, maks (mask?)'
    """
    try:
        signature = inspect.signature(forward)
    except (TypeError, ValueError):
        return ""
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        names = list(signature.parameters)
        positional = names[: len(args)] + [f"args[{place}]" for place in range(len(names), len(args))]
        given = positional + [each if each in names else _with_guess(each, names) for each in kwargs]
        return f"it takes {', '.join(names) or 'nothing'}; it was given {', '.join(given) or 'nothing'}"
    return ""


def _with_guess(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, 1)
    return f"{name} ({close[0]}?)" if close else name
