"""Lets tests and their worker processes share ``launch``, and what lies beside them in their folder."""

import pathlib
import sys

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE), *(str(folder) for folder in sorted(HERE.iterdir()) if list(folder.glob("test_*.py")))]
