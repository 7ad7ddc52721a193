"""A pipeline written by hand, a list of specs, as one ``nn.Module`` that is captured like any model."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from fxpipe.errors import SpecError, TieError
from fxpipe.ir.spec import LayerSpec, TiedLayerSpec
from fxpipe.recipes.deferred import deferred_init, is_recorded


class SpecSequential(nn.Module):
    """The layers of a sequence of specs, built and called one after another.

    Built under ``torch.device("meta")`` it allocates nothing. The layer at place 3 is the submodule ``"3"``, so its
    weight is called ``"3.weight"``. Each layer gets what the one before returned (a tuple stays one argument); the
    first gets the model's inputs, as a tuple where there are several.

    Tied layers of one key with the same class and arguments are one module, which has a name at each of its places;
    of another class, only the attributes named by ``tied_weight_attr`` are one parameter, the first one's.

    Args:
        layers: ``LayerSpec``, ``TiedLayerSpec``, ready modules and plain callables.

    Attributes:
        specs: What stands at each place, as given.
        tied_modules: The module first built for each key.

    Raises:
        SpecError: Something in the sequence is no layer, or the sequence is empty.
        TieError: Tied attributes are missing or differ in shape or dtype.

    Source: DeepSpeed, ``PipelineModule`` in ``deepspeed/runtime/pipe/module.py``.

    >>> from torch.nn import functional
    >>> head = TiedLayerSpec("embed", nn.Embedding, 10, 4, forward_fn=lambda module, x: x @ module.weight.T)
    >>> with torch.device("meta"):
    ...     model = SpecSequential([TiedLayerSpec("embed", nn.Embedding, 10, 4), functional.gelu, head])
    >>> [name for name, _ in model.named_parameters(remove_duplicate=False)]
    ['0.weight', '2.weight']
    >>> model(torch.zeros(3, dtype=torch.long, device="meta")).shape
    torch.Size([3, 10])
    """

    specs: tuple[LayerSpec | Callable[..., Any], ...]
    tied_modules: dict[str, nn.Module]

    def __init__(self, layers: Sequence[LayerSpec | Callable[..., Any]]) -> None:
        super().__init__()
        self.specs = tuple(layers)
        self.tied_modules = {}
        _check_sequence(self.specs)
        first_places: dict[str, list[int]] = {}
        for place, spec in enumerate(self.specs):
            if isinstance(spec, TiedLayerSpec):
                earlier = first_places.setdefault(spec.key, [])
                self.add_module(str(place), self._tied_module(place, spec, earlier))
                earlier.append(place)
            elif isinstance(spec, LayerSpec):
                self.add_module(str(place), spec.build())
            elif isinstance(spec, nn.Module):
                self.add_module(str(place), spec)

    def forward(self, *inputs: Any) -> Any:
        """Call the layers in order."""
        value: Any = inputs[0] if len(inputs) == 1 else inputs
        for place, spec in enumerate(self.specs):
            value = self.call_layer(place, spec, value)
        return value

    def call_layer(self, place: int, spec: LayerSpec | Callable[..., Any], value: Any) -> Any:
        """Call the layer at one place on what the layer before it returned."""
        if not isinstance(spec, LayerSpec):
            return spec(value)
        module = self.get_submodule(str(place))
        if isinstance(spec, TiedLayerSpec) and spec.forward_fn is not None:
            return spec.forward_fn(module, value)
        return module(value)

    def recorded(self, seed: int) -> dict[str, torch.Tensor]:
        """Record how the constructors of all layers, called in order after one ``torch.manual_seed``, fill them.

        Args:
            seed: The seed.

        Returns:
            Recorded tensors by first name; ready modules' own are left out.
        """
        with torch.random.fork_rng(devices=[]), deferred_init(seed=seed):
            again = SpecSequential(self.specs)
        tensors = {**dict(again.named_parameters()), **dict(again.named_buffers())}
        return {fqn: tensor for fqn, tensor in tensors.items() if is_recorded(tensor)}

    def _tied_module(self, place: int, spec: TiedLayerSpec, earlier: list[int]) -> nn.Module:
        """The module of a tied spec: that of an earlier place, or a new one that shares the earlier one's tensors."""
        for other in earlier:
            other_spec = self.specs[other]
            assert isinstance(other_spec, TiedLayerSpec)
            if other_spec.module_fingerprint == spec.module_fingerprint and other_spec.typename is spec.typename:
                return self.get_submodule(str(other))
        module = spec.build()
        for attr in spec.tied_weight_attr:
            _tensor_name(module, attr, place, spec)  # a name that does not exist is an error at its first place too
        self.tied_modules.setdefault(spec.key, module)
        for other in earlier:
            self._share(place, spec, module, other)
        return module

    def _share(self, place: int, spec: TiedLayerSpec, module: nn.Module, other: int) -> None:
        """Put the parameters of an earlier place of the same key into ``module``."""
        owner, owner_spec = self.get_submodule(str(other)), self.specs[other]
        assert isinstance(owner_spec, TiedLayerSpec)
        for theirs, ours in _pair_attributes(owner_spec.tied_weight_attr, spec.tied_weight_attr):
            name = _tensor_name(module, ours, place, spec)
            first = owner.get_parameter(_tensor_name(owner, theirs, other, owner_spec))
            mine = module.get_parameter(name)
            if (first.shape, first.dtype) != (mine.shape, mine.dtype):
                raise TieError(
                    f"key {spec.key!r} ties {other}.{theirs} {_about(first)} to {place}.{ours} {_about(mine)}\n"
                    "  tied parameters have one shape and dtype; correct the arguments or tie other attributes"
                )
            holder, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(holder), leaf, first)


