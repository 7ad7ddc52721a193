"""Simulated steps of default plans, beside peers' cuts and beside the best of all cuts along the order of calling."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

from tabulate import tabulate

from fxpipe.ir.graph import LayerGraph
from fxpipe.ir.hardware import Hardware, Training
from fxpipe.planning.costs.estimate import estimate_costs
from fxpipe.planning.judge import Judge
from fxpipe.planning.layout import Layout
from fxpipe.planning.peers import modules_of, peer_baselines
from fxpipe.planning.planner import solve_pipeline
from fxpipe.planning.search.problem import PartitionProblem
from fxpipe.planning.settings import Settings
from tests.benchmarks.shapes import models

LINKS = {"450 GB/s": 450e9, "50 GB/s": 50e9}
STAGES = (4, 8, 16)
ROUNDS = (1, 2, 4)
MOST_CUTS = 3_000
"""Cuts that are simulated; where more could be the best, not all can be tried."""


class Order:
    """The units of a problem in the order of calling, and bounds of what a 1F1B step through a stage takes."""

    def __init__(self, layout: Layout, problem: PartitionProblem) -> None:
        self.judge, self.stages, self.count = (
            Judge(layout), layout.settings.stages, layout.settings.num_microbatches,
        )  # fmt: skip
        ends = list(range(1, len(problem.seconds) + 1))
        for group in problem.groups:
            ends[min(group)] = max(ends[min(group)], max(group) + 1)
        self.firsts, reach = [0], 0
        for node, end in enumerate(ends):
            if node and node >= reach:
                self.firsts.append(node)
            reach = max(reach, end)
        self.firsts.append(len(ends))
        anchors = [sum(first <= node < end for node in layout.anchors) for first, end in pairwise(self.firsts)]
        self.anchors = [0, *accumulate(anchors)]  # a plan leaves no stage without parameters
        costs = [layout.costs[layer] for layer in layout.layers]
        sums = ([0.0, *accumulate(cost.seconds for cost in costs)], [0.0, *accumulate(c.forward_s for c in costs)])
        self.work, self.forward = ([column[first] for first in self.firsts] for column in sums)
        self._rest = self._least_of_the_rest()

    def least_s(self, stage: int, low: int, high: int) -> float:
        """Give seconds that no step is below whose stage holds these units: before, in and after it, links free."""
        own, forward = self.work[high] - self.work[low], self.forward[high] - self.forward[low]
        hidden = (min(self.count, self.stages - stage) - 1) * forward
        return self.count * own + self.work[low] + max(0.0, self.work[-1] - self.work[high] - hidden)

    def _least_of_the_rest(self) -> list[list[float]]:
        last = len(self.work) - 1
        found = [[math.inf] * last + [0.0]]
        for stage in range(self.stages - 1, -1, -1):
            after = found[0]
            found.insert(0, [
                min((max(self.least_s(stage, low, high), after[high]) for high in range(low + 1, last + 1)),
                    default=math.inf)
                for low in range(last + 1)
            ])  # fmt: skip
        return found

    def best_s(self, known_s: float) -> float | None:
        """Give the seconds of the fastest cut; None where more than ``MOST_CUTS`` could be faster than what is known.

        A cut is left out only where its bound says that it is no faster than one that was simulated.
        """
        best = known_s
        cut = [0]

        def below() -> Iterator[list[int]]:
            stage = len(cut) - 1
            if stage == self.stages:
                if cut[-1] == len(self.work) - 1:
                    yield cut
                return
            for high in range(cut[-1] + 1, len(self.work) - (self.stages - stage - 1)):
                if self.anchors[high] == self.anchors[cut[-1]]:
                    continue
                if max(self.least_s(stage, cut[-1], high), self._rest[stage + 1][high]) < best * (1 - 1e-12):
                    cut.append(high)
                    yield from below()
                    cut.pop()

        for tried, found in enumerate(below()):
            if tried == MOST_CUTS:
                return None
            sizes = [self.firsts[b] - self.firsts[a] for a, b in pairwise(found)]
            best = min(best, self.judge.step_s([stage for stage, size in enumerate(sizes) for _ in range(size)]))
        return best


def peers_s(layout: Layout) -> dict[str, float]:
    """Give the simulated step of each peer's cut."""
    judge, nodes = Judge(layout), {unit.name: unit.nodes for unit in modules_of(layout)}
    found = {}
    for peer in peer_baselines(layout):
        if peer.bottleneck is not None and all(peer.stages):
            stage_of = [0] * len(layout.layers)
            for stage, names in enumerate(peer.stages):
                for node in (node for name in names for node in nodes[name]):
                    stage_of[node] = stage
            found[peer.name] = judge.step_s(stage_of)
    return found


def rows(name: str, graph: LayerGraph, links: str) -> Iterator[list[str]]:
    hardware = replace(Hardware.preset("h100"), link_bandwidth=LINKS[links], link_latency=5e-6, node_size=0)
    for stages in STAGES:
        for rounds in ROUNDS:
            made_for = Settings.of(
                stages=stages, ranks=stages, schedule="1F1B", num_microbatches=rounds * stages, hardware=hardware,
                training=Training(), grain="auto",
            )  # fmt: skip
            estimate = estimate_costs(graph, "roofline", hardware, made_for.training)
            start = time.process_time()
            layout, solution = solve_pipeline(graph, estimate, made_for)
            spent = time.process_time() - start
            step_s = Judge(layout).step_s(solution.partition.stage_of)
            peers = peers_s(layout)
            peer = min(peers, key=lambda rule: peers[rule], default=None)
            more = "–" if peer is None else f"{100 * (peers[peer] / step_s - 1):.1f} % {peer}"
            assert peer is None or step_s <= peers[peer] * (1 + 1e-9), (
                f"behind {peer}: {name}, {links}, {stages} stages"
            )
            opened = [block.name for block in solution.opened]
            own = Order(layout, layout.grouped(opened)).best_s(step_s)
            every = Order(layout, layout.problem).best_s(step_s) if len(layout.layers) < 200 else None
            yield [
                name, links, str(stages), str(rounds * stages), f"{1e3 * step_s:.3f}", str(len(opened)),
                more, behind(step_s, own), behind(step_s, every),
                f"{spent:.1f}",
            ]  # fmt: skip


def behind(step_s: float, best_s: float | None) -> str:
    return "–" if best_s is None else f"{100 * (step_s / best_s - 1):.2f} %"


HEADERS = [
    "model", "links", "stages", "microbatches", "step, ms", "opened", "best peer: more", "behind the best: own blocks",
    "behind the best: all", "s",
]  # fmt: skip


def run(chosen: Sequence[str] = ()) -> str:
    """Plan every row; fails where a plan is behind a peer's cut."""
    makers = models()
    found = []
    for name in chosen or makers:
        graph = makers[name]()
        for links in LINKS:
            for row in rows(name, graph, links):
                found.append(row)
                print(*row, sep="  ", flush=True)
    return tabulate(found, HEADERS, tablefmt="github", disable_numparse=True)
