"""Numbers of a recorded graph as functions of the number of samples, from two recordings; large sizes renamed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from torch import fx

from fxpipe.errors import ScheduleError
from fxpipe.ir.tree import tree_leaves

KEPT = 64
"""Sizes up to this stay as they are; more of them where that does not do."""
_NEAR = 4  # sizes that differ by less belong together: 1023 targets of 1024 tokens
_FRESH = (11, 17, 23, 29, 37, 43, 53, 59)


class Unsuited(Exception):
    """A graph cannot be run at another size; the text says why."""


@dataclass(frozen=True, slots=True)
class Varying:
    """A number that was ``first`` for ``samples`` samples and ``second`` for twice as many."""

    first: int | float
    second: int | float


@dataclass(frozen=True, slots=True)
class Read:
    """A number that Python read from a tensor in the forward: the value of a node."""

    node: fx.Node


@dataclass(frozen=True, slots=True)
class Sizes:
    """How numbers change with the number of samples, and which sizes are renamed.

    Attributes:
        samples: Of the first recording.
        renamed: The small size that stands for each large one.
    """

    samples: int
    renamed: Mapping[int, int] = field(default_factory=dict)

    def at(self, number: Any, samples: int) -> Any:
        """Give a number for other samples and under the new names.

        Raises:
            Unsuited: How it depends on the samples is not understood.

        >>> Sizes(4, {1000: 11}).at(Varying(4000, 8000), samples=6)
        66
        """
        if not isinstance(number, Varying):
            return self.rename(number)
        first, second = number.first, number.second
        if isinstance(first, int) and isinstance(second, int):
            return self._whole(first, second, samples)
        for power in (1.0, -1.0, 0.5, -0.5, 2.0, -2.0):
            if math.isclose(second, first * 2.0**power, rel_tol=1e-12):
                per = first / self.samples**power
                if power == 1.0 and per.is_integer():
                    per = self.rename(int(per))
                return per * samples**power
        raise Unsuited(f"a number is {first} for {self.samples} samples and {second} for {2 * self.samples}")

    def _whole(self, first: int, second: int, samples: int) -> int:
        own = self.samples
        for form in (_pairs, _unordered_pairs, _square):
            if own > 1 and (first, second) == (form(own), form(2 * own)):
                return form(samples)
        per = Fraction(second - first, own)
        rest = first - per * own
        if rest.denominator != 1:
            raise Unsuited(f"a size is {first} for {own} samples and {second} for {2 * own}")
        if per.denominator == 1:
            return int(self.rename(int(per))) * samples + int(self.rename(int(rest)))
        found = per * samples + rest
        if found.denominator != 1:
            raise Unsuited(f"a size is {first} for {own} samples and {second} for {2 * own}")
        return int(found)

    def rename(self, number: Any) -> Any:
        """Give the new name of a number; itself where it is small, or none of the sizes that have one.

        >>> [Sizes(4, {1000: 11}).rename(number) for number in (1000, 999, -1, 2000, 1.5)]
        [11, 10, -1, 22, 1.5]
        """
        if isinstance(number, bool) or not isinstance(number, int) or abs(number) <= KEPT or not self.renamed:
            return number
        if number in self.renamed:
            return self.renamed[number]
        for size, small in self.renamed.items():
            if abs(number - size) <= _NEAR:
                return small + number - size
        for size, small in self.renamed.items():
            rest, over = divmod(number, size)
            if not over and (rest <= KEPT or rest in self.renamed):
                return small * self.renamed.get(rest, rest)
        return number

    def identify(self, value: int) -> int:
        """Give the new name of a class or a token.

        >>> [Sizes(4, {1000: 11}).identify(value) for value in (-100, 7, 999, 500)]
        [-100, 7, 10, 5]
        """
        if value < 0 or not self.renamed:
            return value  # it marks what is ignored, and is no size that happens to be a multiple of another
        named = int(self.rename(value))
        larger = [small for size, small in self.renamed.items() if size > value]
        return named % min(larger) if larger else named

    def shape(self, first: Iterable[int], second: Iterable[int], samples: int) -> tuple[int, ...]:
        """Give a shape for other samples, from that in either recording."""
        pairs = zip(first, second, strict=True)
        return tuple(int(self.at(paired(one, other), samples)) for one, other in pairs)


def _pairs(count: int) -> int:
    return count * (count - 1)


def _unordered_pairs(count: int) -> int:
    return count * (count - 1) // 2


def _square(count: int) -> int:
    return count * count


def paired(first: Any, second: Any) -> Any:
    """Give one number for that of two recordings: a ``Varying`` where they differ."""
    same = first == second or (first != first and second != second)  # two that are no numbers
    return first if same else Varying(first, second)


def small_sizes(sizes: Iterable[int], above: int = KEPT, apart: int = _NEAR) -> dict[int, int]:
    """Name large sizes anew: near ones stay near, multiples and products stay such, others stay different.

    A size that is near one that keeps its own keeps it as well: 65 beside 64 tokens.

    Args:
        sizes: All of them.
        above: Sizes up to this stay as they are.
        apart: Sizes that differ by no more are near.

    >>> small_sizes([50257, 1024, 1023, 8, 4096])
    {1023: 11, 1024: 12, 4096: 48, 50257: 17}
    >>> small_sizes([64, 65, 50257, 65 * 50257]), small_sizes([1024, 50257], above=1024)
    ({50257: 11, 3266705: 715}, {50257: 11})
    """
    fresh = iter(_FRESH)
    named: dict[int, int] = {}
    own: set[int] = set()
    for size in sorted(set(sizes)):
        if size <= above or any(size - known <= apart for known in own):
            own.add(size)
            continue
        near = [known for known in named if size - known <= apart]
        parts = [known for known in named if size % known == 0 and size // known * named[known] <= KEPT]
        products = [
            named[known] * named.get(size // known, size // known)
            for known in named
            if size % known == 0 and (size // known in named or size // known in own)
        ]
        if near:
            named[size] = named[near[0]] + size - near[0]
        elif parts:
            named[size] = size // parts[-1] * named[parts[-1]]
        elif products:
            named[size] = products[-1]
        else:
            small = next(fresh, None)
            if small is None:
                return {}
            named[size] = small
    return named


def settings(samples: int, sizes: Sequence[int]) -> Iterator[tuple[Sizes, int]]:
    """Yield sizes and samples per microbatch to try: small ones, then one size after the other as it is.

    Sizes that are renamed may hang together in ways that are not seen: one is another and a hundred. The smaller of
    them cost little as they are, and of what is left the largest, mostly the classes, still gets a small name.
    """
    few = [2, 1] if samples == 1 else [samples, 2]  # of single samples each is all there is
    rows = dict.fromkeys(few if samples <= 8 else [2, samples])
    names = [small_sizes(sizes), small_sizes(sizes, apart=KEPT)]
    names += [small_sizes(sizes, above) for above in sorted({size for size in sizes if size > KEPT})]
    tried: list[dict[int, int]] = []
    for renamed in (*names, {}):
        if renamed not in tried:
            tried.append(renamed)
            for each in rows:
                yield Sizes(samples, renamed), each


def pair(first: Any, second: Any, node: Callable[[fx.Node, fx.Node], Any]) -> Any:
    """Walk the arguments of two recordings of one call side by side.

    Args:
        first: Arguments in one recording.
        second: In the other.
        node: Called with two nodes that stand in one place.

    Returns:
        The same structure with ``Varying`` numbers where they differ.

    Raises:
        Unsuited: Something else differs.
    """
    if isinstance(first, fx.Node) and isinstance(second, fx.Node):
        return node(first, second)
    if isinstance(first, tuple | list) and isinstance(second, tuple | list) and len(first) == len(second):
        parts = [pair(one, other, node) for one, other in zip(first, second, strict=True)]
        return parts if isinstance(first, list) else tuple(parts)
    if isinstance(first, Mapping) and isinstance(second, Mapping) and first.keys() == second.keys():
        return {key: pair(item, second[key], node) for key, item in first.items()}
    if isinstance(first, slice) and isinstance(second, slice):
        parts = [pair(getattr(first, at), getattr(second, at), node) for at in ("start", "stop", "step")]
        return slice(*parts)
    if _is_number(first) and _is_number(second):
        return paired(first, second) if type(first) is type(second) else Varying(float(first), float(second))
    if type(first) is not type(second) or (first != second and not callable(first)):
        raise Unsuited("twice as many samples take another path")
    return first


def fill(value: Any, give: Callable[[Any], Any]) -> Any:
    """Rebuild paired arguments around other leaves.

    >>> fill((1, [Varying(2, 4)], slice(None, 3)), lambda leaf: "x" if isinstance(leaf, Varying) else leaf)
    (1, ['x'], slice(None, 3, None))
    """
    if isinstance(value, tuple | list):
        parts = [fill(item, give) for item in value]
        return parts if isinstance(value, list) else tuple(parts)
    if isinstance(value, Mapping):
        return {key: fill(item, give) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(fill(value.start, give), fill(value.stop, give), fill(value.step, give))
    return give(value)


def output_dims(one: Any, two: Any, samples: int) -> dict[str, int | None]:
    """Find the dimension of samples of each tensor that a model returns, by path: ``"output['logits']"``.

    Args:
        one: What it returned for some samples.
        two: For twice as many.
        samples: How many in ``one``.

    Returns:
        The one dimension that has twice the size, None where there is not just one.

    Raises:
        ScheduleError: A number beside the tensors is another one for other numbers of samples.

    >>> output_dims((torch.zeros(4, 2), torch.zeros(3)), (torch.zeros(4, 4), torch.zeros(3)), 2)
    {'output[0]': 1, 'output[1]': None}
    """
    pairs = list(zip(tree_leaves(one, "output"), tree_leaves(two, "output"), strict=False))
    for (path, left), (_, right) in pairs:
        if isinstance(left, int | float | str) and left != right:
            raise ScheduleError(
                f"{path} is {left!r} for {samples} samples and {right!r} for {2 * samples}: those of microbatches do "
                "not tell the batch's\n  call infer with one microbatch, or leave it out of what the model returns"
            )
    return {
        path: _grown(left, right, samples)
        for (path, left), (_, right) in pairs
        if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor)
    }


def _grown(one: torch.Tensor, two: torch.Tensor, samples: int) -> int | None:
    if one.dim() != two.dim():
        return None
    grown = [at for at in range(one.dim()) if one.shape[at] != two.shape[at]]
    fits = len(grown) == 1 and two.shape[grown[0]] == 2 * one.shape[grown[0]]
    return grown[0] if fits and one.shape[grown[0]] % samples == 0 else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


WIDE = frozenset({torch.float16, torch.bfloat16, torch.float32})
"""Dtypes for which float64 stands."""
