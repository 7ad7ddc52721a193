"""Random numbers depend on the call that draws them, not on where and how it runs."""

import copy
import dataclasses
import itertools

import handmade
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from fxpipe.program import Draw, DrawScope, run_info, set_run_info
from fxpipe.runtime.build.randomness import microbatch_seed
from fxpipe.runtime.run.local import LocalEngine
from fxpipe.runtime.run.work import Job

WIDTH = 8


class Attention(nn.Module):
    """Draws itself, and a module inside draws too."""

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(WIDTH, WIDTH)
        self.drop = nn.Dropout(0.3)
        self.still = nn.Dropout(0.0)  # calls dropout, draws nothing

    def forward(self, x):
        q = self.still(self.project(x))
        return self.drop(F.scaled_dot_product_attention(q, x, x, dropout_p=0.2))


class Block(nn.Module):
    """Every way to draw: a shared module called twice, functions, attention, a module with a module inside."""

    def __init__(self):
        super().__init__()
        self.attention = Attention()
        self.drop = nn.Dropout(0.1)
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        x = x + self.drop(self.attention(F.dropout(x, 0.15)))
        y = self.linear(x)
        return x + self.drop(F.dropout(y, 0.25))


class CheckpointedBlock(Block):
    """The same numbers, with parts run again in the backward, in reverse order."""

    def forward(self, x):
        def first(x):
            return self.drop(self.attention(F.dropout(x, 0.15)))

        x = x + checkpoint(first, x, use_reentrant=False)
        y = checkpoint(self.linear, x, use_reentrant=False)
        y = F.dropout(y, 0.25)
        return x + checkpoint(self.drop, y, use_reentrant=False)


def model_of(block=Block, num_blocks=4):
    torch.manual_seed(0)
    model = nn.Module()
    model.blocks = nn.ModuleList(block() for _ in range(num_blocks))
    return model


def attention_as_nodes(made, stage, fqn, q):
    x = made.module(stage, f"{fqn}.attention.project", q)
    x = made.module(stage, f"{fqn}.attention.still", x)
    draw = Draw(fqn, 0, f"{fqn}.attention", 0, 0)
    x = made.call(stage, F.scaled_dot_product_attention, x, q, q, dropout_p=0.2, meta={"draw": draw})
    return made.module(stage, f"{fqn}.attention.drop", x, scope=DrawScope(fqn, 0, ((f"{fqn}.attention.drop", 0),)))


def block_as_nodes(made, stage, fqn, x, *, whole_attention, region):
    start = len(list(made.graph.nodes))
    y = made.call(stage, F.dropout, x, 0.15, meta={"draw": Draw(fqn, 0, fqn, 0, 0)})
    if whole_attention:
        names = (f"{fqn}.attention.drop", f"{fqn}.attention")
        y = made.module(stage, f"{fqn}.attention", y, scope=DrawScope(fqn, 0, tuple((name, 0) for name in names)))
    else:
        y = attention_as_nodes(made, stage, fqn, y)
    y = made.module(stage, f"{fqn}.drop", y, scope=DrawScope(fqn, 0, ((f"{fqn}.drop", 0),)))
    x = made.call(stage, torch.add, x, y)
    y = made.module(stage, f"{fqn}.linear", x)
    y = made.call(stage, F.dropout, y, 0.25, meta={"draw": Draw(fqn, 0, fqn, 0, 1)})
    y = made.module(stage, f"{fqn}.drop", y, scope=DrawScope(fqn, 0, ((f"{fqn}.drop", 1),)))
    if region is not None:
        for node in list(made.graph.nodes)[start:]:
            set_run_info(node, dataclasses.replace(run_info(node), checkpoint=region))
    return made.call(stage, torch.add, x, y)


def program_of(model, num_stages, x, *, form="closed", checkpointed=False):
    made = handmade.Draft(model, num_stages, x=x)
    y = made.x
    for index in range(len(model.blocks)):
        stage, fqn = index * num_stages // len(model.blocks), f"blocks.{index}"
        made.drawing |= {fqn: "each", f"{fqn}.attention": "each"}
        made.drawing |= {f"{fqn}.drop": "once", f"{fqn}.attention.drop": "once"}
        if form == "closed":
            y = made.module(stage, fqn, y, scope=DrawScope(fqn, 0))
        else:
            region = index if checkpointed else None
            y = block_as_nodes(made, stage, fqn, y, whole_attention=form == "half", region=region)
    made.draw_names = ("dropout", "scaled_dot_product_attention")
    loss = made.call(num_stages - 1, torch.mean, made.call(num_stages - 1, torch.square, y))
    return made.program(loss=[(loss, "samples")])


def train(model, num_stages, xs, **options):
    program = program_of(copy.deepcopy(model), num_stages, xs[0], **options)
    stages = handmade.stages_of(model, program)
    for stage in stages:
        stage.add_program("a", program)
    jobs = [Job("a", program, {"x": x}, (1.0,), microbatch_seed(7, 0, index)) for index, x in enumerate(xs)]
    loss = LocalEngine(stages).train(jobs)
    return [loss, *dict(sorted(handmade.gradients_of(stages).items())).values()]


def batch(dtype=torch.float32):
    torch.manual_seed(3)
    return [torch.randn(2, 5, WIDTH, dtype=dtype) for _ in range(3)]


