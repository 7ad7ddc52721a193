"""Objects among a model's inputs: a recording gets copies, and must leave them as they are."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from fxpipe._torch import without_functions, without_modes
from fxpipe.batch.dims import dotted
from fxpipe.capture.model.held import held_by
from fxpipe.errors import CaptureError, SpecError
from fxpipe.ir.canonical import spell


class Objects:
    """The objects that one forward is given, and what they held before."""

    def __init__(self) -> None:
        self._memo: dict[int, Any] = {}
        self._before: list[tuple[str, Any, Any]] = []

    def copied(self, path: str, leaf: Any) -> Any:
        """Give a copy of an object of the user's; anything else, and what holds modules or parameters, as it is."""
        if isinstance(leaf, torch.Tensor) or not hasattr(leaf, "__dict__") or callable(leaf):
            return leaf
        if isinstance(held_by(leaf), nn.Module | nn.Parameter):
            return leaf
        with without_functions(), without_modes():
            try:
                found = copy.deepcopy(leaf, self._memo)
                self._before.append((path, found, spell(found, path)))
            except (SpecError, Exception):  # whatever a foreign __deepcopy__ raises
                return leaf
        return found

    def check(self) -> None:
        """Refuse a forward that changes an object that it is given.

        Raises:
            CaptureError: Names it; what stages change on their own, nobody else has.
        """
        with without_functions(), without_modes():
            for path, found, before in self._before:
                if spell(found, path) != before:
                    named = f"argument {dotted(path).lstrip('.')}, a {type(found).__qualname__}"
                    raise CaptureError(
                        f"the forward changes {named} that it is given: the stages of a pipeline do not hand that on\n"
                        "  leave it out; instead of a cache, pass the whole sequence in each call, with use_cache=False"
                    )
