"""The sections of the page: how many models of a library were exact, and what came of the others."""

from __future__ import annotations

import re
import textwrap
from typing import Any

from tabulate import tabulate

SECTION = """Written by `python -m tests.benchmarks coverage {kind}` with {versions}.
{intro} Each runs in two stages and {microbatches} microbatches of two samples in one process, in evaluation mode and
float64, against the whole batch through the model itself, which was built eagerly with the same seed: initial weights
bit by bit, loss and every gradient within 1e-5 of a tensor's largest element (many a model casts to float32 inside,
whatever its weights are). Weights are made large enough, and the statistics of batch norms are taken from the batch,
so that gradients do not vanish: of the exact ones
{felt}.
The loss is the model's own where it returns one for what it is given, else weighed mean squares of all that it returns.
{tried} of {all} were tried:

{counts}

**Not exact, and not run**

{table}

**Exact**: {exact}.
"""
ALONE = """
\\* In one microbatch: what it returns couples the samples of a batch, or it takes no half of the batch by itself.
"""
INTROS = {
    "hf": """One architecture class for each model type of the library (for language modelling, else with a head, else
the bare model), built from its default configuration with few layers, narrow where that builds. Those that need timm
were tried with torch 2.14.1.""",
    "vision": "The smallest model of each family (a module of the library) by its name.",
}


def section(kind: str, rows: dict[str, dict[str, Any]], microbatches: int) -> str:
    total = rows.pop("")["of"]
    results: dict[str, list[str]] = {}
    for name in sorted(rows):
        results.setdefault(rows[name]["result"], []).append(name)
    order = ("exact", "differs", "as far off itself", "fails", "refused", "not finished", "not built")
    meanings = {
        "exact": "as the model",
        "differs": "another number, or another initial weight",
        "as far off itself": "the model alone is as far off itself: random numbers, samples that meet, float32",
        "fails": "an error that is not fxpipe's own",
        "refused": "an error of fxpipe's that says why",
        "not finished": "more time or memory than a model is given here",
        "not built": "no small model, or no input for it, was found here: says nothing about fxpipe",
    }
    counts = [[result, len(results[result]), meanings[result]] for result in order if result in results]
    others = [[n, r, cell(rows[n].get("why", ""))] for r in order[1:] for n in results.get(r, ())]
    coupled = [name for name in results.get("exact", ()) if "whole" in rows[name]]
    exact = ", ".join(f"{n}{'*' if n in coupled else ''}" for n in results.get("exact", ())) or "none"
    text = SECTION.format(
        kind=kind,
        intro=INTROS[kind],
        versions=versions(kind),
        microbatches=microbatches,
        felt=felt([rows[name] for name in results.get("exact", ())]),
        tried=len(rows),
        all=total,
        counts=tabulate(counts, ["result", "models", "meaning"], tablefmt="github"),
        table=tabulate(others, ["model", "result", "why"], tablefmt="github", disable_numparse=True),
        exact="\n".join(textwrap.wrap(exact, 118, break_long_words=False, break_on_hyphens=False)).lstrip(),
    )
    return text + (ALONE if coupled else "")


def felt(rows: list[dict[str, Any]]) -> str:
    """Say how many models have a gradient to compare in how many of their tensors."""
    shares = [row.get("felt", 0.0) for row in rows]
    most, some = sum(share >= 0.9 for share in shares), sum(0.5 <= share < 0.9 for share in shares)
    return (
        f"{most} have a gradient above 1e-7 of the largest in nine of ten tensors or more, {some} in half of them, "
        f"{len(shares) - most - some} in fewer"
    )


def cell(text: str) -> str:
    return (
        re.sub(r"\s+", " ", re.sub(r"\b0x[0-9a-f]+|/[\w./-]*/[\w./-]+", "…", text))
        .replace("|", "\\|")
        .replace("<", "\\<")
    )


def versions(kind: str) -> str:
    import importlib.metadata as metadata

    libraries = ("torch", "transformers") if kind == "hf" else ("torch", "torchvision", "timm")
    return ", ".join(f"{name} {metadata.version(name).partition('+')[0]}" for name in libraries)
