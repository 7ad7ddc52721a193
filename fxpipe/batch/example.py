"""From the example batch that ``compile`` was given to the one microbatch that is captured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fxpipe.batch.microbatches import choose_microbatches
from fxpipe.batch.split import Microbatch, batch_size_of, split_batch
from fxpipe.errors import ScheduleError


def example_batch(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None, loss_fn: Callable[..., Any] | None
) -> Microbatch | None:
    """Give the example batch: the user's, else the model's own ``dummy_inputs``, else None.

    Args:
        model: The model.
        args: Positional arguments of one global batch.
        kwargs: Keyword arguments, ``target`` among them where a loss function needs one.
        loss_fn: The loss function.

    Raises:
        ScheduleError: A loss function was given, but no ``target``.
    """
    named = dict(kwargs or {})
    if not args and not named:
        dummy = getattr(model, "dummy_inputs", None)
        if loss_fn is not None or not isinstance(dummy, Mapping) or not dummy:
            return None
        named = dict(dummy)
    target = named.pop("target", None) if loss_fn is not None else None
    if loss_fn is not None and target is None:
        raise ScheduleError(
            "loss_fn was given, but the example has no target\n"
            "  pass it by name: example_kwargs={'target': targets}, as step will get it"
        )
    return tuple(args), named, target


def split_example(
    example: Microbatch, *, stages: int, ranks: int, schedule: str, microbatches: int | None
) -> tuple[int, int, Microbatch]:
    """Choose the number of microbatches and cut the example.

    Returns:
        Number of microbatches, samples in each, and the first one.

    Raises:
        ScheduleError: The batch cannot be cut as asked, or not at all.
    """
    size = batch_size_of(*example)
    number = choose_microbatches(size, stages, ranks, schedule, microbatches)
    return number, size // number, split_batch(*example, num_microbatches=number, batch_size=size)[0]


def as_microbatch(given: Any) -> Microbatch:
    """Turn one entry of ``step(microbatches=[...])`` into arguments, keyword arguments and target.

    A dictionary holds keyword arguments (``target`` among them), a tuple positional ones, a tensor is the only one;
    ``(args, kwargs)`` and ``(args, kwargs, target)`` say all.

    >>> as_microbatch({"ids": 1, "target": 2})
    ((), {'ids': 1}, 2)
    >>> as_microbatch(((1,), {"mask": 2}))
    ((1,), {'mask': 2}, None)
    """
    if isinstance(given, Mapping):
        named = dict(given)
        return (), named, named.pop("target", None)
    if isinstance(given, tuple | list):
        whole = 2 <= len(given) <= 3 and isinstance(given[0], tuple | list) and isinstance(given[1], Mapping)
        if whole:
            named = dict(given[1])
            target = given[2] if len(given) == 3 else named.pop("target", None)
            return tuple(given[0]), named, target
        return tuple(given), {}, None
    if isinstance(given, torch.Tensor):
        return (given,), {}, None
    raise ScheduleError(
        f"a microbatch is a {type(given).__name__}\n  pass a dictionary, a tuple or a tensor: step(microbatches=[...])"
    )
