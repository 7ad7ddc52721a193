"""A private copy of the user's model whose tensors are fake: what is captured, and what stages are cloned from."""

from __future__ import annotations

import copy
import itertools
import sys
import types
import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import nn

from fxpipe._torch import (
    FakeTensor,
    FakeTensorMode,
    check_version,
    compiled_in_place,
    has_accumulation_hooks,
    is_compiled,
    storage_key,
)
from fxpipe.capture.model.compiled import compiled_functions, opened_modules
from fxpipe.capture.model.held import held_by, with_marks
from fxpipe.capture.model.huggingface import declared_ties, switch_caches_off
from fxpipe.capture.model.preserve import without_collection
from fxpipe.errors import CaptureError, TieError
from fxpipe.ir.spec import TensorInfo
from fxpipe.recipes.deferred import is_recorded, replay

Parts: TypeAlias = Sequence[tuple[str, nn.Module]]
"""Modules of a model, each once, with their FQNs."""
_NUMBERS = (bool, int, float, str, type(None))
_MOST_NUMBERS = 64
"""Elements of the largest buffer that is taken for numbers."""


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Skeleton:
    """The user's modules, copied, with fake tensors in the place of parameters and buffers.

    Attributes:
        module: The copy; its tensors are fake, on the CPU.
        mode: The fake mode they belong to.
        infos: Every parameter and buffer, by first FQN, in the model's order.
        aliases: First FQN of every FQN.
        originals: The user's own tensors by first FQN, until ``release``; never written.
        fqn_of: First FQN by ``id`` of a fake tensor, and of the user's own tensor (closures may hold it).
        module_fqns: First FQN by ``id`` of a copied module, and of the user's own.
        plain: Tensors kept as plain attributes, by ``id``: the dotted place and the tensor.
        generators: ``id`` of the random generators that the copied modules keep.
        origins: Where each tensor's value comes from unless ``init=`` gives one: ``"real"``: it has one;
            ``"recorded"``: from its recorded initialisation; ``"none"``: from nowhere.
        values: Values that were asked for.
        caching: Configurations of the copy whose caches were switched off.
        compiled: Whether in place, by the FQN of each module that the user compiled; ``""`` for the model itself.
    """

    module: nn.Module
    mode: FakeTensorMode
    infos: Mapping[str, TensorInfo]
    aliases: Mapping[str, str]
    originals: dict[str, torch.Tensor]
    fqn_of: dict[int, str]
    module_fqns: dict[int, str]
    plain: Mapping[int, tuple[str, torch.Tensor]]
    generators: frozenset[int]
    origins: Mapping[str, str] = field(default_factory=dict)
    values: dict[str, torch.Tensor] = field(default_factory=dict)
    caching: tuple[Any, ...] = ()
    compiled: Mapping[str, bool] = field(default_factory=dict)

    def lost_compilations(self, closed: Collection[str]) -> tuple[str, ...]:
        """Say what the user compiled that runs uncompiled: what is opened, and modules compiled in place.

        What was compiled in place belongs to the user's own module, and not to its copies in the stages.

        Args:
            closed: FQNs of the modules that are called whole.
        """
        whole = tuple(f"{fqn}." for fqn in closed)
        kept = {
            fqn for fqn, in_place in self.compiled.items() if not in_place and (fqn in closed or fqn.startswith(whole))
        }
        lost = [fqn or "the model" for fqn in self.compiled if fqn not in kept]
        for fqn, part in opened_modules(self.module, closed):
            lost += [f"{name} of {fqn or 'the model'}" for name in compiled_functions(part)]
        if not lost:
            return ()
        named = ", ".join(lost[:3]) + (f" and {len(lost) - 3} more" if len(lost) > 3 else "")
        return (f"{named}: what was compiled there runs uncompiled; materialize(compile=) compiles blocks or stages",)

    def value_of(self, fqn: str) -> torch.Tensor | None:
        """Give a tensor's value where it has one before ``materialize``: it is real, or its initialisation recorded."""
        origin = self.origins.get(fqn, "none")
        if fqn not in self.values and origin != "none":
            tensor = self.originals[fqn]
            value = dict(replay({fqn: tensor}))[fqn] if origin == "recorded" and is_recorded(tensor) else tensor
            if value is None or value.is_meta:
                return None
            self.values[fqn] = value.detach().clone()
        return self.values.get(fqn)

    def number_in(self, buffer: torch.Tensor) -> torch.Tensor | None:
        """Give the value of a small buffer of integers or flags, which modules read as a Python number, if it has one.

        A stride, a padding, whether a module was initialised: what it is before the first step.
        """
        fqn = self.fqn_of.get(id(buffer))
        if fqn is None or buffer.requires_grad or buffer.is_floating_point() or buffer.is_complex():
            return None
        return self.value_of(fqn) if buffer.numel() <= _MOST_NUMBERS else None

    def release(self, model: nn.Module) -> None:
        """Let go of the user's tensors; the names of those that live on for other reasons stay known.

        Args:
            model: The model that this is a copy of.
        """
        for buffer in self.module.buffers():
            self.number_in(buffer)  # paths that are captured later read the same
        for fqn, tensor in self.originals.items():
            self.originals[fqn] = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        # An identity is forgotten with what it belongs to: another object could get the same one.
        for _, tensor in named_tensors(model):
            weakref.finalize(tensor, self.fqn_of.pop, id(tensor), None)
        for part in model.modules():
            weakref.finalize(part, self.module_fqns.pop, id(part), None)

    def build_layer(self, fqn: str, device: Any, dtype: Any) -> nn.Module:
        """Make one module anew, without values: what a captured ``LayerSpec.build`` gives."""
        source = self.module.get_submodule(fqn)
        memo: dict[int, Any] = {}
        for tensor in _unique(source):
            kept = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
            empty = torch.empty(tensor.shape, dtype=_dtype(kept), device=device)
            memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
        return copy.deepcopy(source, memo)


