"""Plans in other trainers' forms, each read back by the rules that its trainer documents."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import json
import math
import re
import sys
import tomllib
import types
from typing import Any

import pytest
import torch
from torch import nn

import fxpipe
from fxpipe.export.export import FORMATS, export

transformers = pytest.importorskip("transformers")
yaml = pytest.importorskip("yaml")

LAYERS = 6
FREE_LINKS = dataclasses.replace(fxpipe.Hardware.preset("cpu"), link_bandwidth=math.inf, link_latency=0.0)
SIZES = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 256, "use_cache": False,
}  # fmt: skip


def compiled(stages: int = 3, tied: bool = False, grain: str = "block", schedule: str = "1F1B") -> fxpipe.Pipeline:
    config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=tied)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
        ids = torch.zeros(8, 32, dtype=torch.long)
    batch = {"input_ids": ids, "labels": ids}
    return fxpipe.compile(model, stages, example_kwargs=batch, grain=grain, schedule=schedule, hardware=FREE_LINKS)


def gpt2(stages: int = 3) -> fxpipe.Pipeline:
    config = transformers.GPT2Config(
        n_layer=4, n_embd=64, n_head=4, vocab_size=100, bos_token_id=0, eos_token_id=0, tie_word_embeddings=False
    )
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(config)
        ids = torch.zeros(8, 32, dtype=torch.long)
    batch = {"input_ids": ids, "labels": ids, "use_cache": False}
    return fxpipe.compile(model, stages, example_kwargs=batch, grain="block", hardware=FREE_LINKS)


@pytest.fixture(scope="module")
def llama() -> fxpipe.Pipeline:
    return compiled()


def stage_of_blocks(pipe: fxpipe.Pipeline) -> dict[str, int]:
    """Where the plan has each repeated block: what every format must say too."""
    found = {}
    for stage in pipe.plan.stages:
        found.update({name: stage.index for name in stage.layers if re.search(r"\.(layers|h)\.\d+$", name)})
    return found


def expand(layout: str) -> list[list[str]]:
    """Read a Megatron layout as its documentation says: products of letters and of groups, stages between bars."""
    layout = layout.replace(",", "")
    while match := re.search(r"\(([^()]*)\)\*(\d+)", layout):
        layout = layout[: match.start()] + match[1] * int(match[2]) + layout[match.end() :]
    return [list(re.sub(r"([A-Za-z])\*(\d+)", lambda m: m[1] * int(m[2]), stage)) for stage in layout.split("|")]


@pytest.mark.parametrize("make", [compiled, gpt2], ids=["Llama", "GPT-2"])
@pytest.mark.parametrize("format", ["torchtitan", "nemo"])
def test_lists_of_modules_say_where_the_plan_has_each(make, format):
    pipe = make()
    text = export(pipe.plan, pipe.graph, format)
    if format == "torchtitan":
        rows = tomllib.loads(text)["parallelism"]["module_fqns_per_model_part"]
    else:
        rows = yaml.safe_load(text)["autopipeline"]["module_fqns_per_model_part"]
    assert len(rows) == pipe.plan.num_stages
    assert {name: index for index, row in enumerate(rows) for name in row if name in stage_of_blocks(pipe)} == (
        stage_of_blocks(pipe)
    )
    with_parameters = {spec.fqn for spec in pipe.graph.specs if spec.parameters}
    named = [name for row in rows for name in row if name in with_parameters]
    assert sorted(named) == sorted(with_parameters)


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_megatron_reads_its_layout(stages):
    pipe = compiled(stages)
    text = export(pipe.plan, pipe.graph, "megatron")
    layout = expand(re.search(r'layout "([^"]*)"', text)[1])
    counts = [list(stage_of_blocks(pipe).values()).count(index) for index in range(stages)]
    assert [row.count("t") for row in layout] == counts
    assert sum(counts) == LAYERS
    assert layout[0][0] == "E"
    assert layout[-1][-1] == "L"
    assert sum(row.count("E") + row.count("L") for row in layout) == 2


def test_a_device_map_places_every_parameter(llama):
    places = json.loads(export(llama.plan, llama.graph, "device_map"))
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    for fqn, _ in model.named_parameters():
        assert sum(fqn == name or fqn.startswith(f"{name}.") for name in places) == 1, fqn
    assert {name: places[name] for name in stage_of_blocks(llama)} == stage_of_blocks(llama)


def test_deepspeeds_file_lists_the_modules_and_cuts_where_the_plan_does():
    pipe = compiled(tied=True)
    text = export(pipe.plan, pipe.graph, "deepspeed", "train.py:build")
    tree = ast.parse(text)
    bounds = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "BOUNDS"
    )
    calls = [
        (node.func.id, [argument.value for argument in node.args if isinstance(argument, ast.Constant)])
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("LayerSpec", "TiedLayerSpec")
    ]
    order = [values[-1] for _, values in calls]
    assert bounds[0] == 0
    assert bounds[-1] == len(order)
    placed = {name: index for index in range(3) for name in order[bounds[index] : bounds[index + 1]]}
    assert {name: placed[name] for name in stage_of_blocks(pipe)} == stage_of_blocks(pipe)
    tied = [values for kind, values in calls if kind == "TiedLayerSpec"]
    assert [values[0] for values in tied] == ["model_embed_tokens_weight"] * 2  # DeepSpeed refuses dots in it
    assert {values[1] for values in tied} == {"model.embed_tokens", "lm_head"}
    assert "from train import build" in text


TIED = """
import torch
from torch import nn


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.inner = nn.Linear(8, 8)
        self.head = nn.Linear(8, 16)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(torch.tanh(self.inner(self.embed(ids)))).mean()


