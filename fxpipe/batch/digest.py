"""A number that tells one batch from another of the same shape: what ranks compare before they exchange anything."""

from __future__ import annotations

import zlib
from collections.abc import Iterable

import torch

from fxpipe.batch.inputs import Inputs

WHOLE_BYTES = 1 << 20
"""Tensors up to this size are read whole, of larger ones ``NUM_PIECES`` pieces."""
NUM_PIECES = 16
PIECE_BYTES = 1 << 16


def digest_inputs(microbatches: Iterable[Inputs]) -> int:
    """Give a checksum of the tensors on the host; those on an accelerator are not read back.

    Two batches of equal checksums are almost surely equal where their tensors are small; of large tensors pieces are
    read, spread evenly: shuffled data differ in all of them.

    Args:
        microbatches: The named tensors of each.

    Returns:
        32 bits; 0 where nothing lies on the host.
    """
    found = 0
    for inputs in microbatches:
        for name, tensor in inputs.tensors.items():
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu" and tensor.layout == torch.strided:
                found = digest_tensor(tensor, zlib.crc32(name.encode(), found))
    return found


def digest_tensor(tensor: torch.Tensor, start: int = 0) -> int:
    """Give the CRC-32 of a tensor's bytes, of a large one's pieces.

    >>> digest_tensor(torch.arange(4)) == digest_tensor(torch.arange(5)[:4]) != digest_tensor(torch.arange(1, 5))
    True
    """
    if tensor.is_meta or not tensor.numel():
        return start
    flat = tensor.detach().resolve_conj().resolve_neg().reshape(-1)
    if flat.numel() * flat.element_size() > WHOLE_BYTES:
        width = max(PIECE_BYTES // flat.element_size(), 1)
        first = torch.linspace(0, flat.numel() - width, NUM_PIECES, dtype=torch.float64).long().tolist()
        flat = torch.cat([flat[at : at + width] for at in first])
    return zlib.crc32(flat.contiguous().view(torch.uint8).numpy().tobytes(), start)
