"""Runs a script, with its arguments, where tensors are made in float64, and the text to train on is a tenth as long."""

import runpy
import sys
from pydoc_data.topics import topics

import torch

if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    for name in sorted(topics)[len(topics) // 10 :]:
        del topics[name]
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
