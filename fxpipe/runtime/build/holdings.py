"""What of the model a stage holds: modules it calls, tensors it reads, the modules that are there whole, and all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True, slots=True)
class StageParts:
    """What of the model a stage holds.

    Attributes:
        stage_index: Position of the stage in the pipeline.
        modules: FQNs of the modules it calls.
        attributes: FQNs of the parameters and buffers it reads directly.
    """

    stage_index: int
    modules: tuple[str, ...]
    attributes: tuple[str, ...]


class PartModule(nn.Module):
    """Stands where the model has a module of which a stage holds parts only.

    Its parts keep the model's names: of a list it gives those held, in order, and each under its index in the model. It
    has the model's numbers and words, for a script to find and set.
    """

    @classmethod
    def of(cls, original: nn.Module | None, *, training: bool) -> PartModule:
        """Make one for a module of the model; ``training`` where that is not known."""
        made = cls()
        for name, value in vars(original).items() if original is not None else ():
            if isinstance(value, bool | int | float | str):
                vars(made)[name] = value
        made.training = original.training if original is not None else training
        return made

    def __getitem__(self, index: int | str) -> nn.Module:
        return self.get_submodule(str(index))

    def __iter__(self) -> Iterator[nn.Module]:
        return self.children()

    def __len__(self) -> int:
        return len(self._modules)


def held_whole(skeleton: nn.Module, part: StageParts) -> set[str]:
    """Give the outermost modules of which the stage holds every tensor: another path through the model may call them.

    They stand in the stage as the model has them, though this one path goes through their parts.
    """
    called, attributes = set(part.modules), set(part.attributes)
    whole: set[str] = set()
    for fqn, module in skeleton.named_modules():
        if not fqn or not whole.isdisjoint(prefixes(fqn)):
            continue
        names = [f"{fqn}.{name}" for name in _tensor_names(module)]
        held = (name in attributes or not called.isdisjoint(prefixes(name)) for name in names)
        if names and all(held):
            whole.add(fqn)
    return whole


def prefixes(fqn: str) -> Iterator[str]:
    """Yield the FQNs of the modules around, outermost first, and the FQN itself."""
    parts = fqn.split(".")
    yield from (".".join(parts[:length]) for length in range(1, len(parts) + 1))


def _tensor_names(module: nn.Module) -> Iterator[str]:
    for prefix, part in module.named_modules(remove_duplicate=False):
        start = f"{prefix}." if prefix else ""
        for name, tensor in (*part._parameters.items(), *part._buffers.items()):
            if tensor is not None:
                yield start + name


def parts_of(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """List modules and what lies in them, each once, in the order of ``named_modules``, in a third of its time."""
    found: list[nn.Module] = []
    seen: set[int] = set()
    todo: list[nn.Module] = list(modules)[::-1]
    while todo:
        part = todo.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        found.append(part)
        if part._modules:
            todo.extend([child for child in reversed(part._modules.values()) if child is not None])
    return found
