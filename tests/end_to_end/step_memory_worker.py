"""One rank of several, each with twelve blocks: the memory of a step as the allocator has it, beside the plan's."""

from __future__ import annotations

from collections.abc import Callable

import launch
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile

import fxpipe

WIDTH, ROWS, LENGTH, BLOCKS = 64, 2, 256, 12


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norms[0](x)).view(*x.shape[:2], 3, 2, WIDTH // 2).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape)
        x = x + self.out(mixed)
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


def peak(run: Callable[[], object]) -> int:
    """Most bytes that are allocated while something runs, above those before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def peaks(recompute: str | None) -> tuple[int, int, int]:
    """Give the peak above weights and gradients as measured and as planned, and the microbatches that live at once."""
    ranks = dist.get_world_size()
    model = nn.Sequential(*(Block() for _ in range(BLOCKS * ranks)))
    batch = torch.randn(2 * ranks * ROWS, LENGTH, WIDTH)
    pipe = fxpipe.compile(
        model, ranks, (batch,), {"target": batch}, loss_fn=F.mse_loss, microbatches=2 * ranks, schedule="1F1B",
        training=fxpipe.Training(optimizer="sgd", recompute=recompute), hardware="cpu", grain="block",
    )  # fmt: skip
    with pipe.materialize():
        stage = pipe.plan.stages[dist.get_rank()]
        for _ in range(2):
            pipe.step(batch, target=batch)
        measured = peak(lambda: pipe.step(batch, target=batch))
    planned = stage.peak_bytes - stage.bytes - stage.gradient_bytes - stage.optimizer_bytes
    return measured, planned, stage.live_microbatches


def recomputed_blocks_keep_their_inputs_alone() -> None:
    """At most 1.3 × one block and what enters all twelve of every live microbatch; the plan within a tenth."""
    block, x = Block(), torch.randn(ROWS, LENGTH, WIDTH, requires_grad=True)
    block(x).sum().backward()
    of_block = peak(lambda: block(x).square().mean().backward())
    measured, planned, alive = peaks("block")
    assert measured <= 1.3 * (of_block + alive * BLOCKS * x.numel() * 4), f"{measured} bytes, one block {of_block}"
    assert abs(planned - measured) <= 0.1 * measured, f"{measured} bytes, planned {planned}"


def the_plan_is_right_without_recomputation_too() -> None:
    measured, planned, _ = peaks(None)
    assert abs(planned - measured) <= 0.1 * measured, f"{measured} bytes, planned {planned}"


CASES = {
    case.__name__: case
    for case in (recomputed_blocks_keep_their_inputs_alone, the_plan_is_right_without_recomputation_too)
}

if __name__ == "__main__":
    dist.init_process_group("gloo")
    launch.run_cases(CASES)
    dist.destroy_process_group()
