"""A microbatch as named tensors, and everything else about it as one comparable value."""

from __future__ import annotations

import inspect
import itertools
import keyword
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn

from fxpipe._torch import FakeTensor
from fxpipe.batch.dims import BatchLayout, Microbatch
from fxpipe.errors import CaptureError, SpecError
from fxpipe.ir.canonical import digest, spell
from fxpipe.ir.tree import map_tree, tree_leaves

Kind: TypeAlias = tuple[torch.dtype, int]
"""Dtype and number of dimensions of a tensor."""


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """One microbatch.

    Attributes:
        args: Positional arguments of the model.
        kwargs: Its keyword arguments.
        target: What the loss function compares with.
        tensors: Every tensor in them, by name.
        signature: Names, shapes and dtypes of the tensors, and all other values: equal for two microbatches that
            take the same graph, guards aside.
        samples: Number of samples.
        dims: The dimension of samples of each tensor that has one, by name.
        said: What the report says of how tensors are split, by name.
        unclear: Names of the tensors whose samples cannot be told.
        numbers: Every ``int`` and ``float`` that is no tensor, by name.
        open: The signature without the values of numbers: equal for microbatches that take the same graph if the
            numbers only enter arithmetic.
        follows: Whether a recording takes the numbers as inputs of its graph.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    target: Any
    tensors: Mapping[str, torch.Tensor]
    signature: tuple[Any, ...]
    samples: int = 1
    dims: Mapping[str, int] = field(default_factory=dict)
    said: Mapping[str, str] = field(default_factory=dict)
    unclear: frozenset[str] = frozenset()
    numbers: Mapping[str, float] = field(default_factory=dict)
    open: tuple[Any, ...] = ()
    follows: bool = False

    @property
    def values(self) -> Mapping[str, Any]:
        """All tensors and numbers, by name."""
        if not self.numbers:
            return self.tensors
        return {**self.tensors, **self.numbers}

    @property
    def followed(self) -> Mapping[str, float]:
        """The numbers that are inputs of a graph."""
        return self.numbers if self.follows else {}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors, by name."""
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    @property
    def tokens(self) -> int:
        """Entries of the first tensor of integers that has samples along one of several dimensions; 0 without one.

        >>> name_inputs(("ids",), (torch.zeros(2, 3, dtype=torch.int64),), {}, layout=BatchLayout(2, {"ids": 0})).tokens
        6
        """
        kinds = (torch.int64, torch.int32, torch.int16, torch.uint8)
        found = (t for name, t in self.tensors.items() if name in self.dims and t.dim() > 1 and t.dtype in kinds)
        return next((tensor.numel() for tensor in found), 0)

    @property
    def without_sizes(self) -> tuple[Any, ...]:
        """The signature without the sizes of tensors but for 0 and 1, which broadcast: no symbol stands for those."""
        return _without_sizes(self.signature)

    @property
    def open_without_sizes(self) -> tuple[Any, ...]:
        """The same, and without the values of numbers."""
        return _without_sizes(self.open)

    @property
    def are_partly_fake(self) -> bool:
        """Whether some tensors have no values."""
        return any(tensor.is_meta or isinstance(tensor, FakeTensor) for tensor in self.tensors.values())

    def described(self) -> tuple[str, ...]:
        """Give name, dtype and shape of each tensor, as text."""
        return tuple(
            f"{name} {str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)} {self.said.get(name, '')}".rstrip()
            for name, tensor in self.tensors.items()
        )

    @property
    def kinds(self) -> dict[str, Kind]:
        """Dtype and number of dimensions of each tensor, by name."""
        return {name: (tensor.dtype, tensor.dim()) for name, tensor in self.tensors.items()}

    def unlike(self, example: Mapping[str, Kind]) -> str:
        """Say in what the tensors are of other kinds than those of an example; ``""`` where they are not.

        >>> inputs = name_inputs(("x",), (torch.zeros(2, 3),), {"maks": torch.ones(2)})
        >>> inputs.unlike({"x": (torch.float64, 2), "mask": (torch.bool, 1)})
        'x is float32 (float64 in the example), maks is not in the example, mask of the example is not here'
        """
        own = self.kinds
        said = [
            f"{name} {_other_kind(own[name], kind)}" for name, kind in example.items() if own.get(name, kind) != kind
        ]
        said += [f"{name} is not in the example" for name in own if name not in example]
        return ", ".join(said + [f"{name} of the example is not here" for name in example if name not in own])

    def check_values(self) -> None:
        """Refuse tensors without values.

        Raises:
            CaptureError: Names them.
        """
        empty = [name for name, tensor in self.tensors.items() if tensor.is_meta or isinstance(tensor, FakeTensor)]
        if empty:
            raise CaptureError(
                f"{', '.join(empty)} of the batch {'has' if len(empty) == 1 else 'have'} no values, on the meta "
                "device or fake\n  only compile takes such tensors; pass real ones, on the CPU or on the stages' device"
            )

    def with_tensors(
        self, tensors: Mapping[str, torch.Tensor], numbers: Mapping[str, Any] | None = None
    ) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
        """Give positional arguments, keyword arguments and target with other tensors and numbers in their places."""
        names, of_numbers = iter(self.tensors), iter(self.numbers)

        def replace(_: str, leaf: Any) -> Any:
            if isinstance(leaf, torch.Tensor):
                return tensors[next(names)]
            return numbers[next(of_numbers)] if numbers and type(leaf) in _NUMBERS else leaf

        args, kwargs, target = (map_tree(replace, part) for part in (self.args, dict(self.kwargs), self.target))
        return args, kwargs, target

    def without_values(self) -> Inputs:
        """Give the same with tensors that have no memory."""
        tensors = {name: tensor.to("meta") for name, tensor in self.tensors.items()}
        args, kwargs, target = self.with_tensors(tensors)
        return replace(self, args=args, kwargs=kwargs, target=target, tensors=tensors)

    def doubled(self) -> Inputs | None:
        """Give twice the samples, each of them again; None where no tensor has a dimension of samples."""
        return self.repeated(2)

    def repeated(self, times: int) -> Inputs | None:
        """Give the samples several times; None where no tensor has a dimension of samples."""
        if not self.dims:
            return None
        tensors = {
            name: torch.cat([tensor] * times, self.dims[name]) if name in self.dims else tensor
            for name, tensor in self.tensors.items()
        }
        args, kwargs, target = self.with_tensors(tensors)
        return replace(self, args=args, kwargs=kwargs, target=target, tensors=tensors, samples=times * self.samples)


