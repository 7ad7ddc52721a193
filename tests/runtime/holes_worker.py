"""One rank of the tests of torch's holes: each case shows the hole on torch's own engine, then that fxpipe has it not.

Four ranks: two pipelines of two ranks, side by side.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import operator
import sys
import warnings

import engine_worker as engines
import handmade
import judge
import launch
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import get_schedule_class
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from fxpipe.errors import ScheduleError
from fxpipe.ir.schedule import SCHEDULES, placement
from fxpipe.runtime.ranks.groups import start_process_group
from fxpipe.runtime.run.work import Job

CPU = torch.device("cpu")
PIPELINES = ((0, 1), (2, 3))
SPLIT = ("InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")


@functools.cache
def replica_groups():
    """The pipelines' groups and, across them, those of the data-parallel replicas; made once, on all ranks."""
    pipelines = [dist.new_group(list(ranks)) for ranks in PIPELINES]
    replicas = [dist.new_group([ranks[position] for ranks in PIPELINES]) for position in range(2)]
    return pipelines[dist.get_rank() // 2], replicas[dist.get_rank() % 2]


@functools.cache
def group_of_one():
    """A pipeline of this rank alone: what fails there keeps nobody waiting."""
    return [dist.new_group([rank]) for rank in range(4)][dist.get_rank()]


class Plain(PipelineStage):
    """torch's stage; until 2.11 it sends to each neighbour first, which gloo refuses where both are on one rank."""

    def _get_init_p2p_neighbors_ops(self):
        return [op for op in super()._get_init_p2p_neighbors_ops() if op.group_peer != self.group_rank]


class Bare:
    """torch's own engine on stage modules, one pipeline of two ranks."""

    def __init__(self, modules, schedule, num, loss_fn, wrap=lambda module: module, alone=False, **options):
        group = group_of_one() if alone else replica_groups()[0]
        placed = placement(schedule, len(modules), dist.get_world_size(group))
        own = [index for index in range(len(modules)) if placed[index] == dist.get_rank(group)]
        self.modules = {index: wrap(modules[index]) for index in own}
        stages = [Plain(self.modules[i], i, len(modules), CPU, group=group) for i in own]
        kind = get_schedule_class(schedule)
        single = SCHEDULES[schedule].stages_per_rank == 1
        self.schedule = kind(stages[0] if single else stages, num, loss_fn=loss_fn, **options)
        self.is_first, self.is_last = 0 in own, len(modules) - 1 in own

    def step(self, x, target):
        losses = []
        arguments = (x,) if self.is_first else ()
        self.schedule.step(*arguments, target=target if self.is_last else None, losses=losses, return_outputs=False)
        return losses


def layers_of(num, width=4):
    torch.manual_seed(0)
    return [nn.Linear(width, width) for _ in range(num)]


def stages_for(schedule):
    return 2 * (SCHEDULES[schedule].stages_per_rank or 2)


def small_case(layers, wrap=None, rows=8, width=4):
    """A chain of layers, drafted; ``wrap`` says how a layer's node is made."""
    model = nn.Module()
    model.layers = nn.ModuleList(layers)

    def draft(model, num_stages, inputs):
        made = handmade.Draft(model, num_stages, **inputs)
        x = made.x
        for index in range(len(model.layers)):
            x = made.module(index * num_stages // len(model.layers), f"layers.{index}", x)
        loss = made.call(num_stages - 1, F.mse_loss, x, made.target)
        return made.program(loss=[(loss, "samples")])

    def loss(model, part):
        x = part["x"]
        for layer in model.layers:
            x = layer(x)
        return [F.mse_loss(x, part["target"])]

    torch.manual_seed(1)
    batch = {"x": torch.randn(rows, width), "target": torch.randn(rows, width)}
    return handmade.Case(model, batch, draft, loss, lambda part: float(len(part["x"])))


def pipe_of(case, schedule, **options):
    return engines.Pipe(case, schedule, PIPELINES, **options)


def check_exact(pipe, num):
    pipe.gradients.zero()
    loss = pipe.step(pipe.jobs(num))
    expected, wanted = handmade.reference(pipe.case, num)
    judge.assert_close(loss, expected, "loss")
    pipe.check_gradients(wanted)


@contextlib.contextmanager
def fails(*words):
    """torch's engine raises, the cause of the error naming one of ``words``."""
    with pytest.raises(Exception) as caught:  # noqa: PT011 - whatever torch raises
        yield
    said = f"{caught.value} {caught.value.__cause__}"
    assert any(word in said for word in words), said


def alone(modules, schedule):
    Bare(modules, schedule, 4, F.mse_loss, alone=True).step(torch.ones(4, 4), torch.zeros(4, 4))


@contextlib.contextmanager
def refused(*words):
    with pytest.raises(ScheduleError) as caught:
        yield
    assert all(word in str(caught.value) for word in words)
    assert "\n  " in str(caught.value)


class Tied(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight.clone())

    def forward(self, x):
        return x @ self.weight


def tied_parameters_are_synchronised():
    torch.manual_seed(0)
    weight = torch.randn(4, 4)
    bare = Bare([Tied(weight), Tied(weight)], "GPipe", 2, F.mse_loss, scale_grads=False)
    torch.manual_seed(1)
    bare.step(torch.randn(4, 4), torch.randn(4, 4))
    (module,) = bare.modules.values()
    copies = [torch.empty(4, 4) for _ in range(2)]
    dist.all_gather(copies, module.weight.grad, group=replica_groups()[0])
    assert not torch.equal(*copies)

    check_exact(pipe_of(handmade.knot(), "GPipe"), 4)


def two_stages_of_one_rank(schedule="ZBVZeroBubble"):
    torch.manual_seed(0)
    modules = [Tied(torch.randn(4, 4)) for _ in range(4)]
    modules[3].weight = modules[0].weight
    return modules


def a_tied_parameter_on_one_rank_is_scaled_once():
    x, target = torch.randn(4, 4, generator=torch.Generator().manual_seed(2)), torch.zeros(4, 4)
    gradients = []
    for scale in (False, True):
        bare = Bare(two_stages_of_one_rank(), "ZBVZeroBubble", 4, F.mse_loss, scale_grads=scale)
        bare.step(x, target)
        gradients.append([module.weight.grad for _, module in sorted(bare.modules.items())])
    (plain, _), (scaled, _) = gradients
    # Divided by 4 microbatches; where both stages of a rank hold it, what was there when the first ended twice.
    assert torch.allclose(scaled * 4, plain) == (dist.get_rank() % 2 == 1)

    check_exact(pipe_of(handmade.knot(), "ZBVZeroBubble"), 4)


def accumulated_gradients_are_not_scaled_again():
    x, target = torch.ones(4, 4), torch.zeros(4, 4)
    bare = Bare(layers_of(2), "GPipe", 2, F.mse_loss, scale_grads=True)
    (module,) = bare.modules.values()
    bare.step(x, target)
    first = module.weight.grad.clone()
    bare.step(x, target)
    judge.assert_close(module.weight.grad, 0.75 * 2 * first)  # (1/2 + 1) / 2, not 1 + 1

    pipe = pipe_of(small_case(layers_of(4)), "GPipe")
    pipe.step(pipe.jobs(2), last=False)
    pipe.step(pipe.jobs(2))
    pipe.check_gradients({f: 2 * g for f, g in handmade.reference(pipe.case, 2)[1].items()})


def a_smaller_batch_gives_its_own_rows():
    if hasattr(PipelineStage, "_warmup_forward_vote"):  # until 2.11 the first stage then waits for ever
        bare = Bare(layers_of(2), "GPipe", 2, None)
        outputs = []
        for rows in (8, 4):
            arguments = (torch.full((rows, 4), float(rows)),) if bare.is_first else ()
            with contextlib.suppress(RuntimeError):
                outputs.append(bare.schedule.eval(*arguments))
        if bare.is_last:
            assert len(outputs[1]) == 8  # rows that nobody asked for: those of the first batch among them

    pipe = pipe_of(engines.chatty(), "GPipe")
    for rows in (8, 4):
        part = {"x": torch.full((rows, 6), float(rows))}
        key = ("rows", rows)
        program = pipe.case.program(key, 2, part)
        for stage in pipe.stages:
            stage.add_program(key, program)
        (flat,) = pipe.engine.infer([Job(key, program, part)])
        assert flat[0].shape == (6, rows)


def data_parallel_modules_are_refused():
    x, target = torch.full((4, 4), 1.0 + dist.get_rank() // 2), torch.zeros(4, 4)
    bare = Bare(
        layers_of(4),
        "ZBVZeroBubble",
        4,
        F.mse_loss,
        scale_grads=False,
        wrap=lambda module: DistributedDataParallel(module, process_group=replica_groups()[1]),
    )
    bare.step(x, target)
    differ = []
    for module in bare.modules.values():
        copies = [torch.empty(4, 4) for _ in range(2)]
        dist.all_gather(copies, module.module.weight.grad, group=replica_groups()[1])
        differ.append(not torch.equal(*copies))
    assert any(differ)

    pipe = pipe_of(small_case(layers_of(4)), "ZBVZeroBubble")
    stage = pipe.stages[0]
    (name, layer), *_ = stage.layers.named_children()
    setattr(stage.layers, name, DistributedDataParallel(layer, process_group=replica_groups()[1]))
    with refused("DistributedDataParallel", f"layers.{name}"):
        pipe.engine.check()


def a_mean_over_valid_tokens_is_exact():
    case = handmade.knot()
    part = case.batch
    ids, labels = part["ids"], part["labels"]
    torch.manual_seed(0)
    modules = [nn.Embedding(11, 8), nn.Linear(8, 11)]

    def loss_fn(logits, labels):
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)

    labels = labels.clone()
    labels[:12, 1:] = -100  # few valid tokens in the first half, many in the second
    labels[:12, 0] = 1
    bare = Bare(modules, "GPipe", 2, loss_fn)
    losses = bare.step(ids, labels)
    if bare.is_last:
        whole = loss_fn(modules[1](modules[0](ids)), labels)
        assert (torch.stack(losses).mean() - whole).abs() > 1e-3

    check_exact(pipe_of(case, "GPipe"), 8)


class Reentrant(nn.Module):
    def __init__(self, use_reentrant=True):
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.use_reentrant = use_reentrant
        self.calls = 0

    def run(self, x):
        self.calls += 1
        return self.inner(x)

    def forward(self, x):
        return checkpoint(self.run, x, use_reentrant=self.use_reentrant)


def reentrant_checkpointing_is_refused():
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "None of the inputs have requires_grad=True": the only sign
        bare = Bare([Reentrant(), Reentrant()], "GPipe", 2, F.mse_loss)
        bare.step(torch.ones(4, 4), torch.zeros(4, 4))
    if bare.is_first:
        assert bare.modules[0].inner.weight.grad is None

    case = small_case([Reentrant(False) for _ in range(4)])
    pipe = pipe_of(case, "GPipe")
    check_exact(pipe, 2)
    for stage in pipe.stages:
        for layer in stage.layers:
            layer.use_reentrant = True
    first = 2 * (dist.get_rank() % 2)
    if first == 0:  # the other rank hears of it: see the failure tests
        with refused("reentrant", f"layers.{first}", "use_reentrant=False"):
            pipe.engine.train(pipe.jobs(2))
    else:
        with contextlib.suppress(Exception):
            pipe.engine.train(pipe.jobs(2))
    engines.groups_for.cache_clear()


def forward_only_runs_on_v_placements():
    for schedule in ("ZBVZeroBubble", "DualPipeV"):
        with fails("backward"):
            Bare(layers_of(2), schedule, 4, F.mse_loss, alone=True).schedule.eval(
                torch.ones(4, 4), target=torch.zeros(4, 4)
            )
        engines.inferred(schedule)


class View(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return self.inner(x).view(-1, 4)


def a_view_may_cross():
    with fails("detach views in-place"):
        alone([View() for _ in range(4)], "InterleavedZeroBubble")

    torch.manual_seed(0)
    for schedule in SPLIT:
        check_exact(pipe_of(small_case([View() for _ in range(4)]), schedule), 4)


class Dictionary(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return {"y": self.inner(x)}


def outputs_may_be_dictionaries():
    with fails("dict", "str"):  # until 2.11 its keys are taken for tensors
        alone([Dictionary(), nn.Linear(4, 4)], "Interleaved1F1B")

    model = nn.Module()
    model.layers = nn.ModuleList([Dictionary(), Dictionary()])

    def draft(model, num_stages, inputs):
        made = handmade.Draft(model, 2, **inputs)
        y = made.call(0, operator.getitem, made.module(0, "layers.0", made.x), "y")
        y = made.call(1, operator.getitem, made.module(1, "layers.1", y), "y")
        program = made.program(outputs=[y])
        return dataclasses.replace(program, rebuild=lambda flat: {"y": flat[0]})

    case = handmade.Case(model, {"x": torch.ones(4, 4)}, draft, None)
    pipe = pipe_of(case, "GPipe")
    jobs = pipe.jobs(1)
    (flat,) = pipe.engine.infer(jobs)
    expected = model.layers[1](model.layers[0](torch.ones(4, 4))["y"])["y"]
    judge.assert_close(jobs[0].program.rebuild(flat)["y"], expected.detach())


def compiled_modules_are_refused_where_the_backward_is_split():
    warnings.simplefilter("ignore")  # torch's compiler warns about torch's own code
    modules = layers_of(4)
    modules[0].compile(backend="eager")
    Bare(modules, "ZBVZeroBubble", 4, F.mse_loss)  # torch does not see it
    for schedule in (*SPLIT, "Interleaved1F1B"):
        pipe = pipe_of(small_case(layers_of(4)), schedule)
        stage = pipe.stages[0]
        (name, layer), *_ = stage.layers.named_children()
        for wrapped in (layer, torch.compile(layer, backend="eager")):
            if wrapped is layer:
                layer.compile(backend="eager")
            else:
                layer._compiled_call_impl = None
                setattr(stage.layers, name, wrapped)
            if schedule in SPLIT:
                with refused(f"layers.{name}", "is compiled", schedule):
                    pipe.engine.check()
            else:
                pipe.engine.check()


def checkpointing_is_refused_where_the_backward_is_split():
    torch.manual_seed(0)
    modules = [Reentrant(False) for _ in range(4)]
    bare = Bare(modules, "InterleavedZeroBubble", 2, F.mse_loss)
    bare.step(torch.ones(4, 4), torch.zeros(4, 4))
    # A forward for the shapes, one per microbatch, and one recomputation were enough.
    counts = [module.calls for module in bare.modules.values()]
    assert max(counts) > 1 + 2 * 2, counts

    pipe = pipe_of(small_case([Reentrant(False) for _ in range(4)]), "InterleavedZeroBubble")
    if dist.get_rank() % 2 == 0:
        with refused("activation checkpointing", "layers.0", "InterleavedZeroBubble"):
            pipe.engine.train(pipe.jobs(2))
    else:
        with contextlib.suppress(Exception):
            pipe.engine.train(pipe.jobs(2))
    engines.groups_for.cache_clear()


def hooks_that_would_never_be_called_are_refused():
    fired = []
    modules = layers_of(4)
    for module in modules:
        for parameter in module.parameters():
            parameter.register_post_accumulate_grad_hook(lambda parameter: fired.append(parameter))
    bare = Bare(modules, "InterleavedZeroBubble", 2, F.mse_loss)
    bare.step(torch.ones(4, 4), torch.zeros(4, 4))
    owned = [parameter for module in bare.modules.values() for parameter in module.parameters()]
    assert len({id(parameter) for parameter in fired}) < len(owned)

    pipe = pipe_of(small_case(layers_of(4)), "InterleavedZeroBubble")
    fqn, parameter = engines.named_parameters(pipe.stages)[0]
    parameter.register_post_accumulate_grad_hook(lambda parameter: None)
    with refused(fqn, "post-accumulate-grad hook", "InterleavedZeroBubble"):
        pipe.engine.check()
    pipe = pipe_of(small_case(layers_of(4)), "Interleaved1F1B")
    calls = []
    _, parameter = engines.named_parameters(pipe.stages)[0]
    parameter.register_post_accumulate_grad_hook(lambda parameter: calls.append(1))
    check_exact(pipe, 2)
    assert len(calls) == 2


class Sum(nn.Module):
    def forward(self, x, y):
        return x + y


def a_weight_on_a_path_of_its_own_gets_its_gradient():
    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x):
            return self.inner(x)

    class Apart(First):
        def __init__(self):
            super().__init__()
            self.apart = nn.Parameter(torch.ones(4))

        def forward(self, x):
            return self.inner(x), self.apart.expand(len(x), 4) * 2

    torch.manual_seed(0)
    modules = [First(), Apart(), Sum(), First()]
    bare = Bare(modules, "InterleavedZeroBubble", 2, F.mse_loss)
    bare.step(torch.ones(4, 4), torch.zeros(4, 4))
    if 1 in bare.modules:
        assert bare.modules[1].apart.grad is None  # lost, silently

    model = nn.Module()
    model.first, model.apart, model.last = First(), Apart(), First()

    def draft(model, num_stages, inputs):
        made = handmade.Draft(model, 4, **inputs)
        x = made.module(1, "apart.inner", made.module(0, "first", made.x))
        rows = len(inputs["x"])
        y = made.method(1, "expand", made.call(1, torch.mul, made.attribute("apart.apart"), 2), rows, 4)
        z = made.module(3, "last", made.call(2, torch.add, x, y))
        return made.program(loss=[(made.call(3, F.mse_loss, z, made.target), "samples")])

    def loss(model, part):
        x, y = model.apart(model.first(part["x"]))
        return [F.mse_loss(model.last(x + y), part["target"])]

    batch = {"x": torch.randn(4, 4), "target": torch.randn(4, 4)}
    for schedule in SPLIT:
        check_exact(pipe_of(handmade.Case(model, batch, draft, loss), schedule), 4)


class Twice(nn.Module):
    """Uses one weight at two depths, with another one between."""

    def __init__(self):
        super().__init__()
        self.shared, self.between = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.shared(torch.tanh(self.between(torch.tanh(self.shared(x)))))


def a_weight_used_twice_in_a_stage_gets_its_gradient():
    torch.manual_seed(0)
    with fails("second time"):
        alone([Twice() for _ in range(2)], "ZBVZeroBubble")

    for schedule in SPLIT:
        check_exact(pipe_of(small_case([Twice() for _ in range(4)]), schedule), 4)


class SharedBias(nn.Module):
    """Two weights with one bias, as attention with a packed projection has for its queries and its keys."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4, 4))
        self.bias = nn.Parameter(torch.randn(4))

    def forward(self, x):
        return torch.tanh(F.linear(x, self.first, self.bias)) * F.linear(x, self.second, self.bias)


def weights_that_meet_in_a_third_are_accumulated_once():
    torch.manual_seed(0)
    with fails("second time"):  # or each of the two groups adds all of it, where the graph is retained
        alone([SharedBias() for _ in range(2)], "ZBVZeroBubble")

    for schedule in SPLIT:
        check_exact(pipe_of(small_case([SharedBias() for _ in range(4)]), schedule), 4)


def sharded_blocks_reduce_once_per_step():
    """FSDP2 on blocks alone, or on the stage: as many reductions per step as wrapped modules, and exact."""
    from torch.distributed.device_mesh import DeviceMesh

    class Counter(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.found += "reduce_scatter" in func.name()
            return func(*args, **(kwargs or {}))

    mesh = DeviceMesh("cpu", [[0, 2], [1, 3]], mesh_dim_names=("pp", "dp"))["dp"]

    def wrap(module, whole):
        layers = [part for part in module.modules() if isinstance(part, nn.Linear)]
        for layer in layers:
            fully_shard(layer, mesh=mesh, reshard_after_forward=False)
        if whole:
            fully_shard(module, mesh=mesh, reshard_after_forward=False)
        return len(layers)

    def blocks(num):
        torch.manual_seed(0)
        return [nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(num)]

    bare = Bare(blocks(2), "1F1B", 4, F.mse_loss, wrap=lambda module: (wrap(module, False), module)[1])
    bare.step(torch.ones(4, 4), torch.zeros(4, 4))
    with Counter() as counter:
        counter.found = 0
        bare.step(torch.ones(4, 4), torch.zeros(4, 4))
    assert counter.found == 4, counter.found  # once per microbatch

    for schedule in ("GPipe", "1F1B", "Interleaved1F1B", "LoopedBFS", *SPLIT):
        for whole in (False, True):
            case = small_case(blocks(8))
            pipe = pipe_of(case, schedule)
            wrapped = sum(wrap(stage, whole) for stage in pipe.stages)
            check_exact_sharded(pipe, 4)
            pipe.gradients.zero()
            with Counter() as counter:
                counter.found = 0
                pipe.step(pipe.jobs(4))
            assert counter.found == wrapped, (schedule, whole, counter.found)


def check_exact_sharded(pipe, num):
    pipe.step(pipe.jobs(num))
    _, wanted = handmade.reference(pipe.case, num)
    found = {fqn: parameter.grad.full_tensor() for fqn, parameter in engines.named_parameters(pipe.stages)}
    judge.assert_close(found, {fqn: wanted[fqn] for fqn in found}, "gradients")
    total = torch.stack([gradient.norm() for gradient in wanted.values()]).norm()
    judge.assert_close(pipe.gradients.clip(1e9), total, "norm")


CASES = {
    case.__name__: case
    for case in (
        tied_parameters_are_synchronised,
        a_tied_parameter_on_one_rank_is_scaled_once,
        accumulated_gradients_are_not_scaled_again,
        a_smaller_batch_gives_its_own_rows,
        a_mean_over_valid_tokens_is_exact,
        data_parallel_modules_are_refused,
        reentrant_checkpointing_is_refused,
        compiled_modules_are_refused_where_the_backward_is_split,
        checkpointing_is_refused_where_the_backward_is_split,
        hooks_that_would_never_be_called_are_refused,
        a_weight_on_a_path_of_its_own_gets_its_gradient,
        sharded_blocks_reduce_once_per_step,
        forward_only_runs_on_v_placements,
        a_weight_used_twice_in_a_stage_gets_its_gradient,
        weights_that_meet_in_a_third_are_accumulated_once,
        a_view_may_cross,
        outputs_may_be_dictionaries,
    )
}

if __name__ == "__main__":
    start_process_group(CPU)
    wanted = sys.argv[1:] or list(CASES)
    launch.run_cases({name: CASES[name] for name in wanted}, dtype=torch.float64)
