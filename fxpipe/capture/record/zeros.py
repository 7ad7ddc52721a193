"""Run one module for real on zeros, where fake tensors cannot say what it returns."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fxpipe._torch import FakeTensor, without_functions, without_modes
from fxpipe.capture.model.skeleton import Skeleton, named_tensors
from fxpipe.capture.record.calls import tensors_in
from fxpipe.capture.record.frames import Frame
from fxpipe.capture.record.recorder import Blocked
from fxpipe.ir.cost import LayerCounts
from fxpipe.ir.tree import map_tree, tree_leaves

if TYPE_CHECKING:
    from fxpipe.capture.record.counting import LayerCounter
    from fxpipe.capture.record.observe import Observer


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


class Zeros:
    """Runs modules that look at values which fake tensors do not have; each kind of module once.

    Weights are one zero each, expanded, so they take no memory; only the module asked for is computed.
    """

    def __init__(self, skeleton: Skeleton) -> None:
        self._skeleton = skeleton
        self._runs: dict[Any, _Run] = {}
        self._fqns: dict[int, str] = {}

    @property
    def is_running(self) -> bool:
        """Whether a module is computing on zeros now."""
        return bool(self._fqns)

    def fqn_of(self, module: nn.Module) -> str | None:
        """Give the FQN that a copied module stands for while it runs."""
        return self._fqns.get(id(module)) if self._fqns else None

    def run_module(
        self, observer: Observer, frame: Frame, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, LayerCounts | None]:
        """Run (and count) a module, and note the random numbers that it draws.

        Args:
            observer: Hears of the calls inside.
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
            run = self._run(observer, frame, args, kwargs)
            self._compare(observer, frame, args, kwargs, run)
            self._runs[key] = run
        else:
            _replay(observer, frame, run)
        given = {id(tensor) for tensor in tensors_in(args, kwargs) if not isinstance(tensor, FakeTensor)}
        return as_fakes(run.result, self._skeleton.mode, lambda tensor: id(tensor) in given), run.counts

    def _run(self, observer: Observer, frame: Frame, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Run:
        with without_functions(), without_modes():
            call, real_args, real_kwargs = on_zeros(frame.module, args, kwargs)
        self._fqns = {id(part): f"{frame.fqn}.{name}" for name, part in call.named_modules() if name}
        self._fqns[id(call)] = frame.fqn
        start = len(observer.frames.all)
        frame.module = call  # so that its call is known for the one that has begun
        try:
            with without_modes():
                result = call(*real_args, **real_kwargs)
            counts = None
            if observer.counter is not None:
                with without_functions(), without_modes():
                    counts = observer.counter.counts(call, real_args, real_kwargs, ("zeros", id(call)), ())
        finally:
            self._fqns = {}
            frame.module = self._skeleton.module.get_submodule(frame.fqn)
        frames = (frame, *observer.frames.all[start:])
        return _Run(result, counts, tuple(map(copy.copy, frames)), frame.fqn)

    def _compare(
        self, observer: Observer, frame: Frame, args: tuple[Any, ...], kwargs: dict[str, Any], run: _Run
    ) -> None:
        """Run a module on other values than zeros: another path through it may take a gradient, or give other shapes.

        Raises:
            Blocked: The shape of what it returns depends on values.
        """
        with without_functions(), without_modes():
            call, real_args, real_kwargs = on_zeros(frame.module, args, kwargs, other=True)
            observer.counting = True
            tensors = _tensors(run.result)
            try:
                other = _tensors(call(*real_args, **real_kwargs))
            except Exception:  # whatever the module raises for values that make no sense
                other = tensors
            finally:
                observer.counting = False
            if [tensor.shape for tensor in tensors] != [tensor.shape for tensor in other]:
                raise Blocked("the shape of what it returns depends on values that are not known", frame.fqn)
            for tensor, another in zip(tensors, other, strict=True):
                if another.requires_grad and not tensor.requires_grad:
                    tensor.requires_grad_()

    def run_function(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], *, exact: bool = False
    ) -> Any:
        """Run a function and give what it returns, with fake tensors.

        Args:
            function: The function.
            args: Arguments, with fake tensors.
            kwargs: Keyword arguments, likewise.
            exact: Whether integers in the result depend on real arguments alone; they stay real.
        """
        with without_modes(), without_functions():
            call, real_args, real_kwargs = on_zeros(function, args, kwargs)
            result = call(*real_args, **real_kwargs)
        return as_fakes(result, self._skeleton.mode, lambda tensor: exact and not tensor.is_floating_point())

    def counts(
        self,
        counter: LayerCounter,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        trace: Any,
        attention: tuple[str, ...],
    ) -> LayerCounts:
        """Count a call on zeros."""
        with without_functions(), without_modes():
            call, real_args, real_kwargs = on_zeros(function, args, kwargs)
            return counter.counts(call, real_args, real_kwargs, trace, attention)


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
    values = tuple(id(tensor) for tensor in tensors if not isinstance(tensor, FakeTensor))
    return type(module), repr(module), shapes, values, repr(literals), repr(attributes), torch.is_grad_enabled()


