import dataclasses
import html.parser
import json
import re

import pytest

from fxpipe.errors import PlanError
from fxpipe.ir.hardware import Hardware, Training
from fxpipe.ir.plan import Baseline, PipelinePlan, StagePlan, TieGroup
from fxpipe.ir.tensor import TensorMeta
from fxpipe.planning.explain import explain
from fxpipe.planning.simulation.simulate import simulate
from fxpipe.report.table import render
from fxpipe.report.terminal import terminal

TIED = ("transformer.wte.weight", "lm_head.weight")
HIDDEN = TensorMeta((4, 1024, 1024), "bfloat16", requires_grad=True)


def stage(index, *layers, **changes):
    about = {
        "parameters": 137_200_000,
        "bytes": 274_400_000,
        "seconds": 0.025,
        "forward_s": 0.008,
        "backward_s": 0.016,
        "peak_bytes": int(9.8 * 2**30),
        "gradient_bytes": 548_800_000,
        "optimizer_bytes": 1_097_600_000,
        "sends": (HIDDEN,),
    }
    return StagePlan(index, changes.pop("rank", index), layers, **{**about, **changes})


@pytest.fixture
def plan():
    return PipelinePlan(
        model="GPT2LMHeadModel",
        model_fingerprint="0",
        stages=(
            stage(0, "transformer.wte", "transformer.wpe", "transformer.h.0"),
            stage(1, *(f"transformer.h.{i}" for i in range(1, 12)), seconds=0.050, forward_s=0.0166),
            stage(2, "transformer.ln_f", "lm_head", sends=()),
        ),
        ties=(TieGroup("transformer.wte.weight", TIED, (0, 2), 206 << 20, 2e-3),),
        num_ranks=3,
        num_microbatches=4,
        microbatch_size=4,
        hardware=Hardware.preset("h100"),
        training=Training(),
        bottleneck=0.050,
        lower_bound=0.040,
        limited_by="stage 1",
        method="all downsets",
        inputs=("input_ids int64[4, 1024]",),
        notes=("loss: mean over valid targets",),
    )


REPORT = """\
GPT2LMHeadModel · 3 stages · 1F1B · 4 microbatches of 4 · h100 · cost: roofline
inputs  input_ids int64[4, 1024]

                                     GiB = weights + gradients + optimizer + activations
stage   params  of time  fwd ms  bwd ms  GiB  weights  gradients  optimizer  activations  sends →
0      137.2 M   25.0 %    8.00    16.0  9.8     0.26       0.51        1.0          8.0  8.0 MiB
       transformer.wte … h.0 (3)
1      137.2 M   50.0 %    16.6    16.0  9.8     0.26       0.51        1.0          8.0  8.0 MiB
       transformer.h.1 … h.11 (11)
2      137.2 M   25.0 %    8.00    16.0  9.8     0.26       0.51        1.0          8.0
       transformer.ln_f, lm_head

tied  transformer.wte.weight = lm_head.weight  stages 0, 2  206.0 MiB  all-reduce 2.00 ms

bottleneck 50.0 ms   balance max/mean 1.500 (lower bound 1.200, gap 25.0 %)   limited by: stage 1
search: all downsets
note    loss: mean over valid targets"""


def test_the_report_of_a_plan_reads_like_this(plan):
    assert [line.rstrip() for line in render(plan).splitlines()] == REPORT.splitlines()


def test_step_and_bubble_are_those_of_the_simulation(plan):
    done = simulate(plan)
    text = render(plan, simulation=done)
    assert f"bubble ≈ {100 * sum(done.bubble) / 3:.1f} %" in text
    assert f"step ≈ {1e3 * done.step_s:.0f} ms" in text
    assert not any(word in render(plan) for word in ("bubble", "step ≈"))


def test_a_proven_plan_says_so_in_place_of_its_gap(plan):
    best = dataclasses.replace(plan, lower_bound=plan.bottleneck, proven=True)
    assert "(lower bound 1.500, best possible)" in render(best)


def test_where_ranks_have_several_stages_the_balance_is_theirs(plan):
    stages = tuple(dataclasses.replace(each, rank=(0, 1, 0)[each.index]) for each in plan.stages)
    text = render(dataclasses.replace(plan, stages=stages, num_ranks=2, bottleneck=0.0, lower_bound=0.0))
    assert "bottleneck 50.0 ms   balance max/mean 1.000" in text


BASELINES = (
    Baseline("DeepSpeed uniform", "partition_uniform", 0.055, 1.65, 3 << 30, stages=(("wte",), ("h.0",), ("lm_head",))),
    Baseline("Megatron", "get_num_layers_to_build", remark="needs a multiple of 3 blocks, not 13"),
)
COMPARED = """\
rule               slowest ms  to plan  max/mean   memory
this plan                50.0  1.000 ×     1.500  9.8 GiB
DeepSpeed uniform        55.0  1.100 ×     1.650  3.0 GiB
Megatron                    –                              needs a multiple of 3 blocks, not 13"""


