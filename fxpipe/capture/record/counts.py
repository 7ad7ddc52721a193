"""The counting of recorded calls: each distinct one is made again, alone, when the forward is over."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxpipe._torch import without_functions
from fxpipe.capture.calls.ambient import Ambient
from fxpipe.capture.calls.counting import LayerCounter, fused_attention_calls
from fxpipe.capture.calls.real_values import UNKNOWN_VALUES
from fxpipe.capture.calls.values import storage_of, tensors_in
from fxpipe.capture.calls.zero_inputs import counts_on_zeros
from fxpipe.capture.model.skeleton import Skeleton
from fxpipe.capture.record.node import info, is_setting
from fxpipe.capture.record.recorder import Storage
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


@dataclass(frozen=True, slots=True, eq=False)
class _BufferRead:
    """A differentiable call that reads buffers of the model's, to be made again."""

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    ambient: Ambient
    storages: tuple[int, ...]


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
        self._buffer_reads: list[_BufferRead] = []
        named = ((storage_of(tensor), fqn) for fqn, tensor in skeleton.module.named_buffers())
        self._buffers = {key: fqn for key, fqn in named if key is not None}

    def note_buffers(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any
    ) -> None:
        """Remember a call that reads buffers and takes a gradient: its backward may need what they hold.

        Args:
            func: What was called.
            args: Its arguments.
            kwargs: Its keyword arguments.
            result: What it gave.
        """
        if not any(tensor.requires_grad for tensor in tensors_in(result)):
            return
        own = func.buffers() if isinstance(func, nn.Module) else ()
        keys = tuple(key for each in (*tensors_in(args, kwargs), *own) if (key := storage_of(each)) in self._buffers)
        if keys:
            args, kwargs = map_tree(_kept, (args, dict(kwargs)))
            self._buffer_reads.append(_BufferRead(func, args, kwargs, Ambient.now(), keys))

    def saved_buffers(self, storages: Mapping[int, Storage]) -> tuple[str, ...]:
        """Give the buffers that some call writes to and some backward needs: the next microbatch would change them."""
        found: dict[str, None] = {}
        for read in self._buffer_reads:
            written = {key for key in read.storages if key in storages and storages[key].writers}
            if written:
                found.update((self._buffers[key], None) for key in _saved_by(read) if key in written)
        return tuple(found)

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
        with without_functions():  # no question of the model's: a size that values decide about stays unknown to it
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


def _saved_by(read: _BufferRead) -> list[int]:
    """Make a call again and give the storages of what it saves for its backward."""
    saved: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        key = storage_of(tensor)
        saved.extend(() if key is None else (key,))
        return tensor

    with read.ambient.entered(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        try:
            read.func(*read.args, **read.kwargs)
        except (*UNKNOWN_VALUES, RuntimeError):  # values that are not known, transforms that take no such hooks
            return []
    return saved


def _kept(_: str, leaf: Any) -> Any:
    return leaf
