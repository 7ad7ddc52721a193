"""``pipe.load``: this rank's tensors from a directory, everything checked on every rank before anything is changed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.optim import Optimizer

from fxpipe.errors import WeightsError
from fxpipe.runtime.build.extra_state import load_extra_states, missing_extra_states
from fxpipe.runtime.build.stage import StageModule
from fxpipe.runtime.build.state import even_copies, held_copies, held_tensors, write_state
from fxpipe.runtime.ranks.agreement import agree
from fxpipe.runtime.ranks.groups import Groups, busy
from fxpipe.runtime.weights.conversions import Conversion
from fxpipe.runtime.weights.disk.directory import Listing, list_path
from fxpipe.runtime.weights.disk.files import StoredTensor, stored
from fxpipe.runtime.weights.disk.manifest import MODULE
from fxpipe.runtime.weights.disk.plain import decode
from fxpipe.runtime.weights.matching import Match, Wanted, match, shown
from fxpipe.runtime.weights.model import Model
from fxpipe.runtime.weights.optimizer_state import Owned, Restored, prepare_restore
from fxpipe.runtime.weights.reading import byte_progress, read_into, read_tensors


@dataclass(frozen=True, slots=True)
class Loaded:
    """What was loaded besides tensors.

    Attributes:
        filled: First FQNs of this rank's tensors that have their values now.
        name: Of the file or directory they were in: of several checkpoints the one that was taken.
        step: Steps the saved pipeline had made; None where the path is no checkpoint.
        seed: Seed of its random numbers; None likewise.
        extra: The user's own values.
    """

    filled: tuple[str, ...]
    name: str = ""
    step: int | None = None
    seed: int | None = None
    extra: Any = None


def load(
    path: str | os.PathLike[str],
    model: Model,
    stages: Sequence[StageModule],
    groups: Groups | None,
    wanted: Wanted,
    optimizer: Optimizer | None = None,
    scheduler: Any = None,
) -> Loaded:
    """Fill this rank's tensors from files.

    Args:
        path: What ``list_path`` takes.
        model: The whole model's names.
        stages: This rank's stages.
        groups: The pipeline's groups; None where one process holds it all.
        wanted: How the files are to be matched, as the user says it.
        optimizer: Over this rank's parameters; gets the saved state.
        scheduler: Of that optimiser; likewise.

    Raises:
        WeightsError: On every rank; lists all that is wrong. Nothing was changed then.
    """
    held = held_tensors(model.names, stages)
    added = _added(held, model, groups)
    prepared: _Prepared | None = None
    error: Exception | None = None
    try:
        listing = list_path(path)
        own = {first: stored(first, tensor) for first, tensor in held.items() if first in model.names.tensors}
        found = match(listing, model, replace(wanted, also=added, held=own))
        prepared = _Prepared(listing, found, held)
        with busy(groups, "reading"):
            prepared.compare_twins()
        prepared.check_modules(model, stages, wanted.strict)
        named = {fqn: tensor for fqn, tensor in held.items() if isinstance(tensor, torch.nn.Parameter)}
        prepared.check_optimizer(optimizer, scheduler, Owned(named, held_copies(model.names, stages)))
    except Exception as raised:  # whatever it is, rename= being the user's own: no rank may wait for this one
        error = raised
    agree(groups, error, "the path to load", prepared.listing.order if prepared else "")
    assert prepared is not None
    loaded: Loaded | None = None
    try:
        with busy(groups, "loading"):
            loaded = prepared.apply()
            even_copies(model.names, stages)
        load_extra_states(model.names.extra, stages, prepared.modules())
    except Exception as raised:
        error = raised
    agree(groups, error, "what was loaded")
    assert loaded is not None
    return loaded


def _added(held: Mapping[str, torch.Tensor], model: Model, groups: Groups | None) -> dict[str, StoredTensor]:
    """Give what was added to any rank's stages after they were made: no name of the model's."""
    own = {fqn: stored(fqn, tensor) for fqn, tensor in held.items() if fqn not in model.names.tensors}
    if groups is None:
        return own
    return {fqn: entry for part in groups.gather_along(own) for fqn, entry in part.items()}


class _Prepared:
    """Everything checked, nothing read yet."""

    def __init__(self, listing: Listing, found: Match, held: Mapping[str, torch.Tensor]) -> None:
        self.listing = listing
        self._match = found
        self._held = held
        self._allocate: Callable[[], Restored] = lambda: Restored({}, lambda: None)

    def compare_twins(self) -> None:
        """Read what the file has twice for one tensor of this rank, and see that it is equal."""
        for first, one, other in self._match.twins:
            if first not in self._held:
                continue
            pair = read_tensors((one, other), self.listing.entries)
            bits = [tensor.reshape(-1).view(torch.uint8) for tensor in pair.values()]
            if not torch.equal(*bits):
                raise WeightsError(
                    f"{one} and {other} of {self.listing.path} differ, and are one tensor ({first}) of the model\n"
                    "  untie them in the model, or leave one of them out by rename=; nothing was changed"
                )

    def check_modules(self, model: Model, stages: Sequence[StageModule], strict: bool) -> None:
        """See that a checkpoint has what this rank's modules save beside tensors."""
        manifest = self.listing.manifest
        if manifest is None or manifest.step is None or not strict:
            return
        if missing := missing_extra_states(model.names.extra, stages, manifest.modules):
            raise WeightsError(
                f"{self.listing.path} does not fit {model.name}: {len(missing)} missing: {shown(missing)}\n"
                "  give a checkpoint of this model; nothing was changed"
            )

    def modules(self) -> dict[str, Any]:
        """Read what modules saved beside tensors; of all ranks, since the model's copy gets it too."""
        manifest = self.listing.manifest
        if manifest is None or not manifest.modules:
            return {}
        kept = read_tensors((key for key in manifest.state if key.startswith(MODULE)), manifest.state)
        return {key: decode(value, kept) for key, value in manifest.modules.items()}

    def check_optimizer(self, optimizer: Optimizer | None, scheduler: Any, own: Owned) -> None:
        """See that optimiser and scheduler fit."""
        manifest = self.listing.manifest
        if manifest is not None:
            self._allocate = prepare_restore(manifest, optimizer, scheduler, own)
        elif optimizer is not None or scheduler is not None:
            raise WeightsError(
                f"{self.listing.path} is no checkpoint of pipe.save: it has no optimiser's state\n"
                "  load it without optimizer= and scheduler="
            )

    def apply(self) -> Loaded:
        """Read and change."""
        restored = self._allocate()
        manifest = self.listing.manifest
        sources = [source for source in self._match.sources if any(self._own(source))]
        state_bytes = sum(tensor.numel() * tensor.element_size() for tensor in restored.targets.values())
        total = state_bytes + sum(self._bytes(source) for source in sources)
        with byte_progress(f"load {self.listing.path.name}", total) as progress:
            rounds: list[dict[str, torch.Tensor]] = []
            for source in sources:
                if source.convert is None:
                    for index, (_, tensor) in enumerate(self._own(source)):
                        if index == len(rounds):
                            rounds.append({})
                        rounds[index][source.reads[0]] = tensor
            for targets in rounds:
                read_into(targets, self.listing.entries, progress)
            for source in sources:
                if source.convert is not None:
                    made = source.convert(read_tensors(source.reads, self.listing.entries, progress))
                    write_state([(tensor, made[name]) for name, tensor in self._own(source)])
                    del made
            if manifest is not None:
                read_into(restored.targets, manifest.state, progress)
        restored.finish()
        filled = tuple(
            first
            for source in sources
            for made in source.gives
            for first in self._match.targets.get(made.name, ())
            if first in self._held
        )
        if manifest is None:
            return Loaded(filled, self.listing.path.name)
        return Loaded(filled, self.listing.path.name, manifest.step, manifest.seed, decode(manifest.extra))

    def _own(self, source: Conversion) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield this rank's tensors that a source is for, with the given name."""
        for made in source.gives:
            for first in self._match.targets.get(made.name, ()):
                if first in self._held:
                    yield made.name, self._held[first]

    def _bytes(self, source: Conversion) -> int:
        entries = self.listing.entries
        return sum(StoredTensor(name, entries[name].dtype, entries[name].shape).nbytes for name in source.reads)
