"""Memory, precision, compilation and optimisers of all stages in one process; over ranks: ``replicas_worker``."""

import contextlib
import copy
import json
import linecache
import warnings

import models
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxpipe
import fxpipe.training
import fxpipe.variants

BATCH = {"microbatches": 4, "schedule": "GPipe"}


def pipe_of(model, batch, stages=2, **options):
    given = {**BATCH, "loss_fn": models.token_loss, **options}
    return fxpipe.compile(model, stages, (), batch, **given)


def gpt2(**config):
    torch.manual_seed(0)
    return models.huggingface("GPT2Config", models.GPT2 | config, "GPT2LMHeadModel")()


def gradients(pipe):
    return {fqn: parameter.grad for fqn, parameter in pipe.named_parameters()}


class Counted(nn.Linear):
    calls = 0

    def forward(self, x):
        type(self).calls += 1
        return super().forward(x)


class Block(nn.Module):
    """Draws, normalises over the batch, and calls softmax in a part of its own."""

    def __init__(self):
        super().__init__()
        self.inner, self.norm, self.outer = Counted(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 8)

    def forward(self, x):
        return x + F.dropout(self.outer(F.gelu(self.norm(self.inner(x)))), 0.2, self.training)


class Tower(nn.Module):
    def __init__(self, blocks=4):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def tower():
    torch.manual_seed(0)
    return Tower(), {"x": torch.randn(8, 8), "target": torch.randn(8, 8)}


@pytest.mark.parametrize(
    ("recompute", "grain"), [("block", "block"), ("block", "op"), (["blocks.*.norm", "blocks.2"], "block")]
)
def test_recomputation_changes_no_number_and_runs_each_forward_once_more(recompute, grain):
    """Dropout draws the same again, and running statistics move once."""
    model, batch = tower()
    runs = []
    for way in (None, recompute):
        training = fxpipe.Training(recompute=way)
        stages = 3 if grain == "op" else 2
        with pipe_of(model, batch, stages, loss_fn=F.mse_loss, training=training, grain=grain) as pipe:
            pipe.materialize()
            Counted.calls = 0
            loss = pipe.step(**batch)
            runs.append((loss, gradients(pipe), dict(pipe.named_buffers()), Counted.calls, pipe.plan))
    (loss, wanted, buffers, calls, _), (again, found, moved, more, plan) = runs
    assert torch.equal(loss, again)
    assert all(torch.equal(found[fqn], gradient) for fqn, gradient in wanted.items())
    assert all(torch.equal(moved[fqn], buffer) for fqn, buffer in buffers.items())
    assert calls == 4 * 4
    assert more == calls + (4 * 4 if recompute == "block" else 4)
    named = {fqn for stage in plan.stages for fqn in stage.recompute}
    assert named == (
        {f"blocks.{i}" for i in range(4)}
        if recompute == "block"
        else {"blocks.0.norm", "blocks.1.norm", "blocks.2", "blocks.3.norm"}
    )


@contextlib.contextmanager
def kept_numbers():
    sizes = []

    def pack(tensor):
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield sizes


def test_recomputation_keeps_the_inputs_of_blocks_alone():
    model, batch = (
        nn.Sequential(*(nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)) for _ in range(6))),
        {},
    )
    batch = {"input": torch.randn(64, 64), "target": torch.randn(64, 64)}
    kept = []
    for way in (None, "block"):
        with pipe_of(model, batch, loss_fn=F.mse_loss, training=fxpipe.Training(recompute=way)) as pipe:
            pipe.materialize()
            with kept_numbers() as sizes:
                pipe.step(**batch)
            kept.append(sum(sizes))
    assert kept[1] < kept[0]


def test_a_pattern_that_matches_nothing_is_refused():
    model, batch = tower()
    with pytest.raises(
        fxpipe.PlanError, match=r"recompute= names 'block\.\*', which no module of Tower matches\n  give"
    ):
        pipe_of(model, batch, loss_fn=F.mse_loss, training=fxpipe.Training(recompute=["block.*"]))


