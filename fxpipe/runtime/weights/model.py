"""The model as files see it: its tensors by name, with those that a wrapper added told from its own."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from fxpipe.runtime.build.state import StateNames
from fxpipe.runtime.build.wrappers import inner_modules, is_peft, plain_name


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """The whole model's structure, the same on every rank.

    Attributes:
        module: The model with fake tensors.
        names: The names of its tensors.
    """

    module: nn.Module
    names: StateNames

    @property
    def name(self) -> str:
        """Name of its class; of the model inside a wrapper of peft."""
        return type(self.plain_root()[1]).__qualname__

    def plain_root(self) -> tuple[str, nn.Module]:
        """Give the FQN of the model without the wrapper around it, and that model."""
        if not is_peft(self.module):
            return "", self.module
        base = self.module.get_base_model()  # type: ignore[operator]
        return next(fqn for fqn, part in self.module.named_modules() if part is base), base

    def plain_names(self) -> dict[str, tuple[str, ...]]:
        """Give the first FQNs that stand for each name of the plain model, as files name it.

        Without a wrapper every name stands for itself. A module that is trained beside its original
        (``modules_to_save``) starts as a copy of it, so its name has several.
        """
        prefix, _ = self.plain_root()
        start = f"{prefix}." if prefix else ""
        moved = dict(inner_modules(self.module))
        found: dict[str, dict[str, None]] = {}
        for first, tensor in self.names.tensors.items():
            for fqn in tensor.fqns:
                plain = plain_name(fqn, moved)
                if plain is not None and plain.startswith(start):
                    found.setdefault(plain[len(start) :], {})[first] = None
        return {plain: tuple(firsts) for plain, firsts in found.items()}

    def added(self) -> frozenset[str]:
        """Give the first FQNs of the tensors that a wrapper added: no file of the plain model has them."""
        if not any(inner_modules(self.module)):
            return frozenset()
        plain = {first for firsts in self.plain_names().values() for first in firsts}
        return frozenset(first for first in self.names.tensors if first not in plain)
