"""Small random values for what a loss is computed from: as uneven over microbatches as the example's kind allows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxpipe._torch import FakeTensor
from fxpipe.capture.graph.sizes import Sizes, Unsuited, fill
from fxpipe.capture.graph.tail import COMPARING, Tail, spoken, stand_in, tensor_of
from fxpipe.capture.record.node import info, is_constant

PARTS = 3
"""Microbatches of the batch that is tried."""
PATTERNS = ((0.5, 0.15, 0.3), (0.0, 0.7, 0.35), (1.0, 0.25, 0.6), (0.3, 0.0, 1.0))
"""Shares of what is ignored in each microbatch, by trial; all of a microbatch in the later ones."""
FLOATS = ("normal", "unit", "positive")
INTEGERS = ("wide", "as given", "bits", "zero")
Values = dict[fx.Node, Any]


@dataclass(frozen=True, slots=True)
class Kind:
    """What values look like.

    Attributes:
        floats: One of ``FLOATS``: what the blocks hand out, and inputs without values.
        integers: One of ``INTEGERS``: the example's values and what may be ignored, the example's alone, 0 and 1, 0.
        masks: Whether a mask of which the example has all ones may have zeros.
        major: Whether samples come first where several rows belong to each.
    """

    floats: str = "normal"
    integers: str = "wide"
    masks: bool = True
    major: bool = True


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
        self._major = True

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
                value = _leaf(self.joined(node, pieces), pieces[0]) if at is not None else pieces[0]
            whole[node] = value
            for part, piece in zip(parts, pieces, strict=True):
                part[node] = piece
        return whole, parts

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
        shares: tuple[float, ...] = PATTERNS[trial % len(PATTERNS)]
        shares = shares[place % PARTS :] + shares[: place % PARTS] if place > 1 and trial < 2 else shares
        if at is None:
            own = self._own(node, shape)
            piece = own if own is not None else self._one(node, shape, kind, 0.0, generator)
            return [piece] * PARTS
        return [self._one(node, shape, kind, share, generator) for share in shares]

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

    def _one(
        self, node: fx.Node, shape: Sequence[int], kind: Kind, share: float, generator: torch.Generator
    ) -> torch.Tensor:
        meta = tensor_of(node)
        dtype = getattr(torch, meta.dtype)
        if dtype.is_complex:
            return torch.randn(*shape, generator=generator, dtype=torch.complex128)
        pool = self._pool(node, kind)
        if pool is None:
            value = _floats(kind.floats, shape, generator)
            return value.requires_grad_(meta.requires_grad)
        usual, ignored = pool
        value = usual[torch.randint(len(usual), tuple(shape), generator=generator)]
        if len(ignored):
            hidden = torch.rand(*shape, generator=generator) < share
            value = torch.where(hidden, ignored[torch.randint(len(ignored), tuple(shape), generator=generator)], value)
        return value.double() if dtype.is_floating_point else value.to(dtype)

    def _pool(self, node: fx.Node, kind: Kind) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Give the values that an input takes: usual ones, and those that may be ignored; None for real numbers."""
        dtype = getattr(torch, tensor_of(node).dtype)
        example = self.inputs.get(str(node.target)) if node.op == "placeholder" else None
        known = None if example is None or _is_empty(example) else example.detach().cpu()
        if dtype.is_floating_point:
            if known is None:
                return None
            found = torch.unique(known.double())
            if len(found) > 4 or not found.isfinite().all():
                if bool((found >= 0).all()) and kind.floats == "normal":  # weights, probabilities
                    return found[:: max(len(found) // 64, 1)], found[:0]
                return None
        elif dtype == torch.bool or known is None or kind.integers in ("bits", "zero"):
            found = torch.tensor([0] if kind.integers == "zero" else [0, 1])
        else:
            found = torch.tensor(
                sorted({self.sizes.identify(int(value)) for value in torch.unique(known)[:4096].tolist()})
            )
        if kind.masks and set(found.tolist()) <= {0, 1}:
            found = found.new_tensor([0, 1])
        if set(found.tolist()) == {0, 1} and kind.integers != "zero":
            special = found.new_tensor([each for each in self._special if each < 0])
            is_label = len(special) > 0 and not dtype.is_floating_point and dtype != torch.bool
            return (found, special) if is_label else (found[1:], found[:1])
        special = [] if dtype.is_floating_point or kind.integers != "wide" else list(self._special)
        usual = found[found >= 0] if not dtype.is_floating_point else found
        ignored = {*special, *(found[found < 0].tolist() if not dtype.is_floating_point else ())}
        return (usual if len(usual) else found), found.new_tensor(sorted(ignored))

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
