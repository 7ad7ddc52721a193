"""Where this process runs: alone or among ranks, and on which device."""

from __future__ import annotations

import os
import platform
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

import torch
import torch.distributed as dist

from fxpipe.errors import MaterializeError


def is_distributed() -> bool:
    """Tell whether this process is one of several: a process group exists, or torchrun says so."""
    return dist.is_initialized() or int(os.environ.get("WORLD_SIZE", 1)) > 1


def is_first() -> bool:
    """Tell whether this process may speak for all: rank 0, or the only one."""
    return (dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))) == 0


def key_of(name: str) -> str:
    """Give a key of the store that ranks share: under torchrun it outlives processes that are started again.

    >>> key_of("failure")
    'fxpipe/0/failure'
    """
    return f"fxpipe/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{name}"


def machine() -> str:
    """Name this machine, as far as its processes see each other; empty where nothing says so."""
    with suppress(OSError), open("/proc/sys/kernel/random/boot_id") as file:
        return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    return ""


def runs(pid: int) -> bool:
    """Tell whether a process of this machine runs; where there is nothing to look at, it counts as one that does.

    >>> runs(os.getpid())
    True
    """
    if not os.path.isdir("/proc/self"):
        return True
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def versions() -> dict[str, str]:
    """Give the versions of what computes: ranks of other ones may draw, name or order otherwise.

    >>> versions()["torch"] == torch.__version__
    True
    """
    found = {name: getattr(sys.modules.get(name), "__version__", "") for name in ("numpy", "transformers", "peft")}
    found |= {"torch": str(torch.__version__), "python": platform.python_version()}
    with suppress(PackageNotFoundError):  # from a bare checkout
        found["fxpipe"] = version("fxpipe")
    return {name: text for name, text in sorted(found.items()) if text}


def default_device() -> torch.device:
    """Give ``cuda:LOCAL_RANK`` if there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def device_of(device: torch.device | str | int | None, dtype: torch.dtype | None) -> torch.device:
    """Give the device that stages are to be made on.

    Args:
        device: What ``materialize`` was given; None: ``default_device``.
        dtype: That of parameters and buffers; None for the model's own.

    Raises:
        MaterializeError: There is no such device here, it has no memory, or the dtype is none of floating point.

    >>> device_of("cpu", torch.bfloat16)
    device(type='cpu')
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise MaterializeError(
            f"dtype={dtype!r} is no dtype of floating point\n  pass one (torch.bfloat16), or None for the model's own"
        )
    if device is None:
        return default_device()
    try:
        found = torch.device(device)
        has_memory = not torch.empty(0, device=found).is_meta
    except (RuntimeError, TypeError, AssertionError) as error:  # the last from torch without CUDA
        why = (str(error).splitlines() or [""])[0]
        raise MaterializeError(
            f"device={device!r} cannot be used here: {why}\n  pass one that is here, or None for this rank's own"
        ) from error
    if not has_memory:
        raise MaterializeError(
            f"device={device!r} has no memory for values\n  a pipeline is a plan until materialize: leave that out"
        )
    return found
