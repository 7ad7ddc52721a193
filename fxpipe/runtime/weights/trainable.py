"""``pipe.save(path, only="trainable")``: the trained part alone, in peft's form for a model that peft wrapped."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fxpipe.errors import WeightsError
from fxpipe.runtime.build.stage import StageModule
from fxpipe.runtime.build.state import held_tensors
from fxpipe.runtime.build.wrappers import Derived, is_peft, written_by_peft
from fxpipe.runtime.ranks.groups import Groups
from fxpipe.runtime.weights.disk.directory import ADAPTER, TRAINABLE
from fxpipe.runtime.weights.disk.files import StoredTensor, cannot_write, stored, write_file
from fxpipe.runtime.weights.model import Model
from fxpipe.runtime.weights.ranks import Everyone, brought, holders
from fxpipe.runtime.weights.target import Target


@dataclass(frozen=True, slots=True)
class _Piece:
    """A tensor of a file.

    Attributes:
        entry: It.
        reads: First FQNs of the model's tensors that it is made of.
        is_made: Whether peft computes it of those; else it is the one, as it is.
    """

    entry: StoredTensor
    reads: tuple[str, ...]
    is_made: bool = False


_File = tuple[Path, tuple[_Piece, ...]]


def save_trainable(
    path: str | os.PathLike[str],
    model: Model,
    stages: Sequence[StageModule],
    groups: Groups | None,
    everyone: Everyone,
) -> None:
    """Write all ranks' trainable tensors to a new directory; the first rank writes, one tensor at a time.

    For a model of peft: ``adapter_model.safetensors`` and ``adapter_config.json``, as ``PeftModel.from_pretrained``
    reads them, other adapters than the default one in folders of their names. Else ``trainable.safetensors``, by FQN.

    Raises:
        WeightsError: On every rank. Nothing is left then.
    """
    held = held_tensors(model.names, stages)
    # Every replica holds the same; the first one's first rank writes.
    writes = groups is None or (groups.position == 0 and groups.replica == 0)
    adapters = _Adapters(model)
    files: list[_File] | None = None
    error: Exception | None = None
    try:
        files = adapters.files() if writes and is_peft(model.module) else None
    except Exception as found:  # whatever it is, peft's own: no rank may wait for this one
        error = found
    files = next((found for found in everyone.gather(files) if found is not None), [])
    wanted = {fqn for _, pieces in files for piece in pieces for fqn in piece.reads}
    where = holders(
        {fqn: tensor for fqn, tensor in held.items() if fqn in wanted or _is_kept(fqn, tensor, model)}, groups
    )
    target = Target(path, everyone)
    try:
        files = _as_held(files, where) if is_peft(model.module) else [_by_name(where, model)]
        if error is None and not any(pieces for _, pieces in files):
            raise WeightsError(f"{model.name} has no trainable tensors\n  save all of it: leave out only=")
    except WeightsError as found:
        error = error or found
    target.make(sum(piece.entry.nbytes for _, pieces in files for piece in pieces), error)
    for file, pieces in files:
        tensors = _made(pieces, adapters, file, held, where, groups, writes)
        if writes:
            error = error or _written(target.part / file, [piece.entry for piece in pieces], tensors)
        for _ in tensors:  # what is left: other ranks send it
            pass
    target.agree(error)
    target.finish(lambda directory: _configure(directory, model))


def _is_kept(fqn: str, tensor: torch.Tensor, model: Model) -> bool:
    return not is_peft(model.module) and (tensor.requires_grad or fqn not in model.names.tensors)


def _by_name(where: Mapping[str, tuple[int, StoredTensor]], model: Model) -> _File:
    """Give the file of a model without peft."""
    trained = {fqn for fqn, parameter in model.module.named_parameters() if parameter.requires_grad}
    names = (fqn for fqn in where if fqn not in model.names.tensors or fqn in trained)
    return Path(TRAINABLE), tuple(_Piece(where[fqn][1], (fqn,)) for fqn in names)


def _as_held(files: Sequence[_File], where: Mapping[str, tuple[int, StoredTensor]]) -> list[_File]:
    """See that ranks hold what files are made of, and give it the shapes and dtypes that it has there."""
    missing = [fqn for _, pieces in files for piece in pieces for fqn in piece.reads if fqn not in where]
    if missing:
        raise WeightsError(
            f"no stage holds {missing[0]}, which is of an adapter\n"
            "  the loss does not reach it: leave that module out of the adapter's target_modules"
        )
    return [
        (
            path,
            tuple(
                piece
                if piece.is_made
                else replace(piece, entry=replace(where[piece.reads[0]][1], name=piece.entry.name))
                for piece in pieces
            ),
        )
        for path, pieces in files
    ]


class _Adapters:
    """What peft writes of each adapter, on the rank that writes: made of tensors that other ranks hold."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._written: dict[tuple[Path, str], Derived] = {}

    def files(self) -> list[_File]:
        """Say what is in which file."""
        module: Any = self._model.module
        files: list[_File] = []
        for adapter in module.peft_config:
            path = _folder(module, adapter) / ADAPTER
            found = written_by_peft(module, self._model.names.first, adapter, embeddings=True)
            self._written.update({(path, name): derived for name, derived in found.items()})
            pieces = (_Piece(stored(name, each.tensor), each.reads, not each.is_one) for name, each in found.items())
            files.append((path, tuple(pieces)))
        return files

    def made(self, path: Path, name: str, here: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Compute what peft computes (prompts, of their encoders), of the tensors that are here."""
        return self._written[path, name].made(here)


def _made(
    pieces: Sequence[_Piece],
    adapters: _Adapters,
    path: Path,
    held: Mapping[str, torch.Tensor],
    where: Mapping[str, tuple[int, StoredTensor]],
    groups: Groups | None,
    writes: bool,
) -> Iterator[torch.Tensor]:
    """Yield a file's tensors, one after the other, on the rank that writes; every rank runs it to its end."""
    for piece in pieces:
        here = dict(zip(piece.reads, brought(piece.reads, held, where, groups), strict=False))
        if writes:
            yield adapters.made(path, piece.entry.name, here) if piece.is_made else here[piece.reads[0]]


def _folder(module: Any, adapter: str) -> Path:
    return Path() if adapter == "default" or len(module.peft_config) == 1 else Path(adapter)


def _written(path: Path, entries: Sequence[StoredTensor], tensors: Iterator[torch.Tensor]) -> Exception | None:
    """Write a file; gives what went wrong."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, entries, tensors)
    except OSError as error:
        return cannot_write(path, error)
    except Exception as error:  # whatever it is, others are sending
        return error
    return None


def _configure(directory: Path, model: Model) -> None:
    """Write the configurations as ``PeftModel.save_pretrained`` does."""
    module: Any = model.module
    base = type(model.plain_root()[1])
    for adapter, configuration in module.peft_config.items() if is_peft(module) else ():
        folder = _folder(module, adapter)
        was, configuration.inference_mode = configuration.inference_mode, True
        mapping = None
        if configuration.task_type is None:
            mapping = {"base_model_class": base.__name__, "parent_library": base.__module__}
        try:
            configuration.save_pretrained(directory / folder, auto_mapping_dict=mapping)
        except OSError as error:
            raise cannot_write(directory / folder, error) from error
        finally:
            configuration.inference_mode = was
