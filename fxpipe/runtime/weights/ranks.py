"""What ranks do together about weights: all that write one checkpoint, and tensors brought to one, one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist

from fxpipe.errors import WeightsError
from fxpipe.ir.tensor import dtype_bytes
from fxpipe.runtime.ranks.agreement import agree
from fxpipe.runtime.ranks.groups import Groups
from fxpipe.runtime.weights.disk.files import StoredTensor, stored


class Everyone:
    """The ranks of all replicas of a pipeline; or one process alone.

    Args:
        groups: The pipeline's groups; None where one process holds it all.
        apart: Whether to make a group of its own, for exchanges beside those of training; every rank makes it then.
    """

    def __init__(self, groups: Groups | None, *, apart: bool = False) -> None:
        self._groups = groups.beside() if groups is not None and apart else groups
        self._owned = self._groups if apart else None

    @property
    def position(self) -> int:
        """Which of them this process is."""
        return self._groups.members.index(dist.get_rank()) if self._groups is not None else 0

    @property
    def ranks(self) -> Sequence[int]:
        """The rank of each."""
        return self._groups.members if self._groups is not None else (0,)

    def gather(self, value: Any) -> list[Any]:
        """Give every rank what each of them has."""
        return [value] if self._groups is None else self._groups.gather(value)

    def agree(self, error: Exception | None, subject: str, *parts: object) -> None:
        """Go on together, or raise the same error on every rank."""
        agree(self._groups, error, subject, *parts)

    def close(self) -> None:
        """End the group of its own."""
        if self._owned is not None:
            self._owned.close()
        self._owned = self._groups = None


def one_of_all(name: str, values: Sequence[Any], ranks: Sequence[int]) -> Any:
    """Give what all ranks have; None where there is nothing.

    Args:
        name: The argument that they gave it by.
        values: What each has, encoded.
        ranks: Their ranks.

    Raises:
        WeightsError: They differ; names two ranks and what differs first.

    >>> one_of_all("extra", [{"epoch": 1}, {"epoch": 1}], [0, 1])
    {'epoch': 1}
    >>> one_of_all("extra", [{"seen": [1, 2]}, {"seen": [1, 3]}], [0, 1])
    Traceback (most recent call last):
    fxpipe.errors.WeightsError: extra['seen'][1] differs between ranks: rank 0 has 2, rank 1 has 3
      a checkpoint keeps one for all: give the same on every rank, or gather what each has into one value
    """
    for rank, value in zip(ranks[1:], values[1:], strict=True):
        if found := _difference(values[0], value, name):
            place, one, other = found
            raise WeightsError(
                f"{place} differs between ranks: rank {ranks[0]} has {one}, rank {rank} has {other}\n"
                "  a checkpoint keeps one for all: give the same on every rank, or gather what each has into one value"
            )
    return values[0] if values else None


_ABSENT = object()


def _difference(one: Any, other: Any, place: str) -> tuple[str, str, str] | None:
    """Find the first place at which two encoded values differ, and what is there."""
    inside: list[tuple[str, Any, Any]] = []
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        inside = [(f"[{key!r}]", one.get(key, _ABSENT), other.get(key, _ABSENT)) for key in {**one, **other}]
    elif isinstance(one, list) and isinstance(other, list):
        pairs = zip_longest(one, other, fillvalue=_ABSENT)
        inside = [(f"[{index}]", mine, theirs) for index, (mine, theirs) in enumerate(pairs)]
    elif repr(one) != repr(other):  # not a number is like itself, 1 not like 1.0
        return place, _short(one), _short(other)
    return next((found for key, mine, theirs in inside if (found := _difference(mine, theirs, place + key))), None)


def _short(value: Any) -> str:
    text = "nothing" if value is _ABSENT else repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def holders(held: Mapping[str, torch.Tensor], groups: Groups | None) -> dict[str, tuple[int, StoredTensor]]:
    """Give for every tensor of the pipeline the first position that holds it, in the order of positions."""
    own = [stored(name, tensor) for name, tensor in held.items()]
    everywhere = [own]
    if groups is not None:
        everywhere = groups.gather_along(own)
    found: dict[str, tuple[int, StoredTensor]] = {}
    for position, entries in enumerate(everywhere):
        for entry in entries:
            found.setdefault(entry.name, (position, entry))
    return found


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Give a tensor on the CPU; all ranks that hold a part of a sharded one call this together."""
    full = tensor.detach()
    if hasattr(full, "full_tensor"):
        full = full.full_tensor()
    return full.to("cpu")


def brought(
    names: Sequence[str],
    held: Mapping[str, torch.Tensor],
    where: Mapping[str, tuple[int, StoredTensor]],
    groups: Groups | None,
    target: int = 0,
) -> Iterator[torch.Tensor]:
    """Yield tensors one after the other on one rank; on others nothing. Every rank runs it to its end.

    Args:
        names: Which.
        held: This rank's.
        where: What ``holders`` gave.
        groups: The pipeline's groups; None where one process holds it all.
        target: Position of the rank that gets them.
    """
    position = groups.position if groups is not None else 0
    for name in names:
        holder, entry = where[name]
        own = whole(held[name]) if name in held and (holder == position or hasattr(held[name], "device_mesh")) else None
        if holder == target:
            if position == target:
                assert own is not None
                yield own
        elif position == target:
            assert groups is not None
            data = torch.empty(_nbytes(entry), dtype=torch.uint8)
            with groups.waiting():
                dist.recv(data, group=groups.control, group_src=holder)
            yield data.view(getattr(torch, entry.dtype)).view(entry.shape)
        elif position == holder:
            assert groups is not None
            assert own is not None
            with groups.waiting():
                dist.send(own.contiguous().reshape(-1).view(torch.uint8), group=groups.control, group_dst=target)


def _nbytes(entry: StoredTensor) -> int:
    size = dtype_bytes(entry.dtype)
    for length in entry.shape:
        size *= length
    return size
