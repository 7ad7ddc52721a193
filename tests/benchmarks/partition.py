"""Measure the partitioner: models against others' cuts, published workloads, time against size.

    python -m tests.benchmarks partition models|several [gpt2-medium llama-8b t5-large resnet-50 unet] [--page]
    python -m tests.benchmarks partition default|large|compile|scaling [--page]
    python -m tests.benchmarks partition workloads DIR [--page]

``DIR`` is a checkout of the dnn-partitioning repository of Microsoft Research (arXiv 2006.16423). Times are seconds of
processor time. ``--page`` writes the section of ``docs/benchmarks.md``, and the plot of ``scaling``.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import networkx as nx
import numpy as np
from tabulate import tabulate

from fxpipe.ir.graph import LayerGraph
from fxpipe.ir.hardware import Hardware, Training
from fxpipe.planning.costs.estimate import estimate_costs
from fxpipe.planning.layout import Layout, make_layout
from fxpipe.planning.peers import peer_baselines
from fxpipe.planning.search.graphs import read_graph
from fxpipe.planning.search.partition import Partition, partition, partition_nodes
from fxpipe.planning.settings import Settings
from tests.benchmarks.sections import DOCS, write_section
from tests.benchmarks.shapes import SHAPES, llama_405b, models

STAGES = (4, 8, 16)
LINKS = {"free": math.inf, "450 GB/s": 450e9, "50 GB/s": 50e9}


def chain(size: int, seed: int = 0) -> nx.DiGraph:
    """Make a chain with random costs and transfers."""
    numbers = random.Random(seed)
    graph = nx.path_graph(size, create_using=nx.DiGraph)
    for node in graph:
        graph.nodes[node].update(seconds=numbers.random(), transfer=numbers.random())
    return graph


def layered(size: int, width: int = 20, seed: int = 0, transfers: float = 0.1) -> nx.DiGraph:
    """Make a random layered graph: each node reads one to three nodes of the layer before."""
    numbers = random.Random(seed)
    graph = nx.DiGraph()
    for node in range(size):
        graph.add_node(node, seconds=numbers.random(), transfer=transfers * numbers.random())
        first = (node // width - 1) * width
        if first >= 0:
            for reader in numbers.sample(range(first, first + width), numbers.randint(1, 3)):
                graph.add_edge(reader, node)
    return graph


def workload(path: Path) -> tuple[nx.DiGraph, int, float]:
    """Read one workload: its graph, number of accelerators and bytes of each.

    A colour class shares a stage, which ties a backward node to its forward node. Edges between forward nodes order;
    edges out of or between backward nodes only move values, except where a class has no forward node: its backward
    edges order it in reverse. Each node's output is one value with all its readers.
    """
    data = json.loads(path.read_text())
    nodes = {node["id"]: node for node in data["nodes"]}
    classes = {number: node.get("colorClass", ("own", number)) for number, node in nodes.items()}
    with_forward = {classes[number] for number, node in nodes.items() if not node["isBackwardNode"]}
    graph = nx.DiGraph()
    for number, node in nodes.items():
        graph.add_node(number, seconds=node["fpgaLatency"], memory=node.get("size", 0), group=classes[number])
    values: dict[int, tuple[float, list[int]]] = {}
    for edge in data["edges"]:
        before, after = edge["sourceId"], edge["destId"]
        values.setdefault(before, (edge["cost"], [before]))[1].append(after)
        backwards = [bool(nodes[end]["isBackwardNode"]) for end in (before, after)]
        if not any(backwards):
            graph.add_edge(before, after)
        elif all(backwards) and not {classes[before], classes[after]} <= with_forward:
            graph.add_edge(after, before)
    graph.graph["transfers"] = list(values.values())
    return graph, data["maxFPGAs"], data["maxSizePerFPGA"]


def timed(graph: nx.DiGraph, stages: int, **options: object) -> tuple[Partition, float]:
    """Partition a graph; the seconds are those of the public call, reading included."""
    start = time.process_time()
    partition(graph, stages, **options)
    seconds = time.process_time() - start
    return partition_nodes(read_graph(graph), stages, **options), seconds


HEADERS = ["graph", "nodes", "stages", "bottleneck", "lower bound", "gap", "method", "proven", "seconds"]


def row(name: str, graph: nx.DiGraph, stages: int, **options: object) -> list[object]:
    found, seconds = timed(graph, stages, **options)
    gap = found.bottleneck / found.lower_bound - 1 if found.lower_bound else 0.0
    proven = "yes" if found.proven else "no"
    return [name, len(graph), stages, found.bottleneck, found.lower_bound, f"{gap:.2%}", found.method, proven, seconds]


def table(rows: Sequence[Sequence[object]], headers: Sequence[str] = HEADERS, digits: str = ".6g") -> str:
    cells = [[format(cell, digits) if isinstance(cell, float) else str(cell) for cell in line] for line in rows]
    return tabulate(cells, headers=headers, tablefmt="github", disable_numparse=True)


def run_workloads(directory: Path) -> str:
    rows = []
    for path in sorted(directory.glob("throughput-inputs/*/*.json")):
        graph, stages, limit = workload(path)
        name = f"{path.parent.name.removesuffix('Graphs').lower()} {path.stem}"
        rows.append(row(name, graph, stages, memory_limit=limit, routing="direct"))
    return table(rows)


def run_large() -> str:
    rows = [row("chain", chain(100_000), 1_024)]
    rows += [row(f"layered, transfers {share}", layered(10_000, transfers=share), 64) for share in (0.0, 0.1, 1.0)]
    return table(rows)


SIZES = (100, 300, 1_000, 3_000, 10_000, 30_000, 100_000)
SERIES: dict[str, tuple[Callable[[int], nx.DiGraph], int]] = {
    "chain, 16 stages": (chain, 16),
    "chain, 64 stages": (chain, 64),
    "layered, 16 stages": (layered, 16),
}


def run_scaling(plot: Path | None) -> str:
    times = {name: [timed(make(size), stages)[1] for size in SIZES] for name, (make, stages) in SERIES.items()}
    if plot is not None:
        plot.write_text(log_plot(SIZES, times, "nodes", "seconds of processor time"), encoding="utf-8")
    rows = [[size, *(times[name][index] for name in times)] for index, size in enumerate(SIZES)]
    return table(rows, ["nodes", *times], ".3f")


def log_plot(sizes: Sequence[float], series: dict[str, list[float]], across: str, up: str) -> str:
    """Draw lines over two logarithmic axes, as SVG."""
    width, height, left, bottom = 640, 400, 70, 50
    values = [value for line in series.values() for value in line]
    x_low, x_high = math.log10(min(sizes)), math.log10(max(sizes))
    y_low, y_high = math.floor(math.log10(max(min(values), 1e-4))), math.ceil(math.log10(max(values)))

    def place(size: float, value: float) -> tuple[float, float]:
        x = left + (math.log10(size) - x_low) / (x_high - x_low) * (width - left - 150)
        y = height - bottom - (math.log10(max(value, 1e-4)) - y_low) / (y_high - y_low) * (height - bottom - 20)
        return round(x, 1), round(y, 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for power in range(round(x_low), round(x_high) + 1):
        (x, top), (_, base) = place(10**power, 10**y_high), place(10**power, 10**y_low)
        parts.append(f'<line x1="{x}" y1="{top}" x2="{x}" y2="{base}" stroke="#ddd"/>')
        parts.append(f'<text x="{x}" y="{base + 18}" text-anchor="middle">{10**power:,}</text>')
    for power in range(y_low, y_high + 1):
        (x, y), (end, _) = place(10**x_low, 10**power), place(10**x_high, 10**power)
        parts.append(f'<line x1="{x}" y1="{y}" x2="{end}" y2="{y}" stroke="#ddd"/>')
        parts.append(f'<text x="{x - 8}" y="{y + 4}" text-anchor="end">{10.0**power:g}</text>')
    for (name, line), colour in zip(series.items(), ("#4a7ab5", "#c2573f", "#5a9e6f", "#8a63ad"), strict=False):
        points = [place(size, value) for size, value in zip(sizes, line, strict=True)]
        path = " ".join(f"{x},{y}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>' for x, y in points]
        parts.append(f'<text x="{points[-1][0] + 8}" y="{points[-1][1] + 4}" fill="{colour}">{name}</text>')
    middle = (left + width - 150) / 2
    parts.append(f'<text x="{middle}" y="{height - 8}" text-anchor="middle">{across}</text>')
    parts.append(f'<text transform="translate(14 {height / 2}) rotate(-90)" text-anchor="middle">{up}</text>')
    return "\n".join([*parts, "</svg>", ""])


def compile_one() -> str:
    """Compile the largest model in this process; give seconds of the call and the process's largest memory."""
    import fxpipe

    model, args, kwargs = llama_405b()
    wall, processor = time.perf_counter(), time.process_time()
    pipe = fxpipe.compile(model, 16, args, kwargs, grain="op")  # type: ignore[arg-type]
    seconds = time.perf_counter() - wall, time.process_time() - processor
    gap = pipe.plan.bottleneck / pipe.plan.lower_bound - 1
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    row = ["Llama, 405 billion", 16, *seconds, f"{resident / 1e9:.2f} GB", f"{gap:.2%}"]
    headers = ["model", "stages", "seconds", "of the processor", "resident, torch included", "gap"]
    return table([row], headers, ".1f")


