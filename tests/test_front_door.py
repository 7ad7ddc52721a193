import ast
import inspect
import os
import pathlib
import subprocess
import sys

import pytest

import fxpipe


def run_python(code):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_fxpipe_loads_nothing_but_itself():
    heavy = "{'torch', 'numpy', 'networkx', 'tabulate', 'tqdm', 'transformers'}"
    found = run_python(f"import sys, fxpipe; print([m for m in sys.modules if m.split('.')[0] in {heavy}])")
    assert found.strip() == "[]"
    assert run_python("import sys, fxpipe; print([m for m in sys.modules if m.startswith('fxpipe.')])").strip() == "[]"


@pytest.mark.parametrize("name", fxpipe.__all__)
def test_every_public_name_loads(name):
    assert getattr(fxpipe, name).__name__ == name


def test_public_names_type_checkers_see_and_names_that_load_are_the_same():
    tree = ast.parse(inspect.getsource(fxpipe))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen == fxpipe._HOME
    assert fxpipe.__all__ == sorted(seen)
    assert set(seen) <= set(dir(fxpipe))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'fxpipe' has no attribute 'nonsense'"):
        _ = fxpipe.nonsense


def test_every_error_class_is_public_and_of_one_family():
    module = ast.parse((pathlib.Path(fxpipe.__file__).parent / "errors.py").read_text())
    for node in module.body:
        if isinstance(node, ast.ClassDef):
            assert issubclass(getattr(fxpipe, node.name), fxpipe.FxpipeError)
