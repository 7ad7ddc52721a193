"""The examples run as their first lines say: in one process, and one stage per process with the same losses."""

import ast
import pathlib
import re
import runpy
import sys

import launch
import pytest

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"
LOSS = re.compile(r"step +(\d+)  loss (\d+\.\d+)")


def run(monkeypatch, capsys, name, *arguments):
    """Run an example in this process; gives what it printed."""
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out


@pytest.mark.parametrize(("name", "ranks", "steps"), [("layer_specs.py", 2, "20"), ("unet_skips.py", 3, "10")])
def test_one_process_and_several_train_alike(monkeypatch, capsys, name, ranks, steps):
    alone = run(monkeypatch, capsys, name, "--steps", steps)
    done = launch.launch(f"../examples/{name}", ranks, "--steps", steps)
    launch.check(done)
    one, several = LOSS.findall(alone), LOSS.findall("".join(rank.stdout for rank in done))
    assert len(one) == 2
    assert [step for step, _ in several] == [step for step, _ in one]
    assert [float(loss) for _, loss in several] == pytest.approx([float(loss) for _, loss in one], abs=2e-4)
    assert float(one[1][1]) < float(one[0][1])


def test_a_large_model_is_planned_without_memory(monkeypatch, capsys, tmp_path):
    pytest.importorskip("transformers")
    page = tmp_path / "plan.html"
    printed = run(monkeypatch, capsys, "plan_405b.py", "--layers", "8", "--stages", "4", "--html", str(page))
    assert printed.startswith("30 billion parameters, none in memory\nLlamaForCausalLM · 4 stages")
    assert "Does it fit?" in page.read_text()


@pytest.mark.slow
def test_405_billion_parameters_are_planned(monkeypatch, capsys):
    pytest.importorskip("transformers")
    printed = run(monkeypatch, capsys, "plan_405b.py")
    assert printed.startswith("406 billion parameters, none in memory\nLlamaForCausalLM · 16 stages")


def test_a_llama_goes_from_a_directory_to_a_resumed_run(monkeypatch, capsys, tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {
        "vocab_size": 256, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "max_position_embeddings": 64, "use_cache": False,
    }  # fmt: skip
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).save_pretrained(tmp_path / "weights")
    capsys.readouterr()
    given = ["--weights", str(tmp_path / "weights")]
    whole = run(monkeypatch, capsys, "finetune_llama.py", *given, "--steps", "4")
    first = run(monkeypatch, capsys, "finetune_llama.py", *given, "--steps", "2", "--save", str(tmp_path / "runs"))
    rest = run(
        monkeypatch, capsys, "finetune_llama.py", *given, "--steps", "2", "--save", str(tmp_path / "runs"), "--resume"
    )
    assert LOSS.findall(first) + LOSS.findall(rest) == LOSS.findall(whole)
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["step-2", "step-4"]


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_says_how_it_is_run_in_one_line(path):
    said = ast.get_docstring(ast.parse(path.read_text()))
    assert re.search(rf"^ +(python|torchrun .*) examples/{path.name}", said, re.MULTILINE)
