"""One forward recorded with some samples and with twice as many: what changes is what depends on their number."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxpipe.capture.graph.sizes import KEPT, Unsuited, Varying, fill, pair
from fxpipe.capture.graph.structure import Structure
from fxpipe.capture.model.skeleton import Skeleton
from fxpipe.capture.record.forward import Guard
from fxpipe.capture.record.node import CONSTANT, info, reached
from fxpipe.capture.record.observe import Observation
from fxpipe.ir.tensor import TensorMeta


@dataclass(frozen=True, slots=True, eq=False)
class Twins:
    """One forward recorded with some samples and with twice as many.

    Attributes:
        skeleton: The copy of the model.
        one: The first recording.
        structure: What is needed of it, before summands are taken apart.
        other: By node of the first: the node of the second.
        constants: Of the second.
        samples: Of the first.
        reads: Nodes whose values Python read, with the answers in both.
        unclear: Names of the inputs whose samples cannot be told.
    """

    skeleton: Skeleton
    one: Observation
    structure: Structure
    other: Mapping[fx.Node, fx.Node]
    constants: Mapping[str, Any]
    samples: int
    reads: tuple[tuple[fx.Node, Any, Any], ...]
    unclear: frozenset[str] = frozenset()

    @classmethod
    def of(
        cls,
        skeleton: Skeleton,
        one: Observation,
        structure: Structure,
        other: Observation,
        twice: Structure,
        samples: int,
    ) -> Twins:
        """Pair the calls of two recordings.

        Raises:
            Unsuited: They are not the same calls.
        """
        same = len(structure.nodes) == len(twice.nodes) and all(
            left.op == right.op and spelled(left) == spelled(right)
            for left, right in zip(structure.nodes, twice.nodes, strict=True)
        )
        if not same:
            raise Unsuited("twice as many samples take another path")
        pairs = dict(zip(structure.nodes, twice.nodes, strict=True))
        reads = []
        for left, right in _paired_guards(one.guards, other.guards):
            if left.is_choice and left.answer != right.answer:
                raise Unsuited("twice as many samples take another path")
            _pair_reads(left.node, right.node, pairs)
            reads.append((left.node, left.answer, right.answer))
        reads = [read for read in reads if info(read[0]).number is None]  # numbers are not split
        return cls(skeleton, one, structure, pairs, other.recorder.constants, samples, tuple(reads))

    def growing(self, node: fx.Node) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """Give the shapes of a node's value in both recordings; None where it is no tensor."""
        metas = info(node).tensor, info(self.other.get(node, node)).tensor
        if metas[0] is None or metas[1] is None or len(metas[0].shape) != len(metas[1].shape):
            return None
        return metas[0].shape, metas[1].shape

    def sample_dim(self, node: fx.Node) -> int | None:
        """Give the one dimension of a node's value that grows with the samples; None where there is not just one."""
        shapes = self.growing(node)
        if shapes is None:
            return None
        grown = [at for at, (one, two) in enumerate(zip(*shapes, strict=True)) if one != two]
        fits = len(grown) == 1 and shapes[1][grown[0]] == 2 * shapes[0][grown[0]]
        return grown[0] if fits and shapes[0][grown[0]] % self.samples == 0 else None

    def spelling(self, node: fx.Node) -> str:
        """Give a digest of how a value is computed, the same in recordings of other samples; ``""`` where none is."""
        found: dict[fx.Node, str] = {}
        constants = self.one.recorder.constants

        def spell(leaf: Any) -> Any:
            if isinstance(leaf, fx.Node):
                return found[leaf]
            if isinstance(leaf, Varying):
                return ("varying", leaf.first / self.samples, leaf.second / self.samples)
            return getattr(leaf, "__qualname__", leaf)

        needed = reached([node])
        for each in (each for each in self.one.recorder.graph.nodes if each in needed):
            other = self.other.get(each)
            if other is None:
                return ""
            try:
                args = fill(pair((each.args, each.kwargs), (other.args, other.kwargs), lambda left, _: left), spell)
            except Unsuited:
                return ""
            value = constants.get(str(each.target))
            value = value.tolist() if isinstance(value, torch.Tensor) and value.numel() <= KEPT else type(value)
            after = [found[before] for before in info(each).after]
            found[each] = hashlib.sha256(repr((each.op, spelled(each), value, args, after)).encode()).hexdigest()[:16]
        return found[node]

    @property
    def rows(self) -> dict[fx.Node, int]:
        """The dimension in which rows lie, of values whose number of rows values of inputs decide about."""
        return {node: each.dims[0] for node, each in self.one.selected.items() if len(each.dims) == 1}

    def is_selected(self, node: fx.Node) -> bool:
        """Whether values of inputs decide how many rows a value has, and rows are not samples.

        Where they may decide about every dimension, nothing is known but that.
        """
        selected, at = self.one.selected.get(node), self.sample_dim(node)
        known = selected is not None and (len(selected.dims) == 1 or len(selected.dims) < len(tensor_of(node).shape))
        return known and selected is not None and (at is None or at in selected.dims)

    def is_split(self, node: fx.Node) -> bool:
        """Whether an input is another one for other samples."""
        return not self.is_constant(node) and info(node).number is None

    def is_constant(self, node: fx.Node) -> bool:
        """Whether the shape of a node's value has nothing to do with the samples."""
        shapes = self.growing(node)
        return shapes is not None and shapes[0] == shapes[1]


def _paired_guards(one: Sequence[Guard], other: Sequence[Guard]) -> list[tuple[Guard, Guard]]:
    """Pair what Python read in two recordings.

    Whether a size is asked for may hang on which sizes happen to be equal: one that only one recording asks for is
    left out.

    Raises:
        Unsuited: They read something else.
    """
    if len(one) == len(other):
        return list(zip(one, other, strict=True))
    mine, theirs = ([guard for guard in guards if spoken(guard.node) != "size"] for guards in (one, other))
    if len(mine) != len(theirs):
        raise Unsuited("Python reads other values of twice as many samples")
    return list(zip(mine, theirs, strict=True))


def _pair_reads(one: fx.Node, other: fx.Node, pairs: dict[fx.Node, fx.Node]) -> None:
    """Pair the calls that only a read needs."""
    if one in pairs:
        return
    pairs[one] = other
    if len(one.all_input_nodes) != len(other.all_input_nodes):
        raise Unsuited("Python reads other values of twice as many samples")
    for left, right in zip(one.all_input_nodes, other.all_input_nodes, strict=True):
        _pair_reads(left, right, pairs)


def tensor_of(node: fx.Node) -> TensorMeta:
    """Give shape and dtype of a node whose value is a tensor."""
    meta = info(node).tensor
    assert meta is not None
    return meta


def spoken(node: fx.Node) -> str:
    """Give the word for a call: ``"cross_entropy"``."""
    if node.op not in ("call_function", "call_method"):
        return ""
    if node.target is operator.getitem:
        return "getitem"
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return str(name)


def spelled(node: fx.Node) -> str:
    """Give what a call is, for those of another recording to be held against."""
    target = str(node.target) if isinstance(node.target, str) else spoken(node)
    return CONSTANT if target.startswith(CONSTANT) else target
