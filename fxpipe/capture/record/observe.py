"""Run a model's forward once with fake tensors and write down what it does.

Invariants:

- A call that changes a number is in the graph, or ``Blocked`` names what it is; there is no third way.
- Python takes the path that eager takes: integers and booleans stay real, and what Python reads of values that depend
  on an input becomes a guard.
- Nothing of the user's is written to: the modules are a copy, the random states and attributes are put back.
- What is recorded is the same in every process: nothing depends on an ``id``'s value, on a set's order or on time.

Who sees what: ``calls`` the torch calls between modules (a function mode), ``modules`` the calls of modules,
``bypass`` what reaches torch on other ways, ``guards`` the reads, ``counts`` what each call costs, ``outcome`` the end.
They share one ``Forward``.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from fxpipe._torch import FakeTensor, without_modes
from fxpipe.batch.inputs import Inputs
from fxpipe.capture.calls.ambient import mirrored_ambient
from fxpipe.capture.calls.blocked import Untold, user_line
from fxpipe.capture.calls.counting import LayerCounter
from fxpipe.capture.calls.objects import Objects
from fxpipe.capture.calls.real_values import LARGEST
from fxpipe.capture.calls.scalars import Scalar, followed_math, settled
from fxpipe.capture.calls.symbols import Sized, SizeReads, Symbols
from fxpipe.capture.model.blocks import Leaves
from fxpipe.capture.model.preserve import AttributeChange, Attributes, apply_changes, random_states, without_collection
from fxpipe.capture.model.skeleton import Skeleton
from fxpipe.capture.record.bypass import Bypasses
from fxpipe.capture.record.calls import Calls
from fxpipe.capture.record.forward import Forward, Guard, Selected
from fxpipe.capture.record.frames import Frames
from fxpipe.capture.record.modules import ModuleCalls
from fxpipe.capture.record.node import NodeInfo, info, set_info
from fxpipe.capture.record.outcome import finish, loss_of
from fxpipe.capture.record.recorder import Recorder
from fxpipe.ir.tree import map_tree, tree_leaves
from fxpipe.program import Program


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
        overwritten: Buffers that it writes to and whose value its backward needs.
        symbols: The same forward with symbols for sizes; None where it was not followed.
        selected: Nodes whose size values of inputs decide about, unknown to Python.
    """

    leaves: Leaves
    recorder: Recorder
    frames: Frames
    guards: tuple[Guard, ...]
    output: Any
    loss: torch.Tensor | None
    results: Mapping[int, fx.Node]
    left: tuple[AttributeChange, ...]
    notes: tuple[str, ...]
    overwritten: tuple[str, ...]
    symbols: Symbols | None = None
    selected: Mapping[fx.Node, Selected] = field(default_factory=dict)

    def result_node(self, tensor: torch.Tensor) -> fx.Node:
        """Give the node whose value a returned tensor is."""
        return self.results.get(id(tensor)) or self.recorder.node_of(tensor, self.frames.all[0])

    def sizes_sent(self, program: Program) -> tuple[Guard, ...]:
        """Give the guards of the sizes that values decide about, of what a stage sends to the next."""
        sent = {each.name for stage in program.stages for each in stage.sent}
        found = (guard for node, each in self.selected.items() if node.name in sent for guard in each.guards)
        return tuple(dict.fromkeys(found))


