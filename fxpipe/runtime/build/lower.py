"""A stage's graph as one Python function: what the stage runs.

The function is written out as source, one line per node, because a node may need more than its call: the grad,
inference and autocast state it was captured in (``with``), a seed before it draws, or recomputation in the backward (a
nested function called through ``torch.utils.checkpoint``). Modules, parameters and buffers are looked up in the stage
at every call, so wrappers that exchange them (FSDP2, ``torch.compile``, adapters) are seen.
"""

from __future__ import annotations

import keyword
import linecache
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from fxpipe.program import BoundaryTensor, CallContext, StageProgram, run_info
from fxpipe.runtime.build.boundary import conform
from fxpipe.runtime.build.recompute import recompute

Lowered = Callable[..., tuple[torch.Tensor, ...]]
"""Called with the stage module, the draws of the microbatch, what was received, and the inputs by name."""


def lower(
    program: StageProgram,
    constants: Mapping[str, Any],
    device: torch.device,
    *,
    is_last: bool,
    title: str = "stage",
    recompute: Sequence[str] = (),
) -> Lowered:
    """Turn a stage's graph into a function.

    Args:
        program: Its graph is not modified.
        constants: Values of the constants it reads, on ``device`` already.
        device: Replaces every ``torch.device`` among the arguments.
        is_last: Whether the output is the model's, which keeps its strides.
        title: Names the source in tracebacks.
        recompute: FQNs of modules that are opened here, and whose calls are run again in the backward.

    Returns:
        The function; its text is in its ``__doc__``.
    """
    writer = _Writer(program, constants, device, recompute)
    source = writer.write(() if is_last else program.sent)
    filename = f"<fxpipe {title} {id(program):x}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
    exec(compile(source, filename, "exec"), writer.values)
    function: Lowered = writer.values["run"]
    function.__doc__ = source
    return function


_RESERVED = ("self", "draws", "received", "inputs", "run", "slice", "getattr")


