"""How calls of torch look to a function mode: their names, what they write to, and the form that a graph can hold."""

from __future__ import annotations

import operator
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from fxpipe.capture.calls.values import tensors_in

_OPERATORS = {
    f"__{name}__": getattr(operator, name if hasattr(operator, name) else f"{name}_")
    for name in (
        *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor", "lshift", "rshift"),
        *("eq", "ne", "lt", "le", "gt", "ge", "neg", "invert", "getitem", "setitem"),
        *("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor"),
    )
}
_FLAGS = frozenset({"requires_grad_", "share_memory_", "detach_"})  # change a tensor's state, not its values
_IN_PLACE = frozenset(name for name in _OPERATORS if name.startswith("__i") and name != "__invert__") | {"__setitem__"}
CPU = torch.device("cpu")
_METHODS = (types.MethodDescriptorType, types.WrapperDescriptorType)


def canonical(func: Any, name: str, args: tuple[Any, ...]) -> tuple[str, Any, tuple[Any, ...]]:
    """Give a call the form that an fx graph can print: operation, target and arguments.

    >>> one = torch.ones(1)
    >>> canonical(torch.Tensor.__rsub__, "__rsub__", (one, 2))[:2]
    ('call_function', <built-in function sub>)
    """
    if name in ("cuda", "xpu"):
        return "call_method", "to", (args[0], CPU)
    if name in ("__get__", "__set__"):
        access = getattr if name == "__get__" else setattr
        return "call_function", access, (args[0], func.__self__.__name__, *args[1:])
    if name in _OPERATORS:
        return "call_function", _OPERATORS[name], args
    if name.startswith("__r") and f"__{name[3:]}" in _OPERATORS and len(args) == 2:
        return "call_function", _OPERATORS[f"__{name[3:]}"], (args[1], args[0])
    qualified = str(getattr(func, "__qualname__", ""))
    method = isinstance(func, _METHODS) or qualified.startswith(("Tensor.", "TensorBase."))
    if method and hasattr(torch.Tensor, name):
        return "call_method", name, args
    return "call_function", func, args


SHAPED_LIKE = {
    "zeros_like": torch.zeros,
    "new_zeros": torch.zeros,
    "ones_like": torch.ones,
    "new_ones": torch.ones,
    "empty_like": torch.empty,
    "new_empty": torch.empty,
    "full_like": torch.full,
    "new_full": torch.full,
}
"""Functions that look at the shape, dtype and device of their tensor alone, and what makes the same without it."""


def without_source(
    name: str,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    result: Any,
    shape_of: Callable[[torch.Tensor], tuple[int, ...]],
) -> tuple[Any, tuple[Any, ...], dict[str, Any]] | None:
    """Give function and arguments that make a result without the tensor it is shaped like; None for other calls.

    So it need not be sent where that tensor is not, and can be made anywhere.

    >>> without_source("ones_like", (torch.zeros(2, 3),), {}, torch.ones(2, 3), lambda tensor: tuple(tensor.shape))[1]
    ((2, 3),)
    """
    if name == "new_tensor" and len(args) == 2 and len(tensors_in(args, kwargs)) == 1 and not result.requires_grad:
        return torch.tensor, (args[1],), {"dtype": result.dtype, "device": result.device}
    factory = SHAPED_LIKE.get(name)
    if factory is None or not isinstance(result, torch.Tensor) or not result.is_contiguous() or result.requires_grad:
        return None
    if kwargs.keys() - {"dtype", "device", "size", "fill_value"} or len(tensors_in(args, kwargs)) != 1:
        return None
    filling = (kwargs["fill_value"] if "fill_value" in kwargs else args[-1],) if factory is torch.full else ()
    return factory, (shape_of(result), *filling), {"dtype": result.dtype, "device": result.device}


def spoken_name(func: Any, name: str) -> str:
    """Give the word for a call that layers are named after.

    >>> spoken_name(torch.ops.aten.mul.Tensor, "mul.Tensor")
    'mul'
    """
    if name in ("__get__", "__set__"):
        return str(func.__self__.__name__)
    overload = getattr(func, "_schema", None)
    return str(overload.name.rpartition("::")[2]) if overload is not None else name or type(func).__name__


def versions_of(tensors: Iterable[torch.Tensor]) -> list[int]:
    """Give numbers that grow when tensors are written to; 0 for those of inference mode, which do not count."""
    return [_version(tensor) for tensor in tensors]


def _version(tensor: torch.Tensor) -> int:
    try:
        return tensor._version
    except RuntimeError:
        return 0


def targets_of(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    """List the tensors that a call writes to, as far as its name and ``out=`` say so."""
    named = (args[0],) if args and writes_by_name(name) else ()
    return tensors_in(named, kwargs.get("out"))


def writes_by_name(name: str) -> bool:
    """Tell whether a method writes to the tensor it is called on, as far as its name says so.

    >>> [name for name in ("add_", "__iadd__", "__setitem__", "add", "__add__", "__invert__") if writes_by_name(name)]
    ['add_', '__iadd__', '__setitem__']
    """
    return name in _IN_PLACE or (name.endswith("_") and not name.endswith("__") and name not in _FLAGS)


def on_cpu(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Send what names an accelerator to the CPU, where everything is during capture; runs of a graph replace it.

    A ``torch.device`` stands for that of the stage, the text ``"cpu"`` for the host.

    >>> on_cpu("ones", (2,), {"device": "cuda:1"})
    ((2,), {'device': device(type='cpu')})
    """
    if _is_elsewhere(kwargs.get("device")):
        kwargs = {**kwargs, "device": CPU}
    if name == "to" and len(args) > 1 and _is_elsewhere(args[1]):
        args = (args[0], CPU, *args[2:])
    return args, kwargs


def _is_elsewhere(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type != "cpu"
    if isinstance(device, str):
        return not device.startswith("cpu")
    return isinstance(device, int) and not isinstance(device, bool)


def attention_form(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """Name the form of a call of ``scaled_dot_product_attention``: what decides which kernel may run."""
    causal = kwargs.get("is_causal", args[5] if len(args) > 5 else False)
    mask = kwargs.get("attn_mask", args[3] if len(args) > 3 else None)
    return "causal" if causal else "full" if mask is None else "mask"
