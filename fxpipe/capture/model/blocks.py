"""Which modules are recorded as one call, and which are opened."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from fxpipe.errors import CaptureError
from fxpipe.ir.canonical import import_path


@dataclass(frozen=True, slots=True)
class Leaves:
    """Modules recorded as one call, by first FQN.

    Attributes:
        blocks: The repeated units of the model, and modules that stand beside them: what block grain keeps whole.
        closed: What is recorded as one call.
        kept: What the user, or the capture itself, says must never be opened.
    """

    blocks: frozenset[str]
    closed: frozenset[str]
    kept: frozenset[str] = frozenset()

    def around(self, fqn: str) -> str:
        """Give what a module is recorded in: itself, or what is closed around it; ``""`` for one that is opened."""
        parts = fqn.split(".")
        names = (".".join(parts[:length]) for length in range(1, len(parts) + 1))
        return next((name for name in names if name in self.closed), "")

    def can_close(self, fqn: str) -> bool:
        """Whether a module may be recorded as one call without taking blocks of the model with it."""
        return bool(fqn) and not any(block.startswith(f"{fqn}.") for block in self.blocks)


def block_fqns(model: nn.Module) -> tuple[str, ...]:
    """Give the FQNs of the blocks: children of ``ModuleList``s (the outermost), and modules with no such list below.

    What a ``Sequential`` repeats is a block too, whatever it lists inside.

    >>> model = nn.ModuleDict({"embed": nn.Embedding(4, 2), "h": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])})
    >>> block_fqns(model)
    ('embed', 'h.0', 'h.1')
    """
    seen: set[int] = set()
    return tuple(_walk(model, "", seen))


def _walk(module: nn.Module, prefix: str, seen: set[int], *, is_listed: bool = False) -> Iterator[str]:
    """Yield the blocks below a module; of one that a list repeats and that only holds others, each child is one."""
    repeated = _repeated(module) if isinstance(module, nn.Sequential) else frozenset()
    is_listed = is_listed or type(module) in _PLAIN_LISTS
    for name, child in module.named_children():
        fqn = f"{prefix}.{name}" if prefix else name
        if id(child) in seen:
            continue
        if type(child) in repeated:
            seen.add(id(child))
            yield fqn
        elif is_listed and _is_folder(child):
            yield from _walk(child, fqn, seen, is_listed=True)
        elif is_listed and not (isinstance(child, nn.Sequential) and len(child) > 1):
            seen.add(id(child))
            yield fqn
        elif (
            isinstance(child, nn.Sequential)
            or type(child) in _PLAIN_LISTS
            or _is_folder(child)
            or any(_is_list_of_blocks(part) for part in child.modules())
        ):
            yield from _walk(child, fqn, seen)
        else:
            seen.add(id(child))
            yield fqn


def _is_folder(module: nn.Module) -> bool:
    """Whether a module only holds others: it has no forward, so that it is never called."""
    return type(module).forward is nn.Module.forward and any(True for _ in module.children())


_PLAIN_LISTS = (nn.ModuleList, nn.ModuleDict)
_LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


def _repeated(module: nn.Module) -> frozenset[type]:
    counts = Counter(type(child) for child in module.children() if not isinstance(child, _LISTS))
    return frozenset(kind for kind, count in counts.items() if count > 1)


def _is_list_of_blocks(module: nn.Module) -> bool:
    """Whether a module lists several others; a ``Sequential`` of plain layers is part of a block, no list of them."""
    if not isinstance(module, _LISTS) or len(module) < 2:
        return False
    return not isinstance(module, nn.Sequential) or any(len(list(child.children())) for child in module.children())


def choose_leaves(
    model: nn.Module, grain: str, *, opened: Sequence[str] = (), patterns: Sequence[object] = ()
) -> Leaves:
    """Choose what is recorded as one call.

    Args:
        model: The user's model, or the copy of it.
        grain: ``"block"``: the blocks; ``"op"``: every module without children.
        opened: With ``"block"``: FQNs of blocks that are opened all the same.
        patterns: Classes, class names and FQN patterns (``"model.layers.*"``) that are never opened.

    Returns:
        The choice, by first FQN.

    Raises:
        CaptureError: A pattern matches no module.
    """
    blocks = block_fqns(model)
    kept = _matching(model, patterns)
    inside = tuple(f"{fqn}." for fqn in opened)
    within = {
        id(part)  # a module that is shared has other names too, and is opened with each block around it
        for fqn, part in model.named_modules(remove_duplicate=False)
        if fqn in opened or fqn.startswith(inside)
    }
    closed = set(kept)
    for fqn, part in model.named_modules():
        if not fqn:
            continue
        fine = grain == "op" or id(part) in within
        if (not fine and fqn in blocks) or (fine and is_op(part)):
            closed.add(fqn)
    return Leaves(frozenset(blocks), frozenset(closed), frozenset(kept))


def is_op(module: nn.Module) -> bool:
    """Whether op grain keeps the module whole: nothing inside, or one of torch's that computes as one operation."""
    return not any(True for _ in module.children()) or isinstance(module, nn.MultiheadAttention | nn.RNNBase)


def _matching(model: nn.Module, patterns: Sequence[object]) -> set[str]:
    kept: set[str] = set()
    for pattern in patterns:
        found = [fqn for fqn, part in model.named_modules() if fqn and _matches(fqn, part, pattern)]
        if not found:
            named = pattern.__qualname__ if isinstance(pattern, type) else repr(pattern)
            raise CaptureError(
                f"leaves= names {named}, which no module of {type(model).__qualname__} matches\n"
                "  give a module class, its name, or a pattern of FQNs such as 'model.layers.*.attention'"
            )
        kept.update(found)
    return kept


def _matches(fqn: str, module: nn.Module, pattern: object) -> bool:
    if isinstance(pattern, type):
        return isinstance(module, pattern)
    if not isinstance(pattern, str):
        return False
    names = (cls.__qualname__ for cls in type(module).__mro__[:-1])
    return fnmatch.fnmatchcase(fqn, pattern) or pattern in names or pattern == import_path(type(module))
