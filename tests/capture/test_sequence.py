import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxpipe.capture.model.sequence import SpecSequential
from fxpipe.errors import SpecError, TieError
from fxpipe.ir.spec import LayerSpec, TiedLayerSpec
from fxpipe.recipes.deferred import replay


class Head(nn.Module):
    def __init__(self, width, words):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.proj = nn.Linear(width, words)

    def forward(self, x):
        return self.proj(self.norm(x))


def logits(module, x):
    return F.linear(x, module.weight)


def test_the_sequence_computes_what_its_layers_compute_in_order():
    torch.manual_seed(0)
    model = SpecSequential([LayerSpec(nn.Linear, 3, 4), torch.tanh, nn.Dropout(0.0), LayerSpec(nn.Linear, 4, 2)])
    torch.manual_seed(0)
    reference = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.0), nn.Linear(4, 2))
    x = torch.randn(5, 3)
    assert torch.equal(model(x), reference(x))


def test_names_are_place_and_name():
    model = SpecSequential([LayerSpec(nn.Linear, 3, 4), F.gelu, LayerSpec(Head, 4, 2)])
    assert list(model.state_dict()) == [
        *("0.weight", "0.bias"),
        *("2.norm.weight", "2.norm.bias", "2.proj.weight", "2.proj.bias"),
    ]


def test_built_under_meta_it_allocates_nothing():
    with torch.device("meta"):
        model = SpecSequential(
            [
                TiedLayerSpec("e", nn.Embedding, 10**9, 10**6),
                LayerSpec(nn.Linear, 10**6, 10**6),
                TiedLayerSpec("e", nn.Linear, 10**6, 10**9, bias=False),
            ]
        )
    assert all(p.is_meta for p in model.parameters())


def test_several_inputs_reach_the_first_layer_as_one_tuple():
    model = SpecSequential([lambda pair: (pair[0] + pair[1], pair[0]), lambda pair: pair[0] * pair[1]])
    assert model(torch.tensor(2.0), torch.tensor(3.0)) == 10


def test_specs_stay_readable_by_place():
    given = [LayerSpec(nn.Linear, 2, 2), F.gelu]
    assert SpecSequential(given).specs == tuple(given)


def test_tied_layers_of_one_class_are_one_module_built_once():
    built = []

    class Counting(nn.Embedding):
        def __init__(self, *args):
            built.append(args)
            super().__init__(*args)

    same = functools.partial(TiedLayerSpec, "e", Counting, 7, 4)
    model = SpecSequential([same(), F.gelu, same(forward_fn=logits), torch.argmax, same()])
    assert built == [(7, 4)]
    assert model.tied_modules == {"e": model.get_submodule("0")}
    assert model.get_submodule("0") is model.get_submodule("2") is model.get_submodule("4")
    assert [name for name, _ in model.named_parameters(remove_duplicate=False)] == ["0.weight", "2.weight", "4.weight"]


def test_forward_fn_is_used_at_its_own_place_only():
    embed = TiedLayerSpec("e", nn.Embedding, 7, 4)
    model = SpecSequential([embed, TiedLayerSpec("e", nn.Embedding, 7, 4, forward_fn=logits)])
    weight = model.get_parameter("0.weight")
    ids = torch.tensor([1, 2])
    assert torch.equal(model(ids), weight[ids] @ weight.T)


def test_tied_layers_of_other_classes_share_the_named_attributes_alone():
    model = SpecSequential(
        [
            TiedLayerSpec("e", nn.Embedding, 7, 4),
            TiedLayerSpec("e", nn.Linear, 4, 7),
            TiedLayerSpec("e", nn.Linear, 4, 7, bias=False),
        ]
    )
    first, second, third = (model.get_submodule(str(place)) for place in range(3))
    assert first.weight is second.weight is third.weight
    assert (len({first, second, third}), second.bias.shape) == (3, (7,))
    assert model.tied_modules == {"e": first}


def test_several_attributes_are_tied_by_name():
    both = ["weight", "bias"]
    first = TiedLayerSpec("k", nn.Linear, 4, 4, tied_weight_attr=both)
    model = SpecSequential([first, TiedLayerSpec("k", Norm, 4, tied_weight_attr=both)])
    assert model.get_parameter("0.weight") is model.get_parameter("1.weight")
    assert model.get_parameter("0.bias") is model.get_parameter("1.bias")


class Norm(nn.Linear):
    def __init__(self, width):
        super().__init__(width, width)


@pytest.mark.parametrize("attr", ["proj.weight", "proj_weight"])
def test_a_tied_attribute_may_lie_deeper_or_be_a_property(attr):
    class Deep(Head):
        proj_weight = property(lambda self: self.proj.weight)

    model = SpecSequential(
        [TiedLayerSpec("e", nn.Embedding, 7, 4), TiedLayerSpec("e", Deep, 4, 7, tied_weight_attr=attr)]
    )
    assert model.get_parameter("0.weight") is model.get_parameter("1.proj.weight")


def test_tied_parameters_of_different_shapes_are_refused_naming_both():
    with pytest.raises(TieError, match=r"ties 0\.weight \(7, 4\) float32 to 1\.weight \(8, 4\) float32"):
        SpecSequential([TiedLayerSpec("e", nn.Embedding, 7, 4), TiedLayerSpec("e", nn.Linear, 4, 8)])


@pytest.mark.parametrize("attr", ["nothing", "bias", "in_features"])
def test_a_tied_attribute_that_is_no_parameter_is_refused_at_its_first_place(attr):
    with pytest.raises(TieError, match=f"the attribute '{attr}' of place 0, but Linear has no such parameter"):
        SpecSequential([TiedLayerSpec("e", nn.Linear, 7, 4, bias=False, tied_weight_attr=attr)])


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([], "is empty"),
        ([LayerSpec(nn.Identity), None], "place 1 of the sequence is None"),
        ([nn.Linear], "wrap a class"),
        ([LayerSpec.captured("h.0", "m:Block")], "captured layer 'h.0'"),
    ],
)
def test_what_is_no_layer_is_refused_by_its_place(layers, message):
    with pytest.raises(SpecError, match=message):
        SpecSequential(layers)


@pytest.mark.parametrize("seed", [0, 3])
def test_recorded_values_are_those_of_a_whole_build_in_order(seed):
    specs = [LayerSpec(nn.Linear, 3, 4), F.gelu, LayerSpec(nn.BatchNorm1d, 4), LayerSpec(Head, 4, 2)]
    with torch.device("meta"):
        model = SpecSequential(specs)
    before = torch.get_rng_state()
    recorded = model.recorded(seed)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(seed)
    whole = SpecSequential(specs).state_dict()
    assert sorted(recorded) == sorted(whole)
    for fqn, tensor in recorded.items():
        assert torch.equal(dict(replay({fqn: tensor}))[fqn], whole[fqn])


def test_a_module_that_stands_in_the_sequence_itself_is_not_recorded():
    model = SpecSequential([nn.Linear(2, 2, device="meta"), LayerSpec(nn.Linear, 2, 2)])
    assert sorted(model.recorded(0)) == ["1.bias", "1.weight"]
