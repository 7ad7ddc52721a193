"""The rooms of the package as one table: who may import whom, who may import torch, what else each may import."""

import ast
import collections
import dataclasses
import os
import pathlib
import subprocess
import sys

import networkx as nx
import pytest

ROOT = pathlib.Path(__file__).parents[1] / "fxpipe"


@dataclasses.dataclass(frozen=True)
class Room:
    """What the modules of one room may import at run time."""

    rooms: str
    libraries: str = ""


# Rooms with floors come floor by floor; a room's own row is for the files that stand in it directly.
CAPTURE_BELOW = "errors ir program batch _torch recipes"
TABLE = {
    "__init__": Room(
        "errors ir recipes planning.search planning.simulation pipeline compiler"
    ),  # for type checkers; loaded on first use
    "errors": Room(""),
    "logs": Room(""),
    "_heard": Room("errors", "torch"),  # whether torch still calls what _torch puts in its place
    "_torch": Room("errors _heard", "torch"),
    "ir.units": Room(""),  # how numbers are written
    "ir": Room("errors ir.units", "networkx"),
    "program": Room("errors ir", "torch"),  # graphs and functions, alive: no value of ir
    "batch": Room("errors ir program _torch", "torch numpy"),
    "recipes": Room("errors ir _torch", "torch numpy"),
    "planning.costs": Room("errors ir"),
    "planning.search": Room("errors ir.units", "networkx numpy"),
    "planning.simulation": Room("errors ir"),
    "planning": Room("errors ir planning.costs planning.search planning.simulation", "numpy"),
    "report": Room("errors ir", "tabulate"),
    "export": Room("errors ir"),
    "capture.model": Room(CAPTURE_BELOW, "torch numpy"),
    "capture.calls": Room(f"{CAPTURE_BELOW} capture.model", "torch numpy"),
    "capture.record": Room(f"{CAPTURE_BELOW} capture.model capture.calls", "torch numpy"),
    "capture.graph": Room(f"{CAPTURE_BELOW} capture.model capture.calls capture.record", "torch networkx numpy"),
    "capture.cut": Room(f"{CAPTURE_BELOW} capture.model capture.calls capture.record capture.graph", "torch networkx"),
    "capture": Room(
        f"{CAPTURE_BELOW} capture.model capture.calls capture.record capture.graph capture.cut", "torch tqdm"
    ),
    "runtime.ranks": Room("errors ir _torch", "torch"),
    "runtime.build": Room("errors ir program batch _torch recipes runtime.ranks", "torch numpy"),
    "runtime.weights.disk": Room("errors ir runtime.build", "torch safetensors"),
    "runtime.weights": Room(
        "errors ir _torch runtime.ranks runtime.build runtime.weights.disk",
        "torch safetensors transformers peft huggingface_hub tqdm",
    ),
    "runtime.run": Room("errors ir program batch _torch runtime.ranks runtime.build", "torch"),
    # Modules that compose the rooms; each sees the ones above it here.
    "profiling": Room("errors ir capture runtime", "torch tqdm"),
    "materialize": Room("errors logs ir batch capture runtime", "torch"),
    "variants": Room("errors logs program batch capture"),
    "comparison": Room("errors ir runtime", "torch"),
    "training": Room("errors ir program batch capture runtime materialize variants comparison", "torch"),
    "verification": Room("errors ir batch capture runtime materialize variants training comparison", "torch"),
    "pipeline": Room(
        "errors logs ir planning report runtime materialize variants training comparison verification", "torch"
    ),
    "choosing": Room("errors ir batch planning capture", "torch tqdm"),
    "compiler": Room(
        "choosing errors logs ir batch recipes planning capture profiling materialize variants training pipeline",
        "torch",
    ),
    "cli": Room(
        "errors ir batch planning report export capture runtime.weights choosing compiler pipeline",
        "tabulate tqdm torch transformers shtab",
    ),
    "__main__": Room("cli"),
}
# A class can only be checked against torch, and built, where torch is: inside these functions.
TORCH_INSIDE_A_FUNCTION = {"fxpipe.ir.spec"}

