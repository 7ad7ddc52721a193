"""One of two ranks: precision and compilation over ranks, held against one process with one stage."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import launch
import models
import torch
import torch.distributed as dist
from torch import nn
from training_worker import gradients, one_process

import fxpipe

RANKS = 2
ORDINARY = (
    "autocast_gives_the_numbers_of_one_stage-bfloat16",
    "narrow_weights_gather_wide_gradients-bfloat16",
    "what_one_rank_finds_infinite_all_ranks_skip-float16",
    "compile-blocks-Interleaved1F1B-block",
)
ULP = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def gpt2(tied: bool = True) -> nn.Module:
    torch.manual_seed(0)
    config = {**models.GPT2, "n_layer": 2, "tie_word_embeddings": tied}
    return models.huggingface("GPT2Config", config, "GPT2LMHeadModel")()


def pipe_of(model: nn.Module, stages: int, schedule: str = "1F1B", **options: Any) -> fxpipe.Pipeline:
    given = {"loss_fn": models.token_loss, "microbatches": 4, "schedule": schedule, "ranks": min(stages, RANKS)}
    return fxpipe.compile(model, stages, (), models.causal_batch(), **{**given, **options})


def alone(model: nn.Module, run: Callable[[fxpipe.Pipeline], Any], **options: Any) -> Any:
    """Do the same with all of the model in this process."""
    with one_process(), pipe_of(model, 1).materialize(**options) as pipe:
        return run(pipe)


def loss_and_gradients(pipe: fxpipe.Pipeline) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return pipe.step(**models.causal_batch()), gradients(pipe.named_parameters())


def autocast_gives_the_numbers_of_one_stage(dtype: torch.dtype) -> None:
    """The loss bit by bit; gradients of ties may be added up in another order: 2 ulp of the largest entry."""
    for tied in (False, True):
        model = gpt2(tied)
        with torch.autocast("cpu", dtype):
            loss, wanted = alone(model, loss_and_gradients)
            with pipe_of(model, 2).materialize() as pipe:
                found, own = loss_and_gradients(pipe)
        assert torch.equal(found, loss)
        largest = max(float(gradient.abs().max()) for gradient in wanted.values())
        for fqn, gradient in own.items():
            error = float((gradient - wanted[fqn]).abs().max())
            assert error <= (2 * ULP[dtype] * largest if tied else 0), f"{fqn}: {error / largest}"


def narrow_weights_gather_wide_gradients(dtype: torch.dtype) -> None:
    """Summed in float32, rounded once unless asked not to; a tie over two ranks too."""
    model = gpt2().to(dtype)
    for keep_wide in (False, True):
        loss, wanted = alone(model, loss_and_gradients, keep_wide=keep_wide)
        with pipe_of(model, 2).materialize(keep_wide=keep_wide) as pipe:
            found, own = loss_and_gradients(pipe)
        assert torch.equal(found, loss)
        assert {gradient.dtype for gradient in own.values()} == {torch.float32 if keep_wide else dtype}
        largest = max(float(gradient.abs().max()) for gradient in wanted.values())
        for fqn, gradient in own.items():
            assert float((gradient.float() - wanted[fqn].float()).abs().max()) <= 2 * ULP[dtype] * largest, fqn


def what_one_rank_finds_infinite_all_ranks_skip(dtype: torch.dtype) -> None:
    """Weights of 16 bits, gradients and master weights of 32; the scale is that of one process in every step."""
    model, batch = gpt2().to(dtype), models.causal_batch()

    def train(pipe: fxpipe.Pipeline) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
        masters = [nn.Parameter(parameter.detach().float()) for parameter in pipe.parameters()]
        optimizer = torch.optim.SGD(masters, lr=0.1)
        scaler = pipe.grad_scaler(init_scale=64.0, growth_interval=2)
        losses, scales = [], []
        for step in range(5):
            pipe.zero_grad()
            losses.append(float(pipe.step(**batch, scaler=scaler)))
            for master, parameter in zip(masters, pipe.parameters(), strict=True):
                master.grad = parameter.grad
            if step == 2 and "transformer.wpe.weight" in dict(pipe.named_parameters()):  # on one rank alone
                masters[-1].grad.view(-1)[0] = float("inf")
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
            for master, parameter in zip(masters, pipe.parameters(), strict=True):
                parameter.data.copy_(master)
        return losses, scales, {fqn: parameter.detach() for fqn, parameter in pipe.named_parameters()}

    losses, scales, weights = alone(model, train, keep_wide=True)
    with pipe_of(model, 2).materialize(keep_wide=True) as pipe:
        found, others, own = train(pipe)
    assert scales == others == [64.0, 128.0, 64.0, 64.0, 128.0]
    assert losses[:2] == found[:2]
    assert abs(losses[4] - found[4]) <= 4 * ULP[dtype] * losses[4]
    for fqn, weight in own.items():
        torch.testing.assert_close(weight, weights[fqn], rtol=4 * ULP[dtype], atol=4 * ULP[dtype] * 0.1)


def compiled_stages_compute_the_same(of: str, schedule: str, recompute: str | None) -> None:
    """Nothing is compiled again after the second step, and the numbers are those of eager code."""
    frames = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        from torch._dynamo.backends.debugging import aot_eager

        frames.append(graph)
        return aot_eager(graph, inputs)

    torch.manual_seed(0)
    model = models.Street()
    batch = {name: v.float() if v.is_floating_point() else v for name, v in models.street_batch().items()}
    stages = 4 if schedule == "Interleaved1F1B" else 2
    given = {"loss_fn": models.token_loss, "microbatches": 4, "schedule": schedule, "ranks": 2, "grain": "block"}
    given["training"] = fxpipe.Training(recompute=recompute)
    runs = []
    for compile in (None, {"of": of, "backend": backend}):
        torch.compiler.reset()
        with fxpipe.compile(model, stages, (), batch, **given).materialize(compile=compile) as pipe:
            counts = []
            for _ in range(4):
                pipe.zero_grad()
                loss = pipe.step(**batch)
                counts.append(len(frames))
            runs.append((loss, gradients(pipe.named_parameters())))
    assert counts[1] == counts[-1] > 0
    (loss, wanted), (found, own) = runs
    torch.testing.assert_close(found, loss, rtol=1e-6, atol=0)
    for fqn, gradient in own.items():
        torch.testing.assert_close(gradient, wanted[fqn], rtol=1e-4, atol=1e-6)


def cases() -> dict[str, Callable[[], None]]:
    found: dict[str, Callable[[], None]] = {}
    for dtype in ULP:
        for case in (
            autocast_gives_the_numbers_of_one_stage,
            narrow_weights_gather_wide_gradients,
            what_one_rank_finds_infinite_all_ranks_skip,
        ):
            found[f"{case.__name__}-{str(dtype)[6:]}"] = functools.partial(case, dtype)
    for of, schedule, recompute in (
        ("blocks", "1F1B", None),
        ("blocks", "1F1B", "block"),
        ("stage", "1F1B", None),
        ("stage", "1F1B", "block"),
        ("blocks", "Interleaved1F1B", "block"),
        ("stage", "GPipe", None),
    ):
        found[f"compile-{of}-{schedule}-{recompute}"] = functools.partial(
            compiled_stages_compute_the_same, of, schedule, recompute
        )
    return found


if __name__ == "__main__":
    import sys

    dist.init_process_group("gloo")
    chosen = cases()
    launch.run_cases({name: chosen[name] for name in sys.argv[1:] or chosen})
    dist.destroy_process_group()
