"""An independent judge of captured programs: runs the graphs node by node, each stage with modules of its own.

Nothing of fxpipe's runtime is used. Between stages values are copied and gradients handed back by hand, so that
whatever passes from stage to stage on another way is missed. Random numbers are drawn from the one global generator in
the order of calls, as the model itself draws them.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import random
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from judge import distances
from torch import fx, nn
from wide import in_float64, wide_inputs, wide_model, widened

from fxpipe.ir.graph import LayerGraph
from fxpipe.ir.tree import tree_leaves
from fxpipe.program import CallContext, Program, StageProgram, run_info


@dataclasses.dataclass
class Outcome:
    """What one forward and backward gave.

    Attributes:
        output: The loss, or what the model returned.
        gradients: By first FQN; only of parameters that got one.
        buffers: By first FQN, after the forward.
    """

    output: Any
    gradients: dict[str, torch.Tensor]
    buffers: dict[str, torch.Tensor]


def tensors_of(value: Any) -> dict[str, torch.Tensor]:
    return {path: leaf for path, leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)}


def objective(output: Any) -> torch.Tensor:
    """One number from whatever a model returns: the loss, or something of every tensor that takes a gradient."""
    loss = output if isinstance(output, torch.Tensor) and output.dim() == 0 else None
    parts = [t.float().abs() if t.is_complex() else t.float() for t in tensors_of(output).values() if t.requires_grad]
    return loss if loss is not None else sum((part.pow(2).mean() for part in parts), torch.zeros(()))


def names_of(model: nn.Module) -> dict[int, str]:
    """First FQN of each tensor."""
    found: dict[int, str] = {}
    for fqn, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)):
        found.setdefault(id(tensor), fqn)
    return found


def run_model(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], seed: int, loss: bool, *, wide: bool = False
) -> Outcome:
    """The model itself, as it is or in float64; its tensors are as before afterwards."""
    model = wide_model(model) if wide else copy.deepcopy(model)
    buffers = dict(model.named_buffers())
    torch.manual_seed(seed)
    random.seed(seed)
    args, kwargs = copy.deepcopy((args, dict(kwargs)))
    if wide:
        args, kwargs = wide_inputs((args, kwargs))
    with in_float64(wide):
        output = model(*args, **kwargs)
        if loss:
            output = output if isinstance(output, torch.Tensor) else output["loss"] if _is_map(output) else output.loss
        goal = objective(output)
        if goal.requires_grad:
            goal.backward()
    gradients = {fqn: p.grad.to_dense() for fqn, p in model.named_parameters() if p.grad is not None}
    return Outcome(detached(output), gradients, {fqn: model.get_buffer(fqn) for fqn in buffers})


def _is_map(value: Any) -> bool:
    return isinstance(value, Mapping)


def detached(value: Any) -> Any:
    """Every leaf of a result by its path, numbers and None among them."""
    return {path: leaf.detach() if isinstance(leaf, torch.Tensor) else leaf for path, leaf in tree_leaves(value)}


class _Stage:
    """One stage's graph and its own copies of the modules and tensors that it uses."""

    def __init__(
        self,
        program: StageProgram,
        constants: Mapping[str, Any],
        model: nn.Module,
        names: Mapping[int, str],
        wide: bool,
    ) -> None:
        self.program = program
        self.wide = wide
        self.constants = constants
        shared = (getattr(part, "config", None) for part in model.modules())
        memo: dict[int, Any] = {id(config): config for config in shared if config is not None}
        self.modules = {fqn: copy.deepcopy(model.get_submodule(fqn), memo) for fqn in program.modules}
        self.attributes = {}
        for fqn in program.attributes:
            owner, _, leaf = fqn.rpartition(".")
            self.attributes[fqn] = copy.deepcopy(getattr(model.get_submodule(owner), leaf), memo)
        self.tensors = {names[key]: copied for key, copied in memo.items() if key in names}

    def forward(self, received: list[torch.Tensor], inputs: Mapping[str, Any]) -> list[torch.Tensor]:
        placeholders = [node for node in self.program.graph.nodes if node.op == "placeholder"]
        self.received = [
            tensor.detach().clone(memory_format=torch.preserve_format).requires_grad_(boundary.meta.requires_grad)
            for tensor, boundary in zip(received, self.program.received, strict=True)
        ]
        given = [tensor + 0 if tensor.requires_grad else tensor for tensor in self.received]
        values = dict(zip(placeholders, [*given, *(inputs[name] for name in self.program.inputs)], strict=True))
        for node in self.program.graph.nodes:
            if node.op == "output":
                self.sent = [values[part] for part in node.args[0]]
            elif node not in values:
                values[node] = self._value(node, values)
        for boundary, tensor in zip(self.program.sent, self.sent, strict=False):
            dtype = getattr(torch, boundary.meta.dtype)
            planned = (boundary.meta.shape, widened(dtype) if self.wide else dtype)
            assert (tuple(tensor.shape), tensor.dtype) == planned, boundary.name
            assert tensor.requires_grad == boundary.meta.requires_grad, boundary.name
        return self.sent

    def _value(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        if node.op == "get_attr":
            return self.constants[node.target] if node.target in self.constants else self.attributes[node.target]
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda used: values[used])
        with surrounded(run_info(node).context):
            if node.op == "call_module":
                return self.modules[node.target](*args, **kwargs)
            if node.op == "call_method":
                return getattr(args[0], node.target)(*args[1:], **kwargs)
            return node.target(*args, **kwargs)

    def buffer(self, fqn: str) -> torch.Tensor | None:
        """The buffer as it is now; a forward may have put another tensor there."""
        for path, module in self.modules.items():
            if fqn.startswith(f"{path}."):
                return module.get_buffer(fqn.removeprefix(f"{path}."))
        return self.tensors.get(fqn)

    def backward(self, gradients: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
        pairs = [(t, g) for t, g in zip(self.sent, gradients, strict=True) if t.requires_grad and g is not None]
        if pairs:
            torch.autograd.backward([tensor for tensor, _ in pairs], [gradient for _, gradient in pairs])
        return [tensor.grad for tensor in self.received]


@contextlib.contextmanager
def surrounded(context: CallContext | None) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        if context is not None:
            if context.inference:
                stack.enter_context(torch.inference_mode())
            elif context.grad_enabled is not None:
                stack.enter_context(torch.set_grad_enabled(context.grad_enabled))
            if context.attention is not None:
                kernels = [getattr(torch.nn.attention.SDPBackend, name) for name in context.attention]
                stack.enter_context(torch.nn.attention.sdpa_kernel(kernels, set_priority=True))
            for state in context.autocast:
                dtype = getattr(torch, state.dtype)
                kind = state.device_type or "cpu"
                stack.enter_context(torch.autocast(kind, dtype, state.enabled, state.cache_enabled))
        yield


def run_program(
    program: Program, model: nn.Module, inputs: Mapping[str, Any], seed: int, *, wide: bool = False
) -> Outcome:
    """The stages one after another, forward and backward, as they are or in float64; the model is not touched."""
    model = wide_model(model) if wide else model
    names = names_of(model)
    constants = {name: _fresh(constant) for name, constant in program.constants.items()}
    inputs = copy.deepcopy(dict(inputs))
    if wide:
        constants, inputs = wide_inputs((constants, inputs))
    stages = [_Stage(part, constants, model, names, wide) for part in program.stages]
    torch.manual_seed(seed)
    random.seed(seed)
    with in_float64(wide):
        return _run(program, stages, model, inputs)


def _run(program: Program, stages: list[_Stage], model: nn.Module, inputs: Mapping[str, Any]) -> Outcome:
    values: list[torch.Tensor] = []
    for stage in stages:
        values = stage.forward(values, inputs)
    results = [value.detach().requires_grad_(value.requires_grad) for value in values]
    output = sum(results) if program.loss_terms else program.rebuild(tuple(results))
    goal = objective(output)
    if goal.requires_grad:
        goal.backward()
    gradients: list[torch.Tensor | None] = [result.grad for result in results]
    for stage in reversed(stages):
        gradients = stage.backward(gradients)
    return Outcome(detached(output), _summed(stages), _buffers(stages, model))


def _fresh(constant: Any) -> Any:
    """A random generator as it was: the next run draws the same."""
    return constant.clone_state() if isinstance(constant, torch.Generator) else constant


def _summed(stages: list[_Stage]) -> dict[str, torch.Tensor]:
    """The gradients of a tensor that several stages hold, added up from the last stage, as autograd would."""
    found: dict[str, torch.Tensor] = {}
    for stage in reversed(stages):
        for fqn, tensor in stage.tensors.items():
            if tensor.grad is not None:
                found[fqn] = found[fqn] + tensor.grad.to_dense() if fqn in found else tensor.grad.to_dense()
    return found


def _buffers(stages: list[_Stage], model: nn.Module) -> dict[str, torch.Tensor]:
    """The buffers after the forward; stages that changed one must agree."""
    buffers = dict(model.named_buffers())
    for fqn, before in list(buffers.items()):
        held = [tensor for stage in stages if (tensor := stage.buffer(fqn)) is not None]
        changed = [tensor for tensor in held if not torch.equal(tensor, before)]
        assert all(torch.equal(tensor, changed[0]) for tensor in changed), f"stages disagree about {fqn}"
        buffers[fqn] = changed[0] if changed else before
    return buffers


def differences(expected: Outcome, found: Outcome, *, bits: bool = False) -> dict[str, float]:
    """By name of everything that is not equal: how far it is off; infinite where it is missing."""
    off = {}
    for kind in ("output", "gradients", "buffers"):
        each = distances(getattr(found, kind), getattr(expected, kind), bits=bits)
        off.update({f"{kind} {name}": far for name, far in each.items()})
    return off


def one_stage(graph: LayerGraph) -> dict[str, int]:
    return dict.fromkeys(graph.layer_names, 0)


def every_boundary(graph: LayerGraph) -> tuple[dict[str, int], int]:
    """As many stages as there can be: each layer its own, as far as groups and order allow."""
    return _numbered(graph, list(range(len(graph.specs))))


def cut(graph: LayerGraph, num_stages: int, numbers: random.Random) -> dict[str, int] | None:
    """A random cut into ``num_stages``, None where the graph is too small."""
    free = [index for index in range(len(graph.specs)) if index not in graph.recomputed]
    for _ in range(50):
        if len(free) < num_stages:
            return None
        cuts = sorted(numbers.sample(free[1:], num_stages - 1))
        stages, found = _numbered(graph, [sum(index >= place for place in cuts) for index in range(len(graph.specs))])
        if found == num_stages:
            return stages
    return None


def _numbered(graph: LayerGraph, wanted: list[int]) -> tuple[dict[str, int], int]:
    """Move layers to later stages until groups are together and the order holds; then number without gaps.

    Calls stay in the model's order too, so that random numbers are drawn as the model draws them; what is never called
    has no order, and lies beside its neighbour.
    """
    called = {index for edge in graph.edges for index in edge} or set(range(len(wanted)))
    stage = [number if index in called else 0 for index, number in enumerate(wanted)]
    free = [index for index in range(len(stage)) if index not in graph.recomputed and index in called]
    before = list(stage)
    while True:
        for group in graph.groups:
            for index in group:
                stage[index] = max(stage[i] for i in group)
        for earlier, later in itertools.pairwise(free):
            stage[later] = max(stage[earlier], stage[later])
        if stage == before:
            break
        before = list(stage)
    used = sorted({stage[index] for index in free})
    place = {number: position for position, number in enumerate(used)}
    return {name: place.get(stage[i], 0) for i, name in enumerate(graph.layer_names)}, len(used)
