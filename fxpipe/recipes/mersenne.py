"""Skip ahead in torch's CPU random generator: the state after ``n`` draws, without drawing.

The generator is MT19937: 624 words of 32 bits, of which each new one is a linear function over GF(2) of three earlier
ones. Stepping by one word is a linear map whose characteristic polynomial has degree 19,937; so the state after ``n``
steps is a polynomial in the map applied to the state: the remainder of ``t ** n`` modulo that polynomial.

Sources: Matsumoto and Nishimura 1998, ACM TOMACS 8(1), 3-30 (recurrence and polynomial); Haramoto et al. 2008, INFORMS
J. Computing 20(3), 385-390 (the jump); ``CPUGeneratorImpl`` in torch's ``aten/src/ATen`` (layout of the state).
"""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt
import torch

Words = npt.NDArray[np.uint32]

SIZE = 624
_MIDDLE = 397
_DEGREE = 19937
_TWIST = 0x9908B0DF
_UPPER, _LOWER = 0x80000000, 0x7FFFFFFF
_FEW_BLOCKS = 256
"""Up to so many rounds of 624 words are computed one after another: cheaper than a polynomial."""

STATE_BYTES = 5056
_LEFT, _NEXT, _WORDS, _CACHED = 8, 16, 24, 24 + 8 * SIZE
"""Offsets: an int32, an int64, the words as uint64 each, and normal samples drawn but not yet given."""


def advance(state: torch.Tensor, draws: int) -> torch.Tensor:
    """Give the state of torch's CPU generator after a number of 32-bit draws.

    Args:
        state: What ``torch.get_rng_state`` gives: 5056 bytes; not modified.
        draws: How many 32-bit words to skip, 0 or more.

    Returns:
        The state, equal byte for byte to one that was reached by drawing.

    O(log draws) time, at most some tens of milliseconds; 0.2 MB of memory.

    >>> generator = torch.Generator().manual_seed(3)
    >>> later = advance(generator.get_state(), 1000)
    >>> _ = torch.rand(1000, generator=generator)
    >>> torch.equal(later, generator.get_state())
    True
    """
    bytes_ = _bytes(state).copy()
    left, following = bytes_[_LEFT : _LEFT + 4].view(np.int32), bytes_[_NEXT : _NEXT + 8].view(np.int64)
    words = bytes_[_WORDS:_CACHED].view(np.uint64)
    # A generator that has just been seeded counts one word left and none used, but makes new words at the first draw.
    used = SIZE if left[0] == 1 and following[0] == 0 else int(following[0])
    if draws:
        blocks = (used + draws - 1) // SIZE
        words[:] = _after_blocks(words.astype(np.uint32), blocks)
        following[0] = used + draws - blocks * SIZE
        left[0] = SIZE + 1 - following[0]
    return torch.from_numpy(bytes_)


def has_cached_normal(state: torch.Tensor) -> bool:
    """Tell whether the generator holds a normal sample that the next small ``normal_`` takes first."""
    return bool(_bytes(state)[_CACHED:].any())


def words_of(state: torch.Tensor) -> npt.NDArray[np.uint64]:
    """Give the words in a state, one in each uint64; they share its memory."""
    return _bytes(state)[_WORDS:_CACHED].view(np.uint64)


def rewind_words(state: torch.Tensor) -> None:
    """Mark, in place, all words of a state as used, and no normal sample as kept."""
    bytes_ = _bytes(state)
    bytes_[_LEFT : _LEFT + 4].view(np.int32)[0] = 1
    bytes_[_NEXT : _NEXT + 8].view(np.int64)[0] = 0
    bytes_[_CACHED:] = 0


def _bytes(state: torch.Tensor) -> npt.NDArray[np.uint8]:
    found: npt.NDArray[np.uint8] = state.numpy()
    assert found.nbytes == STATE_BYTES, "the state is not that of torch's CPU generator"
    return found


def _after_blocks(words: Words, blocks: int) -> Words:
    """Give the window of words after a number of rounds, each of which replaces all of them."""
    if blocks == 0:
        return words
    # The lower bits of the oldest word take no part in the recurrence: a jump is exact only after one round.
    words, blocks = _next_block(words), blocks - 1
    if blocks <= _FEW_BLOCKS:
        for _ in range(blocks):
            words = _next_block(words)
        return words
    return _apply(_power(SIZE * blocks), words)


