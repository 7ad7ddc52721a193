"""One spelling of a Python value that is the same in every process: what fingerprints are made of.

``hash()`` changes with the hash seed, ``repr`` shows addresses and ``pickle`` writes sets in any order; so none of
them can tell two ranks that they hold the same arguments. The spelling here is a tree of tuples and strings.
"""

import copy
import copyreg
import enum
import functools
import hashlib
import inspect
import itertools
import sys
import types
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, TypeVar

from fxpipe.errors import SpecError

_T = TypeVar("_T")
Tree = str | tuple["Tree", ...]

_ATOMS = (type(None), bool, int, float, complex, str, bytes, type(Ellipsis), type(NotImplemented))


def import_path(thing: Any) -> str:
    """``module:qualname`` of a class or function; a script is ``__main__`` also in the processes it spawns.

    >>> import_path(OrderedDict)
    'collections:OrderedDict'
    """
    module = getattr(thing, "__module__", None) or "builtins"
    if module == "__mp_main__":
        module = "__main__"
    return f"{module}:{getattr(thing, '__qualname__', type(thing).__qualname__)}"


def digest(tree: Tree) -> str:
    """Thirty-two hexadecimal digits of a spelled value.

    >>> digest(spell({"b": 1, "a": (2, 3)})) == digest(spell({"a": (2, 3), "b": 1}))
    True
    """
    return hashlib.sha256(repr(tree).encode()).hexdigest()[:32]


def spell(value: Any, what: str = "value") -> Tree:
    """Spell a value so that equal values have equal spellings in every process and under every hash seed.

    Numbers, strings, containers, enums, classes and functions (by import path), partials, dtypes, devices, arrays
    and tensors (by content), and any other object by the state that pickle would store.

    Args:
        value: What to spell.
        what: How an error names the value, ``argument 'config'``.

    Raises:
        SpecError: The value, or one inside it, has no state that can be compared, or is a module or a parameter
            that holds weights.

    >>> spell({2, 1}) == spell({1, 2})
    True
    >>> spell([1, 2.0]) == spell([1, 2])
    False
    """
    return _spell(value, what, {})


def _spell(value: Any, what: str, inside: dict[int, int]) -> Tree:
    if type(value) in _ATOMS:
        return (type(value).__name__, repr(value))
    if isinstance(value, type) or inspect.isroutine(value):
        return _spell_callable(value, what, inside)
    if id(value) in inside:  # a cycle: name the container by its depth
        return ("cycle", str(inside[id(value)]))
    inside = {**inside, id(value): len(inside)}
    simple = _spell_container(value, what, inside)
    if simple is not None:
        return simple
    array = _spell_array(value, what, inside)
    return array if array is not None else _spell_object(value, what, inside)


def _spell_container(value: Any, what: str, inside: dict[int, int]) -> Tree | None:
    kind = type(value)
    if kind in (list, tuple):
        return (kind.__name__, *(_spell(item, f"{what}[{i}]", inside) for i, item in enumerate(value)))
    if kind in (set, frozenset):
        return (kind.__name__, *sorted((_spell(item, what, inside) for item in value), key=repr))
    if kind in (dict, types.MappingProxyType, OrderedDict):
        items = [(_spell(k, what, inside), _spell(v, f"{what}[{k!r}]", inside)) for k, v in value.items()]
        return (kind.__name__, *(items if kind is OrderedDict else sorted(items, key=repr)))
    if kind in (range, slice):
        return (kind.__name__, repr(value))
    if kind is types.ModuleType:
        return ("module", value.__name__)
    if isinstance(value, enum.Enum):
        return ("enum", import_path(kind), value.name if value.name is not None else repr(value.value))
    if isinstance(value, functools.partial):
        parts = (value.func, value.args, value.keywords)
        return ("partial", *(_spell(part, what, inside) for part in parts))
    return None


def _spell_callable(value: Any, what: str, inside: dict[int, int]) -> Tree:
    owner = getattr(value, "__self__", None)
    if owner is not None and not isinstance(owner, types.ModuleType):
        return ("method", _spell(owner, what, inside), value.__name__)
    path = import_path(value)
    if isinstance(value, types.FunctionType) and "<" in path:  # a lambda or a local function: its path is not unique
        cells = tuple(_spell_cell(cell, inside) for cell in value.__closure__ or ())
        defaults = (_spell_loosely(value.__defaults__, inside), _spell_loosely(value.__kwdefaults__, inside))
        return ("function", path, _spell_code(value.__code__), cells, *defaults)
    return ("class" if isinstance(value, type) else "function", path)


def _spell_code(code: types.CodeType) -> Tree:
    consts = tuple(
        _spell_code(const) if isinstance(const, types.CodeType) else _spell(const, "constant", {})
        for const in code.co_consts
    )
    return (code.co_code.hex(), consts, code.co_names, code.co_varnames, code.co_freevars)


