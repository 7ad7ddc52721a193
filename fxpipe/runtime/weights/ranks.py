"""All ranks that write one checkpoint: those of every replica, and the exchange of errors between them."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from fxpipe.runtime.ranks.agreement import agree
from fxpipe.runtime.ranks.groups import Groups


class Everyone:
    """The ranks of all replicas of a pipeline; or one process alone.

    Args:
        groups: The pipeline's groups; None where one process holds it all.
        apart: Whether to make a group of its own, for exchanges beside those of training; every rank makes it then.
    """

    def __init__(self, groups: Groups | None, *, apart: bool = False) -> None:
        self._groups = groups.beside() if groups is not None and apart else groups
        self._owned = self._groups if apart else None

    @property
    def position(self) -> int:
        """Which of them this process is."""
        return self._groups.members.index(dist.get_rank()) if self._groups is not None else 0

    def gather(self, value: Any) -> list[Any]:
        """Give every rank what each of them has."""
        return [value] if self._groups is None else self._groups.gather(value)

    def agree(self, error: Exception | None, subject: str, *parts: object) -> None:
        """Go on together, or raise the same error on every rank."""
        agree(self._groups, error, subject, *parts)

    def close(self) -> None:
        """End the group of its own."""
        if self._owned is not None:
            self._owned.close()
        self._owned = self._groups = None
