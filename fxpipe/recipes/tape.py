"""What was done to memory while a constructor ran, in order, and which part of that a few tensors need.

Memory is followed by storage: tensors that are views of one storage are filled by what is done to any of them.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fxpipe.recipes.streams import Position


@dataclass(frozen=True, slots=True)
class Region:
    """Where a tensor lies.

    Attributes:
        storage: Number of its storage.
        dtype: Of its elements.
        shape: Its sizes.
        stride: Its strides, in elements.
        offset: Its first element.
        conjugate: Whether it reads the complex conjugate of what lies there.
        negative: Whether it reads the negative.
    """

    storage: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    conjugate: bool = False
    negative: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Operation:
    """One thing that was done.

    Attributes:
        function: What was called; the call's results do not depend on anything else.
        args: Its positional arguments, regions in the place of tensors.
        kwargs: Its keyword arguments, likewise; generators are left out.
        outputs: The new tensors among what it returns: the position there, and the region.
        reads: Storages it may read.
        writes: Storages it changes or makes.
        replaces: Those of them, not read, of which nothing stays that was there before.
        position: Where its generator stood; None if it draws nothing.
        device: Where it draws.
        default_dtype: ``torch.get_default_dtype()`` at the time.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: tuple[tuple[int, Region], ...]
    reads: frozenset[int]
    writes: frozenset[int]
    replaces: frozenset[int]
    position: Position | None
    device: torch.device
    default_dtype: torch.dtype


@dataclass(frozen=True, slots=True, eq=False)
class Constant:
    """Bytes that came from outside: what a storage holds from here on.

    Attributes:
        storage: Its number.
        value: The bytes, as a tensor of ``uint8``.
    """

    storage: int
    value: torch.Tensor

    @property
    def writes(self) -> frozenset[int]:
        """The storage."""
        return frozenset((self.storage,))

    replaces = writes

    @property
    def reads(self) -> frozenset[int]:
        """Nothing."""
        return frozenset()


Entry = Operation | Constant


@dataclass(slots=True, eq=False)
class Tape:
    """All that was recorded.

    Attributes:
        entries: What was done, in order.
        writers: For each storage, the places of the entries that wrote it.
    """

    entries: list[Entry] = field(default_factory=list)
    writers: dict[int, list[int]] = field(default_factory=dict)

    def append(self, entry: Entry) -> None:
        """Write down one thing more."""
        for storage in entry.writes:
            self.writers.setdefault(storage, []).append(len(self.entries))
        self.entries.append(entry)

    def needed(self, storage: int) -> tuple[list[int], bool]:
        """Find what gives a storage its contents.

        Returns:
            The places of the entries, ascending, and whether any of it may depend on memory that nothing had filled.
        """
        found: set[int] = set()
        seen: set[tuple[int, int]] = set()
        is_open = False
        todo = [(storage, len(self.entries))]
        while todo:
            wanted, end = todo.pop()
            for place in self._before(wanted, end):
                if (place, wanted) in seen:
                    break  # what lies before it was followed from there
                seen.add((place, wanted))
                entry = self.entries[place]
                if place not in found:
                    found.add(place)
                    todo += [(other, place) for other in (entry.reads | entry.writes) - entry.replaces]
                if wanted in entry.replaces:
                    break
            else:
                is_open = True
        return sorted(found), is_open

    def _before(self, storage: int, end: int) -> Iterator[int]:
        """Yield the writers of a storage before a place, last first."""
        places = self.writers.get(storage, [])
        return reversed(places[: bisect.bisect_left(places, end)])


def components(needs: Mapping[int, Sequence[int]]) -> list[tuple[list[int], list[int]]]:
    """Sort storages into groups that need nothing of each other's entries.

    Args:
        needs: The entries that each storage needs.

    Returns:
        For each group its storages and the places of its entries, ascending; groups in the order of their first
        entries.
    """
    parent: dict[int, int] = {storage: storage for storage in needs}

    def root(storage: int) -> int:
        while parent[storage] != storage:
            parent[storage] = parent[parent[storage]]
            storage = parent[storage]
        return storage

    owner: dict[int, int] = {}
    for storage, places in needs.items():
        for place in places:
            parent[root(storage)] = root(owner.setdefault(place, storage))
    groups: dict[int, tuple[list[int], set[int]]] = {}
    for storage, places in needs.items():
        members, entries = groups.setdefault(root(storage), ([], set()))
        members.append(storage)
        entries.update(places)
    return sorted(
        ((members, sorted(entries)) for members, entries in groups.values()), key=lambda group: group[1] or [-1]
    )


def map_tensors(value: Any, function: Callable[[Any], Any], kinds: type | tuple[type, ...] = torch.Tensor) -> Any:
    """Replace the tensors in the arguments or results of an operation, which nest at most in lists and tuples."""
    if isinstance(value, kinds):
        return function(value)
    if isinstance(value, list | tuple):
        items = [map_tensors(item, function, kinds) for item in value]
        return items if isinstance(value, list) else tuple(items) if type(value) is tuple else _named(value, items)
    if isinstance(value, dict):
        return {key: map_tensors(item, function, kinds) for key, item in value.items()}
    return value


def _named(value: Any, items: list[Any]) -> Any:
    """Make a tuple of a type with named fields; torch's own take one sequence."""
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)


def leaves(value: Any, kinds: type | tuple[type, ...] = torch.Tensor) -> list[Any]:
    """List the tensors in the arguments or results of an operation."""
    found: list[Any] = []
    _gather(value, kinds, found)
    return found


def _gather(value: Any, kinds: type | tuple[type, ...], found: list[Any]) -> None:
    if isinstance(value, kinds):
        found.append(value)
    elif isinstance(value, list | tuple):
        for item in value:
            _gather(item, kinds, found)
    elif isinstance(value, dict):
        for item in value.values():
            _gather(item, kinds, found)


def last_uses(entries: Iterable[tuple[int, Entry]]) -> dict[int, int]:
    """Give for each storage the place of the last entry that touches it."""
    return {storage: place for place, entry in entries for storage in (*entry.reads, *entry.writes)}
