"""Leave everything as it was: module attributes, random states, the search for garbage."""

from __future__ import annotations

import copy
import gc
import itertools
import random
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

_python_state, _numpy_state = random.getstate, np.random.get_state  # a recording puts others in their places
_REGISTRIES = ("_parameters", "_buffers", "_modules")


@dataclass(frozen=True, slots=True)
class AttributeChange:
    """An attribute of a module that was set anew.

    Attributes:
        fqn: The module.
        name: The attribute.
        before: Its value before; ``MISSING`` where there was none.
        now: Its value now.
        registry: ``"_buffers"``, ``"_parameters"`` or ``"_modules"`` where it is registered there.
    """

    fqn: str
    name: str
    before: Any
    now: Any
    registry: str = ""

    @property
    def path(self) -> str:
        """FQN of the module and name of the attribute."""
        return f"{self.fqn}.{self.name}" if self.fqn else self.name


MISSING = object()


class Attributes:
    """What the modules of a tree hold at one moment, to compare with and to go back to."""

    def __init__(self, root: nn.Module) -> None:
        self._saved = [(fqn, part, dict(vars(part)), _contents(part)) for fqn, part in root.named_modules()]
        self._place = {fqn: place for place, (fqn, *_) in enumerate(self._saved)}

    def changes(self, within: str = "") -> list[AttributeChange]:
        """List what changed in a module and those inside it."""
        start = f"{within}." if within else ""
        found: list[AttributeChange] = []
        for fqn, part, values, contents in itertools.islice(self._saved, self._place[within], None):
            if fqn != within and not fqn.startswith(start):
                break  # those inside come right after it
            found += _changes(fqn, part, values, contents)
        return found

    def restore(self) -> None:
        """Put everything back."""
        for _, part, values, contents in self._saved:
            own = vars(part)
            if own.keys() != values.keys() or any(own[name] is not value for name, value in values.items()):
                own.clear()
                own.update(values)
            for name, items in contents.items():
                container = own[name]
                if not _same_items(items, container):
                    container.clear()
                    container.extend(items) if isinstance(container, list) else container.update(items)


def apply_changes(root: nn.Module, changes: Iterable[AttributeChange]) -> None:
    """Set attributes as a forward has left them."""
    for change in changes:
        own = vars(root.get_submodule(change.fqn))
        (own[change.registry] if change.registry else own)[change.name] = change.now


def _changes(fqn: str, part: nn.Module, values: dict[str, Any], contents: dict[str, Any]) -> Iterator[AttributeChange]:
    for name, now in vars(part).items():
        before = values.get(name, MISSING)
        if name.startswith("_") and "_hooks" in name:
            continue  # they ran, and were recorded
        if name in _REGISTRIES:
            for key, value in now.items():
                if contents[name].get(key, MISSING) is not value:
                    yield AttributeChange(fqn, key, contents[name].get(key, MISSING), value, registry=name)
        elif before is not now and not _same(before, now):
            yield AttributeChange(fqn, name, before, copy.copy(now) if isinstance(now, list | dict | set) else now)
        elif name in contents and not _same_items(contents[name], now):
            yield AttributeChange(fqn, name, contents[name], copy.copy(now))


def _contents(part: nn.Module) -> dict[str, Any]:
    return {name: _copied(value) for name, value in vars(part).items() if isinstance(value, list | dict | set)}


def _copied(value: Any) -> Any:
    # Most are the registries and hooks of a module, and empty; those of a big model are many.
    return value.copy() if type(value) in (dict, OrderedDict, list, set) else copy.copy(value)


def _same(before: Any, now: Any) -> bool:
    plain = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
    return type(before) is type(now) and isinstance(now, plain) and before == now


def _same_items(before: Any, now: Any) -> bool:
    if len(before) != len(now):
        return False
    if isinstance(before, dict):
        return all(key in now and now[key] is value for key, value in before.items())
    if isinstance(before, set):
        return bool(before == now)
    return all(a is b for a, b in zip(before, now, strict=True))


@contextmanager
def without_collection() -> Iterator[None]:
    """Do not look for garbage in circles meanwhile.

    A recording keeps nearly all of the many objects it makes, and each look goes over those of all imported libraries:
    a fifth of the time that it takes.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextmanager
def random_states() -> Iterator[None]:
    """Give torch's, numpy's and Python's random states back as they were."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


def python_random_state() -> tuple[Any, ...]:
    """Give what changes when Python's or numpy's global generator is drawn from."""
    state, numpy_state = _python_state()[1], _numpy_state(legacy=False)["state"]
    return state[-1], state[0], numpy_state["pos"], int(numpy_state["key"][0])
