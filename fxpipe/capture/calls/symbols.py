"""Sizes as symbols: a second forward in step with the recorded one, whose sizes Python gets to see.

The recorded forward runs with numbers. Beside it every call runs once more, on fake tensors whose varying sizes are
symbols of torch's own ``ShapeEnv``, and a size that Python reads is that symbol: what it computes of it is an
expression, and what it decides by it a guard. So each number in the graph, and each shape, is known as a function of
the inputs' sizes, and so is where that holds. Whatever cannot be followed raises ``Untold``.
"""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode

from fxpipe._torch import FakeTensorMode, Source, enable_python_dispatcher, without_functions
from fxpipe.capture.calls.blocked import Untold, asked_by_user, numbers_by_type
from fxpipe.capture.calls.reads import READS
from fxpipe.capture.calls.values import has_tensor, tensors_in
from fxpipe.capture.calls.watch import Watch
from fxpipe.ir.tree import map_tree

Expression = Any
"""A sympy expression over symbols, or an int."""


_STANDS_FOR: dict[type, Any] = {torch.SymInt: 2, torch.SymFloat: 2.0, torch.SymBool: True}
_UNGUARDED = ("__repr__", "__str__", "__format__", "__hash__", "__reduce_ex__")
"""Ways to see a symbol that say nothing to its ``ShapeEnv``, or say it in other words than a number."""


class Sized(int):
    """A number that Python computed of sizes, with the symbol that it is."""

    symbol: torch.SymInt

    @classmethod
    def of(cls, symbol: torch.SymInt) -> int:
        """Give the number that a symbol is now, which knows the symbol unless it is always the same.

        Raises:
            Untold: It has no value.
        """
        hint = symbol.node.hint
        if hint is None:
            raise Untold("a size has no value")
        number = cls(int(hint))
        number.symbol = symbol
        return number if _expression(symbol).free_symbols else int(number)

    @property
    def expression(self) -> Expression:
        """What it is of the inputs' sizes."""
        return _expression(self.symbol)


def _expression(size: Any) -> Expression:
    return size.node.expr if isinstance(size, torch.SymInt) else size


class _Named(Source):
    """Where a symbol comes from, as ``ShapeEnv`` wants to know it."""

    def __init__(self, text: str) -> None:
        object.__setattr__(self, "_text", text)

    @property
    def name(self) -> str:
        return self._text  # type: ignore[attr-defined,no-any-return]

    def is_ephemeral(self) -> bool:
        return False


