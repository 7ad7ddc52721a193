"""From the example batch that ``compile`` was given to the one microbatch that is captured."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from fxpipe.batch.dims import BatchDims, BatchLayout, Microbatch
from fxpipe.batch.microbatches import choose_microbatches
from fxpipe.batch.split import cut
from fxpipe.errors import ScheduleError
from fxpipe.ir.tree import map_tree, tree_leaves

OF_STEP = ("last", "microbatches", "scaler", "gather")
"""Keywords of ``step``, ``evaluate`` and ``infer`` that no model gets; ``target`` is told apart."""


def example_batch(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None, *, needs_target: bool
) -> Microbatch | None:
    """Give the example batch: the user's, else the model's own ``dummy_inputs``, else None.

    Args:
        model: The model.
        args: Positional arguments of one global batch.
        kwargs: Keyword arguments, ``target`` among them where a loss function needs one.
        needs_target: Whether a loss function compares with one.

    Raises:
        ScheduleError: A loss function was given, but no ``target``; or a keyword is one of ``step``'s own.
    """
    named = dict(kwargs or {})
    for name in OF_STEP:
        if name in named:
            raise ScheduleError(
                f"the example has a keyword argument {name!r}, which step or infer would take themselves\n"
                f"  pass what the model calls {name!r} by position, in example_args and in step, or rename it"
            )
    if not args and not named:
        dummy = getattr(model, "dummy_inputs", None)
        if needs_target or not isinstance(dummy, Mapping) or not dummy:
            return None
        named = dict(dummy)
    target = named.pop("target", None) if needs_target else None
    if needs_target and target is None:
        raise ScheduleError(
            "loss_fn was given, but the example has no target\n"
            "  pass it by name: example_kwargs={'target': targets}, as step will get it"
        )
    return out_of_inference((tuple(args), named, target))


@dataclass(frozen=True, slots=True)
class Example:
    """An example batch, cut.

    Attributes:
        number: Of microbatches.
        first: The first microbatch.
        layout: Of that microbatch.
        dims: Where samples lie in other batches.
    """

    number: int
    first: Microbatch
    layout: BatchLayout
    dims: BatchDims


def split_example(
    example: Microbatch, *, stages: int, ranks: int, schedule: str, microbatches: int | None, dims: BatchDims
) -> Example:
    """Choose the number of microbatches and cut the example.

    Raises:
        ScheduleError: The batch cannot be cut as asked, or not at all.
    """
    dims.check_known(example)
    layout = dims.layout(example, split=False)
    size = layout.size
    number = choose_microbatches(size, stages, ranks, schedule, microbatches)
    if number > 1:
        layout.check_clear()
    first = cut(example, layout, number, dims)[0]
    said = dims.doubts(example, layout, number) if number > 1 else {}
    own = replace(layout, size=size // number, said=said)
    return Example(number, first, own, dims.learned(layout))


def as_loss_fn(loss_fn: Callable[..., Any] | None) -> tuple[Callable[..., Any] | None, bool]:
    """Give a loss function the form ``loss_fn(output, target)``, and tell whether it takes a target.

    One of a single parameter gets the output alone.

    >>> import torch
    >>> takes = as_loss_fn(lambda output: output.mean())
    >>> takes[0](torch.ones(2), None), takes[1]
    (tensor(1.), False)
    """
    if loss_fn is None:
        return None, False
    try:
        parameters = inspect.signature(loss_fn).parameters.values()
    except (TypeError, ValueError):
        return loss_fn, True
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    several = any(p.kind == p.VAR_POSITIONAL for p in parameters)
    if several or len(positional) != 1:
        return loss_fn, True

    @functools.wraps(loss_fn)
    def of_output(output: Any, target: Any) -> Any:
        del target
        return loss_fn(output)

    return of_output, False


def out_of_inference(batch: Microbatch) -> Microbatch:
    """Copy the tensors that were made in inference mode: no gradient goes through those, nor does anything record them.

    >>> with torch.inference_mode():
    ...     made = torch.ones(2)
    >>> args, _, _ = out_of_inference(((made,), {}, None))
    >>> made.is_inference(), args[0].is_inference()
    (True, False)
    """
    if not any(isinstance(leaf, torch.Tensor) and leaf.is_inference() for _, leaf in tree_leaves(batch)):
        return batch

    def copied(_: str, leaf: Any) -> Any:
        return leaf.clone() if isinstance(leaf, torch.Tensor) and leaf.is_inference() else leaf

    with torch.inference_mode(False), torch.no_grad():
        args, kwargs, target = batch
        return tuple(map_tree(copied, args)), map_tree(copied, kwargs), map_tree(copied, target)


def with_own_target(batch: Microbatch) -> Microbatch:
    """Give a model what it calls ``target`` itself, where no loss function takes one.

    >>> with_own_target(((), {"ids": 1}, 2))
    ((), {'ids': 1, 'target': 2}, None)
    """
    args, kwargs, target = batch
    return (args, kwargs, None) if target is None else (args, {**kwargs, "target": target}, None)


def takes_target(model: nn.Module, kwargs: Mapping[str, Any] | None) -> bool:
    """Whether a model's forward has an argument called ``target``, or is given one in an example."""
    return "target" in (kwargs or {}) or "target" in inspect.signature(model.forward).parameters


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
