"""The live model behind a pipeline: observes its forward for any inputs, at any grain, in either mode."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from fxpipe.batch.dims import BatchLayout
from fxpipe.batch.inputs import Inputs, name_inputs, parameter_names
from fxpipe.capture.calls.blocked import Blocked
from fxpipe.capture.calls.counting import LayerCounter
from fxpipe.capture.calls.values import tensors_in
from fxpipe.capture.cut.stage_graphs import Holders, make_program
from fxpipe.capture.failed import failed_forward
from fxpipe.capture.graph.layers import make_layer_graph
from fxpipe.capture.graph.loss import WAY_OUT, Loss, Term, describe_terms, find_loss_terms, given_terms, loss_terms
from fxpipe.capture.graph.reading import Read, read_again
from fxpipe.capture.graph.sizes import Unsuited, output_dims
from fxpipe.capture.graph.structure import Structure, computation_of, expressions_of, make_structure
from fxpipe.capture.graph.symbolic import Symbolic
from fxpipe.capture.graph.trace import trace_layers
from fxpipe.capture.model.blocks import Leaves, block_fqns, choose_leaves
from fxpipe.capture.model.builtin import is_builtin
from fxpipe.capture.model.preserve import AttributeChange
from fxpipe.capture.model.skeleton import Skeleton, make_skeleton
from fxpipe.capture.places import relative
from fxpipe.capture.progress import shown_progress
from fxpipe.capture.record.forward import Guard
from fxpipe.capture.record.node import info, made_by
from fxpipe.capture.record.observe import Observation, observe
from fxpipe.errors import CaptureError
from fxpipe.ir.graph import LayerGraph
from fxpipe.program import Program

MOST_CLOSINGS = 40
"""Kinds of modules that one model may need closed before capture gives up."""


@dataclass(frozen=True, slots=True, eq=False)
class Captured:
    """One forward, recorded and understood.

    Attributes:
        inputs: What it was recorded with.
        observation: What the forward did.
        structure: What of that is needed.
        terms: Summands of the loss; empty without a loss.
        notes: What the report should say.
        coupling: Why microbatches' losses do not add up to the batch's; ``""`` where they do.
        symbolic: Where sizes are symbols: what depends on them.
    """

    inputs: Inputs
    observation: Observation
    structure: Structure
    terms: tuple[Term, ...]
    notes: tuple[str, ...]
    coupling: str = ""
    symbolic: Symbolic | None = None

    @property
    def graph_module(self) -> fx.GraphModule:
        """The whole recorded graph, to print: ``captured.graph_module.print_readable()``."""
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        for node in sorted(self.structure.nodes, key=lambda node: node.op != "placeholder"):
            copies[node] = graph.node_copy(node, copies.__getitem__)
        graph.output(tuple(copies[node] for node in self.structure.results))
        root = _Root(self.observation.recorder.skeleton.module, self.observation.recorder.constants)
        return fx.GraphModule(root, graph, class_name=type(self.observation.recorder.skeleton.module).__name__)

    def guards(self, program: Program) -> tuple[Read | None, tuple[Guard, ...]]:
        """Give a function that reads again, from named inputs, what decides about a program, and the answers it got."""
        guards = (*(self.symbolic or self.observation).guards, *self.observation.sizes_sent(program))
        return read_again(self.observation.recorder, guards), guards

    def check_separates(self) -> None:
        """Refuse a loss whose microbatches do not add up to the batch.

        Raises:
            CaptureError: Says which call couples the samples.
        """
        if self.coupling:
            raise CaptureError(f"{self.coupling}\n  {WAY_OUT}")

    def program(self, stage_of_layer: Mapping[str, int], num_stages: int, held: Holders | None = None) -> Program:
        """Cut the graph into stages; see ``make_program``."""
        return make_program(self.observation, self.structure, stage_of_layer, num_stages, loss_terms(self.terms), held)


class _Root(nn.Module):
    """The skeleton's modules with the constants beside them, for a graph that is printed."""

    def __init__(self, module: nn.Module, constants: Mapping[str, Any]) -> None:
        super().__init__()
        for name, child in module.named_children():
            self.add_module(name, child)
        for name, parameter in module.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, buffer in module.named_buffers(recurse=False):
            self.register_buffer(name, buffer)
        for name, constant in constants.items():
            setattr(self, name, constant)


_ATTENTION = {"causal": "without a mask", "full": "without a mask", "mask": "with a mask"}
"""The forms of attention; without a mask it can use the fastest kernels."""


