"""One rank of the engine's tests; each case is a fact that holds on all schedules it names."""

from __future__ import annotations

import copy
import functools

import handmade
import judge
import launch
import torch
import torch.distributed as dist
from torch import nn

from fxpipe.errors import PlanError, ScheduleError
from fxpipe.ir.plan import TieGroup
from fxpipe.ir.schedule import SCHEDULES, fits_microbatches, live_microbatches, placement
from fxpipe.runtime.build.state import full_state, match_state, own_state, state_names, write_state
from fxpipe.runtime.ranks.agreement import agree
from fxpipe.runtime.ranks.groups import make_groups, start_process_group
from fxpipe.runtime.run.distributed import DistributedEngine
from fxpipe.runtime.run.gradients import Gradients
from fxpipe.runtime.run.local import LocalEngine
from fxpipe.runtime.run.work import Job

CPU = torch.device("cpu")
RANKS = 4
MODELS = ("chain", "knot", "image")


class Pipe:
    """This rank's part of a case under a schedule, in one of equally long pipelines."""

    def __init__(self, case, schedule, pipelines=(tuple(range(RANKS)),), **options):
        self.case, self.schedule = case, schedule
        ranks = len(pipelines[0])
        self.num_stages = ranks * (SCHEDULES[schedule].stages_per_rank or 2)
        self.placed = placement(schedule, self.num_stages, ranks)
        program = case.draft(copy.deepcopy(case.model), self.num_stages, case.batch)
        (position,) = [ranks.index(dist.get_rank()) for ranks in pipelines if dist.get_rank() in ranks]
        own = [stage for stage in range(self.num_stages) if self.placed[stage] == position]
        self.stages = handmade.stages_of(case.model, program, own)
        held = [set(stage.modules) | set(stage.attributes) for stage in program.stages]
        self.ties = ties_of(case.model, held)
        ties = frozenset(frozenset(self.placed[s] for s in tie.stages) for tie in self.ties)
        self.groups = groups_for(pipelines, ties)
        self.engine = DistributedEngine(self.stages, self.num_stages, schedule, self.groups, CPU, **options)
        self.gradients = Gradients(self.stages, self.ties, self.placed, self.groups)

    def jobs(self, num, **options):
        return handmade.jobs_of(self.case, self.stages, self.num_stages, num, **options)

    def step(self, jobs, last=True):
        self.engine.check()
        self.gradients.begin()
        loss = self.engine.train(jobs)
        self.gradients.finish(last=last)
        return loss

    def check_gradients(self, wanted):
        """Hold this rank's gradients against those of the whole model."""
        held = {}
        for fqn, parameter in named_parameters(self.stages):
            first = "wte.weight" if fqn == "head.weight" else fqn
            if first in wanted:
                held[first] = parameter.grad
            else:
                assert not parameter.requires_grad, fqn
        judge.assert_close(held, {fqn: wanted[fqn] for fqn in held}, "gradients")


@functools.cache
def groups_for(pipelines, ties):
    return make_groups(pipelines, ties, CPU)


def named_parameters(stages):
    return [pair for stage in stages for pair in stage.named_parameters()]


def ties_of(model, held):
    """Every parameter that several stages hold."""
    names = {}
    for fqn, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(fqn)
    ties = []
    for fqns in names.values():
        stages = [
            index
            for index, names in enumerate(held)
            if any(f == n or f.startswith(f"{n}.") for f in fqns for n in names)
        ]
        if len(stages) > 1:
            ties.append(TieGroup(fqns[0], tuple(fqns), tuple(stages)))
    return ties


def in_float64(function):
    @functools.wraps(function)
    def wrapped(*args):
        torch.set_default_dtype(torch.float64)
        return function(*args)

    return wrapped


