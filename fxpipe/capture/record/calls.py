"""The calls of torch between modules, each written down as one node: what a function mode sees."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.overrides import TorchFunctionMode

from fxpipe._torch import (
    DataDependentOutputException,
    FakeTensor,
    functorch_is_active,
    without_functions,
    without_modes,
)
from fxpipe.capture.calls.blocked import Blocked
from fxpipe.capture.calls.forms import (
    CPU,
    attention_form,
    canonical,
    on_cpu,
    spoken_name,
    targets_of,
    versions_of,
    without_source,
)
from fxpipe.capture.calls.reads import (
    READS,
    SHAPED_BY_LENGTHS,
    SHAPED_BY_SIZES,
    shape_depends_on_values,
    shaping_numbers,
)
from fxpipe.capture.calls.real_values import UNKNOWN_VALUES, RealValues, is_random
from fxpipe.capture.calls.scalars import only_computes, settled
from fxpipe.capture.calls.values import Edges, Reach, edges_of, has_tensor, tensors_in
from fxpipe.capture.calls.zero_inputs import on_zeros, run_on_zeros
from fxpipe.capture.record.forward import Forward
from fxpipe.capture.record.frames import Frame
from fxpipe.capture.record.guards import (
    asked_shape,
    guard_integers,
    guard_read,
    guard_selected,
    guard_shape,
    guard_sizes,
    looked_into,
    note_selection,
    varies,
)
from fxpipe.capture.record.node import info


class Calls(TorchFunctionMode):
    """The function mode of one forward.

    Args:
        forward: The forward.
    """

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self._forward = forward
        self._real_values = RealValues(forward.watch, forward.floats)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """See one torch call."""
        forward = self._forward
        name = getattr(func, "__name__", "")
        args, kwargs = on_cpu(name, args, kwargs or {})
        if name in ("cuda", "xpu"):
            func, name, args, kwargs = torch.Tensor.to, "to", (args[0], CPU), {}
        elif name == "__deepcopy__" and not args[0].requires_grad:  # a fake tensor would warn of its missing memory
            func, name, args = torch.Tensor.clone, "clone", args[:1]
        if forward.numbers and not only_computes(name, args, kwargs):
            args, kwargs = settled(args, kwargs)
        if name == "get_device" or (name == "__get__" and _property(func) in _DEVICES):
            forward.note_device("get_device()" if name == "get_device" else _property(func))
        if forward.selections.made and not forward.passes:
            args, kwargs = looked_into(args), looked_into(kwargs)
        if name == "__get__":
            value = func(*args, **kwargs)
            if forward.selections.made and _property(func) == "shape":
                return asked_shape(forward, args[0], value)
            if _property(func) == "nbytes":
                guard_selected(forward, args[0])
            if forward.counting or not isinstance(value, torch.Tensor):
                return value
            if forward.quiet is not None:  # ``.T`` of another module's weight is a read of it
                try:
                    forward.reads_quietly(args)
                except Blocked as blocked:
                    forward.noted(blocked)
                    raise
                forward.side_channels.made(value)
                return value
        if forward.counting:
            args, kwargs = forward.bare(args, kwargs)
            return self._real_values.run(func, name, args, kwargs, tensors_in(args, kwargs))
        frame = forward.frames.top
        frame.functions.append(name)
        if name == "scaled_dot_product_attention":
            forward.attention.append(attention_form(args, kwargs))
        try:
            if forward.quiet is not None:
                return self._run_quietly(func, name, args, kwargs, frame)
            return self._record(func, name, args, kwargs, frame)
        except Blocked as blocked:
            forward.noted(blocked)
            raise

    def _run_quietly(self, func: Any, name: str, args: Any, kwargs: dict[str, Any], frame: Frame) -> Any:
        """Run a call inside something that is recorded whole."""
        forward = self._forward
        args, kwargs = forward.bare(args, kwargs)
        tensors = forward.reads_quietly(args, kwargs)
        result = self._run(func, name, args, kwargs, tensors, frame)
        forward.side_channels.made(result)
        looked = forward.watch.looked or (name in READS and not isinstance(result, torch.Tensor))
        forward.has_read = forward.has_read or looked or self._selects(func, name, args, kwargs, tensors, result)
        return result

    def _selects(
        self, func: Any, name: str, args: Any, kwargs: dict[str, Any], tensors: Sequence[torch.Tensor], result: Any
    ) -> bool:
        """Whether values that are known decide about the shape of what a call gave."""
        fakes = sum(isinstance(tensor, FakeTensor) for tensor in tensors)
        if fakes == len(tensors):
            return False
        writes = name.endswith("_") or "out" in kwargs
        numbers = () if fakes or writes else shaping_numbers(self._forward.watch, func, args, kwargs, tensors, result)
        return shape_depends_on_values(name, args, result) or next(iter(numbers), None) is not None

    def _run(
        self, func: Any, name: str, args: Any, kwargs: dict[str, Any], tensors: Sequence[torch.Tensor], frame: Frame
    ) -> Any:
        """Run a call and note whether it drew random numbers."""
        forward = self._forward
        forward.watch.drew = forward.watch.looked = False
        for tensor in tensors:
            if not isinstance(tensor, FakeTensor) and tensor.is_meta:
                forward.recorder.refuse_unfilled(tensor, frame.fqn)
        for target in targets_of(name, args, kwargs):
            self._refuse_foreign(target, frame)
        if forward.quiet is None and _sets_gradient_flag(func, name, args, kwargs):
            own = forward.skeleton.fqn_of.get(id(args[0]))
            if own is not None:
                raise Blocked(
                    f"the forward changes requires_grad of {own}",
                    frame.fqn,
                    way_out="freeze or thaw parameters before fxpipe.compile",
                )
        if forward.on_zeros:
            with forward.watch:
                result = func(*args, **kwargs)
        else:
            result = self._real_values.run(func, name, args, kwargs, tensors)
        if forward.watch.drew or is_random(name):
            frame.drew.append(len(frame.functions) - 1)
            forward.has_drawn = True
        return result

    def _refuse_foreign(self, tensor: torch.Tensor, frame: Frame) -> None:
        """Refuse a write to a real tensor that is none of ours: it would happen, now and to the user's own."""
        forward = self._forward
        if not isinstance(tensor, FakeTensor) and not forward.on_zeros and not functorch_is_active():
            if forward.recorder.made_here(tensor) or forward.side_channels.knows(tensor):
                return
            place = forward.skeleton.plain.get(id(tensor), ("a tensor kept outside of the model", None))[0]
            raise Blocked(
                f"the forward writes to {place}, which is no buffer",
                frame.fqn,
                way_out="register it with register_buffer, so that each stage and each checkpoint has it",
            )

    def _record(self, func: Any, name: str, args: Any, kwargs: dict[str, Any], frame: Frame) -> Any:
        forward = self._forward
        written_down = args, kwargs
        args, kwargs = forward.bare(args, kwargs)
        tensors = tensors_in(args, kwargs)
        if name == "__set__" and _property(func) == "data" and self._is_alike(*tensors):
            own = self._record(func.__self__.__get__, "__get__", args[:1], {}, frame)
            value = self._record(torch.Tensor.detach, "detach", args[1:], {}, frame)
            return self._record(torch.Tensor.copy_, "copy_", (own, value), {}, frame)
        if tensors:
            self._refuse(func, name, tensors, frame)
        if functorch_is_active():
            raise Blocked(f"{name} is called inside a transform of torch.func", frame.fqn)
        forward.check_dtype(frame)
        versions = versions_of(tensors)
        edges = _edges_of_several(tensors)
        trace: list[Any] = []
        forward.watch.trace = trace
        forward.attention.clear()
        if name == "scaled_dot_product_attention":
            forward.attention.append(attention_form(args, kwargs))
        position = len(frame.functions) - 1
        try:
            result = self._run(func, name, args, kwargs, tensors, frame)
        except UNKNOWN_VALUES as error:
            result = self._result_of_unknown_values(func, name, args, kwargs, frame, error)
        finally:
            forward.watch.trace = None
        written = [t for t, old, new in zip(tensors, versions, versions_of(tensors), strict=True) if old != new]
        written += [tensor for tensor in targets_of(name, args, kwargs) if tensor.is_inference()]
        if forward.selections.made and tensors:
            if isinstance(result, torch.Size):
                return asked_shape(forward, tensors[0], result)
            guard_sizes(forward, name, args, kwargs, tensors, result)
        if not has_tensor(result) and not written and name not in _KEPT:
            guard_read(forward, func, name, *written_down, result, frame)
            return result
        if not tensors and not has_tensor(result):
            return result
        with without_functions():
            reach = forward.reach(result, edges) if edges and not written else None
        forward.follow(func, args, kwargs, result)
        (op, target, given), named = canonical(func, name, written_down[0]), written_down[1]
        alone = without_source(name, *written_down, result, forward.shape_of)
        if alone is not None and not varies(forward, tensors[0]):
            op, (target, given, named) = "call_function", alone
        layer = frame.name(spoken_name(func, name))
        node = forward.recorder.call(op, target, given, named, frame, layer=layer, call=frame.call, written=written)
        if name == "register_hook":
            forward.hooks.append((node, result))
        finish_call(forward, node, position, func, args, kwargs, result, tuple(trace), reach)
        if (tensors or forward.symbols is None) and shape_depends_on_values(name, args, result):
            guard_shape(forward, node, result)
            note_selection(forward, node, args, kwargs, result)
        self._guard_numbers(func, args, kwargs, [] if written else tensors, result, frame)
        if name in SHAPED_BY_LENGTHS:
            for tensor in tensors_in(result):
                if not isinstance(tensor, FakeTensor):  # it depends on nothing but integers that are guarded
                    info(forward.recorder.node_of(tensor, frame)).from_input = False
        return result

    def _guard_numbers(
        self, func: Any, args: Any, kwargs: dict[str, Any], tensors: Sequence[torch.Tensor], result: Any, frame: Frame
    ) -> None:
        """Guard the numbers that a call was given as tensors, where they decide about the shape of its result.

        Raises:
            Blocked: One was drawn at random.
        """
        forward = self._forward
        for tensor in shaping_numbers(forward.watch, func, args, kwargs, tensors, result):
            if not forward.recorder.knows(tensor):
                continue
            if info(forward.recorder.node_of(tensor, frame)).random:
                raise Blocked("a random number decides about a shape: the path changes by chance", frame.fqn)
            guard_integers(forward, [tensor], frame)

    def _is_alike(self, own: torch.Tensor, value: torch.Tensor) -> bool:
        """Whether other data could be copied into a parameter or buffer of the model."""
        forward = self._forward
        return id(own) in forward.skeleton.fqn_of and own.shape == value.shape and own.dtype == value.dtype

    def _refuse(self, func: Any, name: str, tensors: Sequence[torch.Tensor], frame: Frame) -> None:
        """Refuse what would silently lose something."""
        forward = self._forward
        if name == "__set__" and _property(func) in ("data", "grad"):
            raise Blocked(f"the forward assigns .{_property(func)} of a tensor", frame.fqn)
        if name == "__deepcopy__" and id(tensors[0]) in forward.skeleton.fqn_of:
            own = forward.recorder.name_of(tensors[0])
            raise Blocked(f"the forward copies {own}", frame.fqn, way_out="copy modules before compiling, not in it")
        never = ("backward", "set_", "resize_", "register_post_accumulate_grad_hook")
        if name in never or func is torch.autograd.grad:
            raise Blocked(f"the forward calls {name}() on its own tensors", frame.fqn)

    def _result_of_unknown_values(
        self, func: Any, name: str, args: Any, kwargs: dict[str, Any], frame: Frame, error: Exception
    ) -> Any:
        forward = self._forward
        reads = isinstance(error, DataDependentOutputException) and name not in READS
        if name in SHAPED_BY_SIZES or (reads and _only_checks(func, args, kwargs)):
            return run_on_zeros(forward.skeleton.mode, func, args, kwargs)
        if name in SHAPED_BY_LENGTHS and guard_integers(forward, args, frame):
            return run_on_zeros(forward.skeleton.mode, func, args, kwargs, exact=True)
        nodes = [
            forward.recorder.node_of(tensor, frame)
            for tensor in tensors_in(args, kwargs)
            if forward.recorder.knows(tensor)
        ]
        if any(info(node).random for node in nodes):
            raise Blocked(f"{name}() reads a random number: the path changes by chance", frame.fqn) from error
        what = "takes a path that depends on" if name in READS else "makes a tensor whose shape depends on"
        raise Blocked(f"{name}() {what} values that are not known when the model is captured", frame.fqn) from error


