"""What a rank did when: spans of forward, backward and communication, for people and for trace viewers."""

from __future__ import annotations

import json
import os
import pathlib
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from fxpipe.ir.plan import PipelinePlan
from fxpipe.runtime.ranks.groups import Groups

KINDS = ("forward", "backward", "weights", "communication", "step")
"""``weights``: the second half of a split backward; ``step``: a whole step of the rank."""


@dataclass(frozen=True, slots=True)
class Span:
    """One piece of work.

    Attributes:
        kind: One of ``KINDS``.
        step: Which step it belongs to, from 0.
        stage: The stage; -1 for what is the rank's.
        microbatch: The microbatch; -1 for what is of all.
        start_s: When it began, in seconds since the epoch.
        end_s: When it ended.
    """

    kind: str
    step: int
    stage: int
    microbatch: int
    start_s: float
    end_s: float

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.end_s - self.start_s

    @property
    def name(self) -> str:
        """torch's name of the action, such as ``2F0``: stage, what, microbatch.

        >>> Span("forward", 0, 2, 0, 0.0, 1.0).name
        '2F0'
        """
        letters = {"forward": "F", "backward": "B", "weights": "W"}
        return f"{self.stage}{letters[self.kind]}{self.microbatch}" if self.kind in letters else self.kind


@dataclass(frozen=True, slots=True)
class StepTiming:
    """One step of one rank.

    Attributes:
        step: Which step, from 0.
        seconds: The whole step.
        forward_s: Seconds in forwards, by stage.
        backward_s: Seconds in backwards, by stage.
        communication_s: Seconds in sums of gradients and of the loss.
        waiting_s: The rest: the pipeline's bubble, and what is received and sent.
        samples: Samples of the rank's batch.
        tokens: Tokens of it: entries of its first input of integers with several dimensions; 0 without one.
    """

    step: int
    seconds: float
    forward_s: tuple[tuple[int, float], ...]
    backward_s: tuple[tuple[int, float], ...]
    communication_s: float
    waiting_s: float
    samples: int
    tokens: int = 0

    @property
    def bubble(self) -> float:
        """Share of the step in which the rank computed nothing."""
        busy = sum(seconds for _, seconds in (*self.forward_s, *self.backward_s))
        return max(0.0, 1 - busy / self.seconds) if self.seconds else 0.0

    @property
    def samples_per_s(self) -> float:
        """Samples of the rank's batch per second."""
        return self.samples / self.seconds if self.seconds else 0.0

    @property
    def tokens_per_s(self) -> float:
        """Tokens of the rank's batch per second."""
        return self.tokens / self.seconds if self.seconds else 0.0


class SpanRecorder:
    """Keeps the spans of this rank; on an accelerator by events, so that nothing waits for the device meanwhile.

    Args:
        device: Where the stages run.
        most: Spans kept; the oldest go first.
    """

    def __init__(self, device: torch.device, most: int = 100_000) -> None:
        self._cuda = device if device.type == "cuda" else None
        self._most = most
        self._spans: list[tuple[str, int, int, int, Any, Any]] = []
        self._sizes: dict[int, tuple[int, int]] = {}
        self._step = -1
        self._clock = time.time() - time.perf_counter()
        self._zero = self._now()
        self._zero_s = time.time()

    def begin(self, samples: int, tokens: int = 0) -> None:
        """Begin a step."""
        self._step += 1
        self._sizes[self._step] = samples, tokens

    @contextmanager
    def span(self, kind: str, stage: int = -1, microbatch: int = -1) -> Iterator[None]:
        """Record what runs inside."""
        start = self._now()
        try:
            yield
        finally:
            self._spans.append((kind, self._step, stage, microbatch, start, self._now()))
            if len(self._spans) > self._most:
                del self._spans[: self._most // 10]

    def spans(self) -> list[Span]:
        """Give what was recorded, in order of time; on an accelerator after its work is done."""
        if self._cuda is not None:
            torch.cuda.synchronize(self._cuda)
        found = [
            Span(kind, step, stage, microbatch, self._seconds(start), self._seconds(end))
            for kind, step, stage, microbatch, start, end in self._spans
        ]
        return sorted(found, key=lambda span: span.start_s)

    def steps(self) -> tuple[StepTiming, ...]:
        """Add the spans up by step."""
        return add_up(self.spans(), self._sizes)

    def _now(self) -> Any:
        if self._cuda is None:
            return time.perf_counter()
        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._cuda))
        return event

    def _seconds(self, moment: Any) -> float:
        if self._cuda is None:
            return float(self._clock + moment)
        return float(self._zero_s + self._zero.elapsed_time(moment) / 1000)