@without_collection()
def observe(
    skeleton: Skeleton,
    leaves: Leaves,
    inputs: Inputs,
    *,
    loss_fn: Callable[..., Any] | None = None,
    grad_enabled: bool = True,
    counter: LayerCounter | None = None,
    left: Sequence[AttributeChange] = (),
    known: Collection[int] = (),
    varying: Mapping[str, Sequence[Hashable | None]] | None = None,
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
        known: ``id`` of tensors among that which stand for what the earlier forward computed.
        varying: Names of the sizes that are followed as symbols (``Symbols``); None: no size is.
        progress: Called with the FQN of each block whose call ends.

    Returns:
        What was observed.

    Raises:
        Blocked: Something cannot be recorded; ``fqn`` names the opened module it happened in.
        CaptureError: The forward itself failed.
        Untold: A number in it cannot be told as a function of the sizes that vary.
    """
    with ExitStack() as stack:
        attributes = _enter(stack, skeleton, left, grad_enabled)
        recorder = Recorder(skeleton, stack.enter_context(mirrored_ambient()), known)
        forward = Forward.begin(skeleton, leaves, recorder, counter, attributes, progress)
        if varying is not None:
            stack.enter_context(_following(forward, inputs, varying))
        args, kwargs, target, objects = _given(forward, inputs)
        _see(stack, forward)
        output = skeleton.module(*args, **kwargs)
        loss = loss_of(forward, output, target, loss_fn)
        if loss is None or not grad_enabled:  # it is handed out
            (output,) = settled(output)
            _refuse_sizes(output)
        objects.check()
        outcome = finish(forward, loss if loss is not None else output)
    return Observation(
        leaves,
        recorder,
        forward.frames,
        tuple(forward.guards),
        output,
        loss,
        *(outcome.results, outcome.left, outcome.notes, outcome.overwritten, forward.symbols, outcome.selected),
    )


def _refuse_sizes(output: Any) -> None:
    """Refuse what a model returns that is another number for other sizes.

    Raises:
        Untold: There is such a number.
    """
    for path, leaf in tree_leaves(output, "output"):
        number = Sized.of(leaf) if isinstance(leaf, torch.SymInt) else leaf
        if isinstance(number, Sized | torch.SymFloat | torch.SymBool):
            raise Untold(f"{path} is a size")


def _given(forward: Forward, inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any], Any, Objects]:
    """Add the inputs to the graph, and give what the model is called with, and the objects in it."""
    fakes = {name: _input(tensor) for name, tensor in inputs.tensors.items()}
    if forward.symbols is not None:
        forward.symbols.begin(fakes)
    for name, tensor in fakes.items():
        forward.recorder.placeholder(name, tensor)
    with without_modes():
        forward.floats = [(fakes[name], tensor.cpu()) for name, tensor in inputs.tensors.items() if _is_known(tensor)]
    forward.numbers = bool(inputs.followed)
    given = inputs.with_tensors(fakes, _Numbers(forward).inputs(inputs.followed))
    objects = Objects()
    args, kwargs, target = (map_tree(objects.copied, part) for part in given)
    return args, kwargs, target, objects


def _is_known(tensor: torch.Tensor) -> bool:
    """Whether a float's values are at hand, and few enough to compare them."""
    real = not (tensor.is_meta or isinstance(tensor, FakeTensor)) and tensor.layout == torch.strided
    return real and tensor.is_floating_point() and not tensor.requires_grad and tensor.numel() <= LARGEST


def _following(
    forward: Forward, inputs: Inputs, varying: Mapping[str, Sequence[Hashable | None]]
) -> AbstractContextManager[None]:
    """Have the forward followed with symbols for sizes."""
    recorder = forward.recorder
    symbols = Symbols(forward.skeleton.mode, forward.watch, inputs.tensors, varying, recorder.made_here)
    forward.symbols = recorder.symbols = symbols
    return symbols.following()


def _see(stack: ExitStack, forward: Forward) -> None:
    """Hear of all that the forward does."""
    stack.enter_context(forward.watch)
    stack.enter_context(ModuleCalls(forward).intercepting())
    stack.enter_context(Bypasses(forward).intercepting())
    if "torch._dynamo" in sys.modules:  # compiled functions run as the functions they were
        stack.enter_context(torch.compiler.set_stance("force_eager"))
    if forward.numbers:
        stack.enter_context(followed_math())
    stack.enter_context(Calls(forward))
    if forward.symbols is not None:
        stack.enter_context(SizeReads(forward.symbols, lambda: forward.passes))


def _enter(stack: ExitStack, skeleton: Skeleton, left: Sequence[AttributeChange], grad_enabled: bool) -> Attributes:
    """Have all put back at the end, make the state around the forward, and give what its modules hold at the start."""
    stack.enter_context(random_states())
    before = Attributes(skeleton.module)
    stack.callback(before.restore)
    stack.callback(_restore_flags, [(each, each.requires_grad) for each in skeleton.module.parameters()])
    apply_changes(skeleton.module, left)
    attributes = Attributes(skeleton.module) if left else before
    stack.enter_context(torch.set_grad_enabled(grad_enabled))
    stack.enter_context(_unlogged())
    stack.enter_context(skeleton.mode)
    if torch.get_default_device().type != "cpu":
        stack.enter_context(torch.device("cpu"))  # over the user's default device; every call passes it
    return attributes


@contextmanager
def _unlogged() -> Iterator[None]:
    """Keep torch from logging the traceback of a call that fails on fakes: our error names the user's line."""
    logger = logging.getLogger(FakeTensor.__module__)
    logger.addFilter(_is_no_failure)
    try:
        yield
    finally:
        logger.removeFilter(_is_no_failure)


def _is_no_failure(record: logging.LogRecord) -> bool:
    return not record.exc_info


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


class _Numbers:
    """Writes down what a forward does with the Python numbers among its inputs.

    Args:
        forward: The forward.
    """

    def __init__(self, forward: Forward) -> None:
        self._forward = forward

    def inputs(self, numbers: Mapping[str, float]) -> dict[str, Scalar]:
        """Add an input for each number."""
        graph = self._forward.recorder.graph
        found = {}
        for name, value in numbers.items():
            node = graph.create_node("placeholder", name)
            set_info(node, NodeInfo(from_input=True, number=value))
            found[name] = Scalar(value, node, self)
        return found

    def made(self, function: Callable[..., Any], args: tuple[Any, ...], value: float) -> Any:
        """Note that a number was computed of others."""
        if self._forward.counting:
            return value
        return Scalar(value, self._noted(function, args, value), self)

    def read(self, function: Callable[..., Any], args: tuple[Any, ...], answer: Any) -> None:
        """Make what Python saw of a number a guard."""
        forward = self._forward
        nodes = tuple(arg.node if type(arg) is Scalar else arg for arg in args)
        known = any(guard.node.target is function and guard.node.args == nodes for guard in forward.guards)
        if not forward.counting and not known:
            node = self._noted(function, args, answer)
            info(node).is_guard = True
            forward.guards.append(Guard(node, answer, user_line()))

    def _noted(self, function: Callable[..., Any], args: tuple[Any, ...], value: float) -> fx.Node:
        nodes = tuple(arg.node if type(arg) is Scalar else arg for arg in args)
        node = self._forward.recorder.graph.create_node("call_function", function, nodes)
        set_info(node, NodeInfo(from_input=True, number=value))
        return node
