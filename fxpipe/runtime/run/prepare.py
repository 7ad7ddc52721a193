"""What a user applies to stages before they run: sharding over other dimensions, compilation, a look at all values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from fxpipe.errors import MaterializeError, NonFiniteError, ScheduleError
from fxpipe.ir.schedule import SCHEDULES, schedule_named
from fxpipe.ir.tree import tree_leaves
from fxpipe.runtime.build.stage import PartModule, StageModule
from fxpipe.runtime.ranks.groups import is_time, patience
from fxpipe.runtime.run.distributed import DistributedEngine
from fxpipe.runtime.run.local import LocalEngine
from fxpipe.runtime.run.timeline import SpanRecorder

_SCOPES = ("blocks", "stage")


def spelled(given: object) -> str:
    """Give what is the same on all ranks of an option: words as they are, else its type.

    >>> spelled("reset"), spelled(len)
    ("'reset'", 'builtin_function_or_method')
    """
    return repr(given) if isinstance(given, str | None) else type(given).__name__


@dataclass(frozen=True, slots=True, eq=False)
class RunOptions:
    """How the stages of a pipeline are run.

    Attributes:
        parallelize: Divides a stage module over other dimensions of the mesh, in place.
        compile: ``"blocks"``, ``"stage"``, a mapping of ``torch.compile``'s options, or None.
        keep_wide: Whether gradients of 16-bit parameters stay float32.
        timings: Whether it is recorded what each rank does when.
        check_batches: Whether ranks compare checksums of their batches: always, never, or (``"auto"``) in the first
            steps and then now and again.
        debug: Whether the first layer with a value that is no number is named.
        timeout: Seconds a rank waits for another one; None: ten minutes.
    """

    parallelize: Callable[[nn.Module], Any] | None = None
    compile: str | Mapping[str, Any] | None = None
    keep_wide: bool = False
    timings: bool = False
    check_batches: bool | str = "auto"
    debug: bool = False
    timeout: float | None = None

    @property
    def patience(self) -> timedelta:
        """How long a rank waits for another one; the usual time where ``check`` will refuse what was given."""
        return patience(self.timeout)

    @property
    def same(self) -> dict[str, object]:
        """What all ranks must have alike, by name."""
        return {
            "parallelize": spelled(self.parallelize),
            "compile": spelled(self.compile),
            "keep_wide": self.keep_wide,
            "timings": self.timings,
            "check_batches": self.check_batches,
            "debug": self.debug,
            "timeout": self.timeout,
        }

    def check(self, schedule: str) -> None:
        """Refuse what cannot be run.

        Raises:
            MaterializeError: ``compile`` is none of the known forms.
            ScheduleError: The schedule splits the backward, which compiled modules cannot.
        """
        if self.timeout is not None and not is_time(self.timeout):
            raise MaterializeError(f"timeout={self.timeout!r}\n  pass a positive number of seconds, or None")
        if self.check_batches not in (True, False, "auto"):
            raise MaterializeError(f"check_batches={self.check_batches!r} is unknown\n  pass 'auto', True or False")
        if self.compile is None:
            return
        if self._compiled()[0] not in _SCOPES:
            raise MaterializeError(
                f"compile={self.compile!r} is unknown\n"
                "  pass 'blocks', 'stage', or a dictionary of torch.compile's options"
            )
        if schedule_named(schedule).splits_backward:
            whole = ", ".join(name for name, known in SCHEDULES.items() if not known.splits_backward)
            raise ScheduleError(
                f"{schedule} splits the backward, which compiled modules cannot\n  use {whole}, or leave compile= out"
            )

    def apply(self, stage: StageModule, recompute: Iterable[str], blocks: Iterable[str]) -> None:
        """Let a stage recompute, divide it, and compile it or every block that it holds whole, in place.

        Args:
            stage: Changed in place.
            recompute: FQNs of the modules whose activations are not kept.
            blocks: FQNs of the model's blocks.

        Raises:
            MaterializeError: ``parallelize`` gives another module back.
        """
        stage.recompute(recompute)
        if self.debug:
            watch_values(stage)
        result = self.parallelize(stage) if self.parallelize is not None else None
        if result is not None and result is not stage:
            raise MaterializeError(
                f"parallelize= returned a {type(result).__name__} instead of the stage\n"
                "  change the stage module in place (fully_shard, parallelize_module), and compile with compile="
            )
        check_wrapped(stage)
        if self.compile is None:
            return
        scope, options = self._compiled()
        if scope == "stage":
            stage.compile(**options)
            return
        wanted = set(blocks)
        for fqn, module in stage.named_modules():
            if fqn in wanted:
                module.compile(**options)

    def recorder(self, engine: LocalEngine | DistributedEngine, device: torch.device) -> SpanRecorder | None:
        """Let an engine record what its stages do when, if that is wanted."""
        if not self.timings:
            return None
        recorder = SpanRecorder(device)
        engine.record(recorder)
        return recorder

    def _compiled(self) -> tuple[Any, dict[str, Any]]:
        options = dict(self.compile) if isinstance(self.compile, Mapping) else {"of": self.compile}
        return options.pop("of", "blocks"), options


def check_wrapped(stage: StageModule) -> None:
    """Refuse a sharded module of which the stage runs parts alone: what gathers its weights goes before its forward.

    Raises:
        MaterializeError: Names the modules, and what of them can be wrapped.
    """
    for fqn, part in stage.opened():
        if isinstance(part, FSDPModule):
            parts = ", ".join(f"{fqn}.{name}" for name, _ in part.named_children()) or "the stage"
            why = "which a cut crosses" if isinstance(part, PartModule) else "which is cut open"
            raise MaterializeError(
                f"parallelize= wrapped {fqn}, {why}: stage {stage.stage_index} runs parts of it, and "
                f"never calls it\n  wrap {parts} instead, or compile with grain='block'"
            )


def watch_values(stage: StageModule) -> None:
    """Look at what every module of a stage returns, and at every gradient on its way back.

    Each look waits for the device: it is for finding a fault, not for training.

    Args:
        stage: Its modules get hooks.

    Raises:
        NonFiniteError: From within a step: names the first layer, innermost first, in the order of computing.
    """
    where = f"stage {stage.stage_index}"
    for fqn, module in stage.named_modules():
        name = fqn or f"what {where} computes between its modules"
        module.register_forward_hook(_look(name, where), with_kwargs=True)
    for fqn, parameter in stage.named_parameters():
        if parameter.requires_grad:
            parameter.register_hook(_look_back(f"the gradient of {fqn}", where))  # type: ignore[no-untyped-call]


def _look(name: str, where: str) -> Callable[[nn.Module, Any, Mapping[str, Any], Any], None]:
    def hook(module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        for path, leaf in tree_leaves(output):
            if not isinstance(leaf, torch.Tensor) or not leaf.is_floating_point():
                continue
            part = f" {path}" if path else ""
            _check(leaf, f"the output{part} of {name}", where, "forward", args)
            if leaf.requires_grad:
                back = _look_back(f"the gradient of the output{part} of {name}", where)
                leaf.register_hook(back)  # type: ignore[no-untyped-call]

    return hook


def _look_back(what: str, where: str) -> Callable[[torch.Tensor], None]:
    def hook(gradient: torch.Tensor) -> None:
        _check(gradient, what, where, "backward")

    return hook


def _check(tensor: torch.Tensor, what: str, where: str, phase: str, given: Any = ()) -> None:
    with torch.no_grad():
        finite = torch.isfinite(tensor)
        if bool(finite.all()):
            return
        number = int((~finite).sum())
        kind = "NaN" if bool(tensor.isnan().any()) else "infinite"
        entering = [
            float(leaf.detach().abs().max())
            for _, leaf in tree_leaves(given)
            if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and leaf.numel()
        ]
    size = f"; the largest value that entered is {max(entering):.3g}" if entering else ""
    raise NonFiniteError(
        f"{what} ({where}, {phase}) has {number} of {tensor.numel()} values that are {kind}{size}\n"
        "  look at what enters this layer; it is the first with such a value"
    )
