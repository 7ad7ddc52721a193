"""A stage holds its part of the model under the model's names, and runs what its programs say."""

import copy
import weakref

import handmade
import judge
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from fxpipe.errors import MaterializeError, PlanError
from fxpipe.program import AutocastState, CallContext, DrawScope
from fxpipe.runtime.build.stage import StageParts, build_stages
from fxpipe.runtime.run.local import LocalEngine
from fxpipe.runtime.run.work import Job

CPU = torch.device("cpu")


def names_of(model):
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    first = {}
    return named, {fqn: first.setdefault(id(tensor), fqn) for fqn, tensor in named}


def skeleton_of(model):
    """The model with fake tensors."""
    mode = FakeTensorMode()
    memo = {}
    for _, tensor in names_of(model)[0]:
        if id(tensor) not in memo:
            with mode:
                fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
            is_parameter = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
    for module in model.modules():
        memo.update({id(value): value for value in vars(module).values() if isinstance(value, torch.Tensor)})
    return copy.deepcopy(model, memo)


def build(model, *parts, without=()):
    """Stages of parts of a model, each ``(modules, attributes)``."""
    named, aliases = names_of(model)
    wanted = [fqn for modules, attributes in parts for fqn in (*modules, *attributes)]
    own = {
        aliases[fqn]: tensor.detach().clone()
        for fqn, tensor in named
        if fqn not in without and any(fqn == name or fqn.startswith(f"{name}.") for name in wanted)
    }
    specs = [StageParts(index, modules, attributes) for index, (modules, attributes) in enumerate(parts)]
    return build_stages(skeleton_of(model), specs, own, aliases, CPU)


class Bag(nn.Module):
    """A model whose children are what a test gives."""

    def __init__(self, **children):
        super().__init__()
        for name, child in children.items():
            setattr(self, name, child)


LIBRARY = {
    "lstm": (lambda: nn.LSTM(4, 5, num_layers=2, bidirectional=True, batch_first=True), (2, 3, 4)),
    "gru": (lambda: nn.GRU(4, 5), (2, 3, 4)),
    "attention": (lambda: nn.MultiheadAttention(4, 2, batch_first=True), (2, 3, 4)),
    "encoder": (lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), (2, 3, 4)),
    "parametrized": (lambda: weight_norm(nn.Linear(4, 5)), (2, 4)),
    "spectral": (lambda: spectral_norm(nn.Linear(4, 5)), (2, 4)),
    "hooked": (lambda: torch.nn.utils.spectral_norm(nn.Linear(4, 5)), (2, 4)),
    "batchnorm": (lambda: nn.Sequential(nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4)), (2, 4, 3)),
}


def run(module, x):
    output = module(x, x, x) if isinstance(module, nn.MultiheadAttention) else module(x)
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("name", LIBRARY)
def test_a_copied_library_module_computes_and_learns_as_the_original(name):
    make, shape = LIBRARY[name]
    torch.manual_seed(0)
    model = Bag(inner=make(), other=nn.Linear(2, 2)).train()
    (stage,) = build(model, (("inner",), ()))
    x = torch.randn(shape)
    results = []
    for module in (model.inner, stage.inner):
        torch.manual_seed(1)
        for _ in range(2):
            y = run(module, x)
            module.zero_grad()
            y.square().sum().backward()
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter -= 0.1 * parameter.grad
        results.append([run(module, x), *(p.grad for p in module.parameters()), *module.buffers()])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_names_are_the_model_s_and_nothing_else_is_held():
    model = Bag(
        a=nn.Linear(2, 3), b=nn.ModuleList([nn.Linear(3, 3) for _ in range(4)]), scale=nn.Parameter(torch.ones(2))
    )
    first, second = build(model, (("b.0", "b.1"), ("scale",)), (("b.3",), ("a.weight",)))
    assert [fqn for fqn, _ in first.named_parameters()] == ["scale", "b.0.weight", "b.0.bias", "b.1.weight", "b.1.bias"]
    assert [fqn for fqn, _ in second.named_parameters()] == ["a.weight", "b.3.weight", "b.3.bias"]
    assert torch.equal(second.get_parameter("b.3.weight"), model.b[3].weight)
    assert second.b[3] is next(iter(second.b))
    assert len(first.b) == 2
    assert "stage 1 on cpu" in repr(second)


