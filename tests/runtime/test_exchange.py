"""Messages with names: posted microbatches ahead, waited for where they are needed, let go of once they have left."""

import torch

from fxpipe.ir.tensor import TensorMeta
from fxpipe.program import BoundaryTensor
from fxpipe.runtime.build.boundary import message_layout
from fxpipe.runtime.run.exchange import Exchange

HIDDEN = (BoundaryTensor("hidden", TensorMeta((2, 3), "float32", requires_grad=True)),)


class Wire:
    """A process group that writes down what it is asked for."""

    def __init__(self):
        self.log, self.tags = [], {}

    def work(self, what, tensor, rank, tag):
        name = f"{what} {self.tags.setdefault(tag, len(self.tags))}"
        self.log.append(f"{name} rank {rank}")
        wire = self

        class Work:
            def wait(self):
                wire.log.append(f"wait {name}")

        return Work()

    def send(self, tensors, rank, tag):
        return self.work("send", *tensors, rank, tag)

    def recv(self, tensors, rank, tag):
        return self.work("recv", *tensors, rank, tag)


def exchange():
    wire = Wire()
    return wire, Exchange(wire, 1, torch.device("cpu"))


def test_the_receives_of_the_next_microbatches_are_posted_with_that_of_this_one_and_none_twice():
    wire, stage = exchange()
    asked = []
    for index in range(4):
        stage.ask("forward", index, 0, 4, lambda index: asked.append(index) or message_layout(HIDDEN))
        (received,) = stage.take("forward", index)
        assert received.shape == (2, 3)
    posted = [f"recv {index} rank 0" for index in range(4)]
    assert wire.log == [*posted[:3], "wait recv 0", posted[3], "wait recv 1", "wait recv 2", "wait recv 3"]
    assert asked == [0, 1, 2, 3]
    assert stage.take("forward", 1) == ()


def test_a_send_is_waited_for_once_and_only_where_somebody_says_so():
    wire, stage = exchange()
    hidden = (torch.ones(2, 3, requires_grad=True) * 2,)
    stage.send("forward", 0, 2, message_layout(HIDDEN), hidden)
    stage.send("backward", 0, 0, message_layout(HIDDEN), hidden)
    assert wire.log == ["send 0 rank 2", "send 1 rank 0"]
    stage.end_send("backward", 0)
    stage.end_send("backward", 7)
    stage.end_sends()
    stage.end_sends()
    assert wire.log[2:] == ["wait send 1", "wait send 0"]


def test_what_one_stage_sends_and_the_next_receives_has_one_name_that_nothing_else_has():
    tags = []
    for index in (1, 2, 3):
        for microbatch in (0, 1, 200):
            for kind, other in (("forward", 1), ("backward", -1)):
                sender, receiver = Wire(), Wire()
                Exchange(sender, index, torch.device("cpu")).send(
                    kind, microbatch, 0, message_layout(HIDDEN), (torch.ones(2, 3),)
                )
                Exchange(receiver, index + other, torch.device("cpu")).ask(
                    kind, microbatch, 0, microbatch + 1, lambda _: message_layout(HIDDEN)
                )
                assert list(sender.tags) == list(receiver.tags)
                tags += sender.tags
    assert len(set(tags)) == len(tags) == 18
    assert 0 not in tags
