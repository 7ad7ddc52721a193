"""Places in the user's code, as messages and notes name them."""

from __future__ import annotations

import os
import traceback


def place_of(error: Exception) -> str:
    """Give file and line of the user's code where an error came from."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        inside = os.sep + "torch" + os.sep, os.sep + "fxpipe" + os.sep + "capture" + os.sep
        if not any(part in frame.filename for part in inside):
            return f" ({frame.filename}:{frame.lineno})"
    return ""


def relative(text: str) -> str:
    """Leave directories out of a note: the same model gives the same plan on every machine."""
    words = text.split(" ")
    return " ".join(os.path.basename(word) if os.sep in word else word for word in words)
