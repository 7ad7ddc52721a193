"""Leave everything as it was: module attributes, random states, default device."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

_REGISTRIES = ("_parameters", "_buffers", "_modules")


@dataclass(frozen=True, slots=True)
class Change:
    """An attribute that a module's forward set anew.

    Attributes:
        fqn: The module.
        name: The attribute.
        before: Its value before; ``MISSING`` where there was none.
        now: Its value now.
        buffer: Whether it is a registered buffer.
    """

    fqn: str
    name: str
    before: Any
    now: Any
    buffer: bool = False


MISSING = object()


class Attributes:
    """What the modules of a tree hold at one moment, to compare with and to go back to."""

    def __init__(self, root: nn.Module) -> None:
        self._saved = [(fqn, part, dict(vars(part)), _contents(part)) for fqn, part in root.named_modules()]

    def changes(self, fqns: frozenset[str]) -> list[Change]:
        """List what changed in the modules named."""
        found: list[Change] = []
        for fqn, part, values, contents in self._saved:
            if fqn not in fqns:
                continue
            for name, now in vars(part).items():
                before = values.get(name, MISSING)
                if name.startswith("_") and "_hooks" in name:
                    continue  # they ran, and were recorded
                if name in _REGISTRIES:
                    found += _registry_changes(fqn, name, contents[name], now)
                elif before is not now and not _same(before, now):
                    found.append(Change(fqn, name, before, now))
                elif name in contents and not _same_items(contents[name], now):
                    found.append(Change(fqn, name, contents[name], now))
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


def _contents(part: nn.Module) -> dict[str, Any]:
    return {name: copy.copy(value) for name, value in vars(part).items() if isinstance(value, list | dict | set)}


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


def _registry_changes(fqn: str, registry: str, before: dict[str, Any], now: dict[str, Any]) -> Iterator[Change]:
    for name, value in now.items():
        if before.get(name, MISSING) is not value:
            yield Change(fqn, name, before.get(name, MISSING), value, buffer=registry == "_buffers")


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
    """Give what changes when Python's or numpy's generator is drawn from."""
    numpy_state = np.random.get_state(legacy=False)
    return (
        random.getstate()[1][-1],
        random.getstate()[1][0],
        numpy_state["state"]["pos"],
        numpy_state["state"]["key"][0],
    )