def test_a_tie_is_one_parameter_within_a_stage_and_between_the_stages_of_a_rank():
    model = Bag(embed=nn.Embedding(5, 4), block=nn.Linear(4, 4), head=nn.Linear(4, 5, bias=False))
    model.head.weight = model.embed.weight
    first, second = build(model, (("embed",), ("head.weight",)), (("head",), ()))
    assert first.embed.weight is first.head.weight
    assert first.embed.weight is second.head.weight
    assert [fqn for fqn, _ in first.named_parameters()] == ["embed.weight"]


def test_a_shared_module_is_one_copy_and_frozen_parameters_stay_frozen():
    shared = nn.Linear(2, 2).requires_grad_(False)
    model = Bag(a=Bag(inner=shared), b=Bag(inner=shared))
    (stage,) = build(model, (("a", "b"), ()))
    assert stage.a.inner is stage.b.inner
    assert not stage.a.inner.weight.requires_grad


def test_buffers_keep_their_persistence():
    model = Bag(inner=Bag())
    model.inner.register_buffer("kept", torch.ones(1))
    model.inner.register_buffer("lost", torch.ones(1), persistent=False)
    whole, parts = build(model, (("inner",), ()), ((), ("inner.kept", "inner.lost")))
    for stage in (whole, parts):
        assert set(stage.state_dict()) == {"inner.kept"}
        assert {name for name, _ in stage.named_buffers()} == {"inner.kept", "inner.lost"}


def test_what_a_stage_does_not_own_costs_no_memory_and_the_skeleton_stays_as_it_is():
    class Peeking(nn.Module):
        def __init__(self, other):
            super().__init__()
            self.own = nn.Linear(2, 2)
            self.hidden = [other]  # holds another module without registering it

    model = Bag(big=nn.Linear(2, 2))
    model.small = Peeking(model.big)
    skeleton = skeleton_of(model)
    before = [id(tensor) for _, tensor in names_of(skeleton)[0]]
    own = {f"small.own.{name}": tensor.detach() for name, tensor in model.small.own.named_parameters()}
    (stage,) = build_stages(skeleton, [StageParts(0, ("small",), ())], own, names_of(model)[1], CPU)
    assert stage.small.hidden[0].weight.is_meta
    assert [id(tensor) for _, tensor in names_of(skeleton)[0]] == before
    assert stage.small.own.weight.data_ptr() == own["small.own.weight"].data_ptr()


def test_tensors_kept_as_plain_attributes_are_shared_not_copied():
    model = Bag(inner=Bag())
    model.inner.table = torch.arange(3.0)
    (stage,) = build(model, (("inner",), ()))
    assert stage.inner.table is model.inner.table


def test_a_tensor_without_a_value_is_named():
    with pytest.raises(MaterializeError, match=r"stage 0 got no value for inner\.weight"):
        build(Bag(inner=nn.Linear(2, 2)), (("inner",), ()), without=("inner.weight",))


def test_a_module_that_cannot_be_copied_is_named():
    model = Bag(inner=nn.Linear(2, 2))
    skeleton = skeleton_of(model)
    skeleton.inner.generator = (value for value in range(3))
    own = {fqn: tensor.detach() for fqn, tensor in names_of(model)[0]}
    with pytest.raises(MaterializeError, match="module inner of type Linear cannot be copied"):
        build_stages(skeleton, [StageParts(0, ("inner",), ())], own, names_of(model)[1], CPU)


# torch's compiler warns about torch's own code, and looks at gradients of tensors that have none.
COMPILER_WARNINGS = (
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method. is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
)


def compiler_warnings(test):
    for mark in COMPILER_WARNINGS:
        test = mark(test)
    return test


