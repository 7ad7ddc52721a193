"""Run a model's forward once with fake tensors and write down what it does.

A function mode sees every torch call made between modules; calls of chosen modules are intercepted and written down
as one call of the user's own module; integers stay real, so that Python takes the path that eager takes.
"""

from __future__ import annotations

import functools
import operator
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.overrides import TorchFunctionMode

from fxpipe._torch import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    functorch_is_active,
    intercepted,
    replaced,
    without_functions,
    without_modes,
)
from fxpipe.capture.blocks import Leaves
from fxpipe.capture.count import LayerCounter, fused_attention_calls
from fxpipe.capture.frames import Frame, Frames
from fxpipe.capture.inputs import Inputs
from fxpipe.capture.preserve import MISSING, Attributes, Change, python_random_state, random_states
from fxpipe.capture.reads import READS, Guard, answer_of, shape_depends_on_values
from fxpipe.capture.reals import LARGEST, Reals, is_random
from fxpipe.capture.recorder import Ambient, Blocked, Recorder, describe, has_tensor, user_line
from fxpipe.capture.skeleton import Skeleton
from fxpipe.capture.watch import Watch
from fxpipe.capture.zeros import as_fakes, on_zeros, run_on_zeros
from fxpipe.errors import CaptureError
from fxpipe.ir.program import CallContext
from fxpipe.ir.tree import tree_leaves

UNKNOWN_VALUES = (DataDependentOutputException, DynamicOutputShapeException)


@dataclass(frozen=True, slots=True, eq=False)
class Observation:
    """What one forward did.

    Attributes:
        leaves: What was recorded as one call.
        recorder: The graph, without an output node, and its constants.
        frames: Every module call.
        guards: What Python read from tensors that depend on inputs.
        output: What the model returned; its tensors have nodes.
        loss: The scalar that training differentiates, None if there is none.
        notes: What the report should say.
    """

    leaves: Leaves
    recorder: Recorder
    frames: Frames
    guards: tuple[Guard, ...]
    output: Any
    loss: torch.Tensor | None
    notes: tuple[str, ...]


def observe(
    skeleton: Skeleton,
    leaves: Leaves,
    inputs: Inputs,
    *,
    loss_fn: Callable[..., Any] | None = None,
    grad_enabled: bool = True,
    counter: LayerCounter | None = None,
) -> Observation:
    """Run the forward (and the loss function) once and record it.

    Args:
        skeleton: The copy of the model; as before afterwards.
        leaves: What is recorded as one call.
        inputs: One microbatch; small real integers stay real, everything else becomes fake.
        loss_fn: Called as ``loss_fn(output, target)`` after the model.
        grad_enabled: Gradient mode around the forward.
        counter: Counts what each recorded call does; None leaves the calls uncounted.

    Returns:
        What was observed.

    Raises:
        Blocked: Something cannot be recorded; ``fqn`` names the opened module it happened in.
        CaptureError: The forward itself failed.
    """
    with ExitStack() as stack:
        stack.enter_context(random_states())
        attributes = Attributes(skeleton.module)
        stack.callback(attributes.restore)
        stack.enter_context(torch.set_grad_enabled(grad_enabled))
        stack.enter_context(skeleton.mode)
        stack.enter_context(torch.device("cpu"))  # over a default device of the user's
        observer = Observer(skeleton, leaves, Recorder(skeleton, Ambient.now()), counter)
        fakes = {name: _input(tensor, skeleton) for name, tensor in inputs.tensors.items()}
        for name, tensor in fakes.items():
            observer.recorder.placeholder(name, tensor)
        args, kwargs, target = inputs.with_tensors(fakes)
        stack.enter_context(observer.watch)
        stack.enter_context(observer.intercepting())
        if "torch._dynamo" in sys.modules:  # compiled functions run as the functions they were
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(observer)
        output = skeleton.module(*args, **kwargs)
        loss = observer.loss(output, target, loss_fn)
        observer.finish(attributes)
    notes = tuple(dict.fromkeys(observer.notes))
    return Observation(leaves, observer.recorder, observer.frames, tuple(observer.guards), output, loss, notes)