def record_whole(
    forward: Forward,
    function: Callable[..., Any],
    real: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    kind: Any = None,
) -> Any:
    """Record one call of something whose inside is not looked at.

    Args:
        forward: The forward.
        function: What the graph calls.
        real: What is called now.
        args: Arguments of both.
        kwargs: Keyword arguments of both.
        kind: What besides its operations tells the call from others: its backward may be its own.
    """
    if kind is None:
        args, kwargs = settled(args, kwargs)
    frame = forward.frames.top
    frame.functions.append(function.__name__)
    position = len(frame.functions) - 1
    with without_functions():
        tensors = tensors_in(args, kwargs)
        edges, versions = edges_of(tensors), versions_of(tensors)
        forward.side_channels.begin(None, frame.fqn, args, kwargs)
    trace: list[Any] = [kind] if kind is not None else []
    forward.watch.drew, forward.watch.trace = False, trace
    forward.quiet = frame.fqn
    try:
        result = real(*args, **kwargs)
    except UNKNOWN_VALUES as error:
        raise Blocked(f"{function.__name__} depends on values that are not known", frame.fqn) from error
    finally:
        forward.quiet = None
        forward.watch.trace = None
        forward.side_channels.stop()
    del frame.functions[position + 1 :]
    if forward.watch.drew:
        frame.drew.append(position)
    forward.follow(real, args, kwargs, result)
    with without_functions():
        written = [t for t, old, new in zip(tensors, versions, versions_of(tensors), strict=True) if old != new]
        reach = None if written else forward.reach(result, edges)
        node = forward.recorder.call(
            "call_function", function, args, kwargs, frame,
            layer=frame.name(function.__name__), call=frame.call, written=written,
        )  # fmt: skip
    finish_call(forward, node, position, real, *forward.bare(args, kwargs), result, tuple(trace), reach)
    return result