@compiler_warnings
def test_a_module_compiled_in_place_is_compiled_again():
    model = Bag(inner=nn.Linear(2, 2), plain=nn.Linear(2, 2))
    own = {fqn: tensor.detach() for fqn, tensor in names_of(model)[0]}
    parts = [StageParts(0, ("inner", "plain"), ())]
    (stage,) = build_stages(skeleton_of(model), parts, own, names_of(model)[1], CPU, compiled=["inner"])
    assert stage.inner._compiled_call_impl is not None
    assert stage.plain._compiled_call_impl is None
    skeleton = skeleton_of(model)
    skeleton.inner.compile(backend="eager")
    (stage,) = build_stages(skeleton, parts, own, names_of(model)[1], CPU)
    assert stage.inner._compiled_call_impl is not None


# --- programs ---


def prepare(model, made, **outputs):
    program = made.program(**outputs)
    stages = handmade.stages_of(model, program)
    for stage in stages:
        stage.add_program("a", program)
    return program, stages


def test_the_grad_and_autocast_state_of_every_call_is_restored():
    model = Bag(one=nn.Linear(4, 4), two=nn.Linear(4, 4), three=nn.Linear(4, 4))

    def plain(model, x):
        with torch.no_grad():
            a = model.one(x)
        with torch.autocast("cpu", torch.bfloat16):
            b = model.two(x)
            c = torch.matmul(b, b)
        return a + c.float() + model.three(x)

    half = CallContext(autocast=(AutocastState("", True, "bfloat16"), AutocastState("cuda", True, "float16")))
    made = handmade.Draft(model, 1, x=torch.ones(4, 4))
    a = made.module(0, "one", made.x, context=CallContext(grad_enabled=False))
    b = made.module(0, "two", made.x, context=half)
    c = made.call(0, torch.matmul, b, b, meta={"context": half})
    c = made.method(0, "float", c)
    y = made.call(0, torch.add, made.call(0, torch.add, a, c), made.module(0, "three", made.x))
    _, (stage,) = prepare(model, made, outputs=[y])
    x = torch.randn(4, 4)
    (found,) = stage("a", (), {"x": x})
    expected = plain(model, x)
    assert torch.equal(found, expected)
    found.sum().backward()
    expected.sum().backward()
    for (fqn, p), q in zip(stage.named_parameters(), model.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None) == fqn.startswith("one."), fqn
        assert p.grad is None or torch.equal(p.grad, q.grad)
    assert stage.source("a").count("with ") == 2


def test_attention_takes_the_kernels_of_its_call():
    allowed = []

    def note(x):
        allowed.append((torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()))
        return x + 1

    made = handmade.Draft(Bag(), 1, x=torch.ones(2))
    x = made.call(0, note, made.x, meta={"context": CallContext(attention=("MATH",))})
    _, (stage,) = prepare(Bag(), made, outputs=[made.call(0, note, x)])
    allowed.clear()
    stage("a", (), {"x": torch.ones(2)})
    assert allowed == [(False, True), (True, True)]


def test_devices_constants_and_odd_arguments_survive_the_way_through_source():
    def odd(x, *, pairs, window, choice, limits, kind, text):
        assert isinstance(pairs, tuple)
        assert isinstance(limits, list)
        return x[window] * pairs[0] + choice["of"] + limits[0] + len(text) + torch.zeros((), dtype=kind)

    model = Bag()
    made = handmade.Draft(model, 1, x=torch.ones(4, 4))
    table = made.constant("_constant.table", torch.ones(4))
    y = made.call(
        0,
        odd,
        made.x,
        pairs=(made.x, 1.5),
        window=slice(None),
        choice={"of": table},
        limits=[float("inf"), None],
        kind=torch.float64,
        text="it's",
    )
    z = made.call(0, torch.arange, 4, device=torch.device("meta"))
    w = made.call(0, torch.add, made.x, made.x, alpha=2)
    h = made.call(0, F.gelu, made.x, approximate="tanh")
    program = made.program(outputs=[y, z, w, h])
    (stage,) = handmade.stages_of(model, program)
    stage.add_program("a", program)
    y, z, w, h = stage("a", (), {"x": torch.ones(4, 4)})
    assert torch.equal(y, torch.full((4, 4), float("inf")))
    assert z.device == CPU
    assert torch.equal(w, torch.full((4, 4), 3.0))
    assert torch.equal(h, F.gelu(torch.ones(4, 4), approximate="tanh"))


