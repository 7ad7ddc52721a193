"""The clockwork: programs of computing, sending, receiving and waiting, one for each rank, run against each other.

A message takes its link alone (one direction of one pair of ranks; the other direction runs beside it), in the order
in which its sender sends. What an engine can overlap is a matter of its program:

- GPipe sends without waiting, and asks for an activation when it is about to use it: a transfer hides behind the
  sender's work, not behind the receiver's.
- 1F1B exchanges: a rank that has computed sends what it has and receives what comes next, and waits for both.
- The schedules of several stages ask early and send without waiting: transfers hide behind work on both sides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from fxpipe.ir.orders import Order, orders_of
from fxpipe.ir.schedule import placement

COMPUTE, SEND, RECEIVE, WAIT = range(4)
KINDS = {"F": 0, "B": 1, "I": 2, "W": 3}
NEVER = -1.0
KEPT_ACTIONS = 100_000  # stages times microbatches up to which programs are kept for the next time


@dataclass(frozen=True, slots=True)
class StageTimes:
    """Seconds of one stage for one microbatch.

    Attributes:
        forward_s: Forward.
        input_grad_s: Gradients of the inputs: what other stages wait for, where the backward is split.
        weight_grad_s: Gradients of the weights.
        send_s: Its output to the next stage; what the last stage says is not looked at.
        return_s: The gradient of that output, back from the next stage.
    """

    forward_s: float
    input_grad_s: float
    weight_grad_s: float = 0.0
    send_s: float = 0.0
    return_s: float = 0.0

    @property
    def compute_s(self) -> float:
        """Forward and backward, without messages."""
        return self.forward_s + self.input_grad_s + self.weight_grad_s


@dataclass(frozen=True, slots=True)
class Played:
    """When everything began.

    Attributes:
        starts: For each rank the start of each of its actions.
        ends: For each rank when it was done, its last messages included.
    """

    starts: list[list[float]]
    ends: list[float]

    @property
    def end_s(self) -> float:
        """When the last rank was done."""
        return max(self.ends)


def play(
    name: str, times: Sequence[StageTimes], num_ranks: int, num_microbatches: int, *, overlapped: bool = False
) -> Played:
    """Run every rank's actions in order, each as soon as its input is there.

    Args:
        name: The schedule, which decides what is overlapped.
        times: Seconds of each stage.
        num_ranks: Ranks that run them.
        num_microbatches: Microbatches of the step.
        overlapped: Whether every transfer hides behind work on both sides, whatever torch's engine does: what papers
            assume.

    Returns:
        Start of every action. Linear in the number of actions.

    Raises:
        ScheduleError: The schedule cannot run so many stages or microbatches.

    >>> play("GPipe", [StageTimes(1, 1)] * 2, 2, 2).starts
    [[0.0, 1.0, 4.0, 5.0], [1.0, 2.0, 3.0, 4.0]]
    """
    size = len(times) * num_microbatches
    known = programs_of if size <= KEPT_ACTIONS else programs_of.__wrapped__
    programs = known(name, len(times), num_ranks, num_microbatches, overlapped=overlapped)
    early = overlapped or _asks_early(name)
    return _run(programs, times, placement(name, len(times), num_ranks), num_microbatches, early=early)


def _asks_early(name: str) -> bool:
    return name not in ("GPipe", "1F1B")


@lru_cache(maxsize=64)
def programs_of(
    name: str, num_stages: int, num_ranks: int, num_microbatches: int, *, overlapped: bool = False
) -> tuple[tuple[int, ...], ...]:
    """Give each rank's program: computing, sending, receiving and waiting, as numbers.

    Messages are numbered ``channel * microbatches + microbatch``; channel ``s`` is into stage ``s`` from before,
    channel ``S + s`` the gradient into stage ``s`` from behind.
    """
    orders = orders_of(name, num_stages, num_ranks, num_microbatches)
    writer = _Writer(placement(name, num_stages, num_ranks), num_microbatches)
    if name == "1F1B" and not overlapped:
        return tuple(tuple(writer.exchanging(order)) for order in orders)
    ask, pairs = not (overlapped or _asks_early(name)), name == "DualPipeV" and not overlapped
    return tuple(tuple(writer.streaming(order, ask=ask, pairs=pairs)) for order in orders)


class _Writer:
    """Turns orders of actions into programs."""

    def __init__(self, rank_of_stage: Sequence[int], num_microbatches: int) -> None:
        count, stages = num_microbatches, len(rank_of_stage)
        joined = [a != b for a, b in pairwise(rank_of_stage)]
        # For each stage the first message of what its forward and its backward need and make; None: it stays there.
        self._needs: dict[str, list[int | None]] = {
            "F": [None, *(s * count if far else None for s, far in enumerate(joined, 1))],
            "B": [*((stages + s) * count if far else None for s, far in enumerate(joined)), None],
            "W": [None] * stages,
        }
        self._makes: dict[str, list[int | None]] = {
            "F": [*self._needs["F"][1:], None],
            "B": [None, *self._needs["B"][:-1]],
            "W": [None] * stages,
        }
        self._needs["I"], self._makes["I"] = self._needs["B"], self._makes["B"]

    def streaming(self, order: Order, *, ask: bool, pairs: bool) -> list[int]:
        """Wait for what an action needs, work, send without waiting.

        Args:
            order: The actions.
            ask: Whether what is needed is asked for only then.
            pairs: Whether what a forward made is sent after the whole backward that follows it at once: torch sends
                behind such pairs.
        """
        needs, makes = self._needs, self._makes
        program: list[int] = []
        add = program.append
        held = -1
        following = [*(kind for _, kind, _ in order[1:]), ""]
        for (stage, kind, microbatch), after in zip(order, following, strict=True):
            needed, made = needs[kind][stage], makes[kind][stage]
            if needed is not None:
                if ask:
                    add(needed + microbatch << 2 | RECEIVE)
                add(needed + microbatch << 2 | WAIT)
            add((stage << 2 | KINDS[kind]) << 2 | COMPUTE)
            if held >= 0:
                add(held << 2 | SEND)
                held = -1
            if made is not None:
                if pairs and kind == "F" and after == "B":
                    held = made + microbatch
                else:
                    add(made + microbatch << 2 | SEND)
        return program

    def exchanging(self, order: Order) -> list[int]:
        """Send what was made together with receiving what is needed next, as torch's 1F1B does.

        Warm-up forwards and last backwards have nothing to receive from where they send to; there a rank only waits
        until the message before is gone.
        """
        program: list[int] = []
        held: int | None = None  # made, and kept for the next exchange
        under_way: int | None = None
        for place, (stage, kind, microbatch) in enumerate(order):
            needed, made = self._needs[kind][stage], self._makes[kind][stage]
            if held is not None:
                program.append(held << 2 | SEND)
            if needed is not None:
                program.append(needed + microbatch << 2 | RECEIVE)
            if held is not None:
                program.append(held << 2 | WAIT)
            if needed is not None:
                program.append(needed + microbatch << 2 | WAIT)
            program.append((stage << 2 | KINDS[kind]) << 2 | COMPUTE)
            if under_way is not None:
                program.append(under_way << 2 | WAIT)
            held = under_way = None
            if made is not None and place + 1 < len(order) and order[place + 1][1] != kind:
                held = made + microbatch
            elif made is not None:
                under_way = made + microbatch
                program.append(under_way << 2 | SEND)
        if under_way is not None:
            program.append(under_way << 2 | WAIT)
        return program


def _run(
    programs: Sequence[Sequence[int]],
    times: Sequence[StageTimes],
    ranks: Sequence[int],
    num_microbatches: int,
    *,
    early: bool,
) -> Played:
    """Run each program as far as it goes, and on when what it waits for is done.

    Args:
        programs: What each rank does (``programs_of``).
        times: Seconds of each stage.
        ranks: Rank of each stage.
        num_microbatches: Microbatches of the step.
        early: Whether every message was asked for before the step began.
    """
    # Long: one loop without calls, since a large pipeline has millions of steps.
    seconds = [
        float(part)
        for t in times
        for part in (t.forward_s, t.input_grad_s + t.weight_grad_s, t.input_grad_s, t.weight_grad_s)
    ]
    move_s = [0.0, *(float(t.send_s) for t in times[:-1]), *(float(t.return_s) for t in times[:-1]), 0.0]
    sender, receiver = [*ranks[:1], *ranks[:-1], *ranks[1:], *ranks[-1:]], [*ranks, *ranks]
    pairs: dict[tuple[int, int], int] = {}
    link_of = [pairs.setdefault(pair, len(pairs)) for pair in zip(sender, receiver, strict=True)]
    free = [0.0] * len(pairs)
    messages = 2 * len(times) * num_microbatches
    done, sent = [NEVER] * messages, [NEVER] * messages
    posted = [0.0 if early else NEVER] * messages
    starts: list[list[float]] = [[] for _ in programs]
    at, now, awaited = [0] * len(programs), [0.0] * len(programs), [-1] * len(programs)
    ready = list(range(len(programs)))[::-1]
    while ready:
        rank = ready.pop()
        program, begin, time = programs[rank], starts[rank].append, now[rank]
        place, length = at[rank], len(program)
        while place < length:
            step = program[place]
            what, argument = step & 3, step >> 2
            if what == COMPUTE:
                begin(time)
                time += seconds[argument]
            elif what == WAIT:
                end = done[argument]
                if end < 0:
                    awaited[rank] = argument
                    break
                if end > time:
                    time = end
            else:
                other = posted if what == SEND else sent
                if other[argument] < 0:
                    (sent if what == SEND else posted)[argument] = time
                else:
                    channel = argument // num_microbatches
                    link = link_of[channel]
                    end = max(time, other[argument], free[link]) + move_s[channel]
                    free[link] = done[argument] = end
                    for waiting in (sender[channel], receiver[channel]):
                        if awaited[waiting] == argument:
                            awaited[waiting] = -1
                            ready.append(waiting)
            place += 1
        at[rank], now[rank] = place, time
    stuck = [rank for rank, program in enumerate(programs) if at[rank] < len(program)]
    assert not stuck, f"ranks {stuck} wait for messages that never come"
    return Played(starts, now)
