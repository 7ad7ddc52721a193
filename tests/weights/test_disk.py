"""Files, directories and manifests without a model; ``fxpipe inspect`` and ``fxpipe convert``."""

import json
import math
import pathlib
import queue
import shutil
import threading

import models
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fxpipe
import fxpipe.runtime.weights.reading as reading
import fxpipe.runtime.weights.saving as saving
from fxpipe.cli.main import main
from fxpipe.errors import WeightsError
from fxpipe.runtime.weights.consolidation import convert
from fxpipe.runtime.weights.disk.directory import list_path
from fxpipe.runtime.weights.disk.files import read_header, stored, write_file
from fxpipe.runtime.weights.disk.plain import decode, encode

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool, torch.uint8]
DTYPES += [torch.complex64, torch.float8_e4m3fn]


def test_what_is_written_safetensors_reads(tmp_path):
    tensors = {f"t{i}": torch.arange(6).reshape(2, 3).to(dtype) for i, dtype in enumerate(DTYPES)}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 3), "turned": torch.arange(6.0).reshape(2, 3).T}
    file = tmp_path / "all.safetensors"
    size = write_file(file, [stored(name, tensor) for name, tensor in tensors.items()], tensors.values())
    assert file.stat().st_size == size
    back = load_file(file)
    assert {entry.name for entry in read_header(file)} == set(tensors)
    for name, tensor in tensors.items():
        assert (back[name].shape, back[name].dtype) == (tensor.shape, tensor.dtype)
        bits = [each.reshape(-1).view(torch.uint8) for each in (back[name], tensor)]
        assert torch.equal(*bits), name


def test_a_tensor_that_no_file_can_hold_is_named():
    with pytest.raises(WeightsError, match="wave is of dtype complex128"):
        stored("wave", torch.zeros(1, dtype=torch.complex128))


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text() | st.integers(), inner)
        | st.dictionaries(st.sampled_from(["__tuple__", "__pairs__", "a"]), inner)
    ),
    max_leaves=8,
)


@given(values)
@settings(max_examples=200, deadline=None)
def test_values_come_back_from_json_as_they_were(value):
    back = decode(json.loads(json.dumps(encode(value, "value"))))
    assert back == value
    assert type(back) is type(value)


def test_infinities_survive_and_objects_are_refused_by_place():
    assert math.isinf(decode(json.loads(json.dumps(encode({"best": math.inf}, "scheduler"))))["best"])
    with pytest.raises(WeightsError, match=r"extra\['a'\]\[1\] is a builtins\.set"):
        encode({"a": [1, {2}]}, "extra", strict=True)
    with pytest.raises(WeightsError, match=r"extra is a builtins\.tuple"):
        encode((1, 2), "extra", strict=True)


def street(stages=2, device="cpu"):
    torch.manual_seed(0)
    with torch.device(device):
        model = models.Street()
    batch = models.street_batch()
    batch["gain"] = batch["gain"].float()
    return fxpipe.compile(model, stages, (), batch, loss_fn=models.token_loss, microbatches=12, schedule="GPipe")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "at-1"
    with street().materialize() as pipe:
        optimizer = torch.optim.AdamW(pipe.parameters())
        pipe.save(path, optimizer=optimizer, extra={"note": "first"})
    return path


def test_a_checkpoint_becomes_safetensors_and_a_checkpoint_again(checkpoint, tmp_path, monkeypatch):
    asked = []
    real = reading.read_box
    monkeypatch.setattr(reading, "read_box", lambda *args: asked.append(args[1].name) or real(*args))
    single, _ = convert(checkpoint.parent, tmp_path / "one.safetensors")
    wanted = models.Street()
    wanted.load_state_dict(street().materialize(init=checkpoint).state_dict())
    named = dict(wanted.named_parameters())
    assert set(load_file(single)) == set(named)
    directory, _ = convert(checkpoint, tmp_path / "sharded", shard_bytes=1500)
    files = sorted(file.name for file in directory.iterdir())
    assert len(files) > 2
    assert "model.safetensors.index.json" in files
    back, _ = convert(directory, tmp_path / "again", shard_bytes=2500)
    assert (back / "fxpipe.json").is_file()
    for path in (single, directory, back):
        with street(3).materialize(init=path) as pipe:
            for fqn, tensor in pipe.named_parameters():
                assert torch.equal(tensor, named[fqn]), fqn
    with pytest.raises(WeightsError, match="exists"):
        convert(checkpoint, single)


