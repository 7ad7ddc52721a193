"""One of four ranks: two stages by two replicas, held against one process on the batch of both."""

from __future__ import annotations

import atexit
import copy
import functools
import os
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

import launch
import models
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import fxpipe
import fxpipe.verification

RANKS = 4
HALF = models.BATCH // 2
STAGES = {"GPipe": 2, "1F1B": 2, "Interleaved1F1B": 4, "ZBVZeroBubble": 4}


@functools.cache
def mesh_of(*names: str, shape: tuple[int, ...] = (2, 2)) -> DeviceMesh:
    return DeviceMesh("cpu", torch.arange(RANKS).reshape(shape), mesh_dim_names=names)


def mesh() -> DeviceMesh:
    return mesh_of("pp", "dp")


@functools.cache
def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    return models.CASES[name].build().double()


def batch_of(name: str) -> dict[str, Any]:
    """A batch of which the halves have unequal numbers of valid targets."""
    batch = models.CASES[name].batch()
    if batch["target"].dtype == torch.int64:
        batch["target"][HALF:, ::2] = -100
    return batch


def own_half(batch: dict[str, Any], replica: int | None = None) -> dict[str, Any]:
    replica = mesh().get_local_rank("dp") if replica is None else replica
    return {name: value[replica * HALF : (replica + 1) * HALF] for name, value in batch.items()}


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)


@functools.cache
def reference(name: str) -> tuple[list[torch.Tensor], dict[str, torch.Tensor], dict[str, torch.Tensor], torch.Tensor]:
    """Losses of five steps of one process on the whole batch, first gradients and their norm, and last weights."""
    case, model, batch = models.CASES[name], copy.deepcopy(model_of(name)), batch_of(name)
    optimizer, losses, first, norm = adamw(model.parameters()), [], {}, torch.tensor(0.0)
    target = batch.pop("target")
    for _ in range(5):
        optimizer.zero_grad()
        loss = case.loss_fn(model(**batch), target)
        loss.backward()
        losses.append(loss.detach())
        if not first:
            first = {fqn: p.grad.clone() for fqn, p in model.named_parameters() if p.grad is not None}
            norm = nn.utils.get_total_norm(list(first.values()))
        optimizer.step()
    return losses, first, {fqn: p.detach() for fqn, p in model.named_parameters()}, norm


def whole(tensor: Any) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def shard(stage: nn.Module) -> None:
    for fqn, block in stage.named_modules():
        if fqn.rpartition(".")[2].isdigit():
            fully_shard(block, mesh=mesh()["dp"])
    fully_shard(stage, mesh=mesh()["dp"])


def shared_directory() -> str:
    """A path that is the same on every rank, and is not there yet; it goes with the first one."""
    box = [tempfile.mkdtemp()] if dist.get_rank() == 0 else [None]
    if box[0] is not None:
        atexit.register(shutil.rmtree, box[0], ignore_errors=True)
    dist.broadcast_object_list(box)
    return os.path.join(str(box[0]), "checkpoint")


def compiled(name: str, schedule: str = "1F1B", model: nn.Module | None = None, **options: Any) -> fxpipe.Pipeline:
    case = models.CASES[name]
    given = {"microbatches": 3 if schedule == "GPipe" else 2, "mesh": mesh(), "ranks": 2, "loss_fn": case.loss_fn}
    batch = options.pop("batch", None) or own_half(batch_of(name), 0)
    return fxpipe.compile(
        model or model_of(name), STAGES[schedule], (), batch, schedule=schedule, **{**given, **options}
    )


def close(found: torch.Tensor, wanted: torch.Tensor, what: str, tolerance: float = 1e-12) -> None:
    worst = (found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-6)
    assert worst <= tolerance, f"{what}: {worst:.2e}"


