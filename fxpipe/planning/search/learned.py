"""What one search learns of a graph that the next one, with other costs, groups or links, need not learn again."""

from __future__ import annotations

from collections.abc import Callable

from fxpipe.planning.search.downsets import enumerate_downsets
from fxpipe.planning.search.instance import Instance

KEPT = 4  # graphs whose downsets are kept: a hundred thousand of them take some megabytes


class Learned:
    """Downsets of the graphs searched last, and whom to tell that a search begins.

    One object serves the searches of one plan and goes with them.

    Args:
        tell: Called at the beginning of each search, and as it goes on.
    """

    def __init__(self, tell: Callable[[], object] = lambda: None) -> None:
        self.tell = tell
        self._masks: dict[tuple[tuple[int, ...], ...], tuple[int, list[int] | None]] = {}

    def downsets(self, instance: Instance, limit: int) -> list[int] | None:
        """Give all downsets as ``enumerate_downsets`` does; those of the same edges are listed once."""
        key = instance.predecessors
        known = self._masks.pop(key, None)
        if known is None or (known[1] is None and limit > known[0]):
            known = limit, enumerate_downsets(instance, limit)
        self._masks[key] = known
        while len(self._masks) > KEPT:
            del self._masks[next(iter(self._masks))]
        masks = known[1]
        return None if masks is None or len(masks) > limit else masks
