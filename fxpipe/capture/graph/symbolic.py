"""A recorded graph for many shapes: its numbers as functions of the inputs' sizes, proved on a recording with numbers.

A graph whose sizes were followed as symbols (``calls.symbols``) is taken only if it is, for the sizes of an earlier
recording, that recording: call by call, number by number, shape by shape. Then it holds wherever its guards do.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from fxpipe.capture.calls.blocked import Untold
from fxpipe.capture.calls.symbols import Expression, Symbols, value_of
from fxpipe.capture.graph.counts import counter_of
from fxpipe.capture.graph.loss import Term
from fxpipe.capture.graph.structure import Structure
from fxpipe.capture.model.skeleton import Skeleton
from fxpipe.capture.record.forward import Guard
from fxpipe.capture.record.node import going_back, info, is_constant, reached, sources
from fxpipe.capture.record.observe import Observation
from fxpipe.ir.tensor import TensorMeta
from fxpipe.program import BoundaryTensor, Program, StageProgram

Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of the inputs by name."""


def varying(batches: Sequence[Shapes]) -> dict[str, tuple[Hashable | None, ...]]:
    """Name the sizes that differ between batches: those that are equal in all of them have one name.

    >>> varying([{"ids": (2, 17), "mask": (2, 1, 17)}, {"ids": (2, 19), "mask": (2, 1, 19)}])
    {'ids': (None, (17, 19)), 'mask': (None, None, (17, 19))}
    """
    found: dict[str, tuple[Hashable | None, ...]] = {}
    for name in batches[0]:
        sizes = zip(*(shapes[name] for shapes in batches), strict=True)
        found[name] = tuple(each if len(set(each)) > 1 else None for each in sizes)
    return found


@dataclass(frozen=True, slots=True, eq=False)
class Symbolic:
    """What of a graph depends on the inputs' sizes.

    Attributes:
        symbols: The symbols, and where the graph holds.
        sizes: Shape and strides of each node's value, by name, as expressions.
        guards: What Python read of the inputs' values.
        conditions: What it read of tensors that are made of sizes alone: it must read the same of other sizes.
    """

    symbols: Symbols
    sizes: Mapping[str, tuple[tuple[Expression, ...], tuple[Expression, ...]]]
    guards: tuple[Guard, ...]
    conditions: tuple[Guard, ...]

    @classmethod
    def of(cls, observation: Observation, structure: Structure) -> Symbolic:
        """Collect it."""
        assert observation.symbols is not None
        sizes = {node.name: known for node in structure.nodes if (known := info(node).sizes) is not None}
        return cls(observation.symbols, sizes, *split_guards(observation.guards))

    @property
    def guards_text(self) -> str:
        """Where the graph holds, in words."""
        return " and ".join(map(str, self.symbols.guards))

    def keeps_strides(self, program: Program) -> bool:
        """Whether all that stages send lies in memory alike for all sizes: contiguous, or in fixed strides."""
        sent = [each for stage in program.stages for each in stage.sent if each.strides and each.name in self.sizes]
        return all(isinstance(stride, int) for each in sent for stride in self.sizes[each.name][1])

    def at(self, program: Program, values: Mapping[Expression, int]) -> Program:
        """Give a program with the shapes that its boundaries have for given sizes."""

        def tensor(each: BoundaryTensor) -> BoundaryTensor:
            known = self.sizes.get(each.name)
            if known is None:
                return each
            shape, strides = (tuple(value_of(size, values) for size in sizes) for sizes in known)
            meta = TensorMeta(shape, each.meta.dtype, each.meta.requires_grad)
            return replace(each, meta=meta, strides=strides if each.strides else ())

        def stage(each: StageProgram) -> StageProgram:
            return replace(each, received=tuple(map(tensor, each.received)), sent=tuple(map(tensor, each.sent)))

        return replace(program, stages=tuple(map(stage, program.stages)))


