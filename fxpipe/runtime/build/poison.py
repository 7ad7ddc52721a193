"""Memory that tells whether it was written: tensors full of one byte, and a second byte to be sure.

Version counters do not see writes through ``.data`` or numpy, so what an init function fills is read off the memory.
Bytes of ones are a NaN in every usual float type. A value that looks untouched may still be meant (a buffer of -1, of
NaN), so the work is done again over another byte: what depends on the byte was never filled.
"""

import torch

POISON = 0xFF
OTHER_POISON = 0x5A


def poisoned(meta: torch.Tensor, byte: int) -> torch.Tensor:
    """Allocate a CPU tensor of the size, strides and dtype of a meta tensor, every byte of it ``byte``.

    >>> poisoned(torch.empty(2, 3, device="meta"), POISON).isnan().all()
    tensor(True)
    """
    flat = torch.full((meta.numel() * meta.element_size(),), byte, dtype=torch.uint8, device="cpu")
    return flat.view(meta.dtype).as_strided(meta.shape, meta.stride())


def looks_untouched(tensor: torch.Tensor) -> bool:
    """Tell whether an element may never have been written, or was computed from one; False is certain.

    >>> half = poisoned(torch.empty(4, device="meta"), POISON)
    >>> half[:2] = 0
    >>> looks_untouched(half), looks_untouched(half[:2])
    (True, False)
    """
    if tensor.dtype.is_complex or (tensor.is_floating_point() and tensor.element_size() > 1):
        return bool(tensor.sum().isnan())  # a sum meets every NaN, and needs no memory
    elements = _bytes(tensor).view(tensor.numel(), tensor.element_size())
    return bool((elements == POISON).all(dim=1).any())


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Tell whether two tensors are equal bit for bit, NaN included."""
    return torch.equal(_bytes(one), _bytes(other))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
