"""What peft puts around and into a model: which tensors are its own, and how it starts them.

peft has no function that says which tensors of a wrapped model were there before, nor one that starts an adapter anew;
what its layers have in common is looked at here, and nowhere else.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from torch import nn


def is_peft(module: nn.Module) -> bool:
    """Tell whether a module is a model wrapped by peft."""
    peft: Any = sys.modules.get("peft")  # not loaded: nothing was wrapped
    return peft is not None and isinstance(module, peft.PeftModel)


def is_tuner(module: nn.Module) -> bool:
    """Tell whether a module is one of peft's layers, around a layer of the model."""
    peft: Any = sys.modules.get("peft")
    return peft is not None and isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer)


def inner_modules(module: nn.Module) -> Iterator[tuple[str, str | None]]:
    """Yield ``(inner, outer)``: what is below ``inner`` goes by ``outer`` in the plain model; None: it is not in it."""
    peft: Any = sys.modules.get("peft")
    if peft is None:
        return
    fqns = {id(part): fqn for fqn, part in module.named_modules()}
    for fqn, part in module.named_modules():
        layer: Any = part
        if is_tuner(part):
            yield fqn, None
            yield fqns[id(layer.get_base_layer())], fqn
        elif isinstance(part, peft.utils.ModulesToSaveWrapper):
            yield fqn, None
            yield fqns[id(layer.original_module)], fqn
            for name in layer.modules_to_save:
                yield f"{fqn}.modules_to_save.{name}", fqn


def plain_name(fqn: str, moved: Mapping[str, str | None]) -> str | None:
    """Give the name of a tensor in the model before it was wrapped; None where it was added.

    Args:
        fqn: The tensor.
        moved: What ``inner_modules`` yields.

    >>> moved = {"proj": None, "proj.base_layer": "proj"}
    >>> plain_name("proj.base_layer.weight", moved), plain_name("proj.lora_A.default.weight", moved)
    ('proj.weight', None)
    """
    path = fqn.split(".")
    for length in range(len(path) - 1, 0, -1):
        inner = ".".join(path[:length])
        if inner in moved:
            outer = moved[inner]
            if outer is None:
                return None
            rest = {other: place for other, place in moved.items() if other != outer}
            return plain_name(".".join([outer, *path[length:]]), rest)
    return fqn


def added_by_tuners(module: nn.Module) -> Callable[[str], bool]:
    """Give a function that tells whether a tensor's FQN is one that a layer of peft added."""
    moved = dict(inner_modules(module))
    return lambda fqn: bool(moved) and plain_name(fqn, moved) is None


def starts(layer: nn.Module, configurations: Mapping[str, Any]) -> list[Callable[[], Any]]:
    """Give the calls by which peft starts what it added to a layer.

    Every kind of adapter has a method that resets its parameters by the adapter's name, and takes what else it needs
    by the names that its configuration has for it.

    Args:
        layer: A layer of peft.
        configurations: Of each adapter, by name.
    """
    calls: list[Callable[[], Any]] = []
    for name in dir(type(layer)):
        method = getattr(layer, name)
        if not (name.startswith("reset_") and name.endswith("_parameters") and callable(method)):
            continue
        names = list(inspect.signature(method).parameters.values())
        if not names or names[0].name != "adapter_name":
            continue
        for adapter, configuration in configurations.items():
            given = {
                each.name: _option(configuration, each.name)
                for each in names[1:]
                if hasattr(configuration, each.name) or each.name == "init_weights"
            }
            if all(each.name in given or each.default is not each.empty for each in names[1:]):
                calls.append(partial(method, adapter, **given))
    return calls


def _option(configuration: Any, name: str) -> Any:
    if hasattr(configuration, name):
        return getattr(configuration, name)
    return getattr(configuration, "init_weights", True)
