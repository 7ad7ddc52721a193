"""Small random values for what a loss is computed from: as uneven over microbatches as the example's kind allows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxpipe._torch import FakeTensor
from fxpipe.capture.graph.sizes import Sizes, Unsuited, fill
from fxpipe.capture.graph.stand_ins import stand_in
from fxpipe.capture.graph.tail import COMPARING, Tail
from fxpipe.capture.graph.twins import spoken, tensor_of
from fxpipe.capture.record.node import info, is_constant, reached

PARTS = 3
"""Microbatches of the batch that is tried."""
PATTERNS = ((0.5, 0.15, 0.3), (0.0, 0.7, 0.35), (1.0, 0.25, 0.6), (0.3, 0.0, 1.0))
"""Shares of what is ignored in each microbatch, by trial; all of a microbatch in the later ones."""
BY_ROWS = (0.5, 0.0, 1.0)
"""Shares of samples of which all is ignored, or is one of the values that calls compare with: in further trials."""
MOST_TRIALS = 12
SCALES = {
    1: (0.1, 1.0, 5.0),
    2: (0.05, 0.05, 0.05),
    3: (30.0, 5.0, 0.01),
    4: (8.0, 8.0, 8.0),
    5: (40.0, 10.0, 40.0),
}
"""How large numbers are in each microbatch, by trial: what a batch's mean decides, some of them decide otherwise."""
FLOATS = ("normal", "unit", "positive")
INTEGERS = ("beyond", "wide", "beside", "as given", "bits", "zero")
Values = dict[fx.Node, Any]


