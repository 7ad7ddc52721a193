"""The simulator beside the literature and beside runs, and what is planned by it beside peers and beside the best.

``python -m tests.benchmarks simulation literature|speed|recomputed|by-hand|steps|order`` prints tables; ``--page``
writes each into its section of docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from bisect import bisect_right
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).parents[1] / "planning"))

import layer_graphs

from fxpipe.ir.hardware import Hardware, Training
from fxpipe.planning.costs.estimate import estimate_costs
from fxpipe.planning.judge import Judge, step_s
from fxpipe.planning.layout import make_layout
from fxpipe.planning.peers import modules_of, peer_baselines
from fxpipe.planning.planner import plan_pipeline, solve_pipeline
from fxpipe.planning.search.problem import measure
from fxpipe.planning.settings import Settings, device_limit
from fxpipe.planning.simulation.engine import StageTimes
from fxpipe.planning.simulation.simulate import simulate, simulate_stages
from tests.benchmarks import order, steps
from tests.benchmarks.papers import ZERO_BUBBLE
from tests.benchmarks.sections import write_section

NAMES = ("GPipe", "1F1B", "Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")


def literature() -> str:
    """Equal stages, F = B = W = 1, free links: the step, and its bubble by three definitions."""
    rows = []
    for ranks, count in ((4, 8), (8, 16)):
        for name in NAMES:
            per_rank = 1 if name in ("GPipe", "1F1B") else 2
            done = simulate_stages(name, [StageTimes(1, 1, 1)] * per_rank * ranks, ranks, count)
            ideal = 3 * per_rank * count
            rows.append(
                [
                    f"{ranks} × {per_rank}", count, name, f"{done.step_s:.0f}", f"{done.step_s - ideal:.0f}",
                    f"{1 - ideal / done.step_s:.3f}", f"{done.step_s / ideal - 1:.3f}", f"{done.window_bubble:.3f}",
                    max(done.peak_microbatches),
                ]
            )  # fmt: skip
    header = ["ranks × stages", "microbatches", "schedule", "T", "over ideal", "wall", "Megatron", "window", "alive"]
    return tabulate(rows, header, tablefmt="github", disable_numparse=True)


def speed() -> str:
    rows = []
    for name in NAMES:
        stages = 256 if name in ("GPipe", "1F1B") else 512
        start = time.process_time()
        done = simulate_stages(name, [StageTimes(1, 1, 1, 0.1, 0.1)] * stages, 256, 1024)
        rows.append([name, sum(map(len, done.orders)), f"{time.process_time() - start:.1f}"])
    return tabulate(rows, ["schedule", "actions", "seconds"], tablefmt="github", disable_numparse=True)


def recomputed() -> str:
    hardware = Hardware.preset("h100")
    models = {
        "Llama-8B, 8 devices": (8, layer_graphs.llama(32, 4096, inner=14_336, kv=1024, tokens=8192)),
        "Llama-70B, 16 devices": (16, layer_graphs.llama(80, 8192, inner=28_672, kv=1024, tokens=8192)),
    }
    rows = []
    for name, (stages, graph) in models.items():
        base = Settings.of(
            stages=stages, ranks=stages, schedule="1F1B", num_microbatches=4 * stages, hardware=hardware,
            training=Training(), grain="block",
        )  # fmt: skip
        for label, recompute, limit in (
            ("nothing, if it fitted", None, None),
            ("everything", "block", None),
            ("chosen", "auto", device_limit(hardware)),
        ):
            made_for = replace(base, training=Training(recompute=recompute), memory_limit=limit)
            estimate = estimate_costs(graph, "roofline", hardware, made_for.training)
            plan = plan_pipeline(graph, estimate, made_for)
            most = max(stage.peak_bytes for stage in plan.stages)
            count = sum(len(stage.recompute) for stage in plan.stages)
            rows.append([name, f"fxpipe, {label}", count, f"{simulate(plan).step_s:.3f}", f"{most / 1e9:.1f}"])
        full = replace(base, training=Training(recompute="block"))
        layout = make_layout(graph, estimate_costs(graph, "roofline", hardware, full.training), full)
        node_of = {unit.name: unit.nodes for unit in modules_of(layout)}
        for peer in peer_baselines(layout):
            if peer.bottleneck is None or not all(peer.stages):
                continue
            stage_of = [0] * len(layout.layers)
            for stage, units in enumerate(peer.stages):
                for node in (node for unit in units for node in node_of[unit]):
                    stage_of[node] = stage
            step = step_s(layout, stage_of)
            rows.append([name, f"{peer.name}, everything", "all", f"{step:.3f}", f"{peer.peak_bytes / 1e9:.1f}"])
    header = ["model", "cut, what is recomputed", "modules", "step s", "most GB"]
    return tabulate(rows, header, tablefmt="github", disable_numparse=True)


def papers() -> str:
    """The zero-bubble paper's profiled times, and its bubble of 1F1B beside the simulator's."""
    rows = [
        [row.model, row.ranks, row.microbatches, row.forward, row.input_grad, row.weight_grad, row.message,
         f"{row.bubble:.4f}", f"{row.simulated():.4f}"]
        for row in ZERO_BUBBLE
    ]  # fmt: skip
    header = ["model", "p", "m", "F, ms", "B, ms", "W, ms", "message, ms", "paper", "simulated"]
    return tabulate(rows, header, tablefmt="github", disable_numparse=True)


def by_hand() -> str:
    """Llama-405B into 16 as its authors cut it, one block fewer on the first and the last rank, beside the plan."""
    graph = layer_graphs.llama()
    made_for = Settings.of(
        stages=16, ranks=16, schedule="1F1B", num_microbatches=64, hardware=Hardware.preset("h100"),
        training=Training(), grain="block",
    )  # fmt: skip
    estimate = estimate_costs(graph, "roofline", made_for.hardware, made_for.training)
    layout, solution = solve_pipeline(graph, estimate, made_for)
    blocks = [block.layers for block in layout.blocks]
    sizes = [7, *[8] * 14, 7]
    firsts = [0, *(min(blocks[end]) for end in accumulate(sizes[:-1]))]
    hand = [bisect_right(firsts, node) - 1 for node in range(len(layout.layers))]
    rows, judge = [], Judge(layout)
    for name, stage_of in (("by hand", hand), ("fxpipe", solution.partition.stage_of)):
        measured = measure(layout.problem, stage_of, placement=layout.placement)
        held = [sum(stage_of[block[0]] == stage for block in blocks) for stage in range(16)]
        loads = measured.loads
        rows.append([
            name, f"{held[0]}, {held[1]} … {held[14]}, {held[15]}", f"{loads[0]:.3f}, {loads[1]:.3f} … "
            f"{loads[14]:.3f}, {loads[15]:.3f}", f"{max(loads):.3f}", f"{judge.step_s(stage_of):.2f}",
        ])  # fmt: skip
    header = ["cut", "blocks on ranks 0, 1 … 14, 15", "seconds of a microbatch there", "slowest", "step, s"]
    return tabulate(rows, header, tablefmt="github", disable_numparse=True)


SECTIONS = {
    "literature": (
        lambda: f"{literature()}\n\n{ZERO_BUBBLE_WORDS}\n\n{papers()}",
        """## Simulated steps, beside papers

