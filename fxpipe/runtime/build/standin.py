"""A copy of the model on the meta device, in which a few tensors get memory for a while."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fxpipe._torch import FakeTensor
from fxpipe.errors import MaterializeError


@dataclass(frozen=True, slots=True, eq=False)
class Slot:
    """Where a tensor hangs: ``name`` of ``module``."""

    module: nn.Module
    name: str

    def get(self) -> torch.Tensor | None:
        """Read what hangs there now; None if nothing does."""
        parts = vars(self.module)
        found: torch.Tensor | None = parts["_parameters"].get(self.name)
        return found if found is not None else parts["_buffers"].get(self.name)

    def put(self, tensor: torch.Tensor) -> None:
        """Hang another tensor there; modules that keep lists of their weights (``nn.LSTM``) hear of it."""
        setattr(self.module, self.name, tensor)


@dataclass(frozen=True, slots=True, eq=False)
class StandIn:
    """The modules that init functions see.

    Attributes:
        module: Copy of the model; every parameter and buffer is on meta but those being held.
        metas: The meta tensors by first FQN.
        slots: By first FQN, all places of a tensor; the place the FQN names comes first.
        module_fqns: First FQN of each module of the copy, by ``id``.
    """

    module: nn.Module
    metas: Mapping[str, torch.Tensor]
    slots: Mapping[str, tuple[Slot, ...]]
    module_fqns: Mapping[int, str]

    @contextlib.contextmanager
    def holding(self, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Hang real tensors in their places for a while, parameters as parameters; then they are on meta again."""
        for fqn, tensor in tensors.items():
            meta = self.metas[fqn]
            if isinstance(meta, nn.Parameter):
                held: torch.Tensor = nn.Parameter(tensor, meta.requires_grad)
            else:
                held = tensor.requires_grad_(meta.requires_grad)
            vars(held).update(vars(meta))
            for slot in self.slots[fqn]:
                slot.put(held)
        try:
            yield
        finally:
            self.clear(tensors)

    def clear(self, fqns: Iterable[str]) -> None:
        """Put tensors back on meta, whatever hangs in their places."""
        for fqn in fqns:
            for slot in self.slots[fqn]:
                if slot.get() is not self.metas[fqn]:
                    slot.put(self.metas[fqn])

    def direct(self, module_fqn: str) -> tuple[str, ...]:
        """Give the first FQNs of the tensors that hang in one module and are named after it."""
        return tuple(fqn for fqn in self.metas if fqn.rpartition(".")[0] == module_fqn)

    def held(self, fqn: str, blame: str) -> torch.Tensor:
        """Give the value of a held tensor, whether it was written in place or replaced.

        Args:
            fqn: Its first FQN.
            blame: What ran, for the message.

        Raises:
            MaterializeError: It is gone, or another kind of tensor has taken its place.
        """
        meta, tensor = self.metas[fqn], self.slots[fqn][0].get()
        if tensor is None:
            raise MaterializeError(
                f"{blame} removes {fqn}\n  what the model is made of is settled at compile: change it before"
            )
        if tensor.is_meta or (tensor.shape, tensor.dtype) != (meta.shape, meta.dtype):
            what = "a tensor of another module" if tensor.is_meta else _about(tensor)
            raise MaterializeError(
                f"{blame} replaces {fqn} {_about(meta)} by {what}\n"
                "  shapes, dtypes and ties are settled at compile: change the model before, or copy values in place"
            )
        if tensor.requires_grad != meta.requires_grad:
            raise MaterializeError(
                f"{blame} sets requires_grad of {fqn} to {tensor.requires_grad}\n"
                "  what is trained is settled at compile: freeze or unfreeze before"
            )
        return tensor.detach()


def make_stand_in(skeleton: nn.Module, originals: Mapping[str, torch.Tensor], aliases: Mapping[str, str]) -> StandIn:
    """Copy a model onto the meta device.

    Args:
        skeleton: The model with fake or meta tensors; not modified.
        originals: The user's tensors by first FQN: attributes set on them are carried over.
        aliases: First FQN of every FQN.

    Returns:
        The copy; tied tensors are tied in it.
    """
    metas: dict[str, torch.Tensor] = {}
    memo: dict[int, Any] = {}
    for prefix, part in skeleton.named_modules(remove_duplicate=False):
        for leaf, tensor in _direct_tensors(part):
            fqn = _join(prefix, leaf)
            if fqn in aliases or id(tensor) not in memo:
                first = aliases.get(fqn, fqn)
                if first not in metas:
                    metas[first] = _meta(tensor, originals.get(first))
                memo.setdefault(id(tensor), metas[first])
    for part in skeleton.modules():
        for plain in plain_fakes(part):
            memo.setdefault(id(plain), torch.empty(plain.shape, dtype=plain.dtype, device="meta"))
    module = copy.deepcopy(skeleton, memo)
    first_of = {id(meta): fqn for fqn, meta in metas.items()}
    slots: dict[str, list[Slot]] = {fqn: [] for fqn in metas}
    for prefix, part in module.named_modules(remove_duplicate=False):
        for leaf, tensor in _direct_tensors(part):
            places = slots[first_of[id(tensor)]]
            is_first = _join(prefix, leaf) == first_of[id(tensor)]
            places.insert(0 if is_first else len(places), Slot(part, leaf))
    module_fqns = {id(part): fqn for fqn, part in module.named_modules()}
    return StandIn(module, metas, {fqn: tuple(places) for fqn, places in slots.items()}, module_fqns)


def tensor_names(module: nn.Module) -> frozenset[str]:
    """Give the names of all parameters and buffers of a module and of those below it."""
    return frozenset(
        _join(prefix, leaf)
        for prefix, part in module.named_modules(remove_duplicate=False)
        for leaf, _ in _direct_tensors(part)
    )


def _direct_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters(recurse=False, remove_duplicate=False)
    yield from module.named_buffers(recurse=False, remove_duplicate=False)


def _join(prefix: str, leaf: str) -> str:
    return f"{prefix}.{leaf}" if prefix else leaf


def _meta(tensor: torch.Tensor, original: torch.Tensor | None) -> torch.Tensor:
    """Make the meta twin of a tensor: strides of a dense one are kept, and what the user noted on it."""
    strides = torch.empty_like(tensor).stride()
    meta = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device="meta")
    if isinstance(tensor, nn.Parameter):
        meta = nn.Parameter(meta, tensor.requires_grad)
    elif tensor.requires_grad:
        meta.requires_grad_()
    if original is not None and not isinstance(original, FakeTensor):
        # Functions look at notes such as ``_no_reinit``. That a tensor was initialized is no longer true of this one.
        vars(meta).update({name: note for name, note in vars(original).items() if name != "_is_hf_initialized"})
    return meta


def plain_fakes(module: nn.Module) -> Iterator[FakeTensor]:
    """Find fake tensors that are plain attributes: they have no memory that could be copied."""
    for value in vars(module).values():
        inside = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else (value,)
        yield from (item for item in inside if isinstance(item, FakeTensor))


def _about(tensor: torch.Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
