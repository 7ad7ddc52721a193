"""An optimiser's and a scheduler's state by FQN, so that it goes to whatever rank has the parameter later."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

from fxpipe.errors import WeightsError
from fxpipe.runtime.weights.disk.manifest import (
    OPTIMIZER,
    Entry,
    Manifest,
    OptimizerRecord,
    optimizer_key,
    parameter_of,
)
from fxpipe.runtime.weights.disk.plain import decode, encode
from fxpipe.runtime.weights.matching import shown


@dataclass(frozen=True, slots=True, eq=False)
class Owned:
    """This rank's parameters.

    Attributes:
        named: By first FQN.
        copies: What it holds once more of some of them, with equal values and state, by first FQN.
    """

    named: Mapping[str, torch.Tensor]
    copies: Sequence[tuple[str, torch.Tensor]] = ()

    @property
    def fqns(self) -> dict[int, str]:
        """First FQN of each, by ``id``."""
        return {id(parameter): fqn for fqn, parameter in (*self.copies, *self.named.items())}


@dataclass(frozen=True, slots=True, eq=False)
class OwnState:
    """What one rank's optimiser holds.

    Attributes:
        kind: Name of its class.
        tensors: State tensors, by ``optimizer_key``.
        scalars: By FQN, state that is no tensor, encoded.
        groups: Of each group its options, encoded, and the FQNs of its parameters.
    """

    kind: str
    tensors: Mapping[str, torch.Tensor]
    scalars: Mapping[str, Mapping[str, Any]]
    groups: tuple[tuple[Mapping[str, Any], tuple[str, ...]], ...]


def own_optimizer_state(optimizer: Optimizer, parameters: Owned) -> OwnState:
    """Take an optimiser's state apart.

    Args:
        optimizer: Over some of this rank's parameters.
        parameters: Of this rank.

    Raises:
        WeightsError: It holds a parameter that is not the pipeline's, or state that neither safetensors nor JSON can
            hold; names the FQN.
    """
    members = _members(optimizer, parameters)
    fqn_of = parameters.fqns
    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for parameter, state in optimizer.state.items():
        fqn = fqn_of.get(id(parameter))
        if fqn is None:
            continue
        for name, value in state.items():
            if isinstance(value, torch.Tensor):
                tensors[optimizer_key(fqn, str(name))] = value
            else:
                scalars.setdefault(fqn, {})[str(name)] = encode(value, f"the optimiser's {name} of {fqn}")
    groups = []
    for group, own in zip(optimizer.param_groups, members, strict=True):
        fqns = tuple(_present(own))
        options = {
            name: encode(value, f"the option {name} of the optimiser's group of {fqns[0] if fqns else 'no parameter'}")
            for name, value in group.items()
            if name not in ("params", "param_names")
        }
        groups.append((options, fqns))
    return OwnState(type(optimizer).__qualname__, tensors, scalars, tuple(groups))


def own_scheduler_state(scheduler: Any) -> Any:
    """Give a scheduler's state, encoded.

    Raises:
        WeightsError: It holds something that JSON cannot; names it.
    """
    return {name: encode(value, f"the scheduler's {name}") for name, value in scheduler.state_dict().items()}


def join_states(states: Sequence[tuple[str, Mapping[str, Any], Any] | None]) -> OptimizerRecord | None:
    """Put together what the ranks have, the same on every rank.

    Args:
        states: Kind, scalars and groups of each rank, as in ``OwnState``; None where a rank has no optimiser.

    Raises:
        WeightsError: Ranks have optimisers of different classes.
    """
    present = [state for state in states if state is not None]
    if not present:
        return None
    kinds = sorted({kind for kind, _, _ in present})
    if len(kinds) > 1 or len(present) < len(states):
        raise WeightsError(
            f"ranks pass different optimisers: {', '.join(kinds)}{'' if len(present) == len(states) else ' and none'}\n"
            "  make the same optimiser on every rank"
        )
    joined: dict[tuple[int, str], tuple[Mapping[str, Any], dict[str, None]]] = {}
    scalars: dict[str, Mapping[str, Any]] = {}
    of_first: list[int | None] = []
    for place, (_, own_scalars, groups) in enumerate(present):
        scalars.update(own_scalars)
        for position, (options, fqns) in enumerate(groups):
            key = (position, json.dumps(options, sort_keys=True))
            if fqns:
                joined.setdefault(key, (options, {}))[1].update(dict.fromkeys(fqns))
            if place == 0:
                of_first.append(list(joined).index(key) if fqns else None)
    return OptimizerRecord(
        kinds[0], tuple((options, tuple(fqns)) for options, fqns in joined.values()), scalars, tuple(of_first)
    )


@dataclass(frozen=True, slots=True, eq=False)
class Restored:
    """State that is ready to be read.

    Attributes:
        targets: New tensors to read into, by ``optimizer_key``.
        finish: Gives everything to the optimiser and the scheduler, once the tensors are read.
    """

    targets: Mapping[str, torch.Tensor]
    finish: Callable[[], None]


def prepare_restore(
    manifest: Manifest, optimizer: Optimizer | None, scheduler: Any, parameters: Owned
) -> Callable[[], Restored]:
    """Check that a saved state fits an optimiser and a scheduler; nothing is allocated or changed.

    Args:
        manifest: Of the checkpoint.
        optimizer: Over this rank's parameters; None: it is left alone.
        scheduler: Its scheduler; None: it is left alone.
        parameters: Of this rank.

    Returns:
        What allocates the tensors to read.

    Raises:
        WeightsError: The checkpoint has none, or that of another class, or lacks parameters of this rank.
    """
    if optimizer is None and scheduler is None:
        return lambda: Restored({}, lambda: None)
    record = manifest.optimizer
    if optimizer is not None and record is None:
        raise WeightsError("the checkpoint has no optimiser's state\n  load it without optimizer=")
    if scheduler is not None and manifest.scheduler is None:
        raise WeightsError("the checkpoint has no scheduler's state\n  load it without scheduler=")
    groups: list[tuple[dict[str, Any], list[str | None]]] = []
    if optimizer is not None and record is not None:
        groups = _matched_groups(record, optimizer, parameters)
    if scheduler is not None:
        _check_scheduler(record, getattr(scheduler, "optimizer", optimizer), parameters)

    def allocate() -> Restored:
        targets = {}
        if optimizer is not None:
            own = {fqn for _, fqns in groups for fqn in fqns if fqn is not None}
            targets = {
                key: _target(entry, parameters.named[fqn])
                for key, entry in manifest.state.items()
                if key.startswith(OPTIMIZER) and (fqn := parameter_of(key)[0]) in own
            }

        def finish() -> None:
            if optimizer is not None and record is not None:
                _give(optimizer, groups, targets, record.scalars)
            if scheduler is not None:
                _give_scheduler(scheduler, manifest.scheduler)

        return Restored(targets, finish)

    return allocate


def _members(optimizer: Optimizer, parameters: Owned) -> list[list[str | None]]:
    """Give the FQNs of each group's parameters; None for one without elements, which stands where a rank has none."""
    fqn_of = parameters.fqns
    for index, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            if id(parameter) not in fqn_of and parameter.numel():
                raise WeightsError(
                    f"group {index} of the optimiser holds a parameter {list(parameter.shape)} that is not of this "
                    "pipeline\n  make the optimiser by pipe.optimizer(...), or of pipe.parameters() after materialize"
                )
    return [[fqn_of.get(id(parameter)) for parameter in group["params"]] for group in optimizer.param_groups]


