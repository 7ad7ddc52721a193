"""Python numbers among a model's inputs: what is computed of them is written down, what is decided by them is a read.

A ``Scalar`` stands for such a number while a forward is recorded. It is no ``float``, so that nothing in C gets at its
value unseen, but says that it is one where ``isinstance`` asks.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NoReturn, Protocol

from fxpipe._torch import replaced
from fxpipe.ir.tree import map_tree


class ScalarTape(Protocol):
    """Writes down what happens to numbers."""

    def made(self, function: Callable[..., Any], args: tuple[Any, ...], value: float) -> Scalar:
        """Note that a number was computed of others."""

    def read(self, function: Callable[..., Any], args: tuple[Any, ...], answer: Any) -> None:
        """Note that Python saw something of a number: it may go another way for another one."""


def exactly(number: Any) -> Any:
    """Give a number itself: what Python sees of one that it looks at."""
    return number


class Scalar:
    """A number that is an input, or was computed of one.

    Args:
        value: What it is in this forward.
        node: The node whose value it is.
        tape: Hears of what happens to it.
    """

    __slots__ = ("node", "tape", "value")
    value: float
    node: Any
    tape: ScalarTape

    def __init__(self, value: float, node: Any, tape: ScalarTape) -> None:
        self.value = value
        self.node = node
        self.tape = tape

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """``int`` or ``float``."""
        return type(self.value)

    def seen(self) -> float:
        """Give the value to Python, which may do with it what it likes."""
        self.tape.read(exactly, (self,), self.value)
        return self.value

    @classmethod
    def __torch_function__(cls, *_: Any, **__: Any) -> NoReturn:
        """Refuse a call of torch that nothing records."""
        raise TypeError("a number of a recorded forward is used outside of it")

    def __getattr__(self, name: str) -> Any:
        """Give what numbers have besides their arithmetic."""
        if name.startswith("__") or not hasattr(self.value, name):
            raise AttributeError(f"{type(self.value).__name__!r} object has no attribute {name!r}")
        return getattr(self.seen(), name)

    def __float__(self) -> float:
        """Read it."""
        return float(self.seen())

    def __index__(self) -> int:
        """Read it."""
        return operator.index(self.seen())  # type: ignore[arg-type]

    def __int__(self) -> int:
        """Read the whole number in it."""
        return int(self._answered(int))

    def __bool__(self) -> bool:
        """Read whether it is 0."""
        return bool(self._answered(bool))

    def __hash__(self) -> int:
        """Read it."""
        return hash(self.seen())

    def __repr__(self) -> str:
        """Read it."""
        return repr(self.seen())

    def __format__(self, spec: str) -> str:
        """Read it."""
        return format(self.seen(), spec)

    def __copy__(self) -> Scalar:
        """Give it itself: numbers do not change."""
        return self

    def __deepcopy__(self, _: Any) -> Scalar:
        """Give it itself."""
        return self

    def __round__(self, digits: int | None = None) -> Any:
        """Round it."""
        return _computed(round, self) if digits is None else _computed(round, self, digits)

    def _answered(self, function: Any) -> Any:
        answer = function(self.value)
        self.tape.read(function, (self,), answer)
        return answer


def plain_number(value: Any) -> Any:
    """Give the number that a ``Scalar`` is now; anything else as it is."""
    return value.value if type(value) is Scalar else value


def bare(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Put the numbers themselves into the place of every ``Scalar`` among arguments."""
    given: Any = mapped(plain_number, (args, kwargs)) if holds_scalar((args, kwargs)) else (args, kwargs)
    return given[0], given[1]


def settled(*values: Any) -> tuple[Any, ...]:
    """Let Python see every ``Scalar`` in values: what is done with it is not known."""
    if not holds_scalar(values):
        return values
    found: Any = mapped(lambda leaf: leaf.seen() if type(leaf) is Scalar else leaf, values)
    return tuple(found)


def holds_scalar(value: Any) -> bool:
    """Whether there is a ``Scalar`` in a value or in the containers in it."""
    if isinstance(value, tuple | list):
        return any(map(holds_scalar, value))
    if isinstance(value, Mapping):
        return any(map(holds_scalar, value.values()))
    if isinstance(value, slice):
        return holds_scalar((value.start, value.stop, value.step))
    if hasattr(type(value), "__dataclass_fields__") and hasattr(value, "__dict__"):
        return holds_scalar(vars(value))
    return type(value) is Scalar


def mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """Rebuild arguments around other leaves; the parts of slices are leaves too."""

    def leaf(_: str, part: Any) -> Any:
        if isinstance(part, slice):
            return slice(*(mapped(function, each) for each in (part.start, part.stop, part.step)))
        return function(part)

    return map_tree(leaf, value)