def test_the_command_line_lists_and_converts(checkpoint, tmp_path, capsys):
    assert main(["inspect", str(checkpoint.parent)]) == 0
    text = capsys.readouterr().out
    assert "at-1 · checkpoint · 51 tensors" in text or "checkpoint" in text
    assert "model Street · step 0 · seed 0 · optimizer AdamW (0 tensors)" in text
    assert "blocks.7.second.bias" in text
    assert main(["inspect", str(checkpoint), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["extra"] == {"note": "first"}
    assert data["tensors"]["embed.weight"]["shape"] == [models.WORDS, 8]
    assert main(["convert", str(checkpoint), str(tmp_path / "out.safetensors")]) == 0
    assert "one safetensors file" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "nowhere")]) == 2
    assert "there is no" in capsys.readouterr().err


def test_a_checkpoint_cut_anywhere_is_refused_by_name(checkpoint, tmp_path):
    for file in sorted(checkpoint.iterdir()):
        for length in {0, 1, file.stat().st_size // 2, file.stat().st_size - 2}:
            broken = tmp_path / "broken"
            shutil.copytree(checkpoint, broken)
            (broken / file.name).write_bytes(file.read_bytes()[:length])
            with pytest.raises(WeightsError, match=r"broken is no (whole )?checkpoint"):
                list_path(broken)
            shutil.rmtree(broken)


def test_a_manifest_leads_nowhere_else(checkpoint, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    text = (broken / "fxpipe.json").read_text()
    (broken / "fxpipe.json").write_text(text.replace("rank-00000", "../at-1/rank-00000"))
    with pytest.raises(WeightsError, match="which is not of it"):
        list_path(broken)


def test_prefixes_are_suggested_and_never_applied_silently(tmp_path):
    model = models.Street()
    inner, outer = tmp_path / "inner.safetensors", tmp_path / "outer.safetensors"
    named = {fqn: tensor.detach() for fqn, tensor in model.named_parameters()}
    save_file({fqn.removeprefix("blocks."): tensor for fqn, tensor in named.items()}, inner)
    save_file({f"module.{fqn}": tensor for fqn, tensor in named.items()}, outer)
    with street(device="meta").materialize(init="empty") as pipe:
        with pytest.raises(WeightsError, match=r'pass rename=lambda name: name.removeprefix\("module."\)'):
            pipe.load(outer)
        with pytest.raises(WeightsError, match=r'pass prefix="blocks\."'):
            pipe.load(inner)
        with pytest.raises(fxpipe.MaterializeError, match="never filled"):
            pipe.step(**{**models.street_batch(), "gain": torch.ones(models.BATCH)})
        pipe.load(outer, rename=lambda name: name.removeprefix("module."))
        assert torch.equal(dict(pipe.named_parameters())["embed.weight"], named["embed.weight"])


def test_a_tied_tensor_may_come_twice_if_it_is_equal(tmp_path):
    named = {fqn: tensor.detach().clone() for fqn, tensor in models.Street().state_dict().items()}
    assert {"embed.weight", "head.weight"} <= set(named)
    save_file(named, tmp_path / "both.safetensors")
    named["head.weight"][0, 0] += 1
    save_file(named, tmp_path / "differ.safetensors")
    with street().materialize() as pipe:
        pipe.load(tmp_path / "both.safetensors")
        before = {fqn: tensor.clone() for fqn, tensor in pipe.state_dict().items()}
        with pytest.raises(WeightsError, match=r"embed.weight and head.weight of .* differ"):
            pipe.load(tmp_path / "differ.safetensors")
        torch.testing.assert_close(pipe.state_dict(), before, rtol=0, atol=0)


def test_another_dtype_is_cast_only_when_asked(tmp_path):
    named = {fqn: tensor.detach().bfloat16() for fqn, tensor in models.Street().named_parameters()}
    save_file(named, tmp_path / "narrow.safetensors")
    with street().materialize() as pipe:
        with pytest.raises(WeightsError, match='pass dtype="cast"'):
            pipe.load(tmp_path / "narrow.safetensors")
        pipe.load(tmp_path / "narrow.safetensors", dtype="cast")
        assert torch.equal(dict(pipe.named_parameters())["embed.weight"], named["embed.weight"].float())


def test_strict_false_takes_what_fits(tmp_path):
    save_file({"embed.weight": torch.ones(models.WORDS, 8), "other": torch.ones(1)}, tmp_path / "part.safetensors")
    with street().materialize() as pipe:
        before = dict(pipe.named_parameters())["blocks.0.first.weight"].clone()
        pipe.load(tmp_path / "part.safetensors", strict=False)
        after = dict(pipe.named_parameters())
        assert after["embed.weight"].eq(1).all()
        assert torch.equal(after["blocks.0.first.weight"], before)


def test_an_optimiser_of_another_kind_or_other_parameters_is_refused(checkpoint):
    with street().materialize() as pipe:
        parameters = list(pipe.parameters())
        with pytest.raises(WeightsError, match="has the state of AdamW, not of SGD"):
            pipe.load(checkpoint, optimizer=torch.optim.SGD(parameters))
        foreign = torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))])
        with pytest.raises(WeightsError, match="not of this pipeline"):
            pipe.load(checkpoint, optimizer=foreign)
        scheduler = torch.optim.lr_scheduler.LinearLR(torch.optim.AdamW(parameters))
        with pytest.raises(WeightsError, match="no scheduler's state"):
            pipe.load(checkpoint, scheduler=scheduler)
        assert pipe.load(checkpoint, optimizer=torch.optim.AdamW(parameters)) == {"note": "first"}


