"""Random numbers that depend on neither the number of stages, nor the schedule, nor which blocks are opened.

Invariants:

- The numbers of a draw follow from its ``Draw`` and the microbatch's seed alone: seed, step, microbatch, replica, place
  in the model, and how often that was reached.
- A recomputation draws what the forward drew.
- The generators stand after a microbatch where they stood before it: the user's own draws do not notice.

Before every call that draws, the default generators are seeded from the identity of that call, its ``Draw``. Calls in
an opened block are nodes of the stage's graph, and the lowered graph seeds them. Inside a closed block, which runs as
the user's own module, hooks on the drawing modules do.

Activation checkpointing runs a part of the forward again during the backward. It puts back the generators' states
itself; what the hooks need to go on from there is kept beside, at the call of ``torch.utils.checkpoint``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from fxpipe._torch import watched_checkpoints
from fxpipe.program import Draw, DrawScope

_ENTRY = -1  # the index that stands for entering a module, before it draws


def microbatch_seed(seed: int, step: int, microbatch: int, replica: int = 0) -> int:
    """Give the seed of one microbatch's draws, of 31 bits.

    Args:
        seed: The user's seed.
        step: Which step it is, from 0.
        microbatch: Position of the microbatch in the step's batch.
        replica: Position along the data-parallel dimension.

    >>> microbatch_seed(0, 3, 1) == microbatch_seed(0, 3, 1), microbatch_seed(0, 3, 1) == microbatch_seed(0, 3, 2)
    (True, False)
    """
    return _hash(31, seed, step, microbatch, replica)


@dataclass(frozen=True, slots=True)
class DrawRules:
    """How the modules of a program draw.

    Attributes:
        modules: ``Program.drawing``.
        names: ``Program.draw_names``.
    """

    modules: Mapping[str, Literal["once", "each"]]
    names: frozenset[str]


@dataclass(frozen=True, slots=True)
class _Moment:
    """Where in a block call the draws stand: what the hooks need to go on."""

    block: int
    rules: DrawRules
    calls: Mapping[str, int]


class Randomness:
    """The random numbers of one stage: seeds its device's default generators, and the CPU's."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._generators = _default_generators(device)
        # Where a stage is compiled whole: dynamo does not follow hashlib.
        self.hash: Callable[..., int] = torch.compiler.disable(_hash)  # type: ignore[no-untyped-call]
        self._now: _Moment | None = None
        self._seed: int | None = None
        self._running: list[tuple[object, _SeedEachCall | None]] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> Randomness:
        return Randomness(self._device)  # a copied generator would be no default one

    @contextmanager
    def drawing(self, microbatch: int, rules: DrawRules) -> Iterator[MicrobatchDraws]:
        """Draw the numbers of one microbatch, and give the generators back as they were.

        Args:
            microbatch: Its ``microbatch_seed``.
            rules: How the modules of its program draw.

        Yields:
            What the lowered graph calls before it draws.
        """
        states = [generator.get_state() for generator in self._generators]
        try:
            with watched_checkpoints(self._resumption):
                yield MicrobatchDraws(self, microbatch, rules)
        finally:
            for generator, state in zip(self._generators, states, strict=True):
                generator.set_state(state)
            self._now = self._seed = None

    def watch(self, module: nn.Module, fqn: str) -> None:
        """Hook a module that draws, or one inside of it, whose own calls must not count as that one's.

        Nothing happens in it while it runs outside of a stage, or compiled.
        """
        running = self._running
        token = object()

        def before(_module: nn.Module, _args: Any) -> None:
            moment = None if torch.compiler.is_compiling() else self._moment()
            kind = moment and moment.rules.modules.get(fqn)
            if moment is None or kind is None:
                if running:
                    running.append((token, None))
                return
            call = moment.calls.get(fqn, 0)
            self._now = _Moment(moment.block, moment.rules, {**moment.calls, fqn: call + 1})
            self.seed(moment.block, fqn, call, 0)
            mode = _SeedEachCall(self, moment, fqn, call) if kind == "each" else None
            if mode is not None:
                mode.__enter__()  # type: ignore[no-untyped-call]
            running.append((token, mode))

        def after(_module: nn.Module, _args: Any, _output: Any) -> None:
            if running and running[-1][0] is token:
                _, mode = running.pop()
                if mode is not None:
                    mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]

        module.register_forward_pre_hook(before)
        # Recomputation stops with an exception as soon as it has what it needs: what began must end then too.
        module.register_forward_hook(after, always_call=True)

    def enter(self, block: int, rules: DrawRules, fqn: str, scope: DrawScope) -> None:
        """Begin a module call that draws inside."""
        self._now = _Moment(block, rules, dict(scope.first_calls))
        self.seed(block, fqn, self.hash(32, *scope.first_calls), _ENTRY)

    def leave(self) -> None:
        """Say that no module call with draws inside runs."""
        self._now = None

    def seed(self, block: int, fqn: str, call: int, index: int) -> None:
        """Seed the generators for one draw.

        Torch's CPU generator uses the low 32 bits alone, so that they depend on everything.
        """
        self._seed = block << 32 | self.hash(32, block, fqn, call, index)
        for generator in self._generators:
            generator.manual_seed(self._seed)

    def innermost(self) -> _SeedEachCall | None:
        """Give the function mode of the innermost drawing module that runs, if it has one."""
        return self._running[-1][1] if self._running else None

    def _moment(self) -> _Moment | None:
        """Give where the draws stand; None outside of the stage, and where the user's module has seeded for itself."""
        return self._now if self._generators[0].initial_seed() == self._seed else None

    def _resumption(self, _function: Callable[..., Any], _reentrant: bool) -> AbstractContextManager[None]:
        return _Resumption(self)

    @contextmanager
    def _resumed(self, now: _Moment | None, seed: int | None, mode: _SeedEachCall | None) -> Iterator[None]:
        """Go on from an earlier moment."""
        outer = self._now, self._seed, len(self._running)
        self._now, self._seed = now, seed
        self._running.append((None, mode))
        try:
            with watched_checkpoints(self._resumption), mode or nullcontext():
                yield
        finally:
            self._now, self._seed = outer[:2]
            del self._running[outer[2] :]