def test_others_cuts_stand_below_the_plan(plan):
    lines = [line.rstrip() for line in render(plan, baselines=BASELINES).splitlines()]
    assert lines[-4:] == COMPARED.splitlines()
    assert max(map(len, lines)) <= 100
    assert "DeepSpeed uniform" in render(plan, "html", BASELINES)
    assert "| DeepSpeed uniform |" in render(plan, "markdown", BASELINES)
    data = json.loads(render(plan, "json", BASELINES))
    assert PipelinePlan.from_json(json.dumps(data["plan"])) == plan
    assert [row["name"] for row in data["baselines"]] == ["DeepSpeed uniform", "Megatron"]


def test_many_ranks_that_need_more_memory_than_there_is_are_one_warning(plan):
    small = Hardware({"float32": 1e12}, 1e12, 2**30, name="small")
    assert "ranks 0–2 need up to 9.8 GiB, and a small has 1.0 GiB" in render(dataclasses.replace(plan, hardware=small))


@pytest.mark.parametrize("width", [60, 72, 100, 130, 200])
@pytest.mark.parametrize("count", [1, 2, 16])
def test_no_line_is_wider_than_the_terminal(plan, count, width):
    layers = [f"model.language_model.decoder.a_very_long_name_of_a_module.layers.{i}.attention" for i in range(count)]
    long = TieGroup(layers[0], tuple(f"{layer}.weight" for layer in (*layers, *layers)), (0, 1), 1 << 40, 1.0)
    stages = tuple(stage(i, *layers, parameters=10**12) for i in range(3))
    wide = dataclasses.replace(
        plan,
        model="AModelForConditionalGenerationWithAnExtremelyLongName" * 2,
        stages=stages,
        ties=(long,),
        num_ranks=2,
        opened=tuple(layers),
        limited_by=f"layer {layers[0]} of stage 1, which is not split",
        notes=("a note of many words " * 20,),
    )
    done = simulate(plan)
    command = ("fxpipe", "plan", "examples/a_folder/train.py:build", "--stages", "3", "--hardware", "h100")
    text = render(wide, width=width, simulation=done, advice=explain(plan), command=command)
    assert max(map(len, text.splitlines())) <= width
    assert sum(line[:1].isdigit() for line in text.splitlines()) == 3
    assert f"attention ({count})" in text or count < 3
    assert f"try {' '.join(command)} --schedule Interleaved1F1B" in re.sub(r"( \\)?\s+", " ", text)


def test_memory_is_told_in_gib_and_split_in_columns(plan):
    header, row = render(plan, width=130).splitlines()[4:6]
    split = dict(zip(header.split()[-7:-2], row.split()[-7:-2], strict=True))
    assert split == {"GiB": "9.8", "weights": "0.26", "gradients": "0.51", "optimizer": "1.0", "activations": "8.0"}
    assert "transformer.wte … h.0 (3)" in row  # there is room


def test_a_layer_is_called_by_what_a_person_calls_it(plan):
    layers = ("model.arange", "model.embed", "model.layers.0.attn", "model.layers.0.add", "model.layers.1.attn")
    named = dataclasses.replace(plan.stages[0], layers=layers, parts=("model.embed", "model.layers.0"))
    assert "model.embed, layers.0\n" in render(dataclasses.replace(plan, stages=(named, *plan.stages[1:])))


def test_cut_names_keep_their_ends(plan):
    long = "model.language_model.decoder.a_long_name.layers.7.self_attention.q_proj"
    text = render(dataclasses.replace(plan, stages=(stage(0, long), *plan.stages[1:])), width=60)
    assert "…decoder.a_long_name.layers.7.self_attention.q_proj\n" in text


def test_what_would_help_is_a_command_to_type(plan):
    done = explain(plan)
    text = render(plan, advice=done, command=("fxpipe", "plan", "llama-8b", "--stages", "3", "--schedule", "1F1B"))
    best, after = [change for change in done.changes if change.options][:2]
    assert best.options == (("batch", 28), ("microbatches", 7))
    assert "try     fxpipe plan llama-8b --stages 3 --schedule 1F1B --batch 28 --microbatches 7" in text
    assert f"try     fxpipe plan llama-8b --stages 3 --schedule {dict(after.options)['schedule']}   " in text
    assert "try     compile(…, microbatches=7) with batches of 28   " in render(plan, advice=done)
    small = dataclasses.replace(plan, hardware=Hardware({"float32": 1e12}, 1e12, 2**30, name="small"))
    command = ("fxpipe", "plan", "x", "--stages", "3")
    assert "try     fxpipe plan x --stages 9 --memory-limit device --recompute auto" in render(small, command=command)
    small = dataclasses.replace(plan, hardware=Hardware({"float32": 1e12}, 1e12, 5 * 2**30, name="small"))
    assert "try     fxpipe plan x --stages 3 --memory-limit device --recompute auto" in render(small, command=command)


