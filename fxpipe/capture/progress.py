"""A progress bar for captures and searches that take long: on a terminal, of the first rank, within a second."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from tqdm import tqdm

QUIET_S = 0.5
"""Seconds before a bar is shown."""


@contextmanager
def shown_progress(title: str, num_blocks: int | None, unit: str = "block") -> Iterator[Callable[[str], None]]:
    """Give a function to be called when the call of a block, or a step of a search, ends.

    Args:
        title: What is done.
        num_blocks: Number of blocks it has; None where nobody knows.
        unit: What is counted.
    """
    hidden = not sys.stderr.isatty() or _rank() != 0
    with tqdm(total=num_blocks, desc=title, unit=unit, delay=QUIET_S, leave=False, disable=hidden) as bar:

        def ended(_: str) -> None:
            if num_blocks is None or bar.n < num_blocks:  # a block may be called again
                bar.update()

        yield ended


def _rank() -> int:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    return int(os.environ.get("RANK", "0"))
