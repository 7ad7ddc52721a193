"""``pipe.save_pretrained``: a directory that ``from_pretrained`` of the plain model reads, each rank its own files."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fxpipe.errors import WeightsError
from fxpipe.runtime.build.stage import StageModule
from fxpipe.runtime.build.state import held_tensors
from fxpipe.runtime.build.wrappers import is_peft
from fxpipe.runtime.ranks.groups import Groups
from fxpipe.runtime.weights.conversions import Conversion, is_transformers, writing_conversions
from fxpipe.runtime.weights.disk.directory import INDEX, WHOLE
from fxpipe.runtime.weights.disk.files import StoredTensor, cannot_write, write_file, write_json
from fxpipe.runtime.weights.model import Model
from fxpipe.runtime.weights.ranks import Everyone, brought, holders, whole
from fxpipe.runtime.weights.target import Target
from fxpipe.runtime.weights.trainable import save_trainable

SHARD_BYTES = 5 * 10**9
"""Largest file, unless one tensor is larger; as large as transformers makes them by default up to its fifth version."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One file.

    Attributes:
        position: The rank that writes it.
        sources: What is in it.
        nbytes: Bytes of its data.
    """

    position: int
    sources: tuple[Conversion, ...]
    nbytes: int

    @property
    def entries(self) -> tuple[StoredTensor, ...]:
        """Its tensors, in order."""
        return tuple(made for source in self.sources for made in source.gives)


def save_pretrained(
    path: str | os.PathLike[str],
    model: Model,
    stages: Sequence[StageModule],
    groups: Groups | None,
    everyone: Everyone,
    caching: Sequence[Any] = (),
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write safetensors, an index where there are several, and the configuration, to a new directory.

    Args:
        path: Must not exist.
        model: The whole model's names; of transformers. One that peft wrapped writes its adapters, as peft does.
        stages: This rank's stages.
        groups: The pipeline's groups; None where one process holds it all.
        everyone: All ranks, of all replicas.
        caching: Configurations whose ``use_cache`` was switched off for capture; they are written with it on.
        shard_bytes: Largest file.

    Raises:
        WeightsError: On every rank. Nothing is left then.
    """
    if is_peft(model.module):
        save_trainable(path, model, stages, groups, everyone)
        return
    held = held_tensors(model.names, stages)
    kept = {first: tensor for first, tensor in held.items() if first in model.names.tensors}
    where = holders(kept, groups)
    target = Target(path, everyone)
    error: Exception | None = None
    shards: tuple[Shard, ...] = ()
    spelled: dict[str, str] = {}
    try:
        spelled = _spelled(model)
        _check(model, spelled, where)
        sources = writing_conversions(
            model.module,
            {fqn: StoredTensor(fqn, where[first][1].dtype, where[first][1].shape) for fqn, first in spelled.items()},
        )
        shards = _shards(sources, spelled, where, shard_bytes)
    except Exception as found:  # whatever it is, transformers' own: no rank may wait for this one
        error = found
    target.make(sum(shard.nbytes for shard in shards), error)
    position = groups.position if groups is not None else 0
    is_first_replica = groups is None or groups.replica == 0
    for index, shard in enumerate(shards):
        tensors = _converted(shard, spelled, held, where, groups)
        if position != shard.position or not is_first_replica:
            for _ in tensors:
                pass
            continue
        try:
            write_file(target.part / _file_name(index, len(shards)), shard.entries, tensors)
        except Exception as found:
            error = error or found
            for _ in tensors:
                pass
    target.agree(error)
    target.finish(lambda directory: _describe(directory, model, shards, caching))


