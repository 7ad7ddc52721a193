"""``pipe.save(path, only="trainable")``: the trained part alone, in peft's form for a model that peft wrapped."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fxpipe.errors import WeightsError
from fxpipe.runtime.build.stage import StageModule
from fxpipe.runtime.build.state import held_tensors
from fxpipe.runtime.build.wrappers import is_peft
from fxpipe.runtime.ranks.groups import Groups
from fxpipe.runtime.weights.disk.directory import ADAPTER, TRAINABLE
from fxpipe.runtime.weights.disk.files import StoredTensor, cannot_write, write_file
from fxpipe.runtime.weights.gathering import brought, holders
from fxpipe.runtime.weights.matching import adapter_names
from fxpipe.runtime.weights.model import Model
from fxpipe.runtime.weights.ranks import Everyone
from fxpipe.runtime.weights.target import Target

Named = tuple[Path, tuple[StoredTensor, ...], tuple[str, ...]]


def save_trainable(
    path: str | os.PathLike[str],
    model: Model,
    stages: Sequence[StageModule],
    groups: Groups | None,
    everyone: Everyone,
) -> None:
    """Write all ranks' trainable tensors to a new directory; the first rank writes, one tensor at a time.

    For a model of peft: ``adapter_model.safetensors`` and ``adapter_config.json``, as ``PeftModel.from_pretrained``
    reads them, other adapters than the active one in folders of their names. Else ``trainable.safetensors``, by FQN.

    Raises:
        WeightsError: On every rank. Nothing is left then.
    """
    held = held_tensors(model.names, stages)
    where = holders({fqn: tensor for fqn, tensor in held.items() if _is_kept(fqn, tensor, model)}, groups)
    target = Target(path, everyone)
    error: Exception | None = None
    files: list[Named] = []
    configurations: list[tuple[Path, Any]] = []
    try:
        if is_peft(model.module):
            files, configurations = _of_adapters(model, where)
        else:
            names = tuple(fqn for fqn in where if _trains(fqn, model))
            files = [(Path(TRAINABLE), tuple(where[fqn][1] for fqn in names), names)]
        if not any(names for _, _, names in files):
            raise WeightsError(f"{model.name} has no trainable tensors\n  save all of it: leave out only=")
    except Exception as found:  # whatever it is, peft's own: no rank may wait for this one
        error = found
    target.make(sum(entry.nbytes for _, entries, _ in files for entry in entries), error)
    # Every replica holds the same; the first one's first rank writes.
    writes = groups is None or (groups.position == 0 and groups.replica == 0)
    for file, entries, names in files:
        tensors = brought(names, held, where, groups)
        if not writes:
            _exhaust(tensors)
            continue
        error = _attempt(error, lambda: _write(target.part / file, entries, tensors))  # noqa: B023 (called at once)
    target.agree(error)
    base = type(model.plain_root()[1])
    target.finish(lambda directory: _configure(directory, configurations, base))


def _is_kept(fqn: str, tensor: torch.Tensor, model: Model) -> bool:
    return tensor.requires_grad or fqn in model.added() or fqn not in model.names.tensors


def _trains(fqn: str, model: Model) -> bool:
    trainable = dict(model.module.named_parameters())
    return fqn not in model.names.tensors or (fqn in trainable and trainable[fqn].requires_grad)


def _of_adapters(
    model: Model, where: Mapping[str, tuple[int, StoredTensor]]
) -> tuple[list[Named], list[tuple[Path, Any]]]:
    module: Any = model.module
    state = dict(module.state_dict(keep_vars=True))
    files: list[Named] = []
    configurations = []
    for adapter, configuration in module.peft_config.items():
        folder = Path() if adapter == "default" or len(module.peft_config) == 1 else Path(adapter)
        found = adapter_names(module, state, adapter)
        firsts = {name: model.names.first[fqn] for name, fqn in found.items()}
        missing = [first for first in firsts.values() if first not in where]
        if missing:
            raise WeightsError(
                f"no stage holds {missing[0]}, which is of the adapter {adapter}\n"
                "  the loss does not reach it: leave that module out of the adapter's target_modules"
            )
        entries = tuple(
            StoredTensor(name, where[first][1].dtype, where[first][1].shape) for name, first in firsts.items()
        )
        files.append((folder / ADAPTER, entries, tuple(firsts.values())))
        configurations.append((folder, configuration))
    return files, configurations


def _configure(directory: Path, configurations: Sequence[tuple[Path, Any]], base: type) -> None:
    """Write the configurations as ``PeftModel.save_pretrained`` does."""
    for folder, configuration in configurations:
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


def _write(path: Path, entries: Sequence[StoredTensor], tensors: Any) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, entries, tensors)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        _exhaust(tensors)  # others are sending


def _attempt(error: Exception | None, action: Callable[[], None]) -> Exception | None:
    try:
        action()
    except Exception as found:
        return error or found
    return error


def _exhaust(tensors: Any) -> None:
    for _ in tensors:
        pass
