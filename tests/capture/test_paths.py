"""Several paths through a model run on one plan: every parameter has its stage from the start, and one name."""

import judge
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxpipe


def error(output, target):
    return F.mse_loss(output, target)


class Stems(nn.Module):
    """An argument chooses the stem."""

    def __init__(self, first):
        super().__init__()
        for name in ("image", "text") if first == "image" else ("text", "image"):
            self.add_module(name, nn.Linear(6, 6))
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))

    def forward(self, x, kind="image"):
        x = self.get_submodule(kind)(x)
        for block in self.blocks:
            x = block(x).tanh()
        return x


class Heads(nn.Module):
    """An argument chooses the head, which lies within a module."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
        self.heads = nn.ModuleDict({"image": nn.Linear(6, 6), "text": nn.Linear(6, 6)})

    def forward(self, x, kind="image"):
        for block in self.blocks:
            x = block(x).tanh()
        return self.heads[kind](x)


class Alternatives(nn.Module):
    """An argument chooses a module in the midst of every block."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"image": nn.Linear(6, 6), "text": nn.Linear(6, 6), "out": nn.Linear(6, 6)}) for _ in range(4)
        )

    def forward(self, x, kind="image"):
        for block in self.blocks:
            x = block["out"](block[kind](x).tanh())
        return x


@pytest.mark.parametrize("grain", ["block", "op"])
@pytest.mark.parametrize("build", [lambda: Stems("image"), lambda: Stems("text"), Heads, Alternatives])
def test_both_paths_run_on_one_plan(build, grain):
    torch.manual_seed(0)
    model, x = build().double(), torch.randn(4, 6, dtype=torch.float64)
    pipe = fxpipe.compile(model, 2, (x,), {"target": x}, loss_fn=error, microbatches=2, grain=grain)
    pipe.materialize(device="cpu")
    names = [fqn for fqn, _ in pipe.named_parameters()]
    assert sorted(names) == sorted(fqn for fqn, _ in model.named_parameters())
    fingerprint = pipe.plan.fingerprint
    for kind in ("image", "text"):
        loss = pipe.step(x, kind=kind, target=x)
        torch.testing.assert_close(loss, error(model(x, kind), x).detach(), rtol=1e-12, atol=0)
    assert (pipe.plan.fingerprint, [fqn for fqn, _ in pipe.named_parameters()]) == (fingerprint, names)
    pipe.close()


class Switching(nn.Module):
    """Evaluation takes parameters that training does not."""

    def __init__(self):
        super().__init__()
        self.inner, self.train_scale, self.eval_scale = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.inner((self.train_scale if self.training else self.eval_scale)(x)).tanh()