def exact(name: str, schedule: str, sharded: bool) -> None:
    losses, first, weights, norm = reference(name)
    batch = own_half(batch_of(name))
    pipe = compiled(name, schedule, grain="block").materialize(parallelize=shard if sharded else None)
    with pipe:
        assert pipe.plan.training.data_parallel == 2
        optimizer = adamw(pipe.parameters())
        for step in range(5):
            pipe.zero_grad()
            loss = pipe.step(**batch)
            close(loss, losses[step], f"loss of step {step}", 1e-12 if step == 0 else 1e-10)
            if step == 0:
                close(pipe.clip_grad_norm_(1e9), norm, "norm")
                largest = max(float(gradient.abs().max()) for gradient in first.values())
                for fqn, parameter in pipe.named_parameters():
                    worst = float((whole(parameter.grad) - first[fqn]).abs().max()) / largest
                    assert worst <= 1e-12, f"{fqn}: {worst:.2e}"
            if step in (1, 2):  # a look at the loss leaves gradients and weights alone
                pipe.evaluate(**batch)
                assert sharded == any(hasattr(parameter, "device_mesh") for parameter in pipe.parameters())
            optimizer.step()
            if step == 2:
                pipe.infer(**batch)
        for fqn, parameter in pipe.named_parameters():
            close(whole(parameter).detach(), weights[fqn], fqn, 1e-10)
        assert sharded == any(hasattr(parameter, "device_mesh") for parameter in pipe.parameters())


