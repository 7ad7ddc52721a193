"""One rank fails, in many places and ways: every other one says why, at once, and nothing stays behind."""

from __future__ import annotations

import json

import launch
import pytest
from chaos.faults import chosen

FAULTS = chosen(44)
MANY = chosen(200)


def injected(faults, folder) -> dict[str, list[str]]:
    path = folder / "faults.json"
    path.write_text(json.dumps([fault.name for fault in faults]))
    (result,) = launch.launch("chaos/worker.py", 1, str(path), "4", fresh=False)
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert result.returncode == 0, result.stderr[-3000:]
    return {"{place}, {kind}, {schedule}, rank {rank}".format(**line["fault"]): line["wrong"] for line in lines}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return injected(FAULTS, tmp_path_factory.mktemp("chaos"))


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_every_rank_says_why_the_pipeline_ended(fault, outcomes):
    assert outcomes[fault.name] == []


@pytest.mark.chaos
def test_two_hundred_faults(tmp_path):
    found = injected(MANY, tmp_path)
    assert len(found) == len(MANY)
    assert {name: wrong for name, wrong in found.items() if wrong} == {}
