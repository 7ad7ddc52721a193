"""How peft's files of adapters name and arrange a model's tensors, by peft's own functions, recorded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from fxpipe.errors import WeightsError
from fxpipe.runtime.build.wrappers import Derived, is_peft, read_by_peft, written_by_peft
from fxpipe.runtime.weights.conversions import Conversion, Tensors
from fxpipe.runtime.weights.disk.directory import Listing
from fxpipe.runtime.weights.disk.files import StoredTensor
from fxpipe.runtime.weights.model import Model


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """What the files of a directory of adapters are of a model.

    Attributes:
        first: By name there, the first FQN of the tensor that it is.
        made: What peft computes of others: prompts.
        required: First FQNs of all tensors of these adapters.
        others: Names that go elsewhere: into what is made, or to adapters that the model does not have.
    """

    first: Mapping[str, str] = field(default_factory=dict)
    made: tuple[Conversion, ...] = ()
    required: tuple[str, ...] = ()
    others: frozenset[str] = frozenset()


def adapter_files(listing: Listing, model: Model) -> AdapterFiles:
    """Find what the files of a directory of adapters are of a model.

    Raises:
        WeightsError: The model has no adapters, or peft cannot read the files into these.
    """
    module: Any = model.module
    if not is_peft(module):
        raise WeightsError(
            f"{listing.path} is an adapter of peft, and {model.name} has none\n"
            "  wrap the model by peft.get_peft_model before compile"
        )
    by_adapter, others = _by_adapter(listing, module)
    first: dict[str, str] = {}
    required: dict[str, None] = {}
    made: list[Conversion] = []
    for adapter, names in by_adapter.items():
        written = written_by_peft(module, model.names.first, adapter)
        computed = []
        for name, derived in written.items():
            required.update(dict.fromkeys(derived.reads))
            if derived.is_one:
                first[names.get(name, name)] = derived.reads[0]
            elif name in names:
                computed.append(name)
        if computed:
            entries = {name: listing.entries[place] for name, place in names.items()}
            described = {name: StoredTensor(name, entry.dtype, entry.shape) for name, entry in entries.items()}
            made += _made(model, adapter, computed, described, names, written)
            others.update(names[name] for name in computed)
    return AdapterFiles(first, tuple(made), tuple(required), frozenset(others))


def _by_adapter(listing: Listing, module: Any) -> tuple[dict[str, dict[str, str]], set[str]]:
    """Give by adapter the names in its file with those in the listing; and the names of adapters that are not here."""
    parts: dict[str, dict[str, str]] = {}
    for place in listing.entries:
        folder, _, name = place.rpartition("/")
        parts.setdefault(folder, {})[name] = place
    known = module.peft_config
    others = {place for folder, names in parts.items() if folder and folder not in known for place in names.values()}
    found = {folder: names for folder, names in parts.items() if folder in known}
    if "" in parts:
        active = module.active_adapter if isinstance(module.active_adapter, str) else module.active_adapter[0]
        own = listing.path.name
        found[("default" if "default" in known else active) if found else own if own in known else active] = parts[""]
    return found, others


def _made(
    model: Model,
    adapter: str,
    computed: list[str],
    entries: Mapping[str, StoredTensor],
    names: Mapping[str, str],
    written: Mapping[str, Derived],
) -> list[Conversion]:
    """Tell how peft makes tensors of the model of those in a file that are none of the model's own."""
    files = {
        name: torch.empty(entry.shape, dtype=getattr(torch, entry.dtype), device="meta")
        for name, entry in entries.items()
    }
    read: dict[str, Derived] = {}
    failed: Exception | None = None
    try:
        read = read_by_peft(model.module, model.names.first, adapter, files)
    except Exception as error:  # whatever peft raises
        failed = error
    for name in computed:
        reads = written[name].reads
        lacking = [fqn for fqn in reads if fqn not in read]
        if lacking and (failed is None or len(reads) > 1):
            raise WeightsError(
                f"{name} is what an encoder makes of {lacking[0]}, which is not in the file\n"
                "  go on training from a checkpoint of pipe.save; what is only run is wrapped with inference_mode=True"
            )
    if failed is not None:
        raise WeightsError(
            f"peft cannot read {', '.join(computed)} into the adapter {adapter}: {type(failed).__name__}: {failed}\n"
            "  give the adapter of this model, of the same configuration"
        ) from failed

    def source(fqn: str, derived: Derived) -> Conversion:
        def convert(tensors: Tensors) -> dict[str, torch.Tensor]:
            return {fqn: derived.made({name: tensors[names[name]] for name in derived.reads})}

        gives = StoredTensor(fqn, entries[derived.reads[0]].dtype, tuple(derived.tensor.shape))
        return Conversion(tuple(names[name] for name in derived.reads), (gives,), convert)

    wanted = set(computed)
    return [source(fqn, derived) for fqn, derived in read.items() if not wanted.isdisjoint(derived.reads)]
