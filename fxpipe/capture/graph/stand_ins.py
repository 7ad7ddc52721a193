"""Small made-up values for weights, and what stands for modules that are not run for themselves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.func import functional_call

from fxpipe.capture.graph.sizes import Unsuited
from fxpipe.capture.model.skeleton import Skeleton
from fxpipe.capture.record.node import info


def module_run(
    skeleton: Skeleton, fqn: str, args: tuple[Any, ...], kwargs: dict[str, Any], rename: Callable[[int], int]
) -> Any:
    """Call a module with small values for its own tensors.

    Args:
        skeleton: The copy of the model.
        fqn: The module.
        args: What it is called with.
        kwargs: As keywords.
        rename: Gives the small size that stands for a large one.
    """
    module = skeleton.module.get_submodule(fqn)
    own = {}
    with torch.no_grad():
        for name, tensor in _tensors(module):
            own[name] = stand_in(skeleton, tensor, tuple(map(rename, tensor.shape)))
    return functional_call(module, own, args, kwargs)


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def stand_in(skeleton: Skeleton, fake: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Give small values for a parameter or buffer: its own where it has some and is not larger, else made up."""
    original = None if fake.requires_grad else skeleton.value_of(skeleton.fqn_of.get(id(fake), ""))
    if original is not None:
        found = original.detach().cpu()
        if all(small <= size for small, size in zip(shape, found.shape, strict=True)):
            found = found[tuple(slice(size) for size in shape)]
            return found.double() if found.is_floating_point() else found.clone()
    if not fake.dtype.is_floating_point:
        return torch.zeros(tuple(shape), dtype=fake.dtype)
    seed = torch.Generator().manual_seed(len(shape) + sum(shape))
    return torch.rand(tuple(shape), generator=seed, dtype=torch.float64) + 0.5


def rows_made_up(
    node: fx.Node,
    dims: Mapping[fx.Node, int],
    values: Mapping[fx.Node, Any],
    shapes: tuple[Sequence[int], Sequence[int]] | None,
    size: Callable[[int, int], int],
    floats: str = "normal",
) -> torch.Tensor:
    """Give what stands for what a layer makes of rows that values select: each of its rows a function of theirs.

    That a layer takes samples one by one is assumed of all layers; of how many rows there are nothing is.

    Args:
        node: The call of the layer.
        dims: The dimension in which rows lie, of values whose number of rows is not known.
        values: Of what it is given.
        shapes: Of its result, for some samples and for twice as many.
        size: Gives a size of its result of those in both.
        floats: What values look like: "normal", "unit" or "positive".

    Raises:
        Unsuited: Its rows are not those that it is given.
    """
    given = [(values[each], dims[each]) for each in node.all_input_nodes if each in dims]
    if not given or shapes is None or len(shapes[0]) != len(shapes[1]):
        raise Unsuited(f"{info(node).layer} makes rows of which it cannot be told whose they are")
    at = dims[node]
    others = [size(one, two) for place, (one, two) in enumerate(zip(*shapes, strict=True)) if place != at]
    rows = [value.movedim(dim, 0).flatten(1) if value.dim() > 1 else value[:, None] for value, dim in given]
    if len({len(each) for each in rows}) != 1:
        raise Unsuited(f"{info(node).layer} is given other rows than it makes")
    joined = torch.cat([each.double() for each in rows], 1)
    generator = torch.Generator().manual_seed(joined.shape[1])
    mix = torch.randn(joined.shape[1], math.prod(others), generator=generator, dtype=torch.float64)
    made = (joined @ mix / math.sqrt(max(joined.shape[1], 1))).reshape(len(joined), *others).movedim(0, at)
    return made if floats == "normal" else made.sigmoid() if floats == "unit" else made.exp().clamp(max=4.0)
