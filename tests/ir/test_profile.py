import json
import math

import pytest

from fxpipe.errors import PlanError
from fxpipe.ir.cost import LayerCost
from fxpipe.ir.hardware import Hardware
from fxpipe.ir.profile import LinkTime, Profile

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


def test_links_and_memory_survive_json_and_old_files_have_none():
    links = [LinkTime(1024, 2e-6), LinkTime(1 << 20, 1e-3), LinkTime(1024, 9e-6, far=True)]
    profile = Profile.of("laptop", COSTS, links=links, kept={"wte": 0, "h.0": 4096})
    assert Profile.from_json(profile.to_json()) == profile
    data = json.loads(profile.to_json())
    del data["links"], data["kept_bytes"]
    assert Profile.from_json(json.dumps(data)) == Profile.of("laptop", COSTS)


@pytest.mark.parametrize("link", [LinkTime(0, 1.0), LinkTime(8, 0.0), LinkTime(8, math.nan), LinkTime(8, -1.0)])
def test_what_is_no_message_is_refused(link):
    with pytest.raises(PlanError, match="profile has a message of"):
        Profile.of("laptop", {}, links=[link])
    with pytest.raises(PlanError, match="layer 'a' keeps -1 bytes"):
        Profile.of("laptop", {}, kept={"a": -1})


@pytest.mark.parametrize(("bandwidth", "latency"), [(1e9, 2e-6), (4e11, 0.0), (1e8, 1e-3)])
def test_measured_links_take_the_place_of_named_ones(bandwidth, latency):
    sizes = [1024 * 4**power for power in range(9)]
    near = [LinkTime(size, latency + size / bandwidth) for size in sizes]
    far = [LinkTime(size, 3 * (latency + size / bandwidth), far=True) for size in sizes]
    base = Hardware.preset("h100")
    assert Profile.of("laptop", {}).on_links(base) == base
    found = Profile.of("laptop", {}, links=near).on_links(base)
    assert found.link_bandwidth == pytest.approx(bandwidth, rel=1e-6)
    assert found.link_latency == pytest.approx(latency, rel=1e-6, abs=1e-12)
    assert found.internode_bandwidth == base.internode_bandwidth
    both = Profile.of("laptop", {}, links=[*near, *far]).on_links(base)
    assert both.internode_bandwidth == pytest.approx(bandwidth / 3, rel=1e-6)
    assert both.link_bandwidth == found.link_bandwidth


def test_links_whose_messages_take_equally_long_have_no_negative_numbers():
    found = Profile.of("laptop", {}, links=[LinkTime(1024, 3e-6), LinkTime(4096, 2e-6)]).on_links(
        Hardware.preset("cpu")
    )
    assert found.link_bandwidth > 0
    assert found.link_latency >= 0
