"""No set decides an order anywhere between a model and its plan: other seeds of Python's hashes change nothing."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys

import launch

SCRIPT = """
import hashlib, torch, fxpipe
from torch import nn
import torch.nn.functional as F

class Street(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.blocks = nn.ModuleDict({name: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for name in "abc"})
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 16, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.ones(8))

    def forward(self, ids, mask=None):
        x = first = self.embed(ids)
        for block in self.blocks.values():
            x = block(x) + first * self.scale
        return {"logits": self.head(self.norm(x)), "hidden": x}

def loss(output, target):
    return F.cross_entropy(output["logits"].flatten(0, 1), target.flatten()) + 0.1 * output["hidden"].square().mean()

with torch.device("meta"):
    model = Street()
ids = torch.zeros(8, 4, dtype=torch.long)
for grain, schedule in (("block", "1F1B"), ("op", "ZBVZeroBubble")):
    pipe = fxpipe.compile(model, 4, (ids,), {"target": ids}, loss_fn=loss, grain=grain, schedule=schedule)
    text = pipe.report(baselines=True, weights=True) + pipe.plan.to_json() + str(pipe.explain())
    print(pipe.plan.fingerprint, hashlib.sha256(text.encode()).hexdigest())
"""


def in_another_process(seed: str) -> str:
    env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": launch.import_path(), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def in_this_process() -> str:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(SCRIPT, {"__name__": "__main__"})
    return said.getvalue()


def test_the_seed_of_hashes_changes_neither_plan_nor_report():
    own = os.environ.get("PYTHONHASHSEED")  # else another one in every process
    found = [in_this_process(), in_another_process("4711" if own == "0" else "0")]
    assert found[0].count("\n") == 2
    assert found[0] == found[1]