@in_float64
def exact(schedule, name):
    """Loss and every gradient are those of the plain model, run microbatch by microbatch, for many M."""
    pipe = Pipe(getattr(handmade, name)(), schedule)
    counts = [m for m in (1, 3, 4, 8, 12, 6, 4) if fits_microbatches(schedule, pipe.num_stages, RANKS, m)]
    for num in counts:
        pipe.gradients.zero()
        loss = pipe.step(pipe.jobs(num))
        expected, wanted = handmade.reference(pipe.case, num)
        judge.assert_close(loss, expected, "loss")
        pipe.check_gradients(wanted)


@in_float64
def deferred(schedule):
    pipe = Pipe(handmade.knot(), schedule, defer_recv=True)
    pipe.step(pipe.jobs(8))
    pipe.check_gradients(handmade.reference(pipe.case, 8)[1])


@in_float64
def uneven(schedule):
    """Microbatches of different shapes, each its own variant of the graph."""
    pipe = Pipe(handmade.chain(), schedule)
    rows = (3, 1, 4, 2, 5, 1, 6, 2)
    jobs, start = [], 0
    for index, count in enumerate(rows):
        part = {name: value[start : start + count] for name, value in pipe.case.batch.items()}
        start += count
        program = pipe.case.draft(copy.deepcopy(pipe.case.model), pipe.num_stages, part)
        for stage in pipe.stages:
            stage.add_program(("rows", count), program)
        jobs.append(Job(("rows", count), program, part, (count / sum(rows),), index))
    loss = pipe.step(jobs)
    model = copy.deepcopy(pipe.case.model)
    (expected,) = pipe.case.loss(model, pipe.case.batch)
    expected.backward()
    judge.assert_close(loss, expected.detach(), "loss")
    pipe.check_gradients({fqn: parameter.grad for fqn, parameter in model.named_parameters()})


class Chatty(nn.Module):
    """Outputs of every kind, from a chain of layers."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(8))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x.transpose(0, 1), x.argmax(1), x > 0, x.sum(), x.to(torch.complex128)


def chatty():
    def draft(model, num_stages, inputs):
        made = handmade.Draft(model, num_stages, **inputs)
        x, last = made.x, num_stages - 1
        for index in range(8):
            x = made.module(index * num_stages // 8, f"layers.{index}", x)
        outputs = [
            made.method(last, "transpose", x, 0, 1),
            made.method(last, "argmax", x, 1),
            made.call(last, torch.gt, x, 0),
        ]
        outputs += [made.method(last, "sum", x), made.method(last, "to", x, torch.complex128)]
        return made.program(outputs=outputs)

    return handmade.Case(Chatty(), {"x": torch.randn(12, 6)}, draft, None)


@in_float64
def inferred(schedule):
    """Forward only: any number of microbatches, new shapes, outputs of any dtype on all ranks or on the last."""
    pipe = Pipe(chatty(), schedule)
    for num in (1, 3, 4, 12):
        jobs = pipe.jobs(num)
        for gather in (True, False):
            found = pipe.engine.infer(jobs, gather=gather)
            if not gather and pipe.placed[-1] != dist.get_rank():
                assert found is None
                continue
            for flat, part in zip(found, handmade.split(pipe.case.batch, num), strict=True):
                for one, other in zip(flat, pipe.case.model(part["x"]), strict=True):
                    assert not one.requires_grad
                    if one.is_floating_point() or one.is_complex():
                        judge.assert_close(one, other.detach())
                    else:
                        assert torch.equal(one, other)


def no_more_microbatches_live_than_planned(schedule):
    """What memory is planned for: activations alive at once per stage, and none after the step."""
    pipe = Pipe(handmade.chain(), schedule)
    planned = live_microbatches(schedule, pipe.num_stages, RANKS, 8)
    most = {}
    for stage in pipe.engine._stages:
        stage.forward_one_chunk = functools.partial(peaked, most, stage, stage.forward_one_chunk)
    pipe.step(pipe.jobs(8))
    for stage in pipe.engine._stages:
        assert most[stage.stage_index] == planned[stage.stage_index], (most, planned)
        kept = (stage._passes, stage._received, stage._gradients, stage._given, stage.jobs)
        assert not any(kept)


def peaked(most, stage, real, *args, **kwargs):
    result = real(*args, **kwargs)
    most[stage.stage_index] = max(most.get(stage.stage_index, 0), len(stage._passes))
    return result


class Counting:
    """A stage's group that counts its messages, by what they are."""

    def __init__(self, real, counts, stage):
        self.real, self.counts, self.stage = real, counts, stage

    def count(self, what, tag):
        key = self.stage, what, "backward" if (tag - 1) % 2 else "forward"
        self.counts[key] = self.counts.get(key, 0) + 1

    def send(self, tensors, rank, tag):
        self.count("send", tag)
        return self.real.send(tensors, rank, tag)

    def recv(self, tensors, rank, tag):
        self.count("recv", tag)
        return self.real.recv(tensors, rank, tag)


