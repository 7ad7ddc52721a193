"""A progress bar for captures that take long: on a terminal, of the first rank, after two seconds."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from tqdm import tqdm

QUIET_S = 2.0
"""Seconds before a bar is shown."""


@contextmanager
def shown_progress(title: str, num_blocks: int) -> Iterator[Callable[[str], None]]:
    """Give a function to be called when the call of a block ends.

    Args:
        title: What is captured.
        num_blocks: Number of blocks it has.
    """
    hidden = not sys.stderr.isatty() or _rank() != 0
    with tqdm(total=num_blocks, desc=title, unit="block", delay=QUIET_S, leave=False, disable=hidden) as bar:

        def ended(_: str) -> None:
            if bar.n < num_blocks:  # a block may be called again
                bar.update()

        yield ended


def _rank() -> int:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    return int(os.environ.get("RANK", "0"))
