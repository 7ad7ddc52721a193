"""Measure how true measured times are: layers one by one against the whole model, and what measuring itself takes.

    python -m tests.benchmarks profiling [gpt2 llama t5 bert resnet unet] [--threads 1]

For each model: seconds of all layers by ``cost="profile"`` added up, seconds of a forward and backward of the whole
model (median of runs before and after), and their ratio. Last, how long GPT-2 medium's 24 equal blocks take to measure,
against one block of the same kind.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

import fxpipe

RUNS = 5
Made = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


def gpt2(layers: int = 4, width: int = 512, length: int = 256) -> Made:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_layer": layers, "n_embd": width, "n_head": width // 64, "n_positions": length, "vocab_size": 8192}
    return GPT2LMHeadModel(GPT2Config(**sizes, use_cache=False)), (), labelled(length)


def llama() -> Made:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 4, "vocab_size": 8192}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, use_cache=False)), (), labelled(256)


def t5() -> Made:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 2, "num_heads": 8, "vocab_size": 8192}
    config = T5Config(**sizes, use_cache=False, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config), (), labelled(256)


def bert() -> Made:
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8, "intermediate_size": 2048}
    return BertForMaskedLM(BertConfig(**sizes, vocab_size=8192)), (), labelled(256)


def labelled(length: int) -> dict[str, Any]:
    ids = torch.randint(8192, (2, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


def resnet() -> Made:
    from transformers import ResNetConfig, ResNetForImageClassification

    model = ResNetForImageClassification(ResNetConfig(depths=[1, 1, 1, 1], num_labels=10))
    return model, (), {"pixel_values": torch.randn(4, 3, 128, 128), "labels": torch.zeros(4, dtype=torch.long)}


class UNet(nn.Module):
    """Convolutions down and up again, with skips."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        sizes = [width, 2 * width, 4 * width]
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.down = nn.ModuleList(nn.Conv2d(a, 2 * a, 3, 2, 1) for a in sizes)
        self.up = nn.ModuleList(nn.ConvTranspose2d(2 * a, a, 2, 2) for a in reversed(sizes))
        self.join = nn.ModuleList(nn.Conv2d(2 * a, a, 3, padding=1) for a in reversed(sizes))
        self.last = nn.Conv2d(width, 3, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        kept = [self.first(image)]
        for layer in self.down:
            kept.append(layer(kept[-1]).relu())
        x = kept.pop()
        for lift, join in zip(self.up, self.join, strict=True):
            x = join(torch.cat([lift(x), kept.pop()], 1)).relu()
        return nn.functional.mse_loss(self.last(x), image)


def unet() -> Made:
    return UNet(), (torch.randn(4, 3, 128, 128),), {}


MODELS: dict[str, Callable[[], Made]] = {
    "gpt2": gpt2,
    "llama": llama,
    "t5": t5,
    "bert": bert,
    "resnet": resnet,
    "unet": unet,
}


def step_s(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[float]:
    """Time forward and backward of the whole model, several times after two to warm up."""
    times = []
    for _ in range(RUNS + 2):
        model.zero_grad()
        start = time.perf_counter()
        output = model(*args, **kwargs)
        loss = output["loss"] if isinstance(output, Mapping) else output
        loss.backward()
        times.append(time.perf_counter() - start)
    return times[2:]


def profiled_s(made: Made) -> tuple[float, float]:
    """Give the seconds of all layers together, and how long compiling and measuring took."""
    model, args, kwargs = made
    start = time.perf_counter()
    pipe = fxpipe.compile(model, 1, args, kwargs, microbatches=1, cost="profile", hardware="cpu")
    spent = time.perf_counter() - start
    return sum(stage.forward_s + stage.backward_s for stage in pipe.plan.stages), spent


def run_models(names: list[str]) -> str:
    rows = []
    for name in names:
        torch.manual_seed(0)
        made = MODELS[name]()
        before = step_s(*made)
        layers, spent = profiled_s(made)
        whole = statistics.median([*before, *step_s(*made)])
        rows.append([name, f"{layers:.4f}", f"{whole:.4f}", f"{layers / whole:.3f}", f"{spent:.1f}"])
    headers = ["model", "layers added up (s)", "whole model (s)", "ratio", "compile and measure (s)"]
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def run_blocks() -> str:
    rows = []
    for layers in (1, 24):
        made = gpt2(layers, 1024, 256)
        start = time.perf_counter()
        fxpipe.compile(*made[:1], 1, *made[1:], microbatches=1, hardware="cpu")
        without = time.perf_counter() - start
        rows.append([layers, f"{profiled_s(made)[1] - without:.1f}"])
    return tabulate(rows, headers=["GPT-2 medium's blocks", "measuring (s)"], tablefmt="github", disable_numparse=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *MODELS], help="all of them if none is named")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(run_models(arguments.names or list(MODELS)))
    print()
    print(run_blocks())


if __name__ == "__main__":
    main()
