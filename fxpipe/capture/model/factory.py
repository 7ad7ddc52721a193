"""Call a user's ``build()``, as a rule so that the model it makes has no memory."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fxpipe.errors import SpecError
from fxpipe.ir.spec import LayerSpec


def build(factory: Callable[[], Any], device: str = "meta") -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Call ``factory`` with meta (or another device) as the default device.

    Args:
        factory: Returns a model (an ``nn.Module`` or a sequence of specs), or ``(model, args, kwargs)``.
        device: The default device meanwhile.

    Returns:
        Model, example arguments and example keyword arguments of one global batch; empty where it gave none.

    Raises:
        SpecError: It returned something else.

    >>> model, args, kwargs = build(lambda: (nn.Linear(10**6, 10**6), (torch.zeros(8, 10**6),), {}))
    >>> model.weight.device, args[0].device
    (device(type='meta'), device(type='meta'))
    """
    with torch.device(device):
        built = factory()
    model, args, kwargs = built, (), {}
    if isinstance(built, tuple) and 2 <= len(built) <= 3 and _is_model(built[0]) and isinstance(built[1], tuple | list):
        model, args, kwargs = (*built, {})[:3]
    if not _is_model(model) or not isinstance(kwargs, Mapping):
        raise SpecError(
            f"the factory returned {type(built).__name__}, not a model\n"
            "  return a module, or (module, args, kwargs) with the example inputs of one batch"
        )
    return model, tuple(args), dict(kwargs)


def _is_model(thing: object) -> bool:
    if isinstance(thing, nn.Module):
        return True
    layers = isinstance(thing, Sequence) and not isinstance(thing, str)
    return layers and any(isinstance(part, LayerSpec) for part in thing)  # type: ignore[attr-defined]
