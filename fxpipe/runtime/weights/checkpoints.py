"""A pipeline's weights on disk: what ``pipe.load``, ``pipe.save`` and ``pipe.save_pretrained`` delegate to."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from torch.optim import Optimizer

from fxpipe.errors import MaterializeError, WeightsError
from fxpipe.runtime.build.extra_state import held_extra_states
from fxpipe.runtime.build.stage import StageModule
from fxpipe.runtime.build.state import held_tensors, write_state
from fxpipe.runtime.build.wrappers import Adapters
from fxpipe.runtime.ranks.agreement import agree
from fxpipe.runtime.ranks.groups import Groups
from fxpipe.runtime.weights.loading import Loaded, load
from fxpipe.runtime.weights.matching import Wanted, shown
from fxpipe.runtime.weights.model import Model
from fxpipe.runtime.weights.pretrained import save_pretrained
from fxpipe.runtime.weights.saving import Saver, Snapshot, take_snapshot
from fxpipe.runtime.weights.trainable import save_trainable


class Checkpoints:
    """Reads and writes one rank's stages, together with the other ranks; live, until ``close``.

    Args:
        model: The whole model's names.
        stages: This rank's stages.
        groups: The pipeline's groups; None where one process holds it all.
        unfilled: First FQNs of tensors without a value; those that are loaded are taken out.
        caching: Configurations whose ``use_cache`` was switched off for capture.
        seed: Of initialisation.
        origins: Where values come from, by first FQN: ``"real"`` where the user gave them.
    """

    def __init__(
        self,
        model: Model,
        stages: Sequence[StageModule],
        groups: Groups | None,
        unfilled: set[str],
        caching: Sequence[Any] = (),
        seed: int = 0,
        origins: Mapping[str, str] | None = None,
    ) -> None:
        self._model = model
        self._stages = stages
        self._groups = groups
        self._unfilled = unfilled
        self._caching = caching
        # What peft made: none that the user gave values to.
        self._made = {fqn for fqn in model.added() if (origins or {}).get(fqn) != "real"}
        self._adapters = Adapters(model.module, model.names.first, seed)
        self._saver = Saver(model, groups)

    def load(
        self,
        path: str | os.PathLike[str],
        wanted: Wanted,
        optimizer: Optimizer | None = None,
        scheduler: Any = None,
    ) -> Loaded:
        """Fill this rank's tensors; as ``fxpipe.runtime.weights.loading.load``."""
        self._saver.wait()
        loaded = load(path, self._model, self._stages, self._groups, wanted, optimizer, scheduler)
        self._unfilled.difference_update(loaded.filled)
        self._made.difference_update(loaded.filled)
        self.start_adapters(loaded.filled)
        return loaded

    def start_adapters(self, loaded: Collection[str] = (), has_all: bool = False) -> None:
        """Start what peft adds to the model, of the weights that are there; every rank calls it, with new weights.

        Args:
            loaded: First FQNs of this rank's tensors that have just got other values.
            has_all: Whether all of the model's own have their values.

        Raises:
            MaterializeError: On every rank: peft fails, or leaves something that no other weights come for.
        """
        if not self._model.added():
            return
        error: Exception | None = None
        try:
            held = held_tensors(self._model.names, self._stages)
            known = {name: tensor for name, tensor in held.items() if name not in self._unfilled}
            fresh = self._made & self._unfilled & held.keys()
            wanted = fresh | {
                name for name in self._made & held.keys() - fresh if loaded and self._adapters.follows(name)
            }
            if wanted:  # some kinds take what they add out of the weights around it
                wanted |= {name for name in loaded if name in known and self._adapters.follows(name)}
            values = self._adapters.started([name for name in held if name in wanted], known)
            write_state([(held[name], value) for name, value in values.items()])
            self._unfilled.difference_update(values)
            if has_all and self._unfilled:
                raise MaterializeError(
                    f"peft gives no value to {shown(sorted(self._unfilled))}, when the model was wrapped on meta\n"
                    "  wrap a model with real weights, or build and wrap it in fxpipe.deferred_init"
                )
        except Exception as found:  # whatever it is, peft's own: no rank may wait for this one
            error = found
        agree(self._groups, error, "how adapters start")

    def keep_adapters(self) -> None:
        """From now on adapters keep their values, whatever weights are loaded: they are trained."""
        self._made.clear()

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        optimizer: Optimizer | None = None,
        scheduler: Any = None,
        extra: Any = None,
        only: str | None = None,
        async_: bool = False,
        step: int = 0,
        seed: int = 0,
    ) -> Future[None] | None:
        """Write a checkpoint, or with ``only="trainable"`` the trainable tensors.

        Raises:
            WeightsError: On every rank. Nothing is left then.
        """
        found: Snapshot | Exception
        unheld = self._unheld() if only is None else []
        try:
            self._check(only, optimizer, scheduler, extra, async_)
            found = take_snapshot(
                self._model,
                self._stages,
                optimizer=optimizer,
                scheduler=scheduler,
                extra=extra,
                step=step,
                seed=seed,
                unheld=unheld,
            )
        except Exception as error:  # a scheduler's state is the user's own code: no rank may wait for this one
            found = error
        if only is None:
            return self._saver.save(path, found, in_background=async_)
        self._saver.wait()
        self._saver.everyone().agree(found if isinstance(found, Exception) else None, "what to save")
        save_trainable(path, self._model, self._stages, self._groups, self._saver.everyone())
        return None

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write a Hugging Face directory; as ``fxpipe.runtime.weights.pretrained.save_pretrained``."""
        self._saver.wait()
        everyone = self._saver.everyone()
        error: Exception | None = None
        try:
            self._check_filled()
        except Exception as found:
            error = found
        everyone.agree(error, "what to save")
        save_pretrained(path, self._model, self._stages, self._groups, everyone, self._caching)

    def close(self) -> None:
        """Wait for a save in the background, and end what belongs to it."""
        self._saver.close()

    def _unheld(self) -> list[str]:
        """Give the first rank the keys of what modules save beside tensors that no stage holds whole."""
        extra, everyone = self._model.names.extra, self._saver.everyone()
        if not extra:
            return []
        held = {key for keys in everyone.gather(held_extra_states(extra, self._stages)) for key in keys}
        return [key for key in extra if key not in held] if everyone.position == 0 else []

    def _check(self, only: str | None, optimizer: object, scheduler: object, extra: object, async_: bool) -> None:
        self._check_filled()
        if only not in (None, "trainable"):
            raise WeightsError(f'only={only!r} is not known\n  give "trainable", or leave it out')
        if only is not None and (any(each is not None for each in (optimizer, scheduler, extra)) or async_):
            raise WeightsError('only="trainable" writes tensors alone\n  leave out the others, or only=')

    def _check_filled(self) -> None:
        if self._unfilled:
            raise WeightsError(
                f"{len(self._unfilled)} tensors have no value to save: {shown(sorted(self._unfilled))}\n"
                "  load them first"
            )
