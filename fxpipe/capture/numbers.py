"""One graph for all the values that a Python number among the inputs takes, where it only enters arithmetic."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fxpipe.capture.calls.blocked import Blocked
from fxpipe.capture.capture import Capture, Captured
from fxpipe.capture.graph.structure import computation_of


def with_numbers(capture: Capture, known: Captured, **options: Any) -> Captured | None:
    """Record a forward again, with the Python numbers of its microbatch as inputs of the graph.

    The recording has to compute what the one with the numbers in it computes, and its loss has to add up in the same
    way whatever the numbers are. Where one decides a path or a shape, that decision is a guard.

    Args:
        capture: The live model.
        known: The recording with the numbers in it.
        **options: Of ``Capture.capture``.

    Returns:
        The recording; None where numbers cannot be followed, so that each value has a graph of its own.
    """
    try:
        found = capture.capture(replace(known.inputs, follows=True), **options)
        training = known.structure.is_loss
        same = computation_of(found.observation, training) == computation_of(known.observation, training)
    except Exception:  # the user's code does with a number what only a real one can do
        return None
    except Blocked:
        return None
    alike = [term.what for term in found.terms] == [term.what for term in known.terms]
    return found if same and alike and not (found.coupling or known.coupling) else None