@without_collection()
def make_skeleton(model: nn.Module, dtype: torch.dtype | None = None) -> Skeleton:
    """Copy a model's structure without its memory.

    Args:
        model: On meta, on a real device, or fake; not modified.
        dtype: Of every floating-point parameter and buffer of the copy; None for the model's own.

    Returns:
        The copy and the names of its tensors.

    Raises:
        CaptureError: A tensor is of a kind that cannot be faked, or a module cannot be copied.
        TieError: Tied tensors differ in shape or dtype.

    >>> skeleton = make_skeleton(nn.Linear(2, 3, device="meta"))
    >>> [(fqn, info.shape) for fqn, info in skeleton.infos.items()]
    [('weight', (3, 2)), ('bias', (3,))]
    """
    check_version()  # before the model runs: a warning made an error is not to be taken for the forward's
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    named = list(named_tensors(model))
    parts = list(model.named_modules())
    _refuse_reducers(parts)
    items = list(_plain_items(parts))
    aliases, originals = _first_names(model, named)
    fakes = {fqn: _fake(fqn, tensor, mode, dtype) for fqn, tensor in originals.items()}
    memo: dict[int, Any] = {id(tensor): fakes[aliases[fqn]] for fqn, tensor in named}
    plain = {id(tensor): (place, tensor) for place, tensor in _tensors(items) if id(tensor) not in memo}
    _refuse_hidden(plain)
    plain = _with_values(plain)
    _refuse_hidden_modules(parts, items)
    _refuse_foreign_hooks(parts)
    _refuse_overlaps(aliases, originals)
    # What was computed of parameters is computed anew by whatever computed it; until then it is nobody's to read.
    memo.update({key: _apart(tensor) for key, (_, tensor) in plain.items()})
    plain.update({id(memo[key]): (place, memo[key]) for key, (place, _) in list(plain.items())})
    module = _copied(model, parts, memo)
    caching = switch_caches_off(module)
    fqn_of = {id(fake): fqn for fqn, fake in fakes.items()}
    fqn_of.update({id(tensor): aliases[fqn] for fqn, tensor in named})
    persistent = set(model.state_dict(keep_vars=True)) if named else set()
    infos = _infos(fakes, persistent)
    copies = list(module.named_modules())
    module_fqns = {id(part): fqn for fqn, part in (*parts, *copies)}
    generators = frozenset(id(item) for _, item in _plain_items(copies) if isinstance(item, torch.Generator))
    origins = {fqn: _origin(tensor) for fqn, tensor in originals.items()}
    return Skeleton(
        module,
        mode,
        infos,
        aliases,
        originals,
        fqn_of,
        module_fqns,
        plain,
        generators,
        origins,
        caching=caching,
        compiled={fqn: compiled_in_place(part) for fqn, part in parts if is_compiled(part)},
    )


