"""What a call does below Python: which aten operations, of which shapes, and whether random numbers are drawn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fxpipe._torch import (
    GROUPED_MM,
    READ_NUMBER,
    FakeTensor,
    TorchDispatchMode,
    device_asked,
    is_higher_order,
    without_modes,
)

RANDOM = frozenset(
    {
        *("rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "normal", "bernoulli"),
        *("multinomial", "poisson", "binomial", "uniform_", "normal_", "random_", "bernoulli_", "exponential_"),
        *("cauchy_", "log_normal_", "geometric_"),
    }
)
"""Names of functions that draw random numbers whatever their arguments."""


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every aten operation on fake tensors.

    Attributes:
        drew: Whether a random number was drawn since it was last set to False.
        trace: Operations with the shapes and dtypes of their tensors, while it is a list.
        looked: Whether an operation took a tensor for the number that it holds since it was last set to False.
        instead: The number that one tensor, by ``id``, is said to hold.
    """

    supports_higher_order_operators = True
    drew: bool
    trace: list[Any] | None
    looked: bool
    instead: tuple[int, int] | None

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.drew = self.looked = False
        self.trace = self.instead = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Note the operation and let it pass."""
        device = device_asked(func, args)
        if device is not None:
            return device
        kwargs = kwargs or {}
        if func is READ_NUMBER and not isinstance(args[0], FakeTensor):
            return self._number(args[0])
        if is_higher_order(func):
            self.note(func, torch.is_grad_enabled(), args, kwargs)
            return func(*args, **kwargs)
        if torch.Tag.nondeterministic_seeded in func.tags and draws(func, args, kwargs):
            self.drew = True
        if self.trace is not None:
            named = ((name, work_of(arg)) for name, arg in kwargs.items())
            self.trace.append((func, torch.is_grad_enabled(), *map(work_of, args), *named))
        shape = grouped_shape(func, args, kwargs)
        if shape is not None:
            return args[0].new_empty(shape, dtype=kwargs.get("out_dtype") or args[0].dtype)
        return func(*args, **kwargs)

    def _number(self, tensor: torch.Tensor) -> Any:
        """Give the number in a real tensor, which fake tensors around it do not hide."""
        if self.instead is not None and self.instead[0] == id(tensor):
            self.looked = True
            return self.instead[1]
        self.looked = self.looked or self.instead is None
        with without_modes():
            return tensor.item()

    def note(self, *what: Any) -> None:
        """Put something into the trace that is no operation and yet decides what is kept for the backward."""
        if self.trace is not None:
            self.trace.append(tuple(map(work_of, what)) + what[:2])


def work_of(value: Any) -> Any:
    """Give what of an argument decides how much work a call is: shapes and dtypes of tensors, and plain values."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.dtype
    if isinstance(value, tuple | list):
        return tuple(map(work_of, value))
    return value if isinstance(value, int | float | bool | str) else None


def draws(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Tell whether an operation that may draw random numbers does so with these arguments (attention's dropout)."""
    for position, argument in enumerate(func._schema.arguments):
        if argument.name == "dropout_p":
            value = args[position] if position < len(args) else kwargs.get("dropout_p", argument.default_value)
            return bool(value)
    return True


def grouped_shape(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Give the shape of a grouped matrix product, whose fake kernel takes bfloat16 alone; None for other operations.

    Source: ``torch._grouped_mm``: a ragged dimension of either operand is cut by the offsets.
    """
    if func is not GROUPED_MM:
        return None
    left, right = args[0], args[1]
    offsets = args[2] if len(args) > 2 else kwargs.get("offs", right)
    if left.dim() == 2 and right.dim() == 2:
        return (offsets.shape[0], left.shape[0], right.shape[1])
    if left.dim() == 2:
        return (left.shape[0], right.shape[-1])
    if right.dim() == 2:
        return (left.shape[1], right.shape[1])
    return (left.shape[0], left.shape[1], right.shape[-1])
