"""How long something lasts, without the times in which this process itself did not run."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable


class Awake:
    """A clock that stands while its process does: stopped with its whole job, paused, or starved of a processor.

    What others did in such a time this process cannot know; they may have stood still for the same reason.

    Args:
        tick_s: How often ``tick`` is called.
        clock: Seconds that go on all the time.
    """

    def __init__(self, tick_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._most_s = 2 * tick_s
        self._last = clock()
        self._gaps: deque[tuple[float, float]] = deque(maxlen=1000)  # when each ended, and its seconds

    def tick(self) -> None:
        """Show that this process runs; a call that comes later than twice the usual time tells of a gap."""
        now = self._clock()
        late_s = now - self._last - self._most_s
        if late_s > 0:
            self._gaps.append((now, late_s))
        self._last = now

    def since(self, start: float) -> float:
        """Give the seconds since a time, without what was lost.

        >>> times = iter([0.0, 0.5, 60.0, 60.2, 60.2])
        >>> clock = Awake(0.5, lambda: next(times))
        >>> clock.tick(), clock.tick()
        (None, None)
        >>> round(clock.since(0.0), 3), round(clock.since(60.0), 3)
        (1.7, 0.2)
        """
        return self.between(start, self._clock())

    def between(self, start: float, end: float) -> float:
        """Give the seconds between two times, likewise."""
        gaps = ((max(ended - seconds, start), min(ended, end)) for ended, seconds in self._gaps)
        return end - start - sum(max(last - first, 0.0) for first, last in gaps)