def _spell_cell(cell: types.CellType, inside: dict[int, int]) -> Tree:
    try:
        return _spell_loosely(cell.cell_contents, inside)
    except ValueError:  # not assigned yet
        return "empty"


def _spell_loosely(value: Any, inside: dict[int, int]) -> Tree:
    """A value that a function closes over: in full when it is simple, else (often a whole trainer) by its class."""
    simple = (*_ATOMS, list, tuple, dict, set, frozenset)
    if type(value) in simple and all(type(item) in simple for item in _flat(value)):
        return _spell(value, "closure", inside)
    if isinstance(value, type):
        return ("class", import_path(value))
    return ("some", import_path(type(value)))


def _flat(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return list(itertools.chain(value.keys(), *(_flat(item) for item in value.values())))
    if isinstance(value, (list, tuple, set, frozenset)):
        return list(itertools.chain(*(_flat(item) for item in value)))
    return [value]


def _spell_array(value: Any, what: str, inside: dict[int, int]) -> Tree | None:
    numpy, torch = sys.modules.get("numpy"), sys.modules.get("torch")
    if numpy is not None and isinstance(value, numpy.ndarray):
        if value.dtype.hasobject:
            return ("array", _spell(value.tolist(), what, inside))
        return ("array", value.dtype.str, str(value.shape), hashlib.sha256(value.tobytes()).hexdigest())
    if torch is None:
        return None
    if isinstance(value, torch.nn.Parameter) or (
        isinstance(value, torch.nn.Module)
        and next(itertools.chain(value.parameters(), value.buffers()), None) is not None
    ):
        raise SpecError(
            f"{what} is a {type(value).__name__} that holds weights: a spec describes a layer and holds none\n"
            "  pass the class and its arguments and build it inside the layer; share weights with TiedLayerSpec"
        )
    if isinstance(value, torch.Tensor):
        about = ("tensor", str(value.dtype), str(value.layout), str(tuple(value.shape)))
        dense = value.detach() if value.layout == torch.strided else value.detach().to_dense()
        if dense.untyped_storage().device.type == "meta":  # also a fake tensor's, whatever device it says
            return (*about, "no values")
        flat = dense.to("cpu").contiguous().reshape(-1).view(torch.uint8)
        return (*about, hashlib.sha256(flat.numpy().tobytes()).hexdigest())
    if isinstance(value, torch.dtype | torch.device | torch.layout):
        return (type(value).__name__, str(value))
    return None


def _spell_object(value: Any, what: str, inside: dict[int, int]) -> Tree:
    """Spell an object by what pickle would store of it: its class and state."""
    path = import_path(type(value))
    try:
        special = copyreg.dispatch_table.get(type(value))
        reduced = special(value) if special is not None else value.__reduce_ex__(2)
    except Exception as error:  # whatever a foreign class raises here means that it cannot be pickled
        raise SpecError(
            f"{what} is a {path}, which cannot be compared across processes: {error}\n"
            "  pass plain values, classes, functions, or objects whose attributes are such"
        ) from error
    if isinstance(reduced, str):  # a global, stored by its name
        return ("global", path, reduced)
    make, args, state, items, pairs = (*reduced, None, None, None)[:5]
    return (
        "object",
        path,
        _spell(make, what, inside),
        _spell(args, what, inside),
        _spell(state, what, inside),
        _spell(list(items) if items is not None else None, what, inside),
        _spell(dict(pairs) if pairs is not None else None, what, inside),
    )


def bind_arguments(typename: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tree:
    """Spell the arguments under the names that the constructor gives them, so that ``2`` and ``n=2`` are the same.

    Raises:
        SpecError: They do not fit the constructor, or one of them cannot be spelled.
    """
    try:
        bound = inspect.signature(typename).bind(*args, **kwargs).arguments
    except TypeError as error:
        raise SpecError(
            f"{typename.__qualname__} cannot be built with the arguments of its LayerSpec: {error}\n"
            f"  its constructor is {typename.__qualname__}{_signature(typename)}"
        ) from error
    except ValueError:  # a constructor written in C tells no signature
        bound = {"args": args, "kwargs": kwargs}
    label = f"{typename.__qualname__} argument"
    return tuple((name, spell(value, f"{label} {name!r}")) for name, value in sorted(bound.items()))


def own_copy(value: _T, path: str) -> _T:
    """Copy a value, so that it cannot change later.

    Raises:
        SpecError: It cannot be copied; names ``path``, what it is an argument of.
    """
    try:
        return copy.deepcopy(value)
    except Exception as error:  # a foreign __deepcopy__ may raise anything
        raise SpecError(
            f"an argument of {path} cannot be copied: {error}\n"
            "  a spec keeps its own copy, so that it cannot change later; pass plain values"
        ) from error


def _signature(typename: type) -> str:
    try:
        return str(inspect.signature(typename))
    except ValueError:
        return "(...)"
