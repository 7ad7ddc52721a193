"""Integers, booleans and constants stay real during capture: Python that looks at them sees what eager sees."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from fxpipe._torch import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    storage_key,
    without_modes,
)
from fxpipe.capture.calls.forms import SHAPED_LIKE, targets_of, versions_of
from fxpipe.capture.calls.reads import READS, shape_depends_on_values
from fxpipe.capture.calls.values import tensors_in
from fxpipe.capture.calls.watch import RANDOM, Watch

UNKNOWN_VALUES = (DataDependentOutputException, DynamicOutputShapeException)
"""What a call raises that needs values which are not known."""
LARGEST = 1 << 22
"""Elements of the largest tensor kept real."""
BUDGET = 1 << 26
"""Elements of all tensors kept real in one capture; beyond it new ones are fake."""

FACTORIES = frozenset(
    {
        *("empty", "arange", "zeros", "ones", "full", "tensor", "linspace", "logspace", "eye", "as_tensor", "asarray"),
        *("range", "scalar_tensor", "tril_indices", "triu_indices", "meshgrid", "cartesian_prod", "combinations"),
    }
)
_EXACT = frozenset(
    {
        *("eq", "ne", "lt", "le", "gt", "ge", "__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__"),
        *("not_equal", "less", "less_equal", "greater", "greater_equal", "logical_not", "isnan", "isfinite", "isinf"),
        *("bool", "to", "type", "float", "double", "detach", "clone", "contiguous", "__getitem__", "narrow", "select"),
        *("view", "reshape", "flatten", "squeeze", "unsqueeze", "expand", "transpose", "permute"),
    }
)
"""What gives the same bits of floats on every device, so that a mask may be known: comparing and arranging them.

Arithmetic does not: where it rounds differently, the stage would select other elements than were counted.
"""
_AS_OTHERS = frozenset({"expand_as", "view_as", "reshape_as"})


class RealValues:
    """Runs torch calls, for real where all their tensors are real and small, else with fake tensors.

    A real tensor that a fake one is written into, and all that is made of it, keeps its shape and its memory but no
    longer has the values that it would have: Python must not look at them.

    Args:
        watch: Sees the calls that run for real, too.
        floats: Fake inputs of floating point with their values: what compares them is a mask, and real.
    """

    def __init__(self, watch: Watch, floats: Iterable[tuple[torch.Tensor, torch.Tensor]] = ()) -> None:
        self._kept = 0
        self._watch = watch
        self._stale: dict[int, torch.Tensor] = {}  # by storage: real tensors without their values
        self._floats = {id(fake): (fake, versions_of([fake]), real) for fake, real in floats}

    def run(
        self, func: Any, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], tensors: Sequence[Any]
    ) -> Any:
        """Call ``func``; ``tensors`` are the tensors among its arguments.

        Raises:
            DataDependentOutputException: It hands out values that are not known.
            DynamicOutputShapeException: They decide about the shape of what it returns.
        """
        stale = bool(self._stale) and any(map(self._is_stale, tensors))
        if stale and (name in READS or name == "__format__"):
            raise DataDependentOutputException(func)
        if (stale and self._shape_is_unknown(name, args)) or _is_packed(name, args):
            raise DynamicOutputShapeException(func)
        result = self._run(func, name, args, kwargs, tensors)
        fake = any(isinstance(tensor, FakeTensor) for tensor in tensors)
        changed = [tensor for tensor in targets_of(name, args, kwargs) if not isinstance(tensor, FakeTensor)]
        if (fake or stale) and changed:
            self._stale.update((storage_key(tensor), tensor) for tensor in changed)
        if stale:
            made = [tensor for tensor in tensors_in(result) if not isinstance(tensor, FakeTensor)]
            self._stale.update((storage_key(tensor), tensor) for tensor in made)
        return result

    def _is_stale(self, tensor: torch.Tensor) -> bool:
        real = not isinstance(tensor, FakeTensor) and tensor.layout == torch.strided
        return real and storage_key(tensor) in self._stale

    def _shape_is_unknown(self, name: str, args: tuple[Any, ...]) -> bool:
        if name == "__getitem__":  # by a mask without values, not of a tensor without them
            return any(map(self._is_stale, tensors_in(args[1:]))) and shape_depends_on_values(name, args, None)
        return shape_depends_on_values(name, args, None)

    def _run(self, func: Any, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], tensors: Sequence[Any]) -> Any:
        if name in SHAPED_LIKE and tensors and isinstance(tensors[0], FakeTensor) and tensors[0] is args[0]:
            stand_in = self._stand_in(name, args, kwargs)
            if stand_in is not None:
                args, tensors = (stand_in, *args[1:]), [stand_in, *tensors[1:]]
        if name in _AS_OTHERS and not isinstance(args[0], FakeTensor) and isinstance(args[-1], FakeTensor):
            with without_modes():  # of the other nothing but its shape is looked at
                other = torch.empty((), dtype=args[1].dtype).expand(args[1].shape)
            args, tensors = (args[0], other, *args[2:]), [args[0], other]
        if not self._all_real(name, args, kwargs, tensors):
            compared = self._compared(func, name, args, kwargs)
            if compared is not None and compared.dtype == torch.bool:
                self._kept += compared.numel()
                return compared
            selected = _selected(name, args, kwargs) if name != "repeat_interleave" else _repeated(args, kwargs)
            result = func(*_without_masks(name, args), **kwargs) if selected is None else selected
            if compared is not None:
                self._floats[id(result)] = (result, versions_of([result]), compared)
            return result
        with without_modes():
            if any(tensor.is_floating_point() for tensor in tensors):  # only those are dropped out
                with self._watch:
                    result = func(*args, **kwargs)
            else:
                result = func(*args, **kwargs)
        if isinstance(result, torch.Tensor):
            self._kept += result.numel()
            if name in ("empty", "empty_like", "new_empty"):  # the same bits in every process
                result.zero_()
        return result

    def _compared(self, func: Any, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor | None:
        """Give the value of what compares floats that are given, or puts them in another order; None for all else."""
        known = self._floats.get(id(args[0])) if args and self._floats else None
        if known is None or name not in _EXACT or self._kept + known[2].numel() > BUDGET:
            return None
        others = tensors_in(args[1:], kwargs)
        if versions_of([known[0]]) != known[1]:
            return None
        if len(args) > 1 and args[1] is args[0]:  # x == x: where it is a number
            args, others = (args[0], known[2], *args[2:]), others[1:]
        if any(isinstance(each, FakeTensor) for each in others):
            return None
        with without_modes():
            found = func(known[2], *args[1:], **kwargs)
        return found if isinstance(found, torch.Tensor) else None

    def _stand_in(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor | None:
        """Give a real tensor to make integers and booleans from that are shaped like a fake one."""
        dtype = kwargs.get("dtype") or args[0].dtype
        if dtype.is_floating_point or dtype.is_complex or args[0].numel() > LARGEST:
            return None
        with without_modes():
            return torch.empty_strided(args[0].shape, args[0].stride(), dtype=args[0].dtype, device="cpu")

    def _all_real(
        self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], tensors: Sequence[torch.Tensor]
    ) -> bool:
        if not tensors:
            size = _factory_size(name, args, kwargs)
            if name == "empty" and _is_floating(kwargs):
                return False
            return name in FACTORIES and size <= LARGEST and self._kept + size <= BUDGET
        for tensor in tensors:
            if isinstance(tensor, FakeTensor) or tensor.is_meta or tensor.requires_grad:
                return False
        size = _result_size(tensors)
        return size <= LARGEST and self._kept + size <= BUDGET


def _is_packed(name: str, args: Sequence[Any]) -> bool:
    """Whether a call is given a packed sequence: kernels look at how many samples each of its steps has."""
    recurrent = name in ("lstm", "gru", "rnn_tanh", "rnn_relu")
    return name == "_pad_packed_sequence" or (recurrent and len(args) > 1 and _is_integer(args[1]))


def _is_integer(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not value.is_floating_point()


def _is_floating(kwargs: Mapping[str, Any]) -> bool:
    dtype = kwargs.get("dtype") or torch.get_default_dtype()
    return bool(dtype.is_floating_point or dtype.is_complex)


def _factory_size(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Give (an upper bound of) the elements that a factory makes."""
    if name in ("zeros", "ones", "full", "empty"):
        sizes = kwargs.get("size", args[0] if args and isinstance(args[0], tuple | list) else args)
        return math.prod(size for size in sizes if isinstance(size, int))
    if name in ("arange", "range", "linspace", "logspace", "eye"):
        numbers = [abs(arg) for arg in (*args, *kwargs.values()) if isinstance(arg, int | float)]
        return int(max(numbers, default=0) ** (2 if name == "eye" else 1))
    return 0


