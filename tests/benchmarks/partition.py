"""Measure the partitioner: time against size, and published workloads against their proven optimum.

    python tests/benchmarks/partition.py chain
    python tests/benchmarks/partition.py layered
    python tests/benchmarks/partition.py scaling --plot docs/partition-time.svg
    python tests/benchmarks/partition.py workloads DIR

``DIR`` is a checkout of Microsoft's dnn-partitioning repository (arXiv 2006.16423).
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import networkx as nx
from tabulate import tabulate

from fxpipe.planning.graphs import read_graph
from fxpipe.planning.partition import Partition, partition_nodes


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
    """Partition a graph; seconds include reading it."""
    start = time.perf_counter()
    found = partition_nodes(read_graph(graph), stages, **options)
    return found, time.perf_counter() - start


def row(name: str, graph: nx.DiGraph, stages: int, **options: object) -> list[object]:
    found, seconds = timed(graph, stages, **options)
    gap = found.bottleneck / found.lower_bound - 1 if found.lower_bound else 0.0
    proven = "yes" if found.proven else "no"
    return [name, len(graph), stages, found.bottleneck, found.lower_bound, f"{gap:.2%}", found.method, proven, seconds]


HEADERS = ["graph", "nodes", "stages", "bottleneck", "lower bound", "gap", "method", "proven", "seconds"]


def show(rows: list[list[object]]) -> None:
    print(tabulate(rows, headers=HEADERS, tablefmt="github", floatfmt=".6g"))


def run_workloads(directory: Path) -> None:
    rows = []
    for path in sorted(directory.glob("throughput-inputs/*/*.json")):
        graph, stages, limit = workload(path)
        name = f"{path.parent.name.removesuffix('Graphs').lower()} {path.stem}"
        rows.append(row(name, graph, stages, memory_limit=limit, routing="direct"))
        print(rows[-1], flush=True)
    show(rows)


def run_scaling(plot: Path | None) -> None:
    sizes = [100, 300, 1_000, 3_000, 10_000, 30_000, 100_000]
    makers = {"chain, 16 stages": (chain, 16), "chain, 64 stages": (chain, 64), "layered, 16 stages": (layered, 16)}
    times = {name: [timed(make(size), stages)[1] for size in sizes] for name, (make, stages) in makers.items()}
    rows = [[size, *(times[name][index] for name in times)] for index, size in enumerate(sizes)]
    print(tabulate(rows, headers=["nodes", *times], tablefmt="github", floatfmt=".3f"))
    if plot is None:
        return
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "fxpipe"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    for name, seconds in times.items():
        axes.loglog(sizes, seconds, marker="o", label=name)
    axes.set(xlabel="nodes", ylabel="seconds", title="Time of partition()")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(plot, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("chain", help="100,000 nodes into 1,024 stages")
    commands.add_parser("layered", help="10,000 nodes into 64 stages, links free and not")
    scaling = commands.add_parser("scaling", help="time against number of nodes")
    scaling.add_argument("--plot", type=Path, help="write the plot here (needs matplotlib)")
    workloads = commands.add_parser("workloads", help="the sixteen published pipeline workloads")
    workloads.add_argument("directory", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "chain":
        show([row("chain", chain(100_000), 1_024)])
    elif arguments.command == "layered":
        show([row(f"layered, transfers {share}", layered(10_000, transfers=share), 64) for share in (0.0, 0.1, 1.0)])
    elif arguments.command == "scaling":
        run_scaling(arguments.plot)
    else:
        run_workloads(arguments.directory)


if __name__ == "__main__":
    main()
