"""Optimisers and loss scaling that are right on every rank, whatever of the model it holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fxpipe._torch import found_infinities
from fxpipe.errors import MaterializeError
from fxpipe.runtime.ranks.agreement import agree
from fxpipe.runtime.ranks.groups import Groups

GroupRule = Callable[[str, nn.Parameter], Mapping[str, Any]]


def make_optimizer(
    cls: Callable[..., torch.optim.Optimizer],
    named: Iterable[tuple[str, nn.Parameter]],
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
        groups: The pipeline's groups; None where one process holds it all.
        device: Where this rank's stages run.
        rule: Gives the options of a parameter's group from its FQN and itself; None: all in one group.
        options: Of the optimiser.

    Raises:
        MaterializeError: The rule gives something else than a mapping.
    """
    members: dict[str, tuple[Mapping[str, Any], list[nn.Parameter]]] = {}
    error: Exception | None = None
    try:
        for fqn, parameter in named:
            if parameter.requires_grad:
                own = rule(fqn, parameter) if rule is not None else {}
                if not isinstance(own, Mapping):
                    raise MaterializeError(
                        f"groups= gave a {type(own).__name__} for {fqn}\n  give a dictionary of the group's options"
                    )
                members.setdefault(_spelled(own), (own, []))[1].append(parameter)
    except Exception as raised:  # the user's function
        error = raised
    agree(groups, error, "the optimiser's groups")
    found = []
    for name, own in _of_all({name: own for name, (own, _) in members.items()}, groups).items():
        parameters = members[name][1] if name in members else []
        found.append({**own, "params": parameters or [nn.Parameter(torch.zeros((0, 0), device=device))]})
    return cls(found, **options)


def _spelled(options: Mapping[str, Any]) -> str:
    return repr(sorted(options.items()))


def _of_all(own: dict[str, Mapping[str, Any]], groups: Groups | None) -> dict[str, Mapping[str, Any]]:
    """Give the groups that any rank of the pipeline has, in one order: group ``i`` is the same one everywhere."""
    everywhere = groups.gather_along(own) if groups is not None else [own]
    found = {name: options for each in everywhere for name, options in each.items()}
    return found or {"": {}}


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
