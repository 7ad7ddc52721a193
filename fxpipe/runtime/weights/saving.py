"""``pipe.save``: a checkpoint that all ranks write together, whole or not at all, now or in the background."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from fxpipe.runtime.build.extra_state import own_extra_states
from fxpipe.runtime.build.stage import StageModule
from fxpipe.runtime.build.state import held_copies, held_tensors
from fxpipe.runtime.ranks.groups import Groups
from fxpipe.runtime.weights.disk.files import stored
from fxpipe.runtime.weights.disk.manifest import MODULE, OPTIMIZER, Manifest, write_manifest
from fxpipe.runtime.weights.disk.plain import encode
from fxpipe.runtime.weights.model import Model
from fxpipe.runtime.weights.optimizer_state import (
    Owned,
    OwnState,
    join_states,
    own_optimizer_state,
    own_scheduler_state,
)
from fxpipe.runtime.weights.ranks import Everyone, one_of_all
from fxpipe.runtime.weights.target import Target
from fxpipe.runtime.weights.writing import WritePlan, plan_writing

_APART = (OPTIMIZER, MODULE)
"""How the names of tensors begin that are no weights."""


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """What a checkpoint holds of this rank.

    Attributes:
        tensors: Weights by first FQN, and the optimiser's by ``optimizer_key``.
        optimizer: The rest of the optimiser's state.
        scheduler: The scheduler's, encoded.
        step: Steps made.
        seed: Seed of the random numbers.
        extra: The user's values, encoded.
        modules: What this rank's modules save beside tensors, encoded, by its key in the model's ``state_dict``.
    """

    tensors: Mapping[str, torch.Tensor]
    optimizer: OwnState | None
    scheduler: Any
    step: int
    seed: int
    extra: Any
    modules: Mapping[str, Any]

    def copied(self) -> Snapshot:
        """Give a copy on the CPU, which training does not change any more."""
        return replace(self, tensors={name: _copied(tensor) for name, tensor in self.tensors.items()})


def take_snapshot(
    model: Model,
    stages: Sequence[StageModule],
    *,
    optimizer: Optimizer | None,
    scheduler: Any,
    extra: Any,
    step: int,
    seed: int,
    unheld: Sequence[str] = (),
) -> Snapshot:
    """Collect what a checkpoint holds of this rank; nothing is copied.

    Args:
        model: The whole model's names.
        stages: This rank's stages.
        optimizer: Over some of this rank's parameters.
        scheduler: Of that optimiser.
        extra: The user's values.
        step: Steps made.
        seed: Seed of the random numbers.
        unheld: Keys of modules that save something beside tensors, and that no stage holds whole: the model's copy of
            them is asked.

    Raises:
        WeightsError: Something is neither a tensor nor a JSON value; names it.
    """
    held = held_tensors(model.names, stages)
    kept = {
        first: tensor.detach()
        for first, tensor in held.items()
        if first not in model.names.tensors or model.names.tensors[first].persistent
    }
    named = {fqn: tensor for fqn, tensor in held.items() if isinstance(tensor, nn.Parameter)}
    own = (
        own_optimizer_state(optimizer, Owned(named, held_copies(model.names, stages)))
        if optimizer is not None
        else None
    )
    state = own_scheduler_state(scheduler) if scheduler is not None else None
    tensors = {**kept, **(own.tensors if own is not None else {})}

    def keep(value: Any, place: str) -> str | None:
        if isinstance(value, torch.Tensor):
            tensors[MODULE + place] = value.detach()
            return MODULE + place
        return None

    states = own_extra_states(model.names.extra, stages)
    states.update((key, model.names.extra[key].get_extra_state()) for key in unheld)
    modules = {key: encode(value, key, keep=keep) for key, value in states.items()}
    for name, tensor in tensors.items():
        stored(name, tensor)
    return Snapshot(tensors, own, state, step, seed, encode(extra, "extra", strict=True), modules)


class Writing(Future[None]):
    """The future of a save in the background; knows whether its error has reached the user."""

    def __init__(self) -> None:
        super().__init__()
        self.taken = False
        self.set_running_or_notify_cancel()  # the other ranks write too: it cannot be cancelled on one

    def run(self, write: Callable[[], None]) -> None:
        """Write, and end with what comes of it."""
        try:
            write()
        except BaseException as error:
            self.set_exception(error)
        else:
            self.set_result(None)

    def ended(self) -> BaseException | None:
        """Wait, and give the error; it does not count as taken."""
        return super().exception()

    def result(self, timeout: float | None = None) -> None:
        """Wait for the end, and raise what went wrong."""
        try:
            super().result(timeout)
        finally:
            self.taken = self.taken or self.done()

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait for the end, and give what went wrong."""
        found = super().exception(timeout)
        self.taken = True
        return found