def test_what_a_call_no_longer_needs_is_freed_before_the_next():
    alive = []

    counts = []

    def make(x):
        y = x + 1
        alive.append(weakref.ref(y))
        return y

    def count(x):
        counts.append(sum(ref() is not None for ref in alive))
        return x + 1

    made = handmade.Draft(Bag(), 1, x=torch.ones(2))
    x = made.x
    for _ in range(4):
        x = made.call(0, count, made.call(0, make, x))
    _, (stage,) = prepare(Bag(), made, outputs=[x])
    alive.clear()
    counts.clear()
    stage("a", (), {"x": torch.ones(2)})
    assert counts == [1, 1, 1, 1]


def test_a_module_may_write_into_what_it_is_given():
    with judge.float64():
        model = Bag(first=nn.Linear(3, 3), act=nn.ReLU(inplace=True), last=nn.Linear(3, 3))
        made = handmade.Draft(model, 2, x=torch.randn(2, 3))
        y = made.module(1, "last", made.module(1, "act", made.module(0, "first", made.x)))
        loss = made.call(1, torch.sum, y)
        program, stages = prepare(model, made, loss=[(loss, "sum")])
        x = torch.randn(2, 3)
        LocalEngine(stages).train([Job("a", program, {"x": x}, (1.0,))])
        model.last(model.act(model.first(x))).sum().backward()
    judge.assert_close(stages[0].first.weight.grad, model.first.weight.grad)


def test_a_variant_that_needs_what_the_stage_does_not_hold_is_refused():
    model = Bag(one=nn.Linear(2, 2), two=nn.Linear(2, 2))
    made = handmade.Draft(model, 1, x=torch.ones(1, 2))
    _, (stage,) = prepare(model, made, outputs=[made.module(0, "one", made.x)])
    other = handmade.Draft(model, 1, x=torch.ones(1, 2))
    program = other.program(outputs=[other.module(0, "two", other.x)])
    with pytest.raises(PlanError, match="stage 0 does not hold two"):
        stage.add_program("b", program)


def test_an_error_inside_a_program_shows_its_source():
    made = handmade.Draft(Bag(), 1, x=torch.ones(2, 2))
    y = made.call(0, torch.reshape, made.x, (4,))
    _, (stage,) = prepare(Bag(), made, outputs=[y])
    with pytest.raises(RuntimeError) as caught:
        stage("a", (), {"x": torch.ones(3)})
    assert str(caught.traceback[-1].statement).strip() == "reshape = reshape_1(x, (4,))"


@compiler_warnings
@pytest.mark.parametrize("whole", [True, False])
def test_compiled_stages_compute_the_same_and_draw_by_their_seed(whole):
    model = Bag(one=nn.Linear(3, 3), drop=nn.Dropout(0.5), two=nn.Linear(3, 3))
    made = handmade.Draft(model, 1, x=torch.randn(2, 3))
    one = made.module(0, "one", made.x)
    y = made.module(0, "drop", one, scope=DrawScope("", 0, (("drop", 0),)))
    made.drawing, made.draw_names = {"drop": "once"}, ("dropout",)
    _, (stage,) = prepare(model, made, outputs=[made.module(0, "two", one), y])
    x = torch.randn(2, 3)
    expected, _ = stage("a", (), {"x": x}, 3)
    for module in (stage,) if whole else (stage.one, stage.drop, stage.two):
        module.compile(backend="eager")
    found, drawn = stage("a", (), {"x": x}, 3)
    assert torch.equal(found, expected)
    assert torch.equal(stage("a", (), {"x": x}, 3)[1], drawn)
    assert not torch.equal(stage("a", (), {"x": x}, 5)[1], drawn)
    (found * drawn).sum().backward()
    assert stage.one.weight.grad is not None
