"""What a user applies to stages before they run: sharding over other dimensions, and compilation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fxpipe.errors import MaterializeError, ScheduleError
from fxpipe.ir.schedule import SCHEDULES, schedule_named
from fxpipe.runtime.build.stage import StageModule
from fxpipe.runtime.run.distributed import DistributedEngine
from fxpipe.runtime.run.local import LocalEngine
from fxpipe.runtime.run.timeline import Recorder

_SCOPES = ("blocks", "stage")


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
    """

    parallelize: Callable[[nn.Module], Any] | None = None
    compile: str | Mapping[str, Any] | None = None
    keep_wide: bool = False
    timings: bool = False
    check_batches: bool | str = "auto"

    def check(self, schedule: str) -> None:
        """Refuse what cannot be run.

        Raises:
            MaterializeError: ``compile`` is none of the known forms.
            ScheduleError: The schedule splits the backward, which compiled modules cannot.
        """
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
        result = self.parallelize(stage) if self.parallelize is not None else None
        if result is not None and result is not stage:
            raise MaterializeError(
                f"parallelize= returned a {type(result).__name__} instead of the stage\n"
                "  change the stage module in place (fully_shard, parallelize_module), and compile with compile="
            )
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

    def recorder(self, engine: LocalEngine | DistributedEngine, device: torch.device) -> Recorder | None:
        """Let an engine record what its stages do when, if that is wanted."""
        if not self.timings:
            return None
        recorder = Recorder(device)
        engine.record(recorder)
        return recorder

    def _compiled(self) -> tuple[Any, dict[str, Any]]:
        options = dict(self.compile) if isinstance(self.compile, Mapping) else {"of": self.compile}
        return options.pop("of", "blocks"), options
