"""Places in the user's code, as messages and notes name them."""

from __future__ import annotations

import os
import sysconfig
import traceback

_INSIDE = os.sep + "torch" + os.sep, os.sep + "fxpipe" + os.sep + "capture" + os.sep
_PYTHON = sysconfig.get_path("stdlib") + os.sep
_INSTALLED = sysconfig.get_path("purelib") + os.sep  # as a rule within the former


def place_of(error: Exception) -> str:
    """Give file and line of the user's code where an error came from; nothing where none of it was running."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        of_python = frame.filename.startswith(_PYTHON) and not frame.filename.startswith(_INSTALLED)
        if not of_python and not any(part in frame.filename for part in _INSIDE):
            return f" ({frame.filename}:{frame.lineno})"
    return ""


def relative(text: str) -> str:
    """Leave directories out of a note: the same model gives the same plan on every machine."""
    words = text.split(" ")
    return " ".join(os.path.basename(word) if os.sep in word else word for word in words)
