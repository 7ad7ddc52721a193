"""``cost="profile"``: every distinct layer is measured once on the real device by rank 0, and its links to others."""

from __future__ import annotations

import platform
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from fxpipe.capture.capture import Captured
from fxpipe.capture.cut.single_layers import Activation, LayerAlone, Weight, layers_alone
from fxpipe.errors import ScheduleError
from fxpipe.ir.cost import LayerCost, LayerCounts
from fxpipe.ir.graph import LayerGraph
from fxpipe.ir.profile import LinkTime, Profile
from fxpipe.runtime.ranks.agreement import agree
from fxpipe.runtime.ranks.groups import Groups, busy, is_time, make_groups, patience, start_process_group
from fxpipe.runtime.ranks.links import measure_links
from fxpipe.runtime.ranks.meeting import meeting
from fxpipe.runtime.ranks.place import default_device, is_distributed, is_first
from fxpipe.runtime.run.profile import Others, measure_kept, measure_layer, random_like


class Profiler:
    """Measures the layers of captures; what was measured once is not measured again.

    Args:
        ranks: Over how many ranks the layers will be spread: each works with so many of them between two runs of one.
        timeout: Seconds a rank waits for another one that stands still; one that measures is waited for.
    """

    def __init__(self, ranks: int, timeout: float | None) -> None:
        self._ranks = ranks
        self._timeout = patience(timeout)
        self._times: dict[LayerCounts, tuple[LayerCost, int]] = {}
        self._layers: dict[str, tuple[LayerCost, int]] = {}
        self._links: list[LinkTime] = []
        self._most_bytes = 0

    def measure(self, captured: Captured, graph: LayerGraph) -> Profile:
        """Measure what is new in a capture; gives all that was measured so far.

        Under torchrun it starts the process group; all ranks measure at once, since they work at once in a step and
        share what a machine shares, and what rank 0 found counts. Then links between ranks are measured, up to the
        largest value of the graph.
        """
        device = default_device()
        layers = layers_alone(captured.observation, captured.structure)
        missing = [layer for layer in layers if layer.counts not in self._times]
        # From its forward to its backward a layer waits for the layers behind it in its stage, and for those before it
        # from its backward to its next forward: for half of them on average.
        others = Others(_held_bytes(graph) // self._ranks // 2 if missing else 0, device)
        if not is_distributed():
            self._measure(missing, others, device)
        else:
            with meeting("compile", self._timeout) as met:
                start_process_group(device, self._timeout)
                met.start()
                groups = make_groups([range(dist.get_world_size())], [], device, self._timeout)
            try:
                with groups.guard("profiling"):
                    self._measure_together(missing, others, graph, device, groups)
            finally:
                groups.close()
        self._layers.update({layer.name: self._times[layer.counts] for layer in layers})
        costs = {name: cost for name, (cost, _) in self._layers.items()}
        kept = {name: nbytes for name, (_, nbytes) in self._layers.items()}
        return Profile.of(_describe(device), costs, links=self._links, kept=kept)

    def _measure_together(
        self, layers: list[LayerAlone], others: Others, graph: LayerGraph, device: torch.device, groups: Groups
    ) -> None:
        """Measure on all ranks; they wait for each other for as long as it takes."""
        error: Exception | None = None
        with busy(groups, "measuring layers"):
            try:
                self._measure(layers, others, device)
            except Exception as found:  # memory, for one
                error = found
        agree(groups, error, "the times of layers")
        most = max((value.meta.nbytes for value in graph.values), default=0)
        if most > self._most_bytes:
            self._most_bytes, self._links = most, measure_links(groups.pipeline, device, most, groups.waiting)
        self._times, self._links = groups.gather((self._times, self._links))[0]

    def _measure(self, layers: list[LayerAlone], others: Others, device: torch.device) -> None:
        distinct = {layer.counts: layer for layer in reversed(layers)}
        silent = not (is_first() and sys.stderr.isatty())
        bar = tqdm(distinct.values(), desc="measuring layers", unit="layer", disable=silent)
        for layer in bar:
            bar.set_postfix_str(layer.name)
            given = layer.call, layer.args, layer.kwargs, device, _make
            self._times[layer.counts] = measure_layer(*given, others), measure_kept(*given)


def _held_bytes(graph: LayerGraph) -> int:
    """Give the bytes that all layers work with: weights, their gradients, and what one microbatch keeps."""
    weights = {info.fqn: info.nbytes for spec in graph.specs for info in spec.parameters}
    return 2 * sum(weights.values()) + sum(counts.saved_bytes for counts in graph.counts)


def check_timeout(timeout: float | None) -> None:
    """Refuse what is no number of seconds.

    Raises:
        ScheduleError: It is none.
    """
    if timeout is not None and not is_time(timeout):
        raise ScheduleError(f"timeout is {timeout!r}\n  pass a positive number of seconds, or None")


def _make(leaf: Any, device: torch.device) -> Any:
    if isinstance(leaf, torch.Tensor):  # a constant of the model's
        return leaf.to(device)
    if not isinstance(leaf, Weight | Activation):
        return device if isinstance(leaf, torch.device) else leaf
    meta = leaf.meta
    tensor = random_like(meta.shape, getattr(torch, meta.dtype), device)
    if isinstance(leaf, Weight):
        return nn.Parameter(tensor, meta.requires_grad) if tensor.is_floating_point() else tensor
    if leaf.strides:
        tensor = torch.empty_strided(meta.shape, leaf.strides, dtype=tensor.dtype, device=device).copy_(tensor)
    return tensor.requires_grad_(meta.requires_grad) if meta.requires_grad else tensor


def _describe(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
