"""The manifest of a checkpoint: what is in it and where; written last, so that a whole one means a whole checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fxpipe.errors import WeightsError
from fxpipe.runtime.weights.disk.files import write_json

NAME = "fxpipe.json"
"""Name of the file."""
OPTIMIZER, MODULE = "optimizer/", "module/"
"""How the names of tensors begin that belong to the optimiser, and to what a module saves beside its own."""
FORMAT = 1
"""Changes when an older fxpipe could not read it any more."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A box of a tensor in a file.

    Attributes:
        file: The file.
        name: Of the chunk, in the file.
        offsets: Where it begins in the tensor, per dimension.
        shape: Its sizes.
    """

    file: Path
    name: str
    offsets: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor on disk.

    Attributes:
        dtype: torch's name, without the prefix.
        shape: Its sizes.
        chunks: Boxes that together are the tensor; most have one.
    """

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, slots=True)
class OptimizerRecord:
    """An optimiser's state but for its tensors.

    Attributes:
        kind: Name of its class.
        groups: Options, encoded, and the FQNs of the parameters they are for.
        scalars: By FQN, state that is no tensor, encoded.
        scheduler_groups: Position in ``groups`` of each group of the rank whose scheduler was saved.
    """

    kind: str
    groups: tuple[tuple[Mapping[str, Any], tuple[str, ...]], ...]
    scalars: Mapping[str, Mapping[str, Any]]
    scheduler_groups: tuple[int | None, ...] = ()


@dataclass(frozen=True, slots=True)
class Manifest:
    """What is in a checkpoint.

    Attributes:
        model: Name of the model's class.
        step: Steps the pipeline had made.
        seed: Seed of its random numbers.
        files: Bytes of each file, by name.
        tensors: Weights by first FQN.
        state: Tensors of the optimiser, by ``optimizer_key``, and of what modules save besides.
        optimizer: The rest of it; None: none was saved.
        scheduler: A scheduler's state, encoded; None: none was saved.
        extra: The user's own values.
        modules: What modules save beside tensors, encoded, by its key in the model's ``state_dict``.
    """

    model: str
    step: int | None
    seed: int | None
    files: Mapping[str, int]
    tensors: Mapping[str, Entry]
    state: Mapping[str, Entry] = field(default_factory=dict)
    optimizer: OptimizerRecord | None = None
    scheduler: Any = None
    extra: Any = None
    modules: Mapping[str, Any] = field(default_factory=dict)


def optimizer_key(fqn: str, name: str) -> str:
    """Name the state ``name`` of a parameter among a checkpoint's tensors.

    >>> optimizer_key("head.weight", "exp_avg")
    'optimizer/head.weight/exp_avg'
    """
    return f"{OPTIMIZER}{fqn}/{name}"


def parameter_of(key: str) -> tuple[str, str]:
    """Give the FQN and the name of what ``optimizer_key`` named.

    >>> parameter_of("optimizer/head.weight/exp_avg")
    ('head.weight', 'exp_avg')
    """
    fqn, _, name = key.partition("/")[2].rpartition("/")
    return fqn, name


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write the manifest: from now on the directory is a checkpoint.

    Raises:
        WeightsError: It cannot be written.
    """
    optimizer = manifest.optimizer
    write_json(
        directory / NAME,
        {
            "format": FORMAT,
            "model": manifest.model,
            "step": manifest.step,
            "seed": manifest.seed,
            "extra": manifest.extra,
            "modules": dict(manifest.modules),
            "scheduler": manifest.scheduler,
            "optimizer": optimizer
            and {
                "kind": optimizer.kind,
                "groups": [{"options": options, "parameters": list(fqns)} for options, fqns in optimizer.groups],
                "scalars": optimizer.scalars,
                "scheduler_groups": list(optimizer.scheduler_groups),
            },
            "files": dict(manifest.files),
            "tensors": {name: _written(entry) for name, entry in manifest.tensors.items()},
            "state": {name: _written(entry) for name, entry in manifest.state.items()},
        },
    )


def read_manifest(directory: Path) -> Manifest:
    """Read the manifest of a checkpoint, and see that all its files are there and whole.

    Raises:
        WeightsError: There is no whole manifest, or a file is missing or has another size; names the directory.
    """
    path = directory / NAME
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] != FORMAT:
            raise WeightsError(
                f"{directory} is a checkpoint of format {data['format']}, and this fxpipe reads {FORMAT}\n"
                "  load it with the fxpipe that wrote it"
            )
        manifest = _manifest(directory, data)
    except FileNotFoundError as error:
        raise WeightsError(
            f"{directory} is no checkpoint: it has no {NAME}, which a save writes last\n"
            "  give an earlier checkpoint, or the directory that holds them, of which the newest whole one is taken"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, WeightsError):
            raise
        raise WeightsError(
            f"{directory} is no whole checkpoint: {path.name} cannot be read ({type(error).__name__}: {error})\n"
            "  give an earlier checkpoint"
        ) from error
    for name, size in manifest.files.items():
        file = directory / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            what = f"{name} is missing" if found is None else f"{name} has {found} bytes of {size}"
            raise WeightsError(
                f"{directory} is no whole checkpoint: {what}\n  copy it again, or give an earlier checkpoint"
            )
    return manifest


def _manifest(directory: Path, data: Mapping[str, Any]) -> Manifest:
    files = {str(name): int(size) for name, size in data["files"].items()}
    optimizer = data["optimizer"]
    counts = data["step"], data["seed"]
    if counts != (None, None) and not all(type(count) is int for count in counts):
        raise TypeError(f"step and seed are {counts}")
    if not isinstance(data["modules"], dict):
        raise TypeError("modules is no object")
    return Manifest(
        model=data["model"],
        step=data["step"],
        seed=data["seed"],
        files=files,
        tensors={name: _entry(directory, files, entry) for name, entry in data["tensors"].items()},
        state={name: _entry(directory, files, entry) for name, entry in data["state"].items()},
        optimizer=None
        if optimizer is None
        else OptimizerRecord(
            optimizer["kind"],
            tuple((group["options"], tuple(group["parameters"])) for group in optimizer["groups"]),
            optimizer["scalars"],
            tuple(optimizer["scheduler_groups"]),
        ),
        scheduler=data["scheduler"],
        extra=data["extra"],
        modules=data["modules"],
    )


def _written(entry: Entry) -> dict[str, Any]:
    chunks = [
        {"file": chunk.file.name, "name": chunk.name, "offsets": list(chunk.offsets), "shape": list(chunk.shape)}
        for chunk in entry.chunks
    ]
    return {"dtype": entry.dtype, "shape": list(entry.shape), "chunks": chunks}


def _entry(directory: Path, files: Mapping[str, int], data: Mapping[str, Any]) -> Entry:
    chunks = []
    for chunk in data["chunks"]:
        if chunk["file"] not in files or Path(chunk["file"]).name != chunk["file"]:
            raise WeightsError(
                f"{directory} is no whole checkpoint: its manifest names the file {chunk['file']!r}, which is not of "
                "it\n  give a checkpoint that pipe.save wrote"
            )
        file = directory / chunk["file"]
        chunks.append(Chunk(file, chunk["name"], tuple(chunk["offsets"]), tuple(chunk["shape"])))
    return Entry(data["dtype"], tuple(data["shape"]), tuple(chunks))
