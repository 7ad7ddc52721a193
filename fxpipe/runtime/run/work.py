"""One microbatch in one stage: its forward, its backward whole, and its backward in two halves."""

from __future__ import annotations

import functools
import operator
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from fxpipe._torch import leaf_of, splits_backward, tried, weight_groups
from fxpipe.errors import ScheduleError
from fxpipe.program import BoundaryTensor, Program, StageProgram
from fxpipe.runtime.build.boundary import before_join, conform
from fxpipe.runtime.build.stage import StageModule

Tensors = tuple[torch.Tensor, ...]
BoundaryGradients = tuple[torch.Tensor | None, ...]
"""Gradients of the tensors of a boundary that one may flow through, in order; None where none came."""
Terms = tuple[tuple[torch.Tensor, float], ...]
"""Terms of a loss, and what each weighs in the batch's."""


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """One microbatch of a step.

    Attributes:
        key: What the stages call the variant by; ``add_program`` made it known to them.
        program: The variant.
        inputs: The model's inputs by name, on the stages' device.
        shares: Weight of each of the program's loss terms in the batch's loss; a term of share 0 is left out.
        draw_seed: The ``microbatch_seed`` of its random numbers.
        scale: What the loss is multiplied by before the backward, a scalar on the stages' device; None for 1.
        agreed: What all ranks call the variant by, where ``key`` may be another on each of them; None where it is not.
    """

    key: Hashable
    program: Program
    inputs: Mapping[str, Any]
    shares: tuple[float, ...] = ()
    draw_seed: int = 0
    scale: torch.Tensor | None = None
    agreed: Hashable = None

    @property
    def shared_key(self) -> Hashable:
        """What all ranks call the variant by."""
        return self.key if self.agreed is None else self.agreed


@dataclass(slots=True, eq=False)
class Pass:
    """A microbatch in a stage, between its forward and its backward.

    Attributes:
        received: Boundary tensors as the stage got them; leaves of its autograd graph.
        outputs: What the stage's graph returned.
        declared: What crosses to this stage, and from it (nothing on the last one).
        shares: On the last stage: the loss terms that count, and their weights.
        left_out: On the last stage: those that do not count.
        scale: What the loss is multiplied by before the backward.
        groups: Between the halves of a split backward: what the second half needs; None to do all of it then.
        loss_dtype: On the last stage: dtype of the model's own loss.
    """

    received: Tensors
    outputs: Tensors
    declared: tuple[tuple[BoundaryTensor, ...], tuple[BoundaryTensor, ...]]
    shares: Terms = ()
    left_out: Tensors = ()
    scale: torch.Tensor | None = None
    groups: list[Fork] | None = None
    pending: tuple[list[Any], list[torch.Tensor]] = field(default_factory=lambda: ([], []))
    loss_dtype: torch.dtype = torch.float64

    def terms(self) -> Terms:
        """Give this microbatch's part of the batch's loss: terms and what they weigh."""
        if not self.shares:
            return ((self.outputs[-1].new_zeros(()), 1.0),)
        return tuple([(term.detach(), share) for term, share in self.shares])


def add_losses(microbatches: Sequence[Terms]) -> torch.Tensor:
    """Give the loss of a batch in float64, of what ``Pass.terms`` gave for each of its microbatches, in their order."""
    alone = [terms[0] for terms in microbatches if len(terms) == 1]
    if len(alone) == len(microbatches) and len({(term.dtype, term.shape) for term, _ in alone}) == 1:
        wide = torch.stack([term for term, _ in alone]).double()
        shares = [share for _, share in alone]
        if len(set(shares)) == 1:
            return (wide * shares[0]).sum()
        return torch.stack([term * share for term, share in zip(wide.unbind(), shares, strict=True)]).sum()
    parts = [functools.reduce(operator.add, [term.double() * share for term, share in each]) for each in microbatches]
    return torch.stack(parts).sum()


