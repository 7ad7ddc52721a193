"""The training flags and other attributes of modules: what runs is what they say, wherever a user changes one."""

from __future__ import annotations

import enum
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fxpipe.errors import MaterializeError
from fxpipe.runtime.ranks.groups import Groups

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, enum.Enum)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_WAY_OUT = "name it in leaves=, or compile with grain='block': it is called as it is then"


def switch(model: nn.Module, stages: Iterable[nn.Module], mode: bool) -> None:
    """Switch the model and this rank's stages as ``model.train(mode)`` does, whatever the model's own method does.

    Models keep parts in evaluation there (the statistics of a backbone), or freeze them: a stage has no such method of
    the model, nor of a module that a cut goes through, so that it takes what the model's has left.

    Args:
        model: The model's modules, as they are recorded.
        stages: This rank's stages; their modules have the model's names.
        mode: True for training, False for evaluation.
    """
    before = {fqn: parameter.requires_grad for fqn, parameter in model.named_parameters(remove_duplicate=False)}
    model.train(mode)
    flags = {fqn: part.training for fqn, part in model.named_modules(remove_duplicate=False)}
    taken = {fqn: parameter.requires_grad for fqn, parameter in model.named_parameters(remove_duplicate=False)}
    for stage in stages:
        stage.train(mode)
        for fqn, part in stage.named_modules(remove_duplicate=False):
            part.training = flags.get(fqn, part.training)
        for fqn, parameter in stage.named_parameters(remove_duplicate=False):
            if fqn in taken and taken[fqn] != before.get(fqn):
                parameter.requires_grad_(taken[fqn])


class Modes:
    """The flags of the modules in this rank's stages, by the model's names, and those that graphs are recorded with.

    A module that a cut goes through stands in several stages: it is in training where it is in one of them.

    Args:
        model: The model's modules, as they are recorded; their flags follow those of the stages.
        stages: This rank's stages; their modules have the model's names.
        opened: Each gives those of a stage's modules that are never called, by name.
    """

    def __init__(
        self,
        model: nn.Module,
        stages: Iterable[nn.Module],
        opened: Sequence[Callable[[], Iterable[tuple[str, nn.Module]]]] = (),
    ) -> None:
        self._model = dict(model.named_modules(remove_duplicate=False))
        self._stages = tuple(stages)
        self._list_opened = opened
        self._listed: tuple[int, ...] = ()
        self._noted: tuple[int, ...] = ()
        known = ((fqn, part, self._model.get(fqn)) for each in opened for fqn, part in each())
        self._opened = [_Opened(fqn, part, model, _num_hooks(part)) for fqn, part, model in known if model is not None]
        self._settings: dict[str, str] = {}
        self._sizes: tuple[int, ...] = ()
        self._parts: list[tuple[str, nn.Module]] = []
        self._seen: list[bool] = []

    def changed(self, sizes: tuple[int, ...] = ()) -> bool:
        """Tell whether a flag is another one than when this was last asked, and than the model's.

        Args:
            sizes: Of the stages, in whatever they grow by: the modules are listed again where one did.
        """
        if not self._parts or sizes != self._sizes:
            before = {id(part): flag for (_, part), flag in zip(self._parts, self._seen, strict=True)}
            named = [each for stage in self._stages for each in stage.named_modules(remove_duplicate=False)]
            self._parts = [(fqn, part) for fqn, part in named if fqn in self._model]
            self._seen = [before.get(id(part), self._model[fqn].training) for fqn, part in self._parts]
            self._sizes = sizes
        now = [part.training for _, part in self._parts]
        if now == self._seen:
            return False
        pairs = zip(self._parts, self._seen, now, strict=True)
        found = any(flag != old and flag != self._model[fqn].training for (fqn, _), old, flag in pairs)
        self._seen = now
        return found

    def settings(self, sizes: tuple[int, ...] = ()) -> tuple[tuple[str, str], ...]:
        """Let the model have what was set on modules that are never called, and give all that was: name and value.

        Args:
            sizes: As in ``changed``.

        Raises:
            MaterializeError: Something was that the model cannot be given, or a hook that nothing would call.
        """
        if sizes != self._listed:
            uncalled, self._listed = {id(part) for each in self._list_opened for _, part in each()}, sizes
            self._opened = [each for each in self._opened if id(each.part) in uncalled]
        if sizes != self._noted and self._noted:  # verify has made them ready for more
            self.note_hooks(sizes)
        for each in self._opened:
            self._settings.update(each.follow())
        return tuple(self._settings.items())

    def note_hooks(self, sizes: tuple[int, ...]) -> None:
        """Take the hooks that modules have now for fxpipe's own: stages were made ready for another variant."""
        if sizes == self._noted:
            return
        self._noted = sizes
        for each in self._opened:
            each.num_hooks = _num_hooks(each.part)

    def gather(self, groups: Groups | None) -> None:
        """Give the model the flags that its modules have on all ranks; every rank calls it."""
        own: dict[str, bool] = {}
        for fqn, part in self._parts:
            own[fqn] = own.get(fqn, False) or part.training
        everywhere: list[Mapping[str, bool]] = [own]
        if groups is not None:
            everywhere = groups.gather(own)
        for fqn, module in self._model.items():
            flags = [flags[fqn] for flags in everywhere if fqn in flags]
            if flags:
                module.training = any(flags)


@dataclass(slots=True, eq=False)
class _Opened:
    """A module of a stage of which programs run what lies in it: what it has was read when it was recorded.

    Attributes:
        fqn: Its name.
        part: In the stage.
        model: As it is recorded.
        num_hooks: Those it had when hooks were noted last.
        seen: Its attributes when they were looked at last.
    """

    fqn: str
    part: nn.Module
    model: nn.Module
    num_hooks: int
    seen: dict[str, Any] = field(default_factory=dict)

    def follow(self) -> dict[str, str]:
        """Give the model's module what was set on the stage's since, and name it."""
        now = vars(self.part)
        is_called = bool(self.part._modules) and type(self.model).forward is not nn.Module.forward  # by the model
        if is_called and _num_hooks(self.part) != self.num_hooks:
            raise MaterializeError(
                f"{self.fqn} has got a hook, which nothing calls: its stage runs what lies in it\n  {_WAY_OUT}"
            )
        if len(now) == len(self.seen) and all(map(operator.is_, now.values(), self.seen.values())):
            return {}
        before, self.seen = self.seen, dict(now)
        changed = ((name, value) for name, value in now.items() if name not in before or value is not before[name])
        return dict(filter(None, (self._taken(name, value, is_first=not before) for name, value in changed)))

    def _taken(self, name: str, value: Any, *, is_first: bool) -> tuple[str, str] | None:
        known, missing = vars(self.model), object()
        had = known.get(name, missing)
        if name == "training" or value is had:
            return None
        if _is_plain(value):
            if (had is missing and name.startswith("_")) or (type(value) is type(had) and value == had):
                return None
            known[name] = value
            return f".{self.fqn}.{name}", repr(value)
        if (had is missing and name == "forward") or (had is not missing and not is_first):
            raise MaterializeError(
                f"{self.fqn}.{name} was set on a module that nothing calls: its stage runs what lies in it\n"
                f"  {_WAY_OUT}"
            )
        return None


def _num_hooks(part: nn.Module) -> int:
    return sum(len(getattr(part, name)) for name in _HOOKS)


def _is_plain(value: Any) -> bool:
    return isinstance(value, _PLAIN) or (isinstance(value, tuple) and all(map(_is_plain, value)))