def _infos(fakes: Mapping[str, torch.Tensor], persistent: Collection[str]) -> dict[str, TensorInfo]:
    return {
        fqn: TensorInfo(
            fqn,
            tuple(fake.shape),
            str(fake.dtype).removeprefix("torch."),
            fake.numel() * fake.element_size(),
            trainable=isinstance(fake, nn.Parameter) and fake.requires_grad,
            persistent=fqn in persistent,
        )
        for fqn, fake in fakes.items()
    }


def _origin(tensor: torch.Tensor) -> str:
    if is_recorded(tensor):
        return "recorded"
    return "none" if tensor.is_meta or isinstance(tensor, FakeTensor) else "real"


def _with_values(plain: Mapping[int, tuple[str, torch.Tensor]]) -> dict[int, tuple[str, torch.Tensor]]:
    """Give recorded tensors that are plain attributes their values: they are constants, on every rank."""
    found = dict(plain)
    for key, value in replay({str(key): tensor for key, (_, tensor) in plain.items() if is_recorded(tensor)}):
        if value is not None:
            place = plain[int(key)][0]
            found[int(key)] = place, value
            found[id(value)] = place, value
    return found


def named_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every parameter and buffer under every one of its FQNs, in the model's order of modules."""
    for prefix, part in module.named_modules(remove_duplicate=False):
        for leaf, tensor in (*part.named_parameters("", False, False), *part.named_buffers("", False, False)):
            yield (f"{prefix}.{leaf}" if prefix else leaf), tensor


def _unique(module: nn.Module) -> list[torch.Tensor]:
    return list({id(tensor): tensor for _, tensor in named_tensors(module)}.values())


def _dtype(dtype: Any) -> torch.dtype:
    found: torch.dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    return found


def _first_names(
    model: nn.Module, named: list[tuple[str, torch.Tensor]]
) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """Give the first FQN of every FQN, and each tensor by its first FQN; declared ties count where meta lost them."""
    first: dict[int, str] = {}
    originals: dict[str, torch.Tensor] = {}
    aliases = {}
    for fqn, tensor in named:
        aliases[fqn] = first.setdefault(id(tensor), fqn)
        originals.setdefault(aliases[fqn], tensor)
    for fqn, source in declared_ties(model):
        if fqn in aliases and source in aliases and aliases[fqn] != aliases[source]:
            lost, kept = sorted((aliases[fqn], aliases[source]), key=list(originals).index, reverse=True)
            _check_tie(lost, originals[lost], kept, originals[kept])
            if not (originals[lost].is_meta and originals[kept].is_meta):
                continue  # two real tensors are what they are, whatever the model declares
            originals.pop(lost)
            aliases = {name: kept if target == lost else target for name, target in aliases.items()}
    return aliases, originals