def run_forward(stage: StageModule, job: Job, received: Tensors, *, training: bool) -> Pass:
    """Run a microbatch through a stage.

    Args:
        stage: Knows the job's program.
        job: The microbatch.
        received: Tensors from the stage before: without a graph, and the stage's own to write into.
        training: Whether a backward follows.

    Raises:
        ScheduleError: A tensor crosses with a gradient or a shape that the plan does not know of.
    """
    program = job.program.stages[stage.stage_index]
    return take_outputs(program, job, received, stage(*stage_arguments(program, job, received, training=training)))


def stage_arguments(
    program: StageProgram, job: Job, received: Tensors, *, training: bool
) -> tuple[Hashable, Tensors, Mapping[str, Any], int]:
    """Give what a stage is called with; ``program`` is the job's for it, the rest as of ``run_forward``."""
    if training:
        for tensor, declared in zip(received, program.received, strict=True):
            tensor.requires_grad_(declared.meta.requires_grad or declared.ends)
    return job.key, received, {name: job.inputs[name] for name in program.inputs}, job.draw_seed


def take_outputs(program: StageProgram, job: Job, received: Tensors, outputs: Tensors) -> Pass:
    """Keep what a stage gave for a microbatch; raises as ``run_forward``."""
    shares: Terms = ()
    left_out: Tensors = ()
    dtype = torch.float64
    if program.stage_index < len(job.program.stages) - 1:
        check_sent(program, outputs)
    else:
        dtype = job.program.loss_dtype or (outputs[-1].dtype if outputs else dtype)
        terms = outputs[len(job.program.outputs) :]
        _check_left_out(job, terms)
        shares = tuple((term, share) for term, share in zip(terms, job.shares, strict=True) if share != 0)
        left_out = tuple(term for term, share in zip(terms, job.shares, strict=True) if share == 0)
    return Pass(received, outputs, (program.received, program.sent), shares, left_out, job.scale, loss_dtype=dtype)


def _check_left_out(job: Job, terms: Tensors) -> None:
    """Refuse a microbatch in which nothing counts, and whose loss is not nothing: how much it adds cannot be told.

    Raises:
        ScheduleError: Names the term.
    """
    for term, value, share in zip(job.program.loss_terms, terms, job.shares, strict=True):
        counts = term.kind == "tokens" and not term.auxiliary
        if share == 0 and counts and not (value.isnan() | (value == 0)):
            raise ScheduleError(
                f"the loss of a microbatch is {float(value)} though nothing in it counts ({term.name} is divided by a "
                "count that is 0 there): what it adds to the batch's loss cannot be told\n"
                "  divide by a count that is 0 only where the sum is (the mask that the sum is taken over), pass "
                "loss_weight=, or fewer microbatches"
            )


def run_backward(work: Pass, gradients: BoundaryGradients = ()) -> BoundaryGradients:
    """Run the whole backward.

    Args:
        work: The microbatch; spent afterwards.
        gradients: Of the sent tensors a gradient may flow through, in order; nothing on the last stage.

    Returns:
        The gradients of the received tensors a gradient may flow through, in order and declared strides; None for one
        that none came to, as in the model (a gate was closed for the whole microbatch).
    """
    roots, of_roots = _roots(work, gradients)
    if roots:
        apart = any(gradient is None for gradient in gradients)
        starts = [before_join(get_gradient_edge(root)) for root in roots] if apart else roots
        with outside_autocast():
            torch.autograd.backward(starts, of_roots)
    leaves = _leaves(work)
    return _gradients(work, leaves, [leaf.grad for leaf in leaves])


def run_backward_for_inputs(
    work: Pass, weights: Sequence[torch.Tensor], gradients: BoundaryGradients = ()
) -> BoundaryGradients:
    """Run the first half of a split backward: the gradients of the received tensors.

    Args:
        work: The microbatch.
        weights: The stage's trainable parameters.
        gradients: As of ``run_backward``.
    """
    if any(gradient is None for gradient in gradients):
        return run_backward(work, gradients)  # rare, and does not begin at the one node that the halves need
    roots, of_roots = _roots(work, gradients)
    leaves = _leaves(work)
    work.pending = ([get_gradient_edge(root) for root in roots], of_roots)
    found: Sequence[torch.Tensor | None] = [None] * len(leaves)
    if leaves and roots:
        with outside_autocast():
            found, groups = backward_for_inputs(roots, of_roots, leaves, weights)
        # No group: no path leads from a received tensor to an output, and the second half is the whole backward.
        work.groups = groups or None
        if work.groups:
            work.pending = ([], [])
    return _gradients(work, leaves, found)


