"""Run one module for real on zeros, where fake tensors cannot say what it returns."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fxpipe._torch import FakeTensor, without_functions, without_modes
from fxpipe.capture.calls.alike import Reads, structure_of, watched_reads
from fxpipe.capture.calls.blocked import Blocked
from fxpipe.capture.calls.values import Same, tensors_in
from fxpipe.capture.calls.zero_inputs import as_fakes, on_zeros
from fxpipe.capture.record.forward import Forward
from fxpipe.capture.record.frames import Frame
from fxpipe.ir.cost import LayerCounts


@dataclass(frozen=True, slots=True, eq=False)
class _Run:
    """What a module did on zeros: the same for every module of one kind.

    Attributes:
        result: What it returned.
        counts: What it does, None uncounted.
        frames: The calls inside, with the FQN of the module at which the run was made.
        fqn: That FQN.
        reads: What attributes it read.
    """

    result: Any
    counts: LayerCounts | None
    frames: tuple[Frame, ...]
    fqn: str
    reads: Reads


class ZeroRuns:
    """Runs modules that look at values which fake tensors do not have; each kind of module once.

    Weights are one zero each, expanded, so they take no memory; only the module asked for is computed. Small buffers of
    integers have their values where those are known: a module reads its stride or its padding there.
    """

    def __init__(self) -> None:
        self._runs: dict[Any, list[_Run]] = {}

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
        with without_functions():
            key = structure_of(frame.module, args, kwargs)
            numbers = _numbers(forward, frame.module)
        alike = self._runs.setdefault((key, numbers), []) if key is not None else []
        run = next((run for run in alike if run.reads.hold_in(frame.module)), None)
        if run is None:
            run = self._run(forward, frame, args, kwargs)
            self._compare(forward, frame, args, kwargs, run)
            alike.append(run)
        else:
            _replay(forward, frame, run)
        given = {id(tensor) for tensor in tensors_in(args, kwargs) if not isinstance(tensor, FakeTensor)}
        return as_fakes(run.result, forward.skeleton.mode, lambda tensor: id(tensor) in given), run.counts

    def _run(self, forward: Forward, frame: Frame, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Run:
        with without_functions(), without_modes():
            call, real_args, real_kwargs = on_zeros(frame.module, args, kwargs, skeleton=forward.skeleton)
        forward.on_zeros = {id(part): f"{frame.fqn}.{name}" for name, part in call.named_modules() if name}
        forward.on_zeros[id(call)] = frame.fqn
        start = len(forward.frames.all)
        frame.module = call  # so that its call is known for the one that has begun
        try:
            with without_modes(), watched_reads(call) as reads:
                result = call(*real_args, **real_kwargs)
            counts = None
            if forward.counts.counter is not None:
                with without_functions(), without_modes():
                    counts = forward.counts.counter.counts(call, real_args, real_kwargs, (Same(call),), ())
        finally:
            forward.on_zeros = {}
            frame.module = forward.skeleton.module.get_submodule(frame.fqn)
        frames = (frame, *forward.frames.all[start:])
        return _Run(result, counts, tuple(map(copy.copy, frames)), frame.fqn, reads)

    def _compare(
        self, forward: Forward, frame: Frame, args: tuple[Any, ...], kwargs: dict[str, Any], run: _Run
    ) -> None:
        """Run a module on other values than zeros: another path through it may take a gradient, or give other shapes.

        Raises:
            Blocked: The shape of what it returns depends on values.
        """
        with without_functions(), without_modes():
            tensors = tensors_in(run.result)
            for span in _SPANS:
                if span is not _SPANS[0] and not any(_lacks_gradient(tensor) for tensor in tensors):
                    break
                other = self._other(forward, frame, args, kwargs, span)
                if other is None:
                    continue
                if [tensor.shape for tensor in tensors] != [tensor.shape for tensor in other]:
                    raise Blocked("the shape of what it returns depends on values that are not known", frame.fqn)
                for tensor, another in zip(tensors, other, strict=True):
                    if another.requires_grad and not tensor.requires_grad:
                        tensor.requires_grad_()

    def _other(
        self,
        forward: Forward,
        frame: Frame,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        span: tuple[float, float],
    ) -> list[torch.Tensor] | None:
        """Give what a module returns for other values; None where it raises something for them."""
        call, real_args, real_kwargs = on_zeros(frame.module, args, kwargs, span=span, skeleton=forward.skeleton)
        forward.counting = True
        try:
            return tensors_in(call(*real_args, **real_kwargs))
        except Exception:  # whatever the module raises for values that make no sense
            return None
        finally:
            forward.counting = False


_SPANS = ((-1.0, 1.0), (0.1, 100.0), (-100.0, -0.1))
"""What values rise from and to in further runs: those after the first only where a result takes no gradient yet."""


def _lacks_gradient(tensor: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and tensor.is_floating_point() and not tensor.requires_grad


def _numbers(forward: Forward, module: nn.Module) -> tuple[Any, ...]:
    """Give the values that buffers of a module have in its run on zeros."""
    found = ((name, forward.skeleton.number_in(buffer)) for name, buffer in module.named_buffers())
    with without_modes():
        return tuple((name, repr(value.tolist())) for name, value in found if value is not None)


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
