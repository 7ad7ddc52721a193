"""The end of a forward: its loss, what it left behind in the modules, and nodes for what it returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxpipe._torch import without_functions
from fxpipe.capture.calls.values import describe, has_tensor, tensors_in
from fxpipe.capture.model.preserve import AttributeChange
from fxpipe.capture.record.forward import Forward, Selected
from fxpipe.capture.record.frames import Frame
from fxpipe.capture.record.guards import guards_of_sizes
from fxpipe.capture.record.node import info
from fxpipe.errors import CaptureError
from fxpipe.program import CallContext


@dataclass(frozen=True, slots=True, eq=False)
class ForwardOutcome:
    """What a forward gave beside its graph.

    Attributes:
        results: By ``id`` of a tensor that is returned: the node that hands it out, where it is not its owner.
        left: Attributes that it left behind in opened modules; the next forward may read them.
        notes: What the report should say.
        overwritten: Buffers that it writes to and whose value its backward needs.
        selected: As of ``Observation``.
    """

    results: Mapping[int, fx.Node]
    left: tuple[AttributeChange, ...]
    notes: tuple[str, ...]
    overwritten: tuple[str, ...]
    selected: Mapping[fx.Node, Selected]


def loss_of(forward: Forward, output: Any, target: Any, loss_fn: Callable[..., Any] | None) -> torch.Tensor | None:
    """Give the scalar that training differentiates: of ``loss_fn``, or found in what the model returned.

    Raises:
        CaptureError: The loss function returned something else than one number.
    """
    if loss_fn is None:
        return find_loss(output)
    frame = forward.frames.push_named("loss")
    loss = loss_fn(output, target)
    forward.frames.stack.remove(frame)
    with without_functions():
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            shown = describe(loss) if isinstance(loss, torch.Tensor) else f"a {type(loss).__qualname__}"
            raise CaptureError(
                f"loss_fn returned {shown}, not one number\n  return a 0-dimensional tensor: a mean or a sum"
            )
    return loss


def finish(forward: Forward, returned: Any) -> ForwardOutcome:
    """Look at what the forward left behind, give what it returns nodes of its own, and have the calls counted.

    Raises:
        Blocked: Something could not be recorded, and the user's code swallowed that.
    """
    if forward.blocked is not None:
        raise forward.blocked
    forward.check_python_random(forward.frames.top)
    left: list[AttributeChange] = []
    results: dict[int, fx.Node] = {}
    with without_functions():
        for change in forward.attributes.changes():
            if (change.fqn in forward.opened or not change.fqn) and not _written_back(forward, change):
                left.append(change)
        for node, handle in forward.hooks:
            hooks = handle.hooks_dict_ref()
            if hooks is not None and handle.id not in hooks:  # removed before the backward: it never ran
                info(node).removed = True
        for tensor in tensors_in(returned):
            if id(tensor) not in results and (node_of := _handing_out(forward, tensor)) is not None:
                results[id(tensor)] = node_of
        forward.recorder.refresh()
        selected = guards_of_sizes(forward)
    forward.counting = True
    forward.counts.make_all()
    overwritten = forward.counts.saved_buffers(forward.recorder.storages)
    forward.counting = False
    notes = [
        f"the forward sets {change.path}; the stages of a pipeline do not hand it out"
        for change in left
        if has_tensor(change.now)
    ]
    return ForwardOutcome(results, tuple(left), tuple(dict.fromkeys((*notes, *forward.notes))), overwritten, selected)


def _written_back(forward: Forward, change: AttributeChange) -> bool:
    """Record a buffer that was assigned anew as a write; False for any other attribute."""
    before, now = change.before, change.now
    tensors = isinstance(now, torch.Tensor) and isinstance(before, torch.Tensor)
    if not (change.registry == "_buffers" and tensors and now.shape == before.shape and forward.recorder.knows(now)):
        return False
    frame = Frame(change.fqn, forward.skeleton.module.get_submodule(change.fqn))
    node = forward.recorder.call(
        "call_method", "copy_", (before, now), {}, frame, layer=f"{change.path}.copy_", written=[before]
    )
    info(node).context = CallContext(grad_enabled=False)
    return True


def _handing_out(forward: Forward, tensor: torch.Tensor) -> fx.Node | None:
    """Give a tensor that is returned a call of its own where its node is none that comes last.

    Some layer must read a parameter, buffer or constant; and what was written to after it was made must be handed
    out after the writing.
    """
    root, recorder = forward.frames.all[0], forward.recorder
    source = recorder.node_of(tensor, root)
    if source.op != "get_attr" and not recorder.is_written_after(source):
        return None
    node = recorder.call("call_function", itself, (tensor,), {}, root, layer=root.name("output"))
    recorder.describe(node, tensor)
    return node


def itself(tensor: torch.Tensor) -> torch.Tensor:
    """Give a tensor back: the call that hands out a parameter which a model returns."""
    return tensor


def find_loss(output: Any) -> torch.Tensor | None:
    """Find the loss in what a model returned: ``.loss``, ``["loss"]``, itself or its first element if one number."""
    found = output
    if isinstance(output, Mapping):
        found = output.get("loss")
    elif isinstance(output, tuple) and not hasattr(output, "loss"):  # Hugging Face's convention
        found = output[0] if output else None
    elif not isinstance(output, torch.Tensor):
        found = getattr(output, "loss", None)
    with without_functions():
        floating = isinstance(found, torch.Tensor) and found.is_floating_point() and found.numel() == 1
    return found if floating else None
