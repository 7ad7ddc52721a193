import copy
import gc
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fxpipe
from fxpipe.recipes.deferred import is_recorded, replay
from fxpipe.recipes.recorder import RecordingMode
from tests.recipes.test_constructors import assert_same_bits, named, values


def both(build, after=lambda model: model, seed=3):
    """Build plainly and recorded, then do something to both after the block; give both sets of tensors."""
    torch.manual_seed(seed)
    plain = named(after(build()))
    end = torch.get_rng_state()
    with fxpipe.deferred_init(seed=seed):
        model = build()
    recorded = named(after(model))
    assert torch.equal(torch.get_rng_state(), end)
    return plain, recorded


def assert_equal(plain, recorded):
    assert list(plain) == list(recorded)
    for name, value in values(recorded).items():
        assert_same_bits(value, plain[name])


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")  # torch, once, when one is copied
@pytest.mark.parametrize(
    "after",
    [
        lambda model: nn.init.zeros_(model[0].weight) is None or model,
        lambda model: nn.init.normal_(model[1].weight) is None or model,
        lambda model: nn.init.trunc_normal_(model[1].weight) is None or model,
        lambda model: model.to(torch.bfloat16),
        lambda model: model.half().float(),
        lambda model: copy.deepcopy(model),
        lambda model: nn.Sequential(model, nn.Linear(3, 3)),
        lambda model: [parameter.data.mul_(2) for parameter in model.parameters()] and model,
        lambda model: model.load_state_dict({"0.bias": torch.arange(5.0)}, strict=False) and model,
        lambda model: model[0].weight.data.copy_(torch.from_numpy(np.eye(5, 4, dtype=np.float32))) is None or model,
        lambda model: nn.utils.parametrizations.weight_norm(model[0]) and model,
        lambda model: nn.Sequential(nn.Linear(int(model[0].weight.sum().abs().item() * 100) % 7 + 1, 2)),
    ],
)
def test_what_is_done_after_the_block_is_recorded_as_well(after):
    assert_equal(*both(lambda: nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)), after))


def test_seed_none_goes_on_from_where_the_generator_stands():
    torch.manual_seed(8)
    torch.rand(3)
    plain = nn.Linear(4, 4)
    torch.manual_seed(8)
    torch.rand(3)
    with fxpipe.deferred_init(seed=None):
        model = nn.Linear(4, 4)
    assert_equal(named(plain), named(model))


def test_a_block_inside_another_only_seeds():
    with fxpipe.deferred_init(seed=1):
        first = nn.Linear(3, 3)
        with fxpipe.deferred_init(seed=2):
            second = nn.Linear(3, 3)
        third = nn.Linear(3, 3)
    torch.manual_seed(1)
    expected = [nn.Linear(3, 3)]
    torch.manual_seed(2)
    expected += [nn.Linear(3, 3), nn.Linear(3, 3)]
    assert_equal(named(nn.ModuleList(expected)), named(nn.ModuleList([first, second, third])))


@pytest.mark.parametrize("outside", [True, False])
def test_a_model_on_meta_gets_the_numbers_it_would_get_on_the_cpu(outside):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 5), nn.LSTM(5, 3))
    end = torch.get_rng_state()
    if outside:
        with torch.device("meta"), fxpipe.deferred_init(seed=0):
            model = nn.Sequential(nn.Linear(4, 5), nn.LSTM(5, 3))
    else:
        with fxpipe.deferred_init(seed=0), torch.device("meta"):
            model = nn.Sequential(nn.Linear(4, 5), nn.LSTM(5, 3))
    assert torch.equal(torch.get_rng_state(), end)
    assert_equal(named(plain), named(model))


def test_layers_on_meta_beside_layers_on_the_cpu_do_not_get_the_same_numbers():
    with fxpipe.deferred_init(seed=0):
        with torch.device("meta"):
            one = nn.Linear(6, 6)
        other = nn.Linear(6, 6)
    torch.manual_seed(0)
    assert_equal(named(nn.Linear(6, 6)), named(other))
    assert not torch.equal(values(named(one))["weight"], values(named(other))["weight"])


def test_an_exception_leaves_the_generator_where_a_plain_build_leaves_it():
    def build():
        nn.Linear(5, 5)
        raise KeyError("stop")

    torch.manual_seed(0)
    with pytest.raises(KeyError):
        build()
    end = torch.get_rng_state()
    with pytest.raises(KeyError), fxpipe.deferred_init(seed=0):
        build()
    assert torch.equal(torch.get_rng_state(), end)
    assert not is_recorded(torch.empty(2))
    assert type(torch.Generator()) is torch.Generator


def test_own_generators_stand_afterwards_where_a_plain_build_leaves_them():
    def build(generator):
        return torch.empty(100).normal_(generator=generator), torch.randn(5, generator=generator)

    one, other = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    build(one)
    with fxpipe.deferred_init():
        build(other)
    assert torch.equal(one.get_state(), other.get_state())


def test_memory_that_nothing_fills_has_no_value():
    with fxpipe.deferred_init():
        model = nn.Module()
        model.whole = nn.Parameter(torch.empty(4))
        model.part = nn.Parameter(torch.empty(4))
        model.rest = nn.Parameter(torch.empty(4))
        model.computed = nn.Parameter(torch.empty(3) * 2)
        model.meant = nn.Parameter(torch.empty(4))
        with torch.no_grad():
            model.part[:2] = 1
            model.rest[:2] = 1
            model.rest[2:] = 2
            model.meant[:] = float("nan")
    found = values(named(model))
    assert [name for name, value in found.items() if value is None] == ["whole", "part", "computed"]
    assert found["rest"].tolist() == [1, 1, 2, 2]


