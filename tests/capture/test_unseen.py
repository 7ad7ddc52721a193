"""Nothing reaches a weight unseen, and no tensor without values enters a run."""

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fxpipe
from fxpipe.capture.calls.counting import LayerCounter
from fxpipe.capture.capture import Capture
from fxpipe.errors import MaterializeError
from fxpipe.runtime.build.unheld import Unheld, check_values

READS = {
    "T": lambda weight: weight.T,
    "mT": lambda weight: weight.mT,
    "H": lambda weight: weight.H,
    "data": lambda weight: weight.data.t(),
    "index": lambda weight: weight[:, :].t(),
    "attribute chain": lambda weight: operator.attrgetter("T.T.T")(weight),
    "view": lambda weight: weight.view(11, 6).t(),
}
HOLDERS = {
    "list": (lambda table: [table], lambda held: held[0].weight),
    "dictionary": (lambda table: {"of": table}, lambda held: held["of"].weight),
    "closure": (lambda table: lambda: table.weight, lambda held: held()),
    "weights in a tuple": (lambda table: (table.weight,), lambda held: held[0]),
}


class Head(nn.Module):
    def __init__(self, held, read):
        super().__init__()
        self.held, self.read = held, read

    def forward(self, x):
        return x @ self.read(self.held)


class Model(nn.Module):
    def __init__(self, holder, read):
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        hold, get = HOLDERS[holder]
        self.head = Head(hold(self.table), lambda held: READS[read](get(held)))

    def forward(self, ids):
        x = self.table(ids)
        for block in self.blocks:
            x = block(x).tanh()
        return self.head(x)


def difference(output, target):
    return F.cross_entropy(output.flatten(0, 1), target.flatten())


@pytest.mark.parametrize(
    ("holder", "read"), [*(("list", read) for read in READS), *((holder, "T") for holder in HOLDERS)]
)
def test_a_weight_read_through_another_module_is_a_tie(holder, read):
    ids = torch.arange(20).view(4, 5) % 11
    torch.manual_seed(0)
    model = Model(holder, read).double()
    pipe = fxpipe.compile(model, 2, (ids,), {"target": ids}, loss_fn=difference, microbatches=2)
    assert [(tie.fqns, tie.stages) for tie in pipe.plan.ties] == [(("table.weight",), (0, 1))]
    pipe.materialize(device="cpu")
    loss = pipe.step(ids, target=ids)
    whole = difference(model(ids), ids)
    whole.backward()
    torch.testing.assert_close(loss, whole.detach(), rtol=1e-12, atol=0)
    gradients = {fqn: parameter.grad for fqn, parameter in pipe.named_parameters()}
    for fqn, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[fqn], parameter.grad, rtol=1e-12, atol=1e-14)
    pipe.close()


def test_a_custom_function_is_seen_to_read_a_weight():
    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            ctx.save_for_backward(x, weight)
            return x @ weight.t()

        @staticmethod
        def backward(ctx, grad):
            x, weight = ctx.saved_tensors
            return grad @ weight, grad.flatten(0, 1).t() @ x.flatten(0, 1)

    ids = torch.arange(20).view(4, 5) % 11
    model = Model("list", "T")
    model.head = Apart(model.table, Product.apply)
    pipe = fxpipe.compile(model, 2, (ids,), {"target": ids}, loss_fn=difference, microbatches=2)
    assert [tie.fqns for tie in pipe.plan.ties] == [("table.weight",)]


class Apart(nn.Module):
    def __init__(self, table, function):
        super().__init__()
        self.held, self.function = [table], [function]

    def forward(self, x):
        return self.function[0](x, self.held[0].weight)


@pytest.mark.parametrize("use", [lambda t: t + 1, lambda t: t.T, lambda t: F.linear(torch.ones(1, 3), t)])
def test_a_tensor_of_another_stage_raises_where_something_computes_with_it(use):
    unheld = Unheld.of("far.weight", torch.ones(2, 3))
    assert (tuple(unheld.shape), unheld.dtype) == ((2, 3), torch.float32)
    with pytest.raises(MaterializeError, match=r"reads far\.weight, which it does not hold"):
        use(unheld)