def same(left, right):
    return len(left) == len(right) and all(map(torch.equal, left, right))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_draws_depend_on_neither_the_number_of_stages_nor_on_which_blocks_are_opened(dtype):
    model = model_of().to(dtype)
    expected = train(model, 1, batch(dtype))
    for num_stages, form in itertools.product((1, 2, 4), ("closed", "half", "open")):
        assert same(train(model, num_stages, batch(dtype), form=form), expected), (num_stages, form)


def test_blocks_checkpointed_by_the_user_draw_the_same_numbers_again():
    expected = train(model_of(), 1, batch())
    assert same(train(model_of(CheckpointedBlock), 1, batch()), expected)
    assert same(train(model_of(CheckpointedBlock), 4, batch()), expected)


@pytest.mark.parametrize("form", ["half", "open"])
def test_opened_blocks_keep_their_checkpointing_and_their_draws(form):
    expected = train(model_of(), 1, batch())
    calls = []
    model = model_of()
    for block in model.blocks:
        block.linear.register_forward_hook(lambda *_: calls.append(1))
    assert same(train(model, 2, batch(), form=form, checkpointed=True), expected)
    assert len(calls) == 4 + 2 * 4 * 3  # once for the example, then twice per block and microbatch


def test_a_draw_differs_between_microbatches_steps_blocks_and_replicas():
    seeds = {microbatch_seed(*key) for key in itertools.product(range(2), range(4), range(4), range(2))}
    assert len(seeds) == 64
    x = torch.ones(1, 64, WIDTH)
    model = model_of(num_blocks=2)
    program = program_of(copy.deepcopy(model), 1, x)
    (stage,) = handmade.stages_of(model, program)
    stage.add_program("a", program)
    masks = []
    for block in stage.blocks:
        block.drop.register_forward_hook(lambda _, args, y: masks.append((y == 0) & (args[0] != 0)))
    for seed in (1, 2):
        stage("a", (), {"x": x}, seed)
    assert len(masks) == 8
    assert all(mask.any() and not mask.all() for mask in masks)
    assert len({mask.numpy().tobytes() for mask in masks}) == 8


@pytest.mark.parametrize("form", ["closed", "open"])
def test_the_random_state_is_left_as_it_was(form):
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    train_inputs = [torch.ones(2, 5, WIDTH)]
    model = model_of(CheckpointedBlock)
    program = program_of(copy.deepcopy(model), 2, train_inputs[0], form=form, checkpointed=form == "open")
    stages = handmade.stages_of(model, program)
    for stage in stages:
        stage.add_program("a", program)
    torch.manual_seed(11)
    LocalEngine(stages).train([Job("a", program, {"x": train_inputs[0]}, (1.0,), 5)])
    assert torch.equal(torch.rand(3), expected)


def test_an_error_in_the_forward_leaves_no_mode_and_no_seed_behind():
    model = model_of(num_blocks=1)
    program = program_of(copy.deepcopy(model), 1, torch.ones(1, 2, WIDTH))
    (stage,) = handmade.stages_of(model, program)
    stage.add_program("a", program)

    def fail(*_):
        raise ValueError("broken")

    handle = stage.blocks[0].linear.register_forward_pre_hook(fail)
    torch.manual_seed(1)
    before = torch.default_generator.get_state()
    with pytest.raises(ValueError, match="broken"):
        stage("a", (), {"x": torch.ones(1, 2, WIDTH)}, 1)
    assert torch.equal(torch.default_generator.get_state(), before)
    handle.remove()
    first = stage("a", (), {"x": torch.ones(1, 2, WIDTH)}, 1)
    assert same(first, stage("a", (), {"x": torch.ones(1, 2, WIDTH)}, 1))


def test_a_module_called_outside_of_a_stage_draws_as_usual():
    model = model_of(num_blocks=1)
    program = program_of(copy.deepcopy(model), 1, torch.ones(1, 2, WIDTH))
    (stage,) = handmade.stages_of(model, program)
    stage.add_program("a", program)
    LocalEngine([stage]).train([Job("a", program, {"x": torch.ones(1, 2, WIDTH)}, (1.0,), 5)])
    x = torch.ones(1, 9, WIDTH)
    torch.manual_seed(4)
    expected = model.blocks[0](x)
    torch.manual_seed(4)
    plain = copy.deepcopy(model.blocks[0])
    plain.load_state_dict(stage.blocks[0].state_dict())
    torch.manual_seed(4)
    assert torch.equal(stage.blocks[0](x), expected)


def test_a_module_that_seeds_for_itself_keeps_its_own_numbers():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, x):
            torch.manual_seed(99)
            return self.drop(x)

    model = nn.Module()
    model.own = Own()
    made = handmade.Draft(model, 1, x=torch.ones(4, 4, requires_grad=True))
    y = made.module(0, "own", made.x, scope=DrawScope("own", 0))
    made.drawing, made.draw_names = {"own.drop": "once"}, ("dropout",)
    program = made.program(outputs=[y])
    (stage,) = handmade.stages_of(model, program)
    stage.add_program("a", program)
    (found,) = stage("a", (), {"x": torch.ones(4, 4)}, 1)
    assert torch.equal(found, model.own(torch.ones(4, 4)))