def _replay(observer: Observer, frame: Frame, run: _Run) -> None:
    """Note the draws of an earlier run of another module of the same kind."""
    length = len(run.fqn)
    first, *inside = run.frames
    for earlier in inside:
        fqn = frame.fqn + earlier.fqn[length:]
        entered = observer.frames.enter(fqn, observer.skeleton.module.get_submodule(fqn))
        _repeat(entered, earlier, frame.fqn, length)
        observer.frames.leave()
    _repeat(frame, first, frame.fqn, length)


def _repeat(frame: Frame, earlier: Frame, fqn: str, length: int) -> None:
    frame.functions[:] = earlier.functions
    frame.drew[:] = earlier.drew
    frame.inside.update({fqn + name[length:]: None for name in earlier.inside})


def on_zeros(
    function: nn.Module | Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    other: bool = False,
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Give a function and arguments in which real zeros stand for fake tensors; to be called without modes.

    Args:
        function: The function.
        args: Its arguments.
        kwargs: Its keyword arguments.
        other: Whether parameters and integers are ones, and other arguments rise from -1 to 1, instead.
    """
    if isinstance(function, nn.Module):
        memo: dict[int, Any] = {id(tensor): _weight(tensor, other) for _, tensor in named_tensors(function)}
        function = copy.deepcopy(function, memo)
    real_args, real_kwargs = map_tree(lambda _, leaf: _real(leaf, other), (args, dict(kwargs)))
    return function, real_args, real_kwargs


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for _, leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def as_fakes(value: Any, mode: Any, keeps: Callable[[torch.Tensor], bool]) -> Any:
    """Replace real tensors, all but those that ``keeps`` names, by fake ones of the same shape, dtype and flag."""

    def fake(_: str, leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or keeps(leaf):
            return leaf
        with mode:
            made = torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device="cpu")
        return made.requires_grad_(leaf.requires_grad) if leaf.is_floating_point() or leaf.is_complex() else made

    with without_functions():
        return map_tree(fake, value)


def _weight(tensor: torch.Tensor, other: bool) -> torch.Tensor:
    if not isinstance(tensor, nn.Parameter):  # buffers are written to
        return torch.zeros(tensor.shape, dtype=tensor.dtype)
    value = torch.full((), int(other), dtype=tensor.dtype)
    return nn.Parameter(value.expand(tensor.shape), tensor.requires_grad)


def _real(leaf: Any, other: bool) -> Any:
    if not isinstance(leaf, FakeTensor):
        return leaf
    values = torch.full(leaf.shape, int(other), dtype=leaf.dtype)
    if other and leaf.is_floating_point():
        values = torch.linspace(-1, 1, leaf.numel(), dtype=leaf.dtype).view(leaf.shape)
    return values.requires_grad_() + 0 if leaf.requires_grad else values  # not a leaf: it may be written to
