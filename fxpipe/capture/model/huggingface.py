"""What is known of Hugging Face's models by name, because their behaviour does not show it: the only such file.

A model on meta has no tied tensors until its weights are loaded: the names of its ties are all there is. A cache is
filled unless the configuration says otherwise: seen from the forward it is one object that all blocks share.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn


def declared_ties(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield ``(fqn, source)`` of ties that Hugging Face models declare by name (``_tied_weights_keys``)."""
    for prefix, part in model.named_modules():
        expand = getattr(part, "get_expanded_tied_weights_keys", None)  # patterns as names, none where not wanted
        if expand is None or not isinstance(getattr(part, "_tied_weights_keys", None), Mapping):
            continue
        start = f"{prefix}." if prefix else ""
        yield from ((f"{start}{fqn}", f"{start}{source}") for fqn, source in expand().items())


def switch_caches_off(module: nn.Module) -> tuple[Any, ...]:
    """Hugging Face models fill key-value caches by default, one Python object that all blocks share.

    In training a cache is dead weight, and one made during capture would carry a microbatch into the next. Gives the
    configurations that had them on.
    """
    switched: dict[int, Any] = {}
    for part in module.modules():
        config = getattr(part, "config", None)
        for each in (config, *(vars(config).values() if hasattr(config, "__dict__") else ())):
            if getattr(each, "use_cache", False) is True:
                each.use_cache = False
                switched[id(each)] = each
    return tuple(switched.values())