def test_wide_optimiser_state_of_narrow_weights_keeps_its_bits(tmp_path):
    """torch's ``load_state_dict`` would round it to the weight's dtype."""
    pipe = street().materialize(dtype=torch.bfloat16)
    with pipe:
        optimizer = torch.optim.AdamW(pipe.parameters())
        for _, parameter in pipe.named_parameters():
            optimizer.state[parameter] = {
                "step": torch.tensor(3.0),
                "exp_avg": torch.randn_like(parameter, dtype=torch.float32),
                "exp_avg_sq": torch.rand_like(parameter, dtype=torch.float32),
            }
        pipe.save(tmp_path / "wide", optimizer=optimizer)
        fqns = {id(parameter): fqn for fqn, parameter in pipe.named_parameters()}
        saved = {fqns[id(parameter)]: dict(state) for parameter, state in optimizer.state.items()}
        again = torch.optim.AdamW(pipe.parameters())
        pipe.load(tmp_path / "wide", optimizer=again)
        found = {fqns[id(parameter)]: dict(state) for parameter, state in again.state.items()}
        torch.testing.assert_close(found, saved, rtol=0, atol=0)


def test_only_trainable_tensors_are_written_and_read(tmp_path):
    model = models.Street()
    for fqn, parameter in model.named_parameters():
        parameter.requires_grad_(fqn.startswith("blocks.3"))
    batch = models.street_batch()
    batch["gain"] = batch["gain"].float()
    pipe = fxpipe.compile(model, 2, (), batch, loss_fn=models.token_loss, microbatches=12, schedule="GPipe")
    with pipe.materialize():
        pipe.save(tmp_path / "part", only="trainable")
        held = load_file(tmp_path / "part" / "trainable.safetensors")
        assert held
        assert all(name.startswith("blocks.3") for name in held)
        with torch.no_grad():
            for parameter in pipe.parameters():
                parameter.add_(1)
        pipe.load(tmp_path / "part")
        named = dict(pipe.named_parameters())
        assert all(torch.equal(named[name], tensor) for name, tensor in held.items())
        with pytest.raises(WeightsError, match="writes tensors alone"):
            pipe.save(tmp_path / "no", only="trainable", extra=1)
        with pytest.raises(WeightsError, match="needs a model of transformers"):
            pipe.save_pretrained(tmp_path / "no")
        with pytest.raises(WeightsError, match="only='all' is not known"):
            pipe.save(tmp_path / "no", only="all")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["part"]


def test_no_file_of_a_checkpoint_is_a_pickle(checkpoint):
    for file in pathlib.Path(checkpoint).iterdir():
        if file.suffix == ".json":
            json.loads(file.read_text())
        else:
            with safe_open(file, framework="pt") as opened:
                assert opened.keys()


