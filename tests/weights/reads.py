"""Counts what files are asked for: the bytes of the slices that are read, not of what the system reads ahead."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

import fxpipe.runtime.weights.reading as reading


@contextlib.contextmanager
def counted_reads() -> Iterator[list[int]]:
    """Give a list that gets the bytes of each box of a tensor that is asked for."""
    asked: list[int] = []
    real = reading.read_box

    def counted(*arguments: Any) -> torch.Tensor:
        box = real(*arguments)
        asked.append(box.numel() * box.element_size())
        return box

    reading.read_box = counted
    try:
        yield asked
    finally:
        reading.read_box = real
