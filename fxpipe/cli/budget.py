"""``fxpipe plan --devices 64`` and ``fxpipe sweep``: whole configurations of a budget of devices, best first."""

from __future__ import annotations

import argparse
import csv
import io
import json
import re
from dataclasses import replace
from typing import Any

from tabulate import tabulate

from fxpipe.cli.models import find_factory
from fxpipe.cli.options import add_command, add_model, limit, read_cost, training, write
from fxpipe.cli.shapes import ExampleSize
from fxpipe.errors import FxpipeError, PlanError
from fxpipe.ir.files.hardware_file import resolve_hardware
from fxpipe.ir.hardware import Hardware, Training
from fxpipe.ir.schedule import SCHEDULES, schedule_named
from fxpipe.ir.units import seconds_text, size_text
from fxpipe.planning.budget import Budget, Spent, best_or_error, reduction_s, spend
from fxpipe.planning.configurations import Offer
from fxpipe.planning.settings import device_limit
from fxpipe.planning.simulation.simulate import simulate

SHOWN = 6  # the fastest configuration and the five after it
SWEPT = 30  # rows of a sweep that are printed; files get all
SIZES = (1, 2, 4)
NOTICED = 0.02  # of a step, below which an order that changes is not worth a line


def add(commands: Any) -> None:
    """Add ``sweep`` to the parser."""
    parser = add_command(
        commands,
        "sweep",
        _sweep,
        help="plan and simulate every configuration of some devices, best first",
        examples="""
        fxpipe sweep llama-8b --devices 64 --global-batch 256
        fxpipe sweep train.py:build --devices 8 --schedule 1F1B --csv sweep.csv
        """,
    )
    add_model(parser)
    add_budget(parser, required=True)
    parser.add_argument("--schedule", default="auto", help=f"one of {', '.join(SCHEDULES)}, or auto: all (default)")
    parser.add_argument("--cost", default="roofline", help="flops, roofline (default), or a JSON file of times")
    parser.add_argument("--hardware", default="h100", help="a preset (default: h100) or a TOML file")
    parser.add_argument("--memory-limit", type=limit, default="device", metavar="SIZE", help="default: device")
    parser.add_argument(
        "--recompute", metavar="WHAT", help="one way only; default: nothing, block and auto are compared"
    )
    parser.add_argument("--csv", metavar="FILE", help="write all rows; - for standard output")
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="write all rows; without FILE, print them")


