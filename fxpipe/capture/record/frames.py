"""Where in the model the forward stands: the stack of module calls, the names of what happens there, and the draws.

Invariants:

- A call's name, and the identity of a draw, depend on where in the model it is made and on how often that was reached
  before: never on the grain, the partition, the process or the batch.
- Inside of a block all is numbered from the block's own call, so that a block called again draws other numbers and
  layers keep their names.
- ``functions`` and ``drew`` of a frame hold the calls of that module's own forward alone, recorded or not.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from torch import fx, nn

from fxpipe.program import Draw, DrawScope


@dataclass(slots=True, eq=False)
class Frame:
    """One call of one module.

    Attributes:
        fqn: First FQN of the module.
        module: The module.
        call: Which call of it in this forward, from 0.
        block: FQN of the block the call lies in (or is), ``""`` outside of blocks.
        block_call: Which call of that block.
        block_module_call: Which call of the module within the block call.
        first_calls: How often each module had been called in the block when this call began.
        functions: Names of the torch functions called so far, directly by this module's forward.
        drew: Positions in ``functions`` of those that drew random numbers.
        inside: Modules called inside that drew, in order.
        names: How often each operation name was given.
        given: Of an opened block: the nodes of the tensors it was given, read in it or not.
    """

    fqn: str
    module: nn.Module
    call: int = 0
    block: str = ""
    block_call: int = 0
    block_module_call: int = 0
    first_calls: dict[str, int] = field(default_factory=dict)
    functions: list[str] = field(default_factory=list)
    drew: list[int] = field(default_factory=list)
    inside: dict[str, None] = field(default_factory=dict)
    names: dict[str, int] = field(default_factory=dict)
    given: tuple[fx.Node, ...] = ()

    def name(self, operation: str) -> str:
        """Give the next call of an operation its name, ``"transformer.h.0.attn.softmax_1"``; never that of a module."""
        short = operation.strip("_") or operation
        while True:
            count = self.names.get(short, 0)
            self.names[short] = count + 1
            numbered = f"{short}_{count}" if count else short
            if numbered not in self.module._modules:
                return f"{self.fqn}.{numbered}" if self.fqn else numbered

    def clear(self) -> None:
        """Forget what happened in the call: it is made again."""
        self.functions.clear()
        self.drew.clear()
        self.inside.clear()
        self.names.clear()


class Frames:
    """The stack of module calls of one forward, and every call that was made."""

    def __init__(self, root: nn.Module, blocks: Iterable[str]) -> None:
        self.stack = [Frame("", root)]
        self.all = [self.stack[0]]
        self._blocks = frozenset(blocks)
        self._calls: dict[str, int] = {}
        self._in_block: dict[str, int] = {}

    @property
    def top(self) -> Frame:
        """The innermost call."""
        return self.stack[-1]

    def enter(self, fqn: str, module: nn.Module) -> Frame:
        """Begin a call of a module."""
        outer = self.top
        call = self._calls.get(fqn, 0)
        block, block_call = outer.block, outer.block_call
        if not block and fqn in self._blocks:
            block, block_call, self._in_block = fqn, call, {}
        earlier = self._in_block if block else self._calls
        frame = Frame(fqn, module, call, block, block_call, earlier.get(fqn, 0), dict(earlier))
        earlier[fqn] = earlier.get(fqn, 0) + 1
        self._calls[fqn] = call + 1
        self.stack.append(frame)
        self.all.append(frame)
        return frame

    def leave(self) -> None:
        """End the innermost call."""
        frame = self.stack.pop()
        self.top.inside.update(frame.inside)
        if frame.drew:
            self.top.inside[frame.fqn] = None

    def push_named(self, fqn: str) -> Frame:
        """Begin something that is no module of the model (the loss function)."""
        taken = self.stack[0].module._modules
        while fqn in taken:
            fqn += "_"
        frame = Frame(fqn, nn.Module())
        self.stack.append(frame)
        self.all.append(frame)
        return frame

    def draw_names(self) -> tuple[str, ...]:
        """Give the names of all functions that drew random numbers."""
        return tuple(sorted({frame.functions[position] for frame in self.all for position in frame.drew}))

    def drawing(self, draw_names: tuple[str, ...]) -> dict[str, Literal["once", "each"]]:
        """Give the modules whose own forward draws, and how (see ``Program.drawing``)."""
        known = set(draw_names)
        found: dict[str, Literal["once", "each"]] = {}
        for frame in self.all:
            if frame.drew and frame.fqn:
                once = not frame.inside and sum(name in known for name in frame.functions) == 1
                earlier = found.get(frame.fqn, "once")
                found[frame.fqn] = "once" if once and earlier == "once" else "each"
        return found


def draw_at(frame: Frame, position: int, draw_names: tuple[str, ...]) -> Draw:
    """Give the identity of the draw that the function at ``position`` of a call makes."""
    index = sum(name in draw_names for name in frame.functions[:position])
    return Draw(frame.block, frame.block_call, frame.fqn, frame.block_module_call, index)


def scope_at(frame: Frame) -> DrawScope | None:
    """Give the scope of the draws inside a finished module call, None where nothing inside draws."""
    drawing = [*frame.inside, *([frame.fqn] if frame.drew else [])]
    if not drawing:
        return None
    first_calls = tuple((fqn, frame.first_calls.get(fqn, 0)) for fqn in drawing)
    return DrawScope(frame.block, frame.block_call, first_calls)
