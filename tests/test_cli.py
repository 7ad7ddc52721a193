"""The command line, as a person types it."""

import json
import pathlib
import subprocess
import sys

import pytest

import fxpipe
from fxpipe.cli import main

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
        ([BUILD.replace(":build", ""), "--stages", "4"], "names no function"),
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
    from fxpipe.cli import _bytes

    assert _bytes(text) == size


def test_a_size_in_another_unit_is_refused(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["plan", BUILD, "--stages", "2", "--memory-limit", "70 apples"])
    assert caught.value.code == 2
    assert "is no size" in capsys.readouterr().err


def test_baselines_are_shown_on_request(capsys):
    assert main(["plan", BUILD, "--stages", "2", "--baselines"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("DeepSpeed", "torchtitan", "Megatron", "torchgpipe"))
