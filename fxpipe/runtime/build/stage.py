"""One stage as a module: its own parameters, buffers and submodules under the model's FQNs, and what it runs."""

from __future__ import annotations

import copy
import dataclasses
import functools
import linecache
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fxpipe._torch import FakeTensor, compiled_in_place
from fxpipe.errors import MaterializeError, PlanError
from fxpipe.ir.tree import map_tree
from fxpipe.program import MARKS, Program
from fxpipe.runtime.build.boundary import join
from fxpipe.runtime.build.holdings import PartModule as PartModule
from fxpipe.runtime.build.holdings import StageParts as StageParts
from fxpipe.runtime.build.holdings import held_whole, prefixes
from fxpipe.runtime.build.lower import Lowered, lower
from fxpipe.runtime.build.randomness import DrawRules, Randomness
from fxpipe.runtime.build.recompute import recompute_module
from fxpipe.runtime.build.unheld import Unheld, check_values, lie_in_own


@dataclass(frozen=True, slots=True, eq=False)
class _Installed:
    """A lowered program with what it needs to draw."""

    run: Lowered
    source: str
    rules: DrawRules
    draws: bool
    filename: str
    constants: frozenset[int]


class StageModule(nn.Module):
    """One stage: a tree with the model's own names, and the programs that run on it.

    Make it with ``build_stages``. What is registered below is the stage's part of the model and nothing else, so
    ``named_parameters`` gives the model's FQNs, and FSDP2, ``torch.compile`` and adapters can be applied as usual.
    """

    def __init__(
        self, stage_index: int, device: torch.device, spare: Callable[[str], nn.Module | None] = lambda fqn: None
    ) -> None:
        super().__init__()
        self._stage_index = stage_index
        self._spare = spare  # gives a module without tensors, which a variant may read on any stage
        self._device = device
        self._randomness = Randomness(device)
        self._watched: set[int] = set()  # ids of modules with hooks of ours
        self._programs: dict[Hashable, _Installed] = {}
        self._modules_called: frozenset[str] = frozenset()
        self._called: set[str] = set()  # by programs: what carries no tensor is not among those above
        self._lent: dict[Hashable, frozenset[int]] = {}  # of programs that have run once: results in own memory
        self._moved: dict[int, tuple[Any, Any]] = {}
        self._compiler: Callable[[Lowered], Lowered] | None = None
        self._recomputed: tuple[str, ...] = ()  # modules opened here whose calls are run again in the backward
        self._draws = False

    @property
    def stage_index(self) -> int:
        """Position of the stage in the pipeline."""
        return self._stage_index

    def extra_repr(self) -> str:
        """Name the stage in ``repr``."""
        return f"stage {self._stage_index} on {self._device}"

    def add_program(self, key: Hashable, program: Program) -> None:
        """Make the stage ready to run a variant of the model.

        Args:
            key: What ``forward`` calls the variant by; nothing happens where it is known.
            program: The variant; its graph for this stage is lowered.

        Raises:
            PlanError: It needs a module or tensor that this stage does not hold.
        """
        if key in self._programs:
            return
        own = program.stages[self._stage_index]
        self._called.update(own.modules)
        missing = [fqn for fqn in (*own.modules, *own.attributes) if not self._holds(fqn)]
        if missing:
            raise PlanError(
                f"stage {self._stage_index} does not hold {', '.join(missing)}, which this variant of the model reads\n"
                "  compile with an example (or in the mode) that takes this path: that plan serves the other one too"
            )
        constants = {name: self._on_device(program.constants[name]) for name in own.constants}
        is_last = self._stage_index == len(program.stages) - 1
        title = f"stage {self._stage_index}"
        run = lower(own, constants, self._device, is_last=is_last, title=title, recompute=self._recomputed)
        rules = DrawRules(program.drawing, frozenset(program.draw_names))
        used = frozenset(id(program.constants[name]) for name in own.constants)
        filename: str = getattr(run, "__code__").co_filename  # noqa: B009 - Lowered is any callable to mypy
        self._programs[key] = self._compiled(_Installed(run, run.__doc__ or "", rules, own.draws, filename, used))
        self._watch(program.drawing)

    def recompute(self, fqns: Iterable[str]) -> None:
        """Do not keep the activations of modules; their forward runs once more in the backward.

        Args:
            fqns: Of the modules; of one that is opened here what lies in this stage. Before ``add_program``.
        """
        opened = []
        for fqn in fqns:
            module = self._find(fqn)
            if isinstance(module, nn.Module) and not self._modules_called.isdisjoint(prefixes(fqn)):
                recompute_module(module, lambda: self._draws)
            else:
                opened.append(fqn)
        self._recomputed = tuple(opened)

    def opened(self) -> list[tuple[str, nn.Module]]:
        """List the modules that stand here and that no program calls, so far: it runs what lies in them."""
        called = self._modules_called | self._called
        return [(fqn, part) for fqn, part in self.named_modules() if fqn and called.isdisjoint(prefixes(fqn))]

    @property
    def num_programs(self) -> int:
        """Number of variants the stage is ready for."""
        return len(self._programs)

    def keep_programs(self, keys: Collection[Hashable]) -> None:
        """Let go of all variants but these, of their constants and their source."""
        for key in [key for key in self._programs if key not in keys]:
            linecache.cache.pop(self._programs.pop(key).filename, None)
            self._lent.pop(key, None)
        used = {constant for installed in self._programs.values() for constant in installed.constants}
        self._moved = {key: moved for key, moved in self._moved.items() if key in used}

    def source(self, key: Hashable) -> str:
        """Give the text of what a variant runs here, for people."""
        return self._programs[key].source

    def forward(
        self, key: Hashable, received: tuple[torch.Tensor, ...], inputs: Mapping[str, Any], draw_seed: int = 0
    ) -> tuple[torch.Tensor, ...]:
        """Run one microbatch.

        Args:
            key: The variant.
            received: Tensors of the stage before, in the order of ``StageProgram.received``.
            inputs: The model inputs read here, by name.
            draw_seed: The ``microbatch_seed`` of its random numbers.

        Returns:
            The flat tuple of ``StageProgram.graph``'s output. The generators' states are left as they were.
        """
        installed = self._programs[key]
        self.__dict__["_draws"] = installed.draws  # nn.Module looks at what is assigned: three µs a microbatch
        # Not leaves any more: a module may write into what it is given.
        received = join(received)
        if not installed.draws:
            results = installed.run(self, None, received, inputs)
        else:
            with self._randomness.drawing(draw_seed, installed.rules) as draws:
                results = installed.run(self, draws, received, inputs)
        lent = self._lent.get(key)
        if lent is None:
            check_values(results, f"stage {self._stage_index}")
            lent = self._lent[key] = lie_in_own(self, results)
        if lent:
            results = tuple(tensor.clone() if index in lent else tensor for index, tensor in enumerate(results))
        return join(results)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile what the stage runs, now and for variants to come; arguments as ``torch.compile``'s.

        What surrounds it stays as it is: the random states, and the node of the autograd graph at the boundaries.
        """
        self._compiler = functools.partial(torch.compile, *args, **kwargs)
        self._programs = {key: self._compiled(installed) for key, installed in self._programs.items()}

    @property
    def is_compiled(self) -> bool:
        """Whether ``compile`` was called."""
        return self._compiler is not None

    def _compiled(self, installed: _Installed) -> _Installed:
        if self._compiler is None:
            return installed
        return dataclasses.replace(installed, run=self._compiler(installed.run))

    def _watch(self, drawing: Mapping[str, str]) -> None:
        """Hook the drawing modules this stage holds, and what lies inside those that make several draws."""
        for fqn, kind in drawing.items():
            part = self._find(fqn)
            if not isinstance(part, nn.Module):
                continue
            for path, inner in part.named_modules(prefix=fqn) if kind == "each" else ((fqn, part),):
                if id(inner) not in self._watched:
                    self._watched.add(id(inner))
                    self._randomness.watch(inner, path)

    def _holds(self, fqn: str) -> bool:
        """Tell whether the stage has a module or tensor; one that carries nothing it may take now."""
        found = self._find(fqn)
        if isinstance(found, nn.Module | torch.Tensor):
            return not isinstance(found, PartModule)
        module = self._spare(fqn)
        if module is not None:
            owner, name = _owner(self, fqn)
            owner.add_module(name, module)
        return module is not None

    def _find(self, fqn: str) -> Any:
        found: Any = self
        for part in fqn.split(".") if fqn else ():
            found = getattr(found, part, None)
        return found

    def _on_device(self, constant: Any) -> Any:
        """Move the tensors of a constant, once for all variants that share it."""
        if id(constant) not in self._moved:
            moved = map_tree(lambda _, leaf: _to(leaf, self._device), constant)
            self._moved[id(constant)] = (constant, moved)
        return self._moved[id(constant)][1]


def build_stages(
    skeleton: nn.Module,
    parts: Sequence[StageParts],
    tensors: Mapping[str, torch.Tensor],
    aliases: Mapping[str, str],
    device: torch.device,
    *,
    compiled: Iterable[str] = (),
) -> list[StageModule]:
    """Build the stages of one rank from the model's structure and their values.

    Args:
        skeleton: The user's modules with fake tensors; not modified.
        parts: What each stage holds.
        tensors: The values, on ``device``, by first FQN. A parameter's value need not be a ``Parameter``; it becomes
            one that requires a gradient where the skeleton's does. Stages that share a tensor share the object.
        aliases: First FQN of every FQN of the model.
        device: Where the stages run.
        compiled: FQNs of modules compiled in place (``module.compile()``), which a copy is not.

    Returns:
        One module per part, in order.

    Raises:
        MaterializeError: A tensor a stage needs has no value, or a module cannot be copied.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1, bias=False))
    >>> (stage,) = build_stages(
    ...     model, [StageParts(1, ("1",), ())], {"1.weight": torch.ones(1, 3)}, {}, torch.device("cpu")
    ... )
    >>> {fqn: tuple(parameter.shape) for fqn, parameter in stage.named_parameters()}
    {'1.weight': (1, 3)}
    """
    values = _Values(skeleton, tensors, aliases, device)
    again = set(compiled)
    return [_build_stage(skeleton, part, values, device, again) for part in parts]


def build_whole(skeleton: nn.Module, stage: StageModule, aliases: Mapping[str, str]) -> nn.Module:
    """Build the user's model itself on the tensors of a stage that holds all of them.

    Args:
        skeleton: The user's modules with fake tensors; not modified.
        stage: A stage with every parameter and buffer of the model.
        aliases: First FQN of every FQN of the model.
    """
    held = {
        aliases.get(fqn, fqn): tensor
        for fqn, tensor in (
            *stage.named_parameters(remove_duplicate=False),
            *stage.named_buffers(remove_duplicate=False),
        )
    }
    values = _Values(skeleton, held, aliases, stage._device)
    return _clone(skeleton, "", dict(values.memo))


class _Values:
    """The tensors of one rank, as the modules will hold them."""

    def __init__(
        self, skeleton: nn.Module, tensors: Mapping[str, torch.Tensor], aliases: Mapping[str, str], device: torch.device
    ) -> None:
        self.memo: dict[int, Any] = {}
        self._aliases = aliases
        self._made: dict[str, torch.Tensor] = {}
        for prefix, module in skeleton.named_modules(remove_duplicate=False):
            start = f"{prefix}." if prefix else ""
            for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                first = aliases.get(start + name, start + name)
                if first in tensors and first not in self._made:
                    self._made[first] = _like(tensor, tensors[first])
                made = self._made.get(first)
                self.memo[id(tensor)] = made if made is not None else Unheld.of(first, tensor)
            self._add_plain(module, device)

    def find(self, fqn: str) -> torch.Tensor | None:
        """Give the value of a parameter or buffer of this rank."""
        return self._made.get(self._aliases.get(fqn, fqn))

    def _add_plain(self, module: nn.Module, device: torch.device) -> None:
        """Tensors that modules keep as plain attributes belong to nobody's share: move them, never copy them."""
        for name, value in vars(module).items():
            if name in ("_parameters", "_buffers", "_modules"):
                continue
            for item in _items(value):
                if isinstance(item, torch.Tensor):
                    self.memo.setdefault(id(item), _to(item, device))


