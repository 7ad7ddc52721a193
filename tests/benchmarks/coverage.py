"""Measure capture: the architectures of the tests, others' tracers on the same models, scale, and cost in a step.

    python -m tests.benchmarks coverage architectures [NAME ...]
    python -m tests.benchmarks coverage peers [NAME ...]
    python -m tests.benchmarks coverage variants
    python -m tests.benchmarks coverage scale
    python -m tests.benchmarks coverage page
    python -m tests.benchmarks coverage hf | vision [--seconds N] [--limit N]    (``families``)

Times are seconds of processor time of one thread, the model's library imported. ``page`` runs all but the last two.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import importlib
import io
import json
import logging
import os
import random
import re
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "capture"))
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import torch
from architectures import ARCHITECTURES, Architecture, hugging_face, padded, split, tokens, without_mask
from judge import CLOSE
from sections import write_section
from staged import (
    Outcome,
    cut,
    detached,
    differences,
    every_boundary,
    objective,
    one_stage,
    run_model,
    run_program,
)
from tabulate import tabulate
from torch import fx, nn
from torch.distributed.pipelining import SplitPoint, pipeline

from fxpipe.capture.calls.counting import LayerCounter
from fxpipe.capture.capture import Capture, Captured
from fxpipe.ir.tree import tree_leaves
from fxpipe.program import Program
from fxpipe.variants import Variants

SEED = 7
CLOSE_IN_FLOAT32 = 1e-6  # the same for what others traced, which runs as it is
GRAINS = ("block", "op")


def built(architecture: Architecture, device: str) -> nn.Module:
    torch.manual_seed(0)
    with torch.device(device):
        return architecture.build()


def loss_of(model: nn.Module, args: Any, kwargs: Any) -> bool:
    """Whether the model computes a loss for this batch."""
    with torch.no_grad():
        given = copy.deepcopy(model)(*args, **copy.deepcopy(kwargs))
    found = given.get("loss") if isinstance(given, dict) else getattr(given, "loss", None)
    return found is not None or (isinstance(given, torch.Tensor) and given.dim() == 0)


def shown(distance: float) -> str:
    return "exact" if distance <= CLOSE else f"{distance:.0e} off"


# --- the architectures ---


def run_architectures(names: Sequence[str]) -> str:
    rows = []
    for name in names or ARCHITECTURES:
        rows.append([name, *measure(ARCHITECTURES[name])])
        print(*rows[-1], file=sys.stderr, flush=True)
    headers = ["architecture", "layers", "seconds", "result", "sends", "layers op", "seconds op", "result op"]
    return str(tabulate(rows, headers, tablefmt="github", disable_numparse=True))


def measure(architecture: Architecture) -> list[str]:
    """Capture at both grains, compare in both modes and in float64, and give the row."""
    real = built(architecture, "cpu")
    args, kwargs = split(architecture.batch(0))
    with_loss = loss_of(real, args, kwargs)
    expected = {mode: run_model(real.train(mode), args, kwargs, SEED, with_loss, wide=True) for mode in (True, False)}
    row = []
    for grain in GRAINS:
        if grain == "op" and architecture.branches:
            row += ["–", "–", "blocks stay whole"]
            continue
        capture = Capture(built(architecture, "meta"))
        inputs = capture.inputs(args, kwargs)
        worst, seconds = 0.0, []
        for mode in (True, False):
            capture.skeleton.module.train(mode)
            begin = time.process_time()
            captured = capture.capture(inputs, grain=grain, with_loss=with_loss)
            graph = capture.layer_graph(captured)
            seconds.append(time.process_time() - begin)
            for program in programs(captured, graph):
                found = run_program(program, real.train(mode), inputs.tensors, SEED, wide=True)
                worst = max(worst, *differences(expected[mode], found).values(), 0.0)
            if mode:
                layers, sends = len(graph.specs), sends_of(captured, graph)
        row += [str(layers), f"{min(seconds):.2f}", shown(worst)] + ([sends] if grain == "block" else [])
    return row


def programs(captured: Captured, graph: Any) -> Iterator[Program]:
    """Cut into one stage, 2, 3 and 4 at random, and as many as there can be."""
    numbers = random.Random(0)
    stages, number = every_boundary(graph)
    cuts = [(one_stage(graph), 1), (stages, number), *((cut(graph, size, numbers), size) for size in (2, 3, 4))]
    for stage_of_layer, size in cuts:
        if stage_of_layer is not None:
            yield captured.program(stage_of_layer, size)


def sends_of(captured: Captured, graph: Any) -> str:
    """Give how many tensors pass from a stage to the next, over all boundaries."""
    stages, number = every_boundary(graph)
    program = captured.program(stages, number)
    sends = [len(stage.sent) for stage in program.stages[:-1]]
    return str(sends[0]) if min(sends) == max(sends) else f"{min(sends)}-{max(sends)}"


# --- others on the same models ---


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Others warn and log a lot."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(level)


Run = Callable[[nn.Module], Outcome]


def with_fxpipe(model: nn.Module, args: Any, kwargs: Any, with_loss: bool) -> Run:
    capture = Capture(model)
    inputs = capture.inputs(args, kwargs)
    captured = capture.capture(inputs, with_loss=with_loss)
    stages = cut(capture.layer_graph(captured), 2, random.Random(0))
    program = captured.program(stages or {}, 2 if stages else 1)
    return lambda real: run_program(program, real, inputs.tensors, SEED)


def blocks_in_half(model: nn.Module) -> dict[str, SplitPoint]:
    """Give the block in the middle, as a user of ``pipeline`` names it."""
    blocks = Capture(model).blocks
    return {blocks[len(blocks) // 2]: SplitPoint.BEGINNING}


def traced(make: Callable[[nn.Module, Any, Any], Callable[..., Any]]) -> Callable[[nn.Module, Any, Any, bool], Run]:
    """Run what a tracer made of a model, with the parameters it holds."""

    def peer(model: nn.Module, args: Any, kwargs: Any, with_loss: bool) -> Run:
        call = make(model, args, copy.deepcopy(kwargs))

        def run(_: nn.Module) -> Outcome:
            torch.manual_seed(SEED)
            output = call(*args, **copy.deepcopy(kwargs))
            output = loss_in(output) if with_loss else output
            objective(output).backward()
            held = getattr(call, "module", call)
            found = {re.sub(r"^submod_pp_\d+\.", "", fqn): p.grad for fqn, p in held.named_parameters()}
            return Outcome(detached(output), {fqn: g for fqn, g in found.items() if g is not None}, {})

        return run

    return peer


def loss_in(output: Any) -> torch.Tensor:
    """Give the loss in what a traced model returned: by its name, or first in a flat list."""
    if isinstance(output, torch.Tensor):
        return output
    found = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    flat = (leaf for _, leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor))
    return found if found is not None else next(flat)


def with_pipeline(model: nn.Module, args: Any, kwargs: Any) -> Callable[..., Any]:
    split_model = pipeline(model, tuple(args), kwargs, split_spec=blocks_in_half(model)).split_gm
    names = [node.name for node in split_model.graph.nodes if node.op == "placeholder"]

    def call(*given: Any, **named: Any) -> Any:
        flat = [leaf for _, leaf in tree_leaves((given, named)) if isinstance(leaf, torch.Tensor)]
        ordered = [named[name] for name in names] if named.keys() >= set(names) else flat
        return fx.Interpreter(split_model).run(*ordered)

    call.module = split_model  # type: ignore[attr-defined]
    return call


def with_export(model: nn.Module, args: Any, kwargs: Any) -> Callable[..., Any]:
    return torch.export.export(model, tuple(args), kwargs, strict=False).module()


def with_trace(model: nn.Module, args: Any, kwargs: Any) -> Callable[..., Any]:
    return fx.symbolic_trace(model)


PEERS = {
    "fxpipe": with_fxpipe,
    "pipeline()": traced(with_pipeline),
    "torch.export": traced(with_export),
    "symbolic_trace": traced(with_trace),
}


def run_peers(names: Sequence[str]) -> str:
    rows = []
    totals = {peer: [0, 0, 0.0] for peer in PEERS}
    for name in names or ARCHITECTURES:
        architecture = ARCHITECTURES[name]
        real = built(architecture, "cpu").train()
        args, kwargs = split(architecture.batch(0))
        with_loss = loss_of(real, args, kwargs)
        expected = run_model(real, args, kwargs, SEED, with_loss)
        row = [name]
        models = {peer: built(architecture, "meta" if peer == "fxpipe" else "cpu").train() for peer in PEERS}
        for peer, make in PEERS.items():
            begin = time.process_time()
            try:
                with quiet():
                    run = make(models[peer], args, kwargs, with_loss)
            except Exception:
                row += ["refused"]
                continue
            seconds = time.process_time() - begin
            totals[peer][0] += 1
            totals[peer][2] += seconds
            result = outcome_of(run, real, expected)
            totals[peer][1] += result == "exact"
            row += [f"{result}, {seconds:.2f} s"]
        rows.append(row)
        print(*row, sep=" | ", file=sys.stderr, flush=True)
    sums = [
        f"{done} captured, {exact} exact, {total / max(done, 1):.2f} s each" for done, exact, total in totals.values()
    ]
    table = tabulate([*rows, ["all", *sums]], ["architecture", *PEERS], tablefmt="github", disable_numparse=True)
    return str(table)


def in_order(outcome: Outcome) -> Outcome:
    """Name what was returned by its place: some give a flat list for a structure."""
    tensors = [leaf for leaf in outcome.output.values() if isinstance(leaf, torch.Tensor)]
    return Outcome(dict(enumerate(tensors)), outcome.gradients, {})


def outcome_of(run: Run, real: nn.Module, expected: Outcome) -> str:
    """Say how what a tracer made compares: loss (or outputs) and gradients."""
    try:
        with quiet():
            found = run(real)
    except Exception as error:
        return f"fails ({type(error).__name__})"
    off = differences(in_order(expected), in_order(found))
    outputs = [distance for name, distance in off.items() if name.startswith("output")]
    if any(distance > CLOSE_IN_FLOAT32 for distance in outputs):
        return "wrong loss"
    wrong = sum(distance > CLOSE_IN_FLOAT32 for distance in off.values())
    return f"{wrong} gradients wrong" if wrong else "exact"


# --- shapes, masks and guards ---

DECODERS = ("Llama", "Qwen3", "GPT-2")


def run_variants() -> str:
    rows = []
    for name in DECODERS:
        for mask, batch in (("none", without_mask), ("all ones", tokens), ("padded", padded)):
            capture = Capture(built(ARCHITECTURES[name], "meta"))
            inputs = capture.inputs(*split(batch(0)))
            captured = capture.capture(inputs)
            variants = Variants(capture, one_stage(capture.layer_graph(captured)), 1, ())
            tries = [
                (inputs, True),
                (resized(capture, batch, 8, 2), True),
                (resized(capture, batch, 12, 1), True),
                (inputs, False),
            ]
            first, length, fewer, again = (time_of(variants, each, new) for each, new in tries)
            forms = [note.removeprefix("attention: ") for note in captured.notes if note.startswith("attention")]
            rows.append(
                [
                    *(name, mask, ", ".join(forms), len(captured.observation.guards), f"{first:.3f}"),
                    *(f"{length / first:.2f}", f"{fewer / first:.2f}", f"{again * 1e3:.3f}"),
                ]
            )
    headers = ["model", "mask", "attention", "guards", "first capture s", "other length", "fewer samples", "again ms"]
    return str(tabulate(rows, headers, tablefmt="github", disable_numparse=True))


def time_of(variants: Variants, inputs: Any, new: bool) -> float:
    """Give the least time of several that it takes to find a variant, captured anew or known."""
    times = []
    for _ in range(5 if new else 200):
        if new:
            variants.forget()
            gc.collect()
        begin = time.process_time()
        variants.find(inputs, with_loss=True)
        times.append(time.process_time() - begin)
    return min(times)


def resized(capture: Capture, batch: Callable[[int], dict[str, Any]], length: int, samples: int) -> Any:
    return capture.inputs((), {name: tensor[:samples, -length:] for name, tensor in batch(0).items()})


# --- scale ---

LARGE = {
    "vocab_size": 128256,
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "num_hidden_layers": 126,
    "num_attention_heads": 128,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
}


def run_scale() -> str:
    """Capture a Llama of 405 billion parameters on meta, each grain in a process of its own."""
    rows = []
    for grain in GRAINS:
        command = [sys.executable, "-m", "tests.benchmarks", "coverage", "large", grain]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        rows.append([grain, found["layers"], f"{found['seconds']:.1f}", f"{found['gigabytes']:.2f}"])
    headers = ["grain", "layers", "seconds", "GB resident"]
    return str(tabulate(rows, headers, tablefmt="github", disable_numparse=True))


def run_large(grain: str) -> str:
    with torch.device("meta"):
        model = hugging_face("LlamaConfig", "LlamaForCausalLM", **LARGE)()
    ids = torch.zeros(1, 4096, dtype=torch.long)
    begin = time.process_time()
    capture = Capture(model)
    counter = LayerCounter(capture.skeleton, fused_attention=True)
    inputs = capture.inputs((), {"input_ids": ids, "labels": ids})
    graph = capture.layer_graph(capture.capture(inputs, grain=grain, counter=counter))
    seconds = time.process_time() - begin
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return json.dumps({"seconds": seconds, "layers": len(graph.specs), "gigabytes": resident / 1e9})


PAGE = """# What capture covers