class Capture:
    """Holds a copy of the user's modules and records what their forward does.

    Args:
        model: The user's model; not modified, and its tensors are not copied.
        loss_fn: Called as ``loss_fn(output, target)``; None where the model returns its loss.
        leaves: Classes, class names and FQN patterns that are never opened.
        name: What messages call the model.

    Raises:
        CaptureError: The model cannot be copied, or a pattern matches nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        loss_fn: Callable[..., Any] | None = None,
        leaves: Sequence[object] = (),
        loss_weight: object = None,
    ) -> None:
        self.skeleton: Skeleton = make_skeleton(model)
        self.loss_fn = loss_fn
        self.loss_weight = loss_weight
        self.dtype: torch.dtype | None = None
        self._model: nn.Module | None = model
        self.name = type(model).__name__
        self._patterns = tuple(leaves)
        self.parameter_names = parameter_names(self.skeleton.module.forward)
        self._closed: dict[str, Blocked] = {}  # modules found not to be openable, and why
        self._opened: dict[str, Blocked | None] = {}  # modules that have to be opened, and why; None: for their loss
        # Names patterns without a match now.
        self._kept = choose_leaves(self.skeleton.module, "block", patterns=self._patterns).kept

    @property
    def blocks(self) -> tuple[str, ...]:
        """FQNs of the model's blocks."""
        return block_fqns(self.skeleton.module)

    @property
    def closed(self) -> Mapping[str, str]:
        """Modules that capture found must stay whole, and why."""
        return {fqn: f"{why.reason}, {why.where}" if why.where else why.reason for fqn, why in self._closed.items()}

    def closed_modules(self, opened: Sequence[str]) -> frozenset[str]:
        """Give the FQNs of the modules recorded as one call, where ``opened`` blocks are opened."""
        return self._leaves("block", opened).closed

    def cast(self, dtype: torch.dtype) -> None:
        """Capture from now on as if every floating-point parameter and buffer had another dtype."""
        assert self._model is not None, "the model is no longer there"
        before = self.skeleton
        training = [part.training for part in before.module.modules()]
        self.skeleton = make_skeleton(self._model, dtype)
        self.skeleton.values.update(before.values)
        before.release(self._model)
        self.dtype = dtype
        for part, mode in zip(self.skeleton.module.modules(), training, strict=True):
            part.training = mode

    def release(self) -> None:
        """Let go of the user's model: its structure is known, and its values are where they are needed."""
        if self._model is not None:
            self.skeleton.release(self._model)
            self._model = None

    def inputs(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], target: Any = None, layout: BatchLayout | None = None
    ) -> Inputs:
        """Name the tensors of a microbatch."""
        return name_inputs(self.parameter_names, args, kwargs, target, layout)

    def capture(
        self,
        inputs: Inputs,
        *,
        grain: str = "block",
        opened: Sequence[str] = (),
        with_loss: bool = True,
        grad_enabled: bool = True,
        counter: LayerCounter | None = None,
        weigh: bool = True,
    ) -> Captured:
        """Record one forward.

        Args:
            inputs: A microbatch.
            grain: ``"block"`` or ``"op"``.
            opened: Blocks that are opened at block grain all the same.
            with_loss: Whether the loss is wanted (where there is one) rather than the model's output.
            grad_enabled: Gradient mode around the forward.
            counter: Counts what each call does.
            weigh: Whether to find how microbatches' losses add up: not where the graph is only planned.

        Raises:
            CaptureError: The forward does something that cannot be recorded without risking wrong numbers, or fails.
        """
        for _ in range(MOST_CLOSINGS):
            leaves, whole = self._leaves(grain, opened), self.closed_modules(opened) if grain == "op" else ()
            try:
                observation = self._observe(leaves, inputs, with_loss, grad_enabled, counter)
                self._check_left(observation, inputs, with_loss, grad_enabled)
            except Blocked as blocked:
                self._change(leaves, blocked, inputs)
                continue
            structure = make_structure(observation, training=with_loss, whole=whole)
            if not structure.is_loss or not weigh:
                return self._finished(inputs, observation, structure, Loss(()))
            criterion = self._closed_criterion(structure)
            if criterion is not None:
                self._opened[criterion] = None
                continue
            loss = self._loss(leaves, inputs, observation, structure, grad_enabled)
            structure = make_structure(observation, training=True, summands=[term.node for term in loss.terms])
            return self._finished(inputs, observation, structure, loss)
        raise CaptureError(
            f"{self.name} has more than {MOST_CLOSINGS} kinds of modules that cannot be opened\n"
            "  use grain='block', or name them in leaves="
        )

    def output_dims(self, captured: Captured, inputs: Inputs) -> dict[str, int | None]:
        """Find the dimension of samples of each tensor that the model returns, by path: ``"output['logits']"``.

        The forward is recorded once more with twice the samples, and what has grown is looked at; None where nothing
        has.

        Raises:
            CaptureError: The forward does not run on twice as many samples.
        """
        leaves, doubled = captured.observation.leaves, inputs.doubled()
        if doubled is None:
            return {}
        other = self._observe(leaves, doubled, False, False, None)
        one = captured.observation if captured.symbolic is None else self._observe(leaves, inputs, False, False, None)
        return output_dims(one.output, other.output, inputs.samples)

    def layer_graph(
        self, captured: Captured, *, batch_size: int | None = None, notes: Sequence[str] = ()
    ) -> LayerGraph:
        """Turn a recorded forward into the graph of layers that is planned."""
        return make_layer_graph(
            self.skeleton,
            captured.structure,
            blocks=captured.observation.leaves.blocks,
            storages=captured.observation.recorder.storages,
            inputs=captured.inputs.described(),
            batch_size=batch_size,
            notes=(*captured.notes, *notes),
        )

    def trace(self, *, notes: Sequence[str] = ()) -> LayerGraph:
        """Give the model's graph of layers without an example: a plain symbolic trace at block grain.

        Nothing is known of the tensors between the layers, and nothing is counted: layers can be costed by their
        parameters alone. Arguments with defaults keep them.

        Raises:
            CaptureError: The forward cannot be traced symbolically; an example is needed.
        """
        return trace_layers(self.skeleton, self._leaves("block", ()), notes=notes)

    def _leaves(self, grain: str, opened: Sequence[str]) -> Leaves:
        wanted = (*opened, *self._opened)
        leaves = choose_leaves(self.skeleton.module, grain, opened=wanted, patterns=self._patterns)
        closed = leaves.closed | self._closed.keys()
        return replace(leaves, closed=closed - self._opened.keys(), kept=leaves.kept | self._closed.keys())

    def _observe(
        self,
        leaves: Leaves,
        inputs: Inputs,
        with_loss: bool,
        grad_enabled: bool,
        counter: LayerCounter | None,
        left: Sequence[AttributeChange] = (),
        known: Collection[int] = (),
    ) -> Observation:
        try:
            with shown_progress(f"capturing {self.name}", len(leaves.blocks)) as progress:
                return observe(
                    self.skeleton,
                    leaves,
                    inputs,
                    loss_fn=self.loss_fn if with_loss else None,
                    grad_enabled=grad_enabled,
                    counter=counter,
                    left=left,
                    known=known,
                    progress=progress,
                )
        except (Blocked, CaptureError):
            raise
        except Exception as error:
            raise failed_forward(self.name, self.skeleton.module.forward, inputs, error) from error

    def _check_left(self, observation: Observation, inputs: Inputs, with_loss: bool, grad_enabled: bool) -> None:
        """Let the forward run again on what it left behind: what it keeps must not change what it does.

        It may keep what it computes of parameters and constants, and read it the next time: then it is computed anew.

        Raises:
            Blocked: It carries something from one batch to the next.
        """
        if not observation.left:
            return
        change = observation.left[0]
        kept = [change.now for change in observation.left if not change.registry]
        known = expressions_of(observation, tensors_in(kept))
        reads = Blocked(f"the forward sets the attribute {change.path} and reads it in the next batch", change.fqn)
        try:
            again = self._observe(observation.leaves, inputs, with_loss, grad_enabled, None, observation.left, known)
        except (Blocked, CaptureError):
            raise reads from None
        if computation_of(observation, with_loss) != computation_of(again, with_loss, known):
            raise reads

    def _change(self, leaves: Leaves, blocked: Blocked, inputs: Inputs) -> None:
        """Open or close the module in which something cannot be recorded, and all of its class, from now on.

        Raises:
            CaptureError: Neither is possible.
        """
        fqn = blocked.fqn
        shut = [
            name for name in map(leaves.around, blocked.opens) if name not in self._kept | self._closed.keys() | {""}
        ]
        if shut:
            alike = [other for name in shut for other in self._alike(name) if other not in self._kept]
            self._opened.update(dict.fromkeys(alike, blocked))
            return
        closable = self._closable(leaves, blocked)
        if closable:
            for name in self._alike(closable):
                if leaves.can_close(name):
                    self._closed[name] = blocked
                    self._opened = {f: why for f, why in self._opened.items() if not f"{f}.".startswith(f"{name}.")}
            return
        why = self._opened.get(fqn) or blocked
        where = f", {why.where}" if why.where else ""
        raise CaptureError(
            f"{why.reason} (module {fqn or self.name}{where})\n  {self._way_out(why, inputs)}"
        ) from blocked

    def _closable(self, leaves: Leaves, blocked: Blocked) -> str:
        """Give the innermost module that would hide what is blocked if it were recorded as one call, ``""`` for none.

        Where a module is recorded whole already, or had to be opened, the next one around it may help.
        """
        if (blocked.way_out and blocked.fqn in leaves.closed) or not self._is_module(blocked.fqn):
            return ""
        parts = blocked.fqn.split(".")
        around = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
        whole = [fqn for fqn in around if fqn in leaves.closed]
        start = around.index(whole[-1]) + 1 if whole else 0
        return next((fqn for fqn in around[start:] if fqn not in self._opened and leaves.can_close(fqn)), "")

    def _is_module(self, fqn: str) -> bool:
        """Whether a name is that of a module, and not of the loss function."""
        return not fqn or any(name == fqn for name, _ in self.skeleton.module.named_modules())

    def _alike(self, fqn: str) -> list[str]:
        """List the modules of one class with a module, in the model's order: it must not depend on the process."""
        root = self.skeleton.module
        kind = type(root.get_submodule(fqn))
        return [name for name, part in root.named_modules() if type(part) is kind]

    def _way_out(self, blocked: Blocked, inputs: Inputs) -> str:
        if blocked.way_out:
            return blocked.way_out
        if "values that are not known" in blocked.reason and inputs.are_partly_fake:
            return "compile with a real example: its integers decide which way the forward goes"
        if "shape of what it returns" in blocked.reason:
            return "return a tensor of a fixed shape (a mask rather than a selection) from it"
        if blocked.opens:
            return "pass what is read or changed there as an argument, and return it; no cache (use_cache=False)"
        if not self._is_module(blocked.fqn):
            return "write the loss without it: it must not look at values that only a run has"
        holder = type(self.skeleton.module.get_submodule(blocked.fqn)).__name__
        if blocked.fqn and blocked.fqn not in self._kept | self._closed.keys() | self._opened.keys():
            first, then = "", f"leaves=[{holder}], or a pattern of FQNs"
        else:
            first, then = f"move that part of {holder} into a module of its own and ", "its class or a pattern of FQNs"
        return f"{first}name it in leaves= ({then}), or take it out of the forward"

    def _closed_criterion(self, structure: Structure) -> str | None:
        """Give the module that computes the loss as a whole, if what it does must be seen and it can be opened."""
        node = made_by(structure.results[0])
        if node.op != "call_module" or str(node.target) in self._closed:
            return None
        module = self.skeleton.module.get_submodule(str(node.target))
        return None if is_builtin(module) else str(node.target)

    def _loss(
        self, leaves: Leaves, inputs: Inputs, observation: Observation, structure: Structure, grad_enabled: bool
    ) -> Loss:
        """Find how the losses of microbatches add up: recorded once more with more samples, and tried."""
        if self.loss_weight is not None:
            return given_terms(structure, self.loss_weight)

        def again(times: int) -> Observation:
            more = inputs.repeated(times)
            if more is None:
                raise Unsuited("no input has a dimension of samples")
            try:
                return self._observe(leaves, more, True, grad_enabled, None)
            except (Blocked, CaptureError) as error:
                raise Unsuited(f"it does not run on {times} times as many samples: {error}".split("\n")[0]) from error

        return find_loss_terms(self.skeleton, observation, structure, inputs, again, by_model=self.loss_fn is None)

    def _finished(self, inputs: Inputs, observation: Observation, structure: Structure, loss: Loss) -> Captured:
        notes = list(observation.notes)
        if loss.terms:
            notes.insert(0, describe_terms(loss.terms))
        kinds: dict[str, str] = {}
        for fqn, reason in self.closed.items():
            kinds.setdefault(type(self.skeleton.module.get_submodule(fqn)).__name__, f"{fqn}: {reason}")
        notes += [f"{kind} is never opened ({relative(why)})" for kind, why in kinds.items()]
        notes += [relative(note) for note in self._notes_on_opened()]
        forms = Counter(form for node in structure.nodes for form in info(node).attention)
        counted = [f"{form} ({_ATTENTION[form]}, {forms[form]} times)" for form in _ATTENTION if forms[form]]
        notes += [f"attention: {', '.join(counted)}"] if counted else []
        for guard in observation.guards:
            if not guard.is_choice:
                notes.append(relative(f"each new value read at {guard.where} is captured anew"))
        return Captured(inputs, observation, structure, loss.terms, tuple(dict.fromkeys(notes)), loss.coupling)

    def _notes_on_opened(self) -> Iterator[str]:
        kinds: dict[str, None] = {}
        for fqn, why in self._opened.items():
            kind = type(self.skeleton.module.get_submodule(fqn)).__name__
            if why is not None and kind not in kinds:
                kinds[kind] = None
                yield f"{kind} is opened ({why.fqn}: {why.reason}, {why.where})"
