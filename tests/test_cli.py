"""The command line, as a person types it."""

import csv
import json
import pathlib
import re
import subprocess
import sys

import pytest

import fxpipe
from fxpipe.cli.main import main

ROOT = pathlib.Path(__file__).parents[1]
BUILD = f"{ROOT / 'examples' / 'train_gpt.py'}:build"


def test_plan_prints_the_report_and_needs_no_process_group(capsys):
    assert main(["plan", BUILD, "--stages", "4", "--hardware", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("GPT · 4 stages · 1F1B")
    assert "tied  token.weight = head.weight" in printed
    assert max(map(len, printed.splitlines())) <= 100


def test_the_module_runs_from_a_bare_checkout():
    done = subprocess.run(
        [sys.executable, "-m", "fxpipe", "plan", "examples/train_gpt.py:build", "--stages", "2"],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("GPT · 2 stages")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no_such_file.py:build", "--stages", "4"], "there is no file no_such_file.py"),
        ([BUILD.replace(":build", ":nothing"), "--stages", "4"], "has no function nothing"),
        ([BUILD.replace(":build", ""), "--stages", "4"], "no function of it is named"),
        ([BUILD, "--stages", "32", "--schedule", "GPipe", "--grain", "block"], "cannot cut GPT into 32 stages"),
        ([BUILD, "--stages", "0"], "stages is 0"),
        ([BUILD, "--stages", "4", "--schedule", "2F2B"], "unknown schedule '2F2B'"),
        ([BUILD, "--stages", "4", "--hardware", "abacus"], "unknown hardware 'abacus'"),
        ([BUILD, "--stages", "4", "--grain", "fine"], "unknown grain 'fine'"),
        ([BUILD, "--stages", "4", "--microbatches", "5"], "not divisible into 5 microbatches"),
        ([BUILD, "--stages", "4", "--memory-limit", "1kB"], "the least limit that works"),
        ([BUILD, "--stages", "4", "--cost", "nowhere.json"], "cannot read costs from nowhere.json"),
        ([BUILD, "--stages", "4", "--html", "/no/such/folder/page.html"], "cannot write"),
    ],
)
def test_what_is_not_possible_is_one_line_and_exit_code_2(capsys, arguments, message):
    assert main(["plan", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("fxpipe: ")
    assert error.count("\n") == 1


def test_json_goes_to_a_file_or_to_standard_output(capsys, tmp_path):
    path = tmp_path / "plan.json"
    assert main(["plan", BUILD, "--stages", "3", "--json", str(path)]) == 0
    capsys.readouterr()
    assert main(["plan", BUILD, "--stages", "3", "--json"]) == 0
    printed = capsys.readouterr().out
    assert json.loads(printed) == json.loads(path.read_text())
    assert fxpipe.PipelinePlan.from_json(printed).num_stages == 3
    assert list(tmp_path.iterdir()) == [path]


def test_pages_are_written_whole(capsys, tmp_path):
    page, text = tmp_path / "report.html", tmp_path / "report.md"
    assert main(["plan", BUILD, "--stages", "3", "--html", str(page), "--markdown", str(text)]) == 0
    assert page.read_text().rstrip().endswith("</html>")
    assert text.read_text().startswith("**GPT · 3 stages")


def test_costs_may_come_from_a_file(capsys, tmp_path):
    path = tmp_path / "costs.json"
    seconds = dict.fromkeys(("token", "position", "dropout", "blocks", "norm", "head", "add"), 1.0)
    path.write_text(json.dumps({name: value for name, value in seconds.items() if name != "blocks"}))
    assert main(["plan", BUILD, "--stages", "2", "--cost", str(path)]) == 2
    assert "blocks" in capsys.readouterr().err
    path.write_text(json.dumps(seconds))
    assert main(["plan", BUILD, "--stages", "2", "--cost", str(path)]) == 0
    assert "cost: given" in capsys.readouterr().out


@pytest.mark.parametrize(("text", "size"), [("70GB", 70 * 10**9), ("64 GiB", 64 * 2**30), ("1e9", 10**9), ("5", 5)])
def test_sizes_are_read_with_their_units(text, size):
    from fxpipe.cli.options import size as read_size

    assert read_size(text) == size


def test_a_size_in_another_unit_is_refused(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["plan", BUILD, "--stages", "2", "--memory-limit", "70 apples"])
    assert caught.value.code == 2
    assert "is no size" in capsys.readouterr().err


def test_baselines_are_shown_on_request(capsys):
    assert main(["plan", BUILD, "--stages", "2", "--baselines"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("DeepSpeed", "torchtitan", "Megatron", "torchgpipe"))


def test_a_saved_plan_is_shown_without_torch(capsys, tmp_path):
    path = tmp_path / "plan.json"
    assert main(["plan", BUILD, "--stages", "3", "--json", str(path)]) == 0
    report = capsys.readouterr().out
    code = "import sys; sys.modules['torch'] = None; from fxpipe.cli.main import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", code, "show", str(path)],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    # All but what to type: a plan does not know where its model is.
    shown, planned = (re.sub(r"try .*\n( {8}.*\n)*", "", text) for text in (done.stdout, report))
    assert shown == planned
    assert "try     fxpipe plan MODEL --stages 3" in done.stdout


def test_saved_plans_and_schedules_stand_side_by_side(capsys, tmp_path):
    paths = []
    for stages in ("2", "4"):
        paths.append(str(tmp_path / f"{stages}.json"))
        assert main(["plan", BUILD, "--stages", stages, "--json", paths[-1]]) == 0
    capsys.readouterr()
    assert main(["compare", *paths, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert sorted(row["plan"] for row in rows) == sorted(paths)
    assert rows[0]["step_s"] <= rows[1]["step_s"]
    assert main(["compare", BUILD, "--stages", "4", "--schedule", "1F1B,GPipe"]) == 0
    printed = capsys.readouterr().out
    assert "1F1B" in printed
    assert "GPipe" in printed


def test_plans_of_different_models_do_not_compare(capsys, tmp_path):
    other = tmp_path / "other.py"
    other.write_text(
        "import torch\nfrom torch import nn\n"
        "def build():\n    return nn.Sequential(*(nn.Linear(8, 8) for _ in range(4))), (torch.zeros(8, 8),)\n"
    )
    paths = [str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    assert main(["plan", BUILD, "--stages", "2", "--json", paths[0]]) == 0
    assert main(["plan", f"{other}:build", "--stages", "2", "--json", paths[1]]) == 0
    assert main(["compare", *paths]) == 1


def test_a_model_may_be_a_function_of_a_package_a_config_or_a_shape(capsys, tmp_path):
    pytest.importorskip("transformers")
    sizes = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4}
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128, **sizes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    command = ["plan", "--stages", "2", "--batch", "8", "--sequence", "16", "--dtype", "float32"]
    assert main([*command, str(tmp_path)]) == 0
    assert "input_ids int64[1, 16]" in capsys.readouterr().out
    assert main([*command, "gpt2"]) == 0
    assert capsys.readouterr().out.startswith("GPT2LMHeadModel · 2 stages")
    assert main(["plan", "--stages", "2", "examples.train_gpt:build"]) == 0
    assert capsys.readouterr().out.startswith("GPT · 2 stages")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("llama-9000b", "names no function, no config and no built-in shape"),
        ("no/such/config.json", "there is no file no/such/config.json"),
        ("no_such_package.train:build", "there is no module no_such_package"),
    ],
)
def test_a_model_that_is_not_there_is_one_line(capsys, model, message):
    assert main(["plan", model, "--stages", "2"]) == 2
    assert message in capsys.readouterr().err


def test_verify_holds_the_pipeline_against_the_model(capsys, tmp_path):
    source = tmp_path / "small.py"
    source.write_text(
        "import torch\nfrom torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n"
        "        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))\n"
        "    def forward(self, x):\n"
        "        for layer in self.layers:\n            x = torch.tanh(layer(x))\n"
        "        return x.square().mean()\n"
        "def build():\n    return Net(), (torch.ones(8, 8),), {}\n"
    )
    assert main(["verify", f"{source}:build", "--stages", "2"]) == 0
    assert "tensors equal" in capsys.readouterr().out


def test_a_plan_is_exported_to_standard_output_or_a_file(capsys, tmp_path):
    target = tmp_path / "stages.dot"
    assert main(["export", BUILD, "--stages", "2", "--format", "dot"]) == 0
    printed = capsys.readouterr().out
    assert main(["export", BUILD, "--stages", "2", "--format", "dot", "-o", str(target)]) == 0
    assert target.read_text() == printed
    assert main(["export", BUILD, "--stages", "4", "--format", "torchtitan"]) == 2
    assert "token.weight = head.weight is one parameter" in capsys.readouterr().err


def test_shells_complete_the_commands(capsys):
    pytest.importorskip("shtab")
    assert main(["completion", "bash"]) == 0
    assert "--memory-limit" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["plan", "show", "compare", "verify", "export", "completion"])
def test_help_ends_with_examples(capsys, command):
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    assert f"  fxpipe {command}" in capsys.readouterr().out


SMALL = ["gpt2", "--sequence", "64"]


def test_a_budget_of_devices_gives_the_fastest_configuration_and_the_five_after_it(capsys):
    command = [*SMALL, "--devices", "8", "--nodes-of", "4", "--global-batch", "32", "--schedule", "1F1B"]
    assert main(["plan", *command]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["pp", "×", "dp", "stages", "schedule", "microb.", "recompute", "step", "tokens/s", "MFU", "memory"]  # fmt: skip  # noqa: E501
    steps = [float(line.split(" ms ")[0].split()[-1]) for line in lines[1:7]]
    assert steps == sorted(steps)
    for line in lines[1:7]:
        pipeline, _, data = line.split()[:3]
        assert int(pipeline) * int(data) == 8
    assert "would change which comes first" in lines[7] or ":" in lines[7]


def test_a_sweep_is_a_table_csv_and_json_of_the_same_rows(capsys, tmp_path):
    command = ["sweep", *SMALL, "--devices", "4", "--global-batch", "16", "--schedule", "GPipe"]
    assert main([*command, "--csv", str(tmp_path / "a.csv"), "--json", str(tmp_path / "a.json")]) == 0
    printed = capsys.readouterr().out.splitlines()
    rows = json.loads((tmp_path / "a.json").read_text())
    with (tmp_path / "a.csv").open() as file:
        read = list(csv.DictReader(file))
    assert len(rows) == len(read) >= len(printed) - 1
    assert [row["step_s"] for row in rows] == sorted(row["step_s"] for row in rows)
    assert [float(row["step_s"]) for row in read] == [row["step_s"] for row in rows]
    assert {row["recompute"] > 0 for row in rows} == {True, False}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--devices", "8", "--stages", "4"], "--devices and --stages are both given"),
        ([], "neither --stages nor --devices is given"),
        (["--devices", "0"], "--devices is 0"),
        (["--devices", "8", "--global-batch", "7", "--schedule", "1F1B"], "no configuration divides 8 devices"),
        (["--devices", "2", "--global-batch", "2", "--memory-limit", "1MB"], "keeps 976.6 KiB per device: the nearest"),
        (["--devices", "2", "--hardware", "abacus"], "unknown hardware 'abacus'"),
    ],
)  # fmt: skip
def test_a_budget_that_cannot_be_spent_is_one_line(capsys, arguments, message):
    assert main(["plan", *SMALL, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
