"""A layer's description, separate from its construction: ``LayerSpec`` and ``TiedLayerSpec``.

After the LayerSpec principle of DeepSpeed's pipeline module: a rank holds all specs, which cost nothing, and builds
only its own layers. torch is imported by ``build`` alone.
"""

import contextlib
import copy
import reprlib
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import FrozenInstanceError, dataclass
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, Self

from fxpipe.errors import SpecError
from fxpipe.ir.canonical import Tree, bind_arguments, digest, import_path, own_copy, spell

if TYPE_CHECKING:
    import torch
    from torch import nn


class LayerBuilder(Protocol):
    """A live object that holds the user's model and can make one of its layers anew."""

    def build_layer(self, fqn: str, device: Any, dtype: Any) -> "nn.Module":
        """Make the module called ``fqn`` anew on a device and in a dtype."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What is known of a parameter or buffer without holding it.

    Attributes:
        fqn: Its name in the user's model.
        shape: Its sizes.
        dtype: Its dtype by name, ``"float32"``.
        nbytes: Bytes of its elements.
        trainable: Whether it takes a gradient.
        persistent: Whether a state dictionary has it; false for some buffers.

    >>> TensorInfo("head.weight", (8, 4), "float32", 128, trainable=True).shape
    (8, 4)
    """

    fqn: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    trainable: bool
    persistent: bool = True


def layer_name(fqn: str, call: int) -> str:
    """Give the name of a layer as plans have it.

    >>> layer_name("h.0", 0), layer_name("h.0", 2)
    ('h.0', 'h.0@2')
    """
    return f"{fqn}@{call}" if call else fqn


