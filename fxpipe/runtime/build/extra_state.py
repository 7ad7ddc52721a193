"""What modules save beside tensors (``get_extra_state``): read from the stages, and given back to them."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fxpipe.errors import SpecError
from fxpipe.ir.canonical import digest, spell
from fxpipe.runtime.build.stage import StageModule
from fxpipe.runtime.ranks.groups import Groups

_KEY = "_extra_state"


def extra_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Give the modules that save something beside tensors, by their key in the model's ``state_dict``.

    >>> extra_modules(nn.Linear(1, 1))
    {}
    """
    named = model.named_modules(remove_duplicate=False)
    return {f"{fqn}.{_KEY}" if fqn else _KEY: part for fqn, part in named if _has(part)}


def own_extra_states(modules: Mapping[str, nn.Module], stages: Sequence[StageModule]) -> dict[str, Any]:
    """Give what the modules that this rank's stages hold save."""
    return {key: held.get_extra_state() for key, held in held_extra_modules(modules, stages).items()}


def held_extra_states(modules: Mapping[str, nn.Module], stages: Sequence[StageModule]) -> list[str]:
    """List the keys of the modules that this rank's stages hold whole."""
    return list(held_extra_modules(modules, stages))


def full_extra_states(
    modules: Mapping[str, nn.Module], stages: Sequence[StageModule], groups: Groups | None
) -> dict[str, Any]:
    """Give what every module saves; of a module that no stage holds whole, what the model's copy does.

    Every rank calls it.
    """
    if not modules:
        return {}
    everywhere = [own_extra_states(modules, stages)]
    if groups is not None:
        everywhere = groups.gather_along(everywhere[0])
    found = {key: value for states in reversed(everywhere) for key, value in states.items()}
    return {key: found[key] if key in found else part.get_extra_state() for key, part in modules.items()}


def load_extra_states(
    modules: Mapping[str, nn.Module], stages: Sequence[StageModule], state: Mapping[str, Any]
) -> None:
    """Give modules back what they saved: those of the stages, and the model's copy, from which stages are made."""
    held = held_extra_modules(modules, stages)
    for key, part in modules.items():
        if key in state:
            part.set_extra_state(state[key])
            if key in held:
                held[key].set_extra_state(state[key])


def missing_extra_states(
    modules: Mapping[str, nn.Module], stages: Sequence[StageModule], state: Mapping[str, Any]
) -> list[str]:
    """List what this rank's modules save and a state leaves out."""
    return [key for key in held_extra_modules(modules, stages) if key not in state]


def _has(module: nn.Module) -> bool:
    return type(module).get_extra_state is not nn.Module.get_extra_state


def held_extra_modules(modules: Mapping[str, nn.Module], stages: Sequence[StageModule]) -> dict[str, nn.Module]:
    """Give those of the modules that this rank's stages hold, as they stand there, by their keys."""
    held: dict[str, nn.Module] = {}
    for stage in stages:
        here = {fqn.replace("_orig_mod.", ""): part for fqn, part in stage.named_modules(remove_duplicate=False)}
        here.update(stage.named_modules(remove_duplicate=False))
        for key in modules:
            part = here.get(key.removesuffix(_KEY).removesuffix("."))
            if part is not None and part is not stage and _has(part):
                held.setdefault(key, part)
    return held


def spelled_states(modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Give what modules save as texts that are equal for equal states; what cannot be compared is left out."""
    found = {}
    for key, part in modules.items():
        with contextlib.suppress(SpecError):
            found[key] = digest(spell(part.get_extra_state(), key))
    return found


@contextlib.contextmanager
def kept_buffers(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Give buffers, and what modules save besides, the values that they had."""
    kept = [(buffer, buffer.clone()) for module in modules for buffer in module.buffers()]
    saving = [part for module in modules for part in extra_modules(module).values()]
    states = [(part, copy.deepcopy(part.get_extra_state())) for part in saving]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)
        for part, state in states:
            part.set_extra_state(state)