def nothing_is_gathered_or_reduced_per_microbatch() -> None:
    """FSDP2 inside: as many collectives with six microbatches as with two."""

    class Counter(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            for kind in ("reduce_scatter", "allgather"):
                self.found[kind] = self.found.get(kind, 0) + (kind in func.name().replace("all_gather", "allgather"))
            return func(*args, **(kwargs or {}))

    counts = []
    for number in (2, 6):
        with compiled("street", "1F1B", microbatches=number).materialize(parallelize=shard) as pipe:
            batch = own_half(batch_of("street"))
            pipe.step(**batch)
            with Counter() as counter:
                counter.found = {}
                pipe.step(**batch)
            counts.append(counter.found)
    assert counts[0] == counts[1]
    assert counts[0]["reduce_scatter"] >= 1


def accumulated_steps_are_reduced_once() -> None:
    """Two steps before the optimiser's, and another without zero_grad; a message per bucket, once."""
    _, first, _, _ = reference("street")
    batch = own_half(batch_of("street"))
    with compiled("street").materialize() as pipe:
        pipe.step(**batch, last=False)
        pipe.step(**batch)
        for fqn, parameter in pipe.named_parameters():
            close(parameter.grad, 2 * first[fqn], fqn, 1e-11)
        pipe.step(**batch)
        for fqn, parameter in pipe.named_parameters():
            close(parameter.grad, 3 * first[fqn], fqn, 1e-11)


def overheard(kept: list[Any], real: Callable[..., Any], key: Any, losses: Any, dtype: Any) -> Any:
    kept.append(losses)
    return real(key, losses, dtype)


def dropout_differs_between_replicas_and_repeats_with_the_seed() -> None:
    torch.manual_seed(0)
    model = models.Street(0.3).double()
    batch = own_half(batch_of("street"), 0)  # the same on both replicas
    runs = []
    for seed in (1, 1, 2):
        with compiled("street", model=model, seed=seed).materialize() as pipe:
            losses: list[Any] = []
            pipe._running.engine._share_loss = functools.partial(overheard, losses, pipe._running.engine._share_loss)
            total = pipe.step(**batch)
            gathered: list[Any] = [None] * RANKS
            dist.all_gather_object(gathered, [float(term) * share for ((term, share),) in losses[0]])
            runs.append((float(total), [each for each in gathered if each]))
    (first, second), other = runs[:2], runs[2]
    assert first == second
    assert first != other
    assert first[1][0] != first[1][1], "both replicas drew the same"


def a_parameter_that_no_replica_reaches_gets_no_gradient() -> None:
    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
            self.idle = nn.Parameter(torch.ones(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x) + 0 * self.layers[0].weight.sum()
            return x

    model = Part()
    batch = {"x": torch.randn(HALF, 4), "target": torch.randn(HALF, 4)}
    pipe = fxpipe.compile(model, 2, (), batch, loss_fn=nn.functional.mse_loss, mesh=mesh(), microbatches=2)
    with pipe.materialize():
        pipe.step(**batch)
        for fqn, parameter in pipe.named_parameters():
            assert (parameter.grad is None) == (fqn == "idle"), fqn


def a_gate_that_lets_nothing_of_a_batch_through_leaves_none() -> None:
    """In the stage before it, of plain and of sharded weights: where it is shut in all replicas, and only there."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
            self.gate, self.head = Gate(), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x) + 0 * self.layers[0].bias.sum()
            return self.head(self.gate(x))

    class Gate(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else torch.zeros_like(x)

    model = Gated()
    batch = {"x": torch.ones(4, 4), "target": torch.ones(4, 4)}
    with torch.no_grad():
        for layer in model.layers:
            layer.weight.copy_(torch.eye(4))
            layer.bias.zero_()
    options = {"loss_fn": nn.functional.mse_loss, "mesh": mesh(), "microbatches": 2, "grain": "block"}
    for parallelize in (None, shard):
        with fxpipe.compile(model, 2, (), batch, **options).materialize(parallelize=parallelize) as pipe:
            for is_open in (-1, 0, 1):  # nowhere, in one replica, in both
                pipe.zero_grad()
                sign = 1 if mesh().get_local_rank("dp") <= is_open else -1
                pipe.step(x=sign * batch["x"], target=batch["target"])
                for fqn, parameter in pipe.named_parameters():
                    assert (parameter.grad is None) == (is_open < 0 and fqn.startswith("layers.")), (fqn, is_open)


def everything_else_goes_over_both_dimensions() -> None:
    """Inference, evaluation, verification, state dictionaries."""
    losses, _, _, _ = reference("gpt2")
    batch = own_half(batch_of("gpt2"))
    model = model_of("gpt2")
    with compiled("gpt2").materialize() as pipe:
        close(pipe.evaluate(**batch), losses[0], "loss")
        inputs = {name: value for name, value in batch.items() if name != "target"}
        with torch.no_grad():
            torch.testing.assert_close(pipe.infer(**inputs).logits, model(**inputs).logits, rtol=0, atol=1e-12)
        found = pipe.verify(**batch)
        assert found.reference == "the unpartitioned model"
        assert found.worst.error < 1e-11
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fxpipe.verification, "fits_whole", lambda *_: dist.get_rank() != 1)
            assert pipe.verify(**batch).reference == "the stages run one by one"
        state = pipe.state_dict(full=True)
        expected = model.state_dict()
        assert state.keys() == (expected.keys() if dist.get_rank() == 0 else set())
        assert all(torch.equal(value, expected[fqn]) for fqn, value in state.items())
    with compiled("gpt2").materialize(parallelize=shard) as pipe:
        assert pipe.verify(**batch).worst.error < 1e-11
        state = pipe.state_dict(full=True)
        assert all(torch.equal(value, expected[fqn]) for fqn, value in state.items())
        pipe.load_state_dict({fqn: value + 1 for fqn, value in expected.items()})
        state = pipe.state_dict(full=True)
        assert all(torch.equal(value, expected[fqn] + 1) for fqn, value in state.items())


def a_wrong_batch_on_one_replica_is_everybodys_error() -> None:
    batch = own_half(batch_of("street"))
    with compiled("street").materialize() as pipe:
        wrong = {**batch, "tokens": batch["tokens"][:1]} if dist.get_rank() == 3 else batch
        with pytest.raises(fxpipe.ScheduleError, match=r"^rank 3: "):
            pipe.step(**wrong)
        parts = [{name: value[:2] for name, value in batch.items()}] * (2 + dist.get_rank() % 2)
        with pytest.raises(fxpipe.PlanError, match="the batch differs between ranks: rank 0 has"):
            pipe.step(microbatches=parts)
        length = 5 + dist.get_rank() % 2  # replicas may have other lengths
        pipe.step(**{name: value[:, :length] if value.dim() > 1 else value for name, value in batch.items()})


def all_skip_the_step_that_one_finds_infinite() -> None:
    """A rank with nothing to train has an optimiser too; an overflow on one rank is everybody's."""
    model = copy.deepcopy(model_of("gpt2")).float()
    for fqn, parameter in model.named_parameters():
        parameter.requires_grad_(fqn.startswith("transformer.h.0."))
    batch = own_half(batch_of("gpt2"))
    for sharded in (False, True):
        with compiled("gpt2", model=model).materialize(parallelize=shard if sharded else None) as pipe:
            optimizer = pipe.optimizer(torch.optim.AdamW, lr=0.1)
            (holder,) = [stage.rank for stage in pipe.plan.stages if "transformer.h.0" in stage.layers]
            position = mesh().get_local_rank("pp")
            assert (optimizer.param_groups[0]["params"][0].numel() == 0) == (position != holder)
            scaler = pipe.grad_scaler(init_scale=4.0, growth_interval=1)
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
            for is_infinite in (False, True):
                before = [parameter.detach().clone() for parameter in pipe.parameters() if parameter.requires_grad]
                optimizer.zero_grad()
                pipe.step(**batch, scaler=scaler)
                if is_infinite and position == holder and mesh().get_local_rank("dp") == 1:
                    grad = next(parameter.grad for parameter in pipe.parameters() if parameter.grad is not None)
                    getattr(grad, "_local_tensor", grad).fill_(float("inf"))
                scaler.step(optimizer)
                scaler.update()
                scheduler.step()
                after = [parameter.detach() for parameter in pipe.parameters() if parameter.requires_grad]
                same = [torch.equal(whole(one), whole(other)) for one, other in zip(before, after, strict=True)]
                assert all(same) if is_infinite else not any(same)
                assert scaler.get_scale() == (4.0 if is_infinite else 8.0)


def recomputed_blocks_give_the_same_numbers() -> None:
    _, first, _, _ = reference("llama")
    batch = own_half(batch_of("llama"))
    options = {"training": fxpipe.Training(recompute="block")}
    for sharded in (False, True):
        with compiled("llama", "1F1B", **options).materialize(parallelize=shard if sharded else None) as pipe:
            assert all(stage.recompute for stage in pipe.plan.stages)
            pipe.step(**batch)
            for fqn, parameter in pipe.named_parameters():
                close(whole(parameter.grad), first[fqn], fqn, 1e-11)


def a_replica_without_valid_targets_holds_nobody_up() -> None:
    """It has no gradients in the last stage; what the other replica has is reduced all the same."""
    case, model, batch = models.CASES["gpt2"], copy.deepcopy(model_of("gpt2")), batch_of("gpt2")
    batch["target"][HALF:] = -100
    inputs = {name: value for name, value in batch.items() if name != "target"}
    loss = case.loss_fn(model(**inputs), batch["target"])
    loss.backward()
    for sharded in (False, True):
        with compiled("gpt2").materialize(parallelize=shard if sharded else None) as pipe:
            close(pipe.step(**own_half(batch)), loss.detach(), "loss")
            for fqn, parameter in pipe.named_parameters():
                close(whole(parameter.grad), model.get_parameter(fqn).grad, fqn)


def a_tie_that_is_divided_in_two_stages_of_a_rank_is_loaded_and_saved_as_one() -> None:
    """Both shards get what is loaded, weights and state; groups come in the model's order, whatever the placement."""
    model, batch = copy.deepcopy(model_of("gpt2")), own_half(batch_of("gpt2"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    groups = [torch.optim.SGD([p], 0.1 / p.dim()).param_groups[0]["lr"] for p in model.parameters()]
    with compiled("gpt2", "ZBVZeroBubble", grain="block").materialize(parallelize=shard) as pipe:
        (tie,) = pipe.plan.ties
        assert tie.stages == (0, 3)
        pipe.load_state_dict(model.state_dict())
        everything = batch_of("gpt2")
        target = everything.pop("target")
        close(pipe.evaluate(**batch), models.CASES["gpt2"].loss_fn(model(**everything), target), "loss")
        own = {"lr": 0.1, "momentum": 0.9}
        optimizer = pipe.optimizer(torch.optim.SGD, groups=lambda fqn, p: {"lr": 0.1 / p.dim()}, **own)
        assert [group["lr"] for group in optimizer.param_groups] == list(dict.fromkeys(groups))
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        path = shared_directory()
        losses = []
        for step in range(4):
            if step == 2:
                pipe.save(path, optimizer=optimizer, scheduler=scheduler)
            pipe.zero_grad()
            losses.append(pipe.step(**batch))
            optimizer.step()
            scheduler.step()
        pipe.load(path, optimizer=optimizer, scheduler=scheduler)
        for step in (2, 3):
            pipe.zero_grad()
            close(pipe.step(**batch), losses[step], f"loss of step {step}")
            optimizer.step()
            scheduler.step()


def other_dimensions_are_refused_or_divided() -> None:
    """A third dimension of size 1 changes nothing; another one needs ``parallelize``; a slice of a mesh is one."""
    losses, first, _, _ = reference("street")
    batch = own_half(batch_of("street"))
    cube = mesh_of("pp", "dp", "tp", shape=(2, 2, 1))
    for given in (cube, cube["pp", "dp"]):
        with compiled("street", mesh=given).materialize() as pipe:
            close(pipe.step(**batch), losses[0], "loss")
    pipe = compiled("street", mesh=mesh_of("pp", "cp"))
    with pytest.raises(fxpipe.ScheduleError, match=r"dimension 'cp' of size 2\n  pass materialize\(parallelize="):
        pipe.materialize()
    with pytest.raises(fxpipe.ScheduleError, match="name one of them 'pp'"):
        compiled("street", mesh=mesh_of("dp", "cp")).materialize()
    tensor = mesh_of("pp", "tp")

    def divide(stage: nn.Module) -> None:
        plan = {}
        for fqn, module in stage.named_modules():
            if isinstance(module, nn.Linear) and fqn.endswith(("first", "second")):
                plan[fqn] = ColwiseParallel() if fqn.endswith("first") else RowwiseParallel()
        parallelize_module(stage, tensor["tp"], plan)

    everything = batch_of("street")
    for schedule in ("1F1B", "ZBVZeroBubble"):
        options = {"mesh": tensor, "batch": everything}
        with compiled("street", schedule, **options).materialize(parallelize=divide) as pipe:
            close(pipe.step(**everything), losses[0], "loss")
            assert any(hasattr(parameter, "device_mesh") for parameter in pipe.parameters())
            for fqn, parameter in pipe.named_parameters():
                close(whole(parameter.grad), first[fqn], f"{schedule}: {fqn}", 1e-11)


def cases() -> dict[str, Callable[[], None]]:
    found: dict[str, Callable[[], None]] = {}
    for name in ("gpt2", "llama"):
        for schedule in STAGES:
            for sharded in (False, True):
                how = "fsdp" if sharded else "own"
                found[f"exact-{name}-{schedule}-{how}"] = functools.partial(exact, name, schedule, sharded)
    for case in (
        nothing_is_gathered_or_reduced_per_microbatch,
        accumulated_steps_are_reduced_once,
        dropout_differs_between_replicas_and_repeats_with_the_seed,
        a_parameter_that_no_replica_reaches_gets_no_gradient,
        a_gate_that_lets_nothing_of_a_batch_through_leaves_none,
        everything_else_goes_over_both_dimensions,
        a_wrong_batch_on_one_replica_is_everybodys_error,
        all_skip_the_step_that_one_finds_infinite,
        recomputed_blocks_give_the_same_numbers,
        other_dimensions_are_refused_or_divided,
        a_tie_that_is_divided_in_two_stages_of_a_rank_is_loaded_and_saved_as_one,
        a_replica_without_valid_targets_holds_nobody_up,
    ):
        found[case.__name__] = case
    return found


if __name__ == "__main__":
    import sys

    dist.init_process_group("gloo")
    torch.set_default_dtype(torch.float64)
    chosen = cases()
    launch.run_cases({name: chosen[name] for name in sys.argv[1:] or chosen}, dtype=torch.float64)
    dist.destroy_process_group()
