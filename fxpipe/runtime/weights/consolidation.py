"""``fxpipe convert``: a checkpoint as safetensors and back, one tensor in memory at a time, without the model."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from fxpipe.errors import WeightsError
from fxpipe.runtime.weights.disk.directory import INDEX, WHOLE, Listing, list_path
from fxpipe.runtime.weights.disk.files import StoredTensor, cannot_write, write_file, write_json
from fxpipe.runtime.weights.disk.manifest import Chunk, Entry, Manifest, write_manifest
from fxpipe.runtime.weights.reading import Progress, byte_progress, read_tensors
from fxpipe.runtime.weights.target import new_path

SHARD_BYTES = 5 * 10**9
"""Largest file, unless one tensor is larger."""


def convert(
    source: str | os.PathLike[str], target: str | os.PathLike[str], *, shard_bytes: int = SHARD_BYTES
) -> tuple[Path, str]:
    """Write what lies at one path in the other format.

    Args:
        source: A checkpoint of ``pipe.save`` (of a directory of them the newest whole one), or safetensors.
        target: Must not exist. Of a checkpoint: a directory of safetensors with an index, or one file where it ends in
            ``.safetensors``, under the model's own names; optimiser and scheduler are left out. Of safetensors: a
            checkpoint, which any pipeline of that model loads.
        shard_bytes: Largest file.

    Returns:
        What was written, and a word on what it is.

    Raises:
        WeightsError: The source is not whole, the target exists, or there is no room; nothing is left then.
    """
    listing = list_path(source)
    place = new_path(target)
    entries = {name: StoredTensor(name, entry.dtype, entry.shape) for name, entry in listing.entries.items()}
    total = sum(entry.nbytes for entry in entries.values())
    part = place.with_name(f".{place.name}.part")
    try:
        if place.exists() or place.is_symlink():
            raise WeightsError(f"{place} exists\n  give a new name, or remove it first")
        place.parent.mkdir(parents=True, exist_ok=True)
        if part.exists():
            shutil.rmtree(part) if part.is_dir() else part.unlink()
        with byte_progress(f"convert {listing.path.name}", total) as progress:
            if listing.kind != "checkpoint":
                part.mkdir()
                _checkpoint(listing, part, _filled(entries, shard_bytes), progress)
                what = "a checkpoint"
            elif place.suffix == ".safetensors":
                write_file(part, tuple(entries.values()), _streamed(entries, listing.entries, progress))
                what = "one safetensors file"
            else:
                part.mkdir()
                _directory(listing, part, _filled(entries, shard_bytes), progress)
                what = "a directory of safetensors"
        part.rename(place)
    except OSError as error:
        raise cannot_write(place, error) from error
    finally:
        if os.path.isdir(part):
            shutil.rmtree(part, ignore_errors=True)
        elif os.path.exists(part):
            part.unlink()
    return place, f"{what}: {len(entries)} tensors, {total:,} bytes"


def _filled(entries: Mapping[str, StoredTensor], shard_bytes: int) -> list[dict[str, StoredTensor]]:
    """Fill files up, in order."""
    files: list[dict[str, StoredTensor]] = [{}]
    size = 0
    for name, entry in entries.items():
        if files[-1] and size + entry.nbytes > shard_bytes:
            files.append({})
            size = 0
        files[-1][name] = entry
        size += entry.nbytes
    return files


def _streamed(
    names: Sequence[str] | Mapping[str, object], entries: Mapping[str, Entry], progress: Progress
) -> Iterator[torch.Tensor]:
    for name in names:
        yield read_tensors((name,), entries, progress)[name]


def _directory(listing: Listing, part: Path, files: Sequence[Mapping[str, StoredTensor]], progress: Progress) -> None:
    names = (
        [WHOLE] if len(files) == 1 else [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    )
    for name, held in zip(names, files, strict=True):
        write_file(part / name, tuple(held.values()), _streamed(held, listing.entries, progress))
    if len(files) > 1:
        total = sum(entry.nbytes for held in files for entry in held.values())
        weight_map = {tensor: name for name, held in zip(names, files, strict=True) for tensor in held}
        write_json(part / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _checkpoint(listing: Listing, part: Path, files: Sequence[Mapping[str, StoredTensor]], progress: Progress) -> None:
    sizes, tensors = {}, {}
    for index, held in enumerate(files):
        file = part / f"rank-{index:05}.safetensors"
        sizes[file.name] = write_file(file, tuple(held.values()), _streamed(held, listing.entries, progress))
        for name, entry in held.items():
            chunk = Chunk(file, name, (0,) * len(entry.shape), entry.shape)
            tensors[name] = Entry(entry.dtype, entry.shape, (chunk,))
    write_manifest(part, Manifest(_model_of(listing.path), None, None, sizes, tensors))


def _model_of(path: Path) -> str:
    """Give the name of the model that a directory's configuration is of; nothing where there is none."""
    try:
        found = json.loads((path / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return ""
    return str(found)
