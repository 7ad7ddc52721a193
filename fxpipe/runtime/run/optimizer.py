"""Optimisers and loss scaling that are right on every rank, whatever of the model it holds."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from fxpipe._torch import found_infinities
from fxpipe.errors import MaterializeError, ScheduleError, WeightsError
from fxpipe.runtime.ranks.agreement import agree
from fxpipe.runtime.ranks.groups import Groups

GroupRule = Callable[[str, nn.Parameter], Mapping[str, Any]]


def make_optimizer(
    cls: Callable[..., torch.optim.Optimizer],
    named: Iterable[tuple[str, nn.Parameter]],
    order: Mapping[str, int],
    groups: Groups | None,
    device: torch.device,
    rule: GroupRule | None,
    options: Mapping[str, Any],
) -> torch.optim.Optimizer:
    """Make an optimiser of this rank's trainable parameters; every rank calls this.

    Optimisers refuse an empty list. Where a rank has nothing to train, or nothing in one of the groups that others
    have, a parameter without elements stands in: it never gets a gradient.

    Args:
        cls: ``torch.optim.AdamW`` or another class, called with a list of groups and the options.
        named: This rank's parameters.
        order: Where in the model each parameter stands, by first FQN.
        groups: The pipeline's groups; None where one process holds it all.
        device: Where this rank's stages run.
        rule: Gives the options of a parameter's group from its FQN and itself; None: all in one group.
        options: Of the optimiser.

    Raises:
        MaterializeError: The class or the rule cannot be called, or the rule gives something else than a mapping.
    """
    check_callable("cls", cls, "give the class: pipe.optimizer(torch.optim.AdamW, lr=...)")
    if rule is not None:
        check_callable("groups", rule, "give a function of a parameter's FQN and itself: groups(fqn, parameter)")
    members: dict[str, tuple[Mapping[str, Any], list[nn.Parameter]]] = {}
    first: dict[str, tuple[int, str]] = {}  # where in the model the first parameter of each group stands
    error: Exception | None = None
    try:
        for fqn, parameter in named:
            if parameter.requires_grad:
                own = rule(fqn, parameter) if rule is not None else {}
                if not isinstance(own, Mapping):
                    raise MaterializeError(
                        f"groups= gave a {type(own).__name__} for {fqn}\n  give a dictionary of the group's options"
                    )
                group = _spelled(own)
                members.setdefault(group, (own, []))[1].append(parameter)
                place = order.get(fqn, len(order)), fqn
                first[group] = min(first.get(group, place), place)
    except Exception as raised:  # the user's function
        error = raised
    agree(groups, error, "the optimiser's groups")
    found = []
    for name, own in _of_all({name: (first[name], own) for name, (own, _) in members.items()}, groups).items():
        parameters = members[name][1] if name in members else []
        found.append({**own, "params": parameters or [nn.Parameter(torch.zeros((0, 0), device=device))]})
    return cls(found, **options)


def _spelled(options: Mapping[str, Any]) -> str:
    return repr(sorted(options.items()))


Placed = tuple[tuple[int, str], Mapping[str, Any]]
"""Where in the model the first parameter of a group stands, and the group's options."""


def _of_all(own: dict[str, Placed], groups: Groups | None) -> dict[str, Mapping[str, Any]]:
    """Give the groups that any rank of the pipeline has, in the model's order: the same one for any plan."""
    everywhere = groups.gather_along(own) if groups is not None else [own]
    found: dict[str, Placed] = {}
    for name, placed in ((name, placed) for each in everywhere for name, placed in each.items()):
        found[name] = min(found.get(name, placed), placed, key=lambda each: each[0])
    in_order = sorted(found.items(), key=lambda each: each[1][0])
    return {name: options for name, (_, options) in in_order} or {"": {}}


def make_scaler(groups: Groups | None, device: torch.device, options: Mapping[str, Any]) -> torch.amp.GradScaler:
    """Make a loss scaler of whose steps all ranks skip the same.

    Args:
        groups: The pipeline's groups; None where one process holds it all.
        device: Where this rank's stages run.
        options: Those of ``torch.amp.GradScaler``.
    """
    if groups is None:
        return torch.amp.GradScaler(device.type, **options)
    from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

    guard, waiting = groups.guard, groups.waiting
    replicas = groups.replicas.gradients if groups.replicas is not None else None

    class SharedScaler(ShardedGradScaler):
        """torch's scaler of sharded models; what one rank found infinite counts for the pipeline and its replicas."""

        fxpipe_shared = True

        def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
            """Divide the gradients by the scale, and tell all ranks whether one is not finite."""
            with guard("unscale_"), waiting():
                super().unscale_(optimizer)
                self._is_unscaled = {*getattr(self, "_is_unscaled", ()), id(optimizer)}
                for found in found_infinities(self, optimizer) if replicas is not None else ():
                    dist.all_reduce(found, group=replicas)

        def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> float | None:
            """Step unless a gradient on any rank is not finite; a fused optimiser would ask its own rank alone."""
            if self.is_enabled() and id(optimizer) not in getattr(self, "_is_unscaled", ()):
                self.unscale_(optimizer)
            return super().step(optimizer, *args, **kwargs)

        def update(self, new_scale: float | torch.Tensor | None = None) -> None:
            """Adapt the scale."""
            super().update(new_scale)
            self._is_unscaled = set()

    return SharedScaler(device.type, process_group=groups.pipeline, **options)


