"""How the losses of microbatches add up to the batch's: the loss taken apart into summands, each proved on values."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from fxpipe.batch.inputs import Inputs
from fxpipe.capture.graph.counts import Candidate, counter_of
from fxpipe.capture.graph.loops import Recording, prove_loops
from fxpipe.capture.graph.proof import Verdict, is_linear, prove
from fxpipe.capture.graph.sizes import Unsuited
from fxpipe.capture.graph.structure import Structure, make_structure
from fxpipe.capture.graph.tail import Scaling, Summand, find_tail, inputs_of, is_past_blocks
from fxpipe.capture.graph.twins import Twins, spoken
from fxpipe.capture.model.skeleton import Skeleton
from fxpipe.capture.record.forward import Guard
from fxpipe.capture.record.node import info, reached, set_info, sources
from fxpipe.capture.record.observe import Observation
from fxpipe.capture.record.recorder import Recorder, find_storage
from fxpipe.program import LossKind, LossTerm

WAY_OUT = (
    "pass loss_weight='microbatch' (the batch's loss is then the plain mean of its microbatches' losses), a function "
    "loss_weight(*args, **kwargs) that weighs a microbatch, or microbatches=1; batch_dims= where an input is split "
    "that every microbatch needs whole"
)


@dataclass(frozen=True, slots=True, eq=False)
class Term:
    """One summand: the node of its value, and how microbatches weigh it.

    Attributes:
        node: The value.
        kind: As in ``LossTerm``.
        count: As in ``LossTerm``.
        finish: As in ``LossTerm``.
        what: In words, for the report.
        auxiliary: Whether it couples samples, and is weighed like the main term.
        candidate: What was found to weigh it; None where the user says it.
        spelling: As in ``LossTerm``.
        nothing: As in ``LossTerm``.
        alone: Whether what Python asks is asked of each sample: a microbatch's path says nothing of the batch's.
    """

    node: fx.Node
    kind: LossKind
    count: Callable[[Mapping[str, Any]], float] | None = None
    finish: Callable[[float], float] | None = None
    what: str = ""
    auxiliary: bool = False
    candidate: Candidate | None = None
    spelling: str = ""
    nothing: bool = False
    alone: bool = False


@dataclass(frozen=True, slots=True)
class Loss:
    """What was found of a loss.

    Attributes:
        terms: The summands.
        coupling: Why microbatches' losses do not add up to the batch's, as an error says it; ``""`` where they do.
    """

    terms: tuple[Term, ...]
    coupling: str = ""


def loss_terms(terms: tuple[Term, ...]) -> tuple[LossTerm, ...]:
    """Give the summands the form that programs have."""
    return tuple(
        LossTerm(each.node.name, each.kind, each.count, each.finish, each.auxiliary, each.spelling, each.nothing)
        for each in terms
    )


def path_of(
    guards: Sequence[Guard], recorder: Recorder, terms: Sequence[Term], split: Collection[str]
) -> tuple[bool, ...]:
    """Give the truth values that Python read past the model's layers; none where it asks of each sample by itself.

    Args:
        guards: What it read.
        recorder: Of the forward.
        terms: The summands of its loss.
        split: Names of the inputs that are others for other samples.
    """
    if not terms or any(term.alone for term in terms):
        return ()
    asked = (each for each in guards if each.is_choice and any(one.target in split for one in inputs_of(each.node)))
    return tuple(bool(each.answer) for each in asked if is_past_blocks(recorder.graph, recorder.skeleton, each.node))


def describe_terms(terms: tuple[Term, ...]) -> str:
    """Say in words how microbatches are weighed."""
    return "loss: " + " + ".join(dict.fromkeys(term.what for term in terms))


def given_terms(structure: Structure, loss_weight: object) -> Loss:
    """Give the loss as one summand that the user weighs."""
    what = "the plain mean of the microbatches' losses" if loss_weight == "microbatch" else "weighed by loss_weight="
    return Loss((Term(structure.results[0], "samples", what=what),))


def find_loss_terms(
    skeleton: Skeleton,
    observation: Observation,
    structure: Structure,
    inputs: Inputs,
    again: Callable[[int], Observation],
    *,
    by_model: bool,
) -> Loss:
    """Take the loss apart and find what weighs the microbatches of each summand.

    Args:
        skeleton: The copy of the model.
        observation: What the forward did; scaled copies of summands may be added to its graph.
        structure: A structure whose only result is the loss.
        inputs: The example.
        again: Records the forward with several times the samples.
        by_model: Whether the model computes the loss itself: summands of it that couple samples are auxiliary ones.
    """
    result = structure.results[0]
    try:
        other = again(2)
        twice_as_many = make_structure(other, training=True)
    except Unsuited as unsuited:
        return _unproved(result, str(unsuited))
    try:
        twins = Twins.of(skeleton, observation, structure, other, twice_as_many, inputs.samples)
        twins = replace(twins, unclear=inputs.unclear)
    except Unsuited as unsuited:
        recordings = Recording(observation, structure), Recording(other, twice_as_many)
        return _of_loops(skeleton, recordings, inputs, again, str(unsuited))
    apart = _summands(twins, result)
    summands = apart if len(apart) > 1 else [Summand(result)]
    verdicts = [prove(twins, summand, inputs.tensors) for summand in summands]
    if all(verdict.candidate is None for verdict in verdicts) and len(summands) > 1:
        whole = prove(twins, Summand(result), inputs.tensors)
        if whole.candidate is not None:
            summands, verdicts = [Summand(result)], [whole]
    if any(verdict.candidate is None for verdict in verdicts):
        terms = _linear_terms(twins, result, inputs)
        if terms:
            return Loss(terms)
    spelled = [_spelling(twins, each) for each in (apart if len(apart) == len(summands) else summands)]
    return _decided(twins, result, summands, verdicts, spelled, by_model)


def _of_loops(
    skeleton: Skeleton,
    recordings: tuple[Recording, Recording],
    inputs: Inputs,
    again: Callable[[int], Observation],
    reason: str,
) -> Loss:
    """Find what weighs a loss whose recordings for some samples and for twice as many make other calls."""
    one, two = recordings
    try:
        other = again(3)
        three = Recording(other, make_structure(other, training=True))
        verdict = prove_loops(skeleton, one, two, three, inputs, reason)
        if verdict.candidate is None:
            return _unproved(one.result, _reason(Summand(one.result), verdict))
        count = counter_of(skeleton, one.observation.recorder, verdict.candidate)
    except Unsuited as unsuited:
        return _unproved(one.result, f"{reason}; {unsuited}")
    found = verdict.candidate
    finish = found.finish if found.chain else None
    return Loss((Term(one.result, found.kind, count, finish, found.what, candidate=found, alone=True),))


def _decided(
    twins: Twins,
    result: fx.Node,
    summands: Sequence[Summand],
    verdicts: Sequence[Verdict],
    spelled: Sequence[str],
    by_model: bool,
) -> Loss:
    main = next((verdict.candidate for verdict in verdicts if verdict.candidate is not None), None)
    terms = []
    for summand, verdict, spelling in zip(summands, verdicts, spelled, strict=True):
        found = verdict.candidate
        if found is None:
            auxiliary = by_model or verdict.from_model or not _in_loss_fn(summand.node)
            if main is None or not auxiliary or _reads_unclear(twins, summand.node):
                return _unproved(result, _reason(summand, verdict))
            name = info(summand.node).layer or spoken(summand.node)
            found = replace(main, what=f"{name} couples samples (auxiliary, weighed like the main term)")
        if found.kind == "sum" and found is not verdict.candidate:
            found = Candidate("samples", found.what)
        try:
            count = counter_of(twins.skeleton, twins.one.recorder, found)
        except Unsuited as unsuited:
            return _unproved(result, str(unsuited))
        node = _scaled_copy(twins, summand) if len(summands) > 1 else result
        finish = found.finish if found.chain else None
        parts = count, finish, found.what, verdict.candidate is None, found, spelling, verdict.nothing
        terms.append(Term(node, found.kind, *parts))
    return Loss(tuple(terms))


def _spelling(twins: Twins, summand: Summand) -> str:
    """Give a digest of a summand as it stands in the loss; of calls of modules nothing is said."""
    spelled = [twins.spelling(summand.node)]
    for each in summand.outer:
        numbers = [arg for arg in each.node.args if not isinstance(arg, fx.Node)]
        spelled.append(repr((spoken(each.node), each.zero is None, numbers, list(map(twins.spelling, each.factors)))))
    return " ".join(spelled) if spelled[0] else ""


def _linear_terms(twins: Twins, result: fx.Node, inputs: Inputs) -> tuple[Term, ...]:
    """Take a loss apart that is linear in numbers, however made of them: ``(weights * torch.stack(losses)).sum()``.

    The term of a number is the loss with 0 in the place of all others, less the loss of zeros, which is a term, too.
    """
    found = _numbers_below(twins, result)
    if found is None or len(found[0]) < 2:
        return ()
    numbers, calls = found
    verdicts = [prove(twins, Summand(number), inputs.tensors) for number in numbers]
    try:
        if not all(verdict.candidate for verdict in verdicts):
            return ()
        if not is_linear(find_tail(twins, result), numbers, calls, inputs.tensors):
            return ()
        counts = [counter_of(twins.skeleton, twins.one.recorder, each.candidate) for each in verdicts if each.candidate]
    except Unsuited:
        return ()
    nothing = _with_zeros(twins, result, numbers, calls, None)
    terms = [
        Term(nothing, "samples", what="a mean over samples", candidate=Candidate("samples", "a mean over samples"))
    ]
    for number, verdict, count in zip(numbers, verdicts, counts, strict=True):
        candidate = verdict.candidate
        assert candidate is not None
        own = _with_zeros(twins, result, numbers, calls, number)
        node, finish = _added(twins, own, torch.sub, (own, nothing)), candidate.finish if candidate.chain else None
        terms.append(Term(node, candidate.kind, count, finish, candidate.what, candidate=candidate))
    return tuple(terms[1:] + terms[:1])


def _numbers_below(twins: Twins, result: fx.Node) -> tuple[list[fx.Node], list[fx.Node]] | None:
    """Give the numbers that samples are reduced to, and the calls that make the loss of them; None: of more."""
    order = list(twins.one.recorder.graph.nodes)
    below = reached([result])
    depends: dict[fx.Node, bool] = {}
    for node in (each for each in order if each in below):
        depends[node] = not twins.is_constant(node) or any(depends[source] for source in sources(node))
    numbers: dict[fx.Node, None] = {}
    calls: dict[fx.Node, None] = {}
    todo = [result]
    while todo:
        node = todo.pop()
        if node in numbers or node in calls or not depends[node]:
            continue
        if node.op not in ("call_function", "call_method") or _writers(twins, node) or info(node).position is not None:
            return None
        if all(twins.is_constant(source) for source in node.all_input_nodes if depends[source]):
            calls[node] = None
            todo += node.all_input_nodes
        elif _is_number(twins, node):
            numbers[node] = None
        else:
            return None
    return [each for each in order if each in numbers], [each for each in order if each in calls]


def _with_zeros(
    twins: Twins, result: fx.Node, numbers: Sequence[fx.Node], calls: Sequence[fx.Node], kept: fx.Node | None
) -> fx.Node:
    """Make the loss again with 0 in the place of all numbers but one."""
    swap: dict[fx.Node, fx.Node] = {}
    last = list(twins.one.recorder.graph.nodes)[-1]
    for number in numbers:
        if number is not kept:
            last = swap[number] = _added(twins, last, torch.zeros_like, (number,))
    for call in calls:
        with twins.one.recorder.graph.inserting_after(last):
            last = swap[call] = twins.one.recorder.graph.node_copy(call, functools.partial(_swapped, swap))
        set_info(last, replace(info(call), **_ALONE))
    return swap[result]


def _added(twins: Twins, after: fx.Node, function: Callable[..., Any], args: tuple[fx.Node, ...]) -> fx.Node:
    """Add a call to the graph that gives what its first argument is like."""
    with twins.one.recorder.graph.inserting_after(after):
        made = twins.one.recorder.graph.call_function(function, args)
    own = replace(info(args[0]), **_ALONE, after=(), reads=args, made=(), flows=None, part_of=None, counts=None)
    assert own.tensor is not None
    set_info(made, replace(own, tensor=replace(own.tensor, requires_grad=function is torch.sub)))
    return made


def _reads_unclear(twins: Twins, node: fx.Node) -> bool:
    """Whether a number is computed, past all blocks, of an input whose samples cannot be told."""
    try:
        sources = find_tail(twins, node).sources if twins.unclear else ()
    except Unsuited:
        return True
    return any(source.op == "placeholder" and source.target in twins.unclear for source in sources)


def _unproved(result: fx.Node, reason: str) -> Loss:
    return Loss((Term(result, "samples", what="not proved to add up"),), reason)


def _reason(summand: Summand, verdict: Verdict) -> str:
    node = verdict.coupling
    if node is None:
        return f"how the microbatches' losses add up to the batch's cannot be tried: {verdict.reason}"
    layer = info(node).layer or node.name
    return (
        f"{spoken(node) or node.target} ({layer}) couples the samples of a batch: the losses of microbatches do not "
        "add up to the batch's"
    )


def _in_loss_fn(node: fx.Node) -> bool:
    return str(info(node).layer).split(".")[0] == "loss"


def _summands(twins: Twins, result: fx.Node) -> list[Summand]:
    """Take a scalar apart."""
    found: list[Summand] = []
    place = {node: at for at, node in enumerate(twins.one.recorder.graph.nodes)}
    todo: list[tuple[fx.Node, tuple[Scaling, ...]]] = [(result, ())]
    while todo:
        node, outer = todo.pop()
        name = spoken(node)
        parts = [part for part in node.args if isinstance(part, fx.Node)]
        if any(_is_written_between(twins, part, node, place) for part in parts):
            found.append(Summand(node, outer))  # it takes another value than the part was made with
            continue
        adds = name in ("add", "iadd", "add_") and "alpha" not in node.kwargs and len(node.args) == 2
        two = (
            len(parts) == 2
            and len(node.args) == 2
            and all(_is_number(twins, part) for part in parts)
            and "alpha" not in node.kwargs
        )
        if adds and two:
            todo += [(part, outer) for part in reversed(parts)]
        elif (
            name in ("sub", "isub", "sub_")
            and "alpha" not in node.kwargs
            and len(parts) == 2
            and all(_is_number(twins, part) for part in parts)
        ):
            todo += [(parts[1], (Scaling(node, parts[1], parts[0]), *outer)), (parts[0], outer)]
        elif adds and len(parts) == 1 and 0 in node.args and _is_number(twins, parts[0]):  # sum(list of losses)
            todo.append((parts[0], outer))
        else:
            inner = _scaled(twins, node, name)
            if inner is None:
                found.append(Summand(node, outer))
            else:
                todo.append((inner, (Scaling(node, inner), *outer)))
    return found


def _writers(twins: Twins, node: fx.Node) -> Sequence[fx.Node]:
    """Give the calls that write to what holds a node's value."""
    storage = find_storage(twins.one.recorder.storages, node)
    return storage.writers if storage is not None else ()


