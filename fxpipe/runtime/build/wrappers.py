"""What peft puts around and into a model: which tensors are its own, and how it starts them.

peft has no function that says which tensors of a wrapped model were there before, nor one that starts an adapter anew;
what its layers have in common is looked at here, and nowhere else.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from fxpipe.errors import MaterializeError
from fxpipe.runtime.build.generators import kept_generators, seed_generators


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
    if is_peft(module):
        yield from ((fqn, None) for fqn in fqns.values() if starts_as_built(module, fqn))
    tokens: Any = getattr(peft.utils, "TrainableTokensWrapper", ())  # a layer of peft in a wrapper of peft
    for fqn, part in module.named_modules():
        layer: Any = part
        if is_tuner(part):
            yield fqn, None
            outer = fqn.rpartition(".")[0]
            inside = isinstance(module.get_submodule(outer), tokens)
            yield fqns[id(layer.get_base_layer())], outer if inside else fqn
        elif isinstance(part, tokens):
            yield fqn, None
        elif isinstance(part, peft.utils.ModulesToSaveWrapper):
            yield fqn, None
            yield fqns[id(layer.original_module)], fqn
            for name in layer.modules_to_save:
                yield f"{fqn}.modules_to_save.{name}", fqn


def starts_as_built(module: nn.Module, fqn: str) -> bool:
    """Tell whether a module is of a prompt that peft trains, and has the values that its constructor gives it."""
    name, _, adapter = fqn.partition(".")
    if name != "prompt_encoder" or not is_peft(module):
        return False
    wrapped: Any = module
    configuration = wrapped.peft_config.get(adapter.partition(".")[0])
    return getattr(configuration, "prompt_tuning_init", "RANDOM") == "RANDOM"


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
        if not (name.startswith("reset_") and name.endswith("_parameters")):
            continue
        method = getattr(layer, name)
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
                calls.append(partial(_reset, method, adapter, given))
    return calls


def _reset(method: Callable[..., Any], adapter: str, given: Mapping[str, Any]) -> None:
    with contextlib.suppress(ValueError):  # a start that is no reset (``"orthogonal"``): see ``started_around``
        method(adapter, **given)


def started_around(
    module: nn.Module, held: Mapping[str, torch.Tensor], first: Mapping[str, str], wanted: Collection[str], seed: int
) -> dict[str, torch.Tensor]:
    """Start what peft makes of the weights of the layers that it wraps, such as the magnitudes of DoRA.

    peft computes them when it wraps a layer, and has no function that does so later. So each layer is wrapped once
    more, alone, with the weights it has by now.

    Args:
        module: The wrapped model with fake tensors.
        held: This rank's tensors with values, by first FQN.
        first: First FQN of every FQN.
        wanted: First FQNs of the tensors to start; those around a layer that is not among ``held`` stay as they are.
        seed: Seed of what is drawn.

    Returns:
        Values by first FQN, on the CPU.

    Raises:
        MaterializeError: peft fails.
    """
    found: dict[str, torch.Tensor] = {}
    if not wanted or not is_peft(module):
        return found
    wrapped: Any = module
    plain = wrapped.get_base_model()
    fqns = {id(part): fqn for fqn, part in module.named_modules()}
    for fqn, part in module.named_modules():
        start = f"{fqn}."
        own = {alias.removeprefix(start): name for alias, name in first.items() if alias.startswith(start)}
        own = {alias: name for alias, name in own.items() if name in wanted}
        if not own or not is_tuner(part):
            continue
        layer: Any = part
        base = layer.get_base_layer()
        memo = _real_twins(base, fqns[id(base)], held, first)
        if memo is None:
            continue
        place = fqn.removeprefix(f"{fqns[id(plain)]}.")
        configurations = _configurations(layer, place, wrapped.peft_config)
        started = _wrapped(copy.deepcopy(base, memo), place, plain, configurations, seed)
        found.update((name, started[alias]) for alias, name in own.items() if alias in started)
    return found


def _configurations(layer: Any, place: str, given: Mapping[str, Any]) -> Mapping[str, Any]:
    """Give what wraps a layer; tokens that are trained beside another adapter have no configuration of their own."""
    peft: Any = sys.modules["peft"]
    if not isinstance(layer, peft.tuners.trainable_tokens.TrainableTokensLayer):
        return given
    name = place.rpartition(".")[2]
    return {
        adapter: peft.TrainableTokensConfig(token_indices=indices, target_modules=[name])
        for adapter, indices in layer.token_indices.items()
    }


def _real_twins(
    base: nn.Module, fqn: str, held: Mapping[str, torch.Tensor], first: Mapping[str, str]
) -> dict[int, Any] | None:
    """Give copies of a layer's tensors by the ``id`` of those without memory; None where this rank lacks one."""
    memo: dict[int, Any] = {}
    for name, tensor in (*base.named_parameters(), *base.named_buffers()):
        value = held.get(first.get(f"{fqn}.{name}", ""))
        if value is None:
            return None
        copied = value.detach().to("cpu", copy=True)
        memo[id(tensor)] = nn.Parameter(copied, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copied
    return memo


def _wrapped(
    base: nn.Module, place: str, model: nn.Module, configurations: Mapping[str, Any], seed: int
) -> dict[str, torch.Tensor]:
    """Have peft wrap a layer that stands alone in its place; gives the tensors of the result."""
    peft: Any = sys.modules["peft"]
    *path, name = place.split(".")
    root = inside = nn.Module()
    for step in path:
        inside.add_module(step, nn.Module())
        inside = inside.get_submodule(step)
    inside.add_module(name, base)
    if hasattr(model, "config"):
        root.config = model.config
    try:
        with kept_generators(), torch.device("cpu"), torch.no_grad():
            for adapter, configuration in configurations.items():
                seed_generators(seed, "init", place, adapter)
                peft.inject_adapter_in_model(copy.deepcopy(configuration), root, adapter)
    except Exception as error:  # whatever peft raises
        raise MaterializeError(
            f"peft cannot start what it puts around {place}: {type(error).__name__}: {error}\n"
            "  wrap a model with real weights, or build and wrap it in fxpipe.deferred_init"
        ) from error
    started = root.get_submodule(place)
    return {name: tensor.detach() for name, tensor in (*started.named_parameters(), *started.named_buffers())}


def _option(configuration: Any, name: str) -> Any:
    if hasattr(configuration, name):
        return getattr(configuration, name)
    return getattr(configuration, "init_weights", True)