class Symbols:
    """The second forward.

    Args:
        mode: The fake mode of both.
        watch: Sees the calls of the first; it is to see nothing of the second.
        tensors: The inputs.
        varying: Of each input one entry per dimension: None where its size is always the same, else what names the
            symbol; sizes that have one name are always equal.
        made_here: Tells whether a tensor was made in the first forward, in a call that was recorded.

    Attributes:
        of_name: The symbol of each name.
        busy: Whether the second forward is running now.
    """

    def __init__(
        self,
        mode: FakeTensorMode,
        watch: Watch,
        tensors: Mapping[str, torch.Tensor],
        varying: Mapping[str, Sequence[Hashable | None]],
        made_here: Callable[[torch.Tensor], bool],
    ) -> None:
        from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv  # slow to import

        self._mode, self._watch, self._made_here = mode, watch, made_here
        no_values: Any = {"allow_scalar_outputs": False, "allow_dynamic_output_shape_ops": False}  # no symbols of those
        self._env = ShapeEnv(specialize_zero_one=True, duck_shape=False, **no_values)
        self._twins: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._alike: dict[Hashable, Any] = {}
        self.of_name: dict[Hashable, Expression] = {}
        self.busy = False
        sizes: dict[Hashable, int | torch.SymInt] = {}
        for tensor_name, tensor in tensors.items():
            for size, name in zip(tensor.shape, varying[tensor_name], strict=True):
                if name is not None and name not in sizes:
                    source = _Named(f"size_{len(sizes)}")
                    symbol = self._env.create_symbol(size, source, DimDynamic.DYNAMIC, None)
                    sizes[name] = self._env.create_symintnode(symbol, hint=size, source=source)
                    self.of_name[name] = symbol
        self._sizes = sizes
        self.varying = varying
        self._shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    @property
    def guards(self) -> tuple[Expression, ...]:
        """Where all that was found holds: expressions that must be true."""
        return tuple(dict.fromkeys(guard.expr for guard in self._env.guards))

    @contextmanager
    def following(self) -> Iterator[None]:
        """Let the fake mode take symbols for sizes, and hear of what Python sees of one without a guard."""
        self._mode.shape_env = self._env
        kept = [(kind, name, vars(kind).get(name)) for kind in _STANDS_FOR for name in _UNGUARDED]
        try:
            for kind, name, _ in kept:
                setattr(kind, name, self._guarded(name, getattr(kind, name)))
            with numbers_by_type(_STANDS_FOR):
                yield
        finally:
            self._mode.shape_env = None
            for kind, name, own in kept:
                delattr(kind, name) if own is None else setattr(kind, name, own)

    def _guarded(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def look(symbol: Any, *args: Any) -> Any:
            if self.busy and (name == "__hash__" or not asked_by_user()):  # none has a hash, which libraries expect
                return real(symbol, *args)
            raise Untold(f"Python looks at a size by {name}")

        return look

    def begin(self, inputs: Mapping[str, torch.Tensor]) -> None:
        """Give the inputs of the first forward theirs in the second."""
        for name, tensor in inputs.items():
            names = self.varying[name]
            shape = [self._sizes.get(each, size) for size, each in zip(tensor.shape, names, strict=True)]
            with without_functions():
                self._pair(tensor, torch.empty(shape, dtype=tensor.dtype, device="cpu"))

    def values(self, shapes: Mapping[str, Sequence[int]]) -> dict[Expression, int] | None:
        """Give the value of each symbol for inputs of other shapes; None where what was found does not hold there."""
        found: dict[Hashable, int] = {}
        for tensor_name, names in self.varying.items():
            sizes = zip(shapes[tensor_name], self._shapes[tensor_name], names, strict=True)
            for size, own, name in sizes:
                known = own if name is None else found.setdefault(name, size)
                if known != size or (name is not None and size < 2):  # 0 and 1 broadcast otherwise
                    return None
        values = {self.of_name[name]: size for name, size in found.items()}
        return values if all(holds(guard, values) for guard in self.guards) else None

    def function(self, expression: Expression) -> tuple[tuple[str, ...], Callable[..., int]]:
        """Give a function that computes an expression of inputs, and the names of those.

        Raises:
            Untold: Python has no operator for something in it.
        """
        places = {
            str(self.of_name[name]): (tensor_name, dim)
            for tensor_name, names in reversed(list(self.varying.items()))
            for dim, name in enumerate(names)
            if name is not None
        }
        used = [places[str(symbol)] for symbol in expression.free_symbols]
        names = tuple(name for name in self._shapes if any(name == place[0] for place in used))
        arguments = {name: f"input_{index}" for index, name in enumerate(names)}

        def spelled(match: re.Match[str]) -> str:
            if match[0] not in places:
                return match[0]
            name, dim = places[match[0]]
            return f"{arguments[name]}.shape[{dim}]"

        text = re.sub(r"[A-Za-z_]\w*", spelled, str(expression))
        scope: dict[str, Any] = dict(_OPERATORS)
        exec(f"def size({', '.join(arguments.values())}):\n    return {text}", scope)
        function: Callable[..., int] = scope["size"]
        function.__module__ = __name__
        now = {self.of_name[name]: _number(size) for name, size in self._sizes.items()}
        given = [_Shaped(tuple(now.get(self.of_name.get(each), 0) for each in self.varying[name])) for name in names]
        try:
            found = function(*given)
        except NameError as error:
            raise Untold(f"a size is {expression}") from error
        if type(found) is not int or found != value_of(expression, now):
            raise Untold(f"a size is {expression}")
        return names, function

    def forget(self) -> None:
        """Let go of the tensors."""
        self._twins.clear()
        self._alike.clear()

    # --- numbers ----------------------------------------------------------------------------------------------------

    def plain(self, value: Any) -> Any:
        """Give arguments with numbers in the place of symbols.

        Raises:
            Untold: A symbol is no whole number.
        """
        if isinstance(value, torch.SymInt):
            return Sized.of(value)
        if isinstance(value, torch.SymFloat | torch.SymBool):
            raise Untold("a number that is no integer is computed of sizes")
        return _rebuilt(value, self.plain)

    def read(self, func: Callable[..., Any], args: Any, kwargs: Any, result: Any) -> Any:
        """Give what a call without tensors in its result gave, with symbols in the place of sizes.

        Raises:
            Untold: The call cannot be made on symbols, or gives something else.
        """
        name = getattr(func, "__name__", "")
        if name in READS or not _has_number(result) or not _speaks(args, kwargs):
            return result
        found = self._run(func, args, kwargs)
        if self.plain(found) != result:
            raise Untold(f"{name} gives something else than {result}")
        return found

    def sizes_of(self, tensor: torch.Tensor) -> tuple[tuple[Expression, ...], tuple[Expression, ...]] | None:
        """Give shape and strides of a tensor of the first forward; None for one that it did not make."""
        found = self._twins.get(id(tensor))
        if found is None:
            return None
        with without_functions():
            return tuple(map(_expression, found[1].shape)), tuple(map(_expression, found[1].stride()))

    def shape(self, tensor: torch.Tensor) -> tuple[int, ...]:
        """Give the shape of a tensor as numbers that know their symbols."""
        with without_functions():
            found = self._twins.get(id(tensor))
            return tuple(tensor.shape) if found is None else tuple(map(self.plain, found[1].shape))

    # --- the second forward -------------------------------------------------------------------------------------------

    def follow(self, func: Callable[..., Any], args: Any, kwargs: Any, result: Any, like: Hashable = None) -> None:
        """Make a call of the first forward in the second.

        Args:
            func: What was called.
            args: Its arguments in the first.
            kwargs: Its keyword arguments.
            result: What it gave.
            like: Names calls that are all equal; one that was made with equal sizes is not made again.

        Raises:
            Untold: It cannot be made, or gives something else.
        """
        given: Any = None
        if like is not None:
            with without_functions():
                given = (like, *(tuple(map(_expression, self._twin(each).shape)) for each in tensors_in(args, kwargs)))
                known = self._alike.get(given)
                if known is not None:
                    for tensor, (shape, strides) in zip(tensors_in(result), known, strict=True):
                        twin = torch.empty_strided(shape, strides, dtype=tensor.dtype, device="cpu")
                        self._pair(tensor, twin)
                    return
        found = self._run(func, args, kwargs)
        with without_functions():
            pairs = list(zip(tensors_in(result), tensors_in(found), strict=False))
            if len(pairs) != len(tensors_in(result)) or len(pairs) != len(tensors_in(found)):
                raise Untold(f"{getattr(func, '__name__', func)} gives another number of tensors")
            for tensor, twin in pairs:
                self._pair(tensor, twin)
            if given is not None:
                self._alike[given] = [(twin.shape, twin.stride()) for _, twin in pairs]

    def _run(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        kept = self._watch.drew, self._watch.trace
        self.busy, self._watch.trace = True, None
        try:
            with without_functions(), enable_python_dispatcher():  # its kernels keep symbols, those below it count
                return func(*self._twin_of(args), **self._twin_of(kwargs))
        except Untold:
            raise
        except Exception as error:
            raise Untold(f"{getattr(func, '__name__', func)}: {type(error).__name__}: {error}") from error
        finally:
            self.busy = False
            self._watch.drew, self._watch.trace = kept

    def _twin_of(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self._twin(value)
        if isinstance(value, Sized):
            return value.symbol
        return _rebuilt(value, self._twin_of)

    def _twin(self, tensor: torch.Tensor) -> torch.Tensor:
        """Give the second forward's tensor; the model's own and constants are in both.

        Raises:
            Untold: There is none.
        """
        found = self._twins.get(id(tensor))
        if found is None and self._made_here(tensor):
            raise Untold(f"a tensor of shape {list(tensor.shape)} was made by what cannot be followed")
        return found[1] if found is not None else tensor

    def _pair(self, tensor: torch.Tensor, twin: torch.Tensor) -> None:
        """Let one tensor stand for another.

        Raises:
            Untold: They differ.
        """
        shape, strides = list(map(_number, twin.shape)), list(map(_number, twin.stride()))
        sizes = zip(shape, strides, tensor.stride(), strict=True) if shape == list(tensor.shape) else [(2, 0, 1)]
        if twin.dtype != tensor.dtype or any(size > 1 and one != other for size, one, other in sizes):
            raise Untold(f"a tensor has shape, strides and dtype {_spelled(tensor)}, and with symbols {_spelled(twin)}")
        self._twins[id(tensor)] = tensor, twin


class SizeReads(TorchFunctionMode):
    """Hands symbols to Python where it reads sizes, and numbers to torch where Python gives symbols.

    Args:
        symbols: The second forward.
        passes: Whether nothing is recorded now.
    """

    def __init__(self, symbols: Symbols, passes: Callable[[], bool]) -> None:
        super().__init__()
        self._symbols, self._passes = symbols, passes

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """See one torch call before it is recorded."""
        if self._symbols.busy:
            return func(*args, **(kwargs or {}))
        args, kwargs = self._symbols.plain(args), self._symbols.plain(kwargs or {})
        result = func(*args, **kwargs)
        if self._passes() or has_tensor(result):
            return result
        return self._symbols.read(func, args, kwargs, result)


def value_of(expression: Expression, values: Mapping[Expression, int]) -> int:
    """Give the value of a size for given values of the symbols."""
    return expression if isinstance(expression, int) else int(_computed(expression, values))


def holds(guard: Expression, values: Mapping[Expression, int]) -> bool:
    """Tell whether a guard is true for given values of the symbols."""
    return bool(_computed(guard, values))


def _computed(expression: Expression, values: Mapping[Expression, int]) -> Any:
    """Compute by Python: sympy keeps what it has computed, of up to a thousand sizes."""
    if expression in values:
        return values[expression]
    symbols, function = _compiled(expression)
    known = [values[symbol] for symbol in symbols if symbol in values]
    found = function(*known) if function is not None and len(known) == len(symbols) else None
    return found if isinstance(found, int) else expression.subs(values)


@functools.lru_cache(maxsize=4096)
def _compiled(expression: Expression) -> tuple[tuple[Expression, ...], Callable[..., Any] | None]:
    """Give the symbols of an expression and a function of their values; None where Python has no exact operators."""
    symbols = tuple(sorted(getattr(expression, "free_symbols", ()), key=str))
    text = str(expression)
    known = {*map(str, symbols), *_OPERATORS}
    if re.search(r"(?<!/)/(?!/)|[~^]", text) or not {*re.findall(r"[A-Za-z_]\w*", text)} <= known:
        return symbols, None
    return symbols, eval(f"lambda {', '.join(map(str, symbols))}: {text}", dict(_OPERATORS))


class _Shaped(NamedTuple):
    shape: tuple[int, ...]


_OPERATORS = {
    "Mod": operator.mod,
    "PythonMod": operator.mod,
    "FloorDiv": operator.floordiv,
    "CleanDiv": operator.floordiv,
    "Max": max,
    "Min": min,
    "Abs": abs,
    "Eq": operator.eq,
    "Ne": operator.ne,
}


def _rebuilt(value: Any, give: Callable[[Any], Any]) -> Any:
    """Rebuild arguments around other leaves: containers, slices too."""
    if isinstance(value, slice):
        return slice(give(value.start), give(value.stop), give(value.step))
    if isinstance(value, torch.Size):
        return tuple(map(give, value))
    if isinstance(value, tuple | list | Mapping) or hasattr(type(value), "__dataclass_fields__"):
        if isinstance(value, type) or not _holds(value):
            return value
        return map_tree(lambda _, leaf: give(leaf), value)
    return value


def _holds(value: Any) -> bool:
    """Whether there is something in a container that may stand for something else."""
    if isinstance(value, tuple | list):
        return any(map(_holds, value))
    if isinstance(value, Mapping):
        return any(map(_holds, value.values()))
    if hasattr(type(value), "__dataclass_fields__"):
        return any(map(_holds, vars(value).values())) if hasattr(value, "__dict__") else False
    return isinstance(value, torch.Tensor | Sized | torch.SymInt | torch.SymFloat | torch.SymBool | slice)


def _has_number(value: Any) -> bool:
    return any(map(_has_number, value)) if isinstance(value, tuple | list) else isinstance(value, int | float | complex)


def _speaks(*values: Any) -> bool:
    """Whether arguments hold tensors or numbers computed of sizes."""
    return any(map(_holds, values))


def _spelled(tensor: torch.Tensor) -> str:
    sizes = [[str(_expression(size)) for size in each] for each in (tensor.shape, tensor.stride())]
    return f"{sizes} {tensor.dtype}"


def _number(size: Any) -> int:
    hint = size.node.hint if isinstance(size, torch.SymInt) else size
    return -1 if hint is None else int(hint)