def check_scaler(scaler: Any, *, is_shared: bool) -> None:
    """Refuse what is no loss scaler, and one of torch's own where ranks would skip different steps.

    Args:
        scaler: What ``step`` was given; None for none.
        is_shared: Whether there are several ranks.

    Raises:
        ScheduleError: Says how to make one.

    >>> check_scaler(torch.amp.GradScaler("cpu"), is_shared=False)
    """
    if scaler is None:
        return
    if not isinstance(scaler, torch.amp.GradScaler):
        raise ScheduleError(f"scaler is a {type(scaler).__name__}\n  pass what pipe.grad_scaler() gives")
    if is_shared and not hasattr(scaler, "fxpipe_shared"):
        raise ScheduleError(
            f"scaler is a {type(scaler).__name__} of this rank alone: what it finds infinite no other rank would skip\n"
            "  make it by pipe.grad_scaler(), with the same options"
        )


def check_norm(max_norm: Any, norm_type: Any) -> None:
    """Refuse what is no number.

    Raises:
        ScheduleError: Names the argument.

    >>> check_norm(1.0, 2)
    """
    for name, value in (("max_norm", max_norm), ("norm_type", norm_type)):
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and value == value
        if not is_number and not (isinstance(value, torch.Tensor) and value.numel() == 1):
            raise ScheduleError(f"{name}={value!r} is not a number\n  give one: clip_grad_norm_(1.0)")


def check_callable(name: str, value: Any, way_out: str) -> None:
    """Refuse what cannot be called.

    Raises:
        MaterializeError: Names the argument, and says what to give.
    """
    if not callable(value):
        raise MaterializeError(f"{name} is {_given(value)}, which cannot be called\n  {way_out}")


def check_kept(optimizer: Any, scheduler: Any) -> None:
    """Refuse what has no state that a checkpoint could keep.

    Raises:
        WeightsError: Names the argument.
    """
    for name, value, needed in (
        ("optimizer", optimizer, ("param_groups", "state_dict", "load_state_dict")),
        ("scheduler", scheduler, ("state_dict", "load_state_dict")),
    ):
        missing = [each for each in needed if not hasattr(value, each)]
        if value is not None and missing:
            raise WeightsError(
                f"{name} is {_given(value)}, which has no {missing[0]}\n  pass the {name} itself, or leave it out"
            )


def _given(value: Any) -> str:
    return repr(value) if value is None or isinstance(value, str | int | float) else f"a {type(value).__name__}"


_compiled: dict[int, tuple[str, weakref.ref[Any]]] = {}
_hooks: list[Any] = []


def watch_optimizers(parameters: Mapping[str, torch.Tensor]) -> None:
    """Have an optimiser refused that was made of the model's own tensors, which the pipeline does not train.

    One made before ``materialize`` holds those; its steps would do nothing, without a word. Where one of its parameters
    has a gradient, the script trains the model itself too.

    Args:
        parameters: The model's, by name; only weak references are kept.
    """
    for gone in [key for key, (_, tensor) in _compiled.items() if tensor() is None]:
        del _compiled[gone]
    _compiled.update({id(tensor): (fqn, weakref.ref(tensor)) for fqn, tensor in parameters.items()})
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_refuse_stray))


def _refuse_stray(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Before a step of any optimiser: as a rule its first parameter has a gradient, and nothing more is looked at."""
    name = ""
    parameter: Any
    for parameter in (each for group in optimizer.param_groups for each in group["params"]):
        fqn, known = _compiled.get(id(parameter), ("", None))
        if parameter.grad is not None or known is None or known() is not parameter:
            return
        name = name or fqn
    if name:
        raise MaterializeError(
            f"{type(optimizer).__name__} steps with the parameters of the model that was compiled ({name} and others), "
            "which the pipeline does not train: none has a gradient\n"
            "  make it after materialize: pipe.optimizer(torch.optim.AdamW, lr=...), or of pipe.parameters()"
        )
