import json

import pytest

from fxpipe.errors import PlanError
from fxpipe.ir.hardware import Hardware, Training
from fxpipe.ir.plan import PipelinePlan, StagePlan, TieGroup
from fxpipe.ir.tensor import TensorMeta


@pytest.fixture
def plan() -> PipelinePlan:
    stages = (
        StagePlan(
            0, 0, ("wte", "h.0"), parameters=7, bytes=28, seconds=0.5, sends=(TensorMeta((4, 8), "float32", True),)
        ),
        StagePlan(1, 1, ("h.1", "lm_head"), duplicated=("mask",)),
    )
    free = Hardware({"float32": 1e12}, 1e9, 1e9, float("inf"))
    ties = (TieGroup("wte.weight", ("wte.weight", "lm_head.weight"), (0, 1), 28, 1e-3),)
    return PipelinePlan("GPT", "abc", stages, ties, 2, hardware=free, training=Training(optimizer="sgd"), notes=("n",))


def test_a_plan_survives_json(plan: PipelinePlan) -> None:
    again = PipelinePlan.from_json(plan.to_json())
    assert again == plan
    assert again.fingerprint == plan.fingerprint
    assert again.hardware.link_bandwidth == float("inf")
    assert hash(again) == hash(plan)


def test_every_layer_has_its_stage(plan: PipelinePlan) -> None:
    assert [plan.stage_of(name) for name in ("wte", "lm_head", "nowhere")] == [0, 1, None]


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"format": 99}', '{"format": 1}', '{"format": 1, "stages": [{"layers": 3}], "ties": []}'],
)
def test_damaged_text_is_a_plan_error(text: str) -> None:
    with pytest.raises(PlanError, match="plan"):
        PipelinePlan.from_json(text)


def test_an_unknown_field_is_a_plan_error(plan: PipelinePlan) -> None:
    data = json.loads(plan.to_json())
    data["color"] = "red"
    with pytest.raises(PlanError, match="color"):
        PipelinePlan.from_json(json.dumps(data))
