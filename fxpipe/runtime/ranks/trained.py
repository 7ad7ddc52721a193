"""Whether an optimiser has changed this rank's weights since its last step: all ranks train, or none."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

from torch import nn


class Trained:
    """Looks at one parameter between two steps; live.

    A rank has no say before an optimiser has changed it once: it may train nothing, or only some of its weights.
    """

    def __init__(self) -> None:
        self._watched: weakref.ref[nn.Parameter] | None = None
        self._version = 0
        self._has_changed = False

    def after_step(self, parameters: Iterable[nn.Parameter]) -> None:
        """Take note of a parameter that has a gradient."""
        known = self._watched() if self._watched is not None else None
        if known is None or known.grad is None:
            known = next((p for p in parameters if p.grad is not None and not hasattr(p, "device_mesh")), None)
            self._watched = weakref.ref(known) if known is not None else None
            self._has_changed = False
        self._version = known._version if known is not None else 0

    def before_step(self) -> bool | None:
        """Say whether it has changed since; None for a rank that cannot say."""
        known = self._watched() if self._watched is not None else None
        if known is None:
            return None
        changed = known._version != self._version
        self._has_changed |= changed
        return changed if self._has_changed else None