def build_sequence(layers: Sequence[LayerSpec | Callable[..., Any]]) -> SpecSequential:
    """Build a hand-written sequence without memory.

    Raises:
        SpecError: ``layers`` is no sequence of specs, modules and callables.
    """
    if not isinstance(layers, Sequence) or isinstance(layers, str):
        raise SpecError(
            f"compile got a {type(layers).__name__}, neither a module nor a sequence of layers\n"
            "  pass an nn.Module (built under torch.device('meta') to need no memory), or a list of LayerSpec"
        )
    with torch.device("meta"):
        return SpecSequential(layers)


def _check_sequence(specs: tuple[object, ...]) -> None:
    if not specs:
        raise SpecError("the sequence of layers is empty\n  give at least one LayerSpec")
    for place, spec in enumerate(specs):
        if isinstance(spec, LayerSpec) and spec.typename is None:
            raise SpecError(
                f"place {place} of the sequence is the captured layer {spec.fqn!r}, which has no class to build\n"
                "  describe it by class and arguments: LayerSpec(cls, ...)"
            )
        if isinstance(spec, type) or not (isinstance(spec, LayerSpec) or callable(spec)):
            raise SpecError(
                f"place {place} of the sequence is {spec!r}, which is no layer\n"
                "  give a LayerSpec, a TiedLayerSpec, a module or a function; wrap a class: LayerSpec(cls, ...)"
            )


def _pair_attributes(theirs: tuple[str, ...], ours: tuple[str, ...]) -> list[tuple[str, str]]:
    """Which attributes are one tensor: those of one name, or by position where no name agrees."""
    same = [(attr, attr) for attr in ours if attr in theirs]
    return same if same or len(theirs) != len(ours) else list(zip(theirs, ours, strict=True))


def _tensor_name(module: nn.Module, attr: str, place: int, spec: TiedLayerSpec) -> str:
    """The registered name of the parameter that ``attr`` reads; ``attr`` may be dotted, or a property."""
    found: Any = module
    for part in attr.split("."):
        found = getattr(found, part, None)
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if parameter is found:
            return name
    known = ", ".join(name for name, _ in module.named_parameters()) or "none"
    raise TieError(
        f"key {spec.key!r} ties the attribute {attr!r} of place {place}, but {type(module).__name__} has no such "
        f"parameter\n  its parameters are: {known}"
    )


def _about(parameter: nn.Parameter) -> str:
    return f"{tuple(parameter.shape)} {str(parameter.dtype).removeprefix('torch.')}"
