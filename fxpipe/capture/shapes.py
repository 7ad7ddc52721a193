"""Batches of ever new shapes: a forward recorded with its sizes as symbols, held against one with numbers."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from fxpipe.batch.inputs import Inputs
from fxpipe.capture.calls.blocked import Blocked, Untold
from fxpipe.capture.capture import Capture, Captured
from fxpipe.capture.graph.structure import make_structure
from fxpipe.capture.graph.symbolic import Shapes, Symbolic, pair_with, paired_terms, reads_alike, varying
from fxpipe.capture.progress import shown_progress
from fxpipe.capture.record.observe import observe

_log = logging.getLogger(__name__)


class Elsewhere(Exception):
    """The forward took a path that none of the recordings took."""


def with_symbols(
    capture: Capture, known: Sequence[tuple[Captured, Shapes]], inputs: Inputs, *, with_loss: bool
) -> Captured | None:
    """Record a forward for all shapes that take the same path as one that was recorded with numbers.

    Args:
        capture: The live model.
        known: What was recorded, and the shapes of the inputs it was recorded with.
        inputs: A microbatch of other shapes.
        with_loss: As of ``Capture.capture``.

    Returns:
        What was recorded, with ``symbolic``; None where not all of it is a function of the inputs' sizes, or it is not,
        for the sizes of one of ``known``, the same.

    Raises:
        Elsewhere: None of ``known`` took its path.
    """
    try:
        return _recorded(capture, known, inputs, with_loss)
    except Elsewhere:
        raise
    except (Exception, Blocked, Untold) as error:  # whatever does not work with symbols works with numbers
        _log.debug("the sizes of %s are no symbols: %s: %s", capture.name, type(error).__name__, error)
        return None


def _recorded(capture: Capture, known: Sequence[tuple[Captured, Shapes]], inputs: Inputs, with_loss: bool) -> Captured:
    leaves = known[-1][0].observation.leaves
    if not all(tensor.is_contiguous() for tensor in inputs.tensors.values()):
        raise Untold("an input is not contiguous")
    loss_fn = capture.loss_fn if with_loss else None
    with shown_progress(f"capturing {capture.name}", len(leaves.blocks)) as progress:
        observation = observe(
            capture.skeleton,
            leaves,
            inputs,
            loss_fn=loss_fn,
            grad_enabled=with_loss and torch.is_grad_enabled(),
            varying=varying([*(shapes for _, shapes in known), inputs.shapes]),
            progress=progress,
        )
    structure = make_structure(observation, training=with_loss)
    symbolic = Symbolic.of(observation, structure)
    found = [each for each in known if reads_alike(each[0].observation.guards, symbolic.guards)]
    if not found:
        raise Elsewhere
    alike, shapes = found[-1]
    values = symbolic.symbols.values(shapes)
    if values is None or observation.left or structure.is_loss != alike.structure.is_loss:
        raise Untold(f"it holds for other sizes only where {symbolic.guards_text}")
    pairs = pair_with(observation, structure, alike.observation, alike.structure, values)
    terms = paired_terms(capture.skeleton, observation, alike.terms, pairs)
    return Captured(inputs, observation, structure, terms, alike.notes, alike.coupling, symbolic)
