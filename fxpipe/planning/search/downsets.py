"""All downsets of a graph, and what a stage between two of them costs.

A downset holds all predecessors of its nodes; a partition into stages is a chain of downsets
``∅ = D0 ⊂ D1 ⊂ … = everything``, stage ``s`` being ``D(s+1) - D(s)``. So the best chain over all downsets is the
best partition.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fxpipe.planning.search.instance import (
    FAR_LOAD,
    NEAR_LOAD,
    RECEIVED,
    RECEIVED_FIXED,
    SENT,
    SENT_FIXED,
    TIE_FIXED,
    TIE_LIVE,
    TIE_LOAD,
    UNREACHABLE,
    Instance,
    Ints,
    Members,
)
from fxpipe.planning.search.request import FREE, NEAR, Request

BLOCK_ENTRIES = 4_000_000  # entries of one block of pairs, to bound memory
NOTHING = np.zeros((1, 1), dtype=np.int64)


def enumerate_downsets(instance: Instance, limit: int) -> list[int] | None:
    """List all downsets as bit masks, the empty and the full one included; None if there are more than ``limit``.

    >>> from fxpipe.planning.search.problem import PartitionProblem
    >>> from fxpipe.planning.search.instance import make_instance
    >>> diamond = make_instance(PartitionProblem((1, 1, 1, 1), edges=((0, 1), (0, 2), (1, 3), (2, 3))))
    >>> enumerate_downsets(diamond, 10)
    [0, 1, 3, 5, 7, 15]
    """
    bit = [1 << node for node in range(instance.size)]
    needs = [sum(bit[before] for before in befores) for befores in instance.predecessors]
    roots = tuple(node for node in range(instance.size) if not needs[node])
    found: dict[int, tuple[int, ...]] = {0: roots}
    level = [0]
    while level:
        following: list[int] = []
        for downset in level:
            ready = found[downset]
            for node in ready:
                larger = downset | bit[node]
                if larger in found:
                    continue
                opened = [after for after in instance.successors[node] if needs[after] & larger == needs[after]]
                found[larger] = (*(other for other in ready if other != node), *opened)
                if len(found[larger]) > limit.bit_length():  # any of them may be in or not: that alone makes too many
                    return None
                following.append(larger)
            found[downset] = ()
            if len(found) > limit:
                return None
        level = following
    return sorted(found)


@dataclass(frozen=True, slots=True)
class _Counts:
    """How many nodes of each touching set every downset holds, and what the sets cost.

    ``partly``: load, live and static memory of a stage that holds some but not all; ``always``: live and static
    memory of a stage that holds any.
    """

    counts: NDArray[np.int32]
    sizes: Ints
    partly: Ints
    always: Ints


@dataclass(frozen=True, slots=True)
class Between:
    """What a stage between two downsets costs: load, memory per live microbatch, static memory; which pairs make one.

    Arrays over the left and the right downset; one of one entry stands for nothing.
    """

    load: Ints
    alive: Ints
    static: Ints
    valid: NDArray[np.bool_]


class DownsetCosts:
    """What a stage between two downsets costs, for whole blocks of pairs at once."""

    def __init__(self, instance: Instance, routing: str, downsets: Sequence[int]) -> None:
        words = max(1, -(-instance.size // 64))
        raw = b"".join(downset.to_bytes(words * 8, "little") for downset in downsets)
        self._words = np.frombuffer(raw, dtype="<u8").reshape(len(downsets), words)
        members = np.unpackbits(self._words.view(np.uint8), axis=1, bitorder="little")[:, : instance.size]
        self.members = members
        self.size = len(downsets)
        self.full = int(np.flatnonzero(members.all(axis=1))[0])
        self.empty = int(np.flatnonzero(~members.any(axis=1))[0])
        self.load = _sums(members, instance.load)
        self.static = _sums(members, instance.static)
        self.activation = _sums(members, instance.activation)
        self.anchors = _sums(members, instance.anchors)
        values, ties = instance.values, instance.ties
        self.crossing = np.zeros((values.amounts.shape[1], self.size), dtype=np.int64)
        touching: list[tuple[Members, Ints | None, Ints | None]] = []
        if routing == "direct":
            both = values.column(SENT) + values.column(RECEIVED)
            fixed = values.column(SENT_FIXED) + values.column(RECEIVED_FIXED)
            touching.append((values, np.column_stack([values.column(NEAR_LOAD), both, fixed]), None))
        elif len(values):
            partial = _partial(members, values)
            for row, amounts in zip(self.crossing, values.amounts.T, strict=True):
                row[:] = _sums(partial, amounts)
        touching.append((ties, None, ties.amounts))
        self._touching = _touching(members, touching)

    @property
    def words(self) -> int:
        """Words of 64 nodes that a downset takes."""
        return self._words.shape[1]

    def subsets(self) -> NDArray[np.bool_]:
        """Tell for each pair of downsets whether the first lies within the second."""
        inside = np.ones((self.size, self.size), dtype=bool)
        for word in self._words.T:
            inside &= (word[:, None] & ~word[None, :]) == 0
        return inside

    def cross_load(self, kind: int) -> Ints:
        """Give the load of what crosses between each downset and the rest, at a boundary of this kind."""
        row: Ints = 0 * self.load if kind == FREE else self.crossing[NEAR_LOAD if kind == NEAR else FAR_LOAD]
        return row

    def between(self, request: Request, left: Ints, right: Ints, stage: int, *, memory: bool = True) -> Between:
        """Give what this stage costs from each downset of ``left`` to each of ``right``."""
        valid = np.ones((len(left), len(right)), dtype=bool)
        for word in range(self._words.shape[1]):
            valid &= (self._words[left, word][:, None] & ~self._words[right, word][None, :]) == 0
        valid &= left[:, None] != right[None, :]
        if request.exactly:
            valid &= self.anchors[left][:, None] < self.anchors[right][None, :]
        before, after = request.kinds[stage], request.kinds[stage + 1]
        load, live, fixed = self._sharing(left, right, memory=memory)
        load = load + _outer(self.load, left, right)
        load += self.cross_load(before)[left][:, None] + self.cross_load(after)[right][None, :]
        if not memory:
            return Between(load, NOTHING, NOTHING, valid)
        alive = live + _outer(self.activation, left, right)
        static = fixed + _outer(self.static, left, right)
        if before != FREE:
            alive += self.crossing[RECEIVED][left][:, None]
            static += self.crossing[RECEIVED_FIXED][left][:, None]
        if after != FREE:
            alive += self.crossing[SENT][right][None, :]
            static += self.crossing[SENT_FIXED][right][None, :]
        return Between(load, alive, static, valid)

    def block(self, request: Request, left: Ints, right: Ints, stage: int, objective: str) -> Ints:
        """Give the cost of this stage from each downset of ``left`` to each of ``right``, ``UNREACHABLE`` if none."""
        limit = request.memory_limit
        between = self.between(request, left, right, stage, memory=objective == "memory" or limit is not None)
        cost, valid = between.load, between.valid
        if objective == "memory" or limit is not None:
            memory = between.static + request.live[stage] * between.alive
            if objective == "memory":
                cost = memory
            elif limit is not None:
                valid = valid & (memory <= limit)
        return np.where(valid, cost, UNREACHABLE)

    def least(self, request: Request, objective: str) -> Ints:
        """Give per downset a number whose difference is at most what a stage between two of them costs."""
        return self.load if objective == "load" else self.static + min(request.live) * self.activation

    def _sharing(self, left: Ints, right: Ints, *, memory: bool) -> tuple[Ints, Ints, Ints]:
        """Give load, memory per live microbatch and static memory that touching sets add to each pair.

        What a stage pays for holding some but not all of a set is written with what is partly in, ``part``, and the
        products over sets partly in both downsets, so that the pairs cost one matrix product:
        ``part(D1) + part(D2) - Σ over partly in both (1 + same count)``. What it pays for holding any of it:
        ``some(D2) - all(D1) - Σ same count``.
        """
        touching = self._touching
        if touching is None:
            return NOTHING, NOTHING, NOTHING
        counts_left, counts_right = touching.counts[left], touching.counts[right]
        part_left = (counts_left > 0) & (counts_left < touching.sizes)
        part_right = (counts_right > 0) & (counts_right < touching.sizes)
        used = np.flatnonzero(part_left.any(axis=0) & part_right.any(axis=0))
        both_left, both_right = part_left[:, used], part_right[:, used]
        columns, same_left, same_right = _same_counts(
            np.where(both_left, counts_left[:, used], 0), np.where(both_right, counts_right[:, used], -1)
        )
        results: list[Ints] = []
        for index in range(3 if memory else 1):
            total = NOTHING
            amounts = touching.partly[:, index]
            if amounts.any():
                own = _sums(part_left, amounts)[:, None] + _sums(part_right, amounts)[None, :]
                shared = _product(both_left, both_right, amounts[used]) + _product(
                    same_left, same_right, amounts[used[columns]]
                )
                total = own - shared
            amounts = touching.always[:, index]
            if amounts.any():
                some = _sums(counts_right > 0, amounts)[None, :]
                whole = _sums(counts_left == touching.sizes, amounts)[:, None]
                total = total + some - whole - _product(same_left, same_right, amounts[used[columns]])
            results.append(total)
        return (results[0], results[1], results[2]) if memory else (results[0], NOTHING, NOTHING)


def downset_costs(instance: Instance, masks: Sequence[int], crossing: Ints) -> tuple[Ints, Ints, Ints]:
    """Give for each of all downsets its load, what crosses between it and the rest, and its anchors.

    Each is that without its last node and what the node changes: several times as fast as ``DownsetCosts``, which knows
    far more.

    Args:
        instance: The merged graph.
        masks: All its downsets, ascending.
        crossing: What each value costs where some but not all of its nodes are in.
    """
    if any(after and after[0] < node for node, after in enumerate(instance.successors)):
        raw = b"".join(mask.to_bytes(-(-instance.size // 8), "little") for mask in masks)
        rows = np.frombuffer(raw, dtype=np.uint8).reshape(len(masks), -1)
        members = np.unpackbits(rows, axis=1, bitorder="little")[:, : instance.size]
        crossed = _sums(_partial(members, instance.values), crossing)
        return _sums(members, instance.load), crossed, _sums(members, instance.anchors)
    of_node: list[list[tuple[int, int]]] = [[] for _ in range(instance.size)]
    for nodes, amount in zip(instance.values.sets(), crossing.tolist(), strict=True):
        mask = sum(1 << node for node in nodes)
        for node in nodes if amount else ():
            of_node[node].append((mask, amount))
    own = list(zip(instance.load.tolist(), instance.anchors.tolist(), strict=True))
    found: dict[int, tuple[int, int, int]] = {0: (0, 0, 0)}
    for mask in masks[1:]:
        node = mask.bit_length() - 1
        before = mask ^ (1 << node)
        load, across, anchors = found[before]
        for value, amount in of_node[node]:
            if not before & value:
                across += amount
            elif mask & value == value:
                across -= amount
        found[mask] = load + own[node][0], across, anchors + own[node][1]
    loads, sums, anchored = np.asarray([found[mask] for mask in masks], dtype=np.int64).T
    return loads, sums, anchored


def _same_counts(
    left: NDArray[np.int32], right: NDArray[np.int32]
) -> tuple[Ints, NDArray[np.bool_], NDArray[np.bool_]]:
    """Spread counts to one column per set and count that occurs on the left."""
    columns: list[int] = []
    parts_left, parts_right = [], []
    for column in range(left.shape[1]):
        for count in np.unique(left[:, column]).tolist():
            if count:
                columns.append(column)
                parts_left.append(left[:, column] == count)
                parts_right.append(right[:, column] == count)
    if not columns:
        return np.zeros(0, dtype=np.int64), np.zeros((len(left), 0), bool), np.zeros((len(right), 0), bool)
    return np.asarray(columns), np.stack(parts_left, axis=1), np.stack(parts_right, axis=1)


def _product(left: NDArray[np.bool_], right: NDArray[np.bool_], amounts: Ints) -> Ints:
    """Σ over columns of ``left · right · amounts``."""
    turned = right.T.astype(np.float64)
    total = np.zeros((len(left), len(right)), dtype=np.int64)
    for part, shift in _float_parts(amounts):
        total += ((left * part) @ turned).astype(np.int64) << shift
    return total


def _sums(chosen: NDArray[np.bool_] | NDArray[np.uint8], amounts: Ints) -> Ints:
    """Σ of the chosen columns' amounts for each row; some rows at a time, since float64 takes eight times the room."""
    total = np.zeros(len(chosen), dtype=np.int64)
    if not amounts.any():
        return total
    parts = _float_parts(amounts)
    step = max(1, BLOCK_ENTRIES // max(1, chosen.shape[1]))
    for first in range(0, len(chosen), step):
        columns = chosen[first : first + step].astype(np.float64)
        for part, shift in parts:
            total[first : first + step] += (columns @ part).astype(np.int64) << shift
    return total


def _float_parts(amounts: Ints) -> list[tuple[NDArray[np.float64], int]]:
    """Split amounts so that float64, which numpy multiplies fast, adds each part exactly: below 2**53."""
    if amounts.sum() < 2**52:
        return [(amounts.astype(np.float64), 0)]
    return [((amounts & (2**31 - 1)).astype(np.float64), 0), ((amounts >> 31).astype(np.float64), 31)]


def _outer(amounts: Ints, left: Ints, right: Ints) -> Ints:
    return amounts[right][None, :] - amounts[left][:, None]


def count_members(members: NDArray[np.uint8], sets: Members) -> tuple[NDArray[np.int32], Ints]:
    """Give how many nodes of each set every downset holds, and how many there are."""
    if not len(sets):
        return np.zeros((len(members), 0), dtype=np.int32), np.zeros(0, dtype=np.int64)
    counts = np.add.reduceat(members[:, sets.nodes], sets.start[:-1], axis=1, dtype=np.int32)
    return counts, np.diff(sets.start)


def _partial(members: NDArray[np.uint8], sets: Members) -> NDArray[np.bool_]:
    """Tell for each downset and set whether some but not all of the set is in it."""
    partial = np.empty((len(members), len(sets)), dtype=bool)
    step = max(1, BLOCK_ENTRIES // max(1, len(sets.nodes)))
    for first in range(0, len(members), step):
        counts, sizes = count_members(members[first : first + step], sets)
        partial[first : first + step] = (counts > 0) & (counts < sizes)
    return partial


def _touching(
    members: NDArray[np.uint8], sources: Sequence[tuple[Members, Ints | None, Ints | None]]
) -> _Counts | None:
    found = [(*count_members(members, sets), partly, always) for sets, partly, always in sources if len(sets)]
    if not found:
        return None
    partly, always = [], []
    for _, sizes, moving, shared in found:
        nothing = np.zeros((len(sizes), 3), dtype=np.int64)
        if moving is not None:
            partly.append(moving)
            always.append(nothing)
        elif shared is not None:
            partly.append(np.where(np.arange(3) == 0, shared[:, [TIE_LOAD, TIE_LIVE, TIE_FIXED]], 0))
            always.append(np.where(np.arange(3) == 0, 0, shared[:, [TIE_LOAD, TIE_LIVE, TIE_FIXED]]))
    return _Counts(
        counts=np.concatenate([part[0] for part in found], axis=1),
        sizes=np.concatenate([part[1] for part in found]),
        partly=np.concatenate(partly),
        always=np.concatenate(always),
    )