Written by `python -m tests.benchmarks coverage page`; seconds are processor time of one thread on a small machine.

## Architectures

Tiny random models, built on meta, captured with a batch at block grain (left) and op grain (right), in training with
dropout on and in evaluation; cut into one stage, into 2, 3 and 4 at random and at every boundary at once, and compared
with the untouched model: loss or outputs, every gradient and every buffer. *Exact* is computed in float64, within 1e-12
of the tensor's largest element: in which order sums run, and so the last bits, is the processor's matter. *Sends*
counts the tensors that pass from one stage to the next, over all boundaries between blocks: masks, position ids and
rotary tables are made again at each stage and never travel.

{architectures}

## Side by side

The same models and batches in training mode, one capture each, run in float32: loss and all gradients against the
model, within 1e-6 of a tensor's largest element. The others get real parameters on the CPU; `pipeline()` is told to cut
before the middle block.

{peers}

## Masks, shapes and guards

Guards are read again before each step. *Other length* and *fewer samples* are the time of the capture that a new shape
takes, over the first one's; *again* is what a microbatch costs whose graph is known, guards included.

{variants}

## Scale

A Llama of 405 billion parameters (126 layers, 4,096 tokens) on meta, counted, in a process of its own.

{scale}
"""


def main() -> None:
    if sys.argv[1:2] in (["hf"], ["vision"]):
        sys.exit(importlib.import_module("tests.benchmarks.families.library_families").main())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("architectures", "the table of the tests"), ("peers", "others' tracers on the same models")):
        command = commands.add_parser(name, help=text)
        command.add_argument("names", nargs="*", choices=[[], *ARCHITECTURES], help="all of them if none is named")
    commands.add_parser("variants", help="new shapes, masks and guards")
    commands.add_parser("scale", help="405 billion parameters")
    commands.add_parser("large", help="one capture of that, in this process").add_argument("grain", choices=GRAINS)
    page = commands.add_parser("page", help="everything, as the page of the documentation")
    page.add_argument("--docs", type=Path, default=Path("docs"), help="folder of the page")
    arguments = parser.parse_args()
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"
    torch.set_num_threads(1)
    if arguments.command in ("architectures", "peers"):
        print({"architectures": run_architectures, "peers": run_peers}[arguments.command](arguments.names))
    elif arguments.command == "variants":
        print(run_variants())
    elif arguments.command == "scale":
        print(run_scale())
    elif arguments.command == "large":
        print(run_large(arguments.grain))
    else:
        text = PAGE.format(
            architectures=run_architectures([]), peers=run_peers([]), variants=run_variants(), scale=run_scale()
        )
        write_section("coverage page", text, arguments.docs / "coverage.md")


if __name__ == "__main__":
    main()
