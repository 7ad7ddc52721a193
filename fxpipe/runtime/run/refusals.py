"""What cannot run inside a stage without silently wrong numbers, and is refused by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fxpipe._torch import has_accumulation_hooks, is_compiled, watched_checkpoints
from fxpipe.errors import ScheduleError
from fxpipe.program import Program
from fxpipe.runtime.build.holdings import parts_of
from fxpipe.runtime.build.stage import StageModule

_WHOLE_BACKWARD = "GPipe, 1F1B, Interleaved1F1B or LoopedBFS"


def refuse_modules(stages: Iterable[StageModule], split_by: str | None = None) -> None:
    """Refuse modules that a schedule would get wrong.

    Args:
        stages: This rank's stages.
        split_by: Name of the schedule where it splits the backward, else None.

    Raises:
        ScheduleError: A stage holds a ``DistributedDataParallel`` module, or under a split backward a compiled module
            or a parameter with a hook that would never be called.
    """
    for stage in stages:
        if split_by is None and not any(isinstance(part, DistributedDataParallel) for part in parts_of([stage])):
            continue  # nothing to name
        for fqn, module in stage.named_modules():
            if isinstance(module, DistributedDataParallel):
                raise ScheduleError(
                    f"{_where(fqn, stage)} is a DistributedDataParallel module, which would reduce the gradients of "
                    "each microbatch apart, or not at all\n"
                    "  give the pipeline a mesh with a data-parallel dimension, or wrap the stage with fully_shard"
                )
            if split_by is not None and (is_compiled(module) or (module is stage and stage.is_compiled)):
                raise ScheduleError(
                    f"{_where(fqn, stage)} is compiled, and {split_by} splits the backward, which compiled modules "
                    f"cannot\n  use {_WHOLE_BACKWARD}, or leave the module uncompiled"
                )
        for fqn, parameter in stage.named_parameters() if split_by is not None else ():
            if has_accumulation_hooks(parameter):
                raise ScheduleError(
                    f"{fqn} has a post-accumulate-grad hook, which would never be called: {split_by} splits the "
                    f"backward\n  use {_WHOLE_BACKWARD}, or do the hook's work after step"
                )


class CheckpointWatch:
    """Refuses activation checkpointing that gives wrong gradients, or recomputes many times, while stages run.

    Attributes:
        stage: The stage whose forward runs; whoever runs it says so.

    Args:
        split_by: Name of the schedule where it splits the backward, else None.
    """

    def __init__(self, split_by: str | None = None) -> None:
        self.stage: StageModule | None = None
        self._split_by = split_by

    def watch(self) -> AbstractContextManager[None]:
        """Watch a whole step.

        Raises:
            ScheduleError: From within a forward: reentrant checkpointing, or any under a split backward.
        """
        return watched_checkpoints(self._called)

    def _called(self, function: Callable[..., Any], reentrant: bool) -> None:
        if reentrant:
            raise ScheduleError(
                f"{_caller(function, self.stage)} uses reentrant activation checkpointing, which gives no gradients to "
                "parameters whose inputs need none, and cannot be split\n"
                "  pass use_reentrant=False to torch.utils.checkpoint.checkpoint"
            )
        if self._split_by is not None:
            raise ScheduleError(
                f"{_caller(function, self.stage)} uses activation checkpointing, and {self._split_by} splits the "
                "backward: it would be recomputed once for every group of its parameters\n"
                f"  use {_WHOLE_BACKWARD}, or switch the checkpointing off"
            )


def _where(fqn: str, stage: StageModule) -> str:
    return f"module {fqn}" if fqn else f"stage {stage.stage_index}"


def _caller(function: Any, stage: StageModule | None) -> str:
    """Name the module that is checkpointed, else the stage."""
    while hasattr(function, "func"):  # functools.partial
        function = function.func
    owner = function if isinstance(function, nn.Module) else getattr(function, "__self__", None)
    for cell in getattr(function, "__closure__", None) or ():
        if owner is None and isinstance(cell.cell_contents, nn.Module):
            owner = cell.cell_contents
    if stage is None:
        return "a module"
    names = [fqn for fqn, module in stage.named_modules() if module is owner]
    return f"module {names[0]}" if names and names[0] else f"a module of stage {stage.stage_index}"


def named_backward_error(error: RuntimeError, stage: StageModule) -> Exception:
    """Say what a module keeps from one forward to the next where a backward went through it twice.

    Args:
        error: What a backward raised.
        stage: The stage it ran in.

    Returns:
        ``ScheduleError`` with module and attribute for torch's "backward through the graph a second time", which the
        model by itself raises in its second step; any other error as it is.
    """
    if "backward through the graph a second time" not in str(error):
        return error
    kept = [
        f"{fqn}.{name}{place}" if fqn else f"{name}{place}"
        for fqn, module in stage.named_modules()
        for name, value in vars(module).items()
        for place, tensor in _tensors_within(value)
        if tensor.grad_fn is not None
    ]
    what = ", ".join(kept[:3]) + (f" and {len(kept) - 3} others" if len(kept) > 3 else "")
    return ScheduleError(
        f"stage {stage.stage_index} went back through the graph of an earlier forward, which a later one read: "
        f"{what or 'something in it'} holds a tensor with its graph\n"
        "  the model alone fails so in its second backward; let the module compute it anew while gradients are "
        "needed, or keep it detached (some do in train mode: pipe.train())"
    )


def _tensors_within(value: Any, place: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield place, value
    elif isinstance(value, Mapping | list | tuple):
        for key, part in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _tensors_within(part, f"{place}[{key!r}]")


def refuse_overlap(program: Program) -> None:
    """Refuse a model whose forward changes what the backward of the microbatch before still needs.

    Raises:
        ScheduleError: Names the buffers.
    """
    if program.overwritten:
        raise ScheduleError(
            f"each forward writes in place to {', '.join(program.overwritten)}, whose value its backward needs: the "
            "forward of the next microbatch would change it first\n"
            "  let the forward read a copy (buffer.clone()), or use one rank"
        )
