"""Tensors of several ranks brought to one, a tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist

from fxpipe.ir.tensor import dtype_bytes
from fxpipe.runtime.ranks.groups import Groups
from fxpipe.runtime.weights.disk.files import StoredTensor, stored


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