def _build_stage(
    skeleton: nn.Module, part: StageParts, values: _Values, device: torch.device, compiled: set[str]
) -> StageModule:
    memo = dict(values.memo)

    def spare(fqn: str) -> nn.Module | None:
        path = dict(skeleton.named_modules(remove_duplicate=False))
        module = path.get(fqn)
        if module is None or next(module.parameters(), None) is not None or next(module.buffers(), None) is not None:
            return None
        return _clone(module, fqn, memo)

    stage = StageModule(part.stage_index, device, spare)
    stage._modules_called = frozenset(part.modules)
    missing = []
    stage.training = skeleton.training
    whole = held_whole(skeleton, part)
    # In the model's order, so that parameters come in it too; what lies inside another module held is there already.
    for fqn in _ordered(skeleton, part):
        for around in whole & set(prefixes(fqn)):  # the outermost alone; no other is one's prefix
            owner, name = _owner(stage, around, skeleton)
            if name not in owner._modules:
                owner.add_module(name, _clone(skeleton.get_submodule(around), around, memo))
        owner, name = _owner(stage, fqn, skeleton)
        if fqn in part.modules:
            if name not in owner._modules:
                owner.add_module(name, _clone(skeleton.get_submodule(fqn), fqn, memo))
            missing += _without_value(owner.get_submodule(name), fqn)
        elif (value := values.find(fqn)) is None:
            missing.append(fqn)
        elif name not in owner._parameters and name not in owner._buffers:
            _register(owner, name, value, _original_owner(skeleton, fqn))
    if missing:
        raise MaterializeError(
            f"stage {part.stage_index} got no value for {', '.join(dict.fromkeys(missing))}\n"
            "  pass one for every tensor of the stage"
        )
    _compile_again(skeleton, stage, compiled)
    return stage