def _is_written_between(twins: Twins, part: fx.Node, reader: fx.Node, place: Mapping[fx.Node, int]) -> bool:
    """Whether another call writes to a value, by one of its names, before a call that reads it."""
    return any(place[part] < place[each] < place[reader] for each in _writers(twins, part) if each in place)


def _scaled(twins: Twins, node: fx.Node, name: str) -> fx.Node | None:
    """Give the number that a call only scales, casts or moves; None if it does more."""
    first = node.args[0] if node.args else None
    if isinstance(first, fx.Node) and _is_number(twins, first):
        if name in _UNARY or (name in ("sum", "mean") and len(node.args) == 1):
            return first
        other = node.args[1] if len(node.args) > 1 else None
        if name in ("mul", "div", "truediv", "imul", "itruediv", "mul_", "div_") and _is_same_everywhere(twins, other):
            return first
    second = node.args[1] if len(node.args) > 1 else None
    if name in ("mul", "imul") and isinstance(second, fx.Node) and _is_number(twins, second):
        return second if _is_same_everywhere(twins, first) else None
    return None


def _is_same_everywhere(twins: Twins, factor: object) -> bool:
    """Whether a factor is the same for every microbatch: it depends on nothing that is split."""
    if not isinstance(factor, fx.Node) or info(factor).number is not None:
        return True
    if not _is_number(twins, factor):
        return False
    plain = ("placeholder", "get_attr", "call_function", "call_method")
    return all(node.op in plain and twins.is_constant(node) for node in reached([factor]))


