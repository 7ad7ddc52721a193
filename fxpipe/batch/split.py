"""A batch into microbatches and back: views of every tensor that carries the batch dimension, no copies."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch

from fxpipe.errors import ScheduleError
from fxpipe.ir.tree import map_tree, tree_leaves

Microbatch: TypeAlias = tuple[tuple[Any, ...], dict[str, Any], Any]
"""Positional arguments, keyword arguments and target of one microbatch."""


def batch_size_of(args: Sequence[Any], kwargs: Mapping[str, Any], target: Any = None) -> int:
    """Give the number of samples of a batch: dimension 0 of its first tensor that has dimensions.

    Args:
        args: Positional arguments of the model.
        kwargs: Keyword arguments of the model.
        target: What ``loss_fn`` compares with, if anything.

    Returns:
        The number of samples; 1 if there is no such tensor.

    >>> batch_size_of((torch.zeros(8, 3),), {"mask": torch.zeros(8)})
    8
    """
    for _, leaf in _leaves(args, kwargs, target):
        if isinstance(leaf, torch.Tensor) and leaf.dim() > 0:
            return int(leaf.shape[0])
    return 1


def split_batch(
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    target: Any = None,
    *,
    num_microbatches: int,
    batch_size: int | None = None,
) -> list[Microbatch]:
    """Cut a batch into equal microbatches of consecutive samples.

    Tensors whose dimension 0 is the batch size are cut, wherever they lie in lists, tuples, dictionaries and
    dataclasses. Tensors without dimensions or with one row, and Python values, go to every microbatch.

    Args:
        args: Positional arguments of the model.
        kwargs: Keyword arguments of the model.
        target: What ``loss_fn`` compares with; split like an argument.
        num_microbatches: ``M``; divides the batch size.
        batch_size: Samples of the batch; None takes ``batch_size_of``.

    Returns:
        ``M`` triples of positional arguments, keyword arguments and target; their tensors are views.

    Raises:
        ScheduleError: The batch does not divide by ``M``, or a tensor has neither the batch's size nor 1 in
            dimension 0; it is named.

    >>> ids = torch.arange(6).reshape(3, 2)
    >>> [kwargs["ids"].tolist() for _, kwargs, _ in split_batch((), {"ids": ids}, num_microbatches=3)]
    [[[0, 1]], [[2, 3]], [[4, 5]]]
    """
    size = batch_size_of(args, kwargs, target) if batch_size is None else batch_size
    if num_microbatches < 1 or size % num_microbatches:
        raise ScheduleError(
            f"a batch of {size} is not divisible into {num_microbatches} microbatches\n"
            f"  use a number that divides {size}, or pass ready-split ones as step(microbatches=[...])"
        )
    whole = (tuple(args), dict(kwargs), target)
    if num_microbatches == 1:
        return [whole]
    _check_rows(whole, size)
    rows = size // num_microbatches
    return [_cut(whole, size, index * rows, rows) for index in range(num_microbatches)]


def check_microbatches(microbatches: Sequence[Microbatch]) -> tuple[int, ...]:
    """Give the number of samples of each ready-split microbatch.

    Args:
        microbatches: Triples of positional arguments, keyword arguments and target; they may differ in shape.

    Returns:
        Samples of each.

    Raises:
        ScheduleError: There is none, or one has no samples.

    >>> check_microbatches([((torch.zeros(3, 2),), {}, None), ((torch.zeros(1, 2),), {}, None)])
    (3, 1)
    """
    if not microbatches:
        raise ScheduleError("step got no microbatches\n  pass at least one in microbatches=[...]")
    sizes = tuple(batch_size_of(*microbatch) for microbatch in microbatches)
    for index, size in enumerate(sizes):
        if size < 1:
            raise ScheduleError(f"microbatch {index} has no samples\n  leave it out of microbatches=[...]")
    return sizes


def merge_outputs(outputs: Sequence[Any], sizes: Sequence[int]) -> Any:
    """Put the outputs of the microbatches together as the output of the batch.

    Tensors whose rows belong to samples are concatenated along the batch dimension; what is equal in all microbatches
    is given once. Nothing is averaged.

    Args:
        outputs: What the model returned for each microbatch; all of one structure.
        sizes: Samples of each microbatch.

    Returns:
        One output of the same structure.

    Raises:
        ScheduleError: The structures differ, or something without a batch dimension (a mean loss) differs between
            microbatches; it is named.

    >>> merge_outputs([{"y": torch.tensor([1, 2])}, {"y": torch.tensor([3])}], sizes=(2, 1))
    {'y': tensor([1, 2, 3])}
    """
    if len(outputs) == 1:
        return outputs[0]
    columns = [list(tree_leaves(output, "output")) for output in outputs]
    names = [[name for name, _ in column] for column in columns]
    for index, found in enumerate(names):
        if found != names[0]:
            different = sorted(set(found) ^ set(names[0]))
            raise ScheduleError(
                f"microbatch {index} returned another structure than microbatch 0: {', '.join(different)}\n"
                f"  call infer with a batch that needs one microbatch"
            )
    merged = iter(
        [_merge_leaf(name, [column[row][1] for column in columns], sizes) for row, (name, _) in enumerate(columns[0])]
    )
    return map_tree(lambda _name, _leaf: next(merged), outputs[0], "output")


def _map(
    function: Callable[[str, Any], Any], args: Sequence[Any], kwargs: Mapping[str, Any], target: Any
) -> Microbatch:
    """Rebuild a batch around other leaves; a keyword argument goes by its bare name."""
    return (
        tuple(map_tree(function, value, f"args[{index}]") for index, value in enumerate(args)),
        {name: map_tree(function, value, name) for name, value in kwargs.items()},
        map_tree(function, target, "target"),
    )


def _leaves(args: Sequence[Any], kwargs: Mapping[str, Any], target: Any) -> Iterator[tuple[str, Any]]:
    for index, value in enumerate(args):
        yield from tree_leaves(value, f"args[{index}]")
    for name, value in kwargs.items():
        yield from tree_leaves(value, name)
    yield from tree_leaves(target, "target")


def _cut(whole: Microbatch, size: int, start: int, rows: int) -> Microbatch:
    def view(_: str, leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor) and leaf.dim() > 0 and leaf.shape[0] == size and size > 1:
            return leaf.narrow(0, start, rows)
        return leaf

    return _map(view, *whole)


def _check_rows(whole: Microbatch, size: int) -> None:
    """Gather everything that can be neither cut nor repeated, then speak once."""
    faults = []
    for name, leaf in _leaves(*whole):
        if isinstance(leaf, torch.Tensor):
            if leaf.dim() > 0 and leaf.shape[0] not in (size, 1):
                faults.append(f"{name} of shape {list(leaf.shape)}")
        elif type(leaf).__module__ == "numpy" and getattr(leaf, "ndim", 0) > 0:
            faults.append(f"{name}, a numpy array")
    if faults:
        raise ScheduleError(
            f"cannot split {'; '.join(faults)}: the batch has {size} samples, and a tensor's dimension 0 must be "
            f"{size} (split) or 1 (repeated)\n"
            f"  give it the batch dimension, or pass ready-split inputs as step(microbatches=[...])"
        )


def _merge_leaf(name: str, parts: list[Any], sizes: Sequence[int]) -> Any:
    first = parts[0]
    if isinstance(first, torch.Tensor):
        axis = _batch_axis(parts, sizes)
        if axis is not None and not (_rows_per_sample(parts, sizes, axis) != 1 and _all_equal(parts)):
            return torch.cat(parts, dim=axis)
        if _all_equal(parts):
            return first
        raise ScheduleError(
            f"{name} of shape {list(first.shape)} has no batch dimension and differs between the {len(parts)} "
            f"microbatches\n  leave out what makes it (labels, for a loss), or call infer with one microbatch"
        )
    if all(part is first or _equal(part, first) for part in parts[1:]):
        return first
    raise ScheduleError(
        f"{name}, a {type(first).__name__}, differs between the {len(parts)} microbatches and cannot be concatenated\n"
        f"  switch it off in the model (use_cache=False, for a cache), or call infer with one microbatch"
    )


def _batch_axis(parts: list[torch.Tensor], sizes: Sequence[int]) -> int | None:
    """Find the dimension that grows with the samples: 0 if it can be, else the only one that has the right size."""
    dims = parts[0].dim()
    if any(part.dim() != dims for part in parts):
        return None
    fitting = [axis for axis in range(dims) if _joins_along(parts, axis)]
    if 0 in fitting and _rows_per_sample(parts, sizes, 0):
        return 0
    exact = [axis for axis in fitting if _rows_per_sample(parts, sizes, axis) == 1]
    return exact[0] if len(exact) == 1 else None


def _joins_along(parts: list[torch.Tensor], axis: int) -> bool:
    rest = [part.shape[:axis] + part.shape[axis + 1 :] for part in parts]
    return all(shape == rest[0] for shape in rest)


def _rows_per_sample(parts: list[torch.Tensor], sizes: Sequence[int], axis: int) -> int:
    """Give the whole number of rows per sample (tokens, say), the same in all microbatches, or 0."""
    rows, rest = divmod(int(parts[0].shape[axis]), sizes[0])
    if rest or any(part.shape[axis] != rows * size for part, size in zip(parts, sizes, strict=True)):
        return 0
    return rows


def _all_equal(parts: list[torch.Tensor]) -> bool:
    first = parts[0]
    return all(part.shape == first.shape and torch.equal(part, first) for part in parts[1:])


def _equal(left: Any, right: Any) -> bool:
    try:
        return bool(left == right)
    except (RuntimeError, ValueError, TypeError):
        return False
