import json
import math

import pytest

from fxpipe.errors import PlanError
from fxpipe.ir.cost import LayerCost
from fxpipe.ir.profile import Profile

COSTS = {"h.1": LayerCost(1e-3, 2e-3, 3e-3), "wte": LayerCost(1e-4), "h.0": LayerCost(1e-3, 2e-3, 3e-3)}


def test_a_profile_survives_json_and_does_not_depend_on_the_order_of_layers():
    profile = Profile.of("laptop", COSTS)
    assert Profile.from_json(profile.to_json()) == profile == Profile.of("laptop", dict(reversed(COSTS.items())))
    assert profile.costs == COSTS
    assert hash(profile) == hash(Profile.from_json(profile.to_json()))


def test_equal_layers_name_the_same_times():
    data = json.loads(Profile.of("laptop", COSTS).to_json())
    assert len(data["times"]) == 2
    assert data["layers"]["h.0"] == data["layers"]["h.1"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"format": 99, "unit": "seconds"}',
        '{"format": 1, "unit": "ms", "device": "x", "times": [], "layers": {}}',
        '{"format": 1, "unit": "seconds", "device": "x", "times": [], "layers": {"a": 0}}',
        '{"format": 1, "unit": "seconds", "device": "x", "times": [{"forward": 1}], "layers": {"a": 0}}',
        '{"format": 1, "unit": "seconds", "device": "x", "times": [], "layers": {"a": -1}}',
        '{"format": 1, "unit": "seconds", "device": "x", "times": [], "layers": 3}',
    ],
)
def test_damaged_text_is_a_plan_error(text):
    with pytest.raises(PlanError, match="profile"):
        Profile.from_json(text)


@pytest.mark.parametrize("seconds", [-1.0, math.nan, math.inf, "1", True])
def test_what_is_no_time_is_refused_by_layer(seconds):
    with pytest.raises(PlanError, match="layer 'head'"):
        Profile.of("laptop", {"head": LayerCost(0.0, seconds)})


def test_a_layer_named_twice_is_refused():
    with pytest.raises(PlanError, match="'a' twice"):
        Profile("laptop", (("a", LayerCost(1.0)), ("a", LayerCost(2.0))))