def test_hugging_face_s_own_checkpointing_changes_no_number():
    batch, runs = models.causal_batch(), []
    for checkpointing in (False, True):
        model = gpt2(resid_pdrop=0.1, attn_pdrop=0.1, embd_pdrop=0.1)
        if checkpointing:
            with warnings.catch_warnings(action="ignore"):  # transformers 5.24 has a new name for it
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with pipe_of(model, batch).materialize() as pipe:
            runs.append((pipe.step(**batch), gradients(pipe)))
    assert torch.equal(runs[0][0], runs[1][0])
    assert all(torch.equal(runs[1][1][fqn], gradient) for fqn, gradient in runs[0][1].items())


def test_an_optimizer_takes_groups_and_a_rank_without_parameters():
    model, batch = tower()
    for block in model.blocks:
        block.requires_grad_(False)
    last = model.blocks[-1].outer
    last.requires_grad_(True)
    with pipe_of(model, batch, loss_fn=F.mse_loss).materialize() as pipe:
        optimizer = pipe.optimizer(
            torch.optim.AdamW, lambda fqn, p: {"weight_decay": 0.1 if p.dim() > 1 else 0.0}, lr=0.1
        )
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
        before = {fqn: parameter.detach().clone() for fqn, parameter in pipe.named_parameters()}
        pipe.step(**batch)
        optimizer.step()
        scheduler.step()
        changed = {fqn for fqn, parameter in pipe.named_parameters() if not torch.equal(parameter, before[fqn])}
        assert changed == {"blocks.3.outer.weight", "blocks.3.outer.bias"}
        with pytest.raises(
            fxpipe.MaterializeError, match=r"groups= gave a float for blocks\.3\.outer\.weight\n  give a"
        ):
            pipe.optimizer(torch.optim.SGD, lambda fqn, p: 0.1)
        for parameter in pipe.parameters():
            parameter.requires_grad_(False)
        for cls in (torch.optim.AdamW, torch.optim.SGD, torch.optim.Muon):
            empty = pipe.optimizer(cls, lr=0.1)
            empty.step()
            assert len(empty.param_groups) == 1


def test_wide_gradients_stay_wide_where_asked():
    model, batch = gpt2().to(torch.bfloat16), models.causal_batch()
    for keep in (False, True):
        with pipe_of(model, batch).materialize(keep_wide=keep) as pipe:
            pipe.step(**batch)
            assert {p.grad.dtype for p in pipe.parameters()} == {torch.float32 if keep else torch.bfloat16}


