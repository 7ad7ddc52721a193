"""The graphs of a model on its plan: which one a microbatch takes, recorded where there is none yet.

A ``Variant`` is a graph for one set of shapes, one training mode and one set of answers to what Python reads. From the
second set of shapes on a graph is recorded with sizes as symbols, where the model allows it, and each further set gets
its variant without the model's forward.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import FunctionType
from typing import Any

from fxpipe.batch.inputs import Inputs, Kind
from fxpipe.capture.calls.ambient import Ambient
from fxpipe.capture.calls.reads import answer_of
from fxpipe.capture.capture import Capture, Captured
from fxpipe.capture.cut.placement import Holders
from fxpipe.capture.graph.reading import Read, read_again
from fxpipe.capture.graph.symbolic import reads_alike
from fxpipe.capture.model.settings import functions_within, settings_of
from fxpipe.capture.numbers import with_numbers
from fxpipe.capture.shapes import Elsewhere, with_symbols
from fxpipe.errors import CaptureError
from fxpipe.program import Program

MOST_VARIANTS = 64
"""Variants kept: each costs a few MiB where it was recorded, and a recording to get back."""
MOST_SETTINGS = 8
"""How often what the script sets may be another one before that is said."""
MOST_NUMBERS = 16
"""How often Python numbers may turn out to be other ones before each value gets a graph of its own."""
MOST_GENERAL = 16
"""Kinds of batches, sizes aside, for which graphs with symbols are kept."""
MOST_RECORDED = 4
"""Graphs with numbers of one kind that the next one with symbols may be held against."""
MOST_FAMILIES = 8
"""Graphs with symbols that are kept of one kind."""
MOST_TRIES = 2
"""Graphs with symbols that are tried in vain for one kind before each shape is recorded by itself."""


@dataclass(frozen=True, slots=True)
class Around:
    """What a variant is for besides its inputs.

    Attributes:
        shared: What all ranks have alike: modes, and whether there is a loss.
        own: What the script has set on this rank; it may be another thing on each of them, such as a rank's number.
    """

    shared: tuple[Any, ...]
    own: tuple[Any, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Variant:
    """One recorded graph, cut by the plan.

    Attributes:
        key: What it is on every rank alike.
        runs: Names what the stages of this rank run for it, which variants that differ in sizes alone share.
        program: The graph of each stage.
        answers: What Python read from the inputs; another answer needs another variant.
        read: Reads it again from named inputs; None if nothing was read.
        alone: Gives the same graph as a program of one stage.
        captured: What it was made of.
    """

    key: str
    runs: str
    program: Program
    answers: tuple[Any, ...]
    read: Read | None
    alone: Callable[[], Program]
    captured: Captured

    @property
    def name(self) -> tuple[str, str]:
        """Name it among those of this rank."""
        return self.key, self.runs

    def fits(self, inputs: Inputs) -> bool:
        """Tell whether a microbatch takes this graph."""
        return _answers(self.read, inputs, self.answers)

    def whole(self) -> Variant:
        """Give the same graph on one stage."""
        return replace(self, key=f"{self.key} whole", runs=f"{self.runs} whole", program=self.alone())


@dataclass(frozen=True, slots=True, eq=False)
class _Family:
    """A graph with sizes as symbols: the variants that differ in sizes alone.

    Attributes:
        captured: The graph.
        program: Cut by the plan, in the sizes it was recorded with.
        read: Reads what decides the path from the inputs' values.
        answers: What it must be.
        read_sizes: Reads what decides the path from tensors that are made of sizes alone.
        size_answers: What it must be.
        key: Names the family.
        around: What it is for besides its inputs.
        is_shared: Whether what the stages run is the same for all sizes.
    """

    captured: Captured
    program: Program
    read: Read | None
    answers: tuple[Any, ...]
    read_sizes: Read | None
    size_answers: tuple[Any, ...]
    key: str
    around: Around
    is_shared: bool

    @classmethod
    def of(cls, captured: Captured, program: Program, kind: Any, around: Around) -> _Family:
        """Make the family of a graph for batches of one kind."""
        symbolic = captured.symbolic
        assert symbolic is not None
        read, guards = captured.guards(program)
        read_sizes = read_again(captured.observation.recorder, symbolic.conditions)
        answers = tuple(guard.answer for guard in guards)
        size_answers = tuple(guard.answer for guard in symbolic.conditions)
        key = _digest(kind, around.shared, answers, size_answers, symbolic.guards_text)
        parts = captured, program, read, answers, read_sizes, size_answers
        return cls(*parts, key, around, symbolic.keeps_strides(program))

    def member(self, inputs: Inputs, signature: Any) -> Variant | None:
        """Give the variant of a microbatch; None where the graph does not hold for it."""
        symbolic = self.captured.symbolic
        assert symbolic is not None
        values = symbolic.symbols.values(inputs.shapes)
        if values is None or not _answers(self.read, inputs, self.answers):
            return None
        if not _answers(self.read_sizes, inputs, self.size_answers):
            return None
        captured = self.captured

        def alone() -> Program:
            return symbolic.at(captured.program({}, 1), values)

        runs = _digest(self.key if self.is_shared else (signature, self.key), self.around.own)
        program = symbolic.at(self.program, values)
        key = _agreed(signature, self.around.shared, self.answers, program)
        return Variant(key, runs, program, self.answers, self.read, alone, captured)


@dataclass(slots=True, eq=False)
class _Kind:
    """What is known of batches that differ in sizes alone; with Python numbers as inputs of the graphs also in those.

    Attributes:
        recorded: Variants that were recorded with fixed sizes, of no family so far, and the shapes of their inputs.
        families: Graphs with symbols.
        tries: How often one was recorded in vain; half of one where no recording had taken its path.
    """

    recorded: list[tuple[Variant, Mapping[str, tuple[int, ...]]]] = field(default_factory=list)
    families: list[_Family] = field(default_factory=list)
    tries: float = 0


class Variants:
    """Finds the variant a microbatch takes, and captures it where there is none yet.

    Args:
        capture: The live model.
        stage_of_layer: The plan's stage of each layer, by name.
        num_stages: Number of stages.
        opened: Blocks that a cut crosses.
        holders: Stages that hold each tensor of the model, by any of its names.

    Attributes:
        num_captures: Forwards that were recorded for batches.
        example: Kinds of the tensors of the example, by name; empty without one.
        settings: What the script has set on modules of this rank's stages that are never called: name and value.
    """

    def __init__(
        self,
        capture: Capture,
        stage_of_layer: Mapping[str, int],
        num_stages: int,
        opened: Sequence[str],
        holders: Holders | None = None,
    ) -> None:
        self.capture = capture
        self.num_captures = 0
        self.example: Mapping[str, Kind] = {}
        self._stage_of_layer = dict(stage_of_layer)
        self._num_stages = num_stages
        self._opened = tuple(opened)
        self._holders = holders
        self._known: dict[Any, list[Variant]] = {}
        self._numbers: dict[
            Any, tuple[int, Any]
        ] = {}  # by what numbers are open in: how often they were others, and last
        self._used: dict[tuple[str, str], Any] = {}  # what each variant is for, by its name; the one used last is last
        self._kinds: dict[Any, _Kind] = {}  # the one used last comes last
        self._output_dims: dict[Any, Mapping[str, int | None]] = {}
        self._mode = ""
        self.settings: tuple[tuple[str, str], ...] = ()
        self._functions: tuple[FunctionType, ...] | None = None  # of the modules that are opened
        self._own: tuple[Any, ...] = ()
        self._changes: dict[str, int] = {}  # how often what the script sets was another one, by path

    def add(self, captured: Captured, *, with_loss: bool) -> None:
        """Remember what ``compile`` captured already."""
        self.example = captured.inputs.kinds
        with replace(Ambient.now(), grad_enabled=True).entered():  # as it was recorded
            if captured.inputs.numbers:
                self._times(captured.inputs, with_loss)
            self._add(captured, captured.inputs, with_loss)

    @property
    def names(self) -> Collection[tuple[str, str]]:
        """The variants that are kept."""
        return self._used.keys()

    @property
    def programs(self) -> set[str]:
        """What the stages run for them."""
        return {variant.runs for variants in self._known.values() for variant in variants}

    def mode_changed(self) -> None:
        """Look at the modules' training flags again."""
        flags = bytes(part.training for part in self.capture.skeleton.module.modules())
        self._mode = hashlib.sha256(flags).hexdigest()[:16]

    def find_all(self, microbatches: Sequence[Inputs], *, with_loss: bool) -> tuple[Variant, ...]:
        """Give the variant of each microbatch of a step; as ``find``.

        What is found is for the mode that gradients are in: a model may ask for it, and take another path.
        """
        around = self._around(with_loss)
        found: list[Variant] = []
        before: Inputs | None = None
        for inputs in microbatches:
            # One batch's microbatches share what is known of them, and nothing is read of most.
            alike = before is not None and inputs.signature is before.signature and found[-1].read is None
            found.append(found[-1] if alike else self.find(inputs, with_loss=with_loss, around=around))
            before = inputs
        return tuple(found)

    def find(self, inputs: Inputs, *, with_loss: bool, around: Around | None = None) -> Variant:
        """Give the variant of a microbatch.

        Args:
            inputs: The microbatch.
            with_loss: Whether a loss is computed (training) or the model's output.
            around: What else a variant is for, where that is known already.

        Raises:
            CaptureError: The model does something else than when it was compiled, so that its plan does not fit.
        """
        around = around or self._around(with_loss)
        spec = inputs.signature, around
        any_number = (inputs.open, around) if inputs.numbers else spec
        for each in (spec, any_number) if inputs.numbers else (spec,):
            for variant in self._known.get(each, ()):
                if variant.fits(inputs):
                    self._used[variant.name] = self._used.pop(variant.name, each)
                    return variant
        for each, given in ((spec, inputs), (any_number, replace(inputs, follows=True))):
            member = self._member(given, each[0], with_loss) if given is inputs or inputs.numbers else None
            if member is not None:
                return self._remember(each, member)
        self.num_captures += 1
        grad_enabled = with_loss and Ambient.now().grad_enabled
        options: dict[str, Any] = {"opened": self._opened, "with_loss": with_loss, "grad_enabled": grad_enabled}
        captured = self.capture.capture(inputs, **options)
        self._functions = None
        self._note_settings(around)
        if with_loss and not captured.structure.is_loss:
            raise CaptureError(
                f"{self.capture.name} returned no loss for this batch\n"
                "  pass labels (or whatever makes the model return one), or compile with loss_fn="
            )
        if inputs.numbers and 1 < self._times(inputs, with_loss) <= MOST_NUMBERS:
            self.num_captures += 1
            followed = with_numbers(self.capture, captured, **options)
            if followed is not None:
                return self._add(followed, followed.inputs, with_loss)
        return self._add(captured, inputs, with_loss)

    def _note_settings(self, around: Around) -> None:
        """Say once that a number which the script sets anew each step has the model recorded anew.

        Warns:
            UserWarning: Names it, and says how it becomes an input.
        """
        before, now = (dict(pair for part in own for pair in part) for own in (self._own or around.own, around.own))
        self._own = around.own
        for path in (path for path, value in now.items() if path in before and before[path] != value):
            self._changes[path] = self._changes.get(path, 0) + 1
            if self._changes[path] == MOST_SETTINGS:
                warnings.warn(
                    f"{path.lstrip('.')}, which the loss function or the forward finds outside of its arguments, is "
                    f"another one for the {MOST_SETTINGS}th time: each value has {self.capture.name} recorded anew\n"
                    "  a number that changes from step to step is an input: pass it as an argument of the forward, or "
                    "in target (target=(labels, weight))",
                    UserWarning,
                    stacklevel=2,
                )

    def output_dims(self, variant: Variant, inputs: Inputs) -> Mapping[str, int | None]:
        """Give the outputs' dimensions of samples, by path, as ``Capture.output_dims``: recorded once."""
        key = variant.name, tuple(inputs.dims.items()), inputs.samples
        found = self._output_dims.get(key)
        if found is None:
            found = self._output_dims[key] = self.capture.output_dims(variant.captured, inputs)
            if len(self._output_dims) > MOST_VARIANTS:
                del self._output_dims[next(iter(self._output_dims))]
        return found

    def _times(self, inputs: Inputs, with_loss: bool) -> int:
        """Count the captures with other numbers than the one before, whatever their sizes."""
        key, now = (inputs.open_without_sizes, self._around(with_loss)), tuple(inputs.numbers.values())
        times, last = self._numbers.pop(key, (0, None))
        times += int(now != last)
        self._numbers[key] = times, now
        if len(self._numbers) > MOST_VARIANTS:
            del self._numbers[next(iter(self._numbers))]
        return times

    def _add(self, captured: Captured, inputs: Inputs, with_loss: bool) -> Variant:
        """Remember a variant that was recorded with fixed sizes, for others to be held against."""
        signature = inputs.open if inputs.follows else inputs.signature
        spec, kind = (signature, self._around(with_loss)), self._kind(inputs, with_loss)
        variant = self._remember(spec, self._variant(captured, *spec))
        kind.recorded = [*kind.recorded, (variant, inputs.shapes)][-MOST_RECORDED:] if kind.tries < MOST_TRIES else []
        return variant

    def _variant(self, captured: Captured, signature: Any, around: Around) -> Variant:
        program = self._program(captured)
        read, guards = captured.guards(program)
        answers = tuple(guard.answer for guard in guards)
        captured, runs = _without_values(captured), _digest(signature, around.shared, answers, around.own)
        key = _agreed(signature, around.shared, answers, program)
        return Variant(key, runs, program, answers, read, lambda: captured.program({}, 1), captured)

    def _member(self, inputs: Inputs, signature: Any, with_loss: bool) -> Variant | None:
        """Give the variant of a microbatch without recording it by itself; None where sizes are no symbols."""
        kind = self._kind(inputs, with_loss)
        for family in kind.families:
            variant = family.member(inputs, signature)
            if variant is not None:
                return variant
        known = [each for each in kind.recorded if each[1] != inputs.shapes and not each[0].captured.observation.left]
        if not known or kind.tries >= MOST_TRIES:
            return None
        self.num_captures += 1
        bases = [(variant.captured, shapes) for variant, shapes in known]
        try:
            captured = with_symbols(self.capture, bases, inputs, with_loss=with_loss)
        except Elsewhere:
            kind.tries += 1 / 2
            return None
        if captured is None:
            kind.tries += 1
            return None
        program = self._program(captured)
        if captured.observation.sizes_sent(program):
            kind.tries += 1
            return None
        *alike_in, around = self.kind_of(inputs, with_loss)
        family = _Family.of(_without_values(captured), program, (alike_in, len(kind.families)), around)
        kind.families = [*kind.families, family][-MOST_FAMILIES:]
        alike = captured.symbolic.guards if captured.symbolic is not None else ()
        kind.recorded = [each for each in known if not reads_alike(each[0].captured.observation.guards, alike)]
        return family.member(inputs, signature)

    def _remember(self, spec: Any, variant: Variant) -> Variant:
        """Keep a variant, and let go of those that were not used for longest."""
        self._known.setdefault(spec, []).append(variant)
        self._used[variant.name] = spec
        while len(self._used) > MOST_VARIANTS:
            name = next(iter(self._used))
            old = self._used.pop(name)
            self._known[old] = [other for other in self._known[old] if other.name != name]
            if not self._known[old]:
                del self._known[old]
        return variant

    def _kind(self, inputs: Inputs, with_loss: bool) -> _Kind:
        """Give what is known of batches like this one, and let go of the kind that was not used for longest."""
        key = self.kind_of(inputs, with_loss)
        self._kinds[key] = found = self._kinds.pop(key, None) or _Kind()
        if len(self._kinds) > MOST_GENERAL:
            del self._kinds[next(iter(self._kinds))]
        return found

    def kind_of(self, inputs: Inputs, with_loss: bool) -> tuple[bool, Any, Around]:
        """Give what is equal for microbatches that differ by no more than sizes."""
        signature = inputs.open_without_sizes if inputs.follows else inputs.without_sizes
        return inputs.follows, signature, self._around(with_loss)

    def _around(self, with_loss: bool) -> Around:
        """Give what a variant is for besides its inputs; looked at once for all microbatches of a step."""
        if not self._mode:
            self.mode_changed()
        now = Ambient.now()
        grad_enabled = with_loss and now.grad_enabled
        loss_fn = self.capture.loss_fn if with_loss else None
        model = self.capture.skeleton.module
        if self._functions is None:
            self._functions = functions_within(model, self.capture.closed_modules(self._opened))
        settings = settings_of(loss_fn), settings_of(model.forward, self._functions), self.settings
        return Around((with_loss, grad_enabled, self._mode, now.autocast, now.attention, self.capture.dtype), settings)

    def _program(self, captured: Captured) -> Program:
        return captured.program(self._stage_of_layer, self._num_stages, self._holders)


def _answers(read: Read | None, inputs: Inputs, answers: tuple[Any, ...]) -> bool:
    """Tell whether what is read of inputs is what it must be."""
    if read is None:
        return True
    try:
        return tuple(answer_of(value) for value in read(inputs.values)) == answers
    except (RuntimeError, IndexError, ValueError, TypeError):  # a shape that this path never has
        return False


def _without_values(captured: Captured) -> Captured:
    """Let go of the tensors that a graph was recorded with: it is cut."""
    captured.observation.recorder.forget()
    return replace(captured, inputs=captured.inputs.without_values())


def _agreed(signature: Any, shared: tuple[Any, ...], answers: tuple[Any, ...], program: Program) -> str:
    """Name what ranks must have alike: what a batch is, its path, and what crosses between stages.

    Whether a graph was recorded with symbols for sizes may be another thing on each rank: where the script sets
    something on one of them, that one has recorded others.
    """
    crossing = [[(each.meta, each.strides, each.ends) for each in stage.sent] for stage in program.stages]
    return _digest(signature, shared, [answer for answer in answers if isinstance(answer, bool)], crossing)


def _digest(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