def _check_tie(fqn: str, tensor: torch.Tensor, source: str, other: torch.Tensor) -> None:
    if (tensor.shape, tensor.dtype) != (other.shape, other.dtype):
        raise TieError(
            f"{fqn} {tuple(tensor.shape)} {tensor.dtype} is tied to {source} {tuple(other.shape)} {other.dtype}\n"
            "  tied parameters have one shape and dtype; correct the model, or switch the tie off in its configuration"
        )


def _fake(fqn: str, tensor: torch.Tensor, mode: FakeTensorMode, dtype: torch.dtype | None) -> torch.Tensor:
    kind = type(tensor)
    if nn.parameter.is_lazy(tensor):
        raise CaptureError(
            f"{fqn} has no shape yet: it belongs to a lazy module that was never called\n"
            "  call the model once on a small batch, or give the module its sizes"
        )
    known = kind in (torch.Tensor, nn.Parameter, nn.Buffer) or isinstance(tensor, FakeTensor)
    if not known or tensor.layout != torch.strided:
        raise CaptureError(
            f"{fqn} is a {kind.__module__}.{kind.__qualname__} of layout {tensor.layout}, which cannot be captured\n"
            "  compile the model first and wrap or quantize the stages afterwards (pipe.stage_modules)"
        )
    kept = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    with mode:
        fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=kept, device="cpu")
        if isinstance(tensor, nn.Parameter):
            return with_marks(nn.Parameter(fake, tensor.requires_grad), tensor)
        return fake