def build():
    return Tied(), (torch.zeros(4, 3, dtype=torch.long),)
"""


def test_deepspeeds_file_calls_the_head_where_one_stage_holds_both_ends_of_a_tie(tmp_path, monkeypatch):
    """DeepSpeed builds one module for one key on a stage, and calls each layer's ``forward_fn`` with it."""

    class Spec:
        def __init__(self, typename, *args, **options):
            self.build = lambda: typename(*args, **options)

    class TiedSpec(Spec):
        def __init__(self, key, typename, *args, forward_fn=None, tied_weight_attr="weight", **options):
            super().__init__(typename, *args, **options)
            self.key, self.forward_fn, self.attribute = key, forward_fn, tied_weight_attr

    pipe = types.ModuleType("deepspeed.pipe")
    pipe.LayerSpec, pipe.TiedLayerSpec, pipe.PipelineModule = Spec, TiedSpec, object
    monkeypatch.setitem(sys.modules, "deepspeed", types.ModuleType("deepspeed"))
    monkeypatch.setitem(sys.modules, "deepspeed.pipe", pipe)
    (tmp_path / "tied_model.py").write_text(TIED)
    monkeypatch.syspath_prepend(str(tmp_path))
    model, batch = importlib.import_module("tied_model").build()
    compiled = fxpipe.compile(model, 1, batch, grain="block", microbatches=1)
    names: dict[str, Any] = {}
    exec(export(compiled.plan, compiled.graph, "deepspeed", "tied_model:build"), names)
    built: dict[str, Any] = {}
    hidden = torch.tensor([[1, 2, 3]])
    shapes = []
    for layer in names["layers"]():
        if isinstance(layer, TiedSpec):
            part = built.setdefault(layer.key, None) or layer.build()
            built[layer.key] = part
            assert getattr(part, layer.attribute) is part.module[0].weight
            hidden = layer.forward_fn(part, hidden)
        else:
            hidden = layer.build()(hidden)
        shapes.append(tuple(hidden.shape))
    assert shapes == [(1, 3, 8), (1, 3, 8), (1, 3, 16)]
    [part] = built.values()
    assert part.module[1].weight is part.module[0].weight
    assert part.module[1].bias.shape == (16,)


def test_json_is_the_plan(llama):
    assert fxpipe.PipelinePlan.from_json(export(llama.plan, llama.graph, "json")) == llama.plan


@pytest.mark.parametrize("format", ["dot", "mermaid"])
def test_drawings_have_every_stage_boundary_and_tie(format):
    pipe = compiled(tied=True)
    text = export(pipe.plan, pipe.graph, format)
    arrow = "-->" if format == "mermaid" else "->"
    lines = [line for line in text.splitlines() if re.match(r"\s*stage\d+ -", line)]
    tied = [line for line in lines if "model.embed_tokens.weight" in line]
    pairs = [tuple(map(int, re.findall(r"stage(\d+)", line))) for line in lines if line not in tied]
    assert pairs == [(0, 1), (1, 2)]
    assert all(arrow in line for line in lines if line not in tied)
    assert [tuple(map(int, re.findall(r"stage(\d+)", line))) for line in tied] == [(0, 2)]
    assert len(re.findall(r"stage \d, rank \d", text)) == 3


@pytest.mark.parametrize(
    ("format", "message"),
    [
        ("torchtitan", "torchtitan cannot say that model.embed_tokens.weight = lm_head.weight is one parameter"),
        ("nemo", "untie it in the model's config"),
    ],
)
def test_a_tie_across_stages_is_refused_where_it_cannot_be_said(format, message):
    pipe = compiled(tied=True)
    assert len(pipe.plan.ties[0].stages) > 1
    with pytest.raises(fxpipe.PlanError, match=re.escape(message)):
        export(pipe.plan, pipe.graph, format)


@pytest.mark.parametrize("format", ["torchtitan", "nemo", "megatron", "deepspeed", "device_map"])
def test_a_cut_inside_a_block_is_refused_with_the_nearest_plan(format):
    pipe = compiled(stages=5, grain="op")
    assert pipe.plan.opened
    with pytest.raises(fxpipe.PlanError, match=r"cuts between modules.*\n.*grain='block'"):
        export(pipe.plan, pipe.graph, format, "train.py:build")


def test_placements_that_megatron_and_deepspeed_do_not_have_are_refused():
    pipe = compiled(stages=4, schedule="ZBVZeroBubble")
    with pytest.raises(fxpipe.PlanError, match="places stage i on rank i modulo the ranks"):
        export(pipe.plan, pipe.graph, "megatron")
    with pytest.raises(fxpipe.PlanError, match="one stage per rank"):
        export(pipe.plan, pipe.graph, "deepspeed", "train.py:build")


def test_an_unknown_format_lists_the_known_ones(llama):
    with pytest.raises(fxpipe.PlanError, match="known: torchtitan, nemo") as caught:
        export(llama.plan, llama.graph, "morse")
    assert all(name in str(caught.value) for name in FORMATS)


class Gated(nn.Module):
    """A parameter that the model itself reads beside its blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.gate = nn.Parameter(torch.ones(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + self.gate * layer(x)
        return x.square().mean()


@pytest.mark.parametrize("format", ["torchtitan", "nemo", "megatron", "deepspeed", "device_map"])
def test_a_parameter_in_no_module_is_refused_by_name(format):
    pipe = fxpipe.compile(Gated(), 1, (torch.zeros(8, 8),), grain="block")
    with pytest.raises(fxpipe.PlanError, match="gate lies in none"):
        export(pipe.plan, pipe.graph, format, "train.py:build")