def _result_size(tensors: Sequence[torch.Tensor]) -> int:
    """Give the elements of what broadcasting the tensors makes."""
    if len(tensors) == 1:
        return tensors[0].numel()
    sizes: list[int] = []
    for tensor in tensors:
        for place, size in enumerate(reversed(tensor.shape)):
            if place == len(sizes):
                sizes.append(1)
            sizes[place] = max(sizes[place], size)
    return math.prod(sizes)


def _without_masks(name: str, args: Sequence[Any]) -> Sequence[Any]:
    """Index fake tensors by positions instead of real boolean masks, whose result's shape is then known."""
    if name not in ("__getitem__", "__setitem__") or len(args) < 2:
        return args
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    if not any(_is_real_mask(part) for part in index):
        return args
    with without_modes():
        plain: list[Any] = []
        for part in index:
            plain.extend(part.nonzero(as_tuple=True) if _is_real_mask(part) else (part,))
    return (args[0], tuple(plain), *args[2:])


def _selected(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    """Give what ``masked_select`` takes from a fake tensor by a real mask, whose shape is known."""
    given = dict(zip(("input", "mask"), args, strict=False)) | dict(kwargs)
    if name != "masked_select" or not _is_real_mask(given.get("mask")) or "out" in given:
        return None
    values, mask = given["input"], given["mask"]
    with without_modes():
        shape = torch.broadcast_shapes(values.shape, mask.shape)  # type: ignore[no-untyped-call]
        places = mask.expand(shape).nonzero(as_tuple=True)
    chosen: torch.Tensor = values.expand(shape)[places]
    return chosen


def _repeated(args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    """Give what ``repeat_interleave`` makes of a fake tensor by real counts, whose shape is known."""
    given = dict(zip(("input", "repeats", "dim"), args, strict=False)) | dict(kwargs)
    values, counts, dim = given["input"], given.get("repeats"), given.get("dim")
    if not isinstance(counts, torch.Tensor) or isinstance(counts, FakeTensor) or values is counts:
        return None
    if dim is None:
        values, dim = values.flatten(), 0
    with without_modes():
        places = torch.arange(values.shape[dim]).repeat_interleave(counts)
    chosen: torch.Tensor = values.index_select(dim, places)
    return chosen


def _is_real_mask(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor) and value.dtype == torch.bool


def is_random(name: str) -> bool:
    """Tell whether a function draws random numbers whatever its arguments."""
    return name in RANDOM
