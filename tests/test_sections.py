"""Commands that write into one page leave each other's sections alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.benchmarks.sections import PAGE, marks, with_section

words = st.text("ab -<>#\n", max_size=20)


@given(st.permutations(["one", "two", "three"]), words, words)
def test_a_section_is_replaced_where_it_stands_and_the_rest_stays(order: list[str], old: str, new: str) -> None:
    page = "# Page\n\nWords.\n"
    for name in order:
        page = with_section(page, name, f"{name}: {old}")
    changed = with_section(page, "two", f"two: {new}")
    assert with_section(changed, "two", f"two: {old}") == page
    parts = [part.partition("<!-- end") for part in changed.split("<!-- begin ")[1:]]
    assert [part[0].split(" -->")[0] for part in parts] == order
    assert all((new if name == "two" else old).strip() in changed for name in order)


def test_a_page_without_a_whole_section_is_left_alone() -> None:
    begin, end = marks("one")
    for page in (f"{begin}\n", f"{end}\n{begin}\n", f"{begin}\n{begin}\n{end}\n"):
        with pytest.raises(ValueError, match="no whole section 'one'"):
            with_section(page, "one", "text")


def test_the_sections_of_the_page_are_whole() -> None:
    page = PAGE.read_text(encoding="utf-8")
    lines = [line for line in page.splitlines() if line.startswith(("<!-- begin ", "<!-- end "))]
    names = [line.removeprefix("<!-- begin ").removesuffix(" -->") for line in lines[::2]]
    assert lines == [mark for name in names for mark in marks(name)]
    assert len(set(names)) == len(names)
