"""``cost="profile"``: every distinct layer is measured once on the real device, by rank 0."""

from __future__ import annotations

import platform
import sys
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from fxpipe.capture.capture import Captured
from fxpipe.capture.cut.single_layers import Activation, LayerAlone, Weight, layers_alone
from fxpipe.ir.cost import LayerCost, LayerCounts
from fxpipe.ir.profile import Profile
from fxpipe.runtime.ranks.groups import start_process_group
from fxpipe.runtime.ranks.place import default_device, from_first, is_distributed, is_first
from fxpipe.runtime.run.profile import measure_layer, random_like


class Profiler:
    """Measures the layers of captures; what was measured once is not measured again."""

    def __init__(self) -> None:
        self._times: dict[LayerCounts, LayerCost] = {}
        self._layers: dict[str, LayerCost] = {}

    def measure(self, captured: Captured) -> Profile:
        """Measure what is new in a capture; gives the times of everything measured so far.

        Under torchrun it starts the process group, measures on rank 0 and hands the times to all.
        """
        device = default_device()
        layers = layers_alone(captured.observation, captured.structure)
        if is_distributed():
            start_process_group(device)
        if is_first():
            self._measure([layer for layer in layers if layer.counts not in self._times], device)
        if is_distributed():
            self._times = from_first(self._times, device)
        self._layers.update({layer.name: self._times[layer.counts] for layer in layers})
        return Profile.of(_describe(device), self._layers)

    def _measure(self, layers: list[LayerAlone], device: torch.device) -> None:
        distinct = {layer.counts: layer for layer in reversed(layers)}
        bar = tqdm(distinct.values(), desc="measuring layers", unit="layer", disable=not sys.stderr.isatty())
        for layer in bar:
            bar.set_postfix_str(layer.name)
            self._times[layer.counts] = measure_layer(layer.call, layer.args, layer.kwargs, device, _make)


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
