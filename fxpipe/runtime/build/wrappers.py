"""What peft puts around and into a model: which tensors are its own, and how it starts them.

peft has no function that says which tensors of a wrapped model were there before; what its layers have in common is
looked at here, and nowhere else.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from fxpipe.errors import MaterializeError
from fxpipe.recipes.deferred import deferred_init, given, given_names, is_as_given, is_recorded, replay
from fxpipe.recipes.replay import replaying
from fxpipe.runtime.build.generators import kept_generators
from fxpipe.runtime.build.standin import plain_fakes


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
    if peft is None:  # not loaded: nothing was wrapped
        return
    fqns = {id(part): fqn for fqn, part in module.named_modules()}
    tokens: Any = getattr(peft.utils, "TrainableTokensWrapper", ())  # a layer of peft in a wrapper of peft
    for fqn, part in module.named_modules():
        layer: Any = part
        if is_peft(part):
            plain = fqns[id(layer.get_base_model())]
            yield from ((other, None) for other in _beside(fqn, plain, module))
            if fqn:
                yield plain, fqn
        elif is_tuner(part):
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
        elif isinstance(part, _adapted_attention()):
            yield fqn, None
            yield f"{fqn}.model", fqn


def _beside(fqn: str, plain: str, module: nn.Module) -> Iterator[str]:
    """Yield what hangs beside the plain model on the way to it: prompts, and what all layers of an adapter share."""
    for step in plain.removeprefix(fqn).removeprefix(".").split("."):
        inside = f"{fqn}." if fqn else ""
        yield from (inside + name for name, _ in module.get_submodule(fqn).named_children() if name != step)
        fqn = inside + step


def _adapted_attention() -> tuple[type, ...]:
    """Give the class of what adaption prompts put around a model's attention, which is no layer of peft's own kind."""
    layer: Any = sys.modules.get("peft.tuners.adaption_prompt.layer")
    found = getattr(layer, "_BaseAdaptedAttention", None)
    return (found,) if found is not None else ()


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


def added_by_peft(module: nn.Module) -> Callable[[str], bool]:
    """Give a function that tells whether a tensor's FQN is one that peft added."""
    moved = dict(inner_modules(module))
    return lambda fqn: bool(moved) and plain_name(fqn, moved) is None


class _Values:
    """What the given tensors of a recording hold, for as long as it is replayed."""

    def __init__(self) -> None:
        self.held: Mapping[str, torch.Tensor] = {}

    def __call__(self, name: str) -> torch.Tensor:
        tensor: Any = self.held[name].detach()
        value: torch.Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        return value.to("cpu", copy=True)

    def replay(
        self, tensors: Mapping[str, torch.Tensor], held: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor | None]:
        """Compute recorded tensors of those that are held."""
        self.held = held
        try:
            return dict(replay(tensors))
        finally:
            self.held = {}


