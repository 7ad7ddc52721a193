"""The model that a command is about: a function of a file or a package, a Hugging Face config, or a built-in shape."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from fxpipe.cli.shapes import SHAPES, ExampleSize, Shape
from fxpipe.errors import PlanError

MODEL = (
    "FILE.py:FUNCTION or PACKAGE.MODULE:FUNCTION (called with meta as the default device, it returns a model, or "
    "(model, args, kwargs) with one example batch); a Hugging Face config.json or its directory; or a built-in shape: "
    + ", ".join(SHAPES)
)


def find_factory(text: str, example: ExampleSize) -> Callable[[], Any]:
    """Find what builds a model.

    Args:
        text: As ``MODEL`` says.
        example: Sizes for models that come without an example.

    Returns:
        A function without arguments, as ``fxpipe.capture.model.factory`` takes it.

    Raises:
        PlanError: It names nothing that is there.
    """
    if text in SHAPES:
        return _from_shape(SHAPES[text], example)
    if ":" in text:
        if example.given:
            raise PlanError(
                f"{', '.join(example.given)} is for a config or a shape, and {text} brings its own batch\n"
                "  leave it out, and change the batch that the function returns"
            )
        place, _, name = text.rpartition(":")
        if not name.isidentifier():
            raise PlanError(f"{text!r} names no function\n  write FILE.py:FUNCTION, as in train.py:build")
        module = _load_file(place, name) if place.endswith(".py") or "/" in place else _load_module(place)
        return _function(module, place, name)
    path = Path(text)
    if path.suffix == ".py" and path.is_file():
        raise PlanError(f"{text} is a file, and no function of it is named\n  write {text}:build")
    config = path / "config.json" if path.is_dir() else path
    if config.suffix == ".json":
        if not config.is_file():
            raise PlanError(
                f"there is no file {config}\n  give a Hugging Face config.json, or a directory that has one"
            )
        return _from_config(str(config), example)
    raise PlanError(
        f"{text!r} names no function, no config and no built-in shape\n"
        f"  write FILE.py:FUNCTION, give a config.json, or one of {', '.join(SHAPES)}"
    )


def _from_shape(shape: Shape, example: ExampleSize) -> Callable[[], Any]:
    def build() -> Any:
        from fxpipe.cli.published import model_of, read_config

        return model_of(read_config({"model_type": shape.model_type, **dict(shape.sizes)}, "the shape"), example)

    return build


def _from_config(path: str, example: ExampleSize) -> Callable[[], Any]:
    def build() -> Any:
        from fxpipe.cli.published import load_config, model_of

        return model_of(load_config(path), example)

    return build


def _load_file(file: str, name: str) -> ModuleType:
    path = Path(file)
    if not path.is_file():
        raise PlanError(f"there is no file {file}\n  give the path of the Python file that has {name}()")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise PlanError(f"{file} is no Python file\n  give the path of the Python file that has {name}()")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # classes in it can be found by their import path
    sys.path.insert(0, str(path.parent))
    spec.loader.exec_module(module)
    return module


def _load_module(name: str) -> ModuleType:
    sys.path.insert(0, "")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # the module is there and lacks something of its own
        raise PlanError(
            f"there is no module {error.name}\n  write FILE.py:FUNCTION, or install the package that has it"
        ) from error


def _function(module: ModuleType, place: str, name: str) -> Callable[[], Any]:
    function = getattr(module, name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        mine = [key for key in known if getattr(vars(module)[key], "__module__", None) == module.__name__]
        raise PlanError(f"{place} has no function {name}\n  it has {', '.join(sorted(mine)) or 'none'}")
    factory: Callable[[], Any] = function
    return factory
