"""Weights from recorded constructors, through the whole street, and what stays in memory after it."""

import gc
import json
import os
import warnings
import weakref

import pytest
import torch
from torch import nn

import fxpipe

WIDTH = 8


class Net(nn.Module):
    """Blocks, a tied head, buffers, a weight in the loss, a plain attribute."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, WIDTH)
        self.blocks = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(4)])
        self.head = nn.Linear(WIDTH, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("classes", torch.rand(5) + 0.5)
        self.register_buffer("scale", torch.linspace(0.5, 1, WIDTH), persistent=False)
        self.shift = torch.rand(WIDTH)
        for block in self.blocks:
            nn.init.normal_(block.weight, std=0.3)

    def forward(self, ids, labels=None):
        hidden = self.embedding(ids) * self.scale + self.shift
        for block in self.blocks:
            hidden = hidden + block(hidden).relu()
        logits = self.head(hidden)
        return logits if labels is None else nn.functional.cross_entropy(logits, labels, weight=self.classes)


def batch(size=8, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randint(0, 5, (size,), generator=generator) for name in ("ids", "labels")}


def plain(seed=0):
    torch.manual_seed(seed)
    return Net()


def recorded(seed=0):
    with fxpipe.deferred_init(seed=seed):
        return Net()


@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("dtype", [None, torch.float64, torch.float16, torch.bfloat16])
def test_a_recorded_model_runs_with_the_weights_of_a_plain_one(stages, dtype):
    model = plain()
    before = torch.get_rng_state()
    pipe = fxpipe.compile(recorded(), stages, example_kwargs=batch()).materialize("cpu", dtype=dtype)
    assert torch.equal(torch.get_rng_state(), before)
    for fqn, tensor in model.to(dtype).state_dict().items():
        assert torch.equal(pipe.state_dict()[fqn], tensor)
    if dtype == torch.float64:  # the plain attribute is no tensor of the model: it stays as it is
        model.shift = plain().shift
        loss = model(**batch()).detach()
        assert abs(float(pipe.step(**batch())) - float(loss)) < 1e-12 * float(loss)
        pipe.verify(**batch())


def test_the_seed_of_a_recording_stays_its_own():
    pipe = fxpipe.compile(recorded(seed=4), 2, example_kwargs=batch(), seed=9).materialize(seed=10)
    assert torch.equal(pipe.state_dict()["head.weight"], plain(seed=4).head.weight)


def test_an_explicit_init_replaces_a_recording_and_not_real_values():
    model = recorded()
    real = nn.Parameter(torch.full((WIDTH, WIDTH), 7.0))
    model.blocks[1].weight = real

    def init(module):
        for parameter in module.parameters(recurse=False):
            nn.init.constant_(parameter, 3)
        for buffer in module.buffers(recurse=False):
            buffer.fill_(2)

    state = fxpipe.compile(model, 2, example_kwargs=batch()).materialize(init=init).state_dict()
    assert state["blocks.1.weight"].eq(7).all()
    assert state["blocks.2.weight"].eq(3).all()
    assert state["classes"].eq(2).all()
    model = recorded()
    model.blocks[1].weight = real
    state = fxpipe.compile(model, 2, example_kwargs=batch()).materialize().state_dict()
    assert state["blocks.1.weight"].eq(7).all()
    assert torch.equal(state["blocks.2.weight"], plain().blocks[2].weight)


def test_empty_keeps_recorded_buffers_that_no_file_holds():
    pipe = fxpipe.compile(recorded(), 2, example_kwargs=batch()).materialize(init="empty")
    scale = dict(pipe.named_buffers())["scale"]
    assert torch.equal(scale, plain().scale)
    with pytest.raises(fxpipe.MaterializeError, match=r"10 tensors .* never filled: blocks\.\{0-\d\}\.bias"):
        pipe.step(**batch())
    pipe.load_state_dict(plain().state_dict())
    pipe.step(**batch())


def test_reset_is_told_what_it_leaves_untouched():
    with pytest.raises(
        fxpipe.MaterializeError, match=r"init='reset' gives no value to 2 tensors of Net: classes, scale"
    ):
        fxpipe.compile(recorded(), 2, example_kwargs=batch()).materialize(init="reset")


def test_a_recording_that_leaves_memory_unfilled_names_it():
    class Forgetful(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
            self.gain = nn.Parameter(torch.empty(4))

        def forward(self, x):
            return (self.layers[1](self.layers[0](x)) * self.gain).sum()

    with fxpipe.deferred_init():
        model = Forgetful()
    with pytest.raises(fxpipe.MaterializeError, match=r"no value for 1 tensor of .*Forgetful: gain\n"):
        fxpipe.compile(model, 2, (torch.rand(4, 4),)).materialize()


def test_compile_inside_of_the_block_is_refused():
    with (
        pytest.raises(fxpipe.CaptureError, match=r"inside of deferred_init.*\n  leave the block"),
        fxpipe.deferred_init(),
    ):
        fxpipe.compile(Net(), 2, example_kwargs=batch())


# --- where values come from ---


def sources(pipe):
    rows = json.loads(pipe.report("json", weights=True))["weights"]
    return {row["fqn"]: (row["source"], tuple(row["stages"])) for row in rows}


def test_the_report_says_where_each_tensor_comes_from():
    model = recorded()
    model.blocks[1].bias = nn.Parameter(torch.zeros(WIDTH))
    model.blocks[2].bias = nn.Parameter(torch.zeros(WIDTH, device="meta"))
    pipe = fxpipe.compile(model, 2, example_kwargs=batch())
    found = sources(pipe)
    assert list(found) == [fqn for fqn, _ in (*_in_order(model),)]
    assert found["embedding.weight"] == ("recorded", (0, 1))  # tied to the head
    assert found["blocks.1.bias"][0] == "the model's own value"
    assert found["blocks.2.bias"][0] == "none: give init= or load"
    with pytest.raises(fxpipe.MaterializeError, match=r"no value for 1 tensor of Net: blocks\.2\.bias"):
        pipe.materialize()
    pipe.materialize(init="empty")
    found = sources(pipe)
    assert found["scale"][0] == "recorded"
    assert found["classes"][0] == "init='empty': to be loaded"
    assert found["blocks.1.bias"][0] == "the model's own value"
    assert "the model's own value 32 B" in pipe.report(weights=True)


def test_what_was_read_from_a_file_is_named_after_it(tmp_path):
    pipe = fxpipe.compile(recorded(), 2, example_kwargs=batch()).materialize()
    pipe.save(tmp_path / "saved")
    pipe = fxpipe.compile(recorded(seed=5), 2, example_kwargs=batch()).materialize(init=tmp_path / "saved")
    found = sources(pipe)
    assert found["blocks.0.weight"][0] == "file saved"
    assert found["scale"][0] == "recorded"
    assert torch.equal(pipe.state_dict()["blocks.0.weight"], plain().blocks[0].weight)


def _in_order(model):
    for prefix, part in model.named_modules():
        for leaf, tensor in (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)):
            fqn = f"{prefix}.{leaf}" if prefix else leaf
            if fqn != "head.weight":
                yield fqn, tensor


def test_the_report_names_explicit_inits_and_constructors():
    specs = [fxpipe.LayerSpec(nn.Linear, 4, 4), torch.relu, nn.Linear(4, 4)]

    def loss(output, target):
        return nn.functional.mse_loss(output, target)

    example = {"target": torch.rand(4, 4)}
    pipe = fxpipe.compile(specs, 2, (torch.rand(4, 4),), example, loss_fn=loss, seed=3)
    assert [source for source, _ in sources(pipe).values()] == ["constructor, seed 3"] * 2 + [
        "the model's own value"
    ] * 2
    pipe.materialize(init="reset", seed=4)
    assert sources(pipe)["0.weight"] == ("init='reset'", (0,))
    pipe = fxpipe.compile(recorded(), 1, example_kwargs=batch())
    pipe.materialize(init=lambda module: [nn.init.ones_(t.data) for t in _direct(module)])
    assert {source for source, _ in sources(pipe).values()} == {"init= function"}


def _direct(module):
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]


def test_the_command_line_plans_a_recorded_model_and_shows_its_sources(tmp_path, capsys):
    from fxpipe.cli.main import main

    file = tmp_path / "factory_of_a_recording.py"
    file.write_text(
        "import fxpipe, torch\n"
        "from tests.end_to_end.test_weights import Net, batch\n"
        "def build():\n"
        "    with fxpipe.deferred_init(seed=3):\n"
        "        model = Net()\n"
        "    return model, (), batch()\n"
    )
    assert main(["plan", f"{file}:build", "--stages", "2", "--weights"]) == 0
    text = capsys.readouterr().out
    assert any(line.split()[:4] == ["blocks.3.bias", "32", "B", "recorded"] for line in text.splitlines())


# --- what stays in memory ---


@pytest.mark.parametrize("dtype", [None, torch.float64])
@pytest.mark.parametrize("how", [plain, recorded])
def test_the_users_tensors_are_freed_when_the_user_lets_go_of_them(how, dtype):
    model = how()
    alive = [weakref.ref(tensor) for tensor in (*model.parameters(), *model.buffers())]
    modules = [weakref.ref(module) for module in model.modules()]
    pipe = fxpipe.compile(model, 2, example_kwargs=batch()).materialize(dtype=dtype)
    pipe.step(**batch())
    del model
    gc.collect()
    assert not any(reference() is not None for reference in alive)
    assert not any(reference() is not None for reference in modules)
    pipe.step(**batch(16))  # another size: captured anew, the loss's weights too
    pipe.infer(ids=batch(3)["ids"])
    pipe.verify(**batch())
    pipe.report(baselines=True)


def test_the_users_model_stays_as_it_was():
    model = plain()
    before = {fqn: tensor.clone() for fqn, tensor in model.state_dict().items()}
    pipe = fxpipe.compile(model, 2, example_kwargs=batch()).materialize()
    pipe.step(**batch())
    for fqn, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[fqn])
        assert tensor.data_ptr() != pipe.state_dict()[fqn].data_ptr()


@pytest.mark.parametrize("kind", ["GPT2", "Bert"])
def test_hugging_face_models_start_as_they_would(kind):
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    transformers = pytest.importorskip("transformers")
    if kind == "GPT2":
        config = transformers.GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=50, n_positions=16)
        cls = transformers.GPT2LMHeadModel
    else:
        config = transformers.BertConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20, vocab_size=50
        )
        cls = transformers.BertForMaskedLM
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        expected = cls(config)
        with fxpipe.deferred_init(seed=0):
            model = cls(config)
    ids = torch.randint(3, 50, (4, 8), generator=torch.Generator().manual_seed(0))
    pipe = fxpipe.compile(model, 2, example_kwargs={"input_ids": ids, "labels": ids}).materialize()
    state = pipe.state_dict()
    for fqn, tensor in expected.state_dict().items():
        if fqn in state:
            assert torch.equal(state[fqn], tensor)
    assert set(dict(pipe.named_parameters())) <= set(dict(expected.named_parameters()))
    pipe.step(input_ids=ids, labels=ids)