def count_messages(pipe, num):
    """Messages per stage and direction of one step; torch's engine itself has none to exchange."""
    counts = {}
    for stage in pipe.engine._stages:
        stage._exchange._group = Counting(stage._exchange._group, counts, stage.stage_index)
    pipe.step(pipe.jobs(num))
    return counts


def nothing_flows_back_below_the_first_trainable_parameter():
    pipe = Pipe(handmade.image(), "1F1B")
    counts = count_messages(pipe, 8)
    rank = dist.get_rank()
    assert counts.get((rank, "send", "forward")) == (8 if rank < 3 else None)
    assert counts.get((rank, "recv", "forward")) == (8 if rank > 0 else None)
    assert counts.get((rank, "send", "backward")) == (8 if rank == 3 else None)
    assert counts.get((rank, "recv", "backward")) == (8 if rank == 2 else None)


def small_tensors_share_one_message():
    pipe = Pipe(handmade.knot(), "GPipe")
    layouts = pipe.jobs(4)[0].program.stages
    assert max(len(stage.sent) for stage in layouts) >= 3
    counts = count_messages(pipe, 4)
    rank = dist.get_rank()
    assert counts.get((rank, "send", "forward")) == (4 if rank < 3 else None)
    assert counts.get((rank, "send", "backward")) == (4 if rank > 0 else None)


@in_float64
def gradients_accumulate_over_steps(schedule):
    """Ties are summed once: over open steps, after closed ones without zero_grad, and after a zero_grad in between."""
    pipe = Pipe(handmade.knot(), schedule)
    _, once = handmade.reference(pipe.case, 8)

    def times(factor):
        pipe.check_gradients({fqn: gradient * factor for fqn, gradient in once.items()})

    pipe.step(pipe.jobs(8), last=False)
    pipe.step(pipe.jobs(8), last=False)
    pipe.step(pipe.jobs(8))
    times(3)
    pipe.step(pipe.jobs(8))
    times(4)
    pipe.step(pipe.jobs(8), last=False)
    pipe.step(pipe.jobs(8))
    times(6)
    pipe.step(pipe.jobs(8), last=False)
    for stage in pipe.stages:
        stage.zero_grad()
    pipe.step(pipe.jobs(8))
    times(1)
    pipe.gradients.zero()
    pipe.step(pipe.jobs(8))
    times(1)