def _ordered(skeleton: nn.Module, part: StageParts) -> list[str]:
    place = {fqn: index for index, (fqn, _) in enumerate(skeleton.named_modules(remove_duplicate=False))}
    places = {fqn: place[fqn] for fqn in part.modules}
    places.update((fqn, place[fqn.rpartition(".")[0]]) for fqn in part.attributes)
    return sorted(places, key=places.__getitem__)


def _clone(module: nn.Module, fqn: str, memo: dict[int, Any]) -> nn.Module:
    try:
        return copy.deepcopy(module, memo)
    except Exception as error:  # whatever a foreign __deepcopy__ raises
        raise MaterializeError(
            f"module {fqn} of type {type(module).__qualname__} cannot be copied: {type(error).__name__}: {error}\n"
            "  stages are copies of the model's modules; give what cannot be copied a __deepcopy__ that returns itself"
        ) from error


def _owner(stage: StageModule, fqn: str, skeleton: nn.Module | None = None) -> tuple[nn.Module, str]:
    """Give the module a name is registered in; a ``PartModule`` stands where the stage does not hold the model's.

    It has the training flag of the model's.
    """
    *path, name = fqn.split(".")
    owner: nn.Module = stage
    original = skeleton
    for part in path:
        original = original.get_submodule(part) if original is not None else None
        if part not in owner._modules:
            owner.add_module(part, PartModule.of(original, training=owner.training))
        owner = owner.get_submodule(part)
    return owner, name


