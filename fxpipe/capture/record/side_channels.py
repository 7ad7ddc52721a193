"""What passes between calls of whole modules beside their arguments: a stage of its own would not have it."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from fxpipe._torch import FakeTensor
from fxpipe.capture.calls.blocked import Blocked
from fxpipe.capture.calls.values import Same, describe, tensors_in
from fxpipe.capture.model.skeleton import named_tensors
from fxpipe.capture.record.recorder import Recorder


class SideChannels:
    """Watches the calls that are recorded whole.

    A module may keep a tensor (in an attribute, in a global) that another one reads later, or change an object that it
    is given. In one process that works; on stages it would silently not. ``Blocked`` is raised where it is seen.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._fqn = ""
        self._opens: tuple[str, ...] = ()
        self._own: frozenset[int] = frozenset()
        self._made: list[torch.Tensor] = []
        self._made_ids: set[int] = set()
        self._arguments: list[tuple[Any, Any]] = []

    def begin(self, module: nn.Module | None, fqn: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Note what a call may read.

        Args:
            module: What is called; None for a function, which has no tensors of its own.
            fqn: The module, or the one whose forward calls the function.
            args: Arguments of the call.
            kwargs: Keyword arguments of the call.
        """
        own = {id(tensor) for _, tensor in named_tensors(module)} if module is not None else set()
        self._own = frozenset(own.union(map(id, tensors_in(args, kwargs))))
        self._fqn, self._opens = fqn, (fqn,) if module is not None else ()
        self._made, self._made_ids = [], set()
        self._arguments = [(part, _contents(part)) for part in _changeable((args, kwargs))]

    def check(self, tensors: list[torch.Tensor]) -> None:
        """Refuse a tensor that a call reads and was neither given nor made.

        Raises:
            Blocked: Opening the module may help: then everything it reads is seen.
        """
        for tensor in tensors:
            key = id(tensor)
            if key in self._own or key in self._made_ids:
                continue
            where = self._recorder.left_by(tensor)
            if where is not None:
                what = f"it reads a tensor {describe(tensor)} that module {where} left behind"
                raise Blocked(what, self._fqn, opens=(*self._opens, where) if self._opens else ())
            if self._recorder.knows(tensor):
                what = f"it reads {self._recorder.name_of(tensor)}, which is no argument of it"
                raise Blocked(what, self._fqn, opens=self._opens)
            if tensor.requires_grad and tensor.is_leaf and not isinstance(tensor, FakeTensor):
                self._recorder.refuse_hidden(tensor, self._fqn)

    def knows(self, tensor: torch.Tensor) -> bool:
        """Tell whether the running call was given a tensor, or made it."""
        return id(tensor) in self._own or id(tensor) in self._made_ids

    def made(self, result: Any) -> None:
        """Note what a call inside made."""
        if isinstance(result, torch.Tensor):
            self._made.append(result)
            self._made_ids.add(id(result))
        elif isinstance(result, tuple | list | Mapping):
            for tensor in tensors_in(result):
                self._made.append(tensor)
                self._made_ids.add(id(tensor))

    def stop(self) -> None:
        """Forget the running call."""
        self._own, self._made, self._made_ids, self._arguments = frozenset(), [], set(), []

    def end(self, result: Any) -> None:
        """Note what the call leaves behind beside its result.

        Raises:
            Blocked: It changed an object that it was given.
        """
        returned = set(map(id, tensors_in(result)))
        made: list[weakref.ref[torch.Tensor]]
        made = [weakref.ref(each) for each in self._made if id(each) not in returned and isinstance(each, FakeTensor)]
        arguments, self._arguments = self._arguments, []
        self.stop()
        for reference in made:
            self._recorder.leave(reference, self._fqn)
        for part, before in arguments:
            if _contents(part) != before:
                kind = type(part).__qualname__
                raise Blocked(f"it changes the {kind} that it is given", self._fqn, opens=self._opens)


def _changeable(value: Any, depth: int = 4) -> Iterator[Any]:
    """Yield the containers and objects among arguments that a call could change."""
    if depth == 0 or value is None or isinstance(value, torch.Tensor | nn.Module | type | str | int | float):
        return
    if isinstance(value, tuple):
        parts: Any = value
    elif isinstance(value, list | set):
        yield value
        parts = value
    elif isinstance(value, Mapping):
        yield value
        parts = value.values()
    elif hasattr(value, "__dict__") and not callable(value):
        yield value
        parts = vars(value).values()
    else:
        return
    for part in list(parts):
        yield from _changeable(part, depth - 1)


def _contents(value: Any) -> Any:
    """Give what a container or object holds, by identity; the parts are kept, so that identities stay theirs."""
    if isinstance(value, Mapping):
        return [(key, _held(item)) for key, item in value.items()]
    if isinstance(value, list | set):
        return [_held(item) for item in value]
    return [(key, _held(item)) for key, item in vars(value).items()]


def _held(item: Any) -> Any:
    """Give what is equal for the same object, and for an equal number or text."""
    return (type(item), item) if isinstance(item, int | float | str | bytes) else Same(item)
