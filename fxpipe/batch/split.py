"""A batch into microbatches: views of every tensor along its dimension of samples, no copies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from fxpipe.batch.dims import WHOLE, BatchDims, BatchLayout, Microbatch
from fxpipe.errors import ScheduleError
from fxpipe.ir.tree import map_tree

_ANY = BatchDims()


def batch_size_of(args: Sequence[Any], kwargs: Mapping[str, Any], target: Any = None, dims: BatchDims = _ANY) -> int:
    """Give the number of samples of a batch: dimension 0 of its first tensor that has dimensions.

    Args:
        args: Positional arguments of the model.
        kwargs: Keyword arguments of the model.
        target: What ``loss_fn`` compares with, if anything.
        dims: Where samples lie otherwise.

    Returns:
        The number of samples; 1 if there is no such tensor.

    >>> import torch
    >>> batch_size_of((torch.zeros(8, 3),), {"mask": torch.zeros(8)})
    8
    >>> batch_size_of((torch.zeros(8, 3),), {}, None, BatchDims.of(("x",), {"x": 1}))
    3
    """
    return dims.layout((tuple(args), dict(kwargs), target), split=False).size


def split_batch(
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    target: Any = None,
    *,
    num_microbatches: int,
    batch_size: int | None = None,
    dims: BatchDims = _ANY,
) -> list[Microbatch]:
    """Cut a batch into equal microbatches of consecutive samples.

    Tensors are cut along their dimension of samples, wherever they lie in lists, tuples, dictionaries and dataclasses.
    Tensors without dimensions or with one row, and Python values, go to every microbatch.

    Args:
        args: Positional arguments of the model.
        kwargs: Keyword arguments of the model.
        target: What ``loss_fn`` compares with; split like an argument.
        num_microbatches: ``M``; divides the batch size.
        batch_size: Samples of the batch; None takes ``batch_size_of``.
        dims: Where samples lie; dimension 0 where it says nothing.

    Returns:
        ``M`` triples of positional arguments, keyword arguments and target; their tensors are views.

    Raises:
        ScheduleError: The batch does not divide by ``M``, or a tensor has neither the batch's size nor 1 in
            dimension 0; it is named.

    >>> import torch
    >>> ids = torch.arange(6).reshape(3, 2)
    >>> [kwargs["ids"].tolist() for _, kwargs, _ in split_batch((), {"ids": ids}, num_microbatches=3)]
    [[[0, 1]], [[2, 3]], [[4, 5]]]
    """
    whole = (tuple(args), dict(kwargs), target)
    layout = dims.layout(whole, batch_size, split=num_microbatches > 1)
    return cut(whole, layout, num_microbatches, dims)


def cut(whole: Microbatch, layout: BatchLayout, num_microbatches: int, dims: BatchDims = _ANY) -> list[Microbatch]:
    """Cut a batch whose layout is known; see ``split_batch``."""
    size = layout.size
    if num_microbatches < 1 or size % num_microbatches:
        raise ScheduleError(
            f"a batch of {size} is not divisible into {num_microbatches} microbatches\n"
            f"  use a number that divides {size}, or pass ready-split ones as step(microbatches=[...])"
        )
    if num_microbatches == 1:
        return [whole]
    args, kwargs, _ = whole
    columns = [_parts(path, value, layout, num_microbatches) for path, value in dims.values(whole)]
    return [
        (tuple(row[: len(args)]), dict(zip(kwargs, row[len(args) :], strict=False)), row[-1])
        for row in zip(*columns, strict=True)
    ]


def _parts(path: str, value: Any, layout: BatchLayout, number: int) -> list[Any]:
    """Cut one argument, a tensor or a container of tensors."""
    rows = layout.size // number
    if isinstance(value, torch.Tensor):
        at = layout.dims.get(path)
        return [value] * number if at is None else list(torch.split(value, rows, at))

    def view(index: int, path: str, leaf: Any) -> Any:
        at = layout.dims.get(path)
        return leaf if at is None else leaf.narrow(at, index * rows, rows)

    return [map_tree(partial(view, index), value, path, WHOLE) for index in range(number)]


def check_ready_split(microbatches: Sequence[Microbatch], dims: BatchDims = _ANY) -> tuple[int, ...]:
    """Give the number of samples of each ready-split microbatch.

    Args:
        microbatches: Triples of positional arguments, keyword arguments and target; they may differ in shape.
        dims: Where samples lie.

    Returns:
        Samples of each.

    Raises:
        ScheduleError: There is none, or one has no samples, or tensors of one have other numbers of them.

    >>> import torch
    >>> check_ready_split([((torch.zeros(3, 2),), {}, None), ((torch.zeros(1, 2),), {}, None)])
    (3, 1)
    """
    if not microbatches:
        raise ScheduleError("step got no microbatches\n  pass at least one in microbatches=[...]")
    layouts = [dims.layout(microbatch, split=False) for microbatch in microbatches]
    for index, layout in enumerate(layouts):
        if layout.size < 1:
            raise ScheduleError(f"microbatch {index} has no samples\n  leave it out of microbatches=[...]")
        dims.refuse_unlike(layout, index)
    return tuple(layout.size for layout in layouts)