def narrow_weights_accumulate_wide(schedule):
    """bfloat16 gradients are summed in float32 and rounded once."""
    case = handmade.chain()
    case.model.to(torch.bfloat16)
    case.batch = {name: value.to(torch.bfloat16) for name, value in case.batch.items()}
    pipe = Pipe(case, schedule)
    num = 24
    pipe.step(pipe.jobs(num))
    model = copy.deepcopy(case.model)
    wide = {}
    for part in handmade.split(case.batch, num):
        model.zero_grad()
        (case.loss(model, part)[0] * (1 / num)).backward()
        for fqn, parameter in model.named_parameters():
            wide[fqn] = wide.get(fqn, 0) + parameter.grad.float()
    for fqn, parameter in named_parameters(pipe.stages):
        assert parameter.grad.dtype == torch.bfloat16
        torch.testing.assert_close(parameter.grad, wide[fqn].bfloat16(), rtol=2**-8, atol=0)
    torch.optim.AdamW([p for _, p in named_parameters(pipe.stages)], lr=0.0).step()
    kept = Gradients(pipe.stages, keep_wide=True)
    pipe.gradients.zero()
    kept.begin()
    pipe.engine.train(pipe.jobs(num))
    kept.finish(last=True)
    for fqn, parameter in named_parameters(pipe.stages):
        assert parameter.grad.dtype == torch.float32
        torch.testing.assert_close(parameter.grad, wide[fqn], rtol=1e-5, atol=1e-7)
    assert kept.clip(1e9).dtype == torch.float32


@in_float64
def the_norm_is_that_of_the_whole_model(schedule):
    pipe = Pipe(handmade.knot(), schedule)
    for order in (2.0, 1.0, 3.0, float("inf")):
        pipe.gradients.zero()
        pipe.step(pipe.jobs(8))
        model = copy.deepcopy(pipe.case.model)
        for fqn, gradient in handmade.reference(pipe.case, 8)[1].items():
            model.get_parameter(fqn).grad = gradient.clone()
        expected = nn.utils.clip_grad_norm_(model.parameters(), 0.01, order)
        norm = pipe.gradients.clip(0.01, order)
        judge.assert_close(norm, expected, "norm")
        norms = [torch.empty_like(norm) for _ in range(RANKS)]
        dist.all_gather(norms, norm, group=pipe.groups.pipeline)
        assert all(torch.equal(norm, other) for other in norms)
        pipe.check_gradients({fqn: p.grad for fqn, p in model.named_parameters() if p.grad is not None})


@in_float64
def sparse_gradients_are_clipped_and_tied():
    pipe = Pipe(handmade.knot(), "1F1B")
    for stage in pipe.stages:
        for module in stage.modules():
            if isinstance(module, nn.Embedding):
                module.sparse = True
    with torch.sparse.check_sparse_tensor_invariants(False):
        pipe.step(pipe.jobs(8))
        _, wanted = handmade.reference(pipe.case, 8)
        norm = pipe.gradients.clip(1e9)
        expected = torch.stack([gradient.norm() for gradient in wanted.values()]).norm()
        judge.assert_close(norm, expected, "norm")
        pipe.check_gradients(wanted)


@in_float64
def a_tie_without_a_gradient_stays_without():
    """What no holder has a gradient for is None everywhere; what one holder has, all have."""
    pipe = Pipe(handmade.knot(), "1F1B")
    pipe.step(pipe.jobs(4))
    held = dict(named_parameters(pipe.stages))
    for place in (None, 0, -1):
        owners = {}
        for tie in pipe.ties:
            ranks = sorted({pipe.placed[stage] for stage in tie.stages})
            owners.update((fqn, () if place is None else ranks[place]) for fqn in tie.fqns)
        tied = {fqn: parameter for fqn, parameter in held.items() if fqn in owners}
        pipe.gradients.zero()
        pipe.gradients.begin(last=True)
        for fqn, parameter in tied.items():
            parameter.grad = torch.ones_like(parameter) if dist.get_rank() == owners[fqn] else None
        pipe.gradients.finish(last=True)
        for parameter in tied.values():
            assert (parameter.grad is None) == (place is None)
            assert place is None or torch.equal(parameter.grad, torch.ones_like(parameter))