def test_a_result_without_values_is_refused():
    check_values([torch.ones(1), None], "stage 0")
    with pytest.raises(MaterializeError, match="stage 1 computed with a tensor \\[2\\] that has no values"):
        check_values([torch.ones(2, device="meta")], "stage 1")


# --- equal modules are equal ------------------------------------------------------------------------------------------


class Numbered(nn.Module):
    def __init__(self, number, reads):
        super().__init__()
        self.layer_id, self.reads, self.linear = number, [reads], nn.Linear(6, 6)

    def forward(self, x):
        return self.reads[0](self, self.linear(x))


def drops_late(module, x):
    return F.dropout(x, 0.5) if module.layer_id > 2 else x


def looked_up(module, x):
    return F.dropout(x, 0.5) if ("plain", "plain", "plain", "drop", "plain")[module.layer_id] == "drop" else x


def through_the_dictionary(module, x):
    return F.dropout(x, 0.5) if vars(module)["layer_id"] == 4 else x


def never_read(module, x):
    return F.dropout(x, 0.5) if module.training and x.shape[0] > 100 else x


@pytest.mark.parametrize(
    ("reads", "drawing"),
    [(drops_late, {"3", "4"}), (looked_up, {"3"}), (through_the_dictionary, {"4"}), (never_read, set())],
)
def test_a_block_that_reads_its_own_number_is_not_taken_for_another(reads, drawing):
    capture = Capture(nn.Sequential(*(Numbered(number, reads) for number in range(5))))
    captured = capture.capture(capture.inputs((torch.ones(2, 6),), {}), with_loss=False)
    assert captured.observation.frames.drawing(("dropout",)).keys() == drawing


def test_equal_blocks_are_run_no_more_than_twice_whatever_number_they_carry():
    runs = []

    def counted(module, x):
        runs.append(1)
        return x

    capture = Capture(nn.Sequential(*(Numbered(number, counted) for number in range(9))))
    capture.capture(capture.inputs((torch.ones(2, 6),), {}), with_loss=False)
    assert len(runs) == 3  # the first one's input takes no gradient, unlike the others'


def test_what_a_checkpointed_block_keeps_is_counted_by_itself():
    class Deep(nn.Module):
        def __init__(self, again):
            super().__init__()
            self.again, self.one, self.two = again, nn.Linear(6, 24), nn.Linear(24, 6)

        def inner(self, x):
            return self.two(self.one(x).tanh())

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=False) if self.again else self.inner(x)

    capture = Capture(nn.Sequential(Deep(False), Deep(True), Deep(False)))
    counter = LayerCounter(capture.skeleton, fused_attention=False)
    captured = capture.capture(capture.inputs((torch.ones(2, 6),), {}), with_loss=False, counter=counter)
    saved = [counts.saved_bytes for counts in capture.layer_graph(captured).counts]
    assert saved[0] == saved[2] > saved[1]


@pytest.mark.parametrize("make", [lambda w: w * 2, lambda w: w / w.norm(), lambda w: w - w.mean()])
def test_a_weight_made_in_the_forward_counts_apart_from_one_of_the_module(make):
    class Made(nn.Linear):
        def forward(self, x):
            return F.linear(x, make(self.weight), self.bias)

    x = torch.randn(4, 6)
    model = nn.Sequential(*(nn.Sequential(Made(6, 6), nn.Linear(6, 6)) for _ in range(3)))
    pipe = fxpipe.compile(model, 2, (x,), {"target": x}, loss_fn=F.mse_loss, microbatches=2, grain="op")
    held = {info.fqn: info.shape for spec in pipe.graph.specs for info in spec.parameters}
    assert held == {fqn: tuple(parameter.shape) for fqn, parameter in model.named_parameters()}
