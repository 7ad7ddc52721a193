"""A number that tells one batch from another of the same shape: what ranks compare before they exchange anything."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence

import torch

from fxpipe.batch.inputs import Inputs

WHOLE_BYTES = 1 << 20
"""Tensors up to this size are read whole, of larger ones ``NUM_PIECES`` pieces."""
NUM_PIECES = 16
PIECE_BYTES = 1 << 16
_ODD = 0x9E3779B97F4A7C15 - (1 << 64)


def on_host(device: torch.device) -> bool:
    """Tell whether what lies on a device is read without waiting for it."""
    return device.type == "cpu"


def digest_inputs(microbatches: Sequence[Inputs]) -> int | None:
    """Give a checksum of the tensors of a batch; None where some lie on an accelerator, which are not read back.

    Two batches of equal checksums are almost surely equal where their tensors are small; of large tensors pieces are
    read, spread evenly: shuffled data differ in all of them.

    Args:
        microbatches: The named tensors of each.

    Returns:
        32 bits.
    """
    found = 0
    for name, tensor in _named(microbatches):
        if not on_host(tensor.device):
            return None
        found = digest_tensor(tensor, zlib.crc32(name.encode(), found))
    return found


def digest_tensor(tensor: torch.Tensor, start: int = 0) -> int:
    """Give the CRC-32 of a tensor's bytes, of a large one's pieces.

    >>> digest_tensor(torch.arange(4)) == digest_tensor(torch.arange(5)[:4]) != digest_tensor(torch.arange(1, 5))
    True
    """
    return zlib.crc32(_bytes_of(tensor).numpy().tobytes(), start) if tensor.numel() else start


class LateDigest:
    """A checksum of the tensors of a batch wherever they lie, started where they lie and read later.

    The host waits for it only until the device has come as far as the start of the step: the device never does.

    Args:
        microbatches: The named tensors of each.
        device: Where the sums meet.
    """

    def __init__(self, microbatches: Iterable[Inputs], device: torch.device) -> None:
        total = torch.zeros((), dtype=torch.int64, device=device)
        for name, tensor in _named(microbatches):
            total = total * 31 + weighted_sum(tensor).to(device, non_blocking=True) + zlib.crc32(name.encode())
        self._event: torch.cuda.Event | None = None
        self._total = total
        if device.type == "cuda":
            self._total = torch.empty((), dtype=torch.int64, pin_memory=True).copy_(total, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(device))

    def read(self) -> int:
        """Give it."""
        if self._event is not None:
            self._event.synchronize()
        return int(self._total)


def weighted_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Add a tensor's bytes up where it lies, each with a weight of its place; modulo two to the 64.

    >>> one, other = torch.tensor([1, 2]), torch.tensor([2, 1])
    >>> int(weighted_sum(one)) == int(weighted_sum(one.clone())) != int(weighted_sum(other))
    True
    """
    if not tensor.numel():
        return torch.zeros((), dtype=torch.int64, device=tensor.device)
    data = _bytes_of(tensor)
    weights = torch.arange(1, 2 * data.numel(), 2, device=data.device) * _ODD
    return (data.to(torch.int64) * weights).sum()


def _named(microbatches: Iterable[Inputs]) -> Iterable[tuple[str, torch.Tensor]]:
    for inputs in microbatches:
        for name, tensor in inputs.tensors.items():
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta and tensor.layout == torch.strided:
                yield name, tensor


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """Give a tensor's bytes, of a large one those of pieces."""
    flat = tensor.detach().resolve_conj().resolve_neg().reshape(-1)
    if flat.numel() * flat.element_size() > WHOLE_BYTES:
        width = max(PIECE_BYTES // flat.element_size(), 1)
        first = torch.linspace(0, flat.numel() - width, NUM_PIECES, dtype=torch.float64).long().tolist()
        flat = torch.cat([flat[at : at + width] for at in first])
    return flat.contiguous().view(torch.uint8)
