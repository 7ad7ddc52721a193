"""Lets the tests of this room share ``handmade``, as their worker processes do."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))
