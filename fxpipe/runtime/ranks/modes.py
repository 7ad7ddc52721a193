"""The training flags of modules: what runs is what they say, on whatever rank a user changes one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from fxpipe.runtime.ranks.groups import Groups


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
    """

    def __init__(self, model: nn.Module, stages: Iterable[nn.Module]) -> None:
        self._model = dict(model.named_modules(remove_duplicate=False))
        self._stages = tuple(stages)
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