def _scaled_copy(twins: Twins, summand: Summand) -> fx.Node:
    """Apply what is done to several summands to one of them: to a copy of its own, of which others may write to it."""
    graph = twins.one.recorder.graph
    value = summand.node
    if any(each is not value for each in _writers(twins, value)):
        with graph.inserting_after(value):
            value = graph.call_method("clone", (summand.node,))
        own = replace(info(summand.node), **_ALONE)
        set_info(value, replace(own, after=(), reads=(summand.node,), made=(), flows=None, part_of=None, counts=None))
    for scaling in summand.outer:
        order = {node: place for place, node in enumerate(graph.nodes)}
        with graph.inserting_after(max((scaling.node, value), key=order.__getitem__)):
            if scaling.zero is not None:
                copy = graph.call_function(torch.neg, (value,))
            else:
                copy = graph.node_copy(scaling.node, functools.partial(_swapped, {scaling.through: value}))
                copy.target = _OUT_OF_PLACE.get(spoken(copy), copy.target)
                copy.op = "call_function" if callable(copy.target) else copy.op
        others = {writer for each in scaling.factors for writer in _writers(twins, each)}
        after = tuple(each for each in info(scaling.node).after if each in others)
        set_info(copy, replace(info(scaling.node), **_ALONE, after=after))
        value = copy
    return value


def _swapped(swap: Mapping[fx.Node, fx.Node], arg: fx.Node) -> fx.Node:
    return swap.get(arg, arg)


def _is_number(twins: Twins, node: fx.Node) -> bool:
    """Whether a value is one number, however many samples there are."""
    meta = info(node).tensor
    return meta is not None and meta.numel == 1 and twins.is_constant(node)


_ALONE: dict[str, Any] = {"writes": (), "before": (), "where": "", "storage": None}
"""What a copy does not have of a call that writes: it makes a value of its own."""
_OUT_OF_PLACE = {"imul": operator.mul, "mul_": torch.mul, "itruediv": operator.truediv, "div_": torch.div}
_UNARY = frozenset(
    {"to", "float", "double", "half", "bfloat16", "clone", "squeeze", "view", "reshape", "neg", "type_as"}
)
