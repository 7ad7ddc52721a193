"""Equal modules called alike do alike: a model of a hundred equal blocks runs one of them while it is captured."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from fxpipe._torch import FakeTensor
from fxpipe.capture.calls.alike import Reads
from fxpipe.capture.calls.values import Reach, storage_of
from fxpipe.ir.tree import map_tree, tree_leaves


@dataclass(frozen=True, slots=True, eq=False)
class Repeat:
    """What a call gave.

    Attributes:
        result: A copy of what it returned, of which each further call gets one: the model may write into its own.
        trace: What it did below Python.
        attention: Forms of the attention calls inside.
        reach: To which of the tensors that it was given the gradients of its result go.
    """

    result: Any
    trace: tuple[Any, ...]
    attention: tuple[str, ...]
    reach: Reach

    def again(self) -> Any:
        """Give the result of an equal call: other tensors, alike in everything that is known of them."""
        return _copied(self.result)


@dataclass(slots=True, eq=False)
class _Seen:
    """A call that was made, what it read, and whether another one alike was found to do the same."""

    reads: Reads
    repeat: Repeat
    is_confirmed: bool = False


class Repeats:
    """The calls of whole modules that were seen in one forward and left nothing behind but their results."""

    def __init__(self) -> None:
        self._seen: dict[Any, list[_Seen]] = {}

    def find(self, key: Any, module: nn.Module) -> Repeat | None:
        """Give what an equal call gave, if there were two.

        Args:
            key: ``structure_of`` the call.
            module: What is called.
        """
        for seen in self._seen.get(key, ()) if key is not None else ():
            if seen.is_confirmed and seen.reads.hold_in(module):
                return seen.repeat
        return None

    def add(self, key: Any, module: nn.Module, reads: Reads, given: Any, repeat: Repeat) -> None:
        """Remember a call that drew, read, wrote and kept nothing, unless its result shares memory or is unusual.

        Two calls have to do the same before a third is spared: what the first left in some global, the second would
        find.

        Args:
            key: ``structure_of`` the call, from before it.
            module: What was called.
            reads: What attributes it read.
            given: Every tensor it could reach.
            repeat: What it gave.
        """
        tensors = [leaf for _, leaf in tree_leaves(repeat.result) if not isinstance(leaf, int | float | str | None)]
        if reads.is_all or not all(isinstance(leaf, torch.Tensor) and _can_be_copied(leaf) for leaf in tensors):
            return
        storages = [storage_of(tensor) for tensor in tensors]
        taken = {storage_of(tensor) for tensor in given}
        if len(set(storages)) < len(storages) or not taken.isdisjoint(storages):
            return
        for seen in self._seen.get(key, ()):
            if seen.reads.hold_in(module):
                same = (seen.repeat.trace, seen.repeat.reach) == (repeat.trace, repeat.reach)
                seen.is_confirmed = seen.is_confirmed or same
                return
        self._seen.setdefault(key, []).append(_Seen(reads, replace(repeat, result=_copied(repeat.result))))


def _can_be_copied(tensor: torch.Tensor) -> bool:
    if type(tensor) is not FakeTensor or tensor.layout != torch.strided or tensor.storage_offset():
        return False
    unusual = tensor.is_conj() or tensor.is_neg() or tensor.is_inference() or (tensor.requires_grad and tensor.is_leaf)
    return not unusual and _alike(tensor).stride() == tensor.stride()


def _copied(result: Any) -> Any:
    return map_tree(lambda _, leaf: _alike(leaf) if isinstance(leaf, torch.Tensor) else leaf, result)


def _alike(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.requires_grad:  # a leaf could not be written into
        return tensor.clone()
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
