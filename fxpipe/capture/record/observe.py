"""Run a model's forward once with fake tensors and write down what it does.

A function mode sees every torch call made between modules; calls of chosen modules are intercepted and written down
as one call of the user's own module; integers stay real, so that Python takes the path that eager takes.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from fxpipe._torch import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    functorch_is_active,
    replaced,
    without_functions,
    without_modes,
)
from fxpipe.batch.inputs import Inputs
from fxpipe.capture.model.blocks import Leaves
from fxpipe.capture.model.preserve import Attributes, Change, apply_changes, python_random_state, random_states
from fxpipe.capture.model.skeleton import Skeleton, named_tensors
from fxpipe.capture.record.bypass import Bypasses
from fxpipe.capture.record.calls import (
    CPU,
    attention_form,
    canonical,
    on_cpu,
    spoken_name,
    targets_of,
    tensors_in,
    versions_of,
    without_source,
)
from fxpipe.capture.record.counting import LayerCounter, fused_attention_calls
from fxpipe.capture.record.derive import is_derived, is_setting
from fxpipe.capture.record.frames import Frame, Frames
from fxpipe.capture.record.guards import READS, Guard, answer_of, is_plain, shape_depends_on_values
from fxpipe.capture.record.hidden import Hidden
from fxpipe.capture.record.reals import LARGEST, Reals, is_random
from fxpipe.capture.record.recorder import Ambient, Blocked, Recorder, describe, has_tensor, user_line
from fxpipe.capture.record.repeats import Repeat, Repeats
from fxpipe.capture.record.watch import Watch
from fxpipe.capture.record.zeros import Zeros
from fxpipe.errors import CaptureError
from fxpipe.ir.tree import map_tree, tree_leaves
from fxpipe.program import CallContext

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
        results: By ``id`` of a tensor that is returned: the node that hands it out, where it is not its owner.
        left: Attributes that the forward left behind in opened modules; the next forward may read them.
        notes: What the report should say.
    """

    leaves: Leaves
    recorder: Recorder
    frames: Frames
    guards: tuple[Guard, ...]
    output: Any
    loss: torch.Tensor | None
    results: Mapping[int, fx.Node]
    left: tuple[Change, ...]
    notes: tuple[str, ...]

    def result_node(self, tensor: torch.Tensor) -> fx.Node:
        """Give the node whose value a returned tensor is."""
        return self.results.get(id(tensor)) or self.recorder.node_of(tensor, self.frames.all[0])


def observe(
    skeleton: Skeleton,
    leaves: Leaves,
    inputs: Inputs,
    *,
    loss_fn: Callable[..., Any] | None = None,
    grad_enabled: bool = True,
    counter: LayerCounter | None = None,
    left: Sequence[Change] = (),
    progress: Callable[[str], None] | None = None,
) -> Observation:
    """Run the forward (and the loss function) once and record it.

    Args:
        skeleton: The copy of the model; as before afterwards.
        leaves: What is recorded as one call.
        inputs: One microbatch; small real integers stay real, everything else becomes fake.
        loss_fn: Called as ``loss_fn(output, target)`` after the model.
        grad_enabled: Gradient mode around the forward.
        counter: Counts what each recorded call does; None leaves the calls uncounted.
        left: What an earlier forward left behind, to begin with.
        progress: Called with the FQN of each block whose call ends.

    Returns:
        What was observed.

    Raises:
        Blocked: Something cannot be recorded; ``fqn`` names the opened module it happened in.
        CaptureError: The forward itself failed.
    """
    with ExitStack() as stack:
        stack.enter_context(random_states())
        before = Attributes(skeleton.module)
        stack.callback(before.restore)
        stack.callback(_restore_flags, [(each, each.requires_grad) for each in skeleton.module.parameters()])
        apply_changes(skeleton.module, left)
        attributes = Attributes(skeleton.module) if left else before
        stack.enter_context(torch.set_grad_enabled(grad_enabled))
        stack.enter_context(skeleton.mode)
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))  # over the user's default device; every call passes it
        recorder = Recorder(skeleton, stack.enter_context(_ambient()))
        observer = Observer(skeleton, leaves, recorder, counter, attributes, progress)
        fakes = {name: _input(tensor) for name, tensor in inputs.tensors.items()}
        for name, tensor in fakes.items():
            recorder.placeholder(name, tensor)
        args, kwargs, target = inputs.with_tensors(fakes)
        stack.enter_context(observer.watch)
        stack.enter_context(observer.intercepting())
        if "torch._dynamo" in sys.modules:  # compiled functions run as the functions they were
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(observer)
        output = skeleton.module(*args, **kwargs)
        loss = observer.loss(output, target, loss_fn)
        observer.finish(loss if loss is not None else output)
    return Observation(
        leaves,
        recorder,
        observer.frames,
        tuple(observer.guards),
        output,
        loss,
        observer.results,
        tuple(observer.left),
        tuple(dict.fromkeys(observer.notes)),
    )