class _Resumption:
    """Where the draws stand at a call of ``torch.utils.checkpoint``, to go on from in every recomputation."""

    def __init__(self, randomness: Randomness) -> None:
        self._randomness = randomness
        self._now, self._seed = randomness._now, randomness._seed
        mode = randomness.innermost()
        self._mode = mode.copy() if mode else None
        self._stack = ExitStack()

    def __enter__(self) -> None:
        mode = self._mode.copy() if self._mode else None
        self._stack.enter_context(self._randomness._resumed(self._now, self._seed, mode))

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)


class MicrobatchDraws:
    """What a lowered graph calls before its draws."""

    def __init__(self, randomness: Randomness, microbatch: int, rules: DrawRules) -> None:
        self._randomness = randomness
        self._microbatch = microbatch
        self._rules = rules
        self._blocks: dict[tuple[str, int], int] = {}

    def seed(self, draw: Draw) -> None:
        """Seed for a function that draws."""
        self._randomness.leave()
        self._randomness.seed(self._block(draw.block, draw.block_call), draw.fqn, draw.call, draw.index)

    def enter(self, fqn: str, scope: DrawScope) -> None:
        """Seed for a module call with draws inside."""
        self._randomness.enter(self._block(scope.block, scope.block_call), self._rules, fqn, scope)

    def _block(self, fqn: str, call: int) -> int:
        key = (fqn, call)
        if key not in self._blocks:
            self._blocks[key] = self._randomness.hash(31, self._microbatch, fqn, call)
        return self._blocks[key]


class _SeedEachCall(TorchFunctionMode):
    """Seeds before each drawing call that one module's forward makes itself."""

    def __init__(self, randomness: Randomness, moment: _Moment, fqn: str, call: int) -> None:
        super().__init__()
        self._randomness = randomness
        self._names = moment.rules.names
        self._block = moment.block
        self._fqn = fqn
        self._call = call
        self._moment = moment
        self._index = 0

    def copy(self) -> _SeedEachCall:
        """Give another one that stands at the same draw."""
        copied = _SeedEachCall(self._randomness, self._moment, self._fqn, self._call)
        copied._index = self._index
        return copied

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if torch.compiler.is_compiling():
            return func(*args, **(kwargs or {}))
        # The modes of the modules around this one hear of the call as well; it is not theirs.
        if getattr(func, "__name__", "") in self._names and self._randomness.innermost() is self:
            self._randomness.seed(self._block, self._fqn, self._call, self._index)
            self._index += 1
        return func(*args, **(kwargs or {}))


def _default_generators(device: torch.device) -> tuple[torch.Generator, ...]:
    if device.type == "cpu":
        return (torch.default_generator,)
    module = torch.get_device_module(device)
    index = device.index if device.index is not None else module.current_device()
    return torch.default_generator, module.default_generators[index]


def _hash(bits: int, *parts: object) -> int:
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> (64 - bits)