def run_compile() -> str:
    """Compile in a fresh process, whose memory is its own."""
    command = [sys.executable, "-m", "tests.benchmarks", "partition", "compile", "--here"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def run_default() -> str:
    """Compile shapes at both grains and at the default one, each in a fresh process; seconds of the processor."""
    rows = []
    for name in SHAPES:
        spent: list[float] = []
        for grain in ("op", "auto"):
            command = [sys.executable, "-m", "tests.benchmarks", "partition", "default", "--here", name, grain]
            spent.append(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        rows.append([name, SHAPES[name][1], *spent, spent[1] / spent[0]])
    return table(rows, ["model", "stages", "op grain, s", "auto, s", "ratio"], ".2f")


def compile_default(name: str, grain: str) -> float:
    """Compile one shape in this process; give seconds of the processor."""
    import fxpipe

    make, stages = SHAPES[name]
    model, args, kwargs = make()
    start = time.process_time()
    fxpipe.compile(model, stages, args, kwargs, grain=grain)  # type: ignore[arg-type]
    return time.process_time() - start


PLACEMENTS = {"one": "1F1B", "interleaved": "Interleaved1F1B", "V": "ZBVZeroBubble"}


def run_several(chosen: Sequence[str], ranks: Sequence[int]) -> str:
    """Cut models for one and for two stages on each rank: the gap to the bound, and the seconds of the search."""
    makers = models()
    graphs = {name: makers[name]() for name in chosen or makers}
    parts = []
    for links, bandwidth in LINKS.items():
        latency = 0.0 if math.isinf(bandwidth) else 5e-6
        hardware = replace(Hardware.preset("h100"), link_bandwidth=bandwidth, link_latency=latency, node_size=0)
        rows = [[name, num, *several_cells(graph, num, hardware)] for name, graph in graphs.items() for num in ranks]
        headers = ["model", "ranks"]
        headers += [f"{name}: {what}" for name in PLACEMENTS for what in ("load", "gap", "s")]
        parts += [f"Links: {links}.", table(rows, headers, ".3f")]
    return "\n\n".join(parts)


def several_cells(graph: LayerGraph, ranks: int, hardware: Hardware) -> Iterator[object]:
    """Give largest rank load over the larger of mean load and largest layer, gap and seconds, for each placement."""
    for schedule in PLACEMENTS.values():
        stages = ranks if schedule == "1F1B" else 2 * ranks
        settings = Settings.of(
            stages=stages,
            ranks=ranks,
            schedule=schedule,
            num_microbatches=4 * stages,
            hardware=hardware,
            training=Training(),
            grain="op",
        )
        layout = make_layout(graph, estimate_costs(graph, "roofline", hardware, settings.training), settings)
        problem = replace(layout.problem, ties=())
        start = time.process_time()
        found = partition_nodes(problem, stages, exactly=True, placement=layout.placement)
        spent = time.process_time() - start
        yield found.bottleneck / max(math.fsum(problem.seconds) / ranks, *problem.seconds)
        yield f"{found.bottleneck / found.lower_bound - 1:.2%}"
        yield spent


PEERS = ("DeepSpeed parameters", "DeepSpeed uniform", "torchtitan", "Megatron", "torchgpipe")


def run_models(chosen: Sequence[str]) -> str:
    makers = models()
    graphs = {name: makers[name]() for name in chosen or makers}
    parts = []
    for links, bandwidth in LINKS.items():
        base = Hardware.preset("h100")
        hardware = replace(
            base, link_bandwidth=bandwidth, link_latency=0.0 if math.isinf(bandwidth) else 5e-6, node_size=0
        )
        rows = [line for name, graph in graphs.items() for line in model_rows(name, graph, hardware)]
        headers = ["model", "layers", "stages", "fxpipe", "lower bound", "one order", *PEERS, "seconds"]
        parts += [f"Links: {links}.", table(rows, headers, ".3f")]
    return "\n\n".join(parts)


def model_rows(name: str, graph: LayerGraph, hardware: Hardware) -> Iterator[list[object]]:
    """Give one row for each number of stages: largest load over the larger of mean load and largest layer."""
    for stages in STAGES:
        settings = Settings.of(
            stages=stages,
            ranks=stages,
            schedule="1F1B",
            num_microbatches=4 * stages,
            hardware=hardware,
            training=Training(),
            grain="op",
        )
        start = time.process_time()
        layout = make_layout(graph, estimate_costs(graph, "roofline", hardware, settings.training), settings)
        # Ties, and the wish that every stage has parameters, are left out: the others know neither.
        layout = replace(layout, problem=replace(layout.problem, ties=()))
        found = partition_nodes(layout.problem, stages, exactly=True, placement=layout.placement)
        spent = time.process_time() - start
        seconds = layout.problem.seconds
        ideal = max(math.fsum(seconds) / stages, *seconds)
        peers = {peer.name: peer.bottleneck for peer in peer_baselines(layout)}
        order = one_order(layout)
        assert found.bottleneck <= min(order, *filter(None, peers.values())) * (1 + 1e-9), "behind another cut"
        yield [
            name,
            len(layout.layers),
            stages,
            found.bottleneck / ideal,
            found.lower_bound / ideal,
            order / ideal,
            *("–" if peers[peer] is None else f"{peers[peer] / ideal:.3f}" for peer in PEERS),
            spent,
        ]


def one_order(layout: Layout) -> float:
    """Cut the layers in the order of calling, exactly: the smallest largest load, transfers and groups included.

    A plain dynamic programme over prefixes, apart from fxpipe's own searches.
    """
    problem, stages = layout.problem, layout.settings.stages
    count = len(problem.seconds)
    sums = np.concatenate([[0.0], np.cumsum(problem.seconds)])
    crossing = np.zeros(count + 1)
    for value in problem.values:
        crossing[min(value.nodes) + 1 : max(value.nodes) + 1] += value.seconds
    possible = np.ones(count + 1, dtype=bool)
    for group in problem.groups:
        possible[min(group) + 1 : max(group) + 1] = False
    cuts = np.flatnonzero(possible)
    far, near = (sums + crossing)[cuts], (sums - crossing)[cuts]
    best = np.full(len(cuts), math.inf)
    best[0] = 0.0
    for _ in range(stages):
        after = np.full(len(cuts), math.inf)
        for stop in range(1, len(cuts)):
            after[stop] = np.maximum(best[:stop], far[stop] - near[:stop]).min()
        best = after
    return float(best[-1])


SECTIONS = {
    "models": """## Cuts of models

One microbatch of one sequence (GPT-2 medium 1,024 tokens, Llama-8B 4,096, T5-large 512 + 512) or one image (ResNet-50
224 × 224, a U-Net with skips 256 × 256), roofline seconds of an H100, cut at op grain. Numbers are the largest load of
a stage, transfers included, over the larger of the mean load and the largest layer: 1 cannot be beaten. *One order* is
an exact dynamic programme over the layers in the order of calling, at the same costs. The others cut between modules by
their own rules (`fxpipe.planning.peers` has them); – where a rule makes no such cut.""",
    "several": """## Two stages on each rank

The same models, with one stage per rank, two that visit the ranks in a loop (interleaved), and two that turn back (a
V). The load is the largest of a rank, over the larger of the mean and the largest layer; the gap is that to the proven
lower bound.""",
    "default": """## The default call

`fxpipe.compile` of models on the meta device in fresh processes, capture included; processor seconds at op grain and
at `grain="auto"`, the default.""",
    "workloads": """## Published workloads

The sixteen pipeline workloads of [arXiv 2006.16423](https://arxiv.org/abs/2006.16423); in training workloads a forward
node and its backward share a stage; transfers are paid once by every stage that holds a value's producer or a reader
(`routing="direct"`); memory limits are kept.""",
    "large": "## Large graphs",
    "compile": """## From module to plan

`fxpipe.compile` of a model on the meta device at op grain, capture included, in a fresh process.""",
    "scaling": """## Time against size

![time against size](partition-time.svg)""",
}
"""What stands above the table of each section that ``--page`` writes."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("models", help="models against one order of calling and others' rules")
    one.add_argument("names", nargs="*", choices=[[], *models()], help="all of them if none is named")
    several = commands.add_parser("several", help="models with one stage per rank, two in a loop, two in a V")
    several.add_argument("names", nargs="*", choices=[[], *models()], help="all of them if none is named")
    several.add_argument("--ranks", nargs="+", type=int, default=[4, 8])
    default = commands.add_parser("default", help="the default call against op grain, capture included")
    default.add_argument("--here", nargs=2, metavar=("MODEL", "GRAIN"), help="one of them, in this process")
    large = commands.add_parser("large", help="100,000 nodes into 1,024 stages; 10,000 into 64, links free and not")
    largest = commands.add_parser("compile", help="a model of 405 billion parameters, capture included")
    largest.add_argument("--here", action="store_true", help="in this process rather than a fresh one")
    scaling = commands.add_parser("scaling", help="time against number of nodes")
    workloads = commands.add_parser("workloads", help="the sixteen published pipeline workloads")
    workloads.add_argument("directory", type=Path)
    for command in (one, several, default, large, largest, scaling, workloads):
        command.add_argument("--page", action="store_true", help="write the section of docs/benchmarks.md")
    arguments = parser.parse_args()
    run = {
        "models": lambda: run_models(arguments.names),
        "several": lambda: run_several(arguments.names, arguments.ranks),
        "default": lambda: str(compile_default(*arguments.here)) if arguments.here else run_default(),
        "large": run_large,
        "compile": lambda: compile_one() if arguments.here else run_compile(),
        "scaling": lambda: run_scaling(DOCS / "partition-time.svg" if arguments.page else None),
        "workloads": lambda: run_workloads(arguments.directory),
    }[arguments.command]
    text = run()
    if not arguments.page:
        print(text)
        return
    written = f"Written by `python -m tests.benchmarks partition {arguments.command} --page`."
    write_section(f"partition {arguments.command}", f"{SECTIONS[arguments.command]}\n\n{written}\n\n{text}")


if __name__ == "__main__":
    main()
