"""The messages of one stage where each has a name of its own, as gloo's have: no order of posting can mix them up.

Gloo moves nothing before both ends have asked for it. So a receive is posted some microbatches before it is needed, and
a stage waits for nothing but what it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.distributed as dist

from fxpipe.runtime.build.boundary import MessageLayout, pack, receive_buffers
from fxpipe.runtime.run.work import Tensors

Kind = Literal["forward", "backward"]
AHEAD = 2
"""Microbatches after the next one for which a receive is posted already; each takes its memory."""


def carries_names(device: torch.device) -> bool:
    """Tell whether messages on such devices have names: NCCL's have none, and one that waits holds up all others."""
    return device.type == "cpu"


class Absences:
    """Which gradients are None, told from host to host where a look at what crossed would wait for the device; live.

    A stage's host waits for the next one's, which has told its device by then what to do for the microbatch.

    Args:
        group: The pipeline's ranks, for tensors on the CPU.
        stage_index: The stage.
    """

    def __init__(self, group: dist.ProcessGroup, stage_index: int) -> None:
        self._group: dist.ProcessGroup | None = group
        self._stage_index = stage_index
        self._sent: list[tuple[dist.Work, torch.Tensor]] = []

    def tell(self, microbatch: int, rank: int, flags: Sequence[bool]) -> None:
        """Begin to tell the stage before, which ``rank`` holds, which of a microbatch's gradients are None."""
        assert self._group is not None
        message = torch.tensor(flags, dtype=torch.uint8)
        tag = _tag("backward", microbatch, self._stage_index - 1)
        self._sent.append((self._group.send([message], rank, tag), message))

    def hear(self, microbatch: int, rank: int, number: int) -> list[bool]:
        """Wait for what the next stage, which ``rank`` holds, tells of its ``number`` gradients."""
        assert self._group is not None
        message = torch.empty(number, dtype=torch.uint8)
        self._group.recv([message], rank, _tag("backward", microbatch, self._stage_index)).wait()
        return [bool(flag) for flag in message.tolist()]

    def end(self) -> None:
        """Wait until all has left."""
        while self._sent:
            self._sent.pop()[0].wait()

    def close(self) -> None:
        """Let go of the group."""
        self._sent.clear()
        self._group = None


class Exchange:
    """What one stage receives and sends in a step, activations ``"forward"`` and gradients ``"backward"``; live.

    Args:
        group: The pipeline's ranks.
        stage_index: The stage.
        device: Where the stage runs.
    """

    def __init__(self, group: dist.ProcessGroup, stage_index: int, device: torch.device) -> None:
        self._group: dist.ProcessGroup | None = group
        self._stage_index, self._device = stage_index, device
        self._asked: set[tuple[Kind, int]] = set()
        self._due: dict[tuple[Kind, int], tuple[list[dist.Work], Tensors]] = {}
        self._sent: dict[tuple[Kind, int], list[tuple[dist.Work, torch.Tensor]]] = {}

    def ask(
        self, kind: Kind, microbatch: int, source: int, number: int, layout: Callable[[int], MessageLayout]
    ) -> None:
        """Post the receives of a microbatch, and of the next ones.

        Args:
            kind: What is received.
            microbatch: Its index.
            source: Rank in the group of the stage that sends it.
            number: How many there are.
            layout: Gives what is received for a microbatch.
        """
        assert self._group is not None
        for index in range(microbatch, min(microbatch + 1 + AHEAD, number)):
            if (kind, index) in self._asked:
                continue
            self._asked.add((kind, index))
            messages, tensors = receive_buffers(layout(index), self._device, as_bytes=False)
            tag = _tag(kind, index, self._stage_index)
            self._due[kind, index] = [self._group.recv([each], source, tag) for each in messages], tuple(tensors)

    def take(self, kind: Kind, microbatch: int) -> Tensors:
        """Wait for what was asked for, and give it; nothing where nothing was."""
        works, tensors = self._due.pop((kind, microbatch), _NOTHING)
        for work in works:
            work.wait()
        return tensors

    def send(self, kind: Kind, microbatch: int, rank: int, layout: MessageLayout, tensors: Tensors) -> None:
        """Begin to send what the stage has for the next one, or gradients for the one before; ``rank`` holds that."""
        assert self._group is not None
        tag = _tag(kind, microbatch, self._stage_index + (1 if kind == "forward" else -1))
        messages = pack(layout, tensors, as_bytes=False)
        self._sent[kind, microbatch] = [(self._group.send([each], rank, tag), each) for each in messages]

    def end_send(self, kind: Kind, microbatch: int) -> None:
        """Wait until a message has left, if it was sent and not waited for yet, and let go of it."""
        for work, _ in self._sent.pop((kind, microbatch), ()):
            work.wait()

    def end_sends(self) -> None:
        """Wait until all have left."""
        for kind, microbatch in list(self._sent):
            self.end_send(kind, microbatch)

    def clear(self) -> None:
        """Begin a step."""
        self._asked.clear()
        self._due.clear()
        self._sent.clear()

    def close(self) -> None:
        """Let go of the group: its connections close when nothing refers to it."""
        self.clear()
        self._group = None


_NOTHING: tuple[list[dist.Work], Tensors] = [], ()


def _tag(kind: Kind, microbatch: int, stage_index: int) -> int:
    """Number what a stage receives; 0 is what has no name."""
    return 1 + (microbatch << 13 | stage_index << 1 | (kind == "backward"))