def finish_call(
    forward: Forward,
    node: fx.Node,
    position: int,
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    result: Any,
    trace: tuple[Any, ...],
    reach: Reach,
) -> None:
    """Note what a recorded call drew and does, and bind what it gave.

    Args:
        forward: The forward.
        node: The call.
        position: Its place among the functions of its frame.
        func: What was called.
        args: Its arguments.
        kwargs: Its keyword arguments.
        result: What it gave.
        trace: What it did below Python.
        reach: To which of the tensors among its arguments the gradients of its result go.
    """
    frame, known = forward.frames.top, info(node)
    if position in frame.drew[-1:]:
        known.frame, known.position = frame, position
    known.random = any(info(read).random for read in node.all_input_nodes) or is_random(frame.functions[position])
    forward.counts.add(node, func, args, kwargs, trace, tuple(forward.attention))
    with without_functions():
        forward.counts.note_buffers(func, args, kwargs, result)
        forward.recorder.emit(result, node, tensors_in(args, kwargs), reach)


def _only_checks(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a function looks at values to refuse some, and what it returns has the same form for all others.

    ``F.gaussian_nll_loss`` asks whether a variance is below zero; the stage that runs it does so again.
    """
    shapes = []
    for span in (None, (-1.0, 1.0)):
        with without_functions(), without_modes():
            call, real_args, real_kwargs = on_zeros(func, args, kwargs, span=span)
            try:
                result = call(*real_args, **real_kwargs)
            except ValueError:  # the values that it refuses
                continue
            shapes.append(result.shape if isinstance(result, torch.Tensor) else None)
    return bool(shapes) and None not in shapes and len(set(shapes)) == 1


def _edges_of_several(tensors: Sequence[torch.Tensor]) -> Edges:
    """Give where the gradients of a call's arguments go, if that is more than one place: to one they do go."""
    with without_functions():
        several = sum(tensor.requires_grad for tensor in tensors) > 1
        return edges_of(tensors) if several else ()


_KEPT = frozenset({"register_hook", "requires_grad_", "__set__"})


_DEVICES = frozenset({"is_cuda", "is_cpu", "is_xpu", "device"})


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