def _present(fqns: Sequence[str | None]) -> list[str]:
    return list(dict.fromkeys(fqn for fqn in fqns if fqn is not None))


def _matched_groups(
    record: OptimizerRecord, optimizer: Optimizer, parameters: Owned
) -> list[tuple[dict[str, Any], list[str | None]]]:
    """Give for every group of the optimiser its saved options and its parameters' FQNs."""
    kind = type(optimizer).__qualname__
    if kind != record.kind:
        raise WeightsError(
            f"the checkpoint has the state of {record.kind}, not of {kind}\n  give an optimiser of that class"
        )
    members = _members(optimizer, parameters)
    place = {fqn: index for index, (_, fqns) in enumerate(record.groups) for fqn in fqns}
    unknown = [fqn for own in members for fqn in _present(own) if fqn not in place]
    if unknown:
        raise WeightsError(
            f"the checkpoint's optimiser did not have {len(unknown)} of this one's parameters: {shown(unknown)}\n"
            "  give the optimiser the parameters it was saved with"
        )
    found = []
    for index, own in enumerate(members):
        fqns = _present(own)
        saved: dict[str, str] = {}  # a parameter for each set of options
        for fqn in fqns:
            saved.setdefault(json.dumps(record.groups[place[fqn]][0], sort_keys=True), fqn)
        if len(saved) > 1:
            one, other = list(saved.values())[:2]
            raise WeightsError(
                f"group {index} of the optimiser holds {one} and {other}, which were saved with different options\n"
                "  make the groups as they were when the checkpoint was saved"
            )
        found.append((decode(record.groups[place[fqns[0]]][0]) if fqns else {}, own))
    return found