def run_backward_for_weights(work: Pass) -> None:
    """Run the second half of a split backward: accumulate the gradients of the weights."""
    with outside_autocast():
        if work.groups:
            backward_for_weights(work.groups)
        elif work.pending[0]:
            torch.autograd.backward(*work.pending)
    work.groups, work.pending = None, ([], [])


@dataclass(slots=True, eq=False)
class Fork:
    """Where the backward of some weights leaves that of the received tensors.

    Attributes:
        nodes: The last ones that both go through.
        weights: What is reached from them.
        owners: What keeps the nodes.
        gradients: What the first half gave to each node, by its output; nothing for one that it did not reach.
    """

    nodes: list[Node]
    weights: list[torch.Tensor]
    owners: list[Any]
    gradients: dict[Node, tuple[torch.Tensor | None, ...]] = field(default_factory=dict)

    def keep(self, node: Node, gradients: tuple[torch.Tensor | None, ...]) -> None:
        """Keep what a node gets."""
        self.gradients[node] = gradients


@tried(lambda hook: splits_backward(hook, backward_for_weights))
def backward_for_inputs(
    roots: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor],
    inputs: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
) -> tuple[tuple[torch.Tensor | None, ...], list[Fork]]:
    """Compute the gradients of ``inputs``, and keep what ``backward_for_weights`` needs; detaches the roots."""
    forks = [Fork(*group) for group in weight_groups(roots, inputs, weights)]
    with ExitStack() as hooks:
        for fork in forks:
            for node in fork.nodes:
                hooks.callback(node.register_prehook(partial(fork.keep, node)).remove)
        found = torch.autograd.grad(roots, inputs, gradients, retain_graph=True, allow_unused=True)
    for root in roots:
        root.detach_()
    return found, forks


def backward_for_weights(forks: Sequence[Fork]) -> None:
    """Compute and accumulate the gradients of the weights."""
    # A weight used at two depths is reached through what lies between, which other weights' backward needs as well.
    retain = any(len(fork.nodes) > 1 for fork in forks)
    for fork in forks:
        edges = [
            (GradientEdge(node, output), gradient)
            for node, gradients in fork.gradients.items()
            for output, gradient in enumerate(gradients)
            if gradient is not None
        ]
        with ExitStack() as hooks:
            # It is reached from other nodes as well, and its own hooks have run.
            for node, gradients in fork.gradients.items():
                hooks.callback(node.register_prehook(partial(_instead, gradients)).remove)
            if edges:
                starts, started = zip(*edges, strict=True)
                torch.autograd.backward(starts, started, retain_graph=retain, inputs=fork.weights)
        fork.gradients, fork.owners = {}, []


def _instead(kept: tuple[torch.Tensor | None, ...], _: object) -> tuple[torch.Tensor | None, ...]:
    return kept


def outside_autocast() -> AbstractContextManager[object]:
    """Leave the user's autocast: it surrounds the step, and a backward belongs outside of it."""
    kinds = [kind for kind in _AUTOCAST if torch.is_autocast_enabled(kind)]
    return _without_autocast(kinds) if kinds else _AS_IT_IS


@contextmanager
def _without_autocast(kinds: Sequence[str]) -> Iterator[None]:
    with ExitStack() as stack:
        for kind in kinds:
            stack.enter_context(torch.autocast(kind, torch.get_autocast_dtype(kind), enabled=False))
        yield


_AUTOCAST = ("cpu", "cuda", "xpu")
_AS_IT_IS: AbstractContextManager[object] = nullcontext()