@dataclass(frozen=True, slots=True)
class _Hiding:
    """How large a microbatch's values are, and what of them others stand for.

    Attributes:
        scale: How large numbers are.
        share: Of the elements, or of the samples.
        at: The dimension of samples, where all of a sample is hidden; None: single elements.
        choice: Which of the others; None: any.
    """

    scale: float = 1.0
    share: float = 0.0
    at: int | None = None
    choice: int | None = None

    def hide(self, value: torch.Tensor, instead: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Put others in the place of values."""
        if not len(instead):
            return value
        chosen = instead[torch.randint(len(instead), tuple(value.shape), generator=generator)]
        if self.choice is not None:
            chosen = instead[self.choice % len(instead)].expand(chosen.shape)
        if self.at is None:
            return torch.where(torch.rand(*value.shape, generator=generator) < self.share, chosen, value)
        rows = torch.arange(value.shape[self.at]) < round(self.share * value.shape[self.at])
        return torch.where(rows.view(-1, *[1] * (value.dim() - self.at - 1)), chosen, value)


@dataclass(frozen=True, slots=True)
class Kind:
    """What values look like.

    Attributes:
        floats: One of ``FLOATS``: what the blocks hand out, and inputs without values.
        integers: One of ``INTEGERS``: the example's values, what may be ignored, and what lies beside either; without
            what lies beside; without what may be ignored; the example's alone; 0 and 1; 0.
        masks: Whether a mask of which the example has all ones may have zeros.
        major: Whether samples come first where several rows belong to each.
        alike: Whether inputs that are equal in the example, a mask given to the model and to the loss, are equal.
    """

    floats: str = "normal"
    integers: str = "beyond"
    masks: bool = True
    major: bool = True
    alike: bool = False


class Given:
    """Makes the values of a tail's sources for a batch and for its microbatches.

    Args:
        tail: What is run.
        sizes: What numbers become.
        rows: Samples of each microbatch.
        inputs: The example, by name.
    """

    def __init__(self, tail: Tail, sizes: Sizes, rows: int, inputs: Mapping[str, torch.Tensor]) -> None:
        self.tail = tail
        self.sizes = sizes
        self.rows = rows
        self.inputs = inputs
        self._special = self._specials()
        self._beside = self._bounds()
        self._asked = self._asks()
        self.same = self._same_inputs()
        self._major = True

    @property
    def trials(self) -> int:
        """How many batches to try."""
        return min(len(PATTERNS) + max([2, *map(len, self._asked.values())]), MOST_TRIALS)

    @property
    def asked(self) -> bool:
        """Whether inputs of floats decide about masks."""
        return bool(self._asked)

    def make(self, kind: Kind, trial: int) -> tuple[Values, list[Values]]:
        """Give the values for the whole batch, and those of each microbatch."""
        twins = self.tail.twins
        self._major = kind.major
        generator = torch.Generator().manual_seed(trial + 1)
        whole: Values = {}
        parts: list[Values] = [{} for _ in range(PARTS)]
        place = 0
        for node in self.tail.sources:
            if node.op == "placeholder" and node.target in twins.unclear:
                raise Unsuited(f"which dimension of {node.target} counts samples is not known; say so in batch_dims=")
            number = info(node).number
            if number is not None:
                whole[node] = _varied(number, trial)
                for part in parts:
                    part[node] = whole[node]
                continue
            if node.op == "get_attr":
                value = self._attribute(node)
                pieces = [value] * PARTS
            else:
                at = twins.sample_dim(node)
                shapes = twins.growing(node)
                if shapes is None or (at is None and shapes[0] != shapes[1]):
                    raise Unsuited(f"{node.name} grows with the samples in several dimensions")
                place += node.op == "placeholder"
                pieces = self._pieces(node, shapes, at, kind, trial, place, generator)
                if kind.alike and node in self.same:
                    pieces = [part[self.same[node]] for part in parts]
                value = _leaf(self.joined(node, pieces), pieces[0]) if at is not None else pieces[0]
            whole[node] = value
            for part, piece in zip(parts, pieces, strict=True):
                part[node] = piece
        return whole, parts

    def _same_inputs(self) -> dict[fx.Node, fx.Node]:
        """Find the integers and truth values among the inputs that are those of an input before, in the example."""
        found: dict[fx.Node, fx.Node] = {}
        first: dict[fx.Node, torch.Tensor] = {}
        for node in self.tail.sources:
            example = self.inputs.get(str(node.target)) if node.op == "placeholder" else None
            if example is None or _is_empty(example) or example.is_floating_point() or example.is_complex():
                continue
            alike = (each for each, value in first.items() if value.dtype == example.dtype and _same(value, example))
            before = next(alike, None)
            if before is not None:
                found[node] = before
            first[node] = example
        return found

    def _pieces(
        self,
        node: fx.Node,
        shapes: tuple[tuple[int, ...], tuple[int, ...]],
        at: int | None,
        kind: Kind,
        trial: int,
        place: int,
        generator: torch.Generator,
    ) -> list[torch.Tensor]:
        shape = self.sizes.shape(*shapes, self.rows)
        by_rows = trial - len(PATTERNS)
        shares: tuple[float, ...] = PATTERNS[trial] if by_rows < 0 else BY_ROWS
        turned = trial < 2 or (by_rows > 0 and by_rows % 2 == 1)
        shares = shares[place % PARTS :] + shares[: place % PARTS] if place > 1 and turned else shares
        if at is None:
            own = self._own(node, shape)
            piece = own if own is not None else self._one(node, shape, kind, _Hiding(), generator)
            return [piece] * PARTS
        rows = (at, by_rows) if by_rows >= 0 else (None, None)
        hidings = (_Hiding(*each, *rows) for each in zip(SCALES.get(trial, (1.0,) * PARTS), shares, strict=True))
        return [self._one(node, shape, kind, hiding, generator) for hiding in hidings]

    def _own(self, node: fx.Node, shape: Sequence[int]) -> torch.Tensor | None:
        """Give the example's own values of an input that every microbatch gets whole."""
        example = self.inputs.get(str(node.target)) if node.op == "placeholder" else None
        if example is None or _is_empty(example) or tuple(example.shape) != tuple(shape):
            return None
        found = example.detach().cpu()
        return found.double() if found.is_floating_point() else found.clone()

    def joined(self, node: fx.Node, pieces: Sequence[torch.Tensor]) -> torch.Tensor:
        """Put what belongs to the microbatches together; in turns where rows come before samples.

        What has no dimension of samples is added up.
        """
        at, shapes = self.tail.twins.sample_dim(node), self.tail.twins.growing(node)
        if at is None or shapes is None:
            return torch.stack(list(pieces)).sum(0)
        if self._major or shapes[0][at] == self.tail.twins.samples:
            return torch.cat(list(pieces), at)
        turns = [torch.unflatten(piece, at, (-1, self.rows)) for piece in pieces]
        return torch.cat(turns, at + 1).flatten(at, at + 1)

    def parted(self, node: fx.Node, value: torch.Tensor) -> Sequence[torch.Tensor]:
        """Take what ``joined`` puts together apart again; each gets all of what has no dimension of samples."""
        at, shapes = self.tail.twins.sample_dim(node), self.tail.twins.growing(node)
        if at is None or shapes is None:
            return (value,) * PARTS
        if self._major or shapes[0][at] == self.tail.twins.samples:
            return value.chunk(PARTS, at)
        turns = torch.unflatten(value, at, (-1, PARTS * self.rows)).chunk(PARTS, at + 1)
        return [each.flatten(at, at + 1) for each in turns]

    def _one(
        self, node: fx.Node, shape: Sequence[int], kind: Kind, hiding: _Hiding, generator: torch.Generator
    ) -> torch.Tensor:
        meta = tensor_of(node)
        dtype = getattr(torch, meta.dtype)
        if dtype.is_complex:
            return torch.randn(*shape, generator=generator, dtype=torch.complex128)
        pool = self._asked_pool(node, kind) or self._pool(node, kind)
        if pool is None:
            value = _floats(kind.floats, shape, generator) * (hiding.scale if kind.floats != "unit" else 1.0)
            return hiding.hide(value, self._missing(node), generator).requires_grad_(meta.requires_grad)
        usual, ignored = pool
        value = usual[torch.randint(len(usual), tuple(shape), generator=generator)]
        if node in self._asked and kind.integers in ("beyond", "wide"):
            value = value * hiding.scale
        value = hiding.hide(value, ignored, generator)
        return value.double().requires_grad_(meta.requires_grad) if dtype.is_floating_point else value.to(dtype)

    def _pool(self, node: fx.Node, kind: Kind) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Give the values that an input takes: usual ones, and those that may be ignored; None for real numbers."""
        dtype = getattr(torch, tensor_of(node).dtype)
        example = self.inputs.get(str(node.target)) if node.op == "placeholder" else None
        known = None if example is None or _is_empty(example) else example.detach().cpu()
        if dtype.is_floating_point:
            if known is None:
                return None
            found = torch.unique(known.double())
            few_by_chance = known.numel() == len(found) <= 4 and not set(found.tolist()) <= {0, 1}
            if few_by_chance and found.isfinite().all():
                return torch.cat([found, 0.5 * found + 0.25 * found.sign(), 1.5 * found]), found[:0]
            if len(found) > 4 or not found.isfinite().all():
                if bool((found >= 0).all()) and kind.floats == "normal":  # weights, probabilities
                    return found[:: max(len(found) // 64, 1)], found[:0]
                return None
        elif dtype == torch.bool or known is None or kind.integers in ("bits", "zero"):
            found = torch.tensor([0] if kind.integers == "zero" else [0, 1])
        else:
            values = {self.sizes.identify(int(value)) for value in torch.unique(known)[:4096].tolist()}
            if kind.integers in ("beyond", "beside"):  # of a few samples all may be of one class, or be ignored
                values |= {0, *(value - 1 for value in values if value > 0)}
                values |= {1} if max(values) == 0 else set()
            found = torch.tensor(sorted(values))
        if kind.masks and set(found.tolist()) <= {0, 1}:
            found = found.new_tensor([0, 1])
        if set(found.tolist()) == {0, 1} and kind.integers != "zero":
            special = found.new_tensor([each for each in self._special if each < 0])
            is_label = len(special) > 0 and not dtype.is_floating_point and dtype != torch.bool
            if is_label:
                return found, special if kind.integers in ("beyond", "wide") else special[:0]
            return found[1:], found[:1]
        special = {"beyond": (*self._special, *self._beside), "wide": self._special}.get(kind.integers, ())
        special = () if dtype.is_floating_point else special
        usual = found[found >= 0] if not dtype.is_floating_point else found
        ignored = {*special, *(found[found < 0].tolist() if not dtype.is_floating_point else ())}
        return (usual if len(usual) else found), found.new_tensor(sorted(ignored))

    def _asked_pool(self, node: fx.Node, kind: Kind) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Give the values of an input of floats that decide about a mask: the example's, and those on either side.

        Whether ``target != -999`` or ``target > 50`` weighs microbatches is not seen with values that are all alike.
        """
        asked = self._asked.get(node)
        if asked is None:
            return None
        example = self.inputs.get(str(node.target))
        known = None if example is None or _is_empty(example) else torch.unique(example.detach().cpu().double())
        usual = known[known.isfinite()] if known is not None else torch.linspace(-2, 2, 64, dtype=torch.float64)
        if not len(usual) or set(usual[:3].tolist()) <= {0.0, 1.0}:  # a mask by itself
            return None
        beyond = usual.new_tensor(asked if kind.integers in ("beyond", "wide") else [])
        return usual[:: max(len(usual) // 64, 1)], torch.cat([beyond, self._missing(node)])

    def _asks(self) -> dict[fx.Node, list[float]]:
        """Give the inputs of floats that integers or truth values are made of, with what they are compared with."""
        found: dict[fx.Node, set[float]] = {}
        for node in self.tail.nodes:
            meta = info(node).tensor
            if meta is None or "float" in meta.dtype or node not in self.tail.twins.structure.derived:
                continue
            inputs = [n for n in reached([node]) if n.op == "placeholder" and info(n).tensor is not None]
            numbers: list[float] = [0]

            def look(leaf: Any, known: list[float] = numbers) -> Any:
                if type(leaf) in (int, float):
                    known.append(leaf)
                return leaf

            for above in reached([node]):
                fill(above.args, look)
            near = {float(number) + step for number in numbers for step in (-1, 0, 1)}
            for each in inputs:
                if "float" in tensor_of(each).dtype:
                    found.setdefault(each, set()).update(near)
        return {node: sorted(filter(math.isfinite, numbers)) for node, numbers in found.items()}

    def _missing(self, node: fx.Node) -> torch.Tensor:
        """Give what an input of floats has in the place of numbers: infinities, NaN where calls step over it."""
        example = self.inputs.get(str(node.target)) if node.op == "placeholder" else None
        if node.op != "placeholder":
            return torch.empty(0, dtype=torch.float64)
        known = torch.empty(0) if example is None or _is_empty(example) else example.detach().cpu()
        found = torch.unique(known[~known.isfinite()].double().nan_to_num(nan=0.0))
        has_nan = bool(known.isnan().any()) or self.tail.steps_over_nan
        return torch.cat([found[found != 0], found.new_full((int(has_nan),), torch.nan)])

    def _specials(self) -> tuple[int, ...]:
        """Give the values that calls compare with: what is ignored, or padding."""
        found: set[int] = set()

        def look(leaf: Any) -> Any:
            if isinstance(leaf, int) and not isinstance(leaf, bool):
                found.add(self.sizes.identify(leaf))
            return leaf

        for node in self.tail.nodes:
            name = spoken(node)
            if name in ("cross_entropy", "nll_loss"):
                fill(node.kwargs.get("ignore_index", node.args[4] if len(node.args) > 4 else -100), look)
            elif name in COMPARING:
                fill((node.args, node.kwargs), look)
            elif node.op == "call_module":
                module = self.tail.twins.skeleton.module.get_submodule(str(node.target))
                look(getattr(module, "ignore_index", None))
        return tuple(sorted(found))

    def _bounds(self) -> tuple[int, ...]:
        """Give the integers on either side of what calls compare with."""
        found: set[int] = set()

        def look(leaf: Any) -> Any:
            if isinstance(leaf, int) and not isinstance(leaf, bool):
                found.update((self.sizes.identify(leaf) - 1, self.sizes.identify(leaf) + 1))
            return leaf

        for node in self.tail.nodes:
            if spoken(node) in ("lt", "le", "gt", "ge"):
                fill(node.args, look)
        return tuple(sorted(found))

    def _attribute(self, node: fx.Node) -> Any:
        twins = self.tail.twins
        target = str(node.target)
        if not is_constant(node):
            owner, _, leaf = target.rpartition(".")
            fake = getattr(twins.skeleton.module.get_submodule(owner), leaf)
            shape = tuple(int(self.sizes.rename(size)) for size in fake.shape)
            value = stand_in(twins.skeleton, fake, shape)
            return value.requires_grad_(fake.requires_grad)
        value = twins.one.recorder.constants[target]
        other = twins.constants.get(str(twins.other[node].target))
        if not isinstance(value, torch.Tensor):
            return value
        if isinstance(value, FakeTensor) or not isinstance(other, torch.Tensor) or not _same(value, other):
            raise Unsuited("it reads a constant that depends on the number of samples")
        found = value.detach().cpu()[tuple(slice(int(self.sizes.rename(size))) for size in value.shape)]
        return found.double() if found.is_floating_point() else found.clone()


def kinds_of(tail: Tail, asked: bool) -> Iterator[Kind]:
    """Yield the kinds of values to try, the likeliest first."""
    inputs = [n for n in tail.sources if n.op == "placeholder" and info(n).number is None]
    has_integers = any("float" not in tensor_of(n).dtype for n in inputs) or asked
    for masks in (True, False):
        for integers in INTEGERS if has_integers else INTEGERS[:1]:
            for floats in FLOATS:
                yield Kind(floats, integers, masks)
                if has_turns(tail):
                    yield Kind(floats, integers, masks, major=False)


def has_turns(tail: Tail) -> bool:
    """Whether some value has several rows for each sample."""
    twins = tail.twins
    for node in tail.sources:
        at, shapes = twins.sample_dim(node), twins.growing(node)
        if at is not None and shapes is not None and shapes[0][at] != twins.samples:
            return True
    return False


def _varied(number: float, trial: int) -> float:
    """Give another number for each trial: what holds must hold for all of them.

    >>> [_varied(2.0, trial) for trial in range(3)], [_varied(0, trial) for trial in range(3)]
    ([2.0, 1.8, 1.6], [0, 1, 2])
    """
    if isinstance(number, int):
        return number + trial
    return (number or 0.3 * bool(trial)) * (10 - trial) / 10


def _leaf(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return value.detach().requires_grad_(like.requires_grad)


def _floats(kind: str, shape: Sequence[int], generator: torch.Generator) -> torch.Tensor:
    if kind == "normal":
        return torch.randn(tuple(shape), generator=generator, dtype=torch.float64)
    value = torch.rand(tuple(shape), generator=generator, dtype=torch.float64)
    return value * 0.9 + 0.05 if kind == "unit" else value * 3 + 0.5


def _is_empty(tensor: torch.Tensor) -> bool:
    return tensor.is_meta or isinstance(tensor, FakeTensor) or not tensor.numel()


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)