def _check_scheduler(record: OptimizerRecord | None, optimizer: Optimizer | None, parameters: Owned) -> None:
    """A scheduler keeps a list with an entry per group: groups must be as many, and in one order, on every rank."""
    if record is None or optimizer is None:
        return
    saved = record.scheduler_groups
    place = {fqn: index for index, (_, fqns) in enumerate(record.groups) for fqn in fqns}
    here = [{place.get(fqn) for fqn in _present(own)} for own in _members(optimizer, parameters)]
    fits = len(here) == len(saved) and all(
        index is None or not own or own == {index} for own, index in zip(here, saved, strict=True)
    )
    if not fits:
        number = f"{len(saved)} groups of parameters, and this one has {len(here)}"
        order = f"{len(saved)} groups of parameters in another order, or with other members"
        raise WeightsError(
            f"the scheduler was saved over {number if len(here) != len(saved) else order}\n"
            "  make the same groups on every rank in one order; a group may be empty"
        )


def _target(entry: Entry, parameter: torch.Tensor) -> torch.Tensor:
    """Allocate a state tensor: sharded as its parameter where it is of its shape; a scalar stays on the CPU."""
    dtype = getattr(torch, entry.dtype)
    if tuple(parameter.shape) == entry.shape and entry.shape:
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    return torch.empty(entry.shape, dtype=dtype, device=parameter.device if entry.shape else "cpu")


def _give(
    optimizer: Optimizer,
    groups: Sequence[tuple[Mapping[str, Any], Sequence[str | None]]],
    tensors: Mapping[str, torch.Tensor],
    scalars: Mapping[str, Mapping[str, Any]],
) -> None:
    """Load the state, by torch's own way, which knows what goes to which device; then mend what it cast."""
    state: dict[str, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        owner, name = parameter_of(key)
        state.setdefault(owner, {})[name] = tensor
    order = [fqn for _, fqns in groups for fqn in fqns]
    for fqn in order:
        if fqn is not None and fqn in scalars:
            state.setdefault(fqn, {}).update({name: decode(value) for name, value in scalars[fqn].items()})
    before = optimizer.state_dict()["param_groups"]
    merged = [{**now, **options, "params": now["params"]} for now, (options, _) in zip(before, groups, strict=True)]
    indices = [index for group in merged for index in group["params"]]
    numbered: dict[int, dict[str, Any]] = {}
    given: set[str] = set()
    for index, fqn in zip(indices, order, strict=True):
        if fqn is not None and fqn in state:
            numbered[index] = _cloned(state[fqn]) if fqn in given else state[fqn]  # no two step with one tensor
            given.add(fqn)
    optimizer.load_state_dict({"state": numbered, "param_groups": merged})
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter, fqn in zip(parameters, order, strict=True):
        for name, value in state.get(fqn or "", {}).items():
            held = optimizer.state[parameter][name]
            if isinstance(value, torch.Tensor) and held.dtype != value.dtype:
                optimizer.state[parameter][name] = value.to(held.device)


def _cloned(state: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in state.items()}


def _give_scheduler(scheduler: Any, saved: Mapping[str, Any]) -> None:
    now = scheduler.state_dict()
    state = decode(saved)
    for name, value in state.items():
        kind = type(now.get(name))
        if isinstance(value, dict) and issubclass(kind, dict) and kind is not dict:
            state[name] = kind(value)  # the milestones of MultiStepLR are a Counter
    scheduler.load_state_dict(state)
