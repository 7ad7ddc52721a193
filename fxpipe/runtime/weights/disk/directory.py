"""What lies at a path: a checkpoint, a Hugging Face directory, an adapter, or one safetensors file."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fxpipe.errors import WeightsError
from fxpipe.runtime.build.values import INIT_WORDS
from fxpipe.runtime.weights.disk.files import PICKLES, StoredTensor, read_header
from fxpipe.runtime.weights.disk.manifest import NAME, Chunk, Entry, Manifest, read_manifest

Kind = Literal["checkpoint", "safetensors", "adapter", "trainable"]

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER, TRAINABLE = "adapter_model.safetensors", "trainable.safetensors"


@dataclass(frozen=True, slots=True)
class Listing:
    """The tensors at a path.

    Attributes:
        path: The directory or file.
        kind: A checkpoint of ``pipe.save``; weights of another origin; an adapter of peft; trainable tensors alone.
        entries: Weights by the name they have there; those of a further adapter after ``"its name/"``.
        manifest: Of a checkpoint.
    """

    path: Path
    kind: Kind
    entries: Mapping[str, Entry]
    manifest: Manifest | None = None

    @property
    def order(self) -> str:
        """What all ranks must find alike."""
        step = None if self.manifest is None else self.manifest.step
        return f"{self.path.name}: {self.kind}, {len(self.entries)} tensors, step {step}"


def weights_path(init: object) -> str | os.PathLike[str] | None:
    """Give what ``materialize`` is to load, where ``init`` is a path and not one of its words.

    >>> weights_path("huggingface"), weights_path(Path("checkpoints"))
    (None, PosixPath('checkpoints'))
    """
    if isinstance(init, os.PathLike):
        return init
    if isinstance(init, str) and init not in INIT_WORDS and (os.sep in init or os.path.exists(init)):
        return init
    return None


def list_path(path: str | os.PathLike[str]) -> Listing:
    """Look what lies at a path; only names, shapes and dtypes are read.

    Args:
        path: A ``.safetensors`` file; a directory with ``model.safetensors``, or an index and its files, or those of an
            adapter; a checkpoint; or a directory of checkpoints, of which the newest whole one is taken.

    Raises:
        WeightsError: There is nothing of the kind, or it is not whole; names the file.
    """
    if not isinstance(path, str | os.PathLike):
        raise WeightsError(f"{path!r} is no path\n  give a directory of weights, a .safetensors file or a checkpoint")
    try:
        return _list(Path(path))
    except OSError as error:
        raise WeightsError(
            f"{path} cannot be read: {error.strerror or error}\n"
            "  give a directory of weights, a .safetensors file or a checkpoint that this process may read"
        ) from error


def _list(place: Path) -> Listing:
    if not place.exists():
        raise WeightsError(f"there is no {place}\n  give a directory of weights, a .safetensors file or a checkpoint")
    if place.is_file():
        if place.name == INDEX:
            return Listing(place.parent, "safetensors", _sharded(place))
        return Listing(place, "safetensors", _single(place))
    if (place / NAME).exists():
        return _checkpoint(place)
    if (place / WHOLE).exists():
        return Listing(place, "safetensors", _single(place / WHOLE))
    if adapters := _adapters(place):
        return Listing(place, "adapter", adapters)
    if (place / TRAINABLE).exists():
        return Listing(place, "trainable", _single(place / TRAINABLE))
    if (place / INDEX).exists():
        return Listing(place, "safetensors", _sharded(place / INDEX))
    single = sorted(file for file in place.glob("*.safetensors") if file.is_file())
    if len(single) == 1 and not _is_unfinished(place):
        return Listing(place, "safetensors", _single(single[0]))
    found = newest(place)
    if found is not None:
        return _checkpoint(found)
    raise _nothing(place, single)


def _checkpoint(place: Path) -> Listing:
    """A checkpoint that ``fxpipe convert`` made of files has their names, not the model's."""
    manifest = read_manifest(place)
    headers = {name: {part.name: part for part in read_header(place / name)} for name in manifest.files}
    for name, entry in (*manifest.tensors.items(), *manifest.state.items()):
        if fault := _fault(entry, headers):
            raise WeightsError(
                f"{place} is no whole checkpoint: {name} {fault}\n  copy it again, or give an earlier checkpoint"
            )
    return Listing(place, "safetensors" if manifest.step is None else "checkpoint", manifest.tensors, manifest)