class LayerSpec:
    """A layer that is not built yet: a module class and its arguments, or a layer found in a captured model.

    A spec is a value: it copies its arguments when it is made, hands out copies, cannot be changed, and compares by
    class and arguments. Its ``fingerprint`` is the same on every rank.

    Args:
        typename: A subclass of ``torch.nn.Module``.
        *args: Positional arguments of its constructor.
        **kwargs: Keyword arguments of its constructor.

    Raises:
        SpecError: ``typename`` is not a module class, the arguments do not fit its constructor, or an argument
            cannot be compared across processes.

    Source: DeepSpeed, ``deepspeed/runtime/pipe/module.py``.

    >>> from torch import nn
    >>> spec = LayerSpec(nn.Linear, 2, 4, bias=False)
    >>> spec
    LayerSpec(Linear, 2, 4, bias=False)
    >>> spec.build(device="meta").weight.shape
    torch.Size([4, 2])
    """

    __slots__ = (
        "__weakref__",
        "_args",
        "_buffers",
        "_call",
        "_fingerprint",
        "_fqn",
        "_handle",
        "_kwargs",
        "_module_fingerprint",
        "_parameters",
        "_type_path",
        "_typename",
    )

    def __init__(self, typename: "type[nn.Module]", *args: Any, **kwargs: Any) -> None:
        check_module_class(typename)
        arguments = bind_arguments(typename, args, kwargs)
        path = import_path(typename)
        self._set(
            typename=typename,
            args=own_copy(args, path),
            kwargs=own_copy(kwargs, path),
            fqn="",
            type_path=path,
            call=0,
            parameters=(),
            buffers=(),
            handle=None,
            module_fingerprint=digest(("layer", path, arguments)),
        )
        self._set(fingerprint=digest(self._spelled()))

    @classmethod
    def captured(
        cls,
        fqn: str,
        type_path: str,
        *,
        call: int = 0,
        parameters: tuple[TensorInfo, ...] = (),
        buffers: tuple[TensorInfo, ...] = (),
        ties: tuple[tuple[str, str], ...] = (),
        handle: LayerBuilder | None = None,
    ) -> "LayerSpec":
        """Describe a layer of a captured model; with ``ties`` it is a ``TiedLayerSpec``.

        Args:
            fqn: The layer's name in the model.
            type_path: Import path of its class, or the name of its operation.
            call: Which call of this module it is, from 0.
            parameters: The parameters it reads.
            buffers: The buffers it reads.
            ties: ``(key, attribute)`` of each tied parameter among them.
            handle: The live object that can build it; kept weakly, outside equality, hash and pickle.

        >>> LayerSpec.captured("lm_head", "torch.nn:Linear", ties=(("wte.weight", "weight"),))
        TiedLayerSpec.captured('lm_head', 'torch.nn:Linear', ties=(('wte.weight', 'weight'),))
        """
        spec: LayerSpec = object.__new__(TiedLayerSpec if ties else cls)
        if isinstance(spec, TiedLayerSpec):
            if not ties:
                raise SpecError(
                    f"captured layer {fqn!r} has no ties\n  use LayerSpec.captured, or name its (key, attribute) pairs"
                )
            spec._set(key=ties[0][0], tied_weight_attr=tuple(attr for _, attr in ties), forward_fn=None, ties=ties)
        spec._set(
            typename=None,
            args=(),
            kwargs={},
            fqn=fqn,
            type_path=type_path,
            call=call,
            parameters=parameters,
            buffers=buffers,
            handle=None if handle is None else weakref.ref(handle),
            module_fingerprint=digest(("captured", type_path, fqn)),
        )
        spec._set(fingerprint=digest(spec._spelled()))
        return spec

    @property
    def typename(self) -> "type[nn.Module] | None":
        """The module class; None for a captured layer, which has a ``type_path`` only."""
        return self._get("typename")  # type: ignore[no-any-return]

    @property
    def module_args(self) -> tuple[Any, ...]:
        """A copy of the positional arguments."""
        return copy.deepcopy(self._get("args"))

    @property
    def module_kwargs(self) -> dict[str, Any]:
        """A copy of the keyword arguments."""
        return copy.deepcopy(self._get("kwargs"))

    @property
    def fqn(self) -> str:
        """The layer's name in the captured model; empty for a spec made by hand, whose place gives it a name."""
        return self._get("fqn")  # type: ignore[no-any-return]

    @property
    def layer_name(self) -> str:
        """Name of the layer in a graph: the FQN, with ``@1``, ``@2`` … for later calls of the same module."""
        return layer_name(self.fqn, self.call)

    @property
    def type_path(self) -> str:
        """Import path of the class, ``torch.nn.modules.linear:Linear``."""
        return self._get("type_path")  # type: ignore[no-any-return]

    @property
    def call(self) -> int:
        """Which call of the module this is, from 0."""
        return self._get("call")  # type: ignore[no-any-return]

    @property
    def parameters(self) -> tuple[TensorInfo, ...]:
        """The parameters a captured layer reads."""
        return self._get("parameters")  # type: ignore[no-any-return]

    @property
    def buffers(self) -> tuple[TensorInfo, ...]:
        """The buffers a captured layer reads."""
        return self._get("buffers")  # type: ignore[no-any-return]

    @property
    def ties(self) -> tuple[tuple[str, str], ...]:
        """``(key, attribute)`` of each tied parameter."""
        return ()

    @property
    def fingerprint(self) -> str:
        """Hexadecimal digest of the import path and the canonical arguments, the same in every process."""
        return self._get("fingerprint")  # type: ignore[no-any-return]

    @property
    def module_fingerprint(self) -> str:
        """Digest of class and arguments alone: tied specs that agree in it share one module."""
        return self._get("module_fingerprint")  # type: ignore[no-any-return]

    def build(
        self, device: "torch.device | str | int | None" = None, dtype: "torch.dtype | str | None" = None
    ) -> "nn.Module":
        """Construct the layer; nothing else of a spec allocates.

        Args:
            device: Where its tensors are made; None: torch's default device.
            dtype: Floating-point dtype of its parameters and buffers, ``torch.bfloat16`` or ``"bfloat16"``; None:
                torch's default dtype.

        Raises:
            SpecError: The layer was captured and the model is gone, or ``dtype`` is not a floating-point dtype.
        """
        if self.typename is None:
            handle = self._get("handle")
            builder = handle() if handle is not None else None
            if builder is None:
                raise SpecError(
                    f"cannot build captured layer {self.fqn!r} ({self.type_path}): the capture of its model is gone\n"
                    "  build it while the pipeline lives, or describe it by class and arguments: LayerSpec(cls, ...)"
                )
            return builder.build_layer(self.fqn, device, dtype)  # type: ignore[no-any-return]
        with _defaults(device, dtype) as wanted:
            try:
                module = self.typename(*self.module_args, **self.module_kwargs)
            except Exception as error:
                error.add_note(f"while building {self!r}")
                raise
        if any(_differs(tensor, wanted) for tensor in (*module.parameters(), *module.buffers())):
            module.to(**wanted)  # the class chose a device or dtype by itself
        return module

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, LayerSpec):
            return NotImplemented
        same_class = type(self) is type(other) and self.typename is other.typename
        return same_class and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __repr__(self) -> str:
        if self.typename is None:
            shown = [repr(self.fqn), repr(self.type_path)]
            shown += [f"call={self.call}"] if self.call else []
            shown += [f"ties={self.ties}"] if self.ties else []
            return f"{type(self).__name__}.captured({', '.join(shown)})"
        return f"{type(self).__name__}({', '.join(self._shown())})"

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise FrozenInstanceError(f"cannot assign {name!r}: a {type(self).__name__} never changes; make a new one")

    def __delattr__(self, name: str) -> NoReturn:
        raise FrozenInstanceError(f"cannot delete {name!r}: a {type(self).__name__} never changes; make a new one")

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        names = [name for name in self._names() if name != "handle"]
        return _restore, (type(self), {name: self._get(name) for name in names})

    def _names(self) -> Iterator[str]:
        for cls in type(self).__mro__:
            yield from (name[1:] for name in getattr(cls, "__slots__", ()) if not name.startswith("__"))

    def _get(self, name: str) -> Any:
        return object.__getattribute__(self, f"_{name}")

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, f"_{name}", value)

    def _shown(self) -> list[str]:
        short = _short.repr
        named = [f"{name}={short(value)}" for name, value in self._get("kwargs").items()]
        return [getattr(self.typename, "__qualname__", "?"), *map(short, self._get("args")), *named]

    def _spelled(self) -> Tree:
        infos = tuple(tuple(repr(getattr(t, n)) for n in t.__slots__) for t in (*self.parameters, *self.buffers))
        return (type(self).__name__, self.module_fingerprint, str(self.call), infos)


