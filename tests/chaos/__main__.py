"""Inject faults and write what came of them into docs/reliability.md: ``python -m tests.chaos --page``."""

from __future__ import annotations

import argparse
import collections
import json
import os
import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from benchmarks.sections import write_section  # noqa: E402
from chaos.faults import ENDED, PLACES, RANKS, WITHIN_S, chosen  # noqa: E402

PAGE = ROOT / "docs" / "reliability.md"


def outcomes(number: int, at_once: int) -> list[dict[str, object]]:
    """Inject so many faults."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(ROOT)])}
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump([fault.name for fault in chosen(number)], file)
        file.flush()
        command = [sys.executable, str(ROOT / "tests" / "chaos" / "worker.py"), file.name, str(at_once)]
        text = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True).stdout
    return [json.loads(line) for line in text.splitlines()]


def table(lines: list[dict[str, object]]) -> str:
    """Give what came of the faults, a row for each place, and a line about all of them."""
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    slowest: dict[str, float] = collections.defaultdict(float)
    for line in lines:
        fault, wrong = line["fault"], line["wrong"]
        place = fault["place"]  # type: ignore[index]
        counts[place]["faults"] += 1
        for what in ("not reached", "hang", "late", "wrong cause", "orphan"):
            counts[place][what] += any(str(text).startswith(what) for text in wrong)  # type: ignore[attr-defined]
        slowest[place] = max(slowest[place], float(line["seconds"]))  # type: ignore[arg-type]
    columns = ("faults", "not reached", "hang", "late", "wrong cause", "orphan")
    rows = [
        "| place | faults | not reached | hangs | late | wrong causes | orphans | slowest |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for place in (*PLACES, "step"):
        if place in counts:
            cells = " | ".join(str(counts[place][column]) for column in columns)
            name = "differing calls, batches, modes" if place == "step" else place
            rows.append(f"| {name} | {cells} | {slowest[place]:.1f} s |")
    total = [sum(each[column] for each in counts.values()) for column in columns]
    rows.append(f"| **all** | {' | '.join(f'**{number}**' for number in total)} | {max(slowest.values()):.1f} s |")
    kinds = sorted({line["fault"]["kind"] for line in lines})  # type: ignore[index]
    schedules = sorted({line["fault"]["schedule"] for line in lines})  # type: ignore[index]
    ended = sum(bool(line["ended"]) for line in lines)
    about = (
        f"{len(lines)} faults on {RANKS} ranks of one machine, of these kinds: {', '.join(kinds)}; under "
        f"{', '.join(schedules)}. In {ended} of them a rank was kept by an exchange of gloo's that never ends: it "
        f"printed the cause and ended itself with exit code {ENDED}. Late: more than {WITHIN_S:g} s after the rank "
        "failed, or after `timeout` where it stands still. Slowest: until the last rank had raised; a rank that stands "
        "still has 1 s of that."
    )
    return "\n".join([about, "", *rows]) + "\n"


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--at-once", type=int, default=2)
    parser.add_argument("--page", action="store_true", help=f"write the table into {PAGE.name}")
    options = parser.parse_args()
    lines = outcomes(options.faults, options.at_once)
    text = table(lines)
    print(text)
    for line in lines:
        if line["wrong"]:
            print(json.dumps(line, indent=1))
    if options.page:
        write_section("python -m tests.chaos --page", text, PAGE)


if __name__ == "__main__":
    main()
