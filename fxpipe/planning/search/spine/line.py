"""Marks in a row that stand for all cuts of a graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from fxpipe.planning.search.instance import Ints

NOWHERE = int(np.iinfo(np.int64).min // 2)
Apart = Mapping[int, tuple[int, ...]]
Mark = tuple[int, int, int | None]  # ``P + x``, ``P - x``, and of one cut alone the nodes before it, as bits


@dataclass(frozen=True, slots=True)
class Line:
    """Marks of which, for every cut of the graph, one costs no more on either side; memory and ties aside.

    With ``P`` the load before a cut and ``x`` what crosses it, a stage costs ``P + x`` of the cut behind it less
    ``P - x`` of the cut before. Of two cuts, one within the other, the outer one has no earlier mark, and the same one
    only where it is shared.

    Attributes:
        ends: ``P + x`` of each mark.
        begins: ``P - x`` of each mark.
        shared: Whether it stands for several cuts, so that two in a row may have it.
        apart: For each mark of one cut alone, the earlier ones of those marks whose cuts do not lie within it.
    """

    ends: Ints
    begins: Ints
    shared: NDArray[np.bool_]
    apart: Apart

    def __len__(self) -> int:
        return len(self.ends)

    @classmethod
    def of(cls, marks: Sequence[Mark]) -> Line:
        """Make a line of marks."""
        ends, begins = np.asarray([mark[:2] for mark in marks], dtype=np.int64).reshape(-1, 2).T
        own = [(place, mark[2]) for place, mark in enumerate(marks) if mark[2] is not None]
        apart = {
            place: tuple(before for before, inner in own[:index] if inner & ~cut)
            for index, (place, cut) in enumerate(own)
        }
        return cls(ends, begins, np.asarray([mark[2] is None for mark in marks], dtype=np.bool_), apart)

    def may_keep(self, bound: int, stages: int, total: int) -> bool:
        """Tell whether stages in a row may keep a bound, each by itself."""
        states = np.where(self.ends <= bound, self.begins, NOWHERE)
        for _ in range(2, stages):
            kept = before(states, self.shared, self.apart) >= np.maximum(self.ends - bound, NOWHERE + 1)
            states = np.where(kept, self.begins, NOWHERE)
        return bool((states >= total - bound).any())


def before(states: Ints, shared: NDArray[np.bool_], apart: Apart) -> Ints:
    """Give for each mark, a row, the most of all rows that may come before it, and of its own where it is shared."""
    most = np.maximum.accumulate(states, axis=0)
    for row in np.flatnonzero(~shared)[::-1].tolist():
        others = apart.get(row)
        if others:
            kept = np.ones(row, dtype=bool)
            kept[list(others)] = False
            most[row] = states[:row][kept].max(axis=0, initial=NOWHERE)
        else:
            most[row] = most[row - 1] if row else NOWHERE
    return most


def distinct(marks: Sequence[Mark]) -> list[Mark]:
    """Leave out marks that a neighbour can stand for."""
    kept: list[Mark] = []
    for mark in marks:
        while kept and _stands_for(mark, kept[-1]):
            kept.pop()
        if not (kept and _stands_for(kept[-1], mark)):
            kept.append(mark)
    return kept


def thinned(marks: Sequence[Mark], count: int) -> list[Mark]:
    """Let shared marks stand for shared neighbours too, so that about ``count`` are left; first where least is lost."""
    marks = list(marks)
    while len(marks) > count:
        pairs = list(pairwise(marks))
        lost = {
            place: abs(one[0] - other[0]) + abs(one[1] - other[1])
            for place, (one, other) in enumerate(pairs)
            if one[2] is None and other[2] is None
        }
        if not lost:
            break
        chosen = set(sorted(lost, key=lost.__getitem__)[: max(1, (len(marks) - count) // 2)])
        left: list[Mark] = []
        place = 0
        while place < len(marks):
            joins = place in chosen
            left.append(_joined(*pairs[place]) if joins else marks[place])
            place += 1 + joins
        marks = distinct(left)
    return marks


def _joined(one: Mark, other: Mark) -> Mark:
    return min(one[0], other[0]), max(one[1], other[1]), None


def _stands_for(one: Mark, other: Mark) -> bool:
    """Tell whether a mark can stand for its neighbour too: both are shared, and it costs no more on either side."""
    return one[2] is None and other[2] is None and one[0] <= other[0] and one[1] >= other[1]
