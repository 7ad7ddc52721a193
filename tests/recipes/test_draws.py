import warnings

import pytest
import torch

import fxpipe
from fxpipe.recipes import draws
from fxpipe.recipes.deferred import replay
from fxpipe.recipes.mersenne import advance

aten = torch.ops.aten


@pytest.fixture
def fresh():
    draws._redraws.cache_clear()
    yield
    draws._redraws.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", ["uniform", "normal"])
def test_the_formulas_are_those_of_the_installed_torch(fresh, family, dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert draws._redraws(family, dtype) is not None


def test_a_large_tensor_draws_what_the_formula_says():
    generator = torch.Generator().manual_seed(2)
    before = generator.get_state()
    tensor = torch.empty(1_000_003).normal_(generator=generator)
    number = draws.count_draws(aten.normal_.default, tensor, lambda: False)
    assert torch.equal(advance(before, number), generator.get_state())


def test_operations_that_are_not_known_have_no_number():
    tensor = torch.empty(40)
    assert draws.count_draws(aten.exponential_.default, tensor, lambda: False) is None
    assert draws.count_draws(aten.normal_.default, tensor.to(torch.complex64), lambda: False) is None
    assert draws.count_draws(aten.normal_.default, tensor[:3], lambda: False) is None
    assert draws.count_draws(aten.normal_.default, tensor[:4], lambda: True) is None
    assert draws.count_draws(aten.normal_.default, tensor[:4], lambda: False) == 8


def test_where_torch_draws_otherwise_recording_is_slower_and_as_exact(fresh, monkeypatch):
    right = draws._formula
    monkeypatch.setattr(draws, "_formula", lambda *about: None if right(*about) is None else right(*about) + 1)

    def build():
        return torch.nn.Sequential(torch.nn.Linear(30, 20), torch.nn.Linear(20, 10), torch.nn.Embedding(9, 8))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with fxpipe.deferred_init(seed=4):
            model = build()
        found = dict(replay(dict(model.named_parameters())))
    torch.manual_seed(4)
    for name, parameter in build().named_parameters():
        assert torch.equal(found[name], parameter)
    texts = [str(each.message) for each in caught]
    assert len(texts) == 2  # one for uniform, one for normal numbers
    assert all("slower and as exact" in text for text in texts)
