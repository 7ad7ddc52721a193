"""What the terminal allows: its width, and colours where nobody asked for none."""

from __future__ import annotations

import os
import shutil
import sys
from typing import TypedDict


class Terminal(TypedDict):
    """How text is laid out.

    Attributes:
        width: Columns.
        color: Whether colours are wanted.
    """

    width: int
    color: bool


MOST = 160
"""Lines longer than that are hard to follow."""


def terminal() -> Terminal:
    """Give the width of standard output, 100 where it is no terminal, and whether colours are wanted there.

    ``NO_COLOR`` (https://no-color.org) and ``TERM=dumb`` turn them off, ``COLUMNS`` sets the width.
    """
    if not sys.stdout.isatty():
        return Terminal(width=100, color=False)
    plain = bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"
    return Terminal(width=min(shutil.get_terminal_size((100, 24)).columns, MOST), color=not plain)