MODULES = {
    ".".join(["fxpipe", *path.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}


def room_of(module):
    """The row of the table that a module stands in: of its folder, or of its room where that has no floors."""
    if module == "fxpipe":
        return "__init__"
    parts = module.split(".")[1:]
    prefixes = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((prefix for prefix in prefixes if prefix in TABLE), parts[0])


def may_import(room, wanted):
    """Whether a row lets in a module: one of its own row, or of a row (or of a whole room) that it names."""
    return wanted == room or any(wanted == each or wanted.startswith(f"{each}.") for each in TABLE[room].rooms.split())


def nodes_of(tree, when_running=True):
    """Every node, and whether it is reached when the program runs: not where only a type checker looks."""
    for node in ast.iter_child_nodes(tree):
        guarded = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for part in ast.iter_child_nodes(node) if guarded else ():
            yield part, when_running and part in node.orelse
            yield from nodes_of(part, when_running and part in node.orelse)
        if not guarded:
            yield node, when_running
            yield from nodes_of(node, when_running)


def imports(tree):
    """``(module, name, top_level, when_running)`` of every import; name is None for ``import module``."""
    top = {id(node) for node in tree.body}
    for node, when_running in nodes_of(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None, id(node) in top, when_running) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            yield from ((node.module, alias.name, id(node) in top, when_running) for alias in node.names)


def home(module, name):
    """The module a ``from module import name`` loads: ``from fxpipe.ir import spec`` loads ``fxpipe.ir.spec``."""
    return f"{module}.{name}" if f"{module}.{name}" in MODULES else module


@pytest.fixture(scope="module")
def trees():
    return {module: ast.parse(path.read_text()) for module, path in MODULES.items()}


def test_every_module_lives_in_a_room_of_the_table():
    folders = {module for module, path in MODULES.items() if path.name == "__init__.py"}
    assert {room_of(module) for module in set(MODULES) - folders} <= set(TABLE)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_its_room_may(module, trees):
    room = room_of(module)
    for target, name, top_level, when_running in imports(trees[module]):
        library = target.split(".")[0]
        if library == "fxpipe":
            wanted = home(target, name)
            assert wanted != "fxpipe", f"{module} imports the front door"
            assert may_import(room, room_of(wanted)), f"{module} may not import {wanted}"
        elif when_running and library not in sys.stdlib_module_names:
            inside = library == "torch" and not top_level and module in TORCH_INSIDE_A_FUNCTION
            assert inside or library in TABLE[room].libraries.split(), f"{module} may not import {library}"


@pytest.mark.parametrize("module", [m for m, p in MODULES.items() if p.name == "__init__.py" and m != "fxpipe"])
def test_a_room_opens_with_one_docstring_and_nothing_else(module, trees):
    words = ast.get_docstring(trees[module])
    assert all(f"{word}:" in words for word in ("In", "Out", "Never")), "say what comes in, what goes out, what holds"
    assert len(words.splitlines()) <= 16
    assert len(trees[module].body) == 1


def test_imports_make_no_cycle(trees):
    graph = nx.DiGraph()
    for module, tree in trees.items():
        for target, name, _, _ in imports(tree):  # a circle that only a type checker sees is one too
            if target.split(".")[0] == "fxpipe":
                graph.add_edge(module, home(target, name))
    assert list(nx.simple_cycles(graph)) == []


# A file or function that is longer says why at its head, in a comment that begins so.
REASON = "# Long: "
LARGEST_FILE, LARGEST_FUNCTION, LARGEST_FOLDER = 450, 60, 16


def test_no_folder_is_a_hall():
    counts = collections.Counter(path.parent for path in ROOT.rglob("*.py"))
    assert {folder.name: count for folder, count in counts.items() if count > LARGEST_FOLDER} == {}


@pytest.mark.parametrize("module", MODULES)
def test_a_file_can_be_read_at_once(module):
    source = MODULES[module].read_text()
    lines = len(source.splitlines())
    assert lines <= LARGEST_FILE or says_why(source), f"{module} has {lines} lines"


def says_why(source):
    """Whether a file says why it is long: in a comment right below its docstring."""
    lines = source.splitlines()
    end = ast.parse(source).body[0].end_lineno
    return lines[end : end + 1] != [] and lines[end].startswith(REASON)


def test_the_guard_sees_a_reason_at_the_head_only():
    assert says_why('"""It."""\n# Long: one table\nx = 1\n')
    assert not says_why('"""It."""\n\nx = 1\n# Long: one table\n')
    assert not says_why('"""It."""\n')


def long_functions(source):
    """Names of the functions over 60 lines that do not say why, in a comment that begins so, right below their head."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
            head = "\n".join(lines[node.lineno - 1 : first.lineno])
            if node.end_lineno - node.lineno + 1 > LARGEST_FUNCTION and REASON not in head:
                yield node.name


@pytest.mark.parametrize("module", MODULES)
def test_a_function_is_short_or_says_why_not(module):
    assert list(long_functions(MODULES[module].read_text())) == []


def test_the_guard_sees_long_functions():
    body = "    x = 1\n" * 60
    reason = "    # Long: one table\n"
    source = f"def short():\n{body[:-10]}\ndef long():\n{body}\ndef excused():\n{reason}{body}"
    assert list(long_functions(source)) == ["long"]


def private_names(tree):
    """Names with a leading underscore that are reached through something imported from torch."""
    roots = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            roots |= {alias.asname or "torch" for alias in node.names if alias.name.split(".")[0] == "torch"}
            yield from (alias.name for alias in node.names if alias.name.startswith("torch") and "._" in alias.name)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            roots |= {alias.asname or alias.name for alias in node.names}
            yield from (f"{node.module}.{a.name}" for a in node.names if "._" in f".{node.module}.{a.name}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            chain = ast.unparse(node).split(".")
            private = [part for part in chain[1:] if part.startswith("_") and not part.startswith("__")]
            if chain[0] in roots and private:
                yield ".".join(chain)


@pytest.mark.parametrize("module", [m for m in MODULES if m != "fxpipe._torch"])
def test_torch_private_names_appear_in_one_module_only(module, trees):
    assert sorted(set(private_names(trees[module]))) == []


def test_the_guard_sees_private_names():
    source = "import torch\nfrom torch import nn\nfrom torch._C import x\ntorch.a._b.c\nnn.Module.__call__\nself._own"
    assert sorted(private_names(ast.parse(source))) == ["torch._C.x", "torch.a._b", "torch.a._b.c"]


def test_planning_and_reporting_start_without_torch():
    rooms = ("__init__", "errors", "ir", "planning", "report", "export", "cli")
    without = [m for m in MODULES if room_of(m).split(".")[0] in rooms]
    code = f"import sys, importlib\nsys.modules['torch'] = None\nfor m in {without}: importlib.import_module(m)"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
