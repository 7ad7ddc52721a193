"""The forward that is being recorded: the one live object that everything which sees a part of it takes."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from fxpipe._torch import without_functions
from fxpipe.capture.calls.blocked import Blocked, asks_for_accelerator, user_line
from fxpipe.capture.calls.counting import LayerCounter
from fxpipe.capture.calls.scalars import bare
from fxpipe.capture.calls.symbols import Symbols
from fxpipe.capture.calls.values import Edges, Reach, reach_of, tensors_in
from fxpipe.capture.calls.watch import Watch
from fxpipe.capture.model.blocks import Leaves
from fxpipe.capture.model.preserve import Attributes, python_random_state
from fxpipe.capture.model.skeleton import Skeleton
from fxpipe.capture.record.counts import Counts
from fxpipe.capture.record.frames import Frame, Frames
from fxpipe.capture.record.node import Selections
from fxpipe.capture.record.recorder import Recorder
from fxpipe.capture.record.side_channels import SideChannels


@dataclass(frozen=True, slots=True, eq=False)
class Guard:
    """One read and its answer: the recorded graph holds only where the same read gives the same answer.

    Attributes:
        node: The call that reads; its value is what Python saw.
        answer: What it saw, in a form that can be compared.
        where: File and line of the user's code.
    """

    node: fx.Node
    answer: Any
    where: str = ""

    @property
    def is_choice(self) -> bool:
        """Whether the answers are few: a truth value."""
        return isinstance(self.answer, bool)


@dataclass(frozen=True, slots=True, eq=False)
class Selected:
    """A value whose size values of inputs decide about, unknown to Python.

    Attributes:
        dims: The dimensions that they decide about.
        guards: Reads that tell that size; they are no guards yet.
    """

    dims: tuple[int, ...]
    guards: tuple[Guard, ...]


@dataclass(slots=True, eq=False)
class Forward:
    """What is known of the forward while it runs.

    Attributes:
        skeleton: The copy of the model.
        leaves: What is recorded as one call.
        recorder: The graph as it grows.
        frames: Where in the model the forward stands.
        watch: What runs below Python.
        side_channels: What passes between calls recorded whole beside their arguments.
        counts: Counts each recorded call, when the forward is over.
        attributes: What the modules held before.
        progress: Called with the FQN of each block whose call ends.
        guards: What Python read from values that depend on inputs, so far.
        opened: Modules whose inside was recorded.
        hooks: Hooks on tensors: the call that set each, and its handle.
        quiet: FQN of what is recorded whole and running: nothing inside it is recorded.
        counting: Whether a call is made again to be counted: nothing is noted at all.
        on_zeros: While a module computes on zeros: the FQN that each module of its copy stands for, by ``id``.
        has_drawn: Whether random numbers were drawn in what is recorded whole.
        has_read: Whether Python looked at values in what is recorded whole.
        attention: Forms of the attention calls in the call that is being made.
        dtype: torch's default dtype when the forward began.
        python_random: State of Python's and numpy's generators, as far as it was looked at.
        python_draw: Where in the user's code they were drawn from.
        notes: What the report should say.
        numbers: Whether Python numbers among the inputs are followed.
        blocked: The first thing that could not be recorded; a bare ``except`` of the user's may have swallowed it.
        symbols: The same forward with symbols for sizes, where it is followed.
        floats: Inputs of floating point, fake, with their values where those are known and few.
        selections: Calls whose result has a shape that values of inputs decide about.
        functions: What custom autograd functions gave in the call that is being made, by their nodes.
    """

    skeleton: Skeleton
    leaves: Leaves
    recorder: Recorder
    frames: Frames
    watch: Watch
    side_channels: SideChannels
    counts: Counts
    attributes: Attributes
    progress: Callable[[str], None] | None = None
    guards: list[Guard] = field(default_factory=list)
    opened: set[str] = field(default_factory=set)
    hooks: list[tuple[fx.Node, Any]] = field(default_factory=list)
    quiet: str | None = None
    counting: bool = False
    on_zeros: dict[int, str] = field(default_factory=dict)
    has_drawn: bool = False
    has_read: bool = False
    attention: list[str] = field(default_factory=list)
    dtype: torch.dtype = field(default_factory=torch.get_default_dtype)
    python_random: tuple[Any, ...] = field(default_factory=python_random_state)
    python_draw: str = ""
    notes: dict[str, None] = field(default_factory=dict)
    numbers: bool = False
    blocked: Blocked | None = None
    symbols: Symbols | None = None
    floats: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    selections: Selections = field(default_factory=Selections)
    functions: dict[Node, list[tuple[GradientEdge, torch.Tensor]]] = field(default_factory=dict)

    @classmethod
    def begin(
        cls,
        skeleton: Skeleton,
        leaves: Leaves,
        recorder: Recorder,
        counter: LayerCounter | None,
        attributes: Attributes,
        progress: Callable[[str], None] | None,
    ) -> Forward:
        """Give a forward of which nothing has run yet."""
        return cls(
            skeleton,
            leaves,
            recorder,
            Frames(skeleton.module, leaves.blocks),
            Watch(),
            SideChannels(recorder),
            Counts(counter, skeleton),
            attributes,
            progress,
        )

    @property
    def passes(self) -> bool:
        """Whether nothing is recorded now."""
        return self.quiet is not None or self.counting

    def fqn_of(self, module: nn.Module) -> str | None:
        """Give the FQN of a module of the model, or of the copy of one that computes on zeros; None for others."""
        return self.skeleton.module_fqns.get(id(module)) or self.on_zeros.get(id(module))

    def follow(self, func: Callable[..., Any], args: Any, kwargs: Any, result: Any, like: Any = None) -> None:
        """Make a call that is recorded with symbols for sizes, too; see ``Symbols.follow``.

        Raises:
            Untold: It cannot be made with them.
        """
        if self.symbols is None:
            return
        counting, self.counting = self.counting, True
        try:
            self.symbols.follow(func, args, kwargs, result, like)
        finally:
            self.counting = counting

    def bare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Give arguments with the numbers themselves in the place of those that are followed."""
        return bare(args, kwargs) if self.numbers else (args, kwargs)

    def sized(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Give arguments with numbers that know their symbols in the place of symbols."""
        return (args, kwargs) if self.symbols is None else (self.symbols.plain(args), self.symbols.plain(kwargs))

    def shape_of(self, tensor: torch.Tensor) -> tuple[int, ...]:
        """Give the shape of a tensor; where it is followed, as numbers that know what they are of the inputs' sizes."""
        return tuple(tensor.shape) if self.symbols is None else self.symbols.shape(tensor)

    def reads_quietly(self, *values: Any) -> list[torch.Tensor]:
        """Refuse what something recorded whole reads beside its arguments, and give the tensors it reads.

        Raises:
            Blocked: A tensor was neither given to it nor made by it.
        """
        tensors = tensors_in(*values)
        if not self.on_zeros:
            self.side_channels.check(tensors)
        return tensors

    def note_function(self, result: Any) -> None:
        """Note what a custom autograd function gave: its backward may give None for what it was given."""
        with without_functions():
            for tensor in tensors_in(result):
                if tensor.grad_fn is not None:
                    self.functions.setdefault(tensor.grad_fn, []).append((get_gradient_edge(tensor), tensor))

    def reach(self, result: Any, given: Edges, *, weights: bool = False) -> Reach:
        """Give to which of the tensors that a call was given the gradients of what it gave go.

        Args:
            result: What it gave.
            given: Where the gradients of those go that it was given, from before the call.
            weights: Whether it has trainable weights of its own.
        """
        tensors = tensors_in(result)
        reach = reach_of(tensors, given, self._dead_ends)
        self.functions.clear()
        lost = any(each.requires_grad and not places for each, places in zip(tensors, reach or (), strict=True))
        return None if lost and not weights else reach

    def _dead_ends(self, node: Node) -> Collection[int]:
        """Run the backward of a custom autograd function, and give to which of its inputs it gives None."""
        outputs = self.functions.get(node)
        if outputs is None:
            return ()
        found: list[int] = []

        def look(gradients: tuple[torch.Tensor | None, ...], _: object) -> None:
            found.extend(place for place, gradient in enumerate(gradients) if gradient is None)

        handle = node.register_hook(look)
        counting, self.counting = self.counting, True
        wanted = [GradientEdge(to, output) for to, output in node.next_functions if to is not None]
        ones = [torch.ones_like(tensor.detach()) for _, tensor in outputs]
        try:
            torch.autograd.grad([edge for edge, _ in outputs], wanted, ones, retain_graph=True, allow_unused=True)
        except Exception:  # whatever a backward raises that looks at values
            found.clear()
        finally:
            handle.remove()
            self.counting = counting
        return found

    def note_device(self, asked: str) -> None:
        """Note that opened code asks where a tensor lies: in a recording all lie on the CPU."""
        if not self.passes and asks_for_accelerator(asked):
            fqn = self.frames.top.fqn or "the model"
            self.notes[f"{fqn} asks for a tensor's {asked} ({user_line()}): it is recorded as on the CPU"] = None

    def noted(self, blocked: Blocked) -> None:
        """Complete an exception on its way out, and remember it."""
        blocked.where = blocked.where or user_line()
        self.blocked = self.blocked or blocked

    def check_python_random(self, frame: Frame) -> None:
        """Refuse what was drawn from Python's or numpy's generator: no seed of a microbatch's reaches those.

        Raises:
            Blocked: Something was.
        """
        if python_random_state() != self.python_random:
            blocked = Blocked("the forward draws from Python's or numpy's random generator", frame.fqn)
            blocked.where = self.python_draw
            raise blocked

    def check_dtype(self, frame: Frame) -> None:
        """Refuse another default dtype: the stages run with torch's own.

        Raises:
            Blocked: It was changed.
        """
        if torch.get_default_dtype() != self.dtype:
            raise Blocked("the forward changes torch's default dtype", frame.fqn)
