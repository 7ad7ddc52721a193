"""The state dictionary: this rank's tensors under all of the model's names, the whole model's, and loading one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fxpipe.errors import WeightsError
from fxpipe.ir.tensor import TensorMeta
from fxpipe.program import BoundaryTensor
from fxpipe.runtime.build.boundary import message_layout, pack, receive_buffers
from fxpipe.runtime.build.extra_state import (
    extra_modules,
    full_extra_states,
    load_extra_states,
    missing_extra_states,
    own_extra_states,
)
from fxpipe.runtime.build.stage import StageModule
from fxpipe.runtime.ranks.agreement import agree
from fxpipe.runtime.ranks.groups import Groups


@dataclass(frozen=True, slots=True)
class TensorNames:
    """One tensor of the model and what it is called.

    Attributes:
        fqns: All its names, the first one first.
        shape: Its shape.
        dtype: Its dtype, by torch's name without the prefix.
        persistent: Whether it is in the model's ``state_dict``.
    """

    fqns: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    persistent: bool


@dataclass(frozen=True, slots=True)
class StateNames:
    """The names of all tensors of a model, the same on every rank.

    Attributes:
        tensors: By first name, in the model's order.
        first: First name of every name.
        saved: All names in the model's ``state_dict``, in its order.
        parameters: First names of those that are parameters.
        extra: Modules of the model's copy that save more than tensors, by their key in its ``state_dict``.
    """

    tensors: Mapping[str, TensorNames]
    first: Mapping[str, str]
    saved: tuple[str, ...]
    parameters: frozenset[str] = frozenset()
    extra: Mapping[str, nn.Module] = field(default_factory=dict)

    def first_of(self, fqn: str) -> str:
        """Give the model's first name of a tensor that goes by a name in a stage, which the user may have compiled."""
        return self.first.get(fqn) or self.first.get(fqn.replace("_orig_mod.", ""), fqn)

    def named(self, held: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Give tensors, known by first name, under all names; what the model does not have comes last."""
        state = {fqn: held[self.first[fqn]] for fqn in self.saved if self.first[fqn] in held}
        state.update((fqn, tensor) for fqn, tensor in held.items() if fqn not in self.tensors)
        return state


def state_names(skeleton: nn.Module, aliases: Mapping[str, str]) -> StateNames:
    """List the tensors of a model.

    Args:
        skeleton: The model, real or fake.
        aliases: First name of every name.

    >>> names = state_names(nn.Linear(2, 3), {"weight": "weight", "bias": "bias"})
    >>> names.tensors["weight"].shape
    (3, 2)
    """
    fqns: dict[str, list[str]] = {}
    saved: list[str] = []
    metas: dict[str, tuple[tuple[int, ...], str]] = {}
    for prefix, module in skeleton.named_modules(remove_duplicate=False):
        start = f"{prefix}." if prefix else ""
        own = module.named_parameters(recurse=False, remove_duplicate=False)
        for name, tensor in (*own, *module.named_buffers(recurse=False, remove_duplicate=False)):
            fqn = start + name
            first = aliases.get(fqn, fqn)
            fqns.setdefault(first, []).append(fqn)
            metas.setdefault(first, (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")))
            if name not in module._non_persistent_buffers_set:
                saved.append(fqn)
    kept = {aliases.get(fqn, fqn) for fqn in saved}
    tensors = {first: TensorNames(tuple(names), *metas[first], first in kept) for first, names in fqns.items()}
    firsts = {fqn: first for first, names in fqns.items() for fqn in names}
    parameters = frozenset(firsts[fqn] for fqn, _ in skeleton.named_parameters(remove_duplicate=False))
    return StateNames(tensors, firsts, tuple(saved), parameters, extra_modules(skeleton))


def own_state(names: StateNames, stages: Sequence[StageModule]) -> dict[str, Any]:
    """Give this rank's tensors under all of the model's names; they share memory with the stages.

    What was added to a stage after it was made (an adapter's weights) goes by its own name.
    """
    tensors = names.named({fqn: tensor.detach() for fqn, tensor in held_tensors(names, stages).items()})
    return {**tensors, **own_extra_states(names.extra, stages)}


def full_state(names: StateNames, stages: Sequence[StageModule], groups: Groups | None) -> dict[str, Any]:
    """Gather the whole model's tensors, one at a time, on the first rank of all.

    Args:
        names: The model's names.
        stages: This rank's stages.
        groups: The pipeline's groups; None where one process holds it all.

    Returns:
        Copies on the CPU under all names, on the first rank of the first replica; nothing on others.
    """
    gathered = gather_tensors(names, stages, groups, saved_only=True)
    is_first = groups is None or groups.ranks[groups.position] == groups.members[0]
    extra = full_extra_states(names.extra, stages, groups)
    return {**names.named(gathered), **extra} if is_first else {}


def gather_tensors(
    names: StateNames, stages: Sequence[StageModule], groups: Groups | None, *, saved_only: bool = False
) -> dict[str, torch.Tensor]:
    """Gather the model's tensors as ``full_state`` does, those too that no state dictionary has.

    Args:
        names: The model's names.
        stages: This rank's stages.
        groups: The pipeline's groups; None where one process holds it all.
        saved_only: Whether to leave out what no state dictionary has.

    Returns:
        Copies on the CPU by first name, on the first rank; nothing on others.
    """
    held = {
        fqn: tensor
        for fqn, tensor in held_tensors(names, stages).items()
        if not saved_only or fqn not in names.tensors or names.tensors[fqn].persistent
    }
    gathered: dict[str, torch.Tensor] = {}
    for first, holder, meta in _holders(held, groups):
        tensor = _moved(held.get(first), holder, meta, groups)
        if tensor is not None:
            gathered[first] = tensor
    return gathered


def load_state(
    names: StateNames, stages: Sequence[StageModule], groups: Groups | None, state: Mapping[str, Any]
) -> None:
    """Copy tensors in on every rank, or on none; see ``match_state``.

    Raises:
        WeightsError: On every rank alike; nothing was changed then.
    """
    matched: Sequence[tuple[torch.Tensor, torch.Tensor]] = ()
    error: Exception | None = None
    try:
        matched = match_state(names, stages, state)
    except Exception as found:
        error = found
    agree(groups, error, "the state dictionary")
    write_state(matched)
    even_copies(names, stages)
    load_extra_states(names.extra, stages, state)


def match_state(
    names: StateNames, stages: Sequence[StageModule], state: Mapping[str, Any]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Find what of a state dictionary goes where on this rank; nothing is written.

    Args:
        names: The model's names.
        stages: This rank's stages.
        state: All of the model's tensors, or this rank's; non-persistent buffers may be among them.

    Returns:
        Pairs of the stage's tensor and its new value.

    Raises:
        WeightsError: Lists all faults: names the model does not have, tensors of this rank left out, wrong shapes,
            values that are no tensors, and tied names with different values.
    """
    if not isinstance(state, Mapping):
        raise WeightsError(f"the state is a {type(state).__name__}\n  pass a dictionary of tensors by name")
    held = held_tensors(names, stages)
    faults = []
    found: dict[str, tuple[str, torch.Tensor]] = {}
    for fqn, value in state.items():
        if fqn in names.extra:
            continue
        first = names.first.get(fqn, fqn)
        if first not in names.tensors and first not in held:
            faults.append(f"unknown {fqn}")
        elif not isinstance(value, torch.Tensor):
            faults.append(f"{fqn} is a {type(value).__name__}, not a tensor")
        elif value.is_meta and first in held:
            faults.append(f"{fqn} has no values (it is on the meta device)")
        elif (shape := _shape(first, names, held)) is not None and tuple(value.shape) != shape:
            faults.append(f"{fqn} has shape {list(value.shape)}, the model's has {list(shape)}")
        elif first in found and not _same(found[first][1], value):
            faults.append(f"{fqn} and {found[first][0]} are tied but differ")
        else:
            found.setdefault(first, (fqn, value))
    for first, tensor in held.items():
        known = names.tensors.get(first)
        if first not in found and (known is None or known.persistent) and not _named(first, names, state):
            faults.append(f"missing {first} {list(tensor.shape)}")
    faults += [f"missing {key}" for key in missing_extra_states(names.extra, stages, state)]
    if faults:
        raise WeightsError(
            f"the state dictionary does not fit: {'; '.join(faults)}\n"
            "  pass the state of this model, whole or of this rank's stages; nothing was changed"
        )
    return [(held[first], value) for first, (_, value) in found.items() if first in held]


def write_state(matched: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Copy the new values in."""
    with torch.no_grad():
        for target, value in matched:
            if hasattr(target, "device_mesh"):
                value = _distributed_like(target, value)
            target.copy_(value)


def held_copies(names: StateNames, stages: Sequence[StageModule]) -> list[tuple[str, torch.Tensor]]:
    """Give what this rank holds once more, by first name: FSDP2 makes a shard in every stage of a tie."""
    held = held_tensors(names, stages)
    found: dict[int, tuple[str, torch.Tensor]] = {}
    for stage in stages:
        for fqn, tensor in stage.named_parameters(remove_duplicate=False):
            first = names.first_of(fqn)
            if first in held and held[first] is not tensor:
                found[id(tensor)] = first, tensor
    return list(found.values())


def even_copies(names: StateNames, stages: Sequence[StageModule]) -> None:
    """Give each copy the values that have come into the first."""
    held = held_tensors(names, stages)
    write_state([(copy, held[first].detach()) for first, copy in held_copies(names, stages)])


def held_tensors(names: StateNames, stages: Sequence[StageModule]) -> dict[str, torch.Tensor]:
    """Give this rank's tensors by first name; what the model does not have by its own name, if it is saved at all."""
    held: dict[str, torch.Tensor] = {}
    for stage in stages:
        kept = set(stage.state_dict(keep_vars=True))
        named = (
            *stage.named_parameters(remove_duplicate=False),
            *stage.named_buffers(remove_duplicate=False),
        )
        for fqn, tensor in named:
            first = names.first_of(fqn)
            if first in names.tensors or fqn in kept:
                held.setdefault(first, tensor)
    return held


def _holders(
    held: Mapping[str, torch.Tensor], groups: Groups | None
) -> Iterator[tuple[str, int, tuple[tuple[int, ...], str]]]:
    """Yield every tensor of the pipeline with the first position that holds it, its shape and dtype."""
    own = {first: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for first, t in held.items()}
    everywhere: list[dict[str, tuple[tuple[int, ...], str]]] = [own]
    if groups is not None:
        everywhere = groups.gather_along(own)
    seen: set[str] = set()
    for position, there in enumerate(everywhere):
        for first, meta in there.items():
            if first not in seen:
                seen.add(first)
                yield first, position, meta


def _moved(
    tensor: torch.Tensor | None, holder: int, meta: tuple[tuple[int, ...], str], groups: Groups | None
) -> torch.Tensor | None:
    """Bring one tensor to the CPU of the first rank; None on the others."""
    position = groups.position if groups else 0
    if position not in (0, holder):
        return None
    layout = message_layout((BoundaryTensor("", TensorMeta(*meta)),))
    whole: torch.Tensor | None = None
    if position == holder and tensor is not None:
        whole = tensor.detach()
        if hasattr(whole, "full_tensor"):
            whole = whole.full_tensor()
    if position != holder and groups is not None:
        messages, (whole,) = receive_buffers(layout, _device(groups))
        with groups.waiting():
            for message in messages:
                dist.recv(message, group=groups.pipeline, group_src=holder)
    elif holder != 0 and whole is not None and groups is not None:
        with groups.waiting():
            for message in pack(layout, (whole.contiguous(),)):
                dist.send(message, group=groups.pipeline, group_dst=0)
        return None
    return None if whole is None else whole.to("cpu", copy=True)


def _device(groups: Groups) -> torch.device:
    on_cpu = groups.control is groups.pipeline
    return torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())


def _shape(first: str, names: StateNames, held: Mapping[str, torch.Tensor]) -> tuple[int, ...] | None:
    """Give the shape a value must have: of the tensor there is; None for a buffer elsewhere, which may have grown."""
    if first in held:
        return tuple(held[first].shape)
    return names.tensors[first].shape if first in names.parameters else None


def _named(first: str, names: StateNames, state: Mapping[str, Any]) -> bool:
    """Tell whether the state has a tensor by any of its names; if so, what is wrong with it is said already."""
    known = names.tensors.get(first)
    return any(fqn in state for fqn in (known.fqns if known else (first,)))


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one is other or (one.data_ptr() == other.data_ptr() and one.stride() == other.stride()):
        return True
    return torch.equal(one.detach().cpu(), other.detach().cpu())


def _distributed_like(target: Any, value: torch.Tensor) -> torch.Tensor:
    from torch.distributed.tensor import distribute_tensor

    if hasattr(value, "device_mesh"):
        return value
    return distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