def test_a_scaled_step_is_that_of_plain_training():
    """The scale is on the gradients until unscale_, never on the loss; an overflow skips the step."""
    model, batch = gpt2(), models.causal_batch()
    plain = copy.deepcopy(model)
    loss = models.token_loss(plain(batch["input_ids"]), batch["target"])
    loss.backward()
    with pipe_of(model, batch).materialize() as pipe:
        optimizer = pipe.optimizer(torch.optim.SGD, lr=0.1)
        scaler = pipe.grad_scaler(init_scale=2.0**8)
        found = pipe.step(**batch, scaler=scaler)
        torch.testing.assert_close(found, loss.detach(), rtol=1e-5, atol=0)
        for fqn, parameter in pipe.named_parameters():
            torch.testing.assert_close(parameter.grad, plain.get_parameter(fqn).grad * 256, rtol=1e-4, atol=1e-3)
        scaler.unscale_(optimizer)
        for fqn, parameter in pipe.named_parameters():
            torch.testing.assert_close(parameter.grad, plain.get_parameter(fqn).grad, rtol=1e-4, atol=1e-6)
        before = pipe.state_dict()["lm_head.weight"].clone()
        next(pipe.parameters()).grad[0] = float("inf")
        pipe.zero_grad()
        pipe.step(**batch, scaler=scaler)
        scaler.update(2.0**8)
        pipe.step(**batch, scaler=scaler)
        next(pipe.parameters()).grad[0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(pipe.state_dict()["lm_head.weight"], before)
        assert scaler.get_scale() == 2.0**7


def test_evaluation_gives_the_loss_alone():
    model, batch = gpt2(resid_pdrop=0.1), models.causal_batch()
    with pipe_of(model, batch).materialize(timings=True) as pipe:
        pipe.step(**batch)
        assert (pipe.timings[0].samples, pipe.timings[0].tokens) == (models.BATCH, models.BATCH * models.LENGTH)
        pipe.zero_grad()
        pipe.eval()
        wanted = models.token_loss(copy.deepcopy(model).eval()(batch["input_ids"]), batch["target"])
        found = pipe.evaluate(**batch)
        assert not found.requires_grad
        torch.testing.assert_close(found, wanted.detach(), rtol=1e-5, atol=0)
        assert all(parameter.grad is None for parameter in pipe.parameters())


# Dynamo looks at the gradients of what it is given.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("what", ["blocks", "stage", {"backend": "eager"}, {"of": "stage", "fullgraph": True}])
def test_compiled_stages_compute_the_same(what):
    """Equal blocks are compiled once, and nothing again after the second step."""
    frames = []

    def backend(graph, _inputs):
        frames.append(graph)
        return graph.forward

    torch.manual_seed(0)
    model = nn.Sequential(*(models.Residual(8) for _ in range(4)))
    batch = {"input": torch.randn(8, 8), "target": torch.randn(8, 8)}
    options = {"of": what} if isinstance(what, str) else dict(what)
    options["backend"] = backend
    with pipe_of(model, batch, loss_fn=F.mse_loss).materialize() as plain:
        loss, wanted = plain.step(**batch), gradients(plain)
    torch.compiler.reset()
    with pipe_of(model, batch, loss_fn=F.mse_loss).materialize(compile=options) as pipe:
        counts = []
        for _ in range(3):
            pipe.zero_grad()
            torch.testing.assert_close(pipe.step(**batch), loss)
            counts.append(len(frames))
        torch.testing.assert_close(gradients(pipe), wanted)
    assert counts[1] == counts[2]
    assert (
        counts[2] == 2
    )  # two stages; of four equal blocks, the first one, whose input takes no gradient, and one more


def test_what_cannot_be_compiled_is_refused():
    model, batch = tower()
    with pytest.raises(fxpipe.MaterializeError, match=r"compile='all' is unknown\n  pass 'blocks', 'stage'"):
        pipe_of(model, batch, loss_fn=F.mse_loss).materialize(compile="all")
    pipe = pipe_of(model, batch, 4, loss_fn=F.mse_loss, schedule="ZBVZeroBubble")
    with pytest.raises(fxpipe.ScheduleError, match=r"ZBVZeroBubble splits the backward, which compiled.*\n  use GPipe"):
        pipe.materialize(compile="blocks")
    with pytest.raises(fxpipe.MaterializeError, match=r"parallelize= returned a Linear instead of the stage\n  change"):
        pipe_of(model, batch, loss_fn=F.mse_loss).materialize(parallelize=lambda stage: nn.Linear(1, 1))


def test_a_trace_says_what_was_done_when(tmp_path):
    model, batch = tower()
    with pipe_of(model, batch, loss_fn=F.mse_loss).materialize(timings=True) as pipe:
        for _ in range(2):
            pipe.step(**batch)
        first, second = pipe.timings
        assert (first.step, second.step, second.samples) == (0, 1, 8)
        assert [stage for stage, _ in second.forward_s] == [stage for stage, _ in second.backward_s] == [0, 1]
        assert 0 <= second.bubble < 1
        parts = sum(seconds for _, seconds in (*second.forward_s, *second.backward_s)) + second.communication_s
        assert parts + second.waiting_s == pytest.approx(second.seconds)
        pipe.trace(tmp_path / "trace.json")
    written = json.loads((tmp_path / "trace.json").read_text())
    names = [event["name"] for event in written["traceEvents"] if event["ph"] == "X" and event["args"]["step"] == 1]
    wanted = {f"{stage}{what}{index}" for stage in range(2) for what in "FB" for index in range(4)}
    assert set(names) == wanted | {"step", "communication"}
    assert written["otherData"]["ranks"][0]["stages"] == [0, 1]
    assert all(event["dur"] >= 0 and event["ts"] >= 0 for event in written["traceEvents"] if event["ph"] == "X")
    with (
        pipe_of(model, batch, loss_fn=F.mse_loss).materialize() as pipe,
        pytest.raises(fxpipe.MaterializeError, match=r"nothing was recorded\n  call pipe.materialize\(timings=True\)"),
    ):
        pipe.trace(tmp_path / "other.json")


def test_a_batch_of_ever_new_lengths_fills_no_memory():
    """What was not used for longest is let go, its source and constants too, and captured again when it comes back."""
    model = models.Street()
    batch = {
        name: value.float() if value.is_floating_point() else value for name, value in models.street_batch().items()
    }
    before_lines = [name for name in linecache.cache if name.startswith("<fxpipe stage")]
    with pytest.MonkeyPatch.context() as patch:
        for module in (fxpipe.variants, fxpipe.training):
            patch.setattr(module, "MOST_VARIANTS", 3)
        with pipe_of(model, batch).materialize() as pipe:
            losses = {}
            for length in (2, 3, 4, 5, 6, 2, 5, 6):
                cut = {name: value[:, :length] if value.dim() > 1 else value for name, value in batch.items()}
                loss = float(pipe.step(**cut))
                assert losses.setdefault(length, loss) == loss
                assert all(stage.num_programs <= 4 for stage in pipe.stage_modules)
            assert len(pipe._trainer.variants.names) == 3
            kept = [name for name in linecache.cache if name.startswith("<fxpipe stage")]
            assert len(kept) <= 8 + len(before_lines)


def test_autocast_gives_the_loss_of_one_stage_bit_by_bit():
    """Gradients of ties and of contiguous copies may be added up in another order: 2 ulp of the largest entry."""
    model, batch = gpt2(), models.causal_batch()
    runs = []
    for stages in (1, 2):
        with torch.autocast("cpu", torch.bfloat16), pipe_of(model, batch, stages).materialize() as pipe:
            runs.append((pipe.step(**batch), gradients(pipe)))
    (loss, wanted), (again, found) = runs
    assert torch.equal(loss, again)
    with torch.autocast("cpu", torch.bfloat16):
        plain = models.token_loss(model(batch["input_ids"]), batch["target"])
    torch.testing.assert_close(loss.double(), plain.detach().double(), rtol=2e-2, atol=0)
    largest = max(float(gradient.abs().max()) for gradient in wanted.values())
    assert all(float((found[fqn] - gradient).abs().max()) <= 2**-7 * largest for fqn, gradient in wanted.items())


class Moving(nn.Module):
    """Statistics that a forward moves: running means, and the vectors of a spectral norm."""

    def __init__(self):
        super().__init__()
        parts = (
            nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)), nn.BatchNorm1d(8)) for _ in range(4)
        )
        self.layers = nn.ModuleList(parts)

    def forward(self, x):
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


