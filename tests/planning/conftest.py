"""Lets the tests of this room share ``layer_graphs``."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))
