"""A state dictionary goes out and in; faults are listed all at once, and nothing is written before."""

import copy

import pytest
import torch
from torch import nn

from fxpipe.errors import WeightsError
from fxpipe.runtime.build.stage import StageParts, build_stages
from fxpipe.runtime.build.state import full_state, match_state, own_state, state_names, write_state

CPU = torch.device("cpu")


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(3))
        self.embed = nn.Embedding(5, 3)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)) for _ in range(2))
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("table", torch.rand(2), persistent=False)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))


def built(*parts):
    """A model, its names, and one stage per part."""
    torch.manual_seed(0)
    model = Model()
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    first = {}
    aliases = {fqn: first.setdefault(id(tensor), fqn) for fqn, tensor in named}
    values = {fqn: tensor.detach().clone() for fqn, tensor in named}
    specs = [StageParts(index, modules, attributes) for index, (modules, attributes) in enumerate(parts)]
    return model, state_names(model, aliases), build_stages(model, specs, values, aliases, CPU)


FIRST = (("embed", "blocks.0"), ("scale", "table"))
LAST = (("blocks.1",), ("head.weight", "count"))


def test_all_stages_together_give_the_model_s_own_state():
    model, names, stages = built(FIRST, LAST)
    expected = model.state_dict()
    for state in (own_state(names, stages), full_state(names, stages, None)):
        assert list(state) == list(expected)
        assert all(torch.equal(state[fqn], expected[fqn]) for fqn in expected)
        Model().load_state_dict(state)


def test_own_state_shares_memory_and_full_state_is_a_copy():
    _, names, stages = built(FIRST, LAST)
    own, full = own_state(names, stages), full_state(names, stages, None)
    with torch.no_grad():
        stages[0].scale += 1
    assert torch.equal(own["scale"], stages[0].scale)
    assert not torch.equal(full["scale"], stages[0].scale)
    assert not own["scale"].requires_grad


def test_a_stage_names_its_tensors_by_all_of_the_model_s_names():
    _, names, (stage,) = built(LAST)
    state = own_state(names, [stage])
    assert {"embed.weight", "head.weight", "count"} < set(state)
    assert "scale" not in state


def test_what_an_adapter_adds_is_saved_and_loaded():
    _, names, (stage,) = built(LAST)
    stage.blocks[1].adapter = nn.Linear(3, 3)
    state = {fqn: tensor + 1 for fqn, tensor in own_state(names, [stage]).items()}
    assert "blocks.1.adapter.weight" in state
    write_state(match_state(names, [stage], state))
    assert torch.equal(stage.blocks[1].adapter.weight, state["blocks.1.adapter.weight"])


def test_a_whole_or_a_partial_state_loads_and_other_stages_names_are_ignored():
    model, names, (stage,) = built(LAST)
    whole = {fqn: tensor + 1 for fqn, tensor in model.state_dict().items()}
    write_state(match_state(names, [stage], whole))
    own = own_state(names, [stage])
    assert all(torch.equal(own[fqn], whole[fqn]) for fqn in own)
    write_state(match_state(names, [stage], {fqn: own[fqn] * 2 for fqn in own if fqn != "embed.weight"}))


def test_a_non_persistent_buffer_may_be_given_and_may_be_left_out():
    model, names, (stage, _) = built(FIRST, LAST)
    state = model.state_dict()
    write_state(match_state(names, [stage], state))
    write_state(match_state(names, [stage], {**state, "table": torch.tensor([7.0, 8.0])}))
    assert stage.table.tolist() == [7.0, 8.0]


def test_all_faults_are_listed_at_once_and_nothing_is_written():
    model, names, stages = built(FIRST, LAST)
    state = {fqn: tensor + 1 for fqn, tensor in model.state_dict().items()}
    before = copy.deepcopy(own_state(names, stages))
    state["nowhere"] = torch.zeros(1)
    state["scale"] = torch.zeros(4)
    state["count"] = 3
    state["head.weight"] = state["embed.weight"] + 1
    del state["blocks.1.0.bias"]
    with pytest.raises(WeightsError) as caught:
        match_state(names, stages, state)
    first, second = str(caught.value).split("\n")
    for fault in (
        "unknown nowhere",
        "scale has shape [4], the model's has [3]",
        "count is a int, not a tensor",
        "head.weight and embed.weight are tied but differ",
        "missing blocks.1.0.bias [3]",
    ):
        assert fault in first
    assert first.count(";") == 4
    assert "nothing was changed" in second
    after = own_state(names, stages)
    assert all(torch.equal(after[fqn], before[fqn]) for fqn in before)
