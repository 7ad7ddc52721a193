"""Sections of pages that commands write: each replaces its own and leaves the rest of the page as it stands.

A section lies between two comments that carry its name. One that a page does not have yet goes to the end of it.
"""

from __future__ import annotations

from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "benchmarks.md"


def marks(name: str) -> tuple[str, str]:
    """Give the lines that begin and end a section."""
    return f"<!-- begin {name} -->", f"<!-- end {name} -->"


def with_section(page: str, name: str, text: str) -> str:
    """Give a page with one section replaced, or added at its end.

    Args:
        page: The page.
        name: Name of the section, as a rule the command that writes it.
        text: What stands in it.

    Raises:
        ValueError: The page has the section twice, or not the whole of it.

    >>> print(with_section("# Page", "one", "1"))
    # Page
    <BLANKLINE>
    <!-- begin one -->
    <BLANKLINE>
    1
    <BLANKLINE>
    <!-- end one -->
    <BLANKLINE>
    """
    begin, end = marks(name)
    if begin in text or end in text:
        raise ValueError(f"the text of section {name!r} holds its own marks")
    whole = f"{begin}\n\n{text.strip()}\n\n{end}\n"
    lines = page.splitlines()
    places = [index for index, line in enumerate(lines) if line in (begin, end)]
    if not places:
        return f"{page.rstrip()}\n\n{whole}"
    if len(places) != 2 or [lines[place] for place in places] != [begin, end]:
        raise ValueError(f"the page has no whole section {name!r}, or several")
    before, after = lines[: places[0]], lines[places[1] + 1 :]
    return "".join(f"{line}\n" for line in before) + whole + "".join(f"{line}\n" for line in after)


def write_section(name: str, text: str, path: Path = PAGE) -> None:
    """Replace one section of a page on disk, or add it."""
    path.write_text(with_section(path.read_text(encoding="utf-8"), name, text), encoding="utf-8")
