"""Inputs on the device of the stages, each copied when a microbatch comes to need it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from fxpipe.batch.inputs import Inputs


class OnDevice(Mapping[str, Any]):
    """The values of one microbatch by name: its numbers, and its tensors on a device, copied when first asked for.

    So a microbatch that waits takes no memory on the device, and an input that only other ranks read is never copied.

    Args:
        inputs: The microbatch.
        device: Where the stages run.
    """

    def __init__(self, inputs: Inputs, device: torch.device) -> None:
        self._inputs, self._device = inputs, device
        self._known: dict[str, Any] = dict(inputs.numbers)

    def __getitem__(self, name: str) -> Any:
        if name not in self._known:
            self._known[name] = copied(self._inputs.tensors[name], self._device)
        return self._known[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._inputs.values)

    def __len__(self) -> int:
        return len(self._inputs.values)


def copied(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Give a tensor on a device; the host goes on meanwhile.

    A copy from memory that may be paged out makes the host wait, so it goes through pinned memory, of which torch keeps
    what it had.

    Args:
        tensor: Of any shape and dtype.
        device: Where it is needed.
    """
    if tensor.device == device:
        return tensor
    if device.type == "cuda" and tensor.device.type == "cpu" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
