"""The simulator beside the literature, its speed, and what recomputation chosen with the cut gives.

``python -m tests.benchmarks simulation`` prints the tables; ``--page`` writes them into docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).parents[1] / "planning"))

import layer_graphs

from fxpipe.ir.hardware import Hardware, Training
from fxpipe.planning.costs.estimate import estimate_costs
from fxpipe.planning.judge import step_s
from fxpipe.planning.layout import make_layout
from fxpipe.planning.peers import compare, units_of
from fxpipe.planning.planner import plan_pipeline
from fxpipe.planning.settings import Settings, device_limit
from fxpipe.planning.simulation.engine import StageTimes
from fxpipe.planning.simulation.simulate import simulate, simulate_stages
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
        node_of = {unit.name: unit.nodes for unit in units_of(layout)}
        for peer in compare(layout):
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


SECTION = """## Simulated steps

Written by `python -m tests.benchmarks simulation --page`.

Equal stages, F = B = W = 1, free links. *Wall* is 1 − ideal/T, *Megatron* T/ideal − 1 (arXiv 2104.04473), *window*
1 − m(F+B+W) over the longest window of a rank (arXiv 2401.10241); *alive* is the most activations of a rank.

{literature}

256 ranks × 1,024 microbatches, processor seconds:

{speed}

Recomputation chosen with the cut, H100s of 80 GB (73.6 GB of it taken), 8,192 tokens, `Training()` else, 1F1B, four
microbatches for each stage, cuts between blocks; peers' rules with everything recomputed.

{recomputed}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true", help="write the section of docs/benchmarks.md")
    arguments = parser.parse_args()
    text = SECTION.format(literature=literature(), speed=speed(), recomputed=recomputed())
    if not arguments.page:
        print(text)
        return
    write_section("simulation", text)


if __name__ == "__main__":
    main()
