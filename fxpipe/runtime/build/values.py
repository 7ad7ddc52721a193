"""Where the values of a stage's tensors come from when it is materialized."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from fxpipe._torch import FakeTensor
from fxpipe.errors import MaterializeError
from fxpipe.runtime.build.generators import kept_generators, seed_generators
from fxpipe.runtime.build.initialize import InitFunction, Initializer, Unit, has_reset, is_huggingface
from fxpipe.runtime.build.standin import StandIn, make_stand_in

Constructor = Callable[[Collection[str], Callable[[int], None]], Mapping[str, torch.Tensor]]


@dataclass(frozen=True, slots=True, eq=False)
class Values:
    """Tensors of one rank.

    Attributes:
        tensors: Parameters and buffers by first FQN, on the device; they share memory with nothing.
        unfilled: Names of those that are only allocated.
    """

    tensors: Mapping[str, torch.Tensor]
    unfilled: tuple[str, ...] = ()


def initial_values(
    skeleton: nn.Module,
    fqns: Sequence[str],
    originals: Mapping[str, torch.Tensor],
    *,
    aliases: Mapping[str, str],
    blocks: Sequence[str],
    init: InitFunction | str | None,
    seed: int,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
    constructor_values: Constructor | None = None,
) -> Values:
    """Give tensors memory and values.

    A value is the user's own where it is real; else what the constructors of a hand-written sequence give; then what
    ``init`` makes of it. Random values depend on the seed, the tensor's name and ``blocks``, not on which tensors are
    asked for, nor on the device. The global random state is left as it was.

    Besides the tensors themselves it needs memory for one block on the CPU.

    Args:
        skeleton: The model with fake tensors; only read.
        fqns: First names of the tensors wanted.
        originals: The user's own tensors by first name; only read.
        aliases: First name of every name.
        blocks: Names of the modules that are initialised as a whole.
        init: A function of a module, called on each module of the blocks concerned after its ``reset_parameters``, on
            copies of the modules; ``"reset"``: only ``reset_parameters``; ``"huggingface"``: ``_init_weights`` of the
            model; ``"empty"``: nothing, but non-persistent buffers get a value where there is one; None: nothing.
        seed: Seed of what is drawn.
        device: Where the tensors go.
        dtype: What floating-point tensors are cast to once they have their values; None keeps each.
        constructor_values: ``SpecSequential.initial_values`` of a hand-written sequence.

    Returns:
        The tensors, and with ``"empty"`` the names of those that have no value yet.

    Raises:
        MaterializeError: Tensors have no value, ``init`` is unknown, or a function of a module fails.

    >>> with torch.device("meta"):
    ...     model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
    >>> named = dict(model.named_parameters())
    >>> values = initial_values(model, ["1.bias", "1.weight"], named, aliases={name: name for name in named},
    ...                         blocks=["0", "1"], init="reset", seed=0, device="cpu")
    >>> [(name, tuple(tensor.shape)) for name, tensor in values.tensors.items()]
    [('1.bias', (4,)), ('1.weight', (4, 3))]
    """
    _check_init(skeleton, init)
    missing = [fqn for fqn in fqns if not _is_real(originals[fqn])]
    if init is None and constructor_values is None:
        _refuse(skeleton, missing, init)
    tensors: dict[str, torch.Tensor] = {}
    unfilled: list[str] = []
    with kept_generators(), torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
        if missing:
            stand_in = make_stand_in(skeleton, originals, aliases)
            start = _Start(originals, stand_in, constructor_values, seed)
            initializer = Initializer(skeleton, stand_in, frozenset(blocks), init, seed)
            units = _buffer_units(skeleton, missing) if init == "empty" else initializer.units(missing)
            wanted = set(missing)
            for unit in units:
                filled, left = initializer.fill(unit, start.values(unit.tensors))
                unfilled += [fqn for fqn in left if fqn in wanted]
                tensors.update((fqn, _owned(filled[fqn], device, dtype)) for fqn in filled if fqn in wanted)
                del filled  # the next unit's memory comes after this one's is free
        if init != "empty":
            _refuse(skeleton, unfilled, init)
        for fqn in fqns:
            if fqn in tensors:
                continue
            if _is_real(originals[fqn]):
                own = originals[fqn].detach()
                tensors[fqn] = own.to(device=device, dtype=_cast(own, dtype), copy=True)
            else:
                unfilled.append(fqn)
                tensors[fqn] = _allocated(stand_in.metas[fqn], device, dtype)
    left_over = set(unfilled)
    return Values({fqn: tensors[fqn] for fqn in fqns}, tuple(fqn for fqn in fqns if fqn in left_over))


@dataclass(slots=True, eq=False)
class _Start:
    """Values that tensors have before any function runs: the user's own, and those of constructors.

    Attributes:
        originals: The user's tensors.
        stand_in: Knows shapes and dtypes.
        constructor_values: Builds the layers of a hand-written sequence, where there is one.
        seed: Seed of the constructors.
        place: The layer built last.
        built: Its tensors.
    """

    originals: Mapping[str, torch.Tensor]
    stand_in: StandIn
    constructor_values: Constructor | None
    seed: int
    place: str = ""
    built: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def values(self, fqns: Sequence[str]) -> dict[str, torch.Tensor]:
        """Give what there is of these; several units of one layer in a row build it once."""
        found = {}
        for fqn in fqns:
            if _is_real(self.originals[fqn]):
                found[fqn] = self.originals[fqn].detach()
            elif self.constructor_values is not None:
                self._build(fqn.partition(".")[0], self.constructor_values)
                if fqn in self.built:
                    found[fqn] = self.built[fqn]
        return found

    def _build(self, place: str, constructor_values: Constructor) -> None:
        if place == self.place:
            return
        self.built = {}  # never two layers at once
        inside = [fqn for fqn in self.stand_in.metas if fqn.startswith(f"{place}.")]
        self.place, self.built = place, constructor_values(inside, lambda index: seed_generators(self.seed, index))
        for fqn, tensor in self.built.items():
            meta = self.stand_in.metas[fqn]
            if (tensor.shape, tensor.dtype) != (meta.shape, meta.dtype):
                raise MaterializeError(
                    f"layer {place} is built with {fqn} {tuple(tensor.shape)} {tensor.dtype}, but was captured with "
                    f"{tuple(meta.shape)} {meta.dtype}\n  a spec's class must build the same layer every time"
                )


def _buffer_units(skeleton: nn.Module, fqns: Sequence[str]) -> list[Unit]:
    """Give the owners of the buffers among these that no file holds."""
    persistent = skeleton.state_dict(keep_vars=True)
    buffers = {fqn for fqn, _ in skeleton.named_buffers()} - set(persistent)
    owners: dict[str, list[str]] = {}
    for fqn in fqns:
        if fqn in buffers:
            owners.setdefault(fqn.rpartition(".")[0], []).append(fqn)
    return [Unit(owner, tuple(sorted(names))) for owner, names in owners.items()]


def _check_init(skeleton: nn.Module, init: object) -> None:
    if not (init is None or callable(init) or init in ("reset", "huggingface", "empty")):
        raise MaterializeError(
            f"init={init!r} is not known\n  give None, a function of a module, 'reset', 'huggingface' or 'empty'"
        )
    if init == "huggingface" and not _has_huggingface(skeleton):
        raise MaterializeError(
            f"init='huggingface' needs a model of transformers, and {type(skeleton).__qualname__} has no "
            "initialize_weights\n  give init= a function of a module, or 'reset'"
        )


def _has_huggingface(skeleton: nn.Module) -> bool:
    return any(is_huggingface(module) for module in skeleton.modules())


def _refuse(skeleton: nn.Module, fqns: Sequence[str], init: InitFunction | str | None) -> None:
    """Raise if there are tensors that nothing gives a value to."""
    if not fqns:
        return
    count = "1 tensor" if len(fqns) == 1 else f"{len(fqns)} tensors"
    listed = f"{count} of {type(skeleton).__qualname__}: {_listing(fqns)}"
    huggingface = " or 'huggingface'" if _has_huggingface(skeleton) else ""
    other = "build the model with real weights, or use init='empty' and load weights"
    if init is None:
        raise MaterializeError(
            f"there is no value for {listed}\n  give init= a function of a module, 'reset'{huggingface}; or {other}"
        )
    owners = {fqn: skeleton.get_submodule(fqn.rpartition(".")[0]) for fqn in fqns}
    owned = ", ".join(sorted({type(owner).__qualname__ for owner in owners.values()}))
    if init == "reset":
        lacking = sorted({type(owner).__qualname__ for owner in owners.values() if not has_reset(owner)})
        what = f" (no reset_parameters() in {', '.join(lacking)})" if lacking else ""
        raise MaterializeError(
            f"init='reset' gives no value to {listed}{what}\n"
            f"  let reset_parameters of {owned} fill them, or give init= a function{huggingface}; or {other}"
        )
    if init == "huggingface":
        raise MaterializeError(
            f"init='huggingface' gives no value to {listed}\n"
            f"  give init= a function that calls the model's _init_weights and fills the rest of {owned}; or {other}"
        )
    raise MaterializeError(
        f"init= gives no value to {listed}\n  let the function fill them when called on {owned}; or {other}"
    )


def _listing(fqns: Sequence[str], limit: int = 12) -> str:
    """Name tensors, those that differ by number as one: ``h.{0-11}.attn.bias``.

    >>> _listing(["wte", "h.0.bias", "h.1.bias", "h.2.bias", "h.4.bias"])
    'wte, h.{0-2,4}.bias'
    """
    groups: dict[tuple[str, ...], list[tuple[int, ...]]] = {}
    for fqn in fqns:
        parts = fqn.split(".")
        key = tuple("" if part.isdigit() else part for part in parts)
        groups.setdefault(key, []).append(tuple(int(part) for part in parts if part.isdigit()))
    entries: list[tuple[str, int]] = []
    for key, numbers in groups.items():
        columns = [sorted(set(column)) for column in zip(*numbers, strict=True)]
        if math.prod(len(column) for column in columns) == len(numbers):
            entries.append((_spelled(key, [_ranges(column) for column in columns]), len(numbers)))
        else:
            entries += [(_spelled(key, [str(number) for number in row]), 1) for row in numbers]
    shown = ", ".join(text for text, _ in entries[:limit])
    left = sum(count for _, count in entries[limit:])
    return f"{shown} and {left} more" if left else shown


def _spelled(key: Sequence[str], numbers: Sequence[str]) -> str:
    fill = iter(numbers)
    return ".".join(part or next(fill) for part in key)


def _ranges(numbers: Sequence[int]) -> str:
    """Write ascending numbers as ranges, in braces unless there is only one."""
    runs = [list(run) for _, run in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    texts = [f"{run[0][1]}-{run[-1][1]}" if len(run) > 1 else str(run[0][1]) for run in runs]
    return str(numbers[0]) if len(numbers) == 1 else "{" + ",".join(texts) + "}"


def _is_real(tensor: torch.Tensor) -> bool:
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


def _cast(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype


def _owned(tensor: torch.Tensor, device: torch.device | str, dtype: torch.dtype | None) -> torch.Tensor:
    """Bring a tensor made here to its device and dtype; one that is there already keeps its memory, if it fits."""
    moved = tensor.detach().to(device=device, dtype=_cast(tensor, dtype))
    fits = moved.untyped_storage().nbytes() == moved.numel() * moved.element_size()
    return moved if fits else moved.clone()


def _allocated(meta: torch.Tensor, device: torch.device | str, dtype: torch.dtype | None) -> torch.Tensor:
    return torch.empty_strided(meta.shape, meta.stride(), dtype=_cast(meta, dtype), device=device)
