"""What operations do, as far as their schemas and names tell."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

from fxpipe.recipes.tape import leaves

aten = torch.ops.aten
EMPTY: frozenset[Any] = frozenset(
    {
        aten.empty.memory_format,
        aten.empty_strided.default,
        aten.empty_like.default,
        aten.new_empty.default,
        aten.new_empty_strided.default,
        aten.empty_permuted.default,
    }
)
"""Operations that give memory and leave it as it is."""

FILLS: frozenset[Any] = frozenset(
    {
        *(aten.normal_.default, aten.uniform_.default, aten.zero_.default, aten.fill_.Scalar, aten.fill_.Tensor),
        *(aten.copy_.default, aten.random_.default, getattr(aten.random_, "from"), aten.random_.to),
        *(aten.exponential_.default, aten.bernoulli_.float, aten.log_normal_.default, aten.cauchy_.default),
        *(aten.geometric_.default,),
    }
)
"""Operations that write every element of their first argument and read none."""

_SECRETLY_WRITTEN = ("running_mean", "running_var")
"""Arguments of batch norms, which update them without saying so in their schema."""

PLAIN_FILLS: frozenset[Any] = frozenset({aten.normal_.default, aten.uniform_.default, aten.zero_.default})
"""Those of them that most of a model is made of."""

FLOATS = frozenset({torch.float32, torch.float64, torch.float16, torch.bfloat16})


READS: frozenset[Any] = frozenset({aten._local_scalar_dense.default, aten.item.default, aten.equal.default})
"""Operations that give Python a value."""


@dataclass(frozen=True, slots=True)
class About:
    """What the schema of an operation says.

    Attributes:
        written: Positions and names of the arguments that it writes.
        is_out: Whether these only take the result.
        is_random: Whether it draws.
        changes_shape_only: Whether it changes where a tensor looks, and not what is there.
        is_view: Whether all it gives are views of what it gets, or it only asks for a device.
    """

    written: tuple[tuple[int, str], ...]
    is_out: bool
    is_random: bool
    changes_shape_only: bool
    is_view: bool = False


@functools.cache
def about_operation(func: Any) -> About:
    """Read the schema of an operation."""
    arguments = func._schema.arguments
    returned = [value.alias_info for value in func._schema.returns]
    written = tuple(
        (place, argument.name)
        for place, argument in enumerate(arguments)
        if (argument.alias_info is not None and argument.alias_info.is_write) or argument.name in _SECRETLY_WRITTEN
    )
    return About(
        written,
        bool(written) and all(arguments[place].is_out for place, _ in written),
        torch.Tag.nondeterministic_seeded in func.tags,
        torch.Tag.inplace_view in func.tags or func in (aten.set_.source_Tensor, aten.resize_.default),
        func is torch.ops.prim.device.default or (bool(returned) and all(a and not a.is_write for a in returned)),
    )


def generator_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Generator | None:
    """Give the random generator that a call names; None if it names none."""
    return next(iter(leaves((args, kwargs), torch.Generator)), None)


@functools.cache
def is_there(device: torch.device) -> bool:
    """Tell whether this process can use a device."""
    if device.type in ("cpu", "meta"):
        return True
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None or accelerator.type != device.type:
        return False
    return device.index is None or device.index < torch.accelerator.device_count()


def spelled(func: Any) -> str:
    """Name an operation as messages do."""
    return f"torch.{str(func).removeprefix('aten.').partition('.')[0]}"