def state_goes_out_and_in():
    case = handmade.knot()
    pipe = Pipe(case, "ZBVZeroBubble")
    _, aliases = aliases_of(case.model)
    names = state_names(case.model, aliases)
    whole = full_state(names, pipe.stages, pipe.groups)
    expected = case.model.state_dict()
    if dist.get_rank() == 0:
        assert list(whole) == list(expected)
        assert all(torch.equal(whole[fqn], expected[fqn]) for fqn in expected)
    else:
        assert whole == {}
    own = own_state(names, pipe.stages)
    assert set(own) <= set(expected)
    assert ("head.weight" in own) == ("wte.weight" in own) == (dist.get_rank() == 0)
    for state in ({fqn: tensor + 1 for fqn, tensor in expected.items()}, {f: t + 1 for f, t in own.items()}):
        before = {fqn: tensor.clone() for fqn, tensor in own.items()}
        write_state(match_state(names, pipe.stages, state))
        for fqn, tensor in own_state(names, pipe.stages).items():
            assert torch.equal(tensor, state[fqn])
        write_state(match_state(names, pipe.stages, before))


def aliases_of(model):
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    first = {}
    return named, {fqn: first.setdefault(id(tensor), fqn) for fqn, tensor in named}


def ranks_agree_or_all_raise_the_same():
    groups = make_groups([range(RANKS)], [], CPU)
    agree(groups, None, "the plan", "a", 1)
    raised = []
    for error, parts in (
        (ScheduleError("too few\n  more") if dist.get_rank() == 2 else None, ("a",)),
        (None, ("b" if dist.get_rank() == 3 else "a",)),
        (ScheduleError("all alike"), ("a",)),
    ):
        try:
            agree(groups, error, "the plan", *parts)
        except (ScheduleError, PlanError) as caught:
            raised.append(f"{type(caught).__name__}: {caught}")
    assert raised == [
        "ScheduleError: rank 2: too few\n  more",
        "PlanError: the plan differs between ranks: rank 0 has ('a',), rank 3 has ('b',)\n"
        "  run the same script with the same arguments on every rank",
        "ScheduleError: all alike",
    ]
    agree(groups, None, "the plan", "a", 1)


@in_float64
def dropout_is_the_same_everywhere(schedule):
    import test_randomness as noise

    torch.manual_seed(0)
    model = noise.model_of(num_blocks=8)

    def draft(model, num_stages, inputs):
        return noise.program_of(model, num_stages, inputs["x"] * 0.1)

    case = handmade.Case(model, {"x": 0.1 * torch.randn(16, 5, noise.WIDTH)}, draft, None)
    pipe = Pipe(case, schedule)
    loss = pipe.step(pipe.jobs(8, seed=5))
    single = handmade.stages_of(model, draft(copy.deepcopy(model), 1, case.batch))
    alone = LocalEngine(single).train(handmade.jobs_of(case, single, 1, 8, seed=5))
    judge.assert_close(loss, alone, "loss")
    pipe.check_gradients({fqn: parameter.grad for fqn, parameter in named_parameters(single)})


def cases():
    found = {}
    for schedule in SCHEDULES:
        for name in MODELS:
            found[f"exact-{schedule}-{name}"] = functools.partial(exact, schedule, name)
        for case in (
            uneven,
            inferred,
            no_more_microbatches_live_than_planned,
            gradients_accumulate_over_steps,
            narrow_weights_accumulate_wide,
        ):
            found[f"{case.__name__}-{schedule}"] = functools.partial(case, schedule)
        found[f"dropout-{schedule}"] = functools.partial(dropout_is_the_same_everywhere, schedule)
        if SCHEDULES[schedule].stages_per_rank != 1:
            found[f"deferred-{schedule}"] = functools.partial(deferred, schedule)
    for schedule in ("1F1B", "ZBVZeroBubble"):
        found[f"norm-{schedule}"] = functools.partial(the_norm_is_that_of_the_whole_model, schedule)
    for case in (
        nothing_flows_back_below_the_first_trainable_parameter,
        small_tensors_share_one_message,
        sparse_gradients_are_clipped_and_tied,
        a_tie_without_a_gradient_stays_without,
        state_goes_out_and_in,
        ranks_agree_or_all_raise_the_same,
    ):
        found[case.__name__] = case
    return found


if __name__ == "__main__":
    start_process_group(CPU)
    launch.run_cases(cases())
