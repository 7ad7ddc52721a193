"""Numbers and lists of names as a person reads them: bytes, counts, times, FQNs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def count_text(count: float) -> str:
    """Three or four digits and a letter.

    >>> count_text(0), count_text(950), count_text(137_200_000), count_text(405e9)
    ('0', '950', '137.2 M', '405.0 G')
    """
    for letter in ("", "K", "M", "G"):
        if count < 1000:
            return f"{count:.1f} {letter}" if letter else f"{count:.0f}"
        count /= 1000
    return f"{count:.1f} T"


def size_text(count: float) -> str:
    """Bytes in binary units.

    >>> size_text(0), size_text(8 * 2**20), size_text(9.8 * 2**30)
    ('0 B', '8.0 MiB', '9.8 GiB')
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def time_unit(seconds: float) -> tuple[str, float]:
    """Choose s, ms or µs, and give what seconds are multiplied with."""
    if seconds >= 1:
        return "s", 1.0
    return ("ms", 1e3) if seconds >= 1e-3 or seconds <= 0 else ("µs", 1e6)


def digits(value: float) -> str:
    """Three digits that count.

    >>> digits(0), digits(0.0123), digits(1.234), digits(412.3)
    ('0', '0.0123', '1.23', '412')
    """
    if value <= 0:
        return "0"
    decimals = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 4
    return f"{value:.{decimals}f}"


def seconds_text(seconds: float) -> str:
    """Write a time with its unit.

    >>> seconds_text(0.4123), seconds_text(12.3456), seconds_text(3.21e-5)
    ('412 ms', '12.3 s', '32.1 µs')
    """
    unit, scale = time_unit(seconds)
    return f"{digits(seconds * scale)} {unit}"


def ranges_text(numbers: Sequence[int]) -> str:
    """Join neighbours of ascending numbers.

    >>> ranges_text([0, 1, 2, 5, 7, 8])
    '0–2, 5, 7–8'
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)


def folded(names: Iterable[str], most: int = 12) -> str:
    """List dotted names, those that differ in a number alone as one.

    Args:
        names: FQNs; what comes twice is said once.
        most: How many to list, after folding.

    >>> folded(f"layers.{i}.{name}" for i in range(32) for name in ("q_proj", "k_proj"))
    'layers.{0-31}.q_proj, layers.{0-31}.k_proj'
    >>> folded(["head", "h.0.experts.0", "h.0.experts.1", "h.2.experts.0", "h.2.experts.1"])
    'head, h.{0,2}.experts.{0-1}'
    >>> folded("abcd", most=2)
    'a, b and 2 more'
    """
    groups: dict[tuple[str | tuple[int, ...], ...], int] = {}
    for name in dict.fromkeys(names):
        groups[tuple(name.split("."))] = 1
    for place in reversed(range(max(map(len, groups), default=0))):
        merged: dict[tuple[str | tuple[int, ...], ...], dict[int, int]] = {}
        for parts, count in groups.items():
            part = parts[place] if place < len(parts) else ""
            if isinstance(part, str) and part.isdecimal() and str(int(part)) == part:
                merged.setdefault((*parts[:place], (), *parts[place + 1 :]), {})[int(part)] = count
            else:
                merged[parts] = {-1: count}
        groups = {}
        for parts, found in merged.items():
            numbers = sorted(found)
            if numbers == [-1]:
                groups[parts] = found[-1]
            else:
                one: str | tuple[int, ...] = str(numbers[0]) if len(numbers) == 1 else tuple(numbers)
                groups[(*parts[:place], one, *parts[place + 1 :])] = sum(found.values())
    shown = [".".join(part if isinstance(part, str) else _braced(part) for part in parts) for parts in groups]
    rest = sum(list(groups.values())[most:])
    return ", ".join(shown[:most]) + (f" and {rest} more" if rest else "")


def _braced(numbers: Sequence[int]) -> str:
    return "{" + ranges_text(numbers).replace("–", "-").replace(", ", ",") + "}"