def _tensors(items: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what of plain items is a tensor."""
    yield from ((place, item) for place, item in items if isinstance(item, torch.Tensor))


def _plain_items(parts: Parts) -> Iterator[tuple[str, Any]]:
    """Yield objects that modules keep as plain attributes, and in lists and dictionaries there, with their place."""
    for prefix, part in parts:
        start = f"{prefix}." if prefix else ""
        for name, value in vars(part).items():
            if name in ("_parameters", "_buffers", "_modules") or isinstance(value, _NUMBERS):
                continue
            if isinstance(value, list | tuple):
                yield from ((f"{start}{name}[{i}]", item) for i, item in enumerate(value))
            elif isinstance(value, dict):
                yield from ((f"{start}{name}[{key!r}]", item) for key, item in value.items())
            else:
                yield f"{start}{name}", value


def _apart(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.is_leaf else tensor.detach().requires_grad_(tensor.requires_grad)


def _refuse_hidden(plain: Mapping[int, tuple[str, torch.Tensor]]) -> None:
    for place, tensor in plain.values():
        if tensor.requires_grad and tensor.is_leaf:  # others are computed of parameters, as by hooks of weight_norm
            raise CaptureError(
                f"{place} takes a gradient but is no parameter of its module: no optimiser and no checkpoint sees it\n"
                "  register it: assign an nn.Parameter to an attribute of its own, or use nn.ParameterList"
            )


def _refuse_hidden_modules(parts: Parts, items: Iterable[tuple[str, Any]]) -> None:
    registered = {id(part) for _, part in parts}
    for place, item in items:
        if isinstance(item, nn.Module) and id(item) not in registered and next(item.parameters(), None) is not None:
            raise CaptureError(
                f"{place} is a {type(item).__qualname__} with parameters that its module does not register: no "
                "optimiser and no checkpoint sees them\n  keep it as an attribute, or in an nn.ModuleList"
            )


def _refuse_foreign_hooks(parts: Parts) -> None:
    """Refuse hooks that know the user's modules or parameters, whose place others take in a pipeline.

    Those of a copied module would call, and change, the modules copied from; those of a parameter would not be called.
    """
    registered = {id(part) for _, part in parts}
    for fqn, part in parts:
        for name, parameter in part.named_parameters(recurse=False):
            if has_accumulation_hooks(parameter, others=True):
                raise CaptureError(
                    f"the parameter {f'{fqn}.{name}'.lstrip('.')} has a hook on its gradient, which a pipeline's "
                    "parameter would not have\n  register it on those of pipe.named_parameters() after materialize: it "
                    "is then called for each microbatch"
                )
    for fqn, part in parts:
        for name, hooks in vars(part).items():
            if name.startswith("_") and name.endswith("_hooks") and isinstance(hooks, Mapping):
                for hook in hooks.values():
                    held = held_by(hook) if isinstance(hook, types.FunctionType) else None
                    if id(held) in registered:
                        raise CaptureError(
                            f"a hook of {fqn or 'the model'} holds a {type(held).__qualname__} of the model in its "
                            "closure\n  make it a method of that module (functools.partial binds more), which goes "
                            "along when the model is copied"
                        )


def _refuse_reducers(parts: Parts) -> None:
    """Refuse wrappers that exchange gradients, or whole models, between ranks or devices by themselves.

    A pipeline runs what they wrap, stage by stage and microbatch by microbatch: their reductions would be made at the
    wrong time, or never.
    """
    kinds: tuple[type, ...] = (nn.parallel.DistributedDataParallel, nn.parallel.DataParallel)
    sharding = sys.modules.get("torch.distributed.fsdp")  # where nobody has loaded it nothing is of its kind
    if sharding is not None:
        kinds += (sharding.FullyShardedDataParallel,)
    for fqn, part in parts:
        if isinstance(part, kinds):
            raise CaptureError(
                f"{fqn or 'the model'} is a {type(part).__name__}, which exchanges gradients by itself and would do so "
                "at the wrong time in a pipeline\n"
                "  compile the module inside it, and give compile a mesh with a data-parallel dimension"
            )


def _refuse_overlaps(aliases: Mapping[str, str], originals: Mapping[str, torch.Tensor]) -> None:
    """Refuse parameters that lie in the same memory without being one tensor: on stages each would have its own.

    Views side by side in one memory (an LSTM's flattened weights) are separate tensors, and fine.
    """
    by_storage: dict[int, list[str]] = {}
    for fqn, tensor in originals.items():
        if tensor.layout == torch.strided and tensor.numel():
            by_storage.setdefault(storage_key(tensor), []).append(fqn)
    for fqns in by_storage.values():
        for fqn, other in itertools.combinations(fqns, 2):
            pair = originals[fqn], originals[other]
            if any(tensor.requires_grad for tensor in pair) and _overlap(*pair):
                raise TieError(
                    f"{fqn} and {other} are different tensors in the same memory\n"
                    "  let both names be one parameter (b.weight = a.weight), or give one a copy (.clone())"
                )


def _overlap(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether the stretches of memory that two tensors reach over have an element in common."""
    (start, end), (other_start, other_end) = _reach(one), _reach(other)
    return start < other_end and other_start < end


def _reach(tensor: torch.Tensor) -> tuple[int, int]:
    start = int(tensor.storage_offset()) * tensor.element_size()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (int(last) + 1) * tensor.element_size()


def _copied(model: nn.Module, parts: Parts, memo: dict[int, Any]) -> nn.Module:
    for fqn, part in parts:
        if isinstance(part, torch.jit.ScriptModule):
            raise CaptureError(
                f"module {fqn or '(the model)'} is a scripted {part.original_name}: its code cannot be observed\n"
                "  pass the Python module that was scripted"
            )
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:  # whatever a foreign __deepcopy__ raises
        raise CaptureError(
            f"{type(model).__qualname__} cannot be copied: {_uncopyable(model, memo)}{error}\n"
            "  capture works on a copy of the modules (not of their tensors); give what it names a __deepcopy__"
        ) from error


def _uncopyable(model: nn.Module, memo: dict[int, Any]) -> str:
    """Name the attribute that cannot be copied."""
    for fqn, part in model.named_modules():
        for name, value in vars(part).items():
            if name == "_modules":
                continue
            try:
                copy.deepcopy(value, dict(memo))
            except Exception:
                return f"attribute {f'{fqn}.{name}' if fqn else name} is a {type(value).__qualname__}: "
    return ""
