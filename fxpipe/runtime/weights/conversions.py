"""The conversions that transformers applies between files and models, by its own tables, for one rank's tensors.

transformers reads whole checkpoints. Here its transforms run twice: once on meta tensors, which tells what each gives,
and once on real ones, for those alone of which the rank holds something.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fxpipe.errors import WeightsError
from fxpipe.runtime.weights.disk.files import StoredTensor, stored

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Conversion:
    """How some tensors come out of others.

    Attributes:
        reads: Names of the tensors it needs.
        gives: What it makes of them.
        convert: Makes it; None: the one tensor that it reads, as it is.
    """

    reads: tuple[str, ...]
    gives: tuple[StoredTensor, ...]
    convert: Callable[[Tensors], Tensors] | None = None


@dataclass(slots=True)
class _Group:
    """Tensors that one transform takes together."""

    transform: Any
    members: list[tuple[str, str]] = field(default_factory=list)

    def convert(self, target: str, model: nn.Module, tensors: Tensors) -> dict[str, torch.Tensor]:
        transform = copy.deepcopy(self.transform)
        for name, pattern in self.members:
            transform.add_tensor(target, name, pattern, tensors[name])
        made = transform.convert(target, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def is_transformers(module: nn.Module) -> bool:
    """Tell whether a module is a model of transformers whose files its tables know how to read."""
    return hasattr(module, "config") and hasattr(module, "base_model_prefix") and hasattr(module, "save_pretrained")


def reading_conversions(
    model: nn.Module, entries: Mapping[str, StoredTensor], plain: Tensors
) -> tuple[Conversion, ...]:
    """Tell how a model's tensors come out of a file's, as ``from_pretrained`` would have them.

    Args:
        model: A model of transformers, with fake tensors.
        entries: The file's tensors.
        plain: The model's state dictionary, fake.

    Raises:
        WeightsError: A transform does not work on these tensors; names them.
    """
    loading = _loading()
    transforms = _mapping().get_model_conversion_mapping(model)
    renamings = [each for each in transforms if isinstance(each, loading.WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, loading.WeightConverter)]
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    prefix = model.base_model_prefix
    groups: dict[str, _Group] = {}
    sources: list[Conversion] = []
    for name in sorted(entries, key=loading.dot_natural_key):
        target, pattern = loading.rename_source_key(name, renamings, converters, prefix, plain)
        if target not in plain and name in plain:
            target, pattern = loading.rename_source_key(name, [], [], prefix, plain)
        if pattern is None or target not in plain:
            sources.append(_direct(name, target, entries[name]))
        else:
            groups.setdefault(target, _Group(by_pattern[pattern])).members.append((name, pattern))
    sources += [_converted(model, target, group, entries) for target, group in groups.items()]
    # What was used is what the inverse must undo when the model is saved, as transformers remembers it too.
    used: Any = model
    used._weight_conversions = [each for each in transforms if each.was_used()]
    return tuple(sources)


def writing_conversions(model: nn.Module, entries: Mapping[str, StoredTensor]) -> tuple[Conversion, ...]:
    """Tell how the tensors of a file come out of a model's, as ``save_pretrained`` would have them.

    Args:
        model: A model of transformers, with fake tensors.
        entries: The model's tensors, each once.

    Raises:
        WeightsError: A transform has no inverse, or does not work on these tensors.
    """
    loading = _loading()
    transforms = getattr(model, "_weight_conversions", None)
    if transforms is None:
        found = _mapping().get_model_conversion_mapping(model, add_legacy=False)
        transforms = [each for each in found if not isinstance(each, loading.PrefixChange)]
    reverse = [each.reverse_transform() for each in reversed(transforms)]
    renamings = [each for each in reverse if isinstance(each, loading.WeightRenaming)]
    converters = [each for each in reverse if isinstance(each, loading.WeightConverter)]
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    groups: dict[str, _Group] = {}
    sources: list[Conversion] = []

    def final(name: str) -> str:
        renamed: str = loading.rename_source_key(name, renamings, [])[0]
        return renamed

    for name in sorted(entries, key=loading.dot_natural_key):
        target, pattern = loading.rename_source_key(name, [], converters)
        if pattern is None:
            sources.append(_direct(name, final(name), entries[name]))
        else:
            groups.setdefault(target, _Group(by_pattern[pattern])).members.append((name, pattern))

    def renamed(made: Tensors) -> dict[str, torch.Tensor]:
        return {final(name): tensor for name, tensor in made.items()}

    sources += [_converted(model, target, group, entries, renamed) for target, group in groups.items()]
    return tuple(sources)


def ignored_names(model: nn.Module, buffers: Iterable[str]) -> tuple[re.Pattern[str] | None, re.Pattern[str] | None]:
    """Give the patterns of names that a model's files may have too many, and may lack, as transformers has it.

    Args:
        model: A model of transformers.
        buffers: FQNs of its buffers.
    """
    unexpected = list(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    names = list(buffers)
    if any(name.endswith("rotary_emb.inv_freq") for name in names):
        unexpected.append(r"rotary_emb\.inv_freq")
    if any(name.endswith("position_ids") for name in names):
        unexpected.append(r"(^|\.)position_ids$")
    missing = list(getattr(model, "_keys_to_ignore_on_load_missing", None) or ())
    return _any_of(sorted(unexpected)), _any_of(sorted(missing))


def _direct(name: str, target: str, entry: StoredTensor) -> Conversion:
    return Conversion((name,), (StoredTensor(target, entry.dtype, entry.shape),))


def _converted(
    model: nn.Module,
    target: str,
    group: _Group,
    entries: Mapping[str, StoredTensor],
    after: Callable[[Tensors], dict[str, torch.Tensor]] = dict,
) -> Conversion:
    reads = tuple(name for name, _ in group.members)

    def convert(tensors: Tensors) -> dict[str, torch.Tensor]:
        return after(group.convert(target, model, tensors))

    metas = {
        name: torch.empty(entries[name].shape, dtype=getattr(torch, entries[name].dtype), device="meta")
        for name in reads
    }
    try:
        made = convert(metas)
    except Exception as error:  # whatever a transform raises
        raise WeightsError(
            f"{_several(reads)} cannot be converted to {target} as transformers does: {type(error).__name__}: {error}\n"
            "  the file may be of another model, or of another version of it"
        ) from error
    return Conversion(reads, tuple(stored(name, tensor) for name, tensor in made.items()), convert)


def _several(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} … {names[-1]} ({len(names)} tensors)"


def _any_of(patterns: Sequence[str]) -> re.Pattern[str] | None:
    return re.compile("|".join(f"({pattern})" for pattern in patterns)) if patterns else None


def _loading() -> Any:
    try:
        from transformers import core_model_loading
    except ImportError as error:
        raise _too_old() from error
    if not hasattr(core_model_loading, "rename_source_key"):
        raise _too_old()
    return core_model_loading


def _mapping() -> Any:
    from transformers import conversion_mapping

    return conversion_mapping


def _too_old() -> WeightsError:
    return WeightsError(
        "this transformers has no tables of how files and models name their tensors\n"
        "  install a newer one (pip install 'fxpipe[hf]'), or give rename= a mapping or a function"
    )
