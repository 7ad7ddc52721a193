"""A backward in two halves gives the gradients of the whole one, whatever weights share."""

import judge
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxpipe.ir.tensor import TensorMeta
from fxpipe.program import BoundaryTensor
from fxpipe.runtime.build.boundary import join
from fxpipe.runtime.run.work import Pass, run_backward, run_backward_for_inputs, run_backward_for_weights

WIDTH, WEIGHTS, RECEIVED = 3, 4, 2
BOUNDARY = tuple(BoundaryTensor(f"x{place}", TensorMeta((2, WIDTH), "float64", True)) for place in range(2))

step = st.one_of(
    st.tuples(st.just("linear"), st.integers(0, 9), st.integers(0, WEIGHTS - 1), st.integers(0, WEIGHTS - 1)),
    st.tuples(st.sampled_from(["add", "mul"]), st.integers(0, 9), st.integers(0, 9), st.just(0)),
    st.tuples(st.just("own"), st.just(0), st.integers(0, WEIGHTS - 1), st.just(0)),
    st.tuples(st.just("hook"), st.integers(0, 9), st.just(0), st.just(0)),
    st.tuples(st.just("halves"), st.integers(0, 9), st.integers(0, WEIGHTS - 1), st.just(0)),
)


def run(steps, ends, received, matrices, biases):
    """A random stage: two received tensors, weights used anywhere and any number of times, one or two outputs."""
    values = list(join(tuple(received)))
    for kind, first, second, third in steps:
        x = values[first % len(values)]
        if kind == "linear":
            values.append(torch.tanh(torch.nn.functional.linear(x, matrices[second], biases[third])))
        elif kind == "own":
            values.append(biases[second].expand(2, WIDTH) * 2)
        elif kind == "hook":  # on what comes into it
            values.append(x.clone())
            if values[-1].requires_grad:
                values[-1].register_hook(lambda gradient: gradient * 2)
        elif kind == "halves":  # a packed projection
            top, bottom = matrices[second].split([1, WIDTH - 1])
            values.append(torch.sin(torch.cat([x @ top.T, x.cos() @ bottom.T], 1)))
        else:
            y = values[second % len(values)]
            values.append(x + y if kind == "add" else torch.sin(x * y))
    return join(tuple(values[end % len(values)] for end in ends))


@given(st.lists(step, max_size=8), st.lists(st.integers(0, 9), min_size=1, max_size=2), st.integers(0, 8))
@settings(max_examples=300, deadline=None)
def test_halves_give_what_the_whole_gives(steps, ends, absent):
    """``absent``: the place of the output that no gradient comes back to, if there is one."""
    numbers = torch.Generator().manual_seed(0)

    def tensors(*shapes):
        made = [torch.randn(shape, generator=numbers, dtype=torch.float64) for shape in shapes]
        return [tensor.requires_grad_() for tensor in made]

    received = tensors((2, WIDTH), (2, WIDTH))
    matrices, biases = tensors(*[(WIDTH, WIDTH)] * WEIGHTS), tensors(*[(WIDTH,)] * WEIGHTS)
    gradients = tuple(torch.randn(2, WIDTH, generator=numbers, dtype=torch.float64) for _ in ends)
    gradients = tuple(None if place == absent else gradient for place, gradient in enumerate(gradients))
    results = []
    for split in (False, True):
        for tensor in (*received, *matrices, *biases):
            tensor.grad = None
        work = Pass(tuple(received), run(steps, ends, received, matrices, biases), (BOUNDARY, BOUNDARY[: len(ends)]))
        if split:
            given_back = run_backward_for_inputs(work, [*matrices, *biases], gradients)
            run_backward_for_weights(work)
        else:
            given_back = run_backward(work, gradients)
        results.append([*given_back, *[tensor.grad for tensor in (*matrices, *biases)]])
    whole, halves = ({at: each for at, each in enumerate(found) if each is not None} for found in results)
    judge.assert_close(halves, whole, "gradients")


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("counts", [False, True])
def test_what_leads_to_a_term_that_is_left_out_gets_zeros_and_nothing_else_does(counts, split):
    used, unused, others = [torch.ones(2, WIDTH, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    received = tuple(torch.ones(2, WIDTH, dtype=torch.float64, requires_grad=True) for _ in range(2))
    first, second = join(received)
    term, left_out, _ = join([(second * others).sum(), (first * used).sum() / 0, unused * 2])
    work = Pass(received, (), (BOUNDARY, ()), ((term, 1.0),) if counts else (), (left_out,))
    given_back = run_backward_for_inputs(work, [used, unused, others]) if split else run_backward(work)
    run_backward_for_weights(work)
    ones = torch.ones(2, WIDTH, dtype=torch.float64)
    assert torch.equal(used.grad, 0 * ones)
    assert unused.grad is None
    assert torch.equal(given_back[0], 0 * ones)
    if counts:
        assert torch.equal(others.grad, ones)
        assert torch.equal(given_back[1], ones)
    else:
        assert others.grad is given_back[1] is None