def _roots(work: Pass, gradients: BoundaryGradients) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Give where the backward starts, and the gradients it starts with."""
    declared = work.declared[1]
    if declared:
        crossing = [output for output, what in zip(work.outputs, declared, strict=True) if what.meta.requires_grad]
        came = zip(crossing, gradients, strict=True)
        pairs = [(output, gradient) for output, gradient in came if gradient is not None]
    else:
        pairs = [(term, _started(term, share, work.scale)) for term, share in work.shares]
    # A frozen output still gets a gradient from the next stage, which cannot know.
    started = [(root, gradient) for root, gradient in pairs if root.requires_grad]
    return [root for root, _ in started], [gradient for _, gradient in started]


def _started(term: torch.Tensor, share: float, scale: torch.Tensor | None) -> torch.Tensor:
    if scale is None:
        return torch.full_like(term, share)
    wide = torch.full_like(term, share, dtype=torch.promote_types(term.dtype, torch.float32))
    return (wide * scale).to(term.dtype)


def _give_zeros(work: Pass) -> set[int]:
    """Give gradients of zero to what leads to terms that are left out: in the batch's loss they are multiplied by 0.

    A backward from such a term is no way to them: its own value may be 0 / 0.

    Returns:
        The ids of the leaves that were reached, those of received tensors among them.
    """
    reached: set[int] = set()
    seen: set[Node] = set()
    todo = [get_gradient_edge(term) for term in work.left_out if term.requires_grad]
    while todo:
        node = before_join(todo.pop()).node
        if node in seen:
            continue
        seen.add(node)
        todo += [GradientEdge(each, place) for each, place in node.next_functions if each is not None]
        leaf = leaf_of(node)
        if leaf is not None:
            reached.add(id(leaf))
            if leaf.grad is None:
                leaf.grad = torch.zeros_like(leaf, dtype=leaf.grad_dtype)
    return reached


def _leaves(work: Pass) -> list[torch.Tensor]:
    return [tensor for tensor in work.received if tensor.requires_grad]


def _gradients(work: Pass, leaves: Sequence[torch.Tensor], found: Sequence[torch.Tensor | None]) -> BoundaryGradients:
    declared = [what for what in work.declared[0] if what.meta.requires_grad or what.ends]
    reached = _give_zeros(work) if work.left_out else ()
    given: list[torch.Tensor | None] = []
    for leaf, what, gradient in zip(leaves, declared, found, strict=True):
        leaf.grad = None
        if not what.ends:
            came = torch.zeros_like(leaf) if gradient is None and id(leaf) in reached else gradient
            given.append(None if came is None else conform(came, what))
        elif gradient is not None:
            raise ScheduleError(
                f"a gradient comes back to {what.name}, and none did when the model was captured\n"
                "  compile the model as it is to be trained: an attribute that decides about this was set since"
            )
    work.received = work.outputs = work.shares = work.left_out = ()
    return tuple(given)


def check_sent(program: StageProgram, outputs: Tensors) -> None:
    """Refuse what a stage is about to send that the plan does not know so.

    Raises:
        ScheduleError: Names the tensor.
    """
    for tensor, declared in zip(outputs, program.sent, strict=True):
        meta = declared.meta
        if tuple(tensor.shape) != meta.shape or str(tensor.dtype) != f"torch.{meta.dtype}":
            kind = tensor.device.type
            if tuple(tensor.shape) != meta.shape:
                way_out = "capture the model with an example that takes this path"
            elif torch.is_autocast_enabled(kind):
                way_out = (
                    f"autocast on {kind} casts other operations than where the model was captured: cast "
                    f"{declared.name} in the model, or cut elsewhere (leaves=)"
                )
            else:
                way_out = (
                    f"a MixedPrecisionPolicy that parallelize= gives the stage needs output_dtype=torch.{meta.dtype}; "
                    "else capture the model with an example that takes this path, under the same autocast"
                )
            raise ScheduleError(
                f"stage {program.stage_index} computed {declared.name} as {tensor.dtype} of shape "
                f"{list(tensor.shape)}, but the plan sends {meta}\n  {way_out}"
            )
        if tensor.requires_grad and not meta.requires_grad:
            raise ScheduleError(
                f"{declared.name}, which stage {program.stage_index} sends, needs a gradient, and needed none when the "
                "model was compiled\n  call requires_grad_ on the model's parameters before fxpipe.compile; where "
                "values decide, let every path through the module depend on its input (x * 0, say)"
            )