def pair_with(
    observation: Observation,
    structure: Structure,
    known: Observation,
    other: Structure,
    values: Mapping[Expression, int],
) -> dict[fx.Node, fx.Node]:
    """Prove that a graph with symbols is, for given sizes, one that was recorded with numbers.

    Args:
        observation: Of the graph with symbols.
        structure: Of the graph.
        known: The recording with numbers.
        other: Its structure.
        values: The sizes it was recorded with.

    Returns:
        The graph's node for each of the recording's.

    Raises:
        Untold: They differ.
    """
    return _Pairs(observation, known, values).pair(structure, other)


def reads_alike(one: Sequence[Guard], other: Sequence[Guard]) -> bool:
    """Whether Python read the same at the same places."""
    answers = [[(guard.where, guard.answer) for guard in guards] for guards in (one, other)]
    return answers[0] == answers[1]


def split_guards(guards: Sequence[Guard]) -> tuple[tuple[Guard, ...], tuple[Guard, ...]]:
    """Part what Python read of values of the inputs from what it read of tensors that are made of sizes alone."""
    by_sizes = [
        not any(node.op == "placeholder" for node in going_back([guard.node], _above_sizes)) for guard in guards
    ]
    pairs = list(zip(guards, by_sizes, strict=True))
    return tuple(guard for guard, sized in pairs if not sized), tuple(guard for guard, sized in pairs if sized)


def _above_sizes(node: fx.Node) -> tuple[fx.Node, ...]:
    return sources(node) if info(node).size is None else ()


class _Pairs:
    def __init__(self, one: Observation, other: Observation, values: Mapping[Expression, int]) -> None:
        self._values = values
        self._one, self._other = one, other
        self._pairs: dict[fx.Node, fx.Node] = {}

    def pair(self, structure: Structure, other: Structure) -> dict[fx.Node, fx.Node]:
        reads = split_guards(self._one.guards)[0], self._other.guards
        self._expect(reads_alike(*reads), "Python reads other values")
        nodes = [node for node in _with_reads(self._one, structure, reads[0]) if info(node).size is None]
        known = _with_reads(self._other, other, reads[1])
        self._expect(len(nodes) == len(known), f"{len(nodes)} calls instead of {len(known)}")
        for mine, theirs in zip(nodes, known, strict=True):
            self._pair(mine, theirs)
        back = {node: known for known, node in self._pairs.items()}
        derived = frozenset(back[node] for node in structure.derived if node in back)
        self._expect(derived == other.derived, "other calls depend on inputs alone")
        for one, two in (
            ((structure.results,), (other.results,)),
            (structure.groups, other.groups),
            (structure.before, other.before),
        ):
            self._expect([tuple(map(back.get, part)) for part in one] == [*map(tuple, two)], "another order")
        return self._pairs

    def _pair(self, node: fx.Node, known: fx.Node) -> None:
        one, two = info(node), info(known)
        self._expect(node.op == known.op and _named(node.target) == _named(known.target), f"{known} is {node}")
        facts = [(f.layer, f.call, f.block, f.region, f.context, f.position, f.is_guard) for f in (one, two)]
        self._expect(facts[0] == facts[1], f"{known.name} stands elsewhere")
        if is_constant(node):
            self._expect(
                _same(self._constant(self._one, node), self._constant(self._other, known)), f"constant {known}"
            )
        self._alike(node.args, known.args, known)
        self._alike(node.kwargs, known.kwargs, known)
        self._expect(
            [self._pairs.get(each) for each in two.after] == list(one.after), f"{known.name} sees other writes"
        )
        self._expect((one.tensor is None) == (two.tensor is None), f"{known.name} gives something else")
        if one.tensor is not None and two.tensor is not None:
            shape, strides = one.tensor.shape, one.strides
            if one.sizes is not None:
                shape, own = (tuple(value_of(size, self._values) for size in sizes) for sizes in one.sizes)
                strides = own if strides else ()
            mine = (shape, one.tensor.dtype, one.tensor.requires_grad, strides)
            theirs = (two.tensor.shape, two.tensor.dtype, two.tensor.requires_grad, two.strides)
            self._expect(mine == theirs, f"{known.name} is {mine}, and was {theirs}")
        self._pairs[known] = node

    def _alike(self, one: Any, two: Any, where: fx.Node) -> None:
        if isinstance(one, fx.Node) and info(one).size is not None:
            number = value_of(info(one).size, self._values)
            self._expect(type(two) is int and two == number, f"{where.name} takes {two!r} instead of {number}")
        elif isinstance(two, fx.Node):
            self._expect(self._pairs.get(two) is one, f"{where.name} reads {two}")
        elif isinstance(one, tuple | list) and isinstance(two, tuple | list):
            self._expect(len(one) == len(two), f"{where.name} takes {len(two)} values")
            for mine, theirs in zip(one, two, strict=True):
                self._alike(mine, theirs, where)
        elif isinstance(one, Mapping) and isinstance(two, Mapping):
            self._expect(list(one) == list(two), f"{where.name} takes {list(two)}")
            for key, mine in one.items():
                self._alike(mine, two[key], where)
        elif isinstance(one, slice) and isinstance(two, slice):
            parts = [(each.start, each.stop, each.step) for each in (one, two)]
            self._alike(parts[0], parts[1], where)
        else:
            same = type(one) is type(two) and (one == two or (one != one and two != two))
            self._expect(same, f"{where.name} takes {two!r}, and {one!r} with symbols")

    def _constant(self, observation: Observation, node: fx.Node) -> Any:
        return observation.recorder.constants[str(node.target)]

    def _expect(self, holds: bool, what: str) -> None:
        if not holds:
            raise Untold(f"with symbols the forward does something else: {what}")


