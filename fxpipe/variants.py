"""Variants of a model on one plan: a graph for each mode, set of shapes and set of guard answers, captured once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fxpipe.batch.inputs import Inputs
from fxpipe.capture.capture import Capture, Captured
from fxpipe.capture.record.guards import answer_of
from fxpipe.capture.record.recorder import Ambient
from fxpipe.errors import CaptureError
from fxpipe.program import Program


@dataclass(frozen=True, slots=True, eq=False)
class Variant:
    """One recorded graph, cut by the plan.

    Attributes:
        key: Names it; the same on every rank.
        program: The graph of each stage.
        answers: What Python read from the inputs; another answer needs another variant.
        read: Reads it again from named inputs; None if nothing was read.
        alone: Gives the same graph as a program of one stage.
    """

    key: str
    program: Program
    answers: tuple[Any, ...]
    read: Callable[[Mapping[str, Any]], Sequence[Any]] | None
    alone: Callable[[], Program]

    def fits(self, inputs: Inputs) -> bool:
        """Tell whether a microbatch takes this graph."""
        if self.read is None:
            return True
        try:
            return tuple(answer_of(value) for value in self.read(inputs.tensors)) == self.answers
        except (RuntimeError, IndexError, ValueError, TypeError):  # a shape that this path never has
            return False


class Variants:
    """Finds the variant a microbatch takes, and captures it where there is none yet.

    Args:
        capture: The live model.
        stage_of_layer: The plan's stage of each layer, by name.
        num_stages: Number of stages.
        opened: Blocks that a cut crosses.
    """

    def __init__(
        self, capture: Capture, stage_of_layer: Mapping[str, int], num_stages: int, opened: Sequence[str]
    ) -> None:
        self.capture = capture
        self._stage_of_layer = dict(stage_of_layer)
        self._num_stages = num_stages
        self._opened = tuple(opened)
        self._known: dict[Any, list[Variant]] = {}
        self._mode = ""

    def add(self, captured: Captured, *, with_loss: bool) -> None:
        """Remember what ``compile`` captured already."""
        spec = self._spec(captured.inputs, with_loss)
        self._known.setdefault(spec, []).append(self._variant(captured, spec))

    def forget(self) -> None:
        """Drop every variant: the model is captured anew, in another dtype."""
        self._known.clear()

    def mode_changed(self) -> None:
        """Look at the modules' training flags again."""
        flags = bytes(part.training for part in self.capture.skeleton.module.modules())
        self._mode = hashlib.sha256(flags).hexdigest()[:16]

    def find(self, inputs: Inputs, *, with_loss: bool) -> Variant:
        """Give the variant of a microbatch.

        Args:
            inputs: The microbatch.
            with_loss: Whether a loss is computed (training) or the model's output.

        Raises:
            CaptureError: The model does something else than when it was compiled, so that its plan does not fit.
        """
        spec = self._spec(inputs, with_loss)
        for variant in self._known.get(spec, ()):
            if variant.fits(inputs):
                return variant
        captured = self.capture.capture(inputs, opened=self._opened, with_loss=with_loss, grad_enabled=with_loss)
        if with_loss and not captured.structure.is_loss:
            raise CaptureError(
                f"{self.capture.name} returned no loss for this batch\n"
                "  pass labels (or whatever makes the model return one), or compile with loss_fn="
            )
        variant = self._variant(captured, spec)
        self._known.setdefault(spec, []).append(variant)
        return variant

    def _spec(self, inputs: Inputs, with_loss: bool) -> Any:
        if not self._mode:
            self.mode_changed()
        return inputs.signature, with_loss, self._mode, Ambient.now().autocast

    def _variant(self, captured: Captured, spec: Any) -> Variant:
        read, guards = captured.guards()
        answers = tuple(guard.answer for guard in guards)
        key = hashlib.sha256(repr((spec, answers)).encode()).hexdigest()[:16]
        program = captured.program(self._stage_of_layer, self._num_stages)
        return Variant(key, program, answers, read, lambda: captured.program({}, 1))
