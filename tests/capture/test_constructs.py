"""Whatever Python and torch offer a forward is captured right or refused where it stands: nothing is silently wrong."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from constructs import CONSTRUCTS
from judge import CLOSE
from staged import cut, differences, every_boundary, one_stage, run_model, run_program

from fxpipe.capture.capture import Capture
from fxpipe.errors import CaptureError

GRAINS = ("block", "op")
CASES = [(name, grain) for name in CONSTRUCTS for grain in GRAINS]
REFUSED = [(name, grain) for name, grain in CASES if CONSTRUCTS[name].refusal]
CAPTURED = [(name, grain) for name, grain in CASES if not CONSTRUCTS[name].refusal]


@pytest.fixture(autouse=True)
def _as_it_was():
    """The forward of a construct may leave torch's global state changed; the next test must not see it."""
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    torch.set_grad_enabled(True)


def models(name):
    """A model with values, and one on meta where that can be."""
    torch.manual_seed(0)
    real = CONSTRUCTS[name].build()
    with torch.device("meta"):
        return real, CONSTRUCTS[name].build()


# Until 2.12 torch warns of every sparse tensor that its invariants are not checked.
@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning")
# torch.compile's own tracing of a model that is not captured reads .grad of tensors that have none.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("name", "grain"), CAPTURED)
def test_a_construct_is_captured_right(name, grain, training):
    construct = CONSTRUCTS[name]
    real, meta = models(name)
    real.train(training), meta.train(training)
    capture = Capture(meta)
    captured = capture.capture(capture.inputs(construct.args, construct.kwargs), grain=grain, with_loss=False)
    graph = capture.layer_graph(captured)
    everywhere, number = every_boundary(graph)
    halves = cut(graph, 2, random.Random(0))
    for stages, size in ((one_stage(graph), 1), (everywhere, number), (halves, 2)):
        if stages is not None:
            program = captured.program(stages, size)
            inputs = capture.inputs(*copy.deepcopy((construct.args, construct.kwargs)))
            wide = size > 1  # in float64 within rounding; bits where one stage runs what the model runs
            expected = run_model(real, construct.args, construct.kwargs, 7, loss=False, wide=wide)
            off = differences(expected, run_program(program, real, inputs.tensors, 7, wide=wide), bits=not wide)
            assert all(distance <= (CLOSE if wide else 0) for distance in off.values()), (size, off)


@pytest.mark.parametrize(("name", "grain"), REFUSED)
def test_a_construct_that_cannot_be_captured_is_refused_where_it_stands(name, grain):
    construct = CONSTRUCTS[name]
    real, _ = models(name)
    before = copy.deepcopy(real.state_dict())

    def capture():
        capture = Capture(real)
        capture.capture(capture.inputs(construct.args, construct.kwargs), grain=grain, with_loss=False)

    with pytest.raises(CaptureError, match=construct.refusal):
        capture()
    assert all(torch.equal(tensor, before[fqn]) for fqn, tensor in real.state_dict().items())
