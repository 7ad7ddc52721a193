"""A recorded constructor gives the bits of a plain one: all tensors at once, and each alone."""

import warnings

import pytest
import torch

import fxpipe
from fxpipe.recipes.deferred import is_recorded, replay
from tests.recipes.constructors import CONSTRUCTORS


def named(module):
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def eager(build, seed=0):
    torch.manual_seed(seed)
    return build(), torch.get_rng_state()


def values(tensors):
    recorded = {name: tensor for name, tensor in tensors.items() if is_recorded(tensor)}
    return {**tensors, **dict(replay(recorded))}


def assert_same_bits(found, expected):
    assert found is not None
    assert (found.dtype, found.shape, found.stride()) == (expected.dtype, expected.shape, expected.stride())
    assert not is_recorded(found)
    assert torch.equal(bits(found), bits(expected))


def bits(tensor):
    return tensor.detach().resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8)


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_a_recorded_constructor_gives_the_bits_of_a_plain_one(name):
    build = CONSTRUCTORS[name]
    plain, after = eager(build, seed=11)
    with fxpipe.deferred_init(seed=11):
        model = build()
    assert torch.equal(torch.get_rng_state(), after)
    expected, tensors = named(plain), named(model)
    assert list(tensors) == list(expected)
    assert any(map(is_recorded, tensors.values()))
    for fqn, value in values(tensors).items():
        assert_same_bits(value, expected[fqn])
        assert tensors[fqn].requires_grad == expected[fqn].requires_grad
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_each_tensor_alone_has_its_bits(name):
    build = CONSTRUCTORS[name]
    plain, _ = eager(build, seed=12)
    with fxpipe.deferred_init(seed=12):
        model = build()
    expected, tensors = named(plain), named(model)
    for fqn in reversed(tensors):
        assert_same_bits(values({fqn: tensors[fqn]})[fqn], expected[fqn])


def test_warnings_are_those_of_a_plain_build():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with fxpipe.deferred_init():
            for build in CONSTRUCTORS.values():
                build()
