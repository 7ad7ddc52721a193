"""What passes a function mode by: calls that reach torch on other ways, each recorded as one call or refused."""

from __future__ import annotations

import functools
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
import torch.utils.checkpoint

from fxpipe._torch import (
    BackwardHookFunction,
    FakeTensor,
    flex_attention_anywhere,
    functorch_is_active,
    intercepted,
    module_conversions,
    replaced,
    unvalidated_distributions,
    without_functions,
    without_modes,
)
from fxpipe.capture.calls.blocked import Blocked, user_line
from fxpipe.capture.calls.encoders import padded_encoders
from fxpipe.capture.calls.values import Same
from fxpipe.capture.model.skeleton import named_tensors
from fxpipe.capture.record.calls import record_whole
from fxpipe.capture.record.forward import Forward
from fxpipe.errors import CaptureError


class Bypasses:
    """Custom autograd functions, ``vmap``, scripted functions, checkpointing, numpy, random states, conversions.

    Args:
        forward: The forward.
    """

    def __init__(self, forward: Forward) -> None:
        self._forward = forward
        self._regions = 0  # activation-checkpointing regions so far
        self._depth = 0  # of regions in regions

    @contextmanager
    def intercepting(self) -> Iterator[None]:
        """Hear of them."""
        with ExitStack() as stack:
            stack.enter_context(replaced(torch, "from_numpy", self._from_numpy(torch.from_numpy)))
            for module in (torch, torch.random):
                for name in ("manual_seed", "seed", "set_rng_state"):
                    stack.enter_context(replaced(module, name, self._reseeding(name, getattr(module, name))))
            for owner, names in ((random, random.__all__), (np.random, np.random.__all__)):
                for name in names:
                    function = getattr(owner, name)
                    if callable(function) and not isinstance(function, type):
                        stack.enter_context(replaced(owner, name, self._drawing(function)))
            stack.enter_context(replaced(FakeTensor, "device", property(self._device(vars(FakeTensor)["device"].fget))))
            stack.enter_context(intercepted(self._function, self._vmap, self._script, self._checkpoint))
            stack.enter_context(module_conversions(self._converted))
            stack.enter_context(padded_encoders(lambda: self._forward.passes))
            stack.enter_context(flex_attention_anywhere())
            stack.enter_context(unvalidated_distributions())  # they look at values, to complain and for nothing else
            yield

    def _function(self, cls: type, args: tuple[Any, ...], kwargs: dict[str, Any], real: Callable[..., Any]) -> Any:
        """Record a call of a custom ``autograd.Function`` as one call: its backward belongs to it."""
        forward = self._forward
        frame = forward.frames.top
        if cls is torch.utils.checkpoint.CheckpointFunction:
            raise CaptureError(
                f"module {frame.fqn or '(the model)'} uses reentrant activation checkpointing, which gives "
                "no gradients in a pipeline\n  pass use_reentrant=False to torch.utils.checkpoint.checkpoint"
            )
        if forward.passes or functorch_is_active():
            if not forward.counting:
                forward.reads_quietly(args, kwargs)
                forward.watch.note("function", Same(cls), args, kwargs)
            result = real(*args, **kwargs)
            forward.side_channels.made(result)
            if not (forward.counting or functorch_is_active() or cls is BackwardHookFunction):
                forward.note_function(result)
            return result
        if cls is BackwardHookFunction:
            raise Blocked("it has backward hooks", frame.fqn)

        def function(*args: Any, **kwargs: Any) -> Any:
            return cls.apply(*args, **kwargs)  # type: ignore[attr-defined]

        def call(*args: Any, **kwargs: Any) -> Any:
            result = real(*args, **kwargs)
            forward.note_function(result)
            return result

        function.__name__ = function.__qualname__ = cls.__name__
        return record_whole(forward, function, call, args, kwargs, kind=Same(cls))

    def _vmap(self, real: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record a call of ``vmap`` as one call."""
        forward = self._forward
        func, in_dims, out_dims, randomness, chunk_size, *rest = args
        if forward.passes or functorch_is_active():
            return real(*args, **kwargs)

        def vmapped(*inner: Any, **named: Any) -> Any:
            return torch.vmap(func, in_dims, out_dims, randomness, chunk_size=chunk_size)(*inner, **named)

        def call(*inner: Any, **named: Any) -> Any:
            return real(func, in_dims, out_dims, randomness, chunk_size, *inner, **named)

        return record_whole(forward, vmapped, call, tuple(rest), kwargs)

    def _device(self, real: Callable[..., Any]) -> Callable[..., Any]:
        """Note where opened code compares the type of a tensor's device: here all are on the CPU."""
        forward = self._forward

        def device(tensor: Any) -> Any:
            if not forward.passes and sys._getframe(1).f_globals.get("__name__", "")[:5] != "torch":
                forward.note_device("device")
            return real(tensor)

        return device

    def _script(self, scripted: Any, args: tuple[Any, ...], kwargs: dict[str, Any], real: Callable[..., Any]) -> Any:
        forward = self._forward
        if forward.passes:
            if not forward.counting:
                forward.reads_quietly(args, kwargs)
            with without_functions():
                result = real(scripted, *args, **kwargs)
            forward.side_channels.made(result)
            return result

        def function(*args: Any, **kwargs: Any) -> Any:
            return scripted(*args, **kwargs)

        function.__name__ = function.__qualname__ = scripted.name

        def call(*inner: Any, **named: Any) -> Any:
            with without_functions():
                return real(scripted, *inner, **named)

        return record_whole(forward, function, call, args, kwargs)

    def _checkpoint(self, begins: bool) -> None:
        """Number the activation-checkpointing regions; one inside another belongs to the outer one."""
        forward = self._forward
        if forward.passes:
            forward.watch.note("checkpoint", begins)
            return
        self._depth += 1 if begins else -1
        if begins and self._depth == 1:
            self._regions += 1
            forward.recorder.region = self._regions
        elif self._depth == 0:
            forward.recorder.region = None

    def _converted(self, real: Callable[..., Any], module: torch.nn.Module, function: Callable[[Any], Any]) -> Any:
        """Let a forward send a module to where it is; another dtype would change the user's parameters."""
        forward = self._forward
        fqn = forward.skeleton.module_fqns.get(id(module))
        if fqn is None:
            return real(module, function)
        with without_functions():
            for name, tensor in named_tensors(module):
                dtype = function(tensor.detach()).dtype
                if dtype != tensor.dtype:
                    blocked = Blocked(
                        f"the forward converts {fqn}.{name} to {str(dtype).removeprefix('torch.')}",
                        forward.frames.top.fqn,
                        way_out="convert the model before it is compiled",
                    )
                    blocked.where = user_line()
                    raise blocked
        return module

    def _from_numpy(self, real: Callable[..., Any]) -> Callable[..., Any]:
        forward = self._forward

        def from_numpy(array: Any) -> Any:
            with without_modes():
                tensor = real(array)
            forward.side_channels.made(tensor)
            return tensor

        return from_numpy

    def _drawing(self, real: Callable[..., Any]) -> Callable[..., Any]:
        """Remember where the forward draws from Python's or numpy's generator; whether it did is seen later."""

        forward = self._forward

        @functools.wraps(real)
        def draw(*args: Any, **kwargs: Any) -> Any:
            if not forward.passes:
                forward.python_draw = user_line()
            return real(*args, **kwargs)

        return draw

    def _reseeding(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        forward = self._forward

        def reseed(*args: Any, **kwargs: Any) -> Any:
            if not forward.passes:
                blocked = Blocked(
                    f"the forward calls torch.{name}(), which sets torch's random generator",
                    forward.frames.top.fqn,
                )
                blocked.where = user_line()
                raise blocked
            with without_modes():
                if name == "manual_seed":  # of the CPU alone: no accelerator is touched
                    return torch.default_generator.manual_seed(int(args[0] if args else kwargs["seed"]))
                return real(*args, **kwargs)

        return reseed
