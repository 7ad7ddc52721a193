"""Lets the tests of this folder and their worker processes share ``models`` and ``launch``."""

import pathlib
import sys

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "runtime")]
