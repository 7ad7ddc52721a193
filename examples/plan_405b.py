"""Plan a model of 405 billion parameters on a laptop: no GPU, no weights, no processes.

    python examples/plan_405b.py --html plan.html

transformers builds the model on the meta device; fxpipe captures it, cuts it, simulates a step and writes a page.
"""

import argparse
import pathlib

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fxpipe


def build(layers=126):
    """A Llama of the published sizes, and an example batch of 64 samples."""
    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=16_384,
        intermediate_size=53_248,
        num_attention_heads=128,
        num_key_value_heads=8,
        vocab_size=128_256,
        max_position_embeddings=131_072,
        use_cache=False,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
        ids = torch.empty(64, 4096, dtype=torch.int64)
    return model, (), {"input_ids": ids, "labels": ids}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, default=16)
    parser.add_argument("--layers", type=int, default=126, help="fewer for a smaller one")
    parser.add_argument("--html", type=pathlib.Path, help="where the page goes")
    options = parser.parse_args()

    model, args, kwargs = build(options.layers)
    print(f"{sum(parameter.numel() for parameter in model.parameters()) / 1e9:.0f} billion parameters, none in memory")
    pipe = fxpipe.compile(model, options.stages, args, kwargs, hardware="h100", microbatches=64, grain="block")
    pipe.print_report()
    if options.html:
        options.html.write_text(pipe.report("html"), encoding="utf-8")
        print(f"the page is {options.html}")


if __name__ == "__main__":
    main()
