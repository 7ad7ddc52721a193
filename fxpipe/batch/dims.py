"""Which dimension of which tensor counts the samples of a batch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from torch.nn.utils.rnn import PackedSequence

from fxpipe.errors import ScheduleError
from fxpipe.ir.tree import tree_leaves

Microbatch: TypeAlias = tuple[tuple[Any, ...], dict[str, Any], Any]
"""Positional arguments, keyword arguments and target of one microbatch."""
WHOLE = (PackedSequence,)
"""Containers that are not split: the data of these have their samples in another order."""


@dataclass(frozen=True, slots=True)
class BatchLayout:
    """Where the samples of one batch lie.

    Attributes:
        size: Number of samples.
        dims: The dimension of samples of each tensor that is split, by path; the others go to every microbatch whole.
        whole: Paths of the tensors with dimensions that every microbatch gets whole.
        unclear: What is wrong with tensors whose samples cannot be told, by path.
        said: What the report says of tensors of which something else could have been taken, by path.
    """

    size: int
    dims: Mapping[str, int]
    whole: tuple[str, ...] = ()
    unclear: Mapping[str, str] = field(default_factory=dict)
    said: Mapping[str, str] = field(default_factory=dict)

    def check_clear(self) -> None:
        """Refuse to split a batch of which something is unclear.

        Raises:
            ScheduleError: Names all of it.
        """
        if self.unclear:
            named = "; ".join(self.unclear.values())
            raise ScheduleError(
                f"cannot split {named}: the batch has {self.size} samples, and a tensor's dimension 0 must be "
                f"{self.size} (split) or 1 (repeated)\n"
                "  say where the samples lie, batch_dims={'name': dimension} (None: not split) on fxpipe.compile, or "
                "pass ready-split inputs as step(microbatches=[...])"
            )


@dataclass(frozen=True, slots=True)
class BatchDims:
    """How samples are found in a batch: what the user says, what the example showed, else dimension 0.

    Attributes:
        names: Names of the model's positional parameters.
        given: The user's ``batch_dims``: dimension (or None: not split) by dotted path.
        first: Paths of the tensors that were split in the example, in order: the first one there counts samples.
    """

    names: tuple[str, ...] = ()
    given: tuple[tuple[str, int | None], ...] = ()
    first: tuple[str, ...] = ()

    @classmethod
    def of(cls, names: Sequence[str], batch_dims: Mapping[str, int | None] | None) -> BatchDims:
        """Take what the user says.

        Raises:
            ScheduleError: It is no mapping of names to dimensions.

        >>> BatchDims.of(("x",), {"x": 1, "tables.positions": None}).given
        (('x', 1), ('tables.positions', None))
        """
        if batch_dims is not None and not isinstance(batch_dims, Mapping):
            raise ScheduleError(
                f"batch_dims is a {type(batch_dims).__name__}\n"
                "  pass the dimension of samples by argument name: batch_dims={'x': 1, 'table': None}"
            )
        for path, dim in (batch_dims or {}).items():
            whole = isinstance(dim, int) and not isinstance(dim, bool)
            if not isinstance(path, str) or not (dim is None or whole):
                raise ScheduleError(
                    f"batch_dims says {dim!r} for {path!r}\n"
                    "  name an argument (or a path: 'batch.mask'), and its dimension of samples, or None for no such"
                )
        return cls(tuple(names), tuple((dotted(path), dim) for path, dim in (batch_dims or {}).items()))

    def learned(self, layout: BatchLayout) -> BatchDims:
        """Remember which tensors the example split: they say how many samples other batches have."""
        return replace(self, first=tuple(layout.dims))

    def check_known(self, batch: Microbatch) -> None:
        """Refuse names that the example does not have.

        Raises:
            ScheduleError: Names them, and the known ones.
        """
        paths = [path for path, _ in self.leaves(batch)]
        unknown = [path for path, _ in self.given if not any(_lies_in(leaf, path) for leaf in paths)]
        if unknown:
            raise ScheduleError(
                f"batch_dims names {', '.join(unknown)}, which the example does not have\n"
                f"  its inputs are {', '.join(dotted(path) for path in paths) or 'none'}"
            )

    def leaves(self, batch: Microbatch) -> list[tuple[str, Any]]:
        """List every leaf of a batch with its path; packed sequences and nested tensors are leaves."""
        return [leaf for path, value in self.values(batch) for leaf in tree_leaves(value, path, WHOLE)]

    def values(self, batch: Microbatch) -> list[tuple[str, Any]]:
        """List arguments, keyword arguments and target by path; no two have one, whatever the model calls its own."""
        args, kwargs, target = batch
        paths = [self.path(index) for index in range(len(args))]
        place = "loss_fn.target" if "target" in kwargs or "target" in paths else "target"
        return [*zip(paths, args, strict=True), *kwargs.items(), (place, target)]

    def path(self, index: int) -> str:
        """Give the path of a positional argument: its name, or ``args[2]``."""
        return self.names[index] if index < len(self.names) else f"args[{index}]"

    def layout(self, batch: Microbatch, size: int | None = None, *, split: bool = True) -> BatchLayout:
        """Find the samples of a batch.

        Args:
            batch: Positional arguments, keyword arguments and target.
            size: Number of samples; None finds it.
            split: Whether the batch is to be split: then everything in it must be splittable or whole.

        Raises:
            ScheduleError: Tensors disagree about the number of samples, or cannot be split; all are named.
        """
        leaves = [(path, leaf, *self._said(path)) for path, leaf in self.leaves(batch)]
        size = self._size(leaves) if size is None else size
        dims: dict[str, int] = {}
        whole: list[str] = []
        faults: dict[str, str] = {}
        for path, leaf, said, dim in leaves:
            if isinstance(leaf, torch.Tensor):
                found, fault = _found(path, leaf, said, dim, size)
                if fault:
                    faults[path] = fault
                elif found is not None:
                    dims[path] = found
                elif leaf.dim():
                    whole.append(path)
            elif isinstance(leaf, PackedSequence):
                faults[path] = f"{path}, a PackedSequence (pad it, and pack it in the forward)"
            elif isinstance(leaf, np.ndarray) and leaf.ndim > 0:
                faults[path] = f"{path}, a numpy array"
        layout = BatchLayout(size, dims, tuple(whole), faults)
        if split:
            layout.check_clear()
        return layout

    def doubts(self, batch: Microbatch, layout: BatchLayout, num_microbatches: int) -> dict[str, str]:
        """Say what was taken where it could have been something else, by path.

        That is: what the user says; a tensor of which another dimension has the batch's size too; a batch in which
        the second dimension of every tensor is of one size that divides as well; a tensor that is not split.

        >>> dims, x = BatchDims(("x",)), torch.zeros(8, 4, 6)
        >>> dims.doubts(((x,), {}, None), dims.layout(((x,), {}, None)), 4)
        {'x': 'split along 0'}
        """
        tensors = {path: leaf for path, leaf in self.leaves(batch) if isinstance(leaf, torch.Tensor) and leaf.dim()}
        seconds = {leaf.shape[1] if leaf.dim() > 1 else 0 for path, leaf in tensors.items() if path in layout.dims}
        either = len(seconds) == 1 and min(seconds) > 1 and min(seconds) % num_microbatches == 0
        found: dict[str, str] = {}
        for path, leaf in tensors.items():
            dim = layout.dims.get(path)
            square = sum(size == layout.size for size in leaf.shape) > 1
            if dim is None:
                found[path] = "whole"
            elif square or either or self._said(path)[0]:
                found[path] = f"split along {dim}"
        return found

    def refuse_unlike(self, layout: BatchLayout, index: int) -> None:
        """Refuse a ready-split microbatch that holds other numbers of samples in what counts them.

        That is what the user says has samples, and what the example split.

        Raises:
            ScheduleError: Names what differs.
        """
        wrong = [fault for path, fault in layout.unclear.items() if path in self.first or self._said(path)[0]]
        if wrong:
            raise ScheduleError(
                f"microbatch {index} has {layout.size} samples, but holds {'; '.join(wrong)}\n"
                "  give all as many samples, or say which are none: batch_dims={'name': None} on fxpipe.compile"
            )

    def _said(self, path: str) -> tuple[bool, int | None]:
        """Whether the user says something of a tensor, and what: the longest path that fits."""
        if not self.given:
            return False, None
        fitting = [(len(given), dim) for given, dim in self.given if _lies_in(path, given)]
        return (True, max(fitting, key=lambda each: each[0])[1]) if fitting else (False, None)

    def _size(self, leaves: Sequence[tuple[str, Any, bool, int | None]]) -> int:
        """Give the number of samples: of what the user names, of what the example split first, of the first tensor."""
        for _, leaf, _, dim in leaves:
            if dim is not None and isinstance(leaf, torch.Tensor) and -leaf.dim() <= dim < leaf.dim():
                return int(leaf.shape[dim])
        unsaid = {path: leaf for path, leaf, said, _ in leaves if not said}
        ordered = [*(path for path in self.first if path in unsaid), *unsaid]
        for path in ordered:
            leaf = unsaid[path]
            if isinstance(leaf, PackedSequence):
                return int(leaf.batch_sizes[0])
            if isinstance(leaf, torch.Tensor) and leaf.dim() > 0:
                return int(leaf.size(0))
        return 1


def _found(path: str, tensor: torch.Tensor, said: bool, dim: int | None, size: int) -> tuple[int | None, str]:
    """Give the dimension of samples of one tensor, or what is wrong with it."""
    if tensor.is_nested:
        return None, f"{path}, a nested tensor (pad it, and nest it in the forward)"
    if tensor.layout != torch.strided and (dim is not None or not said):
        return None, f"{path} of layout {tensor.layout} (pass it dense, and make it sparse in the forward)"
    if not said and tensor.dim() and tensor.shape[0] == size:
        return 0, ""
    shape = list(tensor.shape)
    if said:
        if dim is None:
            return None, ""
        if not -tensor.dim() <= dim < tensor.dim():
            return None, f"{path} of shape {shape}, which has no dimension {dim}"
        if tensor.shape[dim] != size:
            return None, f"{path} of shape {shape} along dimension {dim}"
        return dim % tensor.dim(), ""
    if tensor.dim() and tensor.shape[0] != 1:
        return None, f"{path} of shape {shape}"
    return None, ""


def dotted(path: str) -> str:
    """Give a path the form that users write.

    >>> dotted("batch['ids'][0].mask")
    'batch.ids.0.mask'
    """
    return re.sub(r"\[['\"]?([^\]'\"]*)['\"]?\]", r".\1", path)


def _lies_in(path: str, given: str) -> bool:
    leaf = dotted(path)
    return leaf == given or leaf.startswith(f"{given}.")
