"""All downsets of a graph, and the best chain of them: the exact search where they are few.

A downset holds all predecessors of its nodes; a partition into stages is a chain of downsets
``∅ = D0 ⊂ D1 ⊂ … = everything``, stage ``s`` being ``D(s+1) - D(s)``. So the best chain over all downsets is the
best partition.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fxpipe.planning.evaluate import Found
from fxpipe.planning.instance import UNREACHABLE, Instance, Ints, Members
from fxpipe.planning.request import Request

MOST_DOWNSETS = 150_000
BLOCK_ENTRIES = 4_000_000  # entries of one block of pairs, to bound memory
NOTHING = np.zeros((1, 1), dtype=np.int64)


def enumerate_downsets(instance: Instance, limit: int) -> list[int] | None:
    """List all downsets as bit masks, the empty and the full one included; None if there are more than ``limit``.

    >>> from fxpipe.planning.problem import PartitionProblem
    >>> from fxpipe.planning.instance import make_instance
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
                following.append(larger)
            found[downset] = ()
            if len(found) > limit:
                return None
        level = following
    return sorted(found)


@dataclass(frozen=True, slots=True)
class Downsets:
    """All downsets of an instance, ready to be searched."""

    instance: Instance
    masks: list[int]
    costs: DownsetCosts

    def best(self, request: Request, upper: int, *, objective: str = "load") -> Found | None:
        """Give the best partition if its bottleneck (or memory) is below ``upper``."""
        chain = best_chain(self.costs, request, upper, objective=objective)
        if chain is None:
            return None
        stage_of = np.zeros(self.instance.size, dtype=np.int64)
        for position in chain[1][1:-1]:
            mask = self.masks[position]
            stage_of += np.asarray([not mask >> node & 1 for node in range(self.instance.size)], dtype=np.int64)
        return Found(chain[0], stage_of)


def all_downsets(instance: Instance, request: Request) -> Downsets | None:
    """Enumerate the downsets and what lies between them; None if they are too many."""
    if instance.size >= MOST_DOWNSETS:
        return None
    masks = enumerate_downsets(instance, MOST_DOWNSETS)
    return None if masks is None else Downsets(instance, masks, DownsetCosts(instance, request.routing, masks))


@dataclass(frozen=True, slots=True)
class _Counts:
    """How many nodes of each touching set every downset holds, and what the sets cost."""

    counts: NDArray[np.int32]
    sizes: Ints
    load: Ints
    bytes: Ints
    static: Ints


