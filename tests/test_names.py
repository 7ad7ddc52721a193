"""No class and no attribute is treated by its bare name, but in the files that say here why."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1] / "fxpipe"

OF_CLASSES = {"__name__", "__qualname__", "__module__"}
COMPARED = {  # a class's own name or home, held against something
    "capture/calls/reads.py": "types of torch's own that carry no values: sizes, dtypes, finfo",
    "capture/record/arguments.py": "the same, as arguments",
    "ir/files/schema.py": "what the values of a file are called in its schema",
    "cli/models.py": "which factories a user's file defines itself",
}
ATTRIBUTES = {  # what libraries call what their models carry
    "use_cache": {"capture/model/huggingface.py", "cli/published.py"},
    "_tied_weights_keys": {"capture/model/huggingface.py"},
    "get_expanded_tied_weights_keys": {"capture/model/huggingface.py"},
    "past_key_values": {"capture/model/huggingface.py"},
    "dummy_inputs": {"batch/example.py"},  # the contract: taken where no example is given
    "ignore_index": {
        "capture/graph/given.py",
        "capture/graph/counts.py",
    },  # which labels to try besides others: more tries, no other numbers
    "inplace": set(),
    "is_causal": set(),
    "logits": set(),
    "lm_head": set(),
    "embed_tokens": set(),
}
TREES = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in sorted(ROOT.rglob("*.py"))}


def names_of_classes(tree):
    """Lines on which the name or home of a value's class is compared, or looked at by its beginning."""
    for node in ast.walk(tree):
        parts = []
        if isinstance(node, ast.Compare):
            parts = [node.left, *node.comparators]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr.endswith("swith"):
            parts = [node.func.value]  # startswith, endswith
        inside = [each for part in parts for each in ast.walk(part)]
        yield from (node.lineno for each in inside if is_name_of_class(each))


def is_name_of_class(node):
    if isinstance(node, ast.Attribute):
        return node.attr in OF_CLASSES
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr":
        return any(isinstance(word, ast.Constant) and word.value == "__module__" for word in node.args)
    return False


def attributes(tree):
    """Names by which attributes are read: ``x.name``, ``getattr(x, "name")``, ``hasattr(x, "name")``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            yield node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr"):
            yield from (word.value for word in node.args[1:2] if isinstance(word, ast.Constant))


@pytest.mark.parametrize("file", TREES)
def test_no_class_is_recognised_by_its_name(file):
    found = list(names_of_classes(TREES[file]))
    assert not found or file in COMPARED, f"{file}, lines {found}: try what it does, or say in the table why not"


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_an_attribute_of_a_library_is_read_in_one_place(name):
    found = {file for file, tree in TREES.items() if name in attributes(tree)}
    assert found <= ATTRIBUTES[name]


def test_the_tables_name_nothing_that_is_gone():
    assert [file for file in COMPARED if not list(names_of_classes(TREES.get(file, ast.Module([], []))))] == []


def test_the_scan_finds_what_it_looks_for():
    bad = "type(x).__name__ == 'Size' or type(x).__module__.startswith('torch.nn.') or getattr(x, '__module__') == 'a'"
    assert len(list(names_of_classes(ast.parse(bad)))) == 3
    assert {"a", "inplace", "use_cache"} <= set(
        attributes(ast.parse("x.a, getattr(y, 'inplace', 0), hasattr(z, 'use_cache')"))
    )


def test_no_two_public_classes_share_a_name():
    homes = {}
    for file, tree in TREES.items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes.setdefault(node.name, []).append(file)
    assert {name: files for name, files in homes.items() if len(files) > 1} == {}
