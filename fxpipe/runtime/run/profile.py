"""Measure how long a layer takes on a device: forward, gradients of its inputs, gradients of its weights.

As in a stage: other layers have filled the caches since the layer ran last, and gradients are added to those of the
microbatches before.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fxpipe.ir.cost import LayerCost
from fxpipe.ir.tree import map_tree, tree_leaves

WARM_UPS = 2
LEAST_RUNS, MOST_RUNS = 5, 50
ENOUGH_S = 0.25
"""Seconds after which a layer has been run often enough."""
MOST_EVICTED = 64 * 2**20
"""Bytes after which caches hold nothing of a layer; more are not touched between its runs."""


class Others:
    """Stands for the other layers of a stage: touches as many bytes as they do between two runs of one layer.

    Args:
        nbytes: What they hold; ``MOST_EVICTED`` of it at most is touched.
        device: Where the layers run.
    """

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self._held = torch.zeros(min(nbytes, MOST_EVICTED), dtype=torch.uint8, device=device)

    def run(self) -> None:
        """Read and write all of it."""
        self._held.add_(1)


def measure_layer(
    call: nn.Module | Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    device: torch.device,
    make: Callable[[Any, torch.device], Any],
    others: Others,
) -> LayerCost:
    """Run one layer, forward and backward, and give the median of several runs.

    Args:
        call: A module whose tensors have no memory (a copy of it gets some), or a function.
        args: Its arguments; ``make`` turns what stands for tensors into some.
        kwargs: Its keyword arguments, likewise.
        device: Where to run.
        make: Called with each leaf of the arguments and the device.
        others: Run before each phase.

    Returns:
        Seconds of each phase.
    """
    if isinstance(call, nn.Module):
        call = with_memory(call, device)
    given = map_tree(lambda _, leaf: make(leaf, device), (args, dict(kwargs)))
    weights = [p for p in call.parameters() if p.requires_grad] if isinstance(call, nn.Module) else []
    leaves = [leaf for _, leaf in tree_leaves(given) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
    weights += [leaf for leaf in leaves if isinstance(leaf, nn.Parameter)]
    inputs = [leaf for leaf in leaves if not isinstance(leaf, nn.Parameter)]
    runs: list[tuple[float, float, float]] = []
    start = time.perf_counter()
    while len(runs) < WARM_UPS + LEAST_RUNS or (time.perf_counter() - start < ENOUGH_S and len(runs) < MOST_RUNS):
        runs.append(_run(call, given, inputs, weights, others, device))
    forward, for_inputs, both = (statistics.median(column) for column in zip(*runs[WARM_UPS:], strict=True))
    return LayerCost(forward, for_inputs, max(both - for_inputs, 0.0))


def measure_kept(
    call: nn.Module | Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    device: torch.device,
    make: Callable[[Any, torch.device], Any],
) -> int:
    """Run one layer's forward and give the bytes that it alone keeps for its backward.

    Each storage once; weights, and what goes in and comes out, are not counted: a stage counts those by value.

    Args:
        call: As of ``measure_layer``.
        args: Likewise.
        kwargs: Likewise.
        device: Likewise.
        make: Likewise.
    """
    if isinstance(call, nn.Module):
        call = with_memory(call, device)
    given = map_tree(lambda _, leaf: make(leaf, device), (args, dict(kwargs)))
    given = map_tree(lambda _, leaf: _usable(leaf), given)
    sizes: dict[int, int] = {}
    held = []  # so that no storage takes the place of another

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        held.append(tensor.detach())
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call(*given[0], **given[1])
    known = [leaf for _, leaf in tree_leaves((given, result)) if isinstance(leaf, torch.Tensor)]
    if isinstance(call, nn.Module):
        known += [*call.parameters(), *call.buffers()]
    for tensor in known:
        sizes.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(sizes.values())


def with_memory(module: nn.Module, device: torch.device) -> nn.Module:
    """Copy a module and give the copy small random weights on a device."""
    memo: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        value = random_like(tensor.shape, tensor.dtype, device)
        memo[id(tensor)] = nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
    return copy.deepcopy(module, memo)


def random_like(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Make a tensor of small numbers: noise, zeros for whole numbers (they may be indices), True for booleans."""
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(shape, dtype=dtype, device=device) * 0.02
    return torch.full(shape, dtype == torch.bool, dtype=dtype, device=device)


def _run(
    call: Callable[..., Any],
    given: Any,
    inputs: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    others: Others,
    device: torch.device,
) -> tuple[float, float, float]:
    others.run()
    args, kwargs = map_tree(lambda _, leaf: _usable(leaf), given)  # a layer may write to what it is given
    with torch.enable_grad():
        forward, result = _timed(device, lambda: call(*args, **kwargs))
    roots = [leaf for _, leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
    if not roots or not (inputs or weights):
        return forward, 0.0, 0.0
    for_inputs = 0.0
    if inputs:
        others.run()
        grads = [torch.ones_like(root) for root in roots]
        for_inputs, _ = _timed(
            device, lambda: torch.autograd.grad(roots, inputs, grads, retain_graph=True, allow_unused=True)
        )
    both = for_inputs
    if weights:
        for leaf in inputs:
            leaf.grad = None  # only those of weights add up
        others.run()
        grads = [torch.ones_like(root) for root in roots]
        both, _ = _timed(device, lambda: torch.autograd.backward(roots, grads, inputs=[*inputs, *weights]))
    return forward, for_inputs, both


def _usable(leaf: Any) -> Any:
    if not isinstance(leaf, torch.Tensor) or isinstance(leaf, nn.Parameter):
        return leaf
    return leaf.view_as(leaf).clone() if leaf.requires_grad else leaf.clone()


def _timed(device: torch.device, work: Callable[[], Any]) -> tuple[float, Any]:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, result