@dataclass(frozen=True, slots=True, eq=False)
class Derived:
    """A tensor that peft makes of others.

    Attributes:
        tensor: Its shape and dtype, without memory.
        reads: The names of those others.
        is_one: Whether it is the one that it reads, as it is.
    """

    tensor: torch.Tensor
    reads: tuple[str, ...]
    is_one: bool
    _values: _Values

    def made(self, held: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Make it on the CPU, of those that it reads."""
        value = self._values.replay({"": self.tensor}, held)[""]
        assert value is not None, "it is not filled"
        return value.contiguous()


def written_by_peft(
    module: nn.Module, first: Mapping[str, str], adapter: str, *, embeddings: bool = False
) -> dict[str, Derived]:
    """Give what peft writes of an adapter, by its names there, made of the model's tensors.

    Args:
        module: A model that peft wrapped, with fake tensors; only read.
        first: First FQN of every FQN.
        adapter: The adapter's name.
        embeddings: Whether embeddings are among it where peft would write them too; it may look at a hub for that.
    """
    peft, values = sys.modules["peft"], _Values()
    with _recording(None):
        copied = _given_copy(module, first, values)
        found = peft.get_peft_model_state_dict(
            copied, adapter_name=adapter, save_embedding_layers="auto" if embeddings else False
        )
        kept = {name: tensor for name, tensor in found.items() if is_recorded(tensor)}
    return {name: Derived(tensor, given_names(tensor), is_as_given(tensor), values) for name, tensor in kept.items()}


def read_by_peft(
    module: nn.Module, first: Mapping[str, str], adapter: str, files: Mapping[str, torch.Tensor]
) -> dict[str, Derived]:
    """Give what peft makes of an adapter's file, by first FQN, made of the file's tensors.

    Args:
        module: A model that peft wrapped, with fake tensors; only read.
        first: First FQN of every FQN.
        adapter: The adapter's name.
        files: Tensors of the shapes and dtypes that the file has, by name.
    """
    peft, values, theirs = sys.modules["peft"], _Values(), "file "
    with _recording(None):
        copied = _given_copy(module, first, values)
        own = {name: tensor for name, tensor in _tensors(copied) if first.get(name) == name}
        state = {
            name: given(theirs + name, tensor, lambda key: values(key.removeprefix(theirs)))
            for name, tensor in files.items()
        }
        peft.set_peft_model_state_dict(copied, state, adapter)
        found = {fqn: (tensor, given_names(tensor)) for fqn, tensor in own.items()}
    return {
        fqn: Derived(tensor, tuple(name.removeprefix(theirs) for name in names), False, values)
        for fqn, (tensor, names) in found.items()
        if names and all(name.startswith(theirs) for name in names)
    }


@contextmanager
def _recording(seed: int | None) -> Iterator[None]:
    with warnings.catch_warnings(), kept_generators(), deferred_init(seed):
        warnings.simplefilter("ignore")  # peft has said it when the model was wrapped
        yield


def _given_copy(module: nn.Module, first: Mapping[str, str], value: Callable[[str], torch.Tensor]) -> nn.Module:
    """Copy a model inside of ``deferred_init``: its tensors have values that are asked for when they are needed."""
    memo: dict[int, Any] = {}
    made: dict[str, torch.Tensor] = {}
    for name, tensor in _tensors(module):
        fqn = first.get(name, name)
        if fqn not in made:
            twin = given(fqn, tensor, value)
            is_parameter = isinstance(tensor, nn.Parameter)
            made[fqn] = nn.Parameter(twin, tensor.requires_grad) if is_parameter else twin
        memo[id(tensor)] = made[fqn]
    for part in module.modules():
        for plain in plain_fakes(part):
            known = next(replay({"": plain}))[1] if is_recorded(plain) else None
            memo.setdefault(id(plain), torch.empty_like(plain, device="cpu") if known is None else known)
    with replaying():  # real tensors that are plain attributes stay real
        return copy.deepcopy(module, memo)


class Adapters:
    """What peft adds to a model, and what it starts with: as after ``torch.manual_seed(seed)`` and the wrapping.

    peft makes values when it wraps a model, some of them of the weights it finds, and has no function that does so
    later. So a copy without memory is unwrapped and wrapped once more, recorded; each rank replays that for what it
    holds.

    Args:
        module: The wrapped model, with fake tensors; only read.
        first: First FQN of every FQN.
        seed: Seed of what is drawn.
    """

    def __init__(self, module: nn.Module, first: Mapping[str, str], seed: int) -> None:
        self._module = module
        self._first = first
        self._seed = seed
        self._values = _Values()
        self._recorded: dict[str, torch.Tensor] | None = None

    def follows(self, fqn: str) -> bool:
        """Tell whether peft makes a tensor of weights of the model, such as the magnitudes of DoRA."""
        tensor = self._wrapped().get(fqn)
        return tensor is not None and not is_as_given(tensor) and bool(given_names(tensor))

    def started(self, fqns: Iterable[str], held: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Give tensors their first values, on the CPU.

        Args:
            fqns: Which, by first FQN; those that peft makes of weights that are not held are left out.
            held: The tensors of this rank that have values; only read.

        Raises:
            MaterializeError: peft fails.
        """
        recorded = {fqn: tensor for fqn in fqns if (tensor := self._wrapped().get(fqn)) is not None}
        ready = {fqn: tensor for fqn, tensor in recorded.items() if all(name in held for name in given_names(tensor))}
        return {fqn: value for fqn, value in self._values.replay(ready, held).items() if value is not None}

    def _wrapped(self) -> dict[str, torch.Tensor]:
        """Wrap once more; gives the recorded tensors by FQN."""
        if self._recorded is None:
            try:
                with _recording(self._seed):
                    again = _wrapped_again(_given_copy(self._module, self._first, self._values))
                    self._recorded = {name: tensor for name, tensor in _tensors(again) if is_recorded(tensor)}
            except Exception as error:  # whatever peft raises
                raise MaterializeError(
                    f"peft cannot start what it adds to {type(self._module).__qualname__}: "
                    f"{type(error).__name__}: {error}\n"
                    "  wrap a model with real weights, or build and wrap it in fxpipe.deferred_init"
                ) from error
        return self._recorded


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _wrapped_again(module: nn.Module) -> nn.Module:
    """Take off what peft put around and into a model, and have it put there anew; gives the whole model."""
    done: list[str] = []
    for fqn, part in list(module.named_modules()):
        if not hasattr(part, "peft_config") or any(fqn.startswith(f"{other}." if other else "") for other in done):
            continue
        done.append(fqn)
        again = _anew(part)
        if not fqn:
            return again
        outer, _, name = fqn.rpartition(".")
        module.get_submodule(outer)._modules[name] = again
    return module


def _anew(part: nn.Module) -> nn.Module:
    peft, wrapper = sys.modules["peft"], cast(Any, part)
    configurations = {name: copy.deepcopy(configuration) for name, configuration in wrapper.peft_config.items()}
    plain: nn.Module = wrapper.get_base_model() if is_peft(part) else part
    _unwrap(plain)
    vars(plain).pop("peft_config", None)
    if not is_peft(part):
        for name, configuration in configurations.items():
            peft.inject_adapter_in_model(configuration, plain, name)
        return plain
    first, *others = configurations
    again: nn.Module = peft.get_peft_model(plain, configurations[first], first)
    for other in others:
        cast(Any, again).add_adapter(other, configurations[other])
    return again


def _unwrap(module: nn.Module) -> None:
    """Put the model's own modules back in the places of those that peft put around them."""
    for name, child in list(module._modules.items()):
        while child is not None and (inside := _inside(child)) is not None:
            child = module._modules[name] = inside
        if child is not None:
            _unwrap(child)


def _inside(part: nn.Module) -> nn.Module | None:
    """Give the module of the model that one of peft is around; None: it is around nothing."""
    peft, layer = sys.modules["peft"], cast(Any, part)
    found: nn.Module | None = None
    if is_tuner(part):
        found = layer.get_base_layer()
    elif isinstance(part, peft.utils.other.AuxiliaryTrainingWrapper):
        found = layer.original_module
    elif isinstance(part, _adapted_attention()):
        found = layer.model
    return found
