import json

import pytest

from fxpipe.ir.plan import PipelinePlan, StagePlan
from fxpipe.ir.source import WeightSource
from fxpipe.report.sources import with_sources
from fxpipe.report.table import render

PLAN = PipelinePlan("GPT", "", (StagePlan(0, 0, ("wte",)), StagePlan(1, 1, ("head",))), num_ranks=2)
SOURCES = [
    WeightSource("wte.weight", 4096, "recorded", (0, 1)),
    WeightSource("h.0." + "very_long_name." * 12 + "weight", 8, "none: give init= or load", (1,)),
    WeightSource("unused<b>", 1024, "recorded", ()),
]


def test_the_text_fits_into_its_columns_and_adds_up():
    text = with_sources(render(PLAN), "text", SOURCES)
    assert text.startswith(render(PLAN))
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[-1] == "weights  recorded 5.0 KiB; none: give init= or load 8 B"
    assert any(line.split() == ["wte.weight", "4.0", "KiB", "recorded", "0,", "1"] for line in lines)
    assert any(line.endswith("–") and "unused" in line for line in lines)


@pytest.mark.parametrize("format", ["markdown", "html"])
def test_other_formats_hold_every_tensor(format):
    text = with_sources(render(PLAN, format), format, SOURCES)
    assert "wte.weight" in text
    assert SOURCES[1].fqn in text
    if format == "html":
        assert "unused&lt;b&gt;" in text
        assert text.rstrip().endswith("</html>")


def test_json_holds_the_plan_beside_the_weights():
    data = json.loads(with_sources(render(PLAN, "json"), "json", SOURCES))
    assert PipelinePlan.from_json(json.dumps(data["plan"])) == PLAN
    assert data["weights"][0] == {"fqn": "wte.weight", "bytes": 4096, "source": "recorded", "stages": [0, 1]}
