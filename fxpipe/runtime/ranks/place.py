"""Where this process runs: alone or among ranks, and on which device."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist


def is_distributed() -> bool:
    """Tell whether this process is one of several: a process group exists, or torchrun says so."""
    return dist.is_initialized() or int(os.environ.get("WORLD_SIZE", 1)) > 1


def is_first() -> bool:
    """Tell whether this process may speak for all: rank 0, or the only one."""
    return (dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))) == 0


def default_device() -> torch.device:
    """Give ``cuda:LOCAL_RANK`` if there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def from_first(value: Any, device: torch.device) -> Any:
    """Give every rank what rank 0 has; the process group must exist."""
    values = [value]
    dist.broadcast_object_list(values, src=0, device=device)
    return values[0]
