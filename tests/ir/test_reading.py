"""Plans and profiles that anybody may have written: one error that names the place, or a value that holds."""

from __future__ import annotations

import copy
import json
import random
import tracemalloc
from typing import Any

import pytest

import fxpipe
from fxpipe.errors import PlanError
from fxpipe.ir.cost import LayerCost
from fxpipe.ir.hardware import Hardware, Training
from fxpipe.ir.plan import FORMAT, PipelinePlan, StagePlan, TieGroup
from fxpipe.ir.profile import Profile
from fxpipe.ir.tensor import TensorMeta
from fxpipe.planning.simulation.simulate import simulate

PLAN = PipelinePlan(
    "GPT", "abc",
    (
        StagePlan(0, 0, ("wte", "h.0"), 7, 28, 0.5, 0.1, 0.3, sends=(TensorMeta((4, 8), "float32", True),)),
        StagePlan(1, 1, ("h.1", "lm_head"), 7, 28, 0.4, 0.1, 0.2, duplicated=("mask",)),
    ),
    (TieGroup("wte.weight", ("wte.weight", "lm_head.weight"), (0, 1), 28, 1e-3),),
    2, num_microbatches=4, hardware=Hardware({"float32": 1e12}, 1e9, 1e9), training=Training(recompute=("h.*",)),
)  # fmt: skip
PROFILE = Profile.of("laptop", {"a": LayerCost(1e-3, 2e-3, 3e-3), "b": LayerCost(1e-4)})
ODD: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2**70, 10**400, -1.5, 0.5, float("nan"), float("inf"), "", "x", "../../etc/passwd",
    "__import__('os').system('true')", [], [[]], {}, {"__class__": "os"}, ["a", 1], "float99",
)  # fmt: skip


def check_message(error: fxpipe.FxpipeError) -> None:
    """What was wrong, and on a line of its own what to do."""
    assert "\n  " in str(error), str(error)


def places(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in parsed JSON."""
    found = [path] if path else []
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        found += places(value, (*path, key))
    return found


def mutated(data: Any, rng: random.Random) -> Any:
    """Change one to three places: another value, nothing there, or one more field."""
    data = copy.deepcopy(data)
    for _ in range(rng.randint(1, 3)):
        *way, last = rng.choice(places(data))
        owner = data
        for key in way:
            owner = owner[key]
        kind = rng.random()
        if kind < 0.7:
            owner[last] = rng.choice(ODD)
        elif kind < 0.85:
            del owner[last]
        elif isinstance(owner, dict):
            owner[rng.choice(("stages", "format", "color", "layers"))] = rng.choice(ODD)
    return data


@pytest.mark.parametrize("seed", range(10))
def test_a_changed_plan_is_refused_by_one_error_or_can_be_used(seed):
    rng = random.Random(seed)
    data = json.loads(PLAN.to_json())
    for _ in range(50):
        text = json.dumps(mutated(data, rng))
        try:
            plan = PipelinePlan.from_json(text)
        except PlanError as error:
            check_message(error)
            continue
        assert PipelinePlan.from_json(plan.to_json()) == plan
        try:
            simulate(plan)
        except fxpipe.FxpipeError as error:
            check_message(error)


@pytest.mark.parametrize("seed", range(4))
def test_a_changed_profile_is_refused_by_one_error_or_can_be_used(seed):
    rng = random.Random(seed)
    data = json.loads(PROFILE.to_json())
    for _ in range(50):
        try:
            profile = Profile.from_json(json.dumps(mutated(data, rng)))
        except PlanError as error:
            check_message(error)
            continue
        assert Profile.from_json(profile.to_json()) == profile


def changed(**changes: Any) -> str:
    return json.dumps({**json.loads(PLAN.to_json()), **changes})


def stage(**changes: Any) -> str:
    data = json.loads(PLAN.to_json())
    data["stages"][1].update(changes)
    return json.dumps(data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (stage(bytes=-4), r"stages\[1\].bytes is -4"),
        (stage(bytes=1.5), r"stages\[1\].bytes is 1.5, not a whole number"),
        (stage(seconds="1"), r"stages\[1\].seconds is '1', not a number"),
        (stage(rank=7), r"stages\[1\].rank is 7, but there are 2 ranks"),
        (stage(index=0), r"stages\[1\].index is 0"),
        (stage(layers=["wte"]), r"stages\[1\].layers has 'wte', which stages\[0\] has too"),
        (stage(layers=[3]), r"stages\[1\].layers\[0\] is 3, not a text"),
        (stage(sends=[{"shape": [1], "dtype": "float99", "requires_grad": True}]), r"stages\[1\].sends\[0\].dtype"),
        (stage(colour="red"), r"stages\[1\].colour is no field of StagePlan"),
        (changed(num_ranks=10**400), "num_ranks is a number of too many digits|not JSON"),
        (changed(stages=[]), "stages is empty"),
        (changed(schedule="2F2B"), "schedule: unknown schedule"),
        (changed(training={"optimizer": "magic"}), "training: "),
        (changed(hardware={"flops": {"float32": -1}, "memory_bandwidth": 1, "memory": 1}), "hardware: "),
        (changed(ties=[{"key": "a", "fqns": ["a"], "stages": [9]}]), r"ties\[0\].stages"),
        (changed(format=FORMAT + 1), f"not a plan of format {FORMAT}"),
        ("[" * 100_000, "nested too deeply|not JSON"),
        ('{"format": 3, "format": 3}', "'format' stands twice"),
        ("\x00", "not JSON"),
    ],
)
def test_the_error_names_the_place(text, message):
    with pytest.raises(PlanError, match=message):
        PipelinePlan.from_json(text)


def test_a_plan_of_bytes_is_refused():
    with pytest.raises(PlanError, match="read from text, not from a bytes"):
        PipelinePlan.from_json(PLAN.to_json().encode())  # type: ignore[arg-type]


def test_reading_takes_no_more_memory_than_a_few_times_the_text():
    data = json.loads(PLAN.to_json())
    data["stages"][0]["layers"] = [f"layer{number}" for number in range(20_000)]
    text = json.dumps(data)
    tracemalloc.start()
    PipelinePlan.from_json(text)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40 * len(text)