def _with_reads(observation: Observation, structure: Structure, guards: Sequence[Guard]) -> list[fx.Node]:
    """Give a structure's nodes and those that Python's reads take, in order."""
    needed = {*structure.nodes, *reached(guard.node for guard in guards)}
    return [node for node in observation.recorder.graph.nodes if node in needed]


def paired_terms(
    skeleton: Skeleton, observation: Observation, terms: Sequence[Term], pairs: Mapping[fx.Node, fx.Node]
) -> tuple[Term, ...]:
    """Give the summands of a loss for a paired graph.

    Raises:
        Untold: A summand is a copy that this graph has not, or reads what it has not.
    """
    found = []
    for term in terms:
        candidate = term.candidate
        if term.node not in pairs:
            raise Untold("the loss has several summands that are scaled together")
        count = term.count
        if candidate is not None and count is not None:
            parts = candidate.nodes, candidate.chain, candidate.writes
            if not {node for part in parts for node in part} <= pairs.keys():
                raise Untold("what weighs the microbatches is not in the graph")
            nodes, chain, writes = (tuple(pairs[node] for node in part) for part in parts)
            if any(info(source).size is not None for node in chain for source in node.all_input_nodes):
                raise Untold("the weights of microbatches are computed of sizes")
            candidate = replace(candidate, nodes=nodes, chain=chain, writes=writes)
            count = counter_of(skeleton, observation.recorder, candidate)
        elif count is not None or term.finish is not None:
            raise Untold("what weighs the microbatches is not known")
        finish = candidate.finish if candidate is not None and candidate.chain else None
        found.append(replace(term, node=pairs[term.node], count=count, finish=finish, candidate=candidate))
    return tuple(found)


def _named(target: Any) -> Any:
    if isinstance(target, str):
        return target
    return getattr(target, "__module__", ""), getattr(target, "__qualname__", "") or repr(type(target))


def _same(one: Any, two: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
        if one is two:
            return True
        plain = type(one) is type(two) is torch.Tensor
        return plain and one.shape == two.shape and one.dtype == two.dtype and torch.equal(one, two)
    return one is two or (type(one) is type(two) and repr(one) == repr(two))
