"""The calls of the model's modules: opened ones are followed, closed ones written down as one call."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from types import FunctionType
from typing import Any

import torch
from torch import nn

from fxpipe._torch import FakeTensor, replaced, without_functions
from fxpipe.capture.calls.alike import Reads, structure_of, watched_reads
from fxpipe.capture.calls.blocked import Blocked
from fxpipe.capture.calls.forms import versions_of
from fxpipe.capture.calls.real_values import UNKNOWN_VALUES
from fxpipe.capture.calls.scalars import settled
from fxpipe.capture.calls.values import Edges, Reach, edges_of, tensors_in
from fxpipe.capture.calls.zero_inputs import with_other_integers
from fxpipe.capture.model.blocks import is_op
from fxpipe.capture.model.builtin import is_builtin
from fxpipe.capture.model.held import has_hooks
from fxpipe.capture.model.preserve import Attributes, python_random_state
from fxpipe.capture.model.skeleton import named_tensors
from fxpipe.capture.record.forward import Forward
from fxpipe.capture.record.frames import Frame
from fxpipe.capture.record.node import info, is_derived
from fxpipe.capture.record.repeats import Repeat, Repeats
from fxpipe.capture.record.zero_runs import ZeroRuns
from fxpipe.ir.tree import tree_leaves


class ModuleCalls:
    """The interception of module calls during one forward.

    Args:
        forward: The forward.
    """

    def __init__(self, forward: Forward) -> None:
        self._forward = forward
        self._zero_runs = ZeroRuns()
        self._repeats = Repeats()
        self._entered: set[str] = set()

    @contextmanager
    def intercepting(self) -> Iterator[None]:
        """Hear of module calls."""
        forward = self._forward
        with ExitStack() as stack:
            owners = dict.fromkeys(
                cls
                for part in (nn.Module(), *forward.skeleton.module.modules())
                for cls in type(part).__mro__
                if "__call__" in vars(cls) and issubclass(cls, nn.Module)
            )
            for owner in owners:
                stack.enter_context(replaced(owner, "__call__", self._called(vars(owner)["__call__"])))
            kinds = dict.fromkeys(cls for part in forward.skeleton.module.modules() for cls in type(part).__mro__)
            for kind in kinds:
                function = vars(kind).get("forward")
                if isinstance(function, FunctionType) and kind is not nn.Module:
                    stack.enter_context(replaced(kind, "forward", self._forwarded(function)))
            yield

    def _called(self, original: Callable[..., Any]) -> Callable[..., Any]:
        forward = self._forward

        @functools.wraps(original)
        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            fqn = forward.fqn_of(module)
            if fqn is None or forward.counting or forward.frames.top.module is module:
                return original(module, *args, **kwargs)
            frame = forward.frames.enter(fqn, module)
            try:
                if forward.quiet is not None:
                    return original(module, *args, **kwargs)
                if self._is_leaf(fqn) and self._holds_its_own(module):
                    return self._leaf(original, frame, *forward.sized(args, kwargs))
                forward.opened.add(fqn)
                self._note_given(frame, args, kwargs)
                return original(module, *args, **kwargs)
            except Blocked as blocked:
                forward.noted(blocked)
                raise
            finally:
                forward.frames.leave()
                if forward.progress is not None and fqn in forward.leaves.blocks:
                    forward.progress(fqn)

        return call

    def _forwarded(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Take ``block.forward(x)`` for ``block(x)``, which is the same where no hook is called in between."""
        recording = self._forward

        @functools.wraps(original)
        def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if recording.counting or recording.frames.top.module is module or recording.fqn_of(module) is None:
                return original(module, *args, **kwargs)
            # A class above its own may be asked for its forward.
            is_own = "forward" not in vars(module) and type(module).forward is forward
            return module(*args, **kwargs) if is_own and not has_hooks(module) else original(module, *args, **kwargs)

        return forward

    def _note_given(self, frame: Frame, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note what an opened block is given: recorded whole, it reads all of that."""
        if frame.block == frame.fqn:
            recorder = self._forward.recorder
            with without_functions():
                given = (tensor for tensor in tensors_in(args, kwargs) if recorder.knows(tensor))
                frame.given = tuple(dict.fromkeys(recorder.node_of(tensor, frame) for tensor in given))

    def _is_leaf(self, fqn: str) -> bool:
        """Whether a module is recorded whole.

        One in a closed module past whose call it is reached is recorded as at op grain, where plans know its parts.
        """
        forward = self._forward
        around = forward.leaves.around(fqn)
        if not around or around == fqn:
            return bool(around)
        return is_op(forward.frames.top.module) and all(frame.fqn != around for frame in forward.frames.stack)

    def _holds_its_own(self, module: nn.Module) -> bool:
        """Whether a module holds the model's tensors: ``functional_call`` may have put others into it."""
        forward = self._forward
        known = forward.skeleton.fqn_of
        return all(
            id(tensor) in known
            for part in module.modules()
            for tensor in part._parameters.values()
            if tensor is not None
        )

    def _leaf(self, original: Callable[..., Any], frame: Frame, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        forward = self._forward
        if self._may_be_derived(frame):
            found = self._derived(original, frame, args, kwargs)
            if found is not None:
                return found[0]
        self._check_outside(frame)
        module = frame.module
        with without_functions():
            key = structure_of(module, args, kwargs)
            repeat = self._repeats.find(key, module)
            if repeat is not None:
                return self._repeated(original, repeat, frame, args, kwargs)
            edges = edges_of(given := tensors_in(args, kwargs))
            watched = [*given, *(tensor for _, tensor in named_tensors(module))]
            versions = versions_of(watched)
            forward.side_channels.begin(module, frame.fqn, args, kwargs)
        forward.attention.clear()
        trace: list[Any] = []
        forward.watch.trace = trace
        forward.quiet, forward.has_read, forward.has_drawn = frame.fqn, False, False
        counts = None
        reads: Reads | None = None
        try:
            with watched_reads(module) if key is not None else nullcontext() as reads:
                result = original(module, *args, **kwargs)
        except UNKNOWN_VALUES:
            result, counts = self._zero_runs.run_module(forward, frame, *settled(args, kwargs))
            forward.has_read = True
        finally:
            forward.quiet = None
            forward.watch.trace = None
        self._check_reads(original, frame, args, kwargs, result)
        with without_functions():
            forward.side_channels.end(result)
            written = [t for t, old, new in zip(watched, versions, versions_of(watched), strict=True) if old != new]
            reach = self._reach(module, result, given, edges, written)
            forward.follow(functools.partial(original, module), args, kwargs, result)
            try:
                node = forward.recorder.call(
                    "call_module", frame.fqn, args, kwargs, frame, layer=frame.fqn, call=frame.call, written=written
                )
            except Blocked as blocked:
                blocked.opens = (frame.fqn,)  # then what it is given need not be recorded
                raise
        info(node).frame = frame
        if counts is None:
            forward.counts.add(node, module, *forward.bare(args, kwargs), tuple(trace), tuple(forward.attention))
        else:
            info(node).counts = counts
        with without_functions():
            if counts is None:
                forward.counts.note_buffers(module, *forward.bare(args, kwargs), result)
            forward.recorder.emit(result, node, given, reach)
            plain = not (written or counts or forward.has_read or forward.has_drawn)
            if plain and reads is not None and not any(forward.attributes.changes(frame.fqn)):
                repeat = Repeat(result, tuple(trace), tuple(forward.attention), reach)
                self._repeats.add(key, module, reads, watched, repeat)
        forward.python_random = python_random_state()
        return result

    def _reach(
        self, module: nn.Module, result: Any, given: Sequence[torch.Tensor], edges: Edges, written: Any
    ) -> Reach:
        """Give to which of the tensors that a module was given the gradients of what it gave go."""
        own = {id(tensor) for tensor in given}
        # Paths through what looks at values are not all known.
        if self._forward.has_read or any(part.requires_grad or id(part) in own for part in written):
            return None
        weights = any(parameter.requires_grad for parameter in module.parameters())
        return self._forward.reach(result, edges, weights=weights)

    def _check_reads(
        self, original: Callable[..., Any], frame: Frame, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> None:
        """Have a module opened that returns what it looked at, or another shape for other integers of the inputs.

        Raises:
            Blocked: It does.
        """
        forward, recorder = self._forward, self._forward.recorder
        if not forward.has_read:
            return
        if any(isinstance(leaf, int | float | str) for _, leaf in tree_leaves(result)):
            raise Blocked("it returns what Python read from a tensor", frame.fqn, opens=[frame.fqn])

        def varies(tensor: torch.Tensor) -> bool:
            real = not (isinstance(tensor, FakeTensor) or tensor.is_meta or tensor.is_floating_point())
            return real and recorder.knows(tensor) and info(recorder.node_of(tensor, frame)).from_input

        # What is kept by a hook of one call would be kept of all.
        if any(has_hooks(part) or "forward" in vars(part) for part in frame.module.modules()):
            return
        with without_functions():
            if not any(map(varies, tensors_in(args, kwargs))):
                return
            shapes = [tensor.shape for tensor in tensors_in(result)]
        kept, attributes = (forward.watch.drew, forward.has_read), Attributes(frame.module)
        forward.counting = True
        try:
            for other_args, other_kwargs in with_other_integers(args, kwargs, varies):
                try:
                    other = original(frame.module, *other_args, **other_kwargs)
                except (Exception, Blocked):  # whatever a module raises for values that do not suit it
                    continue
                if [tensor.shape for tensor in tensors_in(other)] != shapes:
                    reason = "the shape of what it returns depends on integers of the inputs"
                    raise Blocked(reason, frame.fqn, opens=[frame.fqn])
        finally:
            forward.counting = False
            forward.watch.drew, forward.has_read = kept
            attributes.restore()

    def _repeated(
        self,
        original: Callable[..., Any],
        repeat: Repeat,
        frame: Frame,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Record a call that is equal to an earlier one, without making it."""
        forward = self._forward
        result = repeat.again()
        forward.follow(functools.partial(original, frame.module), args, kwargs, result, like=id(repeat))
        node = forward.recorder.call("call_module", frame.fqn, args, kwargs, frame, layer=frame.fqn, call=frame.call)
        info(node).frame = frame
        forward.counts.add(node, frame.module, *forward.bare(args, kwargs), repeat.trace, repeat.attention)
        forward.recorder.emit(result, node, tensors_in(args, kwargs), repeat.reach)
        return result

    def _check_outside(self, frame: Frame) -> None:
        """Refuse what reached a module that is recorded whole by no argument."""
        forward = self._forward
        around = forward.frames.stack[-2]
        forward.check_python_random(around)
        forward.check_dtype(around)
        if frame.fqn not in self._entered:
            self._entered.add(frame.fqn)
            for change in forward.attributes.changes(frame.fqn):
                reason = f"the attribute {change.path} was set from outside of its module"
                raise Blocked(reason, frame.fqn, opens=[frame.fqn])

    def _may_be_derived(self, frame: Frame) -> bool:
        forward = self._forward
        module = frame.module
        return (
            frame.fqn not in forward.leaves.kept and not is_builtin(module) and next(module.parameters(), None) is None
        )

    def _derived(
        self, original: Callable[..., Any], frame: Frame, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any] | None:
        """Open a module without parameters (rotary tables, masks) if what it returns depends on no activation.

        Such calls are recomputed where they are read; a module called as a whole would be tied to what it is given,
        which is often an activation whose dtype alone is looked at.
        """
        forward = self._forward
        forward.recorder.begin_trial()
        guards, blocked = len(forward.guards), forward.blocked
        try:
            result = original(frame.module, *args, **kwargs)
            with without_functions():
                nodes = [forward.recorder.node_of(tensor, frame) for tensor in tensors_in(result)]
            derived = bool(nodes) and not frame.drew and not frame.inside and is_derived(nodes)
        except (Blocked, *UNKNOWN_VALUES):
            derived = False
        if derived:
            forward.recorder.end_trial()
            forward.opened.add(frame.fqn)
            return (result,)
        forward.recorder.undo_trial()
        del forward.guards[guards:]
        forward.blocked = blocked
        frame.clear()
        return None
