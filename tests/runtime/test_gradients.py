"""Gradients of one process: wide sums, accumulation, the norm. Across ranks: the cases of ``engine_worker``."""

import copy

import handmade
import judge
import pytest
import torch
from torch import nn

from fxpipe.runtime.run.gradients import Gradients
from fxpipe.runtime.run.local import LocalEngine
from fxpipe.runtime.run.work import backward_for_inputs, backward_for_weights


def trained(case, num, **options):
    program = case.draft(copy.deepcopy(case.model), 4, case.batch)
    stages = handmade.stages_of(case.model, program)
    jobs = handmade.jobs_of(case, stages, 4, num)
    gradients = Gradients(stages, **options)
    engine = LocalEngine(stages)

    def step(last=True):
        gradients.begin()
        engine.train(jobs)
        gradients.finish(last=last)

    return stages, gradients, step


def narrow_chain():
    case = handmade.chain()
    case.model.to(torch.bfloat16)
    case.batch = {name: value.to(torch.bfloat16) for name, value in case.batch.items()}
    return case


def exact_sum(case, num):
    """The microbatches' bfloat16 gradients, summed in float64."""
    total = {}
    for part in handmade.split(case.batch, num):
        model = copy.deepcopy(case.model)
        (case.loss(model, part)[0] * (1 / num)).backward()
        for fqn, parameter in model.named_parameters():
            total[fqn] = total.get(fqn, 0) + parameter.grad.double()
    return total


def error_of(stages, wanted):
    return max(
        float((parameter.grad.double() - wanted[fqn]).norm() / wanted[fqn].norm())
        for stage in stages
        for fqn, parameter in stage.named_parameters()
    )


def test_a_wide_sum_is_rounded_once():
    case = narrow_chain()
    wanted = exact_sum(case, 24)
    stages, _, step = trained(case, 24)
    step()
    narrow, _, narrow_step = trained(case, 24, wide=False)
    narrow_step()
    assert all(parameter.grad.dtype == torch.bfloat16 for stage in stages for parameter in stage.parameters())
    assert error_of(stages, wanted) < 2**-8
    assert error_of(narrow, wanted) > 1.5 * error_of(stages, wanted)


def test_a_wide_sum_can_be_kept():
    case = narrow_chain()
    stages, _, step = trained(case, 24, keep_wide=True)
    step()
    assert all(parameter.grad.dtype == torch.float32 for stage in stages for parameter in stage.parameters())
    assert error_of(stages, exact_sum(case, 24)) < 1e-5


def test_a_rounded_sum_counts_once_when_more_is_added():
    case = narrow_chain()
    wanted = exact_sum(case, 8)
    stages, gradients, step = trained(case, 8)
    for _ in range(3):
        step()
    assert error_of(stages, {fqn: 3 * gradient for fqn, gradient in wanted.items()}) < 2**-6
    gradients.zero()
    step(last=False)
    assert all(parameter.grad.dtype == torch.float32 for stage in stages for parameter in stage.parameters())
    step()
    assert error_of(stages, {fqn: 2 * gradient for fqn, gradient in wanted.items()}) < 2**-8


def test_a_parameter_that_gets_no_gradient_keeps_the_one_it_had():
    case = narrow_chain()
    stages, gradients, step = trained(case, 8)
    idle = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    stages[0].register_parameter("idle", idle)
    idle.grad = torch.full((2,), 5.0, dtype=torch.bfloat16)
    for last in (False, False, True, True):
        step(last)
        assert idle.grad.tolist() == [5.0, 5.0]
        assert idle.grad.dtype == torch.bfloat16
    step(last=False)
    gradients.zero()
    step()
    assert idle.grad is None


@pytest.mark.parametrize("order", [2.0, 1.0, 2.5, float("inf")])
def test_the_norm_is_torch_s(order, in_float64):
    stages, gradients, step = trained(handmade.knot(), 4)
    step()
    parameters = list({id(p): p for stage in stages for p in stage.parameters()}.values())
    copies = [nn.Parameter(p.detach().clone()) for p in parameters]
    for one, other in zip(parameters, copies, strict=True):
        other.grad = one.grad.clone()
    expected = nn.utils.clip_grad_norm_(copies, 0.05, order)
    judge.assert_close(gradients.clip(0.05, order), expected, "norm")
    found, wanted = ([p.grad for p in each] for each in (parameters, copies))
    judge.assert_close(dict(enumerate(found)), dict(enumerate(wanted)), "gradients")


def test_the_norm_of_nothing_is_zero_and_of_float64_is_float64():
    _, gradients, step = trained(handmade.chain(), 4)
    assert gradients.clip(1.0).item() == 0.0
    step()
    assert gradients.clip(1.0).dtype == torch.float32
    with judge.float64():
        _, gradients, step = trained(handmade.chain(), 4)
        step()
        assert gradients.clip(1.0).dtype == torch.float64


def test_a_split_backward_accumulates_into_wide_gradients():
    weight, x = nn.Parameter(torch.ones(2, dtype=torch.bfloat16)), torch.ones(2, dtype=torch.bfloat16)
    weight.grad_dtype = torch.float32
    for factor in (1.0, 2**-9):
        y = weight * x.clone().requires_grad_()
        _, forks = backward_for_inputs(
            [y], [torch.full_like(y, factor)], [y.grad_fn.next_functions[1][0].variable], [weight]
        )
        backward_for_weights(forks)
    assert weight.grad.tolist() == [1 + 2**-9] * 2