def add_up(spans: Sequence[Span], sizes: dict[int, tuple[int, int]]) -> tuple[StepTiming, ...]:
    """Add spans up by step.

    Args:
        spans: Of one rank; a step without its own span is left out.
        sizes: Samples and tokens of each step.

    >>> work = Span("forward", 0, 1, 0, 0.0, 1.0), Span("backward", 0, 1, 0, 2.0, 4.0)
    >>> (found,) = add_up([Span("step", 0, -1, -1, 0.0, 4.0), *work], {0: (8, 80)})
    >>> found.bubble, found.waiting_s, found.samples_per_s, found.tokens_per_s
    (0.25, 1.0, 2.0, 20.0)
    """
    found = []
    for whole in spans:
        if whole.kind != "step":
            continue
        own = [span for span in spans if span.step == whole.step and span.kind != "step"]
        sums: dict[str, dict[int, float]] = {kind: {} for kind in ("forward", "backward", "communication")}
        for span in own:
            by_stage = sums["backward" if span.kind == "weights" else span.kind]
            by_stage[span.stage] = by_stage.get(span.stage, 0.0) + span.seconds
        busy = sum(seconds for by_stage in sums.values() for seconds in by_stage.values())
        found.append(
            StepTiming(
                whole.step,
                whole.seconds,
                tuple(sorted(sums["forward"].items())),
                tuple(sorted(sums["backward"].items())),
                sum(sums["communication"].values()),
                max(0.0, whole.seconds - busy),
                *sizes.get(whole.step, (0, 0)),
            )
        )
    return tuple(found)


def trace_events(spans: Sequence[Span], rank: int) -> list[dict[str, Any]]:
    """Give spans the form of the Trace Event Format: a process per rank, a thread per stage.

    Source: Google, "Trace Event Format"; read by chrome://tracing and Perfetto.
    """
    events: list[dict[str, Any]] = [{"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"rank {rank}"}}]
    for stage in sorted({span.stage for span in spans}):
        name = f"stage {stage}" if stage >= 0 else "rank"
        events.append({"ph": "M", "name": "thread_name", "pid": rank, "tid": stage + 1, "args": {"name": name}})
    for span in spans:
        times = {"ts": span.start_s * 1e6, "dur": span.seconds * 1e6}
        args = {"step": span.step, "microbatch": span.microbatch}
        place = {"pid": rank, "tid": span.stage + 1}
        events.append({"ph": "X", "name": span.name, "cat": span.kind, **place, **times, "args": args})
    return events


def write_trace(
    path: str | os.PathLike[str],
    recorder: SpanRecorder,
    groups: Groups | None,
    device: torch.device,
    plan: PipelinePlan,
    bubble: Sequence[float],
) -> None:
    """Gather what all ranks recorded, and write it on the first; every rank calls this.

    Args:
        path: A JSON file.
        recorder: This rank's.
        groups: The pipeline's groups; None where one process holds it all.
        device: Where this rank's stages run.
        plan: What was run.
        bubble: For each rank of the plan the simulated one.
    """
    rank = groups.ranks[groups.position] if groups is not None else 0
    own = trace_events(recorder.spans(), rank), _summary(recorder, groups, device, plan, bubble)
    everywhere: list[Any] = [own]
    if groups is not None:
        everywhere = groups.gather(own)
        if rank != groups.members[0]:
            return
    events = [event for events, _ in everywhere for event in events]
    first = min((event["ts"] for event in events if "ts" in event), default=0.0)
    for event in events:
        if "ts" in event:
            event["ts"] -= first
    content = {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"ranks": [each for _, each in everywhere]}}
    pathlib.Path(path).write_text(json.dumps(content), encoding="utf-8")


def _summary(
    recorder: SpanRecorder, groups: Groups | None, device: torch.device, plan: PipelinePlan, bubble: Sequence[float]
) -> dict[str, Any]:
    """Give what a rank measured beside what was planned for it."""
    steps = recorder.steps()
    position = groups.position if groups is not None else None
    planned = [stage for stage in plan.stages if position is None or stage.rank == position]
    return {
        "rank": groups.ranks[groups.position] if groups is not None else 0,
        "stages": [stage.index for stage in planned],
        "step_s": steps[-1].seconds if steps else None,
        "bubble": steps[-1].bubble if steps else None,
        "planned_bubble": bubble[position] if position is not None else None,
        "samples_per_s": steps[-1].samples_per_s if steps else None,
        "tokens_per_s": steps[-1].tokens_per_s if steps else None,
        "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        "planned_peak_bytes": sum(stage.peak_bytes for stage in planned),
    }
