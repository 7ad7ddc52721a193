"""A simulated step: when each rank does what, how long it idles, and what it holds meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fxpipe.ir.orders import Action, Kind


class Event(NamedTuple):
    """One action on the time line of a rank.

    Attributes:
        stage: Stage that works.
        kind: ``"F"`` forward, ``"B"`` backward, ``"I"`` and ``"W"`` gradients of inputs and of weights.
        microbatch: Which microbatch, from 0.
        start_s: Seconds from the start of the step.
        end_s: Seconds from the start of the step.
    """

    stage: int
    kind: Kind
    microbatch: int
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class Simulation:
    """One step of a plan, simulated.

    Attributes:
        schedule: Name of the schedule.
        num_microbatches: Microbatches of the step.
        step_s: Seconds from the first action to the last, sums of tied gradients included; no optimiser.
        busy_s: Seconds each rank computes.
        bubble: For each rank the share of the step in which it does not compute: ``1 - busy / step``, which is the
            definition by wall time. Megatron's is ``step / ideal - 1``; the zero-bubble papers' is ``window_bubble``.
        peak_microbatches: For each rank the most activations of one microbatch in one stage that are alive at once.
        stage_peaks: For each stage the most microbatches alive at once.
        orders: For each rank its actions in order.
        starts: For each rank when each of them began, in seconds from the start of the step.
        seconds: For each stage the seconds of its forward, of its input gradients, and of its weight gradients.
        static_bytes: For each rank the bytes that do not depend on microbatches.
        live_bytes: For each stage the bytes kept per live microbatch.
    """

    schedule: str
    num_microbatches: int
    step_s: float
    busy_s: tuple[float, ...]
    bubble: tuple[float, ...]
    peak_microbatches: tuple[int, ...]
    stage_peaks: tuple[int, ...]
    orders: tuple[tuple[Action, ...], ...]
    starts: tuple[tuple[float, ...], ...]
    seconds: tuple[tuple[float, float, float], ...]
    static_bytes: tuple[int, ...] = ()
    live_bytes: tuple[int, ...] = ()

    @property
    def timeline(self) -> tuple[tuple[Event, ...], ...]:
        """For each rank its actions in order, with their times; made on demand."""
        seconds = [{"F": f, "B": i + w, "I": i, "W": w} for f, i, w in self.seconds]
        return tuple(
            tuple(
                Event(stage, kind, index, start, start + seconds[stage][kind])
                for (stage, kind, index), start in zip(order, starts, strict=True)
            )
            for order, starts in zip(self.orders, self.starts, strict=True)
        )

    @property
    def memory(self) -> tuple[tuple[tuple[float, int], ...], ...]:
        """For each rank ``(seconds, bytes)`` wherever its bytes change, from 0 on; made on demand.

        A microbatch is kept from the start of its forward to the end of its backward, of its weight gradients where
        they come later: torch keeps nearly all until then.
        """
        return tuple(
            _curve(events, static, self.live_bytes)
            for events, static in zip(self.timeline, self.static_bytes, strict=True)
        )

    @property
    def peak_bytes(self) -> tuple[int, ...]:
        """For each rank the most memory of the step."""
        return tuple(max(nbytes for _, nbytes in curve) for curve in self.memory)

    @property
    def mean_bubble(self) -> float:
        """Mean of the ranks' bubbles: the share of all ranks' time in which they do not compute."""
        return sum(self.bubble) / len(self.bubble)

    @property
    def window_s(self) -> float:
        """The longest time from a rank's first action to the end of its last."""
        return max(
            starts[-1] - starts[0] + self._length(order[-1])
            for order, starts in zip(self.orders, self.starts, strict=True)
        )

    @property
    def window_bubble(self) -> float:
        """Idle share of the longest window of a rank: ``1 - busy / window``, as in arXiv 2401.10241."""
        return 1 - max(self.busy_s) / self.window_s if self.window_s else 0.0

    def _length(self, action: Action) -> float:
        forward_s, input_s, weight_s = self.seconds[action[0]]
        return {"F": forward_s, "B": input_s + weight_s, "I": input_s, "W": weight_s}[action[1]]


def _curve(events: Sequence[Event], static: int, live_bytes: Sequence[int]) -> tuple[tuple[float, int], ...]:
    held, curve = static, [(0.0, static)]
    for event in events:
        if event.kind == "I":
            continue
        forward = event.kind == "F"
        held += live_bytes[event.stage] if forward else -live_bytes[event.stage]
        when = event.start_s if forward else event.end_s
        if curve[-1][0] == when:  # a forward that begins as a backward ends: the memory is free by then
            curve[-1] = when, held
        else:
            curve.append((when, held))
    return tuple(curve)


@dataclass(frozen=True, slots=True)
class Change:
    """One change and what it would give.

    Attributes:
        what: In words.
        gain: Share of the step's time (per microbatch, where their number changes) that it saves.
        options: What to ask for: names of options of ``compile`` (``"batch"``: samples of the batch), and values, None
            for the default. Empty for what cannot be asked for, such as links that cost nothing.
    """

    what: str
    gain: float
    options: tuple[tuple[str, str | int | None], ...] = ()


@dataclass(frozen=True, slots=True)
class Explanation:
    """What limits a step.

    Attributes:
        limit: In words.
        shares: Share of the step that the slowest rank computes, waits for links, and idles otherwise.
        changes: What would help, the largest gain first.
    """

    limit: str
    shares: tuple[float, float, float]
    changes: tuple[Change, ...]

    def __str__(self) -> str:
        compute, links, idle = (f"{100 * share:.0f} %" for share in self.shares)
        lines = [
            f"the step is limited by {self.limit}: {compute} work of the slowest rank, {links} links, {idle} bubble"
        ]
        lines += [f"{change.what}: {100 * change.gain:.1f} % faster" for change in self.changes]
        return "\n".join(lines if self.changes else [*lines, "no change that was tried would help"])

    @property
    def limited(self) -> str:
        """The limit, and what would help that nobody can ask for yet: a vocabulary split over the ranks."""
        later = (change for change in self.changes if "not built yet" in change.what)
        return self.limit + "".join(f"; {change.what} would save {100 * change.gain:.1f} %" for change in later)

    @property
    def line(self) -> str:
        """The limit and the change that would help most, in one line."""
        best = self.changes[0] if self.changes else None
        helps = f"; {best.what} would save {100 * best.gain:.1f} %" if best is not None else ""
        return f"limited by {self.limit}{helps}"