def _register(owner: nn.Module, name: str, value: torch.Tensor, original: nn.Module) -> None:
    if isinstance(value, nn.Parameter):
        owner.register_parameter(name, value)
    else:
        owner.register_buffer(name, value, persistent=name not in original._non_persistent_buffers_set)


def _original_owner(skeleton: nn.Module, fqn: str) -> nn.Module:
    return skeleton.get_submodule(fqn.rpartition(".")[0])


def _without_value(module: nn.Module, fqn: str) -> list[str]:
    tensors = (*module.named_parameters(), *module.named_buffers())
    return [f"{fqn}.{name}" for name, tensor in tensors if isinstance(tensor, FakeTensor) or tensor.is_meta]


def _compile_again(skeleton: nn.Module, stage: StageModule, compiled: set[str]) -> None:
    for fqn, part in stage.named_modules():
        held_whole = not isinstance(part, StageModule | PartModule)
        if held_whole and (fqn in compiled or compiled_in_place(skeleton.get_submodule(fqn))):
            part.compile()


def _like(original: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    if not isinstance(original, nn.Parameter) or isinstance(value, nn.Parameter):
        return value
    made = nn.Parameter(value.detach(), requires_grad=original.requires_grad)
    vars(made).update(getattr(original, MARKS, {}))
    return made


def _items(value: Any) -> Iterable[Any]:
    if isinstance(value, list | tuple):
        return value
    return value.values() if isinstance(value, dict) else (value,)


def _to(leaf: Any, device: torch.device) -> Any:
    if not isinstance(leaf, torch.Tensor) or isinstance(leaf, FakeTensor) or leaf.is_meta:
        return leaf
    return leaf.to(device)