def _restore_flags(flags: Sequence[tuple[nn.Parameter, bool]]) -> None:
    """Let parameters take gradients as before: a module recorded whole may have frozen its own."""
    for parameter, flag in flags:
        if parameter.requires_grad != flag:
            parameter.requires_grad_(flag)


def _input(tensor: torch.Tensor) -> torch.Tensor:
    """Keep a small real integer tensor (a copy of it), fake anything else."""
    exact = not (tensor.is_floating_point() or tensor.is_complex())
    if exact and tensor.numel() <= LARGEST and not (tensor.is_meta or isinstance(tensor, FakeTensor)):
        with without_modes():
            return tensor.detach().to("cpu", copy=True)
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")


@contextmanager
def _ambient() -> Iterator[Ambient]:
    """Give the state around the forward; autocast of an accelerator is mirrored to the CPU, where capture runs.

    A forward asks ``x.device.type`` which autocast to switch off, and hears ``"cpu"`` during capture.
    """
    mirrored = next((kind for kind in ("cuda", "xpu") if torch.is_autocast_enabled(kind)), None)
    if mirrored is None or torch.is_autocast_enabled("cpu"):
        yield Ambient.now()
        return
    dtype = torch.get_autocast_dtype(mirrored)
    with torch.autocast("cpu", dtype=dtype, cache_enabled=torch.is_autocast_cache_enabled()):
        yield Ambient.now()


@dataclass(slots=True, eq=False)
class _Uncounted:
    """A call to be counted, and the nodes of all calls that do the same."""

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    trace: Any
    attention: tuple[str, ...]
    ambient: Ambient
    nodes: list[fx.Node] = field(default_factory=list)


