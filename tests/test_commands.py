"""What --help shows works: every example parses, and those about small files run as typed."""

import json
import pathlib
import re
import shlex

import pages
import pytest

import fxpipe
from fxpipe.cli.main import COMMANDS, main, make_parser
from fxpipe.ir.files.schema import field_descriptions, plan_schema

ROOT = pathlib.Path(__file__).parents[1]
TRAIN = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
    def forward(self, x):
        return x + torch.tanh(self.linear(x))

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(8))
    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x.square().mean()

def build():
    return Net(), (torch.ones(16, 8),), {}
"""


def examples():
    """Every command in the epilogs of the parsers."""
    parser = make_parser()
    (commands,) = (action for action in parser._actions if action.choices)
    found = [line.strip() for line in parser.epilog.splitlines()[1:]]
    for name, command in commands.choices.items():
        lines = [line.strip() for line in command.epilog.splitlines()[1:]]
        assert lines, f"fxpipe {name} --help has no example"
        found += lines
    return found


def documented():
    """Every command in the blocks of the pages."""
    text = "\n".join(page.read_text() for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))))
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")
    return re.findall(r"^\s*((?:fxpipe|.*python -m fxpipe|.*-m fxpipe) .*?)\s*(?:#.*)?$", blocks, re.MULTILINE)


def words(line):
    """The words after ``fxpipe``."""
    line = re.sub(r"^eval \"\$\((.*)\)\"$", r"\1", line).partition(" > ")[0]
    return shlex.split(line.partition("fxpipe ")[2])


@pytest.mark.parametrize("line", dict.fromkeys([*examples(), *documented()]))
def test_an_example_parses(line):
    make_parser().parse_args(words(line))


def test_every_command_is_there():
    assert len(COMMANDS) == 9


SKIPPED = ("torchrun", "config")
RUN = [line for line in examples() if re.search(r"train\.py| plan\.json|before\.json|--schema|completion bash", line)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder that holds what the examples name."""
    found = tmp_path_factory.mktemp("examples")
    (found / "train.py").write_text(TRAIN)
    for name in ("plan", "before", "after"):
        command = ["plan", f"{found / 'train.py'}:build", "--stages", "4", "--json", str(found / f"{name}.json")]
        assert main(command) == 0
    return found


@pytest.mark.parametrize(
    "line", [line for line in dict.fromkeys(RUN) if "torchrun" not in line and "config" not in line]
)
def test_an_example_runs_as_typed(line, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    asked = words(line)
    assert main(asked) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert printed.out or "-o" in asked


def test_options_of_configs_are_refused_where_a_function_brings_its_batch(folder, capsys):
    assert main(["plan", f"{folder / 'train.py'}:build", "--stages", "4", "--batch", "64"]) == 2
    assert "--batch is for a config or a shape" in capsys.readouterr().err


# --- the schema of a plan ---


def faults(schema, value, root, path="plan"):
    """Say where a value does not fit a schema: the part of JSON Schema that ``plan_schema`` uses."""
    if "$ref" in schema:
        yield from faults(root["$defs"][schema["$ref"].rpartition("/")[2]], value, root, path)
    elif "anyOf" in schema:
        if all(list(faults(each, value, root, path)) for each in schema["anyOf"]):
            yield f"{path} fits nothing of {schema['anyOf']}"
    elif "const" in schema:
        if value != schema["const"]:
            yield f"{path} is not {schema['const']}"
    else:
        kinds = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float)}
        kinds |= {"boolean": bool, "null": type(None)}
        if not isinstance(value, kinds[schema["type"]]) or (isinstance(value, bool) and schema["type"] != "boolean"):
            yield f"{path} is no {schema['type']}"
        elif schema["type"] == "array":
            for place, item in enumerate(value):
                yield from faults(schema["items"], item, root, f"{path}[{place}]")
        elif schema["type"] == "object":
            yield from (f"{path}.{name} is missing" for name in schema.get("required", ()) if name not in value)
            for name, item in value.items():
                inner = schema.get("properties", {}).get(name, schema["additionalProperties"])
                if inner is False:
                    yield f"{path}.{name} is not known"
                else:
                    yield from faults(inner, item, root, f"{path}.{name}")


def test_the_json_of_a_plan_fits_its_schema(folder, capsys):
    data = json.loads((folder / "plan.json").read_text())
    assert main(["show", "--schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert list(faults(schema, data, schema)) == []
    data["stages"][0]["layers"] = "all"
    data["num_ranks"] = None
    del data["model"]
    data["more"] = 1
    assert list(faults(schema, data, schema)) == [
        "plan.model is missing", "plan.num_ranks is no integer", "plan.stages[0].layers is no array",
        "plan.more is not known",
    ]  # fmt: skip


def test_every_field_is_described_in_the_schema_and_on_its_page():
    schema = plan_schema()
    page = (ROOT / "docs" / "plan-json.md").read_text()
    for name, part in {"PipelinePlan": schema, **schema["$defs"]}.items():
        for field, value in part["properties"].items():
            assert value.get("description"), f"{name}.{field} has no description"
            assert f"| `{field}` |" in page
    assert field_descriptions(int) == {}


def test_pages_made_of_the_codes_words_are_current():
    made = pages.plan_json()
    assert (ROOT / "docs" / "plan-json.md").read_text() == made, "python -m tests.pages writes it anew"
    reference = pages.reference()  # made for the site only
    assert all(f"## {name}\n" in reference or f"| `{name}` |" in reference for name in fxpipe.__all__)
    assert "### Pipeline.materialize" in reference