class Saver:
    """Writes checkpoints of one pipeline; live, until ``close``.

    Args:
        model: The whole model's names.
        groups: The pipeline's groups; None where one process holds it all.
    """

    def __init__(self, model: Model, groups: Groups | None) -> None:
        self._model = model
        self._groups = groups
        self._everyone: Everyone | None = None
        self._apart: Everyone | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._running: Writing | None = None

    def everyone(self) -> Everyone:
        """Give all ranks that write, those of other replicas too."""
        if self._everyone is None:
            self._everyone = Everyone(self._groups)
        return self._everyone

    def save(
        self, path: str | os.PathLike[str], snapshot: Snapshot | Exception, *, in_background: bool = False
    ) -> Future[None] | None:
        """Write a checkpoint; every rank calls it.

        Args:
            path: A directory that does not exist.
            snapshot: What to write; or what went wrong when it was taken.
            in_background: Whether to return once the tensors are copied.

        Returns:
            In the background, a future that ends with the checkpoint whole or with the error.

        Raises:
            WeightsError: On every rank. Nothing is left of the checkpoint then.
        """
        self.wait()
        everyone = self.everyone()
        error = snapshot if isinstance(snapshot, Exception) else None
        everyone.agree(error, "what to save")
        assert isinstance(snapshot, Snapshot)
        if in_background:
            snapshot = snapshot.copied()
            if self._apart is None:
                self._apart = Everyone(self._groups, apart=True)
            everyone = self._apart
        plan, manifest, error = self._plan(snapshot, everyone)
        target = Target(path, everyone)
        target.make(plan.nbytes if plan is not None else 0, error)
        assert plan is not None
        assert manifest is not None
        if not in_background:
            _write(target, plan, manifest)
            return None
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="fxpipe-save")
        self._running = Writing()
        self._thread.submit(self._running.run, functools.partial(self._write_apart, target, plan, manifest))
        return self._running

    def _write_apart(self, target: Target, plan: WritePlan, manifest: Manifest) -> None:
        try:
            _write(target, plan, manifest)
        except RuntimeError as error:
            raised = (
                error if self._groups is None or self._groups.failures is None else self._groups.failures.told(error)
            )
            if raised is error:
                raise
            raise raised from error

    def _plan(
        self, snapshot: Snapshot, everyone: Everyone
    ) -> tuple[WritePlan | None, Manifest | None, Exception | None]:
        own = snapshot.optimizer
        state = None if own is None else (own.kind, own.scalars, own.groups)
        parts = everyone.gather((state, snapshot.modules, snapshot.scheduler, snapshot.extra))
        try:
            record = join_states([part[0] for part in parts])
            scheduler = one_of_all("scheduler", [part[2] for part in parts], everyone.ranks)
            # Often only the first rank has something to note.
            noted = {rank: part[3] for rank, part in zip(everyone.ranks, parts, strict=True) if part[3] is not None}
            extra = one_of_all("extra", list(noted.values()), list(noted))
            plan = plan_writing(snapshot.tensors, everyone)
        except Exception as error:
            return None, None, error
        manifest = Manifest(
            model=self._model.name,
            step=snapshot.step,
            seed=snapshot.seed,
            files={},
            tensors={name: entry for name, entry in plan.entries.items() if not name.startswith(_APART)},
            state={name: entry for name, entry in plan.entries.items() if name.startswith(_APART)},
            optimizer=record,
            scheduler=scheduler,
            extra=extra,
            modules={key: value for part in parts for key, value in part[1].items()},
        )
        return plan, manifest, None

    def wait(self) -> None:
        """Wait for a save in the background; every rank calls it.

        Raises:
            WeightsError: It failed, and on no rank the user has asked for its result.
        """
        running, self._running = self._running, None
        if running is not None:
            error = running.ended()
            taken = self.everyone().gather(running.taken)
            if error is not None and not any(taken):
                raise error

    def close(self) -> None:
        """Wait for what is under way, and end the thread and the groups; nothing is exchanged.

        Raises:
            WeightsError: A save in the background failed, and the user has not asked for its result here.
        """
        running, self._running = self._running, None
        try:
            if running is not None and not running.taken:
                running.result()
        finally:
            if self._thread is not None:
                self._thread.shutdown()
                self._thread = None
            for each in (self._everyone, self._apart):
                if each is not None:
                    each.close()
            self._everyone = self._apart = None


def _write(target: Target, plan: WritePlan, manifest: Manifest) -> None:
    """Write this rank's file; the first rank writes the manifest when all files are there."""
    files: dict[str, int] = {}
    error: Exception | None = None
    try:
        files = plan.write(target.part)
    except Exception as found:  # whatever it is, the other ranks must not wait for this one
        error = found
    target.agree(error)
    whole = {name: size for part in target.everyone.gather(files) for name, size in part.items()}
    target.finish(lambda directory: write_manifest(directory, replace(manifest, files=whole)))


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    if hasattr(tensor, "device_mesh"):  # a shard: its part is copied, and moved to the CPU when it is written
        return tensor.clone()
    return tensor.to("cpu", copy=True)
