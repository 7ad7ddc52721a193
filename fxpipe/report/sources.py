"""The table of tensors under a report: where the value of each comes from."""

import dataclasses
import html
import json
from collections.abc import Sequence

from tabulate import tabulate

from fxpipe.ir.source import WeightSource
from fxpipe.ir.units import size_text

WIDTH = 100
_HEADERS = ("tensor", "size", "source", "stage")


def with_sources(report: str, format: str, sources: Sequence[WeightSource]) -> str:
    """Add to a report where each tensor's value comes from.

    Args:
        report: As ``render`` gives it.
        format: Its format.
        sources: The tensors, in the order they are shown in.

    Returns:
        The report with a table; in JSON ``"weights"`` stands beside ``"plan"``, and beside what was there already.

    >>> print(with_sources("A plan.", "text", [WeightSource("h.0.weight", 4096, "recorded", (0, 1))]))
    A plan.
    <BLANKLINE>
    tensor      size     source    stage
    ----------  -------  --------  -------
    h.0.weight  4.0 KiB  recorded  0, 1
    <BLANKLINE>
    weights  recorded 4.0 KiB
    """
    if format == "json":
        data = json.loads(report)
        data = data if "plan" in data else {"plan": data}
        return json.dumps({**data, "weights": [dataclasses.asdict(each) for each in sources]}, sort_keys=True, indent=1)
    rows = [(each.fqn, size_text(each.bytes), each.source, ", ".join(map(str, each.stages)) or "–") for each in sources]
    if format == "html":
        table = tabulate([[html.escape(cell) for cell in row] for row in rows], headers=_HEADERS, tablefmt="unsafehtml")
        section = f"<section><h2>Weights</h2><p>{html.escape(_total(sources))}</p>{table}</section>"
        head, end, rest = report.rpartition("</body>")
        return f"{head}{section}{end}{rest}" if end else report + section
    if format == "text":
        columns = list(zip(*rows, _HEADERS, strict=True))[1:]
        room = WIDTH - sum(max(map(len, column)) + 2 for column in columns) - 2
        rows = [(_shortened(row[0], room), *row[1:]) for row in rows]
    # Columns of text stay text: a stage "1" and stages "1, 2" are aligned alike.
    style = "simple" if format == "text" else "github"
    table = tabulate(rows, headers=_HEADERS, tablefmt=style, disable_numparse=True)
    total = f"weights  {_total(sources)}" if format == "text" else f"Weights: {_total(sources)}"
    return f"{report}\n\n{table}\n\n{total}"


def _total(sources: Sequence[WeightSource]) -> str:
    """Add up the bytes of each source."""
    sums: dict[str, int] = {}
    for each in sources:
        sums[each.source] = sums.get(each.source, 0) + each.bytes
    return "; ".join(f"{source} {size_text(count)}" for source, count in sums.items())


def _shortened(text: str, room: int) -> str:
    """Leave out the middle of a name that is too long."""
    room = max(room, 16)
    return text if len(text) <= room else f"{text[: room // 2 - 1]}…{text[len(text) - (room - room // 2) :]}"
