"""A hand-written list of layers, embedding and head tied, in the form that DeepSpeed's users know.

    python examples/layer_specs.py                                # all stages in one process
    torchrun --nproc-per-node 2 examples/layer_specs.py           # one stage per process

A rank holds all specs, which cost nothing, and builds its own layers alone.
"""

import argparse
from pydoc_data.topics import topics

import torch
from torch import nn
from torch.nn import functional as F

import fxpipe
from fxpipe import LayerSpec, TiedLayerSpec

WIDTH, HEADS, CONTEXT, BATCH = 64, 4, 64, 16


class Block(nn.Module):
    """A transformer block."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        split = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).transpose(1, 3)
        mixed = F.scaled_dot_product_attention(*split.unbind(2), is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def as_head(embedding, x):
    """The embedding's weight, used once more."""
    return F.linear(x, embedding.weight)


def layers(blocks=4):
    """One list: the same as for DeepSpeed's PipelineModule, with the import replaced."""
    return [
        TiedLayerSpec("embed", nn.Embedding, 256, WIDTH),
        *(LayerSpec(Block) for _ in range(blocks)),
        LayerSpec(nn.LayerNorm, WIDTH),
        TiedLayerSpec("embed", nn.Embedding, 256, WIDTH, forward_fn=as_head),
    ]


def loss_fn(logits, target):
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()

    text = torch.tensor(list("\n".join(topics.values()).encode()))
    generator = torch.Generator().manual_seed(0)

    def batch():
        starts = torch.randint(len(text) - CONTEXT - 1, (BATCH,), generator=generator)
        rows = torch.stack([text[start : start + CONTEXT + 1] for start in starts])
        return rows[:, :-1], rows[:, 1:]

    ids, target = batch()
    pipe = fxpipe.compile(layers(), options.stages, (ids,), {"target": target}, loss_fn=loss_fn, hardware="cpu")
    pipe.print_report()
    pipe.materialize()  # what the constructors draw, the same numbers for any number of stages
    optimizer = pipe.optimizer(torch.optim.AdamW, lr=3e-3)
    for step in range(options.steps):
        ids, target = batch()
        pipe.zero_grad()
        loss = pipe.step(ids, target=target)
        optimizer.step()
        if step % 10 == 9 and rank() == 0:
            print(f"step {step:3}  loss {loss:.4f}", flush=True)
    pipe.close()


def rank():
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


if __name__ == "__main__":
    main()