def _next_block(words: Words) -> Words:
    """Compute the next 624 words; each range needs words that the range before has computed."""
    both = np.concatenate([words, np.empty(SIZE, np.uint32)])
    for start, stop in ((0, SIZE - _MIDDLE), (SIZE - _MIDDLE, 2 * (SIZE - _MIDDLE)), (2 * (SIZE - _MIDDLE), SIZE)):
        following = both[start + 1 : stop + 1]
        mixed = (both[start:stop] & np.uint32(_UPPER)) | (following & np.uint32(_LOWER))
        twist = np.where(following & np.uint32(1), np.uint32(_TWIST), np.uint32(0))
        both[SIZE + start : SIZE + stop] = both[_MIDDLE + start : _MIDDLE + stop] ^ (mixed >> np.uint32(1)) ^ twist
    return both[SIZE:]


def _apply(polynomial: int, words: Words) -> Words:
    """Apply a polynomial in the step to a window: the sum of the windows that its exponents name."""
    blocks = [words]
    for _ in range(_DEGREE // SIZE + 1):
        blocks.append(_next_block(blocks[-1]))
    windows = np.lib.stride_tricks.sliding_window_view(np.concatenate(blocks), SIZE)
    digits = np.frombuffer(polynomial.to_bytes(_DEGREE // 8 + 1, "little"), np.uint8)
    exponents = np.flatnonzero(np.unpackbits(digits, bitorder="little"))
    total = np.zeros(SIZE, np.uint32)
    for start in range(0, len(exponents), 256):  # few enough at a time to stay in the processor's cache
        total ^= np.bitwise_xor.reduce(windows[exponents[start : start + 256]], axis=0)
    return total


@functools.lru_cache(maxsize=64)
def _power(exponent: int) -> int:
    """Give ``t ** exponent`` modulo the characteristic polynomial; bit ``i`` is the coefficient of ``t ** i``."""
    power = 1
    for digit in f"{exponent:b}":
        # A square over GF(2) has the same digits with zeros between: they are read again in base four.
        power = _remainder(int(f"{power:b}", 4) << (digit == "1"))
    return power


def _remainder(polynomial: int) -> int:
    """Reduce modulo the characteristic polynomial."""
    return polynomial ^ _multiple(_quotient(polynomial >> _DEGREE))


def _quotient(factor: int) -> int:
    """Divide ``factor * t^19937`` by the characteristic polynomial ``t^19937 (1 + w)``; gives the whole part.

    ``w`` has no term above ``t^-623``. Over GF(2), ``1 / (1 + w)`` is the product of all ``1 + w^(2^k)``, and each of
    these is ``1 + w`` in ``t^(2^k)``. What a product leaves below one takes no part in the whole part of the next.
    """
    digits, scale = factor.bit_length(), 1
    while (SIZE - 1) * scale < digits:
        factor, scale = _scaled(factor, scale, digits), 2 * scale
    return factor


def _scaled(factor: int, scale: int, digits: int) -> int:
    """Multiply by ``1 + w`` in ``t^scale``, the characteristic polynomial (``_multiple``) over its first term."""
    total, step = factor, (SIZE - _MIDDLE) * scale  # u and v over their first terms are 1 + t^-227
    left = 32
    for index in range(31):
        shift = (SIZE - 1) * (index + 1) * scale
        if shift >= digits:
            break
        total, left = total ^ (total >> step), left - 1
        if _TWIST >> index & 1:
            total ^= factor >> shift
    for power in (1, 2, 4, 8, 16, 32):  # (1 + x)^(2^k) is 1 + x^(2^k)
        if left & power:
            total ^= total >> (step * power)
    return total ^ (factor >> (_DEGREE * scale)) if _TWIST >> 31 & 1 else total


def _multiple(factor: int) -> int:
    """Multiply by the characteristic polynomial, ``u (v^31 + a_0 v^30 + ... + a_30) + a_31``, by Horner's rule.

    ``u = t^624 + t^397`` and ``v = t^623 + t^396``; ``a_i`` are the bits of the twist, 31 the number of lower bits.
    """
    total = factor
    for index in range(31):
        total = (total << (SIZE - 1)) ^ (total << (_MIDDLE - 1))
        if _TWIST >> index & 1:
            total ^= factor
    total = (total << SIZE) ^ (total << _MIDDLE)
    return total ^ factor if _TWIST >> 31 & 1 else total