def test_memory_of_minus_ones_counts_as_filled():
    with fxpipe.deferred_init():
        table = torch.empty(6, dtype=torch.int64)
        table[:3] = -1
        table[3:] = -1
    assert dict(replay({"table": table}))["table"].tolist() == [-1] * 6


def test_values_are_given_one_after_another_while_others_draw():
    with fxpipe.deferred_init(seed=5):
        model = nn.Sequential(*(nn.Linear(30, 30) for _ in range(4)))
    found = {}
    for name, value in replay(dict(model.named_parameters())):
        torch.manual_seed(99)  # what the caller does in between does not matter
        found[name] = value
    torch.manual_seed(5)
    plain = nn.Sequential(*(nn.Linear(30, 30) for _ in range(4)))
    for name, parameter in plain.named_parameters():
        assert torch.equal(found[name], parameter)


def test_values_do_not_depend_on_the_settings_at_the_time_they_are_made():
    def build():
        layer = nn.Linear(4, 4)
        layer.register_buffer("table", torch.arange(4) / 3)
        return layer

    torch.manual_seed(0)
    plain = build()
    with fxpipe.deferred_init(seed=0):
        model = build()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            found = dict(replay(named(model)))
    finally:
        torch.set_default_dtype(torch.float32)
    for name, tensor in named(plain).items():
        assert_same_bits(found[name], tensor)


@pytest.mark.parametrize("default", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_what_is_left_out_between_two_tensors_is_stepped_over_whatever_the_default_dtype(dtype, default):
    def build():
        return nn.Sequential(*(nn.Linear(5, width, dtype=dtype) for width in (3, 7, 64, 5)))

    torch.manual_seed(0)
    plain = named(build())
    with fxpipe.deferred_init(seed=0):
        recorded = named(build())
    torch.set_default_dtype(default)
    try:
        for left_out in (0, 1, 2, 3):
            kept = {name: tensor for place, (name, tensor) in enumerate(recorded.items()) if place % 4 != left_out}
            for name, value in dict(replay(kept)).items():
                assert_same_bits(value, plain[name])
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_recording_lives_no_longer_than_its_tensors():
    with fxpipe.deferred_init():
        model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    mode = weakref.ref(model[0].weight.fake_mode)
    assert isinstance(mode(), RecordingMode)
    del model
    gc.collect()
    assert mode() is None


def test_recorded_tensors_need_no_memory():
    with fxpipe.deferred_init():
        layer = nn.Linear(10**6, 10**6)  # 4 terabytes
        nn.init.normal_(layer.weight)
    assert is_recorded(layer.weight)


def test_a_small_part_of_a_large_model_is_cheap():
    with fxpipe.deferred_init(seed=2):
        first = nn.Linear(10**6, 10**6)
        last = nn.Linear(4, 3)
    assert dict(replay({"bias": last.bias}))["bias"].shape == (3,)
    assert is_recorded(first.weight)


# --- refusals ---


def test_a_generator_of_a_device_that_is_not_there_is_refused(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with (
        pytest.raises(fxpipe.MaterializeError, match=r"generator of cuda is made in deferred_init.*\n  use one of the"),
        fxpipe.deferred_init(),
    ):
        torch.Generator("cuda")
    with (
        pytest.raises(fxpipe.MaterializeError, match=r"torch.empty asks for cuda, and there is no"),
        fxpipe.deferred_init(),
    ):
        nn.Linear(3, 3, device="cuda")


def test_tensors_without_memory_from_outside_are_refused():
    meta = torch.empty(3, device="meta")
    with (
        pytest.raises(fxpipe.MaterializeError, match=r"tensor \(3,\) without memory.*\n  make it inside"),
        fxpipe.deferred_init(),
    ):
        torch.ones(3) + meta
    with FakeTensorMode():
        fake = torch.empty(3)
    with pytest.raises(fxpipe.MaterializeError, match=r"without memory"), fxpipe.deferred_init():
        torch.zeros(3).copy_(fake)


def test_tensors_of_another_recording_give_their_values():
    with fxpipe.deferred_init(seed=1):
        first = nn.Linear(3, 3)
    with fxpipe.deferred_init(seed=2):
        second = nn.Linear(3, 3)
        second.weight.data.copy_(first.weight)
    second.bias.data.add_(first.bias)
    found = values(named(second))
    torch.manual_seed(1)
    first = nn.Linear(3, 3)
    torch.manual_seed(2)
    second = nn.Linear(3, 3)
    assert torch.equal(found["weight"], first.weight)
    assert torch.equal(found["bias"], second.bias + first.bias)


def test_addresses_and_writes_past_torch_are_refused():
    with fxpipe.deferred_init():
        weight = torch.rand(3)
        with pytest.raises(fxpipe.MaterializeError, match="data_ptr"):
            weight.data_ptr()
        with pytest.raises(ValueError, match="read-only"):
            weight.numpy()[0] = 1


def test_memory_from_outside_is_written_as_in_a_plain_build():
    table = torch.zeros(3)
    with fxpipe.deferred_init(seed=1):
        table += 1
        table.add_(torch.full((3,), 2.0))
        table[1:].uniform_()
        later = torch.rand(2)
    torch.manual_seed(1)
    expected = torch.full((3,), 3.0)
    expected[1:].uniform_()
    assert torch.equal(table, expected)
    assert torch.equal(dict(replay({"later": later}))["later"], torch.rand(2))
