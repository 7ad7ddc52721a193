"""What people train, recorded: every parameter and buffer has the bits of a plain build, on any number of stages."""

import warnings

import pytest
import torch

import fxpipe
from fxpipe.recipes.deferred import replay
from tests.capture.architectures import ARCHITECTURES, split
from tests.recipes.test_constructors import assert_same_bits, named

STAGES = (1, 2, 4, 8)


def built(name, seed=0):
    """Build plainly and recorded; give both models."""
    build = ARCHITECTURES[name].build
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries
        torch.manual_seed(seed)
        plain = build()
        end = torch.get_rng_state()
        with fxpipe.deferred_init(seed=seed):
            model = build()
    assert torch.equal(torch.get_rng_state(), end)
    return plain, model


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_tensor_of_an_architecture_has_its_bits_however_it_is_cut(name):
    plain, model = built(name)
    expected, tensors = named(plain), named(model)
    assert list(expected) == list(tensors)
    for parts in STAGES:
        size = -(-len(tensors) // parts)
        for start in range(0, len(tensors), size):
            found = dict(replay(dict(list(tensors.items())[start : start + size])))
            for fqn, value in found.items():
                assert_same_bits(value, expected[fqn])


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_stage_of_an_architecture_has_the_bits_of_a_plain_build(name):
    architecture = ARCHITECTURES[name]
    plain, model = built(name)
    expected = named(plain)
    args, kwargs = split(architecture.batch(1))
    for stages in STAGES:
        try:
            pipe = fxpipe.compile(model, stages, args, kwargs, microbatches=1, schedule="GPipe")
        except fxpipe.PartitionError:  # fewer layers than stages
            assert stages > 2
            continue
        pipe.materialize()
        for stage in pipe.stage_modules:
            for fqn, tensor in named(stage).items():
                assert_same_bits(tensor, expected[fqn])
        parameters = dict(pipe.named_parameters())
        assert set(parameters) <= {fqn for fqn, _ in plain.named_parameters()}
        first = {id(tensor): fqn for fqn, tensor in reversed(list(plain.named_parameters(remove_duplicate=False)))}
        held = {info.fqn for spec in pipe.graph.specs for info in spec.parameters}
        assert {first[id(expected[fqn])] for fqn in held} == set(parameters)