_NUMBERS = (int, float)


def _other_kind(own: Kind, example: Kind) -> str:
    (dtype, dim), (other, dims) = own, example
    if dtype != other:
        return f"is {str(dtype).removeprefix('torch.')} ({str(other).removeprefix('torch.')} in the example)"
    return f"has {dim} dimensions ({dims} in the example)"


def _without_sizes(signature: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(
        (name, tuple(size if size < 2 else None for size in rest[0]), rest[1], bool(rest[2]))
        if len(rest) == 3
        else (name, *rest)
        for name, *rest in signature
    )


def parameter_names(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Give the names of the positional parameters of a forward; those of ``*args`` have none.

    >>> parameter_names(lambda ids, mask=None, *rest, labels=None: ids)
    ('ids', 'mask')
    """
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    try:
        parameters = inspect.signature(forward).parameters.values()
    except (TypeError, ValueError):
        return ()
    return tuple(parameter.name for parameter in parameters if parameter.kind in kinds)


def name_inputs(
    names: Sequence[str],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    target: Any = None,
    layout: BatchLayout | None = None,
) -> Inputs:
    """Name every tensor of a microbatch.

    Args:
        names: Names of the model's positional parameters.
        args: Positional arguments.
        kwargs: Keyword arguments.
        target: What the loss function compares with.
        layout: Where its samples lie.

    Returns:
        The tensors by name, and the signature.

    Raises:
        CaptureError: An input is a numpy array, which would be taken for a constant, a tensor of a kind that cannot
            be recorded, or one that takes a gradient.

    >>> inputs = name_inputs(("x",), (torch.zeros(2, 3),), {"options": {"mask": torch.ones(2), "scale": 2}})
    >>> inputs.described()
    ('x float32[2, 3]', 'options_mask float32[2]')
    """
    tensors: dict[str, torch.Tensor] = {}
    signature: list[Any] = []
    paths: dict[str, str] = {}
    numbers: list[tuple[str, float]] = []

    def take(path: str, leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            _check_input(path, leaf)
            name = _identifier(path, tensors)
            tensors[name] = leaf
            paths[name] = path
            strides = () if leaf.is_contiguous() else tuple(leaf.stride())
            signature.append((name, tuple(leaf.shape), leaf.dtype, strides))
        else:
            if type(leaf) in _NUMBERS:
                numbers.append((path, leaf))
            signature.append((path, _comparable(path, leaf)))
        return leaf

    for place, value in enumerate(args):
        map_tree(take, value, names[place] if place < len(names) else f"args[{place}]")
    for name, value in kwargs.items():
        map_tree(take, value, name)
    if target is not None:
        map_tree(take, target, "target")
    layout = layout or BatchLayout(1, {})
    dims = {name: layout.dims[path] for name, path in paths.items() if path in layout.dims}
    said = {name: layout.said[path] for name, path in paths.items() if path in layout.said}
    unclear = frozenset(name for name, path in paths.items() if path in layout.unclear)
    places = {path for path, _ in numbers}
    any_number = tuple((each[0], each[1][0]) if each[0] in places else each for each in signature)
    about = layout.size, dims, said, unclear, _named_numbers(numbers, tensors), any_number
    return Inputs(tuple(args), kwargs, target, tensors, tuple(signature), *about)


def name_parts(names: Sequence[str], parts: Sequence[Microbatch], layouts: Sequence[BatchLayout]) -> tuple[Inputs, ...]:
    """Name the tensors of all microbatches of a step; those of one layout were cut from one batch.

    Args:
        names: As in ``name_inputs``.
        parts: Positional arguments, keyword arguments and target of each, at least one.
        layouts: Where the samples of each lie; the same object where only the values of tensors differ.

    >>> halves = [((torch.zeros(1, 3),), {"scale": 2}, None)] * 2
    >>> one, other = name_parts(("x",), halves, [BatchLayout(1, {"x": 0})] * 2)
    >>> one.signature is other.signature, list(other.tensors), other.numbers
    (True, ['x'], {'scale': 2})
    """
    first = name_inputs(names, *parts[0], layouts[0])
    is_cut = all(layout is layouts[0] for layout in layouts)
    if not is_cut or not all(isinstance(leaf, torch.Tensor) or _is_plain(leaf) for leaf in _leaves(*parts[0])):
        others = zip(parts[1:], layouts[1:], strict=True)
        return (first, *(name_inputs(names, *part, layout) for part, layout in others))
    found = [first]
    for args, kwargs, target in parts[1:]:
        leaves = [leaf for leaf in _leaves(args, kwargs, target) if isinstance(leaf, torch.Tensor)]
        tensors = dict(zip(first.tensors, leaves, strict=True))
        same = first.samples, first.dims, first.said, first.unclear, first.numbers, first.open
        found.append(Inputs(tuple(args), kwargs, target, tensors, first.signature, *same))
    return tuple(found)


def _leaves(args: Sequence[Any], kwargs: Mapping[str, Any], target: Any) -> list[Any]:
    """List what a microbatch is made of, in the order in which it is named."""
    found: list[Any] = []
    for value in (*args, *kwargs.values(), target):
        if isinstance(value, torch.Tensor):
            found.append(value)
        else:
            found += [leaf for _, leaf in tree_leaves(value)]
    return found


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | complex | str | bytes)


def _named_numbers(numbers: Sequence[tuple[str, float]], taken: Mapping[str, Any]) -> dict[str, float]:
    named: dict[str, float] = {}
    for path, value in numbers:
        named[_identifier(path, {**taken, **named})] = value
    return named


def _check_input(path: str, tensor: torch.Tensor) -> None:
    kind = type(tensor)
    known = kind in (torch.Tensor, nn.Parameter, nn.Buffer) or isinstance(tensor, FakeTensor)
    if not known or tensor.layout != torch.strided:
        raise CaptureError(
            f"input {path} is a {kind.__module__}.{kind.__qualname__} of layout {tensor.layout}, which cannot be "
            "captured\n  pass plain dense tensors and make the others of them in the forward"
        )
    if tensor.requires_grad:
        raise CaptureError(
            f"input {path} takes a gradient, which a pipeline does not return\n"
            "  pass it detached, or make it a parameter of the model"
        )


def _identifier(path: str, taken: Mapping[str, Any]) -> str:
    """Turn a path into a name; most are one already."""
    name = path if path.isidentifier() else re.sub(r"\W+", "_", path).strip("_")
    if keyword.iskeyword(name) or not name.isidentifier():
        name = f"input_{name}"
    while name in taken:
        name += "_"
    return name


def _comparable(path: str, value: Any) -> Any:
    if isinstance(value, np.ndarray):
        raise CaptureError(
            f"input {path} is a numpy array: its values would become part of the graph\n  pass torch.from_numpy({path})"
        )
    if _is_plain(value):
        return (type(value).__qualname__, value)
    try:
        spelled = spell(value, path)
    except SpecError:
        spelled = ("some",)
    if _is_partial(spelled):  # what it holds cannot be compared: it shares a graph with no other, nor with itself later
        return (type(value).__qualname__, next(_OTHERS))
    return digest(spelled)


_OTHERS = itertools.count()


def _is_partial(spelled: Any) -> bool:
    """Whether something that a function closes over is spelled by its class alone."""
    return isinstance(spelled, tuple) and (spelled[:1] == ("some",) or any(map(_is_partial, spelled)))
