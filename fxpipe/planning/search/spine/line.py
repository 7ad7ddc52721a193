"""Marks in a row that stand for all cuts of a graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from fxpipe.planning.search.instance import Ints

Mark = tuple[int, int, bool]


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
    """

    ends: Ints
    begins: Ints
    shared: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.ends)

    @classmethod
    def of(cls, marks: Sequence[Mark]) -> Line:
        """Make a line of marks, without those that a neighbour can stand for."""
        kept: list[Mark] = []
        for mark in marks:
            while kept and _stands_for(mark, kept[-1]):
                kept.pop()
            if not (kept and _stands_for(kept[-1], mark)):
                kept.append(mark)
        ends, begins = np.asarray([mark[:2] for mark in kept], dtype=np.int64).reshape(-1, 2).T
        return cls(ends, begins, np.asarray([mark[2] for mark in kept], dtype=np.bool_))

    def thinned(self, count: int) -> Line:
        """Let shared marks stand for shared neighbours too, so that about ``count`` marks are left.

        Those are joined first that lose least by it.
        """
        marks = list(zip(self.ends.tolist(), self.begins.tolist(), self.shared.tolist(), strict=True))
        while len(marks) > count:
            pairs = list(pairwise(marks))
            lost = {
                place: abs(one[0] - other[0]) + abs(one[1] - other[1])
                for place, (one, other) in enumerate(pairs)
                if one[2] and other[2]
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
            marks = left
        return Line.of(marks)


def _joined(one: Mark, other: Mark) -> Mark:
    return min(one[0], other[0]), max(one[1], other[1]), True


def _stands_for(one: Mark, other: Mark) -> bool:
    """Tell whether a mark can stand for its neighbour too: both are shared, and it costs no more on either side."""
    return one[2] and other[2] and one[0] <= other[0] and one[1] >= other[1]
