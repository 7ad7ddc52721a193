"""Reading tensors from files into those a rank holds, by the plan of torch's distributed checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem
from tqdm import tqdm

from fxpipe.errors import WeightsError
from fxpipe.runtime.ranks.place import is_first
from fxpipe.runtime.weights.disk.manifest import Chunk, Entry

QUIET_S = 2.0
"""Seconds before a bar is shown."""
Progress = Callable[[int], None]


@contextmanager
def byte_progress(title: str, nbytes: int) -> Iterator[Progress]:
    """Give a function to be called with the bytes that were done: a bar on rank 0, on a terminal, where it takes long.

    Args:
        title: What is done.
        nbytes: Bytes there are to do.
    """
    hidden = not sys.stderr.isatty() or not is_first()
    bar = tqdm(total=nbytes, desc=title, unit="B", unit_scale=True, delay=QUIET_S, leave=False, disable=hidden)
    with bar:

        def progress(done: int) -> None:
            bar.update(done)

        yield progress


def read_into(
    targets: Mapping[str, torch.Tensor], entries: Mapping[str, Entry], progress: Progress = lambda done: None
) -> None:
    """Copy tensors from files into those given: of a sharded tensor only what this rank has of it.

    Args:
        targets: Tensors by the names in ``entries``; plain ones or ``DTensor``.
        entries: Where each is.
        progress: Called with the bytes read.

    Raises:
        WeightsError: A file cannot be read.
    """
    if not targets:
        return
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    detached = {name: tensor.detach() for name, tensor in targets.items()}
    planner.set_up_planner(detached, _metadata(targets, entries), is_coordinator=True)
    plan = planner.finish_plan(planner.create_local_plan())
    by_file: dict[Path, list[tuple[Chunk, ReadItem]]] = {}
    for item in plan.items:
        chunk = _chunk(entries[item.storage_index.fqn], item)
        by_file.setdefault(chunk.file, []).append((chunk, item))
    for path, items in by_file.items():  # one at a time: pages of a file that is closed are free
        with _opened(path) as file, torch.no_grad():
            for chunk, item in items:
                place = planner.resolve_tensor(item)
                place.copy_(read_box(file, chunk, tuple(item.storage_offsets), tuple(item.lengths)))
                progress(place.numel() * place.element_size())


def read_box(file: Any, chunk: Chunk, offsets: tuple[int, ...], lengths: tuple[int, ...]) -> torch.Tensor:
    """Ask an open file for a box of one of its tensors, and for nothing else."""
    if lengths == chunk.shape:
        whole: torch.Tensor = file.get_tensor(chunk.name)
        return whole
    box = tuple(slice(start, start + length) for start, length in zip(offsets, lengths, strict=True))
    part: torch.Tensor = file.get_slice(chunk.name)[box]
    return part


def read_tensors(
    names: Iterable[str], entries: Mapping[str, Entry], progress: Progress = lambda done: None
) -> dict[str, torch.Tensor]:
    """Read whole tensors into memory of their own, on the CPU."""
    made = {
        name: torch.empty(entries[name].shape, dtype=getattr(torch, entries[name].dtype), device="cpu")
        for name in names
    }
    read_into(made, entries, progress)
    return made


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise WeightsError(
            f"{path} cannot be read: {error}\n  it changed or went away after it was checked: load again"
        ) from error


def _metadata(targets: Iterable[str], entries: Mapping[str, Entry]) -> Metadata:
    described: dict[str, Any] = {}
    for name in targets:
        entry = entries[name]
        chunks = [ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.shape)) for chunk in entry.chunks]
        properties = TensorProperties(dtype=getattr(torch, entry.dtype))
        described[name] = TensorStorageMetadata(properties, torch.Size(entry.shape), chunks)
    return Metadata(described)


def _chunk(entry: Entry, item: ReadItem) -> Chunk:
    offsets = item.storage_index.offset
    wanted = tuple(offsets) if offsets is not None else (0,) * len(entry.shape)
    return next(chunk for chunk in entry.chunks if chunk.offsets == wanted)
