import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxpipe.recipes.mersenne import _DEGREE, _multiple, _power, _remainder, advance, has_cached_normal


def stepped(generator, draws):
    while draws:
        some = min(draws, 1 << 20)
        torch.empty(some).uniform_(generator=generator)
        draws -= some
    return generator.get_state()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**64 - 1),
    before=st.integers(0, 2000),
    draws=st.one_of(st.integers(0, 3000), st.integers(0, 2_000_000)),
    cached=st.booleans(),
)
def test_a_jump_equals_stepping(seed, before, draws, cached):
    generator = torch.Generator().manual_seed(seed)
    stepped(generator, before)
    if cached:
        torch.empty(3).normal_(generator=generator)
    state = generator.get_state()
    assert has_cached_normal(state) == cached
    jumped = advance(state, draws)
    assert torch.equal(jumped, stepped(generator, draws))
    assert has_cached_normal(jumped) == cached


def test_a_long_jump_equals_stepping():
    generator = torch.Generator().manual_seed(5)
    state = generator.get_state()
    assert torch.equal(advance(state, 123_456_789), stepped(generator, 123_456_789))


@given(one=st.integers(0, 10**14), other=st.integers(0, 10**14), seed=st.integers(0, 9))
@settings(max_examples=20, deadline=None)
def test_two_jumps_are_one(one, other, seed):
    state = torch.Generator().manual_seed(seed).get_state()
    assert torch.equal(advance(advance(state, one), other), advance(state, one + other))


def test_the_polynomial_has_its_published_weight():
    """135 terms: Matsumoto and Nishimura 1998, table II."""
    polynomial = _multiple(1)
    assert polynomial.bit_length() == _DEGREE + 1
    assert polynomial.bit_count() == 135
    assert _remainder(polynomial) == 0
    # 2^19937 - 1 is prime, and the order of the step: the polynomial is primitive.
    assert _power(2**_DEGREE - 1) == 1


@pytest.mark.parametrize("draws", [0, 1, 623, 624, 625, 1247, 1248, 1249])
def test_a_jump_ends_where_a_round_of_words_does(draws):
    for before in (0, 1, 623, 624):
        generator = torch.Generator().manual_seed(1)
        stepped(generator, before)
        assert torch.equal(advance(generator.get_state(), draws), stepped(generator, draws))


def test_the_state_asked_about_is_left_alone():
    state = torch.Generator().manual_seed(1).get_state()
    before = state.clone()
    advance(state, 10**6)
    assert torch.equal(state, before)
