"""The counting of recorded calls: each distinct one is made again, alone, when the forward is over."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import fx

from fxpipe.capture.calls.ambient import Ambient
from fxpipe.capture.calls.counting import LayerCounter, fused_attention_calls
from fxpipe.capture.calls.real_values import UNKNOWN_VALUES
from fxpipe.capture.calls.zero_inputs import counts_on_zeros
from fxpipe.capture.model.skeleton import Skeleton
from fxpipe.capture.record.node import info, is_setting
from fxpipe.ir.tree import map_tree


@dataclass(slots=True, eq=False)
class _Uncounted:
    """A call to be counted, and the nodes of all calls that do the same."""

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    trace: Any
    attention: tuple[str, ...]
    ambient: Ambient
    nodes: list[fx.Node] = field(default_factory=list)


class Counts:
    """The calls of one forward that are still to be counted.

    Args:
        counter: Counts a call; None leaves all uncounted.
        skeleton: The copy of the model.
    """

    def __init__(self, counter: LayerCounter | None, skeleton: Skeleton) -> None:
        self.counter = counter
        self._skeleton = skeleton
        self._uncounted: dict[Any, _Uncounted] = {}

    def add(
        self,
        node: fx.Node,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        trace: Any,
        attention: tuple[str, ...],
    ) -> None:
        """Have a recorded call counted later; making it again now might leave something behind.

        Args:
            node: The call.
            func: What was called.
            args: Its arguments.
            kwargs: Its keyword arguments.
            trace: What it did below Python.
            attention: Forms of the attention calls inside.
        """
        info(node).attention = attention
        if self.counter is None or is_setting(node):
            return
        key = self.counter.key(func, args, kwargs, trace, attention)
        if key in self.counter.known:
            info(node).counts = self.counter.known[key]
            return
        if key not in self._uncounted:
            args, kwargs = map_tree(_kept, (args, dict(kwargs)))  # the model may append to a list that it passed
            self._uncounted[key] = _Uncounted(func, args, kwargs, trace, attention, Ambient.now())
        self._uncounted[key].nodes.append(node)

    def make_all(self) -> None:
        """Make every distinct call again, alone, and count what it does."""
        if self.counter is None:
            return
        for call in self._uncounted.values():
            given = call.func, call.args, call.kwargs, call.trace, call.attention
            is_attention = call.func is F.scaled_dot_product_attention  # asked before another stands in its place
            with call.ambient.entered(), fused_attention_calls(self.counter) as replacement:
                called = replacement if is_attention and replacement else call.func
                try:
                    counts = self.counter.counts(called, *given[1:])
                except UNKNOWN_VALUES:
                    counts = counts_on_zeros(self.counter, *given)
            for node in call.nodes:
                info(node).counts = counts


def _kept(_: str, leaf: Any) -> Any:
    return leaf