class Caching(nn.Module):
    """Evaluation keeps what it computed of the parameters."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.bias, self.kept = nn.Linear(6, 6), nn.Linear(6, 6), nn.Parameter(torch.ones(6)), {}

    def train(self, mode=True):
        self.kept = {}
        return super().train(mode)

    def bias_now(self):
        if self.training:
            return self.bias[torch.arange(6)]
        if "bias" not in self.kept:
            self.kept["bias"] = self.bias[torch.arange(6)]
        return self.kept["bias"]

    def forward(self, x):
        return self.two(self.one(x) + self.bias_now()).tanh()


class Keeping(Caching):
    """Another place to keep it."""

    def bias_now(self):
        if self.training:
            return self.bias * 2
        if not hasattr(self, "doubled"):
            self.doubled = self.bias * 2
        return self.doubled


class Fused(nn.Module):
    """Evaluation calls a module whole of which training calls the parts."""

    def __init__(self):
        super().__init__()
        self.pair = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))

    def forward(self, x):
        return self.pair[1](self.pair[0](x).clone()).tanh() if self.training else self.pair(x).tanh()


@pytest.mark.parametrize("grain", ["block", "op"])
@pytest.mark.parametrize("kind", [Switching, Caching, Keeping, Fused])
def test_training_and_evaluation_run_on_one_plan(kind, grain):
    torch.manual_seed(0)
    model, x = nn.Sequential(*(kind() for _ in range(3))).double(), torch.randn(4, 6, dtype=torch.float64)
    # What is kept carries its graph: the model itself can go backward through it once.
    options = {"loss_fn": error, "microbatches": 1, "schedule": "GPipe", "grain": grain}
    pipe = fxpipe.compile(model, 4, (x,), {"target": x}, **options).materialize(device="cpu")
    for training in (True, False, True):
        pipe.train(training)
        loss = pipe.step(x, target=x)
        expected = error(model.train(training)(x), x).detach()
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    pipe.close()


def test_what_a_forward_keeps_of_its_input_is_still_refused():
    class Remembering(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.last = nn.Linear(6, 6), None

        def forward(self, x):
            before, self.last = self.last, x.detach()
            return self.linear(x if before is None else x + before)

    x = torch.randn(4, 6)
    model = nn.Sequential(Remembering(), nn.Linear(6, 6))
    pipe = fxpipe.compile(model, 2, (x,), {"target": x}, loss_fn=error, microbatches=2, grain="op")
    assert any("Remembering is never opened" in note for note in pipe.plan.notes)


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(64, 64)

    def forward(self, x):
        return torch.cat((x[:1], self.proj(x[1:]) + x[1:]))


class Around(nn.Module):
    def __init__(self, shared, inside):
        super().__init__()
        self.shared = nn.Sequential(shared, nn.Tanh()) if inside else shared
        self.norm, self.one, self.two = nn.LayerNorm(64), nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, x):
        x = self.shared(x)
        return x + self.two(self.one(self.norm(x)))


@pytest.mark.parametrize("stages", [2, 3, 5])
@pytest.mark.parametrize("inside", [False, True])
def test_a_module_shared_by_blocks_has_one_name(stages, inside):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = Shared(), Shared()
            shared = (self.first, self.first, self.second, self.second)
            self.blocks = nn.ModuleList(Around(each, inside) for each in shared)

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    torch.manual_seed(0)
    model, x = Model().double(), torch.randn(32, 64, dtype=torch.float64)
    options = {"loss_fn": error, "microbatches": 1, "schedule": "GPipe", "grain": "op"}
    pipe = fxpipe.compile(model, stages, (x,), {"target": x}, **options).materialize(device="cpu")
    torch.testing.assert_close(pipe.step(x, target=x), error(model(x), x).detach(), rtol=1e-12, atol=0)
    pipe.close()


class Parts(nn.Module):
    """Called by its parts, never itself."""

    def __init__(self):
        super().__init__()
        self.one, self.norm, self.two = nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 6)

    def forward(self, x):
        raise NotImplementedError


class Past(nn.Module):
    """Blocks whose forward is passed by; the end takes other parameters in evaluation."""

    def __init__(self, make):
        super().__init__()
        self.blocks = nn.ModuleList(make() for _ in range(4))
        self.end = Parts()

    def forward(self, x):
        for block in self.blocks:
            part = block[0] if isinstance(block, nn.ModuleList) else block
            x = part.two(part.norm(part.one(x)).tanh())
        x = self.end.one(x)
        return self.end.two(x if self.training else self.end.norm(x))


@pytest.mark.parametrize("grain", ["block", "op"])
@pytest.mark.parametrize("stages", [2, 4, 7])
@pytest.mark.parametrize("make", [Parts, lambda: nn.ModuleList([Parts()])])
def test_modules_called_past_what_is_around_them_run_on_one_plan(make, stages, grain):
    torch.manual_seed(0)
    model, x = Past(make).double(), torch.randn(4, 6, dtype=torch.float64)
    options = {"loss_fn": error, "microbatches": 2, "schedule": "GPipe", "grain": grain}
    with fxpipe.compile(model, stages, (x,), {"target": x}, **options).materialize(device="cpu") as pipe:
        for training in (True, False, True):
            pipe.train(training), model.train(training)
            torch.testing.assert_close(pipe.step(x, target=x), error(model(x), x).detach(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("grain", ["block", "op"])
@pytest.mark.parametrize("start", [True, False])
def test_a_poolformer_trains_and_evaluates_on_one_plan(start, grain):
    transformers = pytest.importorskip("transformers")
    config = transformers.PoolFormerConfig(
        depths=[1, 1, 2, 1], hidden_sizes=[8, 8, 16, 16], drop_path_rate=0.3, num_labels=3
    )
    torch.manual_seed(0)
    model = transformers.PoolFormerForImageClassification(config).double().train(start)
    batch = {"pixel_values": torch.randn(4, 3, 32, 32, dtype=torch.float64), "labels": torch.arange(4) % 3}
    options = {"microbatches": 2, "schedule": "GPipe", "grain": grain}
    with fxpipe.compile(model, 3, (), batch, **options).materialize(device="cpu") as pipe:
        pipe.train(), pipe.step(**batch)
        pipe.eval(), model.eval(), pipe.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        torch.testing.assert_close(pipe.step(**batch), loss.detach(), rtol=1e-12, atol=0)
        gradients = {fqn: parameter.grad for fqn, parameter in pipe.named_parameters()}
        for fqn, parameter in model.named_parameters():
            torch.testing.assert_close(gradients[fqn], parameter.grad, rtol=1e-9, atol=1e-12)
        pipe.train(), pipe.step(**batch)


class Spare(nn.Module):
    """Holds a module that is never called, beside blocks that are."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 6)) for _ in range(2))
        self.spare = Beside(nn.Linear(6, 6))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Beside(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.scale = inner, nn.Parameter(torch.ones(6))

    def forward(self, x):
        return self.inner(x) * self.scale


@pytest.mark.parametrize("grain", ["block", "op"])
@pytest.mark.parametrize("stages", [1, 2, 4])
def test_a_module_that_is_never_called_is_kept_whatever_is_opened(stages, grain):
    torch.manual_seed(0)
    model, x = Spare().double(), torch.randn(4, 6, dtype=torch.float64)
    options = {"loss_fn": error, "microbatches": 2, "schedule": "GPipe", "grain": grain}
    with fxpipe.compile(model, stages, (x,), {"target": x}, **options).materialize(device="cpu") as pipe:
        assert {fqn for fqn, _ in pipe.named_parameters()} == {fqn for fqn, _ in model.named_parameters()}
        assert pipe.state_dict(full=True).keys() == model.state_dict().keys()
        pipe.load_state_dict(model.state_dict())
        torch.testing.assert_close(pipe.step(x, target=x), error(model(x), x).detach(), rtol=1e-12, atol=0)


class Table(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.register_buffer("frequencies", torch.linspace(0.1, 1, width), persistent=False)

    def forward(self, x):
        angles = torch.arange(x.shape[1])[:, None] * self.frequencies
        return angles.cos(), angles.sin()


class Given(nn.Module):
    """Reads one of what it is given, in training alone or in evaluation alone."""

    def __init__(self, uses):
        super().__init__()
        self.uses = uses
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x, given, more=None):
        y = self.first(x)
        if self.uses and self.training == (self.uses > 0):
            y = y * given[abs(self.uses) - 1]
        return x + self.second(y.tanh())


class Giving(nn.Module):
    """Gives every block the same; most of them do not use it."""

    def __init__(self, kind, uses):
        super().__init__()
        self.kind = kind
        self.start = nn.Linear(6, 6)
        self.aside = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
        self.blocks = nn.ModuleList(Given(each) for each in uses)
        self.table = Table(6)
        self.scale = nn.Parameter(torch.linspace(0.5, 1, 6))
        self.register_buffer("shift", torch.linspace(1, 2, 6))

    def forward(self, x):
        x = self.start(x)
        if self.kind == "table":
            given, more = self.table(x), None
        elif self.kind == "activation":
            given, more = self.table(x), {"aside": self.aside(x)}
        elif self.kind == "activations":
            given, more = (self.aside(x), self.start(x)), None
        else:
            given, more = (self.scale, self.shift), self.scale
        for block in self.blocks:
            x = block(x, given, more)
        return x


@pytest.mark.parametrize("grain", ["block", "op", "auto"])
@pytest.mark.parametrize(
    ("kind", "uses"),
    [
        *((kind, uses) for kind in ("table", "activation", "weights") for uses in ((0, 0, 0), (0, 2, 0, 1))),
        *((kind, (-1, -1, -2)) for kind in ("table", "activations")),
    ],
)
def test_a_block_is_given_what_it_does_not_use(kind, uses, grain):
    torch.manual_seed(0)
    model = Giving(kind, uses).double()
    x, target = torch.randn(4, 3, 6).double(), torch.randn(4, 3, 6).double()
    pipe = fxpipe.compile(
        model, 2, (x,), {"target": target}, loss_fn=error, microbatches=2, grain=grain, cost="parameters"
    )
    pipe.materialize(device="cpu")
    loss = error(model(x), target)
    loss.backward()
    torch.testing.assert_close(pipe.step(x, target=target), loss.detach(), rtol=1e-12, atol=0)
    found = {fqn: parameter.grad for fqn, parameter in pipe.named_parameters()}
    for fqn, parameter in model.named_parameters():
        wanted, got = (torch.zeros_like(parameter) if each is None else each for each in (parameter.grad, found[fqn]))
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-14)
    pipe.eval(), model.eval()
    torch.testing.assert_close(pipe.step(x, target=target), error(model(x), target).detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(pipe.infer(x), model(x).detach(), rtol=1e-12, atol=1e-14)
    pipe.close()


class Read(nn.Module):
    """A table, a weight of a block, and a module are read at other places in one mode than in the other."""

    def __init__(self, early, late):
        super().__init__()
        self.early, self.late = early, late  # what training and evaluation read before and behind the blocks
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
        self.table = nn.Parameter(torch.randn(6))

    def read(self, x, what):
        if what == "table":
            return x * self.table
        if what == "first":
            return x @ self.blocks[0].weight
        return self.blocks[0](x) if what == "call" else x

    def forward(self, x):
        x = self.read(x, self.early[self.training])
        for block in self.blocks:
            x = block(x).tanh()
        return self.read(x, self.late[self.training])


@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize(
    ("early", "late"),
    [
        (("", "table"), ("table", "")),
        (("", ""), ("table", "")),
        (("", ""), ("first", "")),
        (("", "table"), ("call", "")),
    ],
)
def test_a_tensor_that_a_later_stage_reads_in_another_mode_is_sent_along(early, late, stages):
    torch.manual_seed(0)
    model, x = Read(early, late).double(), torch.randn(4, 6, dtype=torch.float64)
    options = {"loss_fn": error, "microbatches": 2, "schedule": "GPipe"}
    model.train("call" not in late)  # a module is called where the plan has it: that plan serves both modes
    with fxpipe.compile(model, stages, (x,), {"target": x}, **options).materialize(device="cpu") as pipe:
        for training in (True, False, True):
            model.train(training), pipe.train(training), model.zero_grad(), pipe.zero_grad()
            loss = error(model(x), x)
            loss.backward()
            torch.testing.assert_close(pipe.step(x, target=x), loss.detach(), rtol=1e-12, atol=0)
            for fqn, parameter in pipe.named_parameters():
                expected = model.get_parameter(fqn).grad
                assert (parameter.grad is None) == (expected is None), fqn
                if expected is not None:
                    torch.testing.assert_close(parameter.grad, expected, rtol=1e-12, atol=1e-14)


def test_what_a_later_stage_holds_is_refused_with_a_way_out_that_works():
    model, x = Read(("table", ""), ("", "table")).double(), torch.randn(4, 6, dtype=torch.float64)
    options = {"loss_fn": error, "microbatches": 2, "schedule": "GPipe"}
    with fxpipe.compile(model, 2, (x,), {"target": x}, **options).materialize(device="cpu") as pipe:
        pipe.step(x, target=x)
        with pytest.raises(
            fxpipe.CaptureError, match=r"of stage 1 makes\n  compile with an example \(or in the mode\)"
        ):
            pipe.eval().step(x, target=x)
    with fxpipe.compile(model.eval(), 2, (x,), {"target": x}, **options).materialize(device="cpu") as pipe:
        for training in (False, True):
            pipe.train(training), model.train(training)
            torch.testing.assert_close(pipe.step(x, target=x), error(model(x), x).detach(), rtol=1e-12, atol=0)


class Borrowing(nn.Module):
    """A block that calls, or reads, what belongs to a module beside it, on something that came before."""

    def __init__(self, beside, how):
        super().__init__()
        self.beside, self.how = (beside,), how  # a tuple: not registered here

    def forward(self, x):
        (layer,) = self.beside
        return (layer(x) if self.how == "call" else F.linear(x, layer.weight, layer.bias)).tanh()


class Lending(nn.Module):
    """Blocks of which some borrow the module of another, and what both are given was made long before."""

    def __init__(self, how, lenders):
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 6)
        self.own = nn.ModuleList(nn.Linear(6, 6) for _ in lenders)
        self.blocks = nn.ModuleList(Borrowing(self.own[lender], how) for lender in lenders)

    def forward(self, x):
        x = first = self.first(x)
        for layer, block in zip(self.own, self.blocks, strict=True):
            x = layer(x).tanh() + block(first)
        return self.last(x) + first


@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize("grain", ["block", "op", "auto"])
@pytest.mark.parametrize("how", ["call", "read"])
@pytest.mark.parametrize("lenders", [(0,), (0, 1, 2), (2, 0, 1)])
def test_a_block_borrows_the_module_of_another(lenders, how, grain, stages):
    torch.manual_seed(0)
    model, x = Lending(how, lenders).double(), torch.randn(8, 6, dtype=torch.float64)
    pipe = fxpipe.compile(
        model, stages, (x,), {"target": x}, loss_fn=error, microbatches=2, schedule="GPipe", grain=grain, cost="flops"
    ).materialize(device="cpu")
    loss = error(model(x), x)
    loss.backward()
    judge.assert_close({"loss": pipe.step(x, target=x)}, {"loss": loss.detach()}, "loss")
    found = {fqn: parameter.grad for fqn, parameter in pipe.named_parameters()}
    judge.assert_close(found, {fqn: parameter.grad for fqn, parameter in model.named_parameters()}, "gradients")
