"""Writing tensors that lie on many ranks: torch's distributed plan says who writes what, each rank writes one file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlan, WriteItem

from fxpipe.runtime.weights.disk.files import StoredTensor, stored, write_file
from fxpipe.runtime.weights.disk.manifest import Chunk, Entry
from fxpipe.runtime.weights.ranks import Everyone

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class WritePlan:
    """Who writes what.

    Attributes:
        planner: torch's, which holds this rank's tensors.
        own: What this rank writes.
        file: Name of its file; None: it has nothing to write.
        entries: Where every tensor of all ranks goes; files without a directory.
    """

    planner: DefaultSavePlanner
    own: tuple[WriteItem, ...]
    file: str | None
    entries: Mapping[str, Entry]

    @property
    def nbytes(self) -> int:
        """Bytes of all ranks' data."""
        return sum(
            StoredTensor(name, entry.dtype, chunk.shape).nbytes
            for name, entry in self.entries.items()
            for chunk in entry.chunks
        )

    def tensors(self) -> Iterator[torch.Tensor]:
        """Give what this rank writes, in order."""
        for item in self.own:
            data = self.planner.resolve_data(item)
            assert isinstance(data, torch.Tensor)
            yield data

    def write(self, directory: Path) -> dict[str, int]:
        """Write this rank's file; gives its name and size.

        Raises:
            WeightsError: The disk is full.
        """
        if self.file is None:
            return {}
        entries = [stored(_chunk_name(item), data) for item, data in zip(self.own, self.tensors(), strict=True)]
        return {self.file: write_file(directory / self.file, entries, self.tensors())}


def plan_writing(tensors: Tensors, everyone: Everyone) -> WritePlan:
    """Agree with all ranks on who writes what: what several ranks hold alike is written once.

    Args:
        tensors: What this rank holds, by names that are the same on every rank; plain tensors, or ``DTensor`` of which
            each rank writes its part.
        everyone: All ranks.
    """
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(dict(tensors), is_coordinator=everyone.position == 0)
    # The plan of all is made on every rank from the same parts: nothing needs to be sent back.
    plans, metadata = planner.create_global_plan(everyone.gather(planner.create_local_plan()))
    entries: dict[str, Entry] = {}
    chunks: dict[str, list[Chunk]] = {}
    for position, plan in enumerate(plans):
        for item in plan.items:
            chunks.setdefault(item.index.fqn, []).append(_chunk(item, _file_name(position)))
    for name, held in chunks.items():
        known = metadata.state_dict_metadata[name]
        dtype = str(known.properties.dtype).removeprefix("torch.")  # type: ignore[union-attr]
        entries[name] = Entry(dtype, tuple(known.size), tuple(held))  # type: ignore[union-attr]
    own: SavePlan = planner.finish_plan(plans[everyone.position])
    items = tuple(own.items)
    return WritePlan(planner, items, _file_name(everyone.position) if items else None, entries)


def _file_name(position: int) -> str:
    return f"rank-{position:05}.safetensors"


def _chunk(item: WriteItem, file: str) -> Chunk:
    assert item.tensor_data is not None
    box = item.tensor_data.chunk
    return Chunk(Path(file), _chunk_name(item), tuple(box.offsets), tuple(box.sizes))


def _chunk_name(item: WriteItem) -> str:
    """Name a part of a tensor in its file; a whole one goes by the tensor's own name."""
    assert item.tensor_data is not None
    if tuple(item.tensor_data.chunk.sizes) == tuple(item.tensor_data.size):
        return item.index.fqn
    return f"{item.index.fqn}@{','.join(map(str, item.tensor_data.chunk.offsets))}"
