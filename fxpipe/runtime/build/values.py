"""Where the values of a stage's tensors come from when it is materialized."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fxpipe._torch import FakeTensor
from fxpipe.errors import MaterializeError
from fxpipe.ir.units import folded
from fxpipe.recipes.deferred import is_recorded, replay
from fxpipe.runtime.build.generators import kept_generators
from fxpipe.runtime.build.initialize import InitFunction, Initializer, Unit, has_reset, is_huggingface
from fxpipe.runtime.build.standin import make_stand_in
from fxpipe.runtime.build.wrappers import added_by_peft, inner_modules

INIT_WORDS = ("reset", "huggingface", "empty")
"""What ``init`` may be by name."""


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
    constructed: Mapping[str, torch.Tensor] | None = None,
) -> Values:
    """Give tensors memory and values.

    A value is the user's own where it is real; else what the model's constructor gave it, where that was recorded and
    ``init`` is None; else what ``init`` makes of it. Values do not depend on which tensors are asked for, nor on the
    device; those of ``init`` depend on the seed, the tensor's name and ``blocks``. The global random state is left as
    it was.

    Besides the tensors themselves it needs memory for one tensor on the CPU, with ``init`` for one block.

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
        constructed: Recorded tensors of a hand-written sequence, by first FQN: what ``init`` functions start from.

    Returns:
        The tensors, and the names of those that have no value yet: with ``"empty"``, or added by peft.

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
    # Long: its words say where values come from; the rest asks each of those sources in turn.
    _check_init(skeleton, init)
    missing = [fqn for fqn in fqns if not _is_real(originals[fqn])]
    constructed = constructed or {}
    recipes = {fqn: constructed.get(fqn, originals[fqn]) for fqn in missing}
    recipes = {fqn: tensor for fqn, tensor in recipes.items() if is_recorded(tensor)}
    is_added = added_by_peft(skeleton)
    if init == "empty":
        unfiled = {fqn for unit in _unfiled_units(skeleton, missing) for fqn in unit.tensors}
        unfiled.update(fqn for fqn in missing if is_added(fqn))
        recipes = {fqn: tensor for fqn, tensor in recipes.items() if fqn in unfiled}
    elif init is not None:
        recipes = {}
    tensors: dict[str, torch.Tensor] = {}
    unfilled: list[str] = []
    if init is None:
        _refuse(skeleton, [fqn for fqn in missing if fqn not in recipes], init)
    with kept_generators(), torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
        for fqn, value in replay(recipes):
            if value is not None:
                _check_alike(fqn, value, originals[fqn])
                tensors[fqn] = _owned(value, device, dtype)
            del value  # one tensor at a time
        missing = [fqn for fqn in missing if fqn not in tensors]
        if init is None:
            _refuse(skeleton, missing, init)
        if missing:
            stand_in = make_stand_in(skeleton, originals, aliases)
            initializer = Initializer(skeleton, stand_in, frozenset(blocks), init, seed, dict(inner_modules(skeleton)))
            wanted = dict.fromkeys(fqn for fqn in missing if not is_added(fqn))  # peft's own start comes later
            units = _unfiled_units(skeleton, list(wanted)) if init == "empty" else initializer.units(list(wanted))
            for unit in units:
                start = _start(unit.tensors, originals, constructed if init != "empty" else {})
                filled, left = initializer.fill(unit, start)
                unfilled += [fqn for fqn in left if fqn in wanted]
                tensors.update((fqn, _owned(filled[fqn], device, dtype)) for fqn in filled if fqn in wanted)
                del filled, start  # the next unit's memory comes after this one's is free
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


def _start(
    fqns: Sequence[str], originals: Mapping[str, torch.Tensor], constructed: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Give the values that tensors have before any function runs: the user's own, and those of constructors."""
    found = {fqn: originals[fqn].detach() for fqn in fqns if _is_real(originals[fqn])}
    recorded = {fqn: constructed[fqn] for fqn in fqns if fqn in constructed and fqn not in found}
    for fqn, value in replay(recorded):
        if value is not None:
            _check_alike(fqn, value, originals[fqn])
            found[fqn] = value
    return found


def _check_alike(fqn: str, value: torch.Tensor, expected: torch.Tensor) -> None:
    if (value.shape, value.dtype) != (expected.shape, expected.dtype):
        raise MaterializeError(
            f"the constructor makes {fqn} {tuple(value.shape)} {value.dtype}, but when it was captured it made "
            f"{tuple(expected.shape)} {expected.dtype}\n  a spec's class must build the same layer every time"
        )


def _unfiled_units(skeleton: nn.Module, fqns: Sequence[str]) -> list[Unit]:
    """Give the owners of the tensors among these that files lack.

    Non-persistent buffers, and what models of transformers compute anew (Marian's positions).
    """
    computed = {fqn for fqn in fqns if _may_be_missing(skeleton, fqn)}
    persistent = skeleton.state_dict(keep_vars=True)
    buffers = {fqn for fqn, _ in skeleton.named_buffers()} - set(persistent)
    owners: dict[str, list[str]] = {}
    for fqn in fqns:
        if fqn in buffers or fqn in computed:
            owners.setdefault(fqn.rpartition(".")[0], []).append(fqn)
    return [Unit(owner, tuple(sorted(names))) for owner, names in owners.items()]


def _may_be_missing(skeleton: nn.Module, fqn: str) -> bool:
    """Tell whether a model of transformers says of a tensor that its files need not hold it."""
    parts = fqn.split(".")
    for length in range(len(parts)):
        module: Any = skeleton.get_submodule(".".join(parts[:length]))
        if is_huggingface(module):
            patterns = getattr(module, "_keys_to_ignore_on_load_missing", None) or ()
            return any(re.search(pattern, ".".join(parts[length:])) for pattern in patterns)
    return False


def _check_init(skeleton: nn.Module, init: object) -> None:
    if not (init is None or callable(init) or init in INIT_WORDS):
        raise MaterializeError(
            f"init={init!r} is not known\n"
            "  give None, a function of a module, 'reset', 'huggingface', 'empty', or the path of weights"
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
    listed = f"{count} of {type(skeleton).__qualname__}: {folded(fqns)}"
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