@pytest.mark.parametrize("recompute", [None, "block"])
def test_statistics_move_once_per_microbatch(recompute):
    torch.manual_seed(0)
    model = Moving().double()
    batch = {"x": torch.randn(8, 8).double(), "target": torch.randn(8, 8).double()}
    plain = copy.deepcopy(model)
    for x, target in zip(batch["x"].split(2), batch["target"].split(2), strict=True):
        (F.mse_loss(plain(x), target) / 4).backward()
    training = fxpipe.Training(recompute=recompute)
    with pipe_of(model, batch, loss_fn=F.mse_loss, training=training).materialize() as pipe:
        pipe.step(**batch)
        for fqn, buffer in pipe.named_buffers():
            torch.testing.assert_close(buffer, plain.get_buffer(fqn), rtol=1e-12, atol=1e-12)
        for fqn, parameter in pipe.named_parameters():
            torch.testing.assert_close(parameter.grad, plain.get_parameter(fqn).grad, rtol=1e-10, atol=1e-12)


def test_hooks_on_blocks_are_called_once_per_microbatch():
    model, batch = tower()
    called = []
    model.blocks[1].register_forward_hook(lambda module, args, output: called.append(output.shape) or output * 2)
    plain = copy.deepcopy(model).eval()
    with pipe_of(model, batch, loss_fn=F.mse_loss, training=fxpipe.Training(recompute="block")).materialize() as pipe:
        pipe.eval()
        pipe.step(**batch)  # captures, which calls them too
        called.clear()
        loss = pipe.step(**batch)
        assert called == [(2, 8)] * 4
        torch.testing.assert_close(loss, F.mse_loss(plain(batch["x"]), batch["target"]).detach())