class TiedLayerSpec(LayerSpec):
    """A layer that shares weights with every other layer of the same ``key``.

    Same class and arguments: one module, built at the first place and used again at the others, through
    ``forward_fn(module, x)`` where a place uses it in another way. Another class: each its own module, and only the
    attributes named by ``tied_weight_attr`` are one tensor.

    Args:
        key: Name of the group of layers that share.
        typename: A subclass of ``torch.nn.Module``.
        *args: Positional arguments of its constructor.
        forward_fn: Called as ``forward_fn(module, x)`` instead of ``module(x)``.
        tied_weight_attr: Name or names of what is shared, dotted for something deeper: ``"embed.weight"``.
        **kwargs: Keyword arguments of its constructor.

    Raises:
        SpecError: As ``LayerSpec``; or the key, ``forward_fn`` or ``tied_weight_attr`` is not what it should be.

    >>> from torch import nn
    >>> TiedLayerSpec("embed", nn.Embedding, 10, 4)
    TiedLayerSpec('embed', Embedding, 10, 4, tied_weight_attr=('weight',))
    """

    __slots__ = ("_forward_fn", "_key", "_tied_weight_attr", "_ties")

    def __init__(
        self,
        key: str,
        typename: "type[nn.Module]",
        *args: Any,
        forward_fn: Callable[..., Any] | None = None,
        tied_weight_attr: str | Sequence[str] = "weight",
        **kwargs: Any,
    ) -> None:
        check_module_class(typename)
        where = f"TiedLayerSpec of {typename.__qualname__}"
        if not isinstance(key, str) or not key:
            raise SpecError(f"{where}: key is {key!r}\n  give a name, the same for every layer that shares the weights")
        if forward_fn is not None and not callable(forward_fn):
            raise SpecError(f"{where}: forward_fn is {forward_fn!r}\n  give a function of (module, x), or None")
        attrs = (tied_weight_attr,) if isinstance(tied_weight_attr, str) else tuple(tied_weight_attr)
        if not attrs or not all(isinstance(attr, str) and attr for attr in attrs) or len({*attrs}) < len(attrs):
            raise SpecError(
                f"{where}: tied_weight_attr is {tied_weight_attr!r}\n  name one attribute or several different ones"
            )
        ties = tuple((key, attr) for attr in attrs)
        self._set(key=key, forward_fn=forward_fn, tied_weight_attr=attrs, ties=ties)
        super().__init__(typename, *args, **kwargs)

    @property
    def key(self) -> str:
        """Name of the group of layers that share weights; of the first tie where there are several."""
        return self._get("key")  # type: ignore[no-any-return]

    @property
    def forward_fn(self) -> Callable[..., Any] | None:
        """Called as ``forward_fn(module, x)`` at this place; None: the module itself."""
        return self._get("forward_fn")  # type: ignore[no-any-return]

    @property
    def tied_weight_attr(self) -> tuple[str, ...]:
        """Names of the shared attributes."""
        return self._get("tied_weight_attr")  # type: ignore[no-any-return]

    @property
    def ties(self) -> tuple[tuple[str, str], ...]:
        """``(key, attribute)`` of each tied parameter."""
        return self._get("ties")  # type: ignore[no-any-return]

    def _shown(self) -> list[str]:
        forward = [] if self.forward_fn is None else [f"forward_fn={_short.repr(self.forward_fn)}"]
        return [repr(self.key), *super()._shown(), *forward, f"tied_weight_attr={self.tied_weight_attr}"]

    def _spelled(self) -> Tree:
        return (super()._spelled(), self.key, self.ties, spell(self.forward_fn, "forward_fn"))