def test_colours_say_nothing_that_words_do_not(plan):
    small = dataclasses.replace(plan, hardware=Hardware({"float32": 1e12}, 1e12, 2**30, name="small"))
    for each in (plan, small):
        painted = render(each, color=True, advice=explain(plan))
        assert "\x1b[" in painted
        assert re.sub(r"\x1b\[\d+m", "", painted) == render(each, advice=explain(plan))


@pytest.mark.parametrize(
    ("environment", "tty", "expected"),
    [({}, False, (100, False)), ({"COLUMNS": "72"}, True, (72, True)), ({"COLUMNS": "300"}, True, (160, True)),
     ({"COLUMNS": "90", "NO_COLOR": "1"}, True, (90, False)), ({"COLUMNS": "90", "TERM": "dumb"}, True, (90, False))],
)  # fmt: skip
def test_width_and_colours_are_the_terminals(monkeypatch, environment, tty, expected):
    for name in ("NO_COLOR", "TERM", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.stdout.isatty", lambda: tty, raising=False)
    assert tuple(terminal().values()) == expected


def test_ranks_stand_in_the_table_only_where_they_differ_from_stages(plan):
    assert "rank" not in render(plan)
    two = tuple(dataclasses.replace(each, rank=each.index % 2) for each in plan.stages)
    text = render(dataclasses.replace(plan, stages=two, num_ranks=2))
    assert "3 stages · 2 ranks" in text
    assert "stage  rank " in text


def test_the_last_stage_sends_nothing_and_several_tensors_are_counted(plan):
    several = (dataclasses.replace(plan.stages[0], sends=(HIDDEN, HIDDEN)), *plan.stages[1:])
    lines = render(dataclasses.replace(plan, stages=several)).splitlines()
    rows = {line[0]: line for line in lines if line[:1].isdigit()}
    assert rows["0"].endswith("16.0 MiB in 2")
    assert rows["2"].endswith(" 8.0")


def test_a_rank_that_needs_more_memory_than_there_is_is_a_warning(plan):
    small = Hardware({"float32": 1e12}, 1e12, 15 * 2**30, name="small")
    text = render(dataclasses.replace(plan, hardware=small))
    assert "needs" not in text
    halves = tuple(dataclasses.replace(each, rank=0) for each in plan.stages)
    text = render(dataclasses.replace(plan, stages=halves, hardware=small))
    assert "rank 0 needs 29.4 GiB, and a small has 15.0 GiB" in text


def test_a_stage_without_parameters_is_named(plan):
    bare = (*plan.stages[:2], dataclasses.replace(plan.stages[2], parameters=0))
    assert "stage 2 has no parameters" in render(dataclasses.replace(plan, stages=bare))


def test_a_tie_within_one_stage_costs_nothing_and_a_frozen_one_is_not_reduced(plan):
    ties = (TieGroup("a", ("a", "b"), (1,), 4), TieGroup("c", ("c",), (0, 1), 4, trainable=False))
    text = render(dataclasses.replace(plan, ties=ties))
    assert "tied  a = b                         stage 1      4 B  one copy" in text
    assert "tied  c (called at several places)  stages 0, 1  4 B  frozen" in text


def test_json_is_the_plan_itself(plan):
    assert PipelinePlan.from_json(render(plan, "json")) == plan


def test_markdown_has_the_same_numbers_in_tables(plan):
    text = render(plan, "markdown")
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert cells[3][:4] == ["1", "transformer.h.1 … h.11 (11)", "137.2 M", "50.0 %"]
    assert cells[-1] == ["tied", " = ".join(TIED), "stages 0, 2", "206.0 MiB", "all-reduce 2.00 ms"]


def test_the_page_is_whole_safe_and_shows_every_stage_and_layer(plan):
    odd = dataclasses.replace(plan, model="<b>&", notes=("a < b",))
    text = render(odd, "html")
    assert "<b>" not in text
    assert "a &lt; b" in text
    assert "http" not in text
    page = Page()
    page.feed(text)
    assert page.open == []
    assert page.titles == ["\n".join(stage.layers) for stage in plan.stages]
    assert {"137.2 M", "50.0 %", "206.0 MiB", "limited by: stage 1"} <= set(page.texts)


class Page(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.titles, self.texts = [], [], []

    def handle_starttag(self, tag, attrs):
        if tag != "meta":
            self.open.append(tag)
        self.titles += [value for name, value in attrs if name == "title"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data.strip())


def test_an_unknown_format_is_refused_with_the_known_ones(plan):
    with pytest.raises(
        PlanError, match=r"unknown report format 'pdf'\n  known: text, markdown, html, json, and md for markdown"
    ):
        render(plan, "pdf")