def _spelled(model: Model) -> dict[str, str]:
    """Give first FQNs by the name that transformers keeps of each tensor; non-persistent buffers have none."""
    if not is_transformers(model.module):
        raise WeightsError(
            f"save_pretrained needs a model of transformers, and this is a {model.name}\n"
            "  use pipe.save, and fxpipe convert for safetensors under the model's own names"
        )
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    names = model.names
    state = {fqn: torch.empty(names.tensors[names.first[fqn]].shape, device="meta") for fqn in names.saved}
    module: Any = model.module
    for ignored in module._keys_to_ignore_on_save or ():
        state.pop(ignored, None)
    left: dict[str, Any] = remove_tied_weights_from_state_dict(state, module)
    spelled: dict[str, str] = {}
    seen: set[str] = set()
    for fqn in left:
        if names.first[fqn] not in seen:
            seen.add(names.first[fqn])
            spelled[fqn] = names.first[fqn]
    return spelled


def _check(model: Model, spelled: Mapping[str, str], where: Mapping[str, Any]) -> None:
    absent = [fqn for fqn, first in spelled.items() if first not in where]
    if absent:
        raise WeightsError(
            f"no stage of {model.name} holds {', '.join(absent[:8])}{' …' if len(absent) > 8 else ''}\n"
            "  the loss does not reach it, so that the directory would not be whole"
        )


def _shards(
    sources: Sequence[Conversion],
    spelled: Mapping[str, str],
    where: Mapping[str, tuple[int, StoredTensor]],
    shard_bytes: int,
) -> tuple[Shard, ...]:
    """Give each source to the first rank that holds something of it, and fill files up."""
    by_position: dict[int, list[Conversion]] = {}
    for source in sources:
        position = min(where[spelled[name]][0] for name in source.reads)
        by_position.setdefault(position, []).append(source)
    shards: list[Shard] = []
    for position, own in sorted(by_position.items()):
        part: list[Conversion] = []
        size = 0
        for source in own:
            nbytes = sum(made.nbytes for made in source.gives)
            if part and size + nbytes > shard_bytes:
                shards.append(Shard(position, tuple(part), size))
                part, size = [], 0
            part.append(source)
            size += nbytes
        shards.append(Shard(position, tuple(part), size))
    return tuple(shards)


def _converted(
    shard: Shard,
    spelled: Mapping[str, str],
    held: Mapping[str, torch.Tensor],
    where: Mapping[str, tuple[int, StoredTensor]],
    groups: Groups | None,
) -> Iterator[torch.Tensor]:
    """Yield a file's tensors on the rank that writes it, one source at a time; others send what it needs."""
    for source in shard.sources:
        firsts = [spelled[name] for name in source.reads]
        tensors = dict(zip(source.reads, brought(firsts, held, where, groups, shard.position), strict=False))
        if not tensors:
            continue
        if source.convert is None:
            yield whole(tensors[source.reads[0]])
        else:
            made = source.convert(tensors)
            yield from (made[entry.name] for entry in source.gives)


def _file_name(index: int, count: int) -> str:
    return WHOLE if count == 1 else f"model-{index + 1:05}-of-{count:05}.safetensors"


def _describe(directory: Path, model: Model, shards: Sequence[Shard], caching: Sequence[Any]) -> None:
    """Write the index, and the configuration as ``save_pretrained`` of transformers does."""
    if len(shards) > 1:
        weight_map = {
            entry.name: _file_name(index, len(shards)) for index, shard in enumerate(shards) for entry in shard.entries
        }
        total = sum(shard.nbytes for shard in shards)
        write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    module: Any = model.module
    for each in caching:
        each.use_cache = True
    try:
        configuration = copy.deepcopy(module.config)
        generation = copy.deepcopy(getattr(module, "generation_config", None))
    finally:
        for each in caching:
            each.use_cache = False
    configuration.dtype = str(module.dtype).removeprefix("torch.")
    configuration.architectures = [type(module).__name__]
    try:
        configuration.save_pretrained(directory)
        if generation is not None and module.can_generate():
            generation.save_pretrained(directory)
    except OSError as error:
        raise cannot_write(directory, error) from error