def check_module_class(typename: object) -> None:
    """Raise ``SpecError`` unless ``typename`` is a subclass of ``torch.nn.Module``.

    A class can be one only if torch is loaded, so torch need not be imported to find out.
    """
    if not isinstance(typename, type):
        raise SpecError(
            f"LayerSpec got {_short.repr(typename)}, an object of {import_path(type(typename))}, not a class\n"
            "  give the module's class and then its arguments: LayerSpec(nn.Linear, 2, 4)"
        )
    torch = sys.modules.get("torch")
    if torch is None or not issubclass(typename, torch.nn.Module):
        raise SpecError(
            f"LayerSpec got the class {import_path(typename)}, which is not a subclass of torch.nn.Module\n"
            "  give a module class; a plain function may stand in the sequence as it is"
        )


@contextlib.contextmanager
def _defaults(device: Any, dtype: Any) -> Iterator[dict[str, Any]]:
    """Build under this default device and dtype; yields the ones that were asked for."""
    import torch

    wanted: dict[str, Any] = {}
    before = torch.get_default_dtype()
    with contextlib.ExitStack() as stack:
        if device is not None:
            wanted["device"] = torch.device(device)
            stack.enter_context(wanted["device"])
        if dtype is not None:
            found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
            if not isinstance(found, torch.dtype) or not found.is_floating_point:
                raise SpecError(
                    f"cannot build a layer in dtype {dtype!r}\n  give a floating-point dtype such as torch.bfloat16"
                )
            wanted["dtype"] = found
            stack.callback(torch.set_default_dtype, before)
            torch.set_default_dtype(found)
        yield wanted


def _differs(tensor: "torch.Tensor", wanted: dict[str, Any]) -> bool:
    device, dtype = wanted.get("device"), wanted.get("dtype")
    elsewhere = device is not None and (
        tensor.device.type != device.type or (device.index is not None and tensor.device.index != device.index)
    )
    return elsewhere or (dtype is not None and tensor.is_floating_point() and tensor.dtype != dtype)


def _restore(cls: type[LayerSpec], values: dict[str, Any]) -> LayerSpec:
    spec = object.__new__(cls)
    spec._set(**values, handle=None)
    return spec


_short = reprlib.Repr()
_short.maxother = _short.maxstring = 60
_short.maxtuple = _short.maxlist = _short.maxdict = 8
