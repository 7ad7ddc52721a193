"""The drawing in the documentation is that of the imports; where it is not, run ``python -m tests.house --write``."""

import re

import house
import networkx as nx


def test_the_page_draws_the_rooms_as_the_imports_have_them():
    text = house.PAGE.read_text(encoding="utf-8")
    assert text.count(house.BEGIN) == text.count(house.END) == 1
    assert house.with_drawing(text) == text, "run: python -m tests.house --write"


def test_the_page_says_of_every_room_what_it_holds():
    table = house.PAGE.read_text(encoding="utf-8").split("| Room |")[1].split("\n\n")[0]
    named = {word.rstrip("/") for row in table.splitlines() for word in re.findall(r"`([\w/]+)`", row)}
    rooms = {room.split(".")[0] for room in house.rooms()} - {"__init__", "__main__"}
    assert rooms <= named, rooms - named


def test_the_drawing_has_every_room_and_no_way_round():
    graph = house.rooms()
    assert nx.is_directed_acyclic_graph(graph)
    assert {"capture.record", "planning.search", "runtime.run", "ir", "compiler"} <= set(graph)
    assert graph.has_edge("planning", "planning.search")
    assert not graph.has_edge("planning.search", "planning")
    drawn = house.drawing()
    for room in graph:
        assert f"[{room}]" in drawn
