"""What a machine with an accelerator shows in under four minutes, offline and from a bare checkout.

    python tests/gpu/check.py                # on cuda:0; rows for several devices say that they were not run
    python tests/gpu/check.py --device cpu   # the same checks as far as a CPU has what they look at

Prints a row per check: ``ok`` with what was measured, ``FAILED``, or ``not run`` with the reason. Exits with 1 if one
failed.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

ROOT = pathlib.Path(__file__).parents[2]
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

import fxpipe  # noqa: E402

SCHEDULES = {
    "GPipe": 2,
    "1F1B": 2,
    "Interleaved1F1B": 4,
    "LoopedBFS": 4,
    "InterleavedZeroBubble": 4,
    "ZBVZeroBubble": 4,
    "DualPipeV": 4,
}
WORDS, WIDTH, LENGTH, ROWS = 512, 128, 64, 8


class NotRun(Exception):
    """This machine does not have what the check looks at."""


class Block(nn.Module):
    """Attention and a part of its own; with experts, a mixture that every token passes whole."""

    def __init__(self, experts: int = 0) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.gate = nn.Linear(WIDTH, experts) if experts else None
        self.parts = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
            for _ in range(experts or 1)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).view(batch, length, 3, 4, WIDTH // 4).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, WIDTH))
        if self.gate is None:
            return x + self.parts[0](x)
        weights = self.gate(x).softmax(-1)
        return x + sum(part(x) * weights[..., index, None] for index, part in enumerate(self.parts))


class Own(nn.Module):
    """A language model with a tied head."""

    def __init__(self, blocks: int = 4, experts: int = 0) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.blocks = nn.ModuleList(Block(experts) for _ in range(blocks))
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def loss_fn(output: Any, target: torch.Tensor) -> torch.Tensor:
    logits = getattr(output, "logits", output)
    return F.cross_entropy(logits.flatten(0, 1).float(), target.flatten())


def huggingface(name: str) -> nn.Module:
    try:
        import transformers
    except ImportError as error:
        raise NotRun("transformers is not installed") from error
    common = {"vocab_size": WORDS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if name == "gpt2":
        config = transformers.GPT2Config(n_embd=WIDTH, n_layer=4, n_head=4, n_positions=LENGTH, **common)
        config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
        return transformers.GPT2LMHeadModel(config)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(num_key_value_heads=2, **sizes, **common))


def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    return Own(experts=3 if name == "moe" else 0) if name in ("own", "moe") else huggingface(name)


def batch_of(name: str, device: torch.device) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, WORDS, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0)).to(device)
    target = ids.roll(1, dims=1)
    target[::2, LENGTH // 2 :] = -100
    return {"ids" if name in ("own", "moe") else "input_ids": ids, "target": target}


def pipe_of(
    name: str, device: torch.device, dtype: torch.dtype | None = None, schedule: str = "GPipe", **options: Any
) -> fxpipe.Pipeline:
    given = {key: options.pop(key) for key in ("training", "cost", "hardware") if key in options}
    ranks = 2 if not dist.is_initialized() else 1
    pipe = fxpipe.compile(
        model_of(name),
        SCHEDULES[schedule] if ranks > 1 else 2,
        (),
        batch_of(name, torch.device("cpu")),
        loss_fn=loss_fn,
        microbatches=4,
        schedule=schedule,
        ranks=ranks,
        **given,
    )
    return pipe.materialize(device, dtype, **options)


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).abs().max() / wanted.double().abs().max())


def synchronized(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def same_numbers(name: str, dtype: torch.dtype) -> Callable[[torch.device], str]:
    """Loss and gradients are those of the plain model on the device."""

    def check(device: torch.device) -> str:
        model, batch = model_of(name).to(device, dtype), batch_of(name, device)
        inputs = {key: value for key, value in batch.items() if key != "target"}
        loss = loss_fn(model(**inputs), batch["target"])
        loss.backward()
        with pipe_of(name, device, dtype) as pipe:
            errors = [difference(pipe.step(**batch), loss.detach())]
            wanted = dict(model.named_parameters())
            largest = max(float(parameter.grad.abs().max()) for parameter in wanted.values())
            for fqn, parameter in pipe.named_parameters():
                errors.append(float((parameter.grad - wanted[fqn].grad).abs().max()) / largest)
        allowed = 2e-5 if dtype == torch.float32 else 5e-2
        assert max(errors) < allowed, f"largest error {max(errors):.1e}, allowed {allowed:.0e}"
        return f"largest error {max(errors):.1e}"

    return check


def autocast(device: torch.device) -> str:
    """The loss under autocast is that of the plain model under autocast."""
    model, batch = model_of("own").to(device), batch_of("own", device)
    with torch.autocast(device.type, torch.bfloat16), pipe_of("own", device) as pipe:
        wanted = loss_fn(model(batch["ids"]), batch["target"]).detach()
        error = difference(pipe.step(**batch), wanted)
    assert error < 1e-2, error
    return f"error {error:.1e}"


def recompute(device: torch.device) -> str:
    """Equal numbers with less memory."""
    found = []
    for way in (None, "block"):
        with pipe_of("own", device, training=fxpipe.Training(recompute=way)) as pipe:
            batch = batch_of("own", device)
            pipe.step(**batch)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            loss = pipe.step(**batch)
            peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
            found.append((float(loss), peak))
    assert found[0][0] == found[1][0]
    assert device.type != "cuda" or found[1][1] < found[0][1]
    return f"peak {found[1][1] / 2**20:.0f} instead of {found[0][1] / 2**20:.0f} MiB"


def compiled_blocks(device: torch.device) -> str:
    """Compiled blocks give the numbers of eager ones."""
    batch = batch_of("own", device)
    backend = "inductor" if device.type == "cuda" else "eager"
    with pipe_of("own", device) as pipe:
        wanted = pipe.step(**batch)
    with pipe_of("own", device, compile={"backend": backend}) as pipe:
        error = difference(pipe.step(**batch), wanted)
    assert error < 1e-4, error
    return f"{backend}, error {error:.1e}"


def schedules(device: torch.device) -> str:
    """The loss depends on no schedule."""
    batch, losses = batch_of("own", device), []
    for schedule in SCHEDULES:
        with pipe_of("own", device, schedule=schedule) as pipe:
            losses.append(float(pipe.step(**batch)))
    assert max(losses) - min(losses) < 1e-5 * max(losses), losses
    return f"{len(losses)} schedules"


def memory_against_plan(device: torch.device) -> str:
    """The most memory of a step beside what the plan says for all stages."""
    need_cuda(device)
    with pipe_of("own", device) as pipe:
        optimizer, batch = pipe.optimizer(torch.optim.AdamW, lr=1e-3), batch_of("own", device)
        for _ in range(3):
            pipe.zero_grad()
            torch.cuda.reset_peak_memory_stats(device)
            pipe.step(**batch)
            optimizer.step()
        measured, planned = torch.cuda.max_memory_allocated(device), sum(s.peak_bytes for s in pipe.plan.stages)
    return f"measured {measured / 2**20:.1f} MiB, planned {planned / 2**20:.1f} MiB"


def profile_against_step(device: torch.device) -> str:
    """What ``cost="profile"`` measured beside a step."""
    need_cuda(device)
    with pipe_of("own", device, cost="profile") as pipe:
        batch = batch_of("own", device)
        planned = 4 * sum(stage.forward_s + stage.backward_s for stage in pipe.plan.stages)
        measured = seconds_of(lambda: pipe.step(**batch), device)
    return f"step {1e3 * measured:.2f} ms, profiled layers {1e3 * planned:.2f} ms"


def no_synchronisation(device: torch.device) -> str:
    """A steady step never makes the host wait for the device."""
    need_cuda(device)
    with pipe_of("own", device) as pipe:
        batch = batch_of("own", torch.device("cpu"))
        for _ in range(2):
            pipe.zero_grad()
            pipe.step(**batch)
        torch.cuda.set_sync_debug_mode("error")
        try:
            pipe.zero_grad()
            pipe.step(**batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return "none"


def one_rank_of_a_group(device: torch.device) -> str:
    """Two interleaved stages on one rank of a process group give the loss of the local engine."""
    batch = batch_of("own", device)
    with pipe_of("own", device) as pipe:
        wanted = pipe.step(**batch)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29417")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=0, world_size=1)
    try:
        with pipe_of("own", device, schedule="Interleaved1F1B") as pipe:
            error = difference(pipe.step(**batch), wanted)
    finally:
        dist.destroy_process_group()
    assert error < 1e-5, error
    return f"error {error:.1e}"


def beside_plain_training(device: torch.device) -> str:
    """Seconds of a step beside those of plain training in as many microbatches."""
    batch, model = batch_of("own", device), model_of("own").to(device)

    def plain() -> None:
        for ids, target in zip(batch["ids"].split(2), batch["target"].split(2), strict=True):
            (loss_fn(model(ids), target) / 4).backward()

    with pipe_of("own", device) as pipe:
        ours, theirs = seconds_of(lambda: pipe.step(**batch), device), seconds_of(plain, device)
    return f"{1e3 * ours:.2f} ms, plain {1e3 * theirs:.2f} ms: {ours / theirs:.2f} x"


def several_devices(device: torch.device) -> str:
    """Two and more devices."""
    raise NotRun("needs two devices: torchrun --nproc-per-node 2 examples/train_gpt.py")


def need_cuda(device: torch.device) -> None:
    if device.type != "cuda":
        raise NotRun("needs an accelerator")


def seconds_of(work: Callable[[], object], device: torch.device, runs: int = 10) -> float:
    for _ in range(3):
        work()
    start = synchronized(device)
    for _ in range(runs):
        work()
    return (synchronized(device) - start) / runs


CHECKS: dict[str, Callable[[torch.device], str]] = {
    **{
        f"numbers of {name} in {str(dtype).removeprefix('torch.')}": same_numbers(name, dtype)
        for name in ("own", "moe", "gpt2", "llama")
        for dtype in (torch.float32, torch.bfloat16)
    },
    "autocast": autocast,
    "recompute": recompute,
    "compiled blocks": compiled_blocks,
    "schedules": schedules,
    "memory against the plan": memory_against_plan,
    "profile against a step": profile_against_step,
    "no synchronisation in a step": no_synchronisation,
    "one rank of a process group": one_rank_of_a_group,
    "step beside plain training": beside_plain_training,
    "2 x 1 devices, 1F1B": several_devices,
    "2 x 2 devices, pp x dp": several_devices,
}


def run(device: torch.device, names: list[str] | None = None) -> dict[str, tuple[str, str]]:
    """Run checks; gives for each ``ok``, ``FAILED`` or ``not run``, and what there is to say."""
    found = {}
    for name in names or CHECKS:
        start = time.perf_counter()
        try:
            said = ("ok", CHECKS[name](device))
        except NotRun as reason:
            said = ("not run", str(reason))
        except Exception as error:  # whatever goes wrong is the row's result
            said = ("FAILED", f"{type(error).__name__}: {error}")
        found[name] = said
        print(f"{said[0]:8} {name:36} {time.perf_counter() - start:6.1f} s  {said[1]}", flush=True)
    return found


def main() -> int:
    """Run all checks on one device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    device = torch.device(parser.parse_args().device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print(f"{len(CHECKS)} checks were not run: there is no CUDA device")
        return 1
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"torch {torch.__version__} on {where}")
    found = run(device)
    print(
        ", ".join(f"{sum(said[0] == what for said in found.values())} {what}" for what in ("ok", "FAILED", "not run"))
    )
    return int(any(what == "FAILED" for what, _ in found.values()))


if __name__ == "__main__":
    sys.exit(main())
