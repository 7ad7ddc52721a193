"""Run one module for real on zeros, where fake tensors cannot say what it returns."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fxpipe._torch import FakeTensor, without_functions, without_modes
from fxpipe.capture.calls.blocked import Blocked
from fxpipe.capture.calls.values import Same, tensors_in
from fxpipe.capture.calls.zero_inputs import as_fakes, on_zeros
from fxpipe.capture.model.skeleton import named_tensors
from fxpipe.capture.record.forward import Forward
from fxpipe.capture.record.frames import Frame
from fxpipe.ir.cost import LayerCounts
from fxpipe.ir.tree import tree_leaves


@dataclass(frozen=True, slots=True, eq=False)
class _Run:
    """What a module did on zeros: the same for every module of one kind.

    Attributes:
        result: What it returned.
        counts: What it does, None uncounted.
        frames: The calls inside, with the FQN of the module at which the run was made.
        fqn: That FQN.
    """

    result: Any
    counts: LayerCounts | None
    frames: tuple[Frame, ...]
    fqn: str


class ZeroRuns:
    """Runs modules that look at values which fake tensors do not have; each kind of module once.

    Weights are one zero each, expanded, so they take no memory; only the module asked for is computed.
    """

    def __init__(self) -> None:
        self._runs: dict[Any, _Run] = {}

    def run_module(
        self, forward: Forward, frame: Frame, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, LayerCounts | None]:
        """Run (and count) a module, and note the random numbers that it draws.

        Args:
            forward: The forward, which hears of the calls inside.
            frame: The call, begun anew.
            args: Arguments, with fake tensors.
            kwargs: Keyword arguments, likewise.

        Returns:
            What the module returns, with fake tensors, and its counts.

        Raises:
            Blocked: The shape of what it returns depends on values.
        """
        frame.clear()
        with without_functions(), without_modes():
            key = _kind(frame.module, args, kwargs)
        run = self._runs.get(key)
        if run is None:
            run = self._run(forward, frame, args, kwargs, key)
            self._compare(forward, frame, args, kwargs, run)
            self._runs[key] = run
        else:
            _replay(forward, frame, run)
        given = {id(tensor) for tensor in tensors_in(args, kwargs) if not isinstance(tensor, FakeTensor)}
        return as_fakes(run.result, forward.skeleton.mode, lambda tensor: id(tensor) in given), run.counts

    def _run(self, forward: Forward, frame: Frame, args: tuple[Any, ...], kwargs: dict[str, Any], key: Any) -> _Run:
        with without_functions(), without_modes():
            call, real_args, real_kwargs = on_zeros(frame.module, args, kwargs)
        forward.on_zeros = {id(part): f"{frame.fqn}.{name}" for name, part in call.named_modules() if name}
        forward.on_zeros[id(call)] = frame.fqn
        start = len(forward.frames.all)
        frame.module = call  # so that its call is known for the one that has begun
        try:
            with without_modes():
                result = call(*real_args, **real_kwargs)
            counts = None
            if forward.counts.counter is not None:
                with without_functions(), without_modes():
                    counts = forward.counts.counter.counts(call, real_args, real_kwargs, ("zeros", key), ())
        finally:
            forward.on_zeros = {}
            frame.module = forward.skeleton.module.get_submodule(frame.fqn)
        frames = (frame, *forward.frames.all[start:])
        return _Run(result, counts, tuple(map(copy.copy, frames)), frame.fqn)

    def _compare(
        self, forward: Forward, frame: Frame, args: tuple[Any, ...], kwargs: dict[str, Any], run: _Run
    ) -> None:
        """Run a module on other values than zeros: another path through it may take a gradient, or give other shapes.

        Raises:
            Blocked: The shape of what it returns depends on values.
        """
        with without_functions(), without_modes():
            call, real_args, real_kwargs = on_zeros(frame.module, args, kwargs, other=True)
            forward.counting = True
            tensors = tensors_in(run.result)
            try:
                other = tensors_in(call(*real_args, **real_kwargs))
            except Exception:  # whatever the module raises for values that make no sense
                other = tensors
            finally:
                forward.counting = False
            if [tensor.shape for tensor in tensors] != [tensor.shape for tensor in other]:
                raise Blocked("the shape of what it returns depends on values that are not known", frame.fqn)
            for tensor, another in zip(tensors, other, strict=True):
                if another.requires_grad and not tensor.requires_grad:
                    tensor.requires_grad_()


def _kind(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Give what decides how a module runs: its structure, plain attributes, and shapes."""
    tensors = [*tensors_in(args, kwargs), *(tensor for _, tensor in named_tensors(module))]
    literals = [leaf for _, leaf in tree_leaves((args, dict(kwargs))) if isinstance(leaf, bool | int | float | str)]
    attributes = [
        (name, value)
        for part in module.modules()
        for name, value in vars(part).items()
        if isinstance(value, bool | int | float | str)
    ]
    shapes = tuple((tuple(tensor.shape), tensor.dtype, tensor.requires_grad) for tensor in tensors)
    values = tuple(Same(tensor) for tensor in tensors if not isinstance(tensor, FakeTensor))
    return type(module), repr(module), shapes, values, repr(literals), repr(attributes), torch.is_grad_enabled()


def _replay(forward: Forward, frame: Frame, run: _Run) -> None:
    """Note the draws of an earlier run of another module of the same kind."""
    length = len(run.fqn)
    first, *inside = run.frames
    for earlier in inside:
        fqn = frame.fqn + earlier.fqn[length:]
        entered = forward.frames.enter(fqn, forward.skeleton.module.get_submodule(fqn))
        _repeat(entered, earlier, frame.fqn, length)
        forward.frames.leave()
    _repeat(frame, first, frame.fqn, length)


def _repeat(frame: Frame, earlier: Frame, fqn: str, length: int) -> None:
    frame.functions[:] = earlier.functions
    frame.drew[:] = earlier.drew
    frame.inside.update({fqn + name[length:]: None for name in earlier.inside})
