"""Lets the tests of this room, and the benchmark of coverage, share ``architectures`` and ``staged``."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))
