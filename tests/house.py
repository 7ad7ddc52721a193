"""Draw the rooms of the package from its imports: ``python -m tests.house`` prints, ``--write`` updates the page.

A room is a folder of the package, or a module at its top. An arrow goes from a room to one whose modules it imports;
arrows that follow from others are left out. Imports for type checkers and inside functions count.
"""

from __future__ import annotations

import ast
import pathlib
import sys

import networkx as nx

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / "docs" / "design.md"
BEGIN, END = "<!-- Drawn by: python -m tests.house --write -->\n", "<!-- End of the drawing. -->\n"
FRONT = "fxpipe"


def rooms() -> nx.DiGraph:
    """Give the rooms, and who imports whom."""
    paths = {path: path.relative_to(ROOT).with_suffix("").parts for path in sorted((ROOT / FRONT).rglob("*.py"))}
    modules = {".".join(parts).removesuffix(".__init__") for parts in paths.values()}
    graph = nx.DiGraph()
    for path, parts in paths.items():
        room = room_of(".".join(parts).removesuffix(".__init__"), modules)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for target in targets(node):
                home = target if target in modules else target.rpartition(".")[0]
                other = room_of(home, modules) if home in modules else ""
                if other and other != room and FRONT not in (room, other):
                    graph.add_edge(room, other)
    return _joined(graph)


def _joined(graph: nx.DiGraph) -> nx.DiGraph:
    """Join folders that know each other with the one they lie in: they are one room."""
    name = {}
    for component in nx.strongly_connected_components(graph):
        outer = min(component, key=len)
        name |= {room: outer if room.startswith(f"{outer}.") else room for room in component}
    edges = ((name[room], name[other]) for room, other in graph.edges)
    return nx.DiGraph(edge for edge in edges if edge[0] != edge[1])


def targets(node: ast.AST) -> list[str]:
    """Give what an import of the package names."""
    if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == FRONT:
        return [f"{node.module}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names if alias.name.split(".")[0] == FRONT]
    return []


def room_of(module: str, modules: set[str]) -> str:
    """Give the folder that a module lies in; a module at the top is a room by itself."""
    if module == FRONT:
        return FRONT
    is_folder = any(other.startswith(f"{module}.") for other in modules)
    folder = module if is_folder else module.rpartition(".")[0]
    return (module if folder == FRONT else folder).removeprefix(f"{FRONT}.")


def drawing() -> str:
    """Give the rooms as a Mermaid graph, those that import nothing last."""
    graph = nx.transitive_reduction(rooms())
    lines = [f"    {identifier(room)}[{room}] --> {identifier(other)}[{other}]" for room, other in sorted(graph.edges)]
    return "\n".join(["```mermaid", "graph TD", *lines, "```", ""])


def identifier(room: str) -> str:
    """Give a room's name as Mermaid takes it."""
    return room.replace(".", "_").strip("_") + "_"


def with_drawing(text: str) -> str:
    """Give a page with the drawing between its two marks."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{drawing()}{END}{after}"


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        PAGE.write_text(with_drawing(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(drawing(), end="")