def _fault(entry: Entry, headers: Mapping[str, Mapping[str, StoredTensor]]) -> str | None:
    """Say in what way files do not hold a tensor as the manifest has it."""
    for chunk in entry.chunks:
        held = headers[chunk.file.name].get(chunk.name)
        if held is None or (held.dtype, held.shape) != (entry.dtype, chunk.shape):
            return f"is not in {chunk.file.name} as {NAME} has it"
        box = zip(chunk.offsets, chunk.shape, entry.shape, strict=False)
        if len(chunk.offsets) != len(entry.shape) or any(not 0 <= at <= at + size <= of for at, size, of in box):
            return f"has a part outside of its shape {list(entry.shape)}"
    elements = sum(math.prod(chunk.shape) for chunk in entry.chunks)
    if elements != math.prod(entry.shape) or len({chunk.offsets for chunk in entry.chunks}) != len(entry.chunks):
        return f"has parts of {elements} of its {math.prod(entry.shape)} elements"
    return None


def newest(parent: Path) -> Path | None:
    """Give the newest whole checkpoint of a directory of them: by step, then by the time its manifest was written.

    Those that are not whole are passed over.
    """
    found = []
    for place in sorted(parent.iterdir()):
        if place.name.startswith(".") or not (place / NAME).is_file():
            continue
        try:
            step = read_manifest(place).step
        except WeightsError:
            continue
        found.append((-1 if step is None else step, (place / NAME).stat().st_mtime_ns, place))
    return max(found)[2] if found else None


def _single(path: Path) -> dict[str, Entry]:
    return {
        part.name: Entry(part.dtype, part.shape, (Chunk(path, part.name, (0,) * len(part.shape), part.shape),))
        for part in read_header(path)
    }


def _adapters(place: Path) -> dict[str, Entry]:
    """Give the tensors of an adapter, and of others in folders of their names: these stand before the tensors'."""
    found = _single(place / ADAPTER) if (place / ADAPTER).exists() else {}
    for folder in sorted(place.iterdir()):
        if (folder / ADAPTER).is_file():
            found.update((f"{folder.name}/{name}", entry) for name, entry in _single(folder / ADAPTER).items())
    return found


def _sharded(index: Path) -> dict[str, Entry]:
    directory = index.parent
    weight_map = _weight_map(index)
    outside = sorted({str(file) for file in weight_map.values() if not _is_inside(file)})
    if outside:
        raise WeightsError(
            f"{index} names {', '.join(outside)}, outside of its directory\n"
            "  an index names files beside it; do not load this one unless you know where it comes from"
        )
    files = dict.fromkeys(weight_map.values())
    absent = [file for file in files if not (directory / file).is_file()]
    if absent:
        raise WeightsError(
            f"{directory} lacks {len(absent)} of the {len(files)} files its index names: {', '.join(absent[:8])}"
            f"{' …' if len(absent) > 8 else ''}\n  copy or download them"
        )
    held = {file: _single(directory / file) for file in files}
    astray = [name for name, file in weight_map.items() if name not in held[file]]
    if astray:
        raise WeightsError(
            f"{index} says that {astray[0]} is in {weight_map[astray[0]]}, which does not hold it"
            f"{f' (and {len(astray) - 1} more)' if len(astray) > 1 else ''}\n"
            "  index and files are of different downloads: fetch them again"
        )
    return {name: held[file][name] for name, file in weight_map.items()}


def _weight_map(index: Path) -> dict[str, str]:
    try:
        found: Any = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {str(name): str(file) for name, file in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(
            f"{index} is no index of safetensors files ({type(error).__name__}: {error})\n"
            '  it has an object "weight_map" of tensor names and files; download it again'
        ) from error


def _is_inside(file: str) -> bool:
    return Path(file).name == file and file not in ("", ".", "..")


def _is_unfinished(place: Path) -> bool:
    return any(place.glob("rank-*.safetensors"))


def _nothing(place: Path, single: list[Path]) -> WeightsError:
    pickles = sorted(entry.name for entry in place.iterdir() if entry.suffix in PICKLES)
    if _is_unfinished(place):
        return WeightsError(
            f"{place} is no checkpoint: it has no {NAME}, which a save writes last\n"
            "  give an earlier checkpoint, or the directory that holds them, of which the newest whole one is taken"
        )
    if pickles:
        return WeightsError(
            f"{place} holds pickles only ({', '.join(pickles[:4])}), which can run any code when they are read\n"
            "  convert them to safetensors where they come from (save_pretrained of transformers writes these)"
        )
    if single:
        return WeightsError(
            f"{place} has {len(single)} safetensors files and no {INDEX}\n  give one of the files, or add the index"
        )
    return WeightsError(
        f"{place} holds no weights\n"
        f"  give a directory with {WHOLE} or {INDEX}, a checkpoint of pipe.save, or a directory with whole checkpoints"
    )