class Observer(TorchFunctionMode):
    """The function mode and the interception of module calls, for one forward."""

    def __init__(
        self,
        skeleton: Skeleton,
        leaves: Leaves,
        recorder: Recorder,
        counter: LayerCounter | None,
        attributes: Attributes,
        progress: Callable[[str], None] | None = None,
    ) -> None:
        super().__init__()
        self.skeleton = skeleton
        self.leaves = leaves
        self.recorder = recorder
        self.counter = counter
        self.watch = Watch()
        self.frames = Frames(skeleton.module, leaves.blocks)
        self.guards: list[Guard] = []
        self.results: dict[int, fx.Node] = {}
        self.left: list[Change] = []
        self.notes: list[str] = []
        self.quiet: str | None = None  # FQN of what is recorded whole and running: nothing inside is
        self.counting = False  # a call is made again to be counted: nothing is noted at all
        self._attributes = attributes
        self._progress = progress
        self._reals = Reals(self.watch)
        self.hidden = Hidden(recorder)
        self._zeros = Zeros(skeleton)
        self._opened: set[str] = set()
        self._entered: set[str] = set()
        self._uncounted: dict[Any, _Uncounted] = {}
        self._attention: list[str] = []
        self._hooks: list[tuple[fx.Node, RemovableHandle]] = []
        self._repeats = Repeats()
        self._has_drawn = False  # in what is recorded whole, random numbers were drawn
        self._has_read = False  # in what is recorded whole, Python looked at values
        self._dtype = torch.get_default_dtype()
        self._python_random = python_random_state()
        self.python_draw = ""  # where in the user's code that was drawn from
        self._blocked: Blocked | None = None

    # --- torch functions ------------------------------------------------------------------------------------------

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """See one torch call."""
        name = getattr(func, "__name__", "")
        args, kwargs = on_cpu(name, args, kwargs or {})
        if name in ("cuda", "xpu"):
            func, name, args, kwargs = torch.Tensor.to, "to", (args[0], CPU), {}
        elif name == "__deepcopy__" and not args[0].requires_grad:  # a fake tensor would warn of its missing memory
            func, name, args = torch.Tensor.clone, "clone", args[:1]
        if name == "__get__":
            value = func(*args, **kwargs)
            if self.quiet is not None or self.counting or not isinstance(value, torch.Tensor):
                return value
        if self.counting:
            return self._reals.run(func, name, args, kwargs, tensors_in(args, kwargs))
        frame = self.frames.top
        frame.functions.append(name)
        if name == "scaled_dot_product_attention":
            self._attention.append(attention_form(args, kwargs))
        try:
            if self.quiet is not None:
                return self._run_quietly(func, name, args, kwargs, frame)
            return self._record(func, name, args, kwargs, frame)
        except Blocked as blocked:
            self._noted(blocked)
            raise

    def _noted(self, blocked: Blocked) -> None:
        """Complete an exception on its way out, and remember it: a bare ``except`` of the user's may swallow it."""
        blocked.where = blocked.where or user_line()
        self._blocked = self._blocked or blocked

    def _run_quietly(self, func: Any, name: str, args: Any, kwargs: dict[str, Any], frame: Frame) -> Any:
        """Run a call inside something that is recorded whole."""
        tensors = tensors_in(args, kwargs)
        if not self._zeros.is_running:
            self.hidden.check(tensors)
        result = self._run(func, name, args, kwargs, tensors, frame)
        self.hidden.made(result)
        if name in READS and not isinstance(result, torch.Tensor):
            self._has_read = True
        return result

    def _run(
        self, func: Any, name: str, args: Any, kwargs: dict[str, Any], tensors: Sequence[torch.Tensor], frame: Frame
    ) -> Any:
        """Run a call and note whether it drew random numbers."""
        self.watch.drew = False
        for tensor in tensors:
            if not isinstance(tensor, FakeTensor) and tensor.is_meta:
                self.recorder.refuse_unfilled(tensor, frame.fqn)
        for target in targets_of(name, args, kwargs):
            self._refuse_foreign(target, frame)
        if self.quiet is None and _sets_gradient_flag(func, name, args, kwargs):
            own = self.skeleton.fqn_of.get(id(args[0]))
            if own is not None:
                raise Blocked(
                    f"the forward changes requires_grad of {own}",
                    frame.fqn,
                    way_out="freeze or thaw parameters before fxpipe.compile",
                )
        if self._zeros.is_running:
            with self.watch:
                result = func(*args, **kwargs)
        else:
            result = self._reals.run(func, name, args, kwargs, tensors)
        if self.watch.drew or is_random(name):
            frame.drew.append(len(frame.functions) - 1)
            self._has_drawn = True
        return result

    def _refuse_foreign(self, tensor: torch.Tensor, frame: Frame) -> None:
        """Refuse a write to a real tensor that is none of ours: it would happen, now and to the user's own."""
        if not isinstance(tensor, FakeTensor) and not self._zeros.is_running and not functorch_is_active():
            if self.recorder.made_here(tensor) or self.hidden.knows(tensor):
                return
            place = self.skeleton.plain.get(id(tensor), ("a tensor kept outside of the model", None))[0]
            raise Blocked(
                f"the forward writes to {place}, which is no buffer",
                frame.fqn,
                way_out="register it with register_buffer, so that each stage and each checkpoint has it",
            )

    def _record(self, func: Any, name: str, args: Any, kwargs: dict[str, Any], frame: Frame) -> Any:
        tensors = tensors_in(args, kwargs)
        if name == "__set__" and _property(func) == "data" and self._is_alike(*tensors):
            own = self._record(func.__self__.__get__, "__get__", args[:1], {}, frame)
            value = self._record(torch.Tensor.detach, "detach", args[1:], {}, frame)
            return self._record(torch.Tensor.copy_, "copy_", (own, value), {}, frame)
        if tensors:
            self._refuse(func, name, tensors, frame)
        if functorch_is_active():
            raise Blocked(f"{name} is called inside a transform of torch.func", frame.fqn)
        if torch.get_default_dtype() != self._dtype:
            raise Blocked("the forward changes torch's default dtype", frame.fqn)
        versions = versions_of(tensors)
        trace: list[Any] = []
        self.watch.trace = trace
        self._attention.clear()
        if name == "scaled_dot_product_attention":
            self._attention.append(attention_form(args, kwargs))
        position = len(frame.functions) - 1
        try:
            result = self._run(func, name, args, kwargs, tensors, frame)
        except UNKNOWN_VALUES as error:
            result = self._result_of_unknown_values(func, name, args, kwargs, frame, error)
        finally:
            self.watch.trace = None
        written = [t for t, old, new in zip(tensors, versions, versions_of(tensors), strict=True) if old != new]
        written += [tensor for tensor in targets_of(name, args, kwargs) if tensor.is_inference()]
        if not has_tensor(result) and not written and name not in _KEPT:
            self._read(func, name, args, kwargs, result, tensors, frame)
            return result
        if not tensors and not has_tensor(result):
            return result
        op, target, given = canonical(func, name, args)
        alone = without_source(name, args, kwargs, result)
        if alone is not None:
            op, (target, given, kwargs) = "call_function", alone
        layer = frame.name(spoken_name(func, name))
        node = self.recorder.call(op, target, given, kwargs, frame, layer=layer, call=frame.call, written=written)
        if name == "register_hook":
            self._hooks.append((node, result))
        self._finish(node, frame, position, func, args, kwargs, result, tuple(trace))
        if shape_depends_on_values(name, args, result):
            self._guard_shape(node, result)
        if name in _PACKING:
            for tensor in tensors_in((result,), {}):
                if not isinstance(tensor, FakeTensor):  # it depends on nothing but integers that are guarded
                    self.recorder.node_of(tensor, frame).meta["tainted"] = False
        return result

    def record_whole(
        self, function: Callable[..., Any], real: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Record one call of something whose inside is not looked at.

        Args:
            function: What the graph calls.
            real: What is called now.
            args: Arguments of both.
            kwargs: Keyword arguments of both.
        """
        frame = self.frames.top
        frame.functions.append(function.__name__)
        position = len(frame.functions) - 1
        with without_functions():
            tensors = tensors_in(args, kwargs)
            versions = versions_of(tensors)
            self.hidden.begin(None, frame.fqn, args, kwargs)
        trace: list[Any] = []
        self.watch.drew, self.watch.trace = False, trace
        self.quiet = frame.fqn
        try:
            result = real(*args, **kwargs)
        except UNKNOWN_VALUES as error:
            raise Blocked(f"{function.__name__} depends on values that are not known", frame.fqn) from error
        finally:
            self.quiet = None
            self.watch.trace = None
            self.hidden.stop()
        del frame.functions[position + 1 :]
        if self.watch.drew:
            frame.drew.append(position)
        with without_functions():
            written = [t for t, old, new in zip(tensors, versions, versions_of(tensors), strict=True) if old != new]
            node = self.recorder.call(
                "call_function", function, args, kwargs, frame,
                layer=frame.name(function.__name__), call=frame.call, written=written,
            )  # fmt: skip
        self._finish(node, frame, position, real, args, kwargs, result, tuple(trace))
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
        """Have a recorded call counted when the forward is over: it is made again, and may leave something behind."""
        attention = tuple(self._attention)
        if attention:
            node.meta["attention"] = attention
        if self.counter is not None and not is_setting(node):
            key = self.counter.key(func, args, kwargs, trace, attention)
            if key in self.counter.known:
                node.meta["counts"] = self.counter.known[key]
            else:
                args, kwargs = map_tree(_kept, (args, dict(kwargs)))  # the model may append to a list that it passed
                call = _Uncounted(func, args, kwargs, trace, attention, Ambient.now())
                self._uncounted.setdefault(key, call).nodes.append(node)

    def _count_all(self, counter: LayerCounter) -> None:
        """Make every distinct call again, alone, and count what it does."""
        self.counting = True
        for call in self._uncounted.values():
            given = call.func, call.args, call.kwargs, call.trace, call.attention
            with call.ambient.entered(), fused_attention_calls(counter) as replacement:
                called = replacement if call.func is F.scaled_dot_product_attention and replacement else call.func
                try:
                    counts = counter.counts(called, *given[1:])
                except UNKNOWN_VALUES:
                    counts = self._zeros.counts(counter, *given)
            for node in call.nodes:
                node.meta["counts"] = counts
        self.counting = False

    def _is_alike(self, own: torch.Tensor, value: torch.Tensor) -> bool:
        """Whether other data could be copied into a parameter or buffer of the model."""
        return id(own) in self.skeleton.fqn_of and own.shape == value.shape and own.dtype == value.dtype

    def _refuse(self, func: Any, name: str, tensors: Sequence[torch.Tensor], frame: Frame) -> None:
        """Refuse what would silently lose something."""
        if name == "__set__" and _property(func) in ("data", "grad"):
            raise Blocked(f"the forward assigns .{_property(func)} of a tensor", frame.fqn)
        if name == "__deepcopy__" and id(tensors[0]) in self.skeleton.fqn_of:
            own = self.recorder.name_of(tensors[0])
            raise Blocked(f"the forward copies {own}", frame.fqn, way_out="copy modules before compiling, not in it")
        if name in ("backward", "set_", "resize_", "register_post_accumulate_grad_hook") or (
            name == "grad" and getattr(func, "__module__", "") == "torch.autograd"
        ):
            raise Blocked(f"the forward calls {name}() on its own tensors", frame.fqn)

    def _result_of_unknown_values(
        self, func: Any, name: str, args: Any, kwargs: dict[str, Any], frame: Frame, error: Exception
    ) -> Any:
        if name == "ctc_loss":  # only its inner shapes depend on values
            return self._zeros.run_function(func, args, kwargs)
        if name in _PACKING and self._read_whole(args, frame):
            return self._zeros.run_function(func, args, kwargs, exact=True)
        nodes = [
            self.recorder.node_of(tensor, frame) for tensor in tensors_in(args, kwargs) if self.recorder.knows(tensor)
        ]
        if any(node.meta.get("random") for node in nodes):
            raise Blocked(f"{name}() reads a random number: the path changes by chance", frame.fqn) from error
        what = "takes a path that depends on" if name in READS else "makes a tensor whose shape depends on"
        raise Blocked(f"{name}() {what} values that are not known when the model is captured", frame.fqn) from error

    # --- reads ----------------------------------------------------------------------------------------------------

    def _read(
        self,
        func: Any,
        name: str,
        args: Any,
        kwargs: Any,
        result: Any,
        tensors: Sequence[torch.Tensor],
        frame: Frame,
    ) -> None:
        """Make a read of a value that depends on an input a guard."""
        if name not in READS and (name != "__format__" or args[0].dim() > 0) and is_plain(result):
            return
        nodes = [self.recorder.node_of(tensor, frame) for tensor in tensors if self.recorder.knows(tensor)]
        if name in READS and any(node.meta.get("random") for node in nodes):
            raise Blocked(f"{name}() reads a random number: the path changes by chance", frame.fqn)
        real = any(not isinstance(tensor, FakeTensor) for tensor in tensors)
        if not real or not any(node.meta.get("tainted") for node in nodes):
            return
        if name not in READS and name != "__format__":
            raise Blocked(f"{name}() hands out the memory of a tensor that depends on an input", frame.fqn)
        self._refuse_unread(nodes)
        op, target, given = canonical(func, name, args)
        node = self.recorder.call(op, target, given, kwargs, frame, layer="")
        node.meta["guard"] = True
        self.guards.append(Guard(node, answer_of(result), user_line()))

    def _read_whole(self, args: Sequence[Any], frame: Frame) -> bool:
        """Guard all values of the integers among arguments; False where they are not known."""
        integers = [tensor for tensor in tensors_in(tuple(args), {}) if not tensor.is_floating_point()]
        if not integers or any(isinstance(tensor, FakeTensor) for tensor in integers):
            return False
        for tensor in integers:
            source = self.recorder.node_of(tensor, frame)
            if source.meta.get("tainted"):
                self._refuse_unread([source])
                node = self.recorder.call("call_method", "tolist", (tensor,), {}, frame, layer="")
                node.meta["guard"] = True
                with without_modes(), without_functions():
                    self.guards.append(Guard(node, answer_of(tensor.tolist()), user_line()))
        return True

    def _refuse_unread(self, nodes: Sequence[fx.Node]) -> None:
        """Refuse to guard what a module called as a whole computes: its inside must be known to be read again."""
        todo, seen = list(nodes), set(nodes)
        while todo:
            node = todo.pop()
            if node.op == "call_module":
                fqn = str(node.target)
                raise Blocked("the forward reads a value that it computes", fqn, opens=[fqn])
            sources = {*node.all_input_nodes, *node.meta.get("after", ())} - seen
            seen |= sources
            todo += sources

    def _guard_shape(self, node: fx.Node, result: Any) -> None:
        if not node.meta.get("tainted"):
            return
        parts = result if isinstance(result, tuple | list) else (result,)
        for part in parts:
            if isinstance(part, torch.Tensor) and not isinstance(part, FakeTensor):
                source = self.recorder.node_of(part, self.frames.top)
                self._refuse_unread([source])
                guard = self.recorder.graph.create_node("call_function", getattr, (source, "shape"))
                guard.meta.update(guard=True, layer="", tainted=True)
                self.guards.append(Guard(guard, tuple(part.shape), user_line()))

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
            stack.enter_context(Bypasses(self).intercepting())
            yield

    def _called(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            fqn = self.skeleton.module_fqns.get(id(module)) or self._zeros.fqn_of(module)
            if fqn is None or self.counting or self.frames.top.module is module:
                return original(module, *args, **kwargs)
            frame = self.frames.enter(fqn, module)
            try:
                if self.quiet is not None:
                    return original(module, *args, **kwargs)
                if fqn in self.leaves.closed and self._holds_its_own(module):
                    return self._leaf(original, frame, args, kwargs)
                self._opened.add(fqn)
                return original(module, *args, **kwargs)
            except Blocked as blocked:
                self._noted(blocked)
                raise
            finally:
                self.frames.leave()
                if self._progress is not None and fqn in self.leaves.blocks:
                    self._progress(fqn)

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
        self._check_outside(frame)
        module = frame.module
        with without_functions():
            key = self._repeats.key(module, args, kwargs)
            repeat = self._repeats.find(key)
            if repeat is not None:
                return self._repeated(repeat, frame, args, kwargs)
            watched = [*tensors_in(args, kwargs), *(tensor for _, tensor in named_tensors(module))]
            versions = versions_of(watched)
            self.hidden.begin(module, frame.fqn, args, kwargs)
        self._attention.clear()
        trace: list[Any] = []
        self.watch.trace = trace
        self.quiet, self._has_read, self._has_drawn = frame.fqn, False, False
        counts = None
        try:
            result = original(module, *args, **kwargs)
        except UNKNOWN_VALUES:
            self._has_read = True
            result, counts = self._zeros.run_module(self, frame, args, kwargs)
        finally:
            self.quiet = None
            self.watch.trace = None
        with without_functions():
            self.hidden.end(result)
            if self._has_read and any(isinstance(leaf, int | float | str) for _, leaf in tree_leaves(result)):
                raise Blocked("it returns what Python read from a tensor", frame.fqn, opens=[frame.fqn])
            written = [t for t, old, new in zip(watched, versions, versions_of(watched), strict=True) if old != new]
            try:
                node = self.recorder.call(
                    "call_module", frame.fqn, args, kwargs, frame, layer=frame.fqn, call=frame.call, written=written
                )
            except Blocked as blocked:
                blocked.opens = (frame.fqn,)  # then what it is given need not be recorded
                raise
        node.meta["frame"] = frame
        if counts is None:
            self._count(node, module, args, kwargs, tuple(trace))
        else:
            node.meta["counts"] = counts
        with without_functions():
            self.recorder.emit(result, node)
            plain = not (written or counts or self._has_read or self._has_drawn)
            if plain and key is not None and not any(self._attributes.changes(frame.fqn)):
                self._repeats.add(key, watched, result, tuple(trace), tuple(self._attention))
        self._python_random = python_random_state()
        return result

    def _repeated(self, repeat: Repeat, frame: Frame, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record a call that is equal to an earlier one, without making it."""
        result = repeat.again()
        node = self.recorder.call("call_module", frame.fqn, args, kwargs, frame, layer=frame.fqn, call=frame.call)
        node.meta["frame"] = frame
        self._attention[:] = repeat.attention
        self._count(node, frame.module, args, kwargs, repeat.trace)
        self.recorder.emit(result, node)
        return result

    def _check_outside(self, frame: Frame) -> None:
        """Refuse what reached a module that is recorded whole by no argument."""
        self._check_python_random(self.frames.stack[-2] if len(self.frames.stack) > 1 else frame)
        if torch.get_default_dtype() != self._dtype:
            raise Blocked("the forward changes torch's default dtype", self.frames.stack[-2].fqn)
        if frame.fqn not in self._entered:
            self._entered.add(frame.fqn)
            for change in self._attributes.changes(frame.fqn):
                reason = f"the attribute {change.path} was set from outside of its module"
                raise Blocked(reason, frame.fqn, opens=[frame.fqn])

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
        self.recorder.begin_trial()
        guards, blocked = len(self.guards), self._blocked
        try:
            result = original(frame.module, *args, **kwargs)
            with without_functions():
                tensors = [leaf for _, leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
                nodes = [self.recorder.node_of(tensor, frame) for tensor in tensors]
            derived = bool(nodes) and not frame.drew and not frame.inside and is_derived(nodes)
        except (Blocked, *UNKNOWN_VALUES):
            derived = False
        if derived:
            self.recorder.end_trial()
            self._opened.add(frame.fqn)
            return (result,)
        self.recorder.undo_trial()
        del self.guards[guards:]
        self._blocked = blocked
        frame.clear()
        return None

    def _check_python_random(self, frame: Frame) -> None:
        if python_random_state() != self._python_random:
            blocked = Blocked("the forward draws from Python's or numpy's random generator", frame.fqn)
            blocked.where = self.python_draw
            raise blocked

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

    def finish(self, results: Any) -> None:
        """Look at what the forward left behind, and give what it returns nodes of its own."""
        if self._blocked is not None:  # swallowed by an ``except`` of the user's
            raise self._blocked
        self._check_python_random(self.frames.top)
        with without_functions():
            for change in self._attributes.changes():
                if change.fqn in self._opened or not change.fqn:
                    self._leave(change)
            for node, handle in self._hooks:
                hooks = handle.hooks_dict_ref()
                if hooks is not None and handle.id not in hooks:  # removed before the backward: it never ran
                    node.meta["removed"] = True
            for _, leaf in tree_leaves(results):
                if isinstance(leaf, torch.Tensor):
                    self._hand_out(leaf)
            self.recorder.refresh()
        if self.counter is not None:
            self._count_all(self.counter)

    def _leave(self, change: Change) -> None:
        """Record a buffer that was assigned anew; note any other attribute that was set."""
        before, now = change.before, change.now
        tensors = isinstance(now, torch.Tensor) and isinstance(before, torch.Tensor)
        if change.registry == "_buffers" and tensors and now.shape == before.shape and self.recorder.knows(now):
            frame = Frame(change.fqn, self.skeleton.module.get_submodule(change.fqn))
            node = self.recorder.call(
                "call_method", "copy_", (before, now), {}, frame, layer=f"{change.path}.copy_", written=[before]
            )
            node.meta["context"] = CallContext(grad_enabled=False)
            return
        self.left.append(change)
        if isinstance(now, torch.Tensor) or has_tensor(now):
            self.notes.append(f"the forward sets {change.path}; the stages of a pipeline do not hand it out")

    def _hand_out(self, tensor: torch.Tensor) -> None:
        """Give a tensor that is returned a call of its own where its node is none that comes last.

        Some layer must read a parameter, buffer or constant; and what was written to after it was made must be handed
        out after the writing.
        """
        root = self.frames.all[0]
        source = self.recorder.node_of(tensor, root)
        if (source.op == "get_attr" or self.recorder.is_written_after(source)) and id(tensor) not in self.results:
            node = self.recorder.call("call_function", itself, (tensor,), {}, root, layer=root.name("output"))
            self.recorder.describe(node, tensor)
            self.results[id(tensor)] = node


_KEPT = frozenset({"register_hook", "requires_grad_", "__set__"})
_PACKING = frozenset({"_pack_padded_sequence", "_pad_packed_sequence"})  # their shapes depend on lengths alone


def _property(func: Any) -> str:
    """Give the name of the property that is read or set."""
    return str(getattr(getattr(func, "__self__", None), "__name__", ""))


def _sets_gradient_flag(func: Any, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call sets ``requires_grad`` of its first argument to another value."""
    if name == "requires_grad_":
        wanted = args[1] if len(args) > 1 else kwargs.get("requires_grad", True)
    elif name == "__set__" and _property(func) == "requires_grad":
        wanted = args[1]
    else:
        return False
    return bool(args[0].requires_grad != wanted)


def _kept(_: str, leaf: Any) -> Any:
    return leaf


def itself(tensor: torch.Tensor) -> torch.Tensor:
    """Give a tensor back: the call that hands out a parameter which a model returns."""
    return tensor


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