def _computed(function: Callable[..., Any], *args: Any) -> Any:
    """Compute a number of others, and write that down."""
    value = function(*map(plain_number, args))
    scalars = [arg for arg in args if type(arg) is Scalar]
    if type(value) in (int, float):
        return scalars[0].tape.made(function, args, value)
    for scalar in scalars:  # a complex number, a pair: it goes on as it is
        scalar.seen()
    return value


def _compared(function: Callable[..., bool], *args: Any) -> bool:
    """Compare numbers: the answer is seen, they are not."""
    answer = function(*map(plain_number, args))
    next(arg for arg in args if type(arg) is Scalar).tape.read(function, args, answer)
    return answer


def _binary(make: Callable[..., Any], function: Callable[..., Any], *, turned: bool = False) -> Any:
    def method(self: Scalar, other: Any) -> Any:
        if type(other) not in (Scalar, int, float, bool):
            return NotImplemented
        return make(function, other, self) if turned else make(function, self, other)

    return method


def _unary(function: Callable[..., Any]) -> Any:
    return lambda self: _computed(function, self)


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and_", "or_", "xor", "lshift", "rshift"):
    setattr(Scalar, f"__{_name.strip('_')}__", _binary(_computed, getattr(operator, _name)))
    setattr(Scalar, f"__r{_name.strip('_')}__", _binary(_computed, getattr(operator, _name), turned=True))
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    setattr(Scalar, f"__{_name}__", _binary(_compared, getattr(operator, _name)))
for _name in ("neg", "pos", "abs", "invert"):
    setattr(Scalar, f"__{_name}__", _unary(getattr(operator, _name)))
for _name in ("trunc", "floor", "ceil"):
    setattr(Scalar, f"__{_name}__", _unary(getattr(math, _name)))

_OF_NUMBERS = (
    *("exp", "expm1", "exp2", "log", "log1p", "log2", "log10", "sqrt", "cbrt", "pow", "fabs", "fmod", "hypot"),
    *("sin", "cos", "tan", "asin", "acos", "atan", "atan2", "sinh", "cosh", "tanh", "erf", "erfc", "gamma", "lgamma"),
    *("degrees", "radians", "copysign"),
)


@contextmanager
def followed_math() -> Iterator[None]:
    """Write down what the functions of ``math`` compute of numbers, where they are called by ``math.``."""
    with ExitStack() as stack:
        for name in _OF_NUMBERS:
            stack.enter_context(replaced(math, name, _following(getattr(math, name))))
        yield


def _following(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        return _computed(function, *args) if any(type(arg) is Scalar for arg in args) else function(*args)

    return call


# --- calls of torch ----------------------------------------------------------------------------------------------

_SHAPING = frozenset({"arange", "range", "linspace", "logspace", "interpolate", "upsample", "repeat_interleave"})
_DRAWING = ("lstm", "gru", "rnn_tanh", "rnn_relu", "scaled_dot_product_attention", "multi_head_attention_forward")
_ELEMENTWISE = frozenset(
    {
        *("add", "sub", "subtract", "mul", "multiply", "div", "divide", "true_divide", "floor_divide", "remainder"),
        *("fmod", "pow", "float_power", "rsub", "eq", "ne", "lt", "le", "gt", "ge", "clamp", "clip", "clamp_min"),
        *("clamp_max", "where", "masked_fill", "fill", "full", "full_like", "new_full", "addcmul", "addcdiv", "lerp"),
        *("tensor", "as_tensor", "scalar_tensor", "isub", "iadd", "imul", "itruediv", "ipow", "truediv", "floordiv"),
        *(
            "mod",
            "rtruediv",
            "rpow",
            "rfloordiv",
            "rmod",
            "radd",
            "rmul",
            "__setitem__",
            "setitem",
            "xlogy",
            "softplus",
        ),
        *("maximum", "minimum", "hardtanh", "leaky_relu", "elu", "threshold", "bitwise_and", "bitwise_or", "ifloordiv"),
    }
)
"""Calls whose numbers are values of elements, and no sizes, positions or dimensions, by the names without ``_``."""


def only_computes(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Tell whether a call of torch does nothing with the scalars it is given but compute with them.

    Args:
        name: Of the function.
        args: Its arguments.
        kwargs: Its keyword arguments.
    """
    if "dropout" in name or name in _SHAPING or name in _DRAWING:
        return False
    short = name if name == "__setitem__" else name.strip("_")
    in_list = short in ("tensor", "as_tensor")
    given = [*(args[-1:] if short in ("__setitem__", "full", "new_full") else args), *kwargs.values()]
    if len(given) < len(args) + len(kwargs) and holds_scalar(args[:-1]):
        return False  # an index or a size
    for value in given:
        if not in_list and type(value) is not Scalar and holds_scalar(value):
            return False
        if type(value) is Scalar and isinstance(value.value, int) and short not in _ELEMENTWISE:
            return False
    return True
