"""Outputs of microbatches put together as the batch's, along their dimensions of samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fxpipe.errors import ScheduleError
from fxpipe.ir.tree import map_tree, tree_leaves


def merge_outputs(outputs: Sequence[Any], sizes: Sequence[int], dims: Mapping[str, int | None] | None = None) -> Any:
    """Put the outputs of the microbatches together as the output of the batch.

    Tensors whose rows belong to samples are concatenated along the batch dimension; what is equal in all microbatches
    is given once. Nothing is averaged.

    Args:
        outputs: What the model returned for each microbatch; all of one structure.
        sizes: Samples of each microbatch.
        dims: The dimension of samples of each tensor by path (``"output['logits']"``), None for one without; left out,
            it is guessed from the shapes.

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
        [
            _merge_leaf(name, [column[row][1] for column in columns], sizes, dims)
            for row, (name, _) in enumerate(columns[0])
        ]
    )
    return map_tree(lambda _name, _leaf: next(merged), outputs[0], "output")


def _merge_leaf(name: str, parts: list[Any], sizes: Sequence[int], dims: Mapping[str, int | None] | None) -> Any:
    first = parts[0]
    if isinstance(first, torch.Tensor):
        known = dims is not None and name in dims
        axis = dims[name] if dims is not None and known else _batch_axis(parts, sizes)
        if axis is not None and (known or not (_rows_per_sample(parts, sizes, axis) != 1 and _all_equal(parts))):
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


def few_samples(size: int, num_microbatches: int) -> tuple[int, int]:
    """Choose on how many samples to try whether they depend on each other, and in how many parts to cut those.

    Parts of one sample only where the microbatches have no more: modules may refuse those, or take them another way.

    >>> few_samples(64, 8), few_samples(8, 8), few_samples(9, 3), few_samples(18, 3)
    ((4, 2), (2, 2), (9, 3), (6, 2))
    """
    rows = size // num_microbatches
    if rows > 1 and size % 4 == 0:
        return 4, 2
    if rows > 2 and rows % 2 == 0:
        return rows, 2
    parts = next(count for count in range(2, num_microbatches + 1) if num_microbatches % count == 0)
    return parts * rows, parts


def differ(outputs: Sequence[Any]) -> bool:
    """Whether some output of one microbatch is not that of another."""
    columns = zip(*(tree_leaves(output) for output in outputs), strict=False)
    return any(
        not _all_equal([leaf for _, leaf in column]) for column in columns if isinstance(column[0][1], torch.Tensor)
    )
