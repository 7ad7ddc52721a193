"""Which tensor of a file is which of the model's; every fault is found before anything is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from fxpipe.errors import WeightsError
from fxpipe.ir.units import folded
from fxpipe.runtime.weights.adapters import AdapterFiles, adapter_files
from fxpipe.runtime.weights.conversions import Conversion, ignored_names, is_transformers, reading_conversions
from fxpipe.runtime.weights.disk.directory import Listing
from fxpipe.runtime.weights.disk.files import StoredTensor
from fxpipe.runtime.weights.model import Model

Rename = Mapping[str, str] | Callable[[str], str | None] | str | None
SHOWN = 24
"""Most names a message lists of one kind."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """How a file is to be matched.

    Attributes:
        rename: A mapping or function of the file's names, or ``"huggingface"``; None: found by the model.
        dtype: ``"model"`` or ``"cast"``.
        strict: Whether unexpected and missing names are faults.
        prefix: Put before the file's names.
        also: Tensors added to stages after they were made, by name; never missing.
        held: The tensors that this rank holds, by first FQN: a buffer may have grown since it was captured.
    """

    rename: Rename = None
    dtype: str = "model"
    strict: bool = True
    prefix: str | None = None
    also: Mapping[str, StoredTensor] = field(default_factory=dict)
    held: Mapping[str, StoredTensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Match:
    """What comes from where.

    Attributes:
        sources: What is made of which tensors of the file; named as in the file.
        targets: By given name, the first FQNs of the model's tensors that it is for.
        twins: ``(first FQN, name, other name)``: the file has a tied tensor twice; both must be equal.
    """

    sources: tuple[Conversion, ...]
    targets: Mapping[str, tuple[str, ...]]
    twins: tuple[tuple[str, str, str], ...]


def match(listing: Listing, model: Model, wanted: Wanted) -> Match:
    """Find for every tensor of the model where it comes from.

    Raises:
        WeightsError: Lists all that is missing, unexpected, misshapen or of another dtype.
    """
    _check(wanted)
    entries = {name: StoredTensor(name, entry.dtype, entry.shape) for name, entry in listing.entries.items()}
    resolve = _Resolver(listing, model, wanted)
    faults = _Faults(listing, model)
    kept: list[Conversion] = []
    targets: dict[str, tuple[str, ...]] = {}
    given: dict[str, Conversion] = {}
    twins: list[tuple[str, str, str]] = []
    for source in resolve.sources(entries):
        useful = False
        for made in source.gives:
            firsts = resolve.firsts(made.name)
            if not firsts:
                faults.unexpected += [made.name] if wanted.strict and not resolve.may_ignore(made.name) else []
                continue
            faults.others += _misfits(made, resolve.expected(firsts[0]), wanted.dtype, source)
            fresh = tuple(first for first in firsts if first not in given)
            for first in (first for first in firsts if first in given):
                twins += _twins(first, given[first], source, faults)
            given.update(dict.fromkeys(fresh, source))
            if fresh:
                targets[made.name] = fresh
                useful = True
        if useful:
            kept.append(source)
    if wanted.strict:
        faults.missing = [first for first in resolve.required() if first not in given]
    faults.speak()
    return Match(tuple(kept), targets, tuple(twins))


class _Resolver:
    """Knows what names mean."""

    def __init__(self, listing: Listing, model: Model, wanted: Wanted) -> None:
        self._listing = listing
        self._model = model
        self._wanted = wanted
        self._plain = {} if listing.kind == "checkpoint" else model.plain_names()
        self._adapters = adapter_files(listing, model) if listing.kind == "adapter" else AdapterFiles()
        root = self._huggingface_root()
        self._huggingface = root
        self._ignored: tuple[Any, Any] = (None, None)
        if root is not None:
            self._ignored = ignored_names(root[1], (fqn for fqn, _ in root[1].named_buffers()))

    def _huggingface_root(self) -> tuple[str, nn.Module] | None:
        """Give the model of transformers whose tables apply, and what goes before its names."""
        rename, kind = self._wanted.rename, self._listing.kind
        plain = self._model.plain_root()[1]
        if rename is None and kind == "safetensors" and is_transformers(plain):
            return "", plain
        if rename != "huggingface":
            return None
        if is_transformers(plain):
            return "", plain
        inside = [(fqn, part) for fqn, part in plain.named_modules() if is_transformers(part)]
        outermost = [(fqn, part) for fqn, part in inside if not any(fqn.startswith(f"{other}.") for other, _ in inside)]
        if len(outermost) != 1:
            raise WeightsError(
                f"rename='huggingface' needs a model of transformers, and {type(plain).__qualname__} holds "
                f"{len(outermost)}\n  give rename= a mapping or a function of a name"
            )
        return f"{outermost[0][0]}.", outermost[0][1]

    def sources(self, entries: Mapping[str, StoredTensor]) -> list[Conversion]:
        wanted = self._wanted
        start = wanted.prefix or ""
        if self._huggingface is not None:
            inner, module = self._huggingface
            plain = self._plain_state(inner)
            found = reading_conversions(module, entries, plain)
            return [_prefixed(source, start + inner) for source in found]
        renamed = []
        for name, entry in entries.items():
            target = None if name in self._adapters.others else _renamed(name, wanted.rename)
            if target is not None:
                renamed.append(Conversion((name,), (StoredTensor(start + target, entry.dtype, entry.shape),)))
        return [*renamed, *self._adapters.made]

    def _plain_state(self, inner: str) -> dict[str, torch.Tensor]:
        """Give the state dictionary that the model of transformers would have without the wrapper around it."""
        tensors: dict[str, torch.Tensor] = dict(self._model.module.named_parameters(remove_duplicate=False))
        tensors.update(self._model.module.named_buffers(remove_duplicate=False))
        known = self._model.names.tensors
        return {
            plain[len(inner) :]: tensors[firsts[0]]
            for plain, firsts in self._plain.items()
            if plain.startswith(inner) and known[firsts[0]].persistent
        }

    def firsts(self, name: str) -> tuple[str, ...]:
        """Give the first FQNs of the tensors that a name means."""
        if name in self._adapters.first:
            return (self._adapters.first[name],)
        if name in self._plain:
            return self._plain[name]
        names = self._model.names
        if name in names.first:
            return (names.first[name],)
        return (name,) if name in self._wanted.also else ()

    def expected(self, first: str) -> StoredTensor | None:
        """Give what the model has; None for a buffer of another rank, which may have grown there."""
        known_here = self._wanted.also.get(first) or self._wanted.held.get(first)
        if known_here is not None:
            return known_here
        if first not in self._model.names.parameters:
            return None
        known = self._model.names.tensors[first]
        return StoredTensor(first, known.dtype, known.shape)

    def may_ignore(self, name: str) -> bool:
        """Tell whether files of this model may have a name that the model lacks."""
        pattern = self._ignored[0]
        return pattern is not None and pattern.search(name) is not None

    def required(self) -> list[str]:
        """Give the tensors that must be in the file."""
        names = self._model.names.tensors
        if self._listing.kind == "adapter":
            return list(self._adapters.required)
        if self._listing.kind == "trainable":
            trainable = dict(self._model.module.named_parameters())
            return [fqn for fqn in names if fqn in trainable and trainable[fqn].requires_grad]
        added = frozenset() if self._listing.kind == "checkpoint" else self._model.added()
        pattern = self._ignored[1]
        return [
            first
            for first, known in names.items()
            if known.persistent and first not in added and not (pattern and pattern.search(first))
        ]


class _Faults:
    """All that is wrong, for one message."""

    def __init__(self, listing: Listing, model: Model) -> None:
        self._listing = listing
        self._model = model
        self.missing: list[str] = []
        self.unexpected: list[str] = []
        self.others: list[str] = []

    def speak(self) -> None:
        """Raise if there is anything."""
        parts = []
        if self.missing:
            parts.append(f"{len(self.missing)} missing: {shown(self.missing)}")
        if self.unexpected:
            parts.append(f"{len(self.unexpected)} unexpected: {shown(self.unexpected)}")
        parts += self.others[:SHOWN]
        if len(self.others) > SHOWN:
            parts.append(f"and {len(self.others) - SHOWN} more")
        if not parts:
            return
        what, model = f"{self._listing.path} does not fit {self._model.name}", self._model.name
        manifest = self._listing.manifest
        if manifest is not None and manifest.model not in (model, ""):
            what = f"{self._listing.path} is a checkpoint of {manifest.model}, not of {model}"
        raise WeightsError(f"{what}: {'; '.join(parts)}\n  {self._way_out()}; nothing was changed")

    def _way_out(self) -> str:
        if any("dtype" in fault for fault in self.others):
            return 'pass dtype="cast" to cast what is of another dtype, or materialize with the dtype of the file'
        suggested = self._prefix()
        if suggested is not None:
            return suggested
        if (self.missing or self.unexpected) and not self.others:
            return "give the weights of this model, or rename= how its names differ; strict=False takes what fits"
        return "give the weights of this model"

    def _prefix(self) -> str | None:
        """Find a prefix that would mend all that is missing."""
        if not (self.missing and self.unexpected):
            return None
        there = set(self.unexpected)
        first = self.missing[0]  # what mends all mends this one
        for name in self.unexpected:
            if first.endswith(f".{name}"):
                prefix = first.removesuffix(name)
                if all(fqn.startswith(prefix) and fqn.removeprefix(prefix) in there for fqn in self.missing):
                    return f'pass prefix="{prefix}", which mends all that is missing'
            if name.endswith(f".{first}"):
                prefix = name.removesuffix(first)
                if all(prefix + fqn in there for fqn in self.missing):
                    return f'pass rename=lambda name: name.removeprefix("{prefix}"): it mends all that is missing'
        return None


def shown(names: Sequence[str], limit: int = SHOWN) -> str:
    """List names, the first ones where there are many.

    >>> shown(["a.0", "b", "c", "a.1"], 2)
    'a.{0-1}, b and 1 more'
    """
    return folded(names, limit)


def _check(wanted: Wanted) -> None:
    if wanted.dtype not in ("model", "cast"):
        raise WeightsError(f'dtype={wanted.dtype!r} is not known\n  give "model" or "cast"')
    rename = wanted.rename
    if not (rename in (None, "huggingface") or isinstance(rename, Mapping) or callable(rename)):
        raise WeightsError(f'rename={rename!r} is not known\n  give a mapping, a function of a name, or "huggingface"')


def _renamed(name: str, rename: Rename) -> str | None:
    if rename is None or isinstance(rename, str):
        return name
    found: Any = rename.get(name, name) if isinstance(rename, Mapping) else rename(name)
    if found is None or isinstance(found, str):
        return found
    raise WeightsError(
        f"rename= gives {found!r} for {name}\n  it gives a name of the model, or None for what is not to be read"
    )


def _prefixed(source: Conversion, start: str) -> Conversion:
    if not start:
        return source
    convert = source.convert
    gives = tuple(replace(made, name=start + made.name) for made in source.gives)
    if convert is None:
        return replace(source, gives=gives)
    return replace(
        source, gives=gives, convert=lambda tensors: {start + name: made for name, made in convert(tensors).items()}
    )


def _misfits(made: StoredTensor, expected: StoredTensor | None, dtype: str, source: Conversion) -> list[str]:
    if expected is None:
        return []
    name = made.name if source.convert is not None else source.reads[0]
    theirs = "the model's" if name == expected.name else expected.name
    faults = []
    if made.shape != expected.shape:
        faults.append(f"{name} has shape {list(made.shape)}, {theirs} has {list(expected.shape)}")
    if made.dtype != expected.dtype:
        kinds = {getattr(torch, each.dtype, torch.uint8).is_floating_point for each in (made, expected)}
        if dtype == "model" or len(kinds) > 1:
            faults.append(f"{name} has dtype {made.dtype}, {theirs} has {expected.dtype}")
    return faults


def _twins(first: str, one: Conversion, other: Conversion, faults: _Faults) -> Iterable[tuple[str, str, str]]:
    if one.convert is None and other.convert is None:
        return [(first, one.reads[0], other.reads[0])]
    faults.others.append(f"{first} comes from {one.reads[0]} and from {other.reads[0]}")
    return []
