"""The pages say what is true: their examples run and their links lead somewhere."""

import doctest
import pathlib
import re
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[1]
MADE = {"reference.md"}  # of docstrings, whose examples run where they stand
PAGES = [
    page
    for page in (ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md")))
    if page.name not in MADE
]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_the_examples_of_a_page_run(page):
    failed, _ = doctest.testfile(str(page), module_relative=False, optionflags=doctest.IGNORE_EXCEPTION_DETAIL)
    assert failed == 0


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_the_links_of_a_page_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def blocks(page, language="python"):
    """The blocks of a page in one language, without sessions, which ``doctest`` runs."""
    found = re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)
    return [block for block in found if ">>>" not in block]


# What a page takes for granted: its reader's own model, data and files.
NETWORK = """
import torch
from torch import nn
from torch.nn import functional as F
import fxpipe
from fxpipe import LayerSpec, TiedLayerSpec

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 64)
    def forward(self, x):
        return x + torch.tanh(self.linear(x))

class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.token = nn.Embedding(1000, 64)
        self.blocks = nn.ModuleList(Block() for _ in range(6))
        self.head = nn.Linear(64, 1000)
    def forward(self, ids):
        x = self.token(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)

def loss_fn(output, target):
    return F.cross_entropy(output.flatten(0, 1), target.flatten())

def init_weights(module):
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)

ids = inputs = targets = batch = torch.randint(1000, (16, 8))
batches = [(ids, ids)] * 2
embed = TiedLayerSpec("embed", nn.Embedding, 1000, 64)
head = TiedLayerSpec("embed", nn.Linear, 64, 1000, bias=False, tied_weight_attr="weight")
"""
LLAMA = """
import torch, transformers, fxpipe
config = transformers.LlamaConfig(
    vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, use_cache=False
)
transformers.LlamaForCausalLM(config).save_pretrained("path/to/directory")
build = lambda: transformers.LlamaForCausalLM(config)
ids = torch.randint(128, (16, 8))
batch = {"input_ids": ids, "labels": ids}
"""
PLAN = """
import pathlib, fxpipe
pathlib.Path("plan.json").write_text(fxpipe.PipelinePlan("Net", "", (fxpipe.StagePlan(0, 0, ("all",)),)).to_json())
"""
GIVEN = {"README.md": NETWORK, "guide.md": NETWORK + PLAN, "specs.md": NETWORK, "weights.md": LLAMA}
# Of several processes or nodes; what these pages say is tried in tests/end_to_end.
PARSED = {"nodes.md", "running.md"}
RUN = [page for page in PAGES if blocks(page) and page.name not in PARSED]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks transformers for it
@pytest.mark.parametrize("page", RUN, ids=[str(page.relative_to(ROOT)) for page in RUN])
def test_the_blocks_of_a_page_run_one_after_the_other(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    held = {"__name__": "page"}
    exec(GIVEN.get(page.name, ""), held)
    for block in blocks(page):
        lines = page.read_text()[: page.read_text().index(block)].count("\n")
        exec(compile("\n" * lines + block, str(page), "exec"), held)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_the_python_and_the_shell_of_a_page_parse(page):
    for block in blocks(page):
        compile(block, page.name, "exec")
    for block in (*blocks(page, "sh"), *blocks(page, "bash")):
        done = subprocess.run(["bash", "-n"], input=block, text=True, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr


def test_every_page_is_in_the_site():
    listed = set(re.findall(r"(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert listed == {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")} | MADE


def test_the_messages_of_the_troubleshooting_page_are_the_packages_own():
    source = "\n".join(path.read_text() for path in sorted((ROOT / "fxpipe").rglob("*.py")))
    said = re.sub(r'["\'] *\n\s*f?["\']', "", source)  # what is written in pieces
    rows = re.findall(r"^\| `(.+?)`.* \|", (ROOT / "docs/guides/troubleshooting.md").read_text(), re.MULTILINE)
    assert len(rows) > 12
    for message in rows:
        for part in filter(None, map(str.strip, message.split("…"))):
            assert part in said, f"no message says {part!r}"