Equal stages, F = B = W = 1, free links. *Wall* is 1 − ideal/T, *Megatron* T/ideal − 1 (arXiv 2104.04473), *window*
1 − m(F+B+W) over the longest window of a rank (arXiv 2401.10241). *Alive* is the most activations of a rank: M of
GPipe, P of 1F1B, (v − 1)P + 2(P − 1) + 1 of Interleaved1F1B, vM of LoopedBFS, vP of InterleavedZeroBubble, 2P of
ZBVZeroBubble and 2P + 1 of DualPipeV.""",
    ),
    "speed": (speed, "## How fast a step is simulated\n\n256 ranks × 1,024 microbatches, processor seconds."),
    "recomputed": (
        recomputed,
        """## Recomputation chosen with the cut

H100s of 80 GB (73.6 GB of it taken), 8,192 tokens, `Training()` else, 1F1B, four microbatches for each stage, cuts
between blocks; peers' rules with everything recomputed.""",
    ),
    "by-hand": (
        by_hand,
        """## Llama-405B, beside its authors' cut

126 blocks into 16 ranks, cut between blocks, 64 microbatches of one sequence of 4,096 tokens, roofline seconds of an
H100. By hand the first and the last rank have one block fewer. A block takes 0.086 s: the embedding is worth next to
nothing, head and loss less than a block, so ranks with eight blocks are the slowest either way. The plan gives the
first rank its block back and takes another from the last one, which a step waits for while it fills and drains.""",
    ),
    "steps": (
        lambda: steps.run(),
        """## Simulated steps of default plans

The models of the first section, 1F1B, `grain="auto"`: the simulated step; how many blocks are opened; how much longer
the step of the best of five peers' cuts between blocks takes; how far the step is behind the fastest of all cuts along
the order of calling between whole blocks and inside of the opened ones, and inside of all (models of fewer than 200
layers); – where more than 3,000 cuts could be faster, so that not all can be tried.""",
    ),
    "order": (
        order.run,
        """## Predicted and measured

Twelve plans of twelve transformer blocks, on two CPU ranks of one thread on two cores, planned with `cost="profile"`;
predicted steps at least 3 % apart; medians of seven runs in turns, those in which other processes took least.""",
    ),
}
"""What each section says, and what stands above it."""

ZERO_BUBBLE_WORDS = """Times profiled by the authors of the zero-bubble paper (arXiv 2401.10241), and the bubble that
they give for 1F1B, transfers overlapped with work:"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="+", choices=list(SECTIONS))
    parser.add_argument("--page", action="store_true", help="write the sections of docs/benchmarks.md")
    arguments = parser.parse_args()
    for name in arguments.sections:
        run, words = SECTIONS[name]
        text = f"{words}\n\nWritten by `python -m tests.benchmarks simulation {name} --page`.\n\n{run()}"
        if arguments.page:
            write_section(f"simulation {name}", text)
        else:
            print(text)


if __name__ == "__main__":
    main()
