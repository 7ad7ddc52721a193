"""The random generators that init functions draw from: seeded by name, and put back afterwards."""

import contextlib
import hashlib
import random
from collections.abc import Iterator

import numpy as np
import torch


def seed_generators(*names: object) -> None:
    """Seed torch's CPU generator, Python's and numpy's from a text: equal names give equal draws, in any process.

    >>> with kept_generators():
    ...     seed_generators(0, "h.3")
    ...     first = torch.rand(2)
    ...     seed_generators(0, "h.3")
    ...     bool((torch.rand(2) == first).all())
    True
    """
    text = "\n".join(str(name) for name in names)
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")  # torch's Mersenne twister takes 32 bits
    torch.default_generator.manual_seed(number)
    random.seed(number)
    np.random.seed(number)


@contextlib.contextmanager
def kept_generators() -> Iterator[None]:
    """Leave every global generator as it was, whatever is seeded and drawn inside."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    # Nothing here draws on an accelerator, but torch.manual_seed seeds them all.
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