class Grown(torch.nn.Module):
    """Counts what it saw, keeps a buffer that grows, and saves more than tensors."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)
        self.register_buffer("seen", torch.zeros(2))
        self.scale = {"amax": torch.ones(3), "format": ("e4m3", 2)}

    def forward(self, x):
        return self.linear(x) + self.seen.sum()

    def get_extra_state(self):
        return self.scale

    def set_extra_state(self, state):
        self.scale = state


def test_what_modules_save_beside_tensors_is_kept_without_a_pickle(tmp_path):
    def pipeline(stages):
        model = torch.nn.Sequential(*(Grown() for _ in range(4)))
        batch = {"target": torch.zeros(4, 4)}
        loss = torch.nn.functional.mse_loss
        pipe = fxpipe.compile(
            model, stages, (torch.zeros(4, 4),), batch, loss_fn=loss, microbatches=4, schedule="GPipe"
        )
        return pipe.materialize()

    with pipeline(2) as pipe:
        held = dict(pipe.stage_modules[1].named_modules())["3"]
        held.scale = {"amax": torch.full((3,), 7.0), "format": ("e5m2", 5)}
        pipe.save(tmp_path / "one")
        held.scale = {1, 2}
        with pytest.raises(WeightsError, match=r"3\._extra_state is a builtins\.set"):
            pipe.save(tmp_path / "two")
    with pipeline(4) as pipe:
        pipe.load(tmp_path / "one")
        found = pipe.state_dict()["3._extra_state"]
        assert torch.equal(found["amax"], torch.full((3,), 7.0))
        assert found["format"] == ("e5m2", 5)
    manifest = tmp_path / "one" / "fxpipe.json"
    data = json.loads(manifest.read_text())
    del data["modules"]["0._extra_state"]
    manifest.write_text(json.dumps(data))
    with pipeline(4) as pipe, pytest.raises(WeightsError, match=r"1 missing: 0\._extra_state"):
        pipe.load(tmp_path / "one")


class Around(torch.nn.Sequential):
    """Saves something beside its tensors, and is cut: no stage holds it whole."""

    def __init__(self, *layers):
        super().__init__(*layers)
        self.seen = {"epoch": 1, "mean": torch.ones(2)}

    def get_extra_state(self):
        return self.seen

    def set_extra_state(self, state):
        self.seen = state


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_a_module_saves_that_no_stage_holds_whole_is_kept(device, tmp_path):
    def pipeline(stages):
        with torch.device(device):
            model = Around(*(torch.nn.Linear(4, 4) for _ in range(4)))
        model.seen["mean"] = torch.ones(2)
        batch = {"target": torch.zeros(4, 4)}
        options = {"loss_fn": torch.nn.functional.mse_loss, "microbatches": 4, "schedule": "GPipe"}
        return fxpipe.compile(model, stages, (torch.zeros(4, 4),), batch, **options).materialize(init="reset")

    with pipeline(2) as pipe:
        state = pipe.state_dict(full=True)
        pipe.load_state_dict({**state, "_extra_state": {"epoch": 5, "mean": torch.full((2,), 3.0)}})
        pipe.save(tmp_path / "one")
    with pipeline(3) as pipe:
        pipe.load(tmp_path / "one")
        found = pipe.state_dict(full=True)["_extra_state"]
        assert (found["epoch"], found["mean"].tolist()) == (5, [3.0, 3.0])
        assert torch.equal(pipe.state_dict()["0.weight"], state["0.weight"])


def test_a_buffer_that_grew_is_loaded_by_the_size_it_has(tmp_path):
    def pipeline():
        model = torch.nn.Sequential(*(Grown() for _ in range(2)))
        batch = {"target": torch.zeros(4, 4)}
        loss = torch.nn.functional.mse_loss
        pipe = fxpipe.compile(model, 2, (torch.zeros(4, 4),), batch, loss_fn=loss, microbatches=4, schedule="GPipe")
        pipe.materialize()
        dict(pipe.stage_modules[0].named_modules())["0"].seen = torch.arange(5.0)
        return pipe

    with pipeline() as pipe:
        pipe.save(tmp_path / "grown")
    with pipeline() as pipe:
        pipe.load(tmp_path / "grown")
        assert torch.equal(pipe.state_dict()["0.seen"], torch.arange(5.0))


@pytest.mark.parametrize("ask", ["result", "exception", "callback", "timeout", None])
def test_a_failed_save_in_the_background_is_raised_once(ask, tmp_path, monkeypatch):
    def failing(*_):
        assert ask != "timeout" or asked.wait(60)
        raise OSError("the disk is gone")

    asked = threading.Event()
    with street().materialize() as pipe:
        pipe.save(tmp_path / "whole")
        monkeypatch.setattr(saving, "write_manifest", failing)
        future = pipe.save(tmp_path / "failed", async_=True)
        assert not future.cancel()
        if ask == "result":
            with pytest.raises(OSError, match="the disk is gone"):
                future.result(60)
        elif ask == "exception":
            assert isinstance(future.exception(60), OSError)
        elif ask == "callback":
            heard = queue.Queue()
            future.add_done_callback(lambda done: heard.put(done.exception()))
            assert isinstance(heard.get(timeout=60), OSError)
        elif ask == "timeout":
            with pytest.raises(TimeoutError):
                future.result(0.01)
            asked.set()
        if ask in (None, "timeout"):
            with pytest.raises(OSError, match="the disk is gone"):
                pipe.load(tmp_path / "whole")
        monkeypatch.undo()
        pipe.load(tmp_path / "whole")
        assert pipe.save(tmp_path / "failed", async_=True).result(60) is None
        pipe.load(tmp_path / "failed")


@pytest.mark.parametrize("asks", [True, False])
def test_close_raises_what_nobody_asked_for(asks, tmp_path, monkeypatch):
    def failing(*_):
        raise OSError("the disk is gone")

    monkeypatch.setattr(saving, "write_manifest", failing)
    pipe = street().materialize()
    future = pipe.save(tmp_path / "failed", async_=True)
    if asks:
        assert isinstance(future.exception(60), OSError)
        pipe.close()
    else:
        with pytest.raises(OSError, match="the disk is gone"):
            pipe.close()


@pytest.mark.parametrize("path", ["", "/", "zero\0", 5, None, "n" * 300])
def test_a_path_that_cannot_be_made_is_refused(path, tmp_path):
    if isinstance(path, str) and len(path) == 300:
        path = tmp_path / path
    with street().materialize() as pipe:
        with pytest.raises(WeightsError, match=r"no path of something new|cannot write|exists"):
            pipe.save(path)
        with pytest.raises(WeightsError, match=r"no path|there is no|holds no weights|cannot be read"):
            pipe.load("/dev/null" if path == "/" else path)


def test_a_name_that_the_format_keeps_for_itself_is_refused(tmp_path):
    with street().materialize() as pipe:
        pipe.stage_modules[0].register_parameter("__metadata__", torch.nn.Parameter(torch.ones(2)))
        with pytest.raises(WeightsError, match="is named __metadata__"):
            pipe.save(tmp_path / "no")
    assert not list(tmp_path.iterdir())


NAMED = "embed.weight"
SPOILED = {
    "no parts": (lambda data: data["tensors"][NAMED].update(chunks=[]), r"has parts of 0 of its \d+ elements"),
    "another": (lambda data: part_of(data).update(name="blocks.0.first.bias"), r"is not in .* as fxpipe\.json has it"),
    "unknown": (lambda data: part_of(data).update(name="nothing"), r"is not in .* as fxpipe\.json has it"),
    "outside": (lambda data: part_of(data).update(offsets=[-1, 0]), "has a part outside of its shape"),
    "twice": (lambda data: data["tensors"][NAMED]["chunks"].append(part_of(data)), r"has parts of \d+ of its \d+"),
    "step": (lambda data: data.update(step="five"), "step and seed are"),
    "seed": (lambda data: data.update(seed=None), "step and seed are"),
    "modules": (lambda data: data.update(modules=None), "modules is no object"),
}


def part_of(data):
    return data["tensors"][NAMED]["chunks"][0]


def test_a_manifest_that_does_not_say_what_files_hold_is_refused_before_anything_is_changed(checkpoint, tmp_path):
    data = json.loads((checkpoint / "fxpipe.json").read_text())
    with street().materialize() as pipe:
        before = {fqn: tensor.clone() for fqn, tensor in pipe.state_dict().items()}
        for name, (spoil, match) in SPOILED.items():
            broken = tmp_path / name
            shutil.copytree(checkpoint, broken)
            changed = json.loads(json.dumps(data))
            spoil(changed)
            (broken / "fxpipe.json").write_text(json.dumps(changed))
            with pytest.raises(WeightsError, match=match):
                pipe.load(broken)
        torch.testing.assert_close(pipe.state_dict(), before, rtol=0, atol=0)
