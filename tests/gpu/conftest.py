"""Says at the end of a report how many checks for accelerators did not run."""

import check
import torch


def pytest_terminal_summary(terminalreporter):
    if not torch.cuda.is_available():
        terminalreporter.write_line(f"no accelerator: {len(check.CHECKS)} GPU checks did not run (tests/gpu/check.py)")