class DownsetCosts:
    """What a stage between two downsets costs, for whole blocks of pairs at once."""

    def __init__(self, instance: Instance, routing: str, downsets: Sequence[int]) -> None:
        words = max(1, -(-instance.size // 64))
        raw = b"".join(downset.to_bytes(words * 8, "little") for downset in downsets)
        self._words = np.frombuffer(raw, dtype="<u8").reshape(len(downsets), words)
        members = np.unpackbits(self._words.view(np.uint8), axis=1, bitorder="little")[:, : instance.size]
        self.size = len(downsets)
        self.full = int(np.flatnonzero(members.all(axis=1))[0])
        self.empty = int(np.flatnonzero(~members.any(axis=1))[0])
        self.load = _sums(members, instance.load)
        self.static = _sums(members, instance.static)
        self.activation = _sums(members, instance.activation)
        self.cross_load = np.zeros(self.size, dtype=np.int64)
        self.cross_bytes = np.zeros(self.size, dtype=np.int64)
        touching = []
        if routing == "direct":
            touching.append((instance.values, True))
        else:
            counts, sizes = _count(members, instance.values)
            partial = (counts > 0) & (counts < sizes)
            self.cross_load = _sums(partial, instance.values.load)
            self.cross_bytes = _sums(partial, instance.values.bytes)
        touching.append((instance.ties, False))
        self._touching = _touching(members, touching)

    def block(self, request: Request, left: Ints, right: Ints, stage: int, objective: str) -> Ints:
        """Give the cost of this stage from each downset of ``left`` to each of ``right``, ``UNREACHABLE`` if none."""
        pairs = np.zeros((len(left), len(right)), dtype=bool)
        for word in range(self._words.shape[1]):
            pairs |= (self._words[left, word][:, None] & ~self._words[right, word][None, :]) != 0
        pairs |= left[:, None] == right[None, :]
        paid, live = request.paid, request.live[stage]
        sharing = self._sharing(left, right)
        limit = request.memory_limit if objective == "load" else UNREACHABLE
        if limit is not None:
            alive = _outer(self.activation, left, right) + _both(
                self.cross_bytes, left, right, paid[stage], paid[stage + 1]
            )
            memory: Ints = _outer(self.static, left, right) + live * (alive + sharing[1]) + sharing[2]
            if objective == "memory":
                memory[pairs] = UNREACHABLE
                return memory
            pairs |= memory > limit
        cost: Ints = (
            _outer(self.load, left, right)
            + _both(self.cross_load, left, right, paid[stage], paid[stage + 1])
            + sharing[0]
        )
        cost[pairs] = UNREACHABLE
        return cost

    def least(self, request: Request, objective: str) -> Ints:
        """Give per downset a number whose difference is at most what a stage between two of them costs."""
        return self.load if objective == "load" else self.static + min(request.live) * self.activation

    def _sharing(self, left: Ints, right: Ints) -> tuple[Ints, Ints, Ints]:
        """Give load, bytes and static bytes that touching sets add to each pair.

        A set is paid when the counts differ, except when it goes from none to all (time and buffers; a copy is held all
        the same). Written with what is partly in, ``part``, and the products over sets partly in both downsets, so that
        the pairs cost one matrix product: ``part(D1) + part(D2) - Σ over partly in both (1 + same count)``, and for
        copies ``some(D2) - all(D1) - Σ same count``.
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
        for amounts in (touching.load, touching.bytes):
            if not amounts.any():
                results.append(NOTHING)
                continue
            own = _sums(part_left, amounts)[:, None] + _sums(part_right, amounts)[None, :]
            shared = _product(both_left, both_right, amounts[used]) + _product(
                same_left, same_right, amounts[used[columns]]
            )
            results.append(own - shared)
        if touching.static.any():
            some = _sums(counts_right > 0, touching.static)[None, :]
            whole = _sums(counts_left == touching.sizes, touching.static)[:, None]
            results.append(some - whole - _product(same_left, same_right, touching.static[used[columns]]))
        else:
            results.append(NOTHING)
        return results[0], results[1], results[2]


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
    columns = chosen.astype(np.float64)
    total = np.zeros(len(chosen), dtype=np.int64)
    for part, shift in _float_parts(amounts):
        total += (columns @ part).astype(np.int64) << shift
    return total


def _float_parts(amounts: Ints) -> list[tuple[NDArray[np.float64], int]]:
    """Split amounts so that float64, which numpy multiplies fast, adds each part exactly: below 2**53."""
    if amounts.sum() < 2**52:
        return [(amounts.astype(np.float64), 0)]
    return [((amounts & (2**31 - 1)).astype(np.float64), 0), ((amounts >> 31).astype(np.float64), 31)]


def _outer(amounts: Ints, left: Ints, right: Ints) -> Ints:
    return amounts[right][None, :] - amounts[left][:, None]


def _both(amounts: Ints, left: Ints, right: Ints, pays_left: int, pays_right: int) -> Ints:
    total: Ints = pays_right * amounts[right][None, :] + pays_left * amounts[left][:, None]
    return total


def _count(members: NDArray[np.uint8], sets: Members) -> tuple[NDArray[np.int32], Ints]:
    if not len(sets):
        return np.zeros((len(members), 0), dtype=np.int32), np.zeros(0, dtype=np.int64)
    counts = np.add.reduceat(members[:, sets.nodes], sets.start[:-1], axis=1, dtype=np.int32)
    return counts, np.diff(sets.start)


def _touching(members: NDArray[np.uint8], sources: Sequence[tuple[Members, bool]]) -> _Counts | None:
    parts = [(*_count(members, sets), sets, moving) for sets, moving in sources if len(sets)]
    if not parts:
        return None
    return _Counts(
        counts=np.concatenate([part[0] for part in parts], axis=1),
        sizes=np.concatenate([part[1] for part in parts]),
        load=np.concatenate([part[2].load for part in parts]),
        bytes=np.concatenate([part[2].bytes if part[3] else 0 * part[2].bytes for part in parts]),
        static=np.concatenate([0 * part[2].bytes if part[3] else part[2].bytes for part in parts]),
    )


def best_chain(
    costs: DownsetCosts, request: Request, upper: int, *, objective: str = "load"
) -> tuple[int, list[int]] | None:
    """Find the chain of downsets with the smallest bottleneck below ``upper``: exact over the downsets given.

    ``value[D]`` after ``s`` stages is the smallest bottleneck of ``s`` stages that make up ``D``. A downset is looked
    at after ``s`` stages only if what it holds fits ``s`` stages and the rest fits the others.

    Args:
        costs: Downsets and what lies between them.
        request: Stages and limits.
        upper: Only a bottleneck below this is of interest.
        objective: ``"load"``, within the memory limit; or ``"memory"``, whatever the load.

    Returns:
        The bottleneck and the downsets' positions from the empty to the full one; None if none is below ``upper``.
    """
    base = costs.least(request, objective)
    by_base = np.argsort(base, kind="stable")
    most = upper - 1
    total = int(base[costs.full])
    alike = request.one_live and all(request.paid) and not request.exactly
    settled = np.full(costs.size, upper, dtype=np.int64)  # the best value with fewer stages, where stages are alike
    reached, values = np.asarray([costs.empty]), np.zeros(1, dtype=np.int64)
    parents: list[dict[int, int]] = []
    best: tuple[int, int] | None = None
    for stage in range(request.stages):
        rest = request.stages - stage - 1
        inside = by_base[(base[by_base] <= (stage + 1) * most) & (total - base[by_base] <= rest * most)]
        if request.exactly and rest:
            inside = inside[inside != costs.full]
        value, parent = _step(
            costs, request, reached, values, inside, base, stage, min(upper, best[0] if best else upper), objective
        )
        kept = value < (settled[inside] if alike else upper)
        inside, value, parent = inside[kept], value[kept], parent[kept]
        parents.append(dict(zip(inside.tolist(), parent.tolist(), strict=True)))
        if alike:
            settled[inside] = value
        at_end = np.flatnonzero(inside == costs.full)
        if len(at_end) and (best is None or value[at_end[0]] < best[0]) and (not request.exactly or not rest):
            best = int(value[at_end[0]]), stage + 1
        onward = inside != costs.full
        reached, values = inside[onward], value[onward]
        if not len(reached):
            break
    return None if best is None else (best[0], _trace(parents[: best[1]], costs.full))


def _trace(parents: Sequence[dict[int, int]], full: int) -> list[int]:
    chain = [full]
    for parent in reversed(parents):
        chain.append(parent[chain[-1]])
    return chain[::-1]


def _step(
    costs: DownsetCosts,
    request: Request,
    reached: Ints,
    values: Ints,
    inside: Ints,
    base: Ints,
    stage: int,
    upper: int,
    objective: str,
) -> tuple[Ints, Ints]:
    """Extend every downset in ``reached`` by one stage to those in ``inside`` (ascending in base)."""
    value = np.full(len(inside), UNREACHABLE, dtype=np.int64)
    parent = np.zeros(len(inside), dtype=np.int64)
    order = np.argsort(base[reached], kind="stable")
    inside_base = base[inside]
    start = 0
    while start < len(order):
        stop, low, high = start + 1, 0, 0
        lightest = int(base[reached[order[start]]])
        low = int(np.searchsorted(inside_base, lightest, side="left"))
        while stop < len(order) and stop - start < 512:
            high = int(np.searchsorted(inside_base, int(base[reached[order[stop]]]) + upper, side="left"))
            if (stop + 1 - start) * (high - low) > BLOCK_ENTRIES:
                break
            stop += 1
        block = order[start:stop]
        high = int(np.searchsorted(inside_base, int(base[reached[block[-1]]]) + upper, side="left"))
        if high > low:
            right = inside[low:high]
            cost = np.maximum(costs.block(request, reached[block], right, stage, objective), values[block][:, None])
            chosen = cost.argmin(axis=0)
            least = cost[chosen, np.arange(len(right))]
            better = least < value[low:high]
            value[low:high][better] = least[better]
            parent[low:high][better] = reached[block][chosen[better]]
        start = stop
    return value, parent
