"""What a person reads when something is wrong: of a person's length, once, and without a word of torch before it."""

import logging
import re

import pytest
import torch
from torch import nn

import fxpipe


class Net(nn.Module):
    """Of several layers; what follows them is given."""

    def __init__(self, width=8, layers=4):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(layers))
        self.head = nn.Linear(width, 2)

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x).square().mean()


def compiled(**options):
    with torch.device("meta"):
        model = Net()
    return fxpipe.compile(model, 2, (torch.zeros(8, 8),), microbatches=4, **options)


def test_torch_prints_nothing_before_the_message(capfd, caplog):
    with torch.device("meta"):
        model = Net(width=9)
    with pytest.raises(fxpipe.CaptureError, match="the forward of Net failed"):
        fxpipe.compile(model, 2, (torch.zeros(8, 8),))
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []


@pytest.mark.parametrize(
    ("wrong", "place"), [({"y": 1}, ""), ({"x": torch.zeros(8, 9)}, rf" \({re.escape(__file__)}:\d+\)")]
)
def test_the_place_of_an_error_is_one_in_the_users_code(wrong, place):
    with pytest.raises(fxpipe.CaptureError) as caught:
        fxpipe.compile(Net(), 2, (), {"x": torch.zeros(8, 8), **wrong})
    assert re.search(rf"[^)]{place}\n  it (was run with|takes)", str(caught.value))
    assert (".py:" in str(caught.value)) == bool(place)


def test_lists_of_names_are_folded():
    with pytest.raises(fxpipe.MaterializeError, match=r"layers\.\{0-3\}\.weight, layers\.\{0-3\}\.bias, head\.weight"):
        compiled().materialize()
    with pytest.raises(fxpipe.MaterializeError, match=r"filled: .*layers\.\{0-3\}\.bias"):
        compiled().materialize(init="empty").step(torch.zeros(8, 8))


def test_after_with_the_plan_stays_and_calls_raise():
    with compiled() as pipe:
        assert repr(pipe) == "Pipeline(Net, 2 stages, 2 ranks, 1F1B, not materialized)"
    assert repr(pipe) == "Pipeline(Net, 2 stages, 2 ranks, 1F1B, closed)"
    assert pipe.report().startswith("Net · 2 stages")
    with pytest.raises(fxpipe.MaterializeError, match="this pipeline was closed"):
        pipe.materialize(init="reset")
    with compiled() as pipe:
        pipe.materialize(init="reset")
        pipe.step(torch.zeros(8, 8))
    assert pipe.plan.num_stages == 2
    with pytest.raises(fxpipe.MaterializeError, match="this pipeline was closed"):
        pipe.step(torch.zeros(8, 8))


def test_long_work_is_logged_with_its_rank(caplog, monkeypatch):
    with caplog.at_level(logging.INFO, "fxpipe"):
        compiled()
        monkeypatch.setenv("WORLD_SIZE", "4")
        monkeypatch.setenv("RANK", "3")
        compiled()
    first, second = caplog.records
    assert first.getMessage().startswith("planned Net: 2 stages, 1F1B, 4 microbatches")
    assert second.getMessage() == f"rank 3: {first.getMessage()}"
    assert (first.rank, second.rank) == (0, 3)


def test_plans_differ_in_shapes_and_names_not_in_hashes():
    one, other = (compiled(hardware=hardware).plan for hardware in ("h100", "cpu"))
    assert one.described["the model"] == other.described["the model"]
    assert one.described["stage 0"].startswith("layers.{0-1}")
    assert "float32[2, 8]" in one.described["what stage 0 sends"]
    assert one.described["hardware"] != other.described["hardware"]


def test_a_pipeline_shows_in_a_notebook():
    shown = compiled()._repr_html_()
    assert shown.startswith("<iframe srcdoc=")
    assert "Does it fit?" in shown
    assert "<script>" not in shown  # it stays inside of the frame


def test_public_names_complete_on_a_tab():
    names = [name for name in dir(compiled()) if not name.startswith("_")]
    assert {"report", "explain", "materialize", "step", "verify", "save"} <= set(names)