def add_budget(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    """Add the options that name a budget."""
    parser.add_argument("--devices", type=int, required=required, help="accelerators to spend, replicas included")
    parser.add_argument("--nodes-of", type=int, metavar="N", help="accelerators of a node; default: the hardware's")
    parser.add_argument("--global-batch", type=int, metavar="N", help="samples of a step, all replicas together")


def print_best(options: argparse.Namespace) -> None:
    """Print the fastest configuration of a budget, the five after it, and what would change their order.

    Raises:
        PlanError: Nothing divides the budget, or nothing fits.
    """
    way = training(options)
    ways = [way if way.recompute else replace(way, recompute="auto")]
    found, budget, hardware, tokens = _spent(options, ways)
    if options.json:
        write(options.json, json.dumps([_row(each, tokens) for each in found], indent=1))
    if options.json == "-":
        return
    print(_table(found[:SHOWN], tokens))
    for line in _changes(found, budget, hardware):
        print(line)


def _sweep(options: argparse.Namespace) -> None:
    way = training(options)
    ways = [way] if way.recompute else [way, replace(way, recompute="block"), replace(way, recompute="auto")]
    found, _, _, tokens = _spent(options, ways)
    rows = [_row(each, tokens) for each in found]
    if options.csv:
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write(options.csv, text.getvalue().rstrip("\n"))
    if options.json:
        write(options.json, json.dumps(rows, indent=1))
    if "-" not in (options.csv, options.json):
        print(_table(found[:SWEPT], tokens))


def _spent(options: argparse.Namespace, ways: list[Training]) -> tuple[list[Spent], Budget, Hardware, int | None]:
    from fxpipe.batch.dims import BatchDims
    from fxpipe.batch.example import example_batch
    from fxpipe.capture.capture import Capture
    from fxpipe.capture.model.factory import build
    from fxpipe.choosing import Chooser

    hardware = resolve_hardware(options.hardware)
    for name in ("devices", "nodes_of", "global_batch"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise PlanError(f"--{name.replace('_', '-')} is {value}\n  give a number, 1 or more")
    example = ExampleSize.asked(options.batch, max(SIZES), options.sequence, options.dtype)
    model, args, kwargs = build(find_factory(options.model, example), "meta")
    capture = Capture(model)
    batch, dims = example_batch(model, args, kwargs, needs_target=False), BatchDims(capture.parameter_names)
    chooser = Chooser(capture, batch, dims, read_cost(options.cost), hardware, Training())
    sizes = tuple(size for size in SIZES if chooser.batch % size == 0)
    offers: dict[int, Offer] = {size: _fixed(chooser.offer, chooser.batch // size) for size in sizes}
    node_size = hardware.node_size if options.nodes_of is None else options.nodes_of
    budget = Budget(options.devices, node_size, options.global_batch or 4 * options.devices, sizes)
    most = options.memory_limit if options.memory_limit is not None else "device"
    bytes_of_rank = device_limit(hardware) if isinstance(most, str) else int(most)
    schedule = None if options.schedule == "auto" else schedule_named(options.schedule).name
    found = [each for way in ways for each in spend(budget, offers, hardware, way, bytes_of_rank, schedule)]
    found.sort(key=lambda each: (not each.outcome.fits, each.step_s, each.outcome.peak_bytes))
    error: FxpipeError | None = best_or_error(found, budget, bytes_of_rank)
    if error is not None:
        raise error
    return found, budget, hardware, _tokens(offers[sizes[0]](1)[0].inputs)


def _fixed(offer: Offer, number: int) -> Offer:
    return lambda _: offer(number)


def _tokens(inputs: tuple[str, ...]) -> int | None:
    """Give the tokens of a sample, from the first input that is two-dimensional and whole.

    >>> _tokens(("input_ids int64[2, 1024]",)), _tokens(("images float32[2, 3, 8, 8]",))
    (1024, None)
    """
    found = (re.search(r"\bint\d+\[\d+, (\d+)\]", text) for text in inputs)
    return next((int(match[1]) for match in found if match), None)


def _row(each: Spent, tokens: int | None) -> dict[str, Any]:
    made, plan = each.outcome.configuration, each.outcome.plan
    assert plan is not None
    return {
        "pipeline": made.ranks,
        "data": made.training.data_parallel,
        "stages": made.stages,
        "schedule": made.schedule,
        "microbatches": made.num_microbatches,
        "size": each.size,
        "recompute": sum(len(stage.recompute) for stage in plan.stages),
        "sharded": made.training.fsdp,
        "in_node": each.nodes,
        "step_s": each.step_s,
        "bubble": each.outcome.bubble,
        "samples_per_s": each.samples_per_s,
        "tokens_per_s": each.samples_per_s * tokens if tokens else None,
        "mfu": each.utilisation,
        "peak_bytes": each.outcome.peak_bytes,
        "fits": each.outcome.fits,
    }


def _table(found: list[Spent], tokens: int | None) -> str:
    header = ["pp × dp", "stages", "schedule", "microb.", "recompute", "step", "tokens/s" if tokens else "samples/s"]
    header += ["MFU", "memory", ""]
    rows = []
    for each in found:
        row = _row(each, tokens)
        recomputed = str(row["recompute"]) if row["recompute"] else "–"
        notes = ["sharded"] if row["sharded"] else []
        notes += ["" if row["fits"] else "does not fit"]
        notes += [each.nodes.partition(" of ")[0] + " in a node"] if row["data"] > 1 and row["pipeline"] > 1 else []
        rows.append(
            [
                f"{row['pipeline']} × {row['data']}", row["stages"], row["schedule"],
                f"{row['microbatches']} of {row['size']}", recomputed, seconds_text(each.step_s),
                f"{row['tokens_per_s'] or row['samples_per_s']:,.0f}", f"{100 * row['mfu']:.1f} %",
                size_text(row["peak_bytes"]), ", ".join(filter(None, notes)),
            ]
        )  # fmt: skip
    align = ["left", "right", "left", "right", "right", "right", "right", "right", "right", "left"]
    return tabulate([header, *rows], tablefmt="plain", colalign=align, disable_numparse=True)


def _named(each: Spent) -> str:
    made = each.outcome.configuration
    return f"{made.ranks} × {made.training.data_parallel} {made.schedule}, {made.num_microbatches} of {each.size}"


def _changes(found: list[Spent], budget: Budget, hardware: Hardware) -> list[str]:
    """Say what would put another configuration first: more memory, or links of another speed; each tried."""
    fitting = [each for each in found if each.outcome.fits]
    best, said = fitting[0], []
    tight = [each for each in found if not each.outcome.fits and each.step_s < best.step_s * (1 - NOTICED)]
    if tight:
        other = min(tight, key=lambda each: each.step_s)
        said.append(
            f"with {size_text(other.outcome.peak_bytes)} per device: {_named(other)} {seconds_text(other.step_s)}"
        )
    for factor, word in ((2.0, "twice"), (0.5, "half")):
        quicker = {id(each): _at_links(each, hardware, budget, factor) for each in fitting[: 4 * SHOWN]}
        first = min(fitting[: 4 * SHOWN], key=lambda each: quicker[id(each)])
        if quicker[id(first)] < quicker[id(best)] * (1 - NOTICED):
            said.append(f"links {word} as fast: {_named(first)} {seconds_text(quicker[id(first)])}")
    return said or ["neither more memory nor links twice or half as fast would change which comes first"]


def _at_links(each: Spent, hardware: Hardware, budget: Budget, factor: float) -> float:
    plan = each.outcome.plan
    assert plan is not None

    def faster(device: Hardware) -> Hardware:
        far = device.internode_bandwidth
        return replace(
            device,
            link_bandwidth=device.link_bandwidth * factor,
            internode_bandwidth=None if far is None else far * factor,
        )

    step_s = simulate(replace(plan, hardware=faster(plan.hardware))).step_s
    return step_s + reduction_s(plan, faster(replace(hardware, node_size=budget.node_size)), each.nodes)
