"""Run the functions that initialise modules, on the parts of a model that one rank owns.

The unit of initialisation is a block, or outside of blocks a module with tensors of its own. All tensors of one unit,
owned or not, get memory on the CPU while everything else of the model is on meta, and then the functions are called
on every module of the unit, children first, and on every module around it, inner ones first. So functions may work on
containers and on the whole model, and what they give a unit depends on the seed and on the unit alone.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from fxpipe.errors import MaterializeError
from fxpipe.recipes.tape import leaves
from fxpipe.runtime.build.generators import seed_generators
from fxpipe.runtime.build.poison import OTHER_POISON, POISON, looks_untouched, poisoned, same_bytes
from fxpipe.runtime.build.standin import StandIn, tensor_names
from fxpipe.runtime.build.wrappers import plain_name

InitFunction = Callable[[nn.Module], Any]
Phase = Literal["reset", "init"]


@dataclass(frozen=True, slots=True)
class Unit:
    """What is initialised together.

    Attributes:
        fqn: A block, or the owner of the tensors.
        tensors: First FQNs of all its tensors.
        is_block: Whether functions are called on the modules inside too.
    """

    fqn: str
    tensors: tuple[str, ...]
    is_block: bool = False


@dataclass(frozen=True, slots=True)
class _Call:
    phase: Phase
    fqn: str
    module: nn.Module
    is_inside: bool
    function: Callable[[], Any]


class _FailedAroundError(MaterializeError):
    """A function failed on a module around the unit, whose own tensors were on meta."""


@dataclass(frozen=True, slots=True, eq=False)
class Initializer:
    """Values of units, by init functions.

    Attributes:
        skeleton: The model with fake tensors; only read.
        stand_in: Its copy that functions see.
        blocks: FQNs of the blocks.
        init: A function of a module, or ``"reset"``; or ``"huggingface"``; ``"empty"``: the same where a unit is not
            filled from the start; None: nothing.
        seed: Seed of all draws.
        moved: The modules that peft moved, as ``inner_modules`` yields them.
    """

    skeleton: nn.Module
    stand_in: StandIn
    blocks: frozenset[str]
    init: InitFunction | str | None
    seed: int
    moved: Mapping[str, str | None] = field(default_factory=dict)

    def units(self, fqns: Sequence[str]) -> tuple[Unit, ...]:
        """Give the units of some tensors, in the model's order; each with all of its tensors."""
        wanted = {self._unit_of(fqn) for fqn in fqns}
        members: dict[tuple[str, bool], list[str]] = {}
        for fqn in self.stand_in.metas:
            if (key := self._unit_of(fqn)) in wanted:
                members.setdefault(key, []).append(fqn)
        return tuple(Unit(fqn, tuple(tensors), is_block) for (fqn, is_block), tensors in members.items())

    def fill(self, unit: Unit, start: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
        """Give the tensors of a unit their values.

        Args:
            unit: The unit.
            start: Tensors that have a value before, on any device; only read.

        Returns:
            All tensors of the unit on the CPU, and the names of those that are not filled; none that peft added.

        Raises:
            MaterializeError: A function fails, or changes what the model is made of.
        """
        for phases in self._attempts(is_complete=set(start) >= set(unit.tensors)):
            if not phases and len(start) == len(unit.tensors):
                return dict(start), ()
            values = self._run(unit, phases, start, POISON)
            suspects = [fqn for fqn in unit.tensors if looks_untouched(values[fqn]) and not self._is_added(fqn)]
            if not suspects:
                break
        if suspects:
            again = self._run(unit, phases, start, OTHER_POISON)
            suspects = [fqn for fqn in suspects if not same_bytes(values[fqn], again[fqn])]
        return values, tuple(suspects)

    def _is_added(self, fqn: str) -> bool:
        return bool(self.moved) and plain_name(fqn, self.moved) is None

    def _attempts(self, is_complete: bool) -> list[tuple[Phase, ...]]:
        """Give the functions to run, in order; another attempt where the one before leaves something unfilled.

        In an eager build every module is reset by its constructor before the model's own functions run. Where these
        fill everything, as those of Hugging Face nearly always do, the reset would only cost its time.
        """
        if self.init is None or (self.init == "empty" and is_complete):
            return [()]
        if self.init == "reset":
            return [("reset",)]
        if is_complete or self.init == "empty":
            return [("init",)]
        return [("init",), ("reset", "init")] if self.init == "huggingface" else [("reset", "init")]

    def _run(
        self, unit: Unit, phases: Sequence[Phase], start: Mapping[str, torch.Tensor], byte: int
    ) -> dict[str, torch.Tensor]:
        """Start over from memory full of one byte, and call all functions."""
        try:
            return self._attempt(unit, phases, start, byte, with_scratch=False)
        except _FailedAroundError:
            return self._attempt(unit, phases, start, byte, with_scratch=True)

    def _attempt(
        self, unit: Unit, phases: Sequence[Phase], start: Mapping[str, torch.Tensor], byte: int, with_scratch: bool
    ) -> dict[str, torch.Tensor]:
        values = {}
        for fqn in unit.tensors:
            values[fqn] = poisoned(self.stand_in.metas[fqn], byte)
            if fqn in start:
                values[fqn].copy_(start[fqn])
        names = tensor_names(self.stand_in.module.get_submodule(unit.fqn))
        try:
            with self.stand_in.holding(values):
                for phase in phases:
                    for call in self._calls(unit, phase):
                        guard = self._do(call, unit, byte if with_scratch else None)
                        values = self._checked(call, unit, names, guard)
        finally:
            self.stand_in.clear(self.stand_in.metas)  # a function may have put real tensors anywhere
        return values

    def _calls(self, unit: Unit, phase: Phase) -> Iterator[_Call]:
        for fqn, module in self._modules(unit):
            function = self._function(phase, fqn, module)
            if function is not None:
                is_inside = fqn == unit.fqn or (unit.is_block and fqn.startswith(f"{unit.fqn}."))
                yield _Call(phase, fqn, module, is_inside, function)

    def _do(self, call: _Call, unit: Unit, scratch: int | None) -> _Guard:
        """Make one call, and give what watched over it.

        Args:
            call: The call.
            unit: The unit that has memory.
            scratch: Where a module around the unit cannot work with its own tensors on meta: the byte that these are
                full of in memory that is thrown away. None: they are on meta.
        """
        # Functions that draw for all of a model's tensors must not give every block the same.
        # What peft trains beside its original starts as a copy of it: it draws what the original would.
        name = plain_name(f"{call.fqn}.", self.moved) if self.moved else None
        drawn_as = call.fqn if name is None else name.removesuffix(".")
        seed_generators(self.seed, call.phase, drawn_as, *(() if call.is_inside else (unit.fqn,)))
        own: dict[str, torch.Tensor] = {}
        if scratch is not None and not call.is_inside:
            own = {fqn: poisoned(self.stand_in.metas[fqn], scratch) for fqn in self.stand_in.direct(call.fqn)}
        guard = _Guard(own.values())
        try:
            with self.stand_in.holding(own), guard:
                call.function()
        except Exception as error:  # whatever a foreign function raises
            kind = _FailedAroundError if scratch is None and not call.is_inside else MaterializeError
            raise kind(
                f"{self._blame(call)} fails: {type(error).__name__}: {error}\n"
                f"  only the tensors of {unit.fqn or 'the module itself'} have memory in this call, all others are on "
                "meta: functions may fill those, but not read them"
            ) from error
        return guard

    def _checked(self, call: _Call, unit: Unit, names: frozenset[str], guard: _Guard) -> dict[str, torch.Tensor]:
        """Give the tensors of the unit after a call; raise if it changed what the model is made of."""
        blame = self._blame(call)
        if added := sorted(tensor_names(self.stand_in.module.get_submodule(unit.fqn)) - names):
            raise MaterializeError(
                f"{blame} adds {unit.fqn and f'{unit.fqn}.'}{added[0]}\n"
                "  what the model is made of is settled at compile: change it before"
            )
        values = {fqn: self.stand_in.held(fqn, blame) for fqn in unit.tensors}
        seen: dict[int, str] = {}
        for fqn, tensor in values.items():
            other = seen.setdefault(_storage(tensor), fqn)
            if other != fqn and tensor.numel():
                raise MaterializeError(
                    f"{blame} ties {fqn} to {other}\n  ties are settled at compile: tie them in the model's constructor"
                )
            if tensor.numel() and guard.is_scratch(tensor):
                raise MaterializeError(
                    f"{blame} computes {fqn} from the module's own tensors\n"
                    "  these are drawn elsewhere: give the module below values that do not depend on them"
                )
        return values

    def _blame(self, call: _Call) -> str:
        what = "reset_parameters" if call.phase == "reset" else "init=" if callable(self.init) else "_init_weights"
        return f"{what} on {call.fqn or 'the model'} ({type(call.module).__qualname__})"

    def _modules(self, unit: Unit) -> Iterator[tuple[str, nn.Module]]:
        """Yield the modules of a unit, children first, then those around it, inner ones first."""
        top = self.stand_in.module.get_submodule(unit.fqn)
        yield from self._children_first(unit.fqn, top) if unit.is_block else [(unit.fqn, top)]
        fqn = unit.fqn
        while fqn:
            fqn = fqn.rpartition(".")[0]
            yield fqn, self.stand_in.module.get_submodule(fqn)

    def _children_first(self, fqn: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        for name, child in module.named_children():
            below = f"{fqn}.{name}"
            if self.stand_in.module_fqns.get(id(child)) == below:  # else it belongs to the unit that names it first
                yield from self._children_first(below, child)
        yield fqn, module

    def _function(self, phase: Phase, fqn: str, module: nn.Module) -> Callable[[], Any] | None:
        if self._is_added(f"{fqn}."):
            return None  # whatever init is: an adapter starts as peft starts it
        if phase == "reset":
            reset = _reset_function(module)
            if reset is None or not parametrize.is_parametrized(module):
                return reset
            return lambda: _reset_parametrized(module, self.skeleton.get_submodule(fqn))
        if not isinstance(self.init, str | None):
            init = self.init
            return lambda: init(module)
        method = self._huggingface_method(fqn)
        return None if method is None else lambda: method(module)

    def _huggingface_method(self, fqn: str) -> InitFunction | None:
        """Find the ``_init_weights`` of the innermost Hugging Face model around a module, or of itself."""
        while True:
            module = self.stand_in.module.get_submodule(fqn)
            if is_huggingface(module):
                method: InitFunction = module._init_weights  # type: ignore[assignment]
                return method
            if not fqn:
                return None
            fqn = fqn.rpartition(".")[0]

    def _unit_of(self, fqn: str) -> tuple[str, bool]:
        """Give the outermost block that holds a tensor, else its owner, and whether it is a block."""
        owner = fqn.rpartition(".")[0]
        parts = owner.split(".")
        for length in range(len(parts)):
            prefix = ".".join(parts[: length + 1])
            if prefix in self.blocks:
                return prefix, True
        return owner, False


def is_huggingface(module: nn.Module) -> bool:
    """Tell whether a module is a model of transformers, which can initialise what is inside it."""
    return all(callable(getattr(module, name, None)) for name in ("initialize_weights", "_init_weights"))


def has_reset(module: nn.Module) -> bool:
    """Tell whether a module can reset its own tensors."""
    return _reset_function(module) is not None


class _Guard(TorchFunctionMode):
    """Let functions write tensors outside of the unit, and notice values that are computed from them.

    Torch itself raises in most cases where a value would come from meta, but ``real.add_(meta)`` does nothing; and
    ``meta.data = real`` raises. Scratch memory is followed through all that is computed from it.
    """

    def __init__(self, scratch: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self._scratch = {_storage(tensor): tensor for tensor in scratch}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = leaves((args, kwargs))
        is_mixed = len({tensor.is_meta for tensor in given}) == 2
        is_followed = bool(self._scratch) and any(self.is_scratch(tensor) for tensor in given)
        if is_mixed and func == _SET_DATA and given[0].is_meta:
            return None
        if len(given) == 1 and given[0].is_meta and getattr(func, "__name__", "") in _SLOW_ON_META:
            return given[0]
        result = func(*args, **kwargs)
        if is_mixed or is_followed:
            for tensor in leaves(result) or given[:1]:
                if tensor.is_meta:
                    continue
                if is_mixed:
                    raise RuntimeError(f"{getattr(func, '__name__', func)} reads a tensor of another module")
                self._scratch[_storage(tensor)] = tensor
        return result

    def is_scratch(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is scratch memory, or was computed from it."""
        return not tensor.is_meta and _storage(tensor) in self._scratch


_SLOW_ON_META = ("normal_", "uniform_")  # 0.4 ms each in torch 2.13, and functions may call them on a whole model
_SET_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _reset_function(module: nn.Module) -> Callable[[], Any] | None:
    """Find a module's ``reset_parameters``; some of torch's own classes spell it with an underscore."""
    reset = getattr(module, "reset_parameters", None)
    if reset is None:
        homes = [cls.__module__ for cls in type(module).__mro__ if "_reset_parameters" in vars(cls)]
        if homes and homes[0].startswith("torch.nn."):
            reset = getattr(module, "_reset_parameters", None)
    return reset if callable(reset) and _takes_nothing(reset) else None


def _takes_nothing(function: Callable[..., Any]) -> bool:
    try:
        inspect.signature(function).bind()
    except TypeError:
        return False
    return True


def _reset_parametrized(module: nn.Module, faked: nn.Module) -> None:
    """Reset a parametrized module as its constructor did: before it was parametrized.

    Its computed attributes (``weight``) would take what is written and forget it. They are reset as plain tensors and
    then taken back through the parametrizations to the tensors that these keep.

    Args:
        module: The module.
        faked: Its twin in the skeleton, which can compute shapes.
    """
    plain: nn.Module = object.__new__(parametrize.type_before_parametrizations(module))
    vars(plain).update(vars(module))
    for registry in ("_parameters", "_buffers", "_modules"):
        vars(plain)[registry] = dict(vars(module)[registry])
    lists: nn.ModuleDict = module.parametrizations  # type: ignore[assignment]
    del plain.parametrizations
    for name in lists:
        plain.register_parameter(name, nn.Parameter(poisoned(getattr(faked, name), POISON), requires_grad=False))
    reset = _reset_function(plain)
    assert reset is not None
    reset()
    for name, parametrizations in lists.items():
        value = getattr(plain, name).detach()
        if not looks_untouched(value):
            _take_back(parametrizations, value)


def _take_back(parametrizations: nn.Module, value: Any) -> None:
    """Write what a computed tensor should be into the tensors it is computed from; those on meta stay there."""
    step: Any
    for step in reversed(list(parametrizations.children())):
        # One without an inverse keeps the value as it is, as torch does when it registers one.
        with contextlib.suppress(NotImplementedError):
            value = step.right_inverse(value) if hasattr(step, "right_inverse") else value
    if isinstance(value, torch.Tensor):
        originals = {"original": value}
    else:
        originals = {f"original{index}": part for index, part in enumerate(value)}
    for name, part in originals.items():
        getattr(parametrizations, name).copy_(part)