class _Writer:
    """Collects the lines of one function and the values they name."""

    def __init__(
        self, program: StageProgram, constants: Mapping[str, Any], device: torch.device, recompute: Sequence[str]
    ) -> None:
        self._program = program
        self._recompute = recompute
        self._constants = constants
        self._device = device
        self._lines: list[str] = []
        self._taken = {node.name for node in program.graph.nodes} | set(_RESERVED)
        self._named: dict[int, str] = {}
        self._last_uses = _last_uses(program.graph)
        self.values: dict[str, Any] = {}

    def write(self, sent: tuple[BoundaryTensor, ...]) -> str:
        """Write the whole function."""
        nodes = list(self._program.graph.nodes)
        self._line(0, "def run(self, draws, received, inputs):")
        placeholders = [node for node in nodes if node.op == "placeholder"]
        self._write_placeholders(placeholders)
        # A read of a parameter is written where it is used; it neither begins nor ends a region.
        calls = [node for node in nodes if node.op.startswith("call_")]
        for region, run in groupby(calls, key=self._region):
            if region is None:
                self._write_calls(list(run), 1)
            else:
                self._write_region(list(run))
        (output,) = [node for node in nodes if node.op == "output"]
        self._write_output(output, sent)
        return "\n".join(self._lines) + "\n"

    def _region(self, node: fx.Node) -> Any:
        """Name the region a call is recomputed with: the user's own, or a module that is to be; None for none."""
        info = run_info(node)
        if info.checkpoint is not None:
            return info.checkpoint
        layer = info.layer.partition("@")[0]
        return next((fqn for fqn in self._recompute if layer == fqn or layer.startswith(f"{fqn}.")), None)

    def _write_placeholders(self, placeholders: list[fx.Node]) -> None:
        num_received = len(self._program.received)
        received = ", ".join(node.name for node in placeholders[:num_received])
        if received:
            self._line(1, f"{received}, = received")
        for node, name in zip(placeholders[num_received:], self._program.inputs, strict=True):
            self._line(1, f"{node.name} = inputs[{name!r}]")

    def _write_output(self, output: fx.Node, sent: tuple[BoundaryTensor, ...]) -> None:
        parts = [self._expression(part) for part in output.args[0]]  # type: ignore[union-attr]
        if sent:
            function = self._value(conform, "conform")
            declared = [self._value(tensor, f"boundary_{tensor.name}") for tensor in sent]
            parts = [f"{function}({part}, {what})" for part, what in zip(parts, declared, strict=True)]
        self._line(1, f"return {_tuple(parts)}")

    def _write_region(self, calls: list[fx.Node]) -> None:
        """Write a run of calls as a function of its own that is run again in the backward."""
        inside = set(calls)
        arguments = _unique(node for call in calls for node in _computed(call) if node not in inside)
        results = [node for node in calls if any(user not in inside for user in node.users)]
        name = self._fresh("region")
        self._line(1, f"def {name}({', '.join(node.name for node in arguments)}):")
        self._write_calls(calls, 2)
        self._line(2, f"return {_tuple([node.name for node in results])}")
        draws = any(run_info(node).draws for node in calls)
        paths = [_path(str(node.target)) for node in calls if node.op == "call_module"]
        given = ", ".join([name, f"[{', '.join(paths)}]", repr(draws), *(n.name for n in arguments)])
        call = f"{self._value(recompute, 'recomputed')}({given})"
        self._line(1, f"{', '.join(node.name for node in results)}, = {call}" if results else call)
        self._drop((node for node in arguments if self._last_uses[node] in inside), 1)

    def _write_calls(self, calls: list[fx.Node], depth: int) -> None:
        for context, run in groupby(calls, key=lambda node: run_info(node).context):
            inner = depth
            managers = self._managers(context)
            if managers:
                self._line(depth, f"with {', '.join(managers)}:")
                inner += 1
            for node in run:
                self._write_call(node, inner)
                dead = (used for used in (*_computed(node), node) if self._last_uses.get(used, node) is node)
                self._drop(dead, inner)

    def _write_call(self, node: fx.Node, depth: int) -> None:
        info = run_info(node)
        if info.draw is not None:
            self._line(depth, f"draws.seed({self._value(info.draw, 'draw')})")
        if info.scope is not None:
            self._line(depth, f"draws.enter({node.target!r}, {self._value(info.scope, 'scope')})")
        args = [self._expression(argument) for argument in node.args]
        kwargs = [f"{name}={self._expression(argument)}" for name, argument in node.kwargs.items()]
        if node.op == "call_module":
            function = _path(str(node.target))
        elif node.op == "call_method":
            function = f"{args.pop(0)}.{node.target}"
        else:
            function = self._value(node.target, getattr(node.target, "__name__", "function"))
        self._line(depth, f"{node.name} = {function}({', '.join(args + kwargs)})")

    def _drop(self, nodes: Iterator[fx.Node], depth: int) -> None:
        """Let go of values that nothing reads any more, so that their memory is free."""
        dead = _unique(nodes)
        if dead:
            self._line(depth, f"{' = '.join(node.name for node in dead)} = None")

    def _managers(self, context: CallContext | None) -> list[str]:
        if context is None:
            return []
        managers = []
        if context.inference:
            managers.append(f"{self._value(torch.inference_mode, 'inference_mode')}()")
        if context.grad_enabled is not None:
            managers.append(f"{self._value(torch.set_grad_enabled, 'set_grad_enabled')}({context.grad_enabled})")
        for state in context.autocast:
            device_type = state.device_type or self._device.type
            if device_type not in ("cpu", self._device.type):
                continue  # nothing runs there
            managers.append(
                f"{self._value(torch.autocast, 'autocast')}({device_type!r}, "
                f"{self._value(getattr(torch, state.dtype), state.dtype)}, {state.enabled}, {state.cache_enabled})"
            )
        if context.attention is not None:
            kernels = [self._value(getattr(SDPBackend, name), name) for name in context.attention]
            managers.append(f"{self._value(sdpa_kernel, 'sdpa_kernel')}([{', '.join(kernels)}], set_priority=True)")
        return managers

    def _expression(self, argument: Any) -> str:
        if isinstance(argument, fx.Node):
            if argument.op != "get_attr":
                return argument.name
            target = str(argument.target)
            return self._value(self._constants[target], target) if target in self._constants else _path(target)
        if isinstance(argument, tuple | list) and not isinstance(argument, torch.Size):
            parts = [self._expression(part) for part in argument]
            if hasattr(argument, "_fields"):
                return f"{self._value(type(argument), type(argument).__name__)}({', '.join(parts)})"
            return _tuple(parts) if isinstance(argument, tuple) else f"[{', '.join(parts)}]"
        if isinstance(argument, dict):
            return f"{{{', '.join(f'{self._expression(k)}: {self._expression(v)}' for k, v in argument.items())}}}"
        if isinstance(argument, slice):
            return f"slice({', '.join(map(self._expression, (argument.start, argument.stop, argument.step)))})"
        return self._literal(argument)

    def _literal(self, argument: Any) -> str:
        if isinstance(argument, torch.device):
            return self._value(self._device, "device")
        plain = argument is None or type(argument) in (bool, int, str)
        if plain or (type(argument) is float and math.isfinite(argument)):
            return repr(argument)
        return self._value(argument, type(argument).__name__)

    def _value(self, value: Any, hint: str) -> str:
        """Give the name a value goes by; the same one for the same object."""
        if id(value) not in self._named:
            self._named[id(value)] = self._fresh(hint)
            self.values[self._named[id(value)]] = value
        return self._named[id(value)]

    def _fresh(self, hint: str) -> str:
        base = "".join(letter if letter.isalnum() else "_" for letter in hint)
        if not base.isidentifier() or keyword.iskeyword(base):
            base = f"_{base}"
        name, number = base, 0
        while name in self._taken:
            number += 1
            name = f"{base}_{number}"
        self._taken.add(name)
        return name

    def _line(self, depth: int, text: str) -> None:
        self._lines.append("    " * depth + text)


def _computed(node: fx.Node) -> list[fx.Node]:
    """List what a call reads that has a name of its own in the source."""
    return [used for used in node.all_input_nodes if used.op != "get_attr"]


def _last_uses(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    last: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        for used in node.all_input_nodes:
            last[used] = node
    return last


def _unique(nodes: Iterator[fx.Node]) -> list[fx.Node]:
    return list(dict.fromkeys(nodes))


def _tuple(parts: list[str]) -> str:
    return f"({', '.join(parts)}{',' if len(parts) == 1 else ''})"


def _path(fqn: str) -> str:
    expression = "self"
    for part in fqn.split("."):
        plain = part.isidentifier() and not keyword.iskeyword(part)
        expression = f"{expression}.{part}" if plain else f"getattr({expression}, {part!r})"
    return expression