def _input(tensor: torch.Tensor, skeleton: Skeleton) -> torch.Tensor:
    """Keep a small real integer tensor (a copy of it), fake anything else."""
    exact = not (tensor.is_floating_point() or tensor.is_complex())
    if exact and tensor.numel() <= LARGEST and not (tensor.is_meta or isinstance(tensor, FakeTensor)):
        with without_modes():
            return tensor.detach().to("cpu", copy=True)
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")


class Observer(TorchFunctionMode):
    """The function mode and the interception of module calls, for one forward."""

    def __init__(self, skeleton: Skeleton, leaves: Leaves, recorder: Recorder, counter: LayerCounter | None) -> None:
        super().__init__()
        self.skeleton = skeleton
        self.leaves = leaves
        self.recorder = recorder
        self.counter = counter
        self.watch = Watch()
        self.frames = Frames(skeleton.module, leaves.blocks)
        self.guards: list[Guard] = []
        self.notes: list[str] = []
        self._reals = Reals()
        self._quiet = 0  # inside a leaf: nothing is recorded
        self._counting = False  # a call is made again to be counted: nothing is noted at all
        self._zeros: dict[Any, tuple[Any, Any]] = {}
        self._opened: set[str] = set()
        self._attention: list[str] = []
        self._outside_vmap: set[int] | None = None
        self._region = 0
        self._python_random = python_random_state()

    # --- torch functions ------------------------------------------------------------------------------------------

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """See one torch call."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__get__":
            value = func(*args, **kwargs)
            if self._quiet or self._counting or not isinstance(value, torch.Tensor):
                return value
        if self._counting:
            return self._reals.run(func, name, args, kwargs, _tensors(args, kwargs))
        frame = self.frames.top
        frame.functions.append(name)
        if name == "scaled_dot_product_attention":
            self._attention.append(_attention_form(args, kwargs))
        if self._quiet:
            return self._run(func, name, args, kwargs, _tensors(args, kwargs), frame)
        try:
            return self._record(func, name, args, kwargs, frame)
        except Blocked as blocked:
            blocked.where = blocked.where or user_line()
            raise

    def _run(
        self, func: Any, name: str, args: Any, kwargs: dict[str, Any], tensors: Sequence[torch.Tensor], frame: Frame
    ) -> Any:
        """Run a call and note whether it drew random numbers."""
        self.watch.drew = False
        if self._outside_vmap is not None:
            for tensor in tensors:
                if self.recorder.knows(tensor) and id(tensor) not in self._outside_vmap:
                    raise Blocked("vmap over a function that reads tensors other than its arguments", frame.fqn)
        args, kwargs = _on_cpu(func, name, args, kwargs)
        result = self._reals.run(func, name, args, kwargs, tensors)
        if self.watch.drew or is_random(name):
            frame.drew.append(len(frame.functions) - 1)
        return result

    def _record(self, func: Any, name: str, args: Any, kwargs: dict[str, Any], frame: Frame) -> Any:
        tensors = _tensors(args, kwargs)
        if tensors:
            self._refuse(func, name, tensors, frame)
        if functorch_is_active():
            raise Blocked(f"{name} is called inside a transform of torch.func", frame.fqn)
        versions = [_version(tensor) for tensor in tensors]
        trace: list[Any] = []
        self.watch.trace = trace
        self._attention.clear()
        position = len(frame.functions) - 1
        try:
            result = self._run(func, name, args, kwargs, tensors, frame)
        except UNKNOWN_VALUES as error:
            result = self._result_of_unknown_values(func, name, args, kwargs, frame, error)
        finally:
            self.watch.trace = None
        written = [tensor for tensor, version in zip(tensors, versions, strict=True) if _version(tensor) != version]
        if not has_tensor(result) and not written and name not in _KEPT:
            if name in READS:
                self._read(name, args, kwargs, result, tensors, frame)
            return result
        if not tensors and not has_tensor(result):
            return result
        op, target, given = canonical(func, name, args)
        node = self.recorder.call(
            op,
            target,
            given,
            kwargs,
            frame,
            layer=frame.name(_spoken(func, name, args)),
            call=frame.call,
            written=written,
        )
        self._finish(node, frame, position, func, args, kwargs, result, tuple(trace))
        if shape_depends_on_values(name, args, result):
            self._guard_shape(node, result)
        return result

    def _finish(
        self,
        node: fx.Node,
        frame: Frame,
        position: int,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        result: Any,
        trace: tuple[Any, ...],
    ) -> None:
        if position in frame.drew[-1:]:
            node.meta.update(frame=frame, position=position)
        if any(read.meta.get("random") for read in node.all_input_nodes) or is_random(frame.functions[position]):
            node.meta["random"] = True
        self._count(node, func, args, kwargs, trace)
        with without_functions():
            self.recorder.emit(result, node)

    def _count(
        self, node: fx.Node, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], trace: Any
    ) -> None:
        """Run a recorded call again, alone, and count what it does."""
        attention = tuple(self._attention)
        if attention:
            node.meta["attention"] = attention
        if self.counter is None:
            return
        self._counting = True
        try:
            with fused_attention_calls(self.counter) as replacement:
                called = replacement if func is F.scaled_dot_product_attention and replacement else func
                node.meta["counts"] = self.counter.counts(called, args, kwargs, trace, attention)
        except UNKNOWN_VALUES:
            with without_functions(), without_modes():
                call = on_zeros(func, args, kwargs)
                node.meta["counts"] = self.counter.counts(*call, trace, attention)
        finally:
            self._counting = False

    def _refuse(self, func: Any, name: str, tensors: Sequence[torch.Tensor], frame: Frame) -> None:
        """Refuse what would silently lose something."""
        owner = getattr(getattr(func, "__self__", None), "__name__", "")
        if name == "__set__" and owner in ("data", "grad"):
            raise Blocked(f"the forward assigns .{owner} of a tensor", frame.fqn)
        if name in ("backward", "set_", "resize_", "register_post_accumulate_grad_hook") or (
            name == "grad" and getattr(func, "__module__", "") == "torch.autograd"
        ):
            raise Blocked(f"the forward calls {name}() on its own tensors", frame.fqn)

    def _result_of_unknown_values(
        self, func: Any, name: str, args: Any, kwargs: dict[str, Any], frame: Frame, error: Exception
    ) -> Any:
        if name == "ctc_loss":  # only its inner shapes depend on values
            return as_fakes(run_on_zeros(func, args, kwargs), self.skeleton.mode)
        nodes = [
            self.recorder.node_of(tensor, frame) for tensor in _tensors(args, kwargs) if self.recorder.knows(tensor)
        ]
        if any(node.meta.get("random") for node in nodes):
            raise Blocked(f"{name}() reads a random number: the path changes by chance", frame.fqn) from error
        what = "takes a path that depends on" if name in READS else "makes a tensor whose shape depends on"
        raise Blocked(f"{name}() {what} values that are not known when the model is captured", frame.fqn) from error

    # --- reads ----------------------------------------------------------------------------------------------------

    def _read(
        self, name: str, args: Any, kwargs: Any, result: Any, tensors: Sequence[torch.Tensor], frame: Frame
    ) -> None:
        """Make a read of a value that depends on an input a guard."""
        nodes = [self.recorder.node_of(tensor, frame) for tensor in tensors if self.recorder.knows(tensor)]
        if any(node.meta.get("random") for node in nodes):
            raise Blocked(f"{name}() reads a random number: the path changes by chance", frame.fqn)
        if not any(node.meta.get("tainted") for node in nodes):
            return
        op, target, given = canonical(getattr(torch.Tensor, name, None) or getattr(torch, name), name, args)
        node = self.recorder.call(op, target, given, kwargs, frame, layer="")
        node.meta["guard"] = True
        self.guards.append(Guard(node, answer_of(result)))

    def _guard_shape(self, node: fx.Node, result: Any) -> None:
        if not node.meta.get("tainted"):
            return
        parts = result if isinstance(result, tuple | list) else (result,)
        for index, part in enumerate(parts):
            if isinstance(part, torch.Tensor) and not isinstance(part, FakeTensor):
                source = self.recorder.node_of(part, self.frames.top)
                guard = self.recorder.graph.create_node("call_function", getattr, (source, "shape"))
                guard.meta.update(guard=True, layer="", tainted=True, index=index)
                self.guards.append(Guard(guard, tuple(part.shape)))

    # --- modules --------------------------------------------------------------------------------------------------

    @contextmanager
    def intercepting(self) -> Iterator[None]:
        """Hear of module calls, and of what passes the function mode by."""
        with ExitStack() as stack:
            owners = dict.fromkeys(
                cls
                for part in (nn.Module(), *self.skeleton.module.modules())
                for cls in type(part).__mro__
                if "__call__" in vars(cls) and issubclass(cls, nn.Module)
            )
            for owner in owners:
                stack.enter_context(replaced(owner, "__call__", self._called(vars(owner)["__call__"])))
            stack.enter_context(replaced(torch, "from_numpy", self._from_numpy(torch.from_numpy)))
            for module in (torch, torch.random):
                stack.enter_context(replaced(module, "manual_seed", self._reseeded))
            stack.enter_context(intercepted(self._function, self._vmap, self._script, self._checkpoint))
            yield

    def _called(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            fqn = self.skeleton.module_fqns.get(id(module))
            if fqn is None or self._counting or self.frames.top.module is module:
                return original(module, *args, **kwargs)
            frame = self.frames.enter(fqn, module)
            try:
                if self._quiet:
                    return original(module, *args, **kwargs)
                if fqn in self.leaves.closed and self._holds_its_own(module):
                    return self._leaf(original, frame, args, kwargs)
                self._opened.add(fqn)
                return original(module, *args, **kwargs)
            except Blocked as blocked:
                blocked.where = blocked.where or user_line()
                raise
            finally:
                self.frames.leave()

        return call

    def _holds_its_own(self, module: nn.Module) -> bool:
        """Whether a module holds the model's tensors: ``functional_call`` may have put others into it."""
        known = self.skeleton.fqn_of
        return all(
            id(tensor) in known
            for part in module.modules()
            for tensor in part._parameters.values()
            if tensor is not None
        )

    def _leaf(self, original: Callable[..., Any], frame: Frame, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._may_be_derived(frame):
            found = self._derived(original, frame, args, kwargs)
            if found is not None:
                return found[0]
        self._check_python_random(frame)
        with without_functions():
            tensors = _tensors(args, kwargs)
            buffers = list(frame.module.buffers())
            versions = [_version(tensor) for tensor in (*tensors, *buffers)]
        self._attention.clear()
        trace: list[Any] = []
        self.watch.trace = trace
        self._quiet += 1
        counts = None
        try:
            result = original(frame.module, *args, **kwargs)
        except UNKNOWN_VALUES:
            result, counts = self._on_zeros(frame.module, args, kwargs)
        finally:
            self._quiet -= 1
            self.watch.trace = None
        with without_functions():
            written = [
                tensor
                for tensor, version in zip((*tensors, *buffers), versions, strict=True)
                if _version(tensor) != version
            ]
            node = self.recorder.call(
                "call_module", frame.fqn, args, kwargs, frame, layer=frame.fqn, call=frame.call, written=written
            )
        node.meta["frame"] = frame
        if counts is None:
            self._count(node, frame.module, args, kwargs, tuple(trace))
        else:
            node.meta["counts"] = counts
        with without_functions():
            self.recorder.emit(result, node)
        self._python_random = python_random_state()
        return result

    def _on_zeros(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Run (and count) a module for real that looks at values which fake tensors do not have; once per kind."""
        with without_functions(), without_modes():
            shapes = [(tuple(t.shape), t.dtype) for t in (*_tensors(args, kwargs), *module.state_dict().values())]
            key = (type(module), module.training, tuple(shapes))
            if key not in self._zeros:
                call, real_args, real_kwargs = on_zeros(module, args, kwargs)
                counts = None
                if self.counter is not None:
                    counts = self.counter.counts(call, real_args, real_kwargs, ("zeros", key), ())
                self._zeros[key] = call(*real_args, **real_kwargs), counts
        result, counts = self._zeros[key]
        return as_fakes(result, self.skeleton.mode), counts

    def _may_be_derived(self, frame: Frame) -> bool:
        module = frame.module
        return (
            frame.fqn not in self.leaves.kept
            and not type(module).__module__.startswith("torch.nn.")
            and next(module.parameters(), None) is None
        )

    def _derived(
        self, original: Callable[..., Any], frame: Frame, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any] | None:
        """Open a module without parameters (rotary tables, masks) if what it returns depends on no activation.

        Such calls are recomputed where they are read; a module called as a whole would be tied to what it is given,
        which is often an activation whose dtype alone is looked at.
        """
        last = self.recorder.begin_trial()
        guards = len(self.guards)
        try:
            result = original(frame.module, *args, **kwargs)
            with without_functions():
                nodes = [
                    self.recorder.node_of(tensor, frame) for _, tensor in tree_leaves(result) if _is_tensor(tensor)
                ]
            derived = bool(nodes) and not frame.drew and not frame.inside and is_derived(nodes)
        except (Blocked, *UNKNOWN_VALUES):
            derived = False
        if derived:
            self.recorder.end_trial()
            self._opened.add(frame.fqn)
            return (result,)
        self.recorder.undo_trial(last)
        del self.guards[guards:]
        frame.functions.clear()
        frame.drew.clear()
        frame.inside.clear()
        return None

    # --- what passes the function mode by ---------------------------------------------------------------------------

    def _function(self, cls: type, args: tuple[Any, ...], kwargs: dict[str, Any], real: Callable[..., Any]) -> Any:
        """Record a call of a custom ``autograd.Function`` as one call: its backward belongs to it."""
        if cls.__name__ == "CheckpointFunction":
            raise CaptureError(
                f"module {self.frames.top.fqn or '(the model)'} uses reentrant activation checkpointing, which gives "
                "no gradients in a pipeline\n  pass use_reentrant=False to torch.utils.checkpoint.checkpoint"
            )
        if self._quiet or self._counting or functorch_is_active():
            return real(*args, **kwargs)
        frame = self.frames.top
        if cls.__name__ == "BackwardHookFunction":
            raise Blocked("it has backward hooks", frame.fqn)

        def function(*args: Any, **kwargs: Any) -> Any:
            return cls.apply(*args, **kwargs)  # type: ignore[attr-defined]

        function.__name__ = function.__qualname__ = cls.__name__
        return self._opaque(function, real, args, kwargs)

    def _opaque(
        self, function: Callable[..., Any], real: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Record one call of something whose inside is not looked at."""
        frame = self.frames.top
        frame.functions.append(function.__name__)
        position = len(frame.functions) - 1
        with without_functions():
            tensors = _tensors(args, kwargs)
            versions = [_version(tensor) for tensor in tensors]
        self.watch.drew, self.watch.trace = False, []
        trace = self.watch.trace
        self._quiet += 1
        try:
            result = real(*args, **kwargs)
        except UNKNOWN_VALUES as error:
            raise Blocked(f"{function.__name__} depends on values that are not known", frame.fqn) from error
        finally:
            self._quiet -= 1
            self.watch.trace = None
        del frame.functions[position + 1 :]
        if self.watch.drew:
            frame.drew.append(position)
        with without_functions():
            written = [t for t, version in zip(tensors, versions, strict=True) if _version(t) != version]
            node = self.recorder.call(
                "call_function", function, args, kwargs, frame,
                layer=frame.name(function.__name__), call=frame.call, written=written,
            )  # fmt: skip
        self._finish(node, frame, position, real, args, kwargs, result, tuple(trace or ()))
        return result

    def _vmap(self, real: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record a call of ``vmap`` as one call, unless its function reads more than its arguments."""
        func, in_dims, out_dims, randomness, chunk_size, *rest = args
        if self._quiet or self._counting or functorch_is_active() or self._outside_vmap is not None:
            return real(*args, **kwargs)

        def vmapped(*inner: Any, **named: Any) -> Any:
            return torch.vmap(func, in_dims, out_dims, randomness, chunk_size=chunk_size)(*inner, **named)

        self._outside_vmap = {id(tensor) for tensor in _tensors(tuple(rest), kwargs)}
        try:
            return self._opaque(
                vmapped,
                lambda *inner, **named: real(func, in_dims, out_dims, randomness, chunk_size, *inner, **named),
                tuple(rest),
                kwargs,
            )
        finally:
            self._outside_vmap = None

    def _script(self, scripted: Any, args: tuple[Any, ...], kwargs: dict[str, Any], real: Callable[..., Any]) -> Any:
        if self._quiet or self._counting:
            with without_functions():
                return real(scripted, *args, **kwargs)

        def function(*args: Any, **kwargs: Any) -> Any:
            return scripted(*args, **kwargs)

        function.__name__ = function.__qualname__ = scripted.name

        def call(*inner: Any, **named: Any) -> Any:
            with without_functions():
                return real(scripted, *inner, **named)

        return self._opaque(function, call, args, kwargs)

    def _checkpoint(self, begins: bool) -> None:
        if not self._quiet and not self._counting:
            self._region += begins
            self.recorder.region = self._region if begins else None

    def _from_numpy(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def from_numpy(array: Any) -> Any:
            with without_modes():
                return real(array)

        return from_numpy

    def _reseeded(self, seed: Any) -> Any:
        if not self._quiet:
            raise Blocked("the forward reseeds torch's random generator", self.frames.top.fqn)
        with without_modes():
            return torch.default_generator.manual_seed(int(seed))

    def _check_python_random(self, frame: Frame) -> None:
        if python_random_state() != self._python_random:
            outer = self.frames.stack[-2] if frame is self.frames.top and len(self.frames.stack) > 1 else frame
            raise Blocked("the forward draws from Python's or numpy's random generator", outer.fqn)

    # --- the end --------------------------------------------------------------------------------------------------

    def loss(self, output: Any, target: Any, loss_fn: Callable[..., Any] | None) -> torch.Tensor | None:
        """Give the scalar that training differentiates: of ``loss_fn``, or found in what the model returned."""
        if loss_fn is None:
            return find_loss(output)
        frame = self.frames.push_named("loss")
        loss = loss_fn(output, target)
        self.frames.stack.remove(frame)
        with without_functions():
            if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
                shown = describe(loss) if isinstance(loss, torch.Tensor) else f"a {type(loss).__qualname__}"
                raise CaptureError(
                    f"loss_fn returned {shown}, not one number\n  return a 0-dimensional tensor: a mean or a sum"
                )
        return loss

    def finish(self, attributes: Attributes) -> None:
        """Check what the forward left behind in the opened modules."""
        self._check_python_random(self.frames.top)
        with without_functions():
            for change in attributes.changes(frozenset({*self._opened, ""})):
                self._keep_or_refuse(change)
            self.recorder.refresh()

    def _keep_or_refuse(self, change: Change) -> None:
        frame = Frame(change.fqn, self.skeleton.module.get_submodule(change.fqn))
        name = f"{change.fqn}.{change.name}" if change.fqn else change.name
        before, now = change.before, change.now
        tensors = isinstance(now, torch.Tensor) and isinstance(before, torch.Tensor)
        if change.buffer and tensors and now.shape == before.shape and self.recorder.knows(now):
            node = self.recorder.call(
                "call_method", "copy_", (before, now), {}, frame, layer=f"{name}.copy_", written=[before]
            )
            node.meta["context"] = CallContext(grad_enabled=False)
            return
        if change.before is MISSING and isinstance(change.now, bool | str | None):
            return  # a flag that something was done once
        if change.before is MISSING and not self.leaves.can_close(change.fqn):
            self.notes.append(f"the forward sets {name}; the stages of a pipeline do not hand it out")
            return
        raise Blocked(f"the forward sets the attribute {name}", change.fqn)


_KEPT = frozenset({"register_hook", "requires_grad_"})


def find_loss(output: Any) -> torch.Tensor | None:
    """Find the loss in what a model returned: ``.loss``, ``["loss"]``, or the output itself if it is one number."""
    found = output
    if isinstance(output, Mapping):
        found = output.get("loss")
    elif not isinstance(output, torch.Tensor):
        found = getattr(output, "loss", None)
    with without_functions():
        floating = isinstance(found, torch.Tensor) and found.is_floating_point() and found.numel() == 1
    return found if floating else None


def is_derived(nodes: Sequence[fx.Node]) -> bool:
    """Whether nodes depend on inputs, buffers and constants alone, and take no gradient."""
    seen: set[fx.Node] = set()
    todo = list(nodes)
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if not derives(node):
            return False
        todo += [*node.all_input_nodes, *node.meta.get("after", ())]
    return True


def derives(node: fx.Node) -> bool:
    """Whether one call can be made again at any stage that has its arguments."""
    meta = node.meta.get("tensor")
    if node.op == "get_attr":
        return not (meta is not None and meta.requires_grad) and "object" not in node.meta and not _is_parameter(node)
    plain = "position" not in node.meta and "random" not in node.meta and "guard" not in node.meta
    return node.op == "placeholder" or (
        node.op in ("call_function", "call_method") and plain and not (meta is not None and meta.requires_grad)
    )


def _is_parameter(node: fx.Node) -> bool:
    module = node.graph.owning_module
    owner, _, leaf = str(node.target).rpartition(".")
    try:
        return module is not None and leaf in module.get_submodule(owner)._parameters
    except AttributeError:
        return False


def _tensors(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    _collect(args, found)
    if kwargs:
        _collect(kwargs, found)
    return found


def _collect(value: Any, found: list[torch.Tensor]) -> None:
    if isinstance(value, torch.Tensor):
        found.append(value)
    elif isinstance(value, tuple | list):
        for item in value:
            _collect(item, found)
    elif isinstance(value, Mapping):
        for item in value.values():
            _collect(item, found)
    elif isinstance(value, slice):
        _collect((value.start, value.stop, value.step), found)
    elif hasattr(type(value), "__dataclass_fields__"):
        _collect(vars(value), found) if hasattr(value, "__dict__") else None


def _is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor)


def _version(tensor: torch.Tensor) -> int:
    try:
        return tensor._version
    except RuntimeError:  # inference tensors do not track theirs
        return 0


def _on_cpu(
    func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Send what names another device to the CPU, where everything is during capture."""
    if kwargs.get("device") is not None:
        kwargs = {**kwargs, "device": "cpu"}
    if name == "cuda":
        return args[:1], {}
    if name == "to" and len(args) > 1 and isinstance(args[1], str | torch.device | int):
        args = (args[0], "cpu", *args[2:])
    return args, kwargs


def _attention_form(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    causal = kwargs.get("is_causal", args[5] if len(args) > 5 else False)
    mask = kwargs.get("attn_mask", args[3] if len(args) > 3 else None)
    return "causal" if causal else "full" if mask is None else "mask"


_OPERATORS = {
    f"__{name}__": getattr(operator, name if hasattr(operator, name) else f"{name}_")
    for name in (
        *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor", "lshift", "rshift"),
        *("eq", "ne", "lt", "le", "gt", "ge", "neg", "invert", "getitem", "setitem"),
        *("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor"),
    )
}
_METHODS = (types.MethodDescriptorType, types.WrapperDescriptorType)


def canonical(func: Any, name: str, args: tuple[Any, ...]) -> tuple[str, Any, tuple[Any, ...]]:
    """Give a call the form that an fx graph can print: operation, target and arguments."""
    if name in ("__get__", "__set__"):
        access = getattr if name == "__get__" else setattr
        return "call_function", access, (args[0], func.__self__.__name__, *args[1:])
    if name in _OPERATORS:
        return "call_function", _OPERATORS[name], args
    if name.startswith("__r") and f"__{name[3:]}" in _OPERATORS and len(args) == 2:
        return "call_function", _OPERATORS[f"__{name[3:]}"], (args[1], args[0])
    qualified = str(getattr(func, "__qualname__", ""))
    method = isinstance(func, _METHODS) or qualified.startswith(("Tensor.", "TensorBase."))
    if method and hasattr(torch.Tensor, name):
        return "call_method", name, args
    return "call_function", func, args


def _spoken(func: Any, name: str, args: tuple[Any, ...]) -> str:
    if name in ("__get__", "__set__"):
        return str(func.__self__.__name__)
    overload = getattr(func, "_schema", None)
    return str(overload.name.rpartition("::")[2]) if overload is not None else name or type(func).__name__
