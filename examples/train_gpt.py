"""Train a byte-level GPT on the Python language reference, in one process or as a pipeline of ranks.

    python examples/train_gpt.py                                 # all stages in one process
    torchrun --nproc-per-node 4 examples/train_gpt.py            # one stage per rank
    python -m fxpipe plan examples/train_gpt.py:build --stages 4 # only the plan

The first half is a plain PyTorch model that knows nothing of fxpipe; the second trains it through fxpipe.
"""

import argparse
import json
import math
import os
import time
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import fxpipe

BYTES, LAYERS, WIDTH, HEADS, CONTEXT, BATCH, DROPOUT = 256, 6, 128, 4, 128, 32, 0.05

# --- the model: plain PyTorch -----------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        dropout = DROPOUT if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, WIDTH))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention_norm = nn.LayerNorm(WIDTH)
        self.attention = Attention()
        self.mlp_norm = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, x):
        x = x + self.dropout(self.attention(self.attention_norm(x)))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.token = nn.Embedding(BYTES, WIDTH)
        self.position = nn.Embedding(CONTEXT, WIDTH)
        self.dropout = nn.Dropout(DROPOUT)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, BYTES, bias=False)
        self.head.weight = self.token.weight

    def forward(self, ids):
        positions = torch.arange(ids.shape[1], device=ids.device)
        x = self.dropout(self.token(ids) + self.position(positions))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def init_weights(module):
    """Every matrix and embedding N(0, 0.05), every bias 0."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.05)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def loss_fn(logits, target):
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


def build():
    """The model and one global batch: what ``python -m fxpipe plan`` asks for."""
    return GPT(), (torch.zeros(BATCH, CONTEXT, dtype=torch.long),), {}


# --- the text ---------------------------------------------------------------------------------------------------


def read_text():
    """Train and held-out bytes: the language reference that ships inside CPython."""
    text = "\n".join(topics[name] for name in sorted(topics)).encode()
    data = torch.tensor(list(text))
    cut = int(0.95 * len(data))
    return data[:cut], data[cut:]


def random_windows(data, generator):
    starts = torch.randint(len(data) - CONTEXT - 1, (BATCH, 1), generator=generator)
    windows = data[starts + torch.arange(CONTEXT + 1)]
    return windows[:, :-1], windows[:, 1:]


def held_out_loss(pipe, data):
    pipe.eval()
    windows = data[: (len(data) - 1) // CONTEXT * CONTEXT + 1]
    inputs, targets = windows[:-1].view(-1, CONTEXT), windows[1:].view(-1, CONTEXT)
    batches = zip(inputs.split(BATCH), targets.split(BATCH), strict=True)
    losses = [loss_fn(pipe.infer(x).cpu(), y) * len(x) for x, y in batches]
    pipe.train()
    return float(sum(losses)) / len(inputs)


def sample(pipe, prompt, length, seed):
    """Continue ``prompt`` byte by byte; the window keeps one size, and what is right of a byte cannot change it."""
    pipe.eval()
    ids, generator = list(prompt.encode()), torch.Generator().manual_seed(seed)
    for _ in range(length):
        window = ids[-CONTEXT:]
        padded = torch.tensor([window + [0] * (CONTEXT - len(window))])
        logits = pipe.infer(padded)[0, len(window) - 1].cpu()
        ids.append(int(torch.multinomial((logits / 0.8).softmax(-1), 1, generator=generator)))
    return bytes(ids).decode(errors="replace")


# --- training: the only part that uses fxpipe -------------------------------------------------------------------


def train(args, pipe):
    train_data, held_out = read_text()
    pipe.materialize(device=args.device, init=init_weights)
    optimizer = torch.optim.AdamW(pipe.parameters(), lr=2e-3, weight_decay=0.01)
    warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 30))
    generator = torch.Generator().manual_seed(args.seed)
    first = int(os.environ.get("RANK", 0)) == 0
    bar = tqdm(range(args.steps), unit="step", disable=not first)
    with open(args.log if args.log and first else os.devnull, "w") as log:
        for step in bar:
            started = time.perf_counter()
            inputs, targets = random_windows(train_data, generator)
            loss = pipe.step(inputs, target=targets)
            pipe.clip_grad_norm_(1.0)
            optimizer.step()
            warm_up.step()
            pipe.zero_grad()
            seconds = time.perf_counter() - started
            bar.set_postfix(loss=f"{loss:.3f}", tokens_per_s=f"{inputs.numel() / seconds:.0f}")
            record = {"step": step, "loss": float(loss), "tokens": inputs.numel(), "seconds": seconds}
            print(json.dumps(record), file=log, flush=True)
    loss, text = held_out_loss(pipe, held_out), sample(pipe, "The ", args.sample, args.seed)
    weights = pipe.state_dict(full=True)
    if first:
        print(f"held-out loss {loss:.3f} nats per byte ({loss / math.log(2):.2f} bits)\nsample: {text}")
        GPT().load_state_dict(weights)  # the pipeline's weights are the plain model's
        torch.save(weights, args.save)
        print(f"weights in {args.save}, under the plain model's own names")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    parser.add_argument("--stages", type=int, default=ranks if ranks > 1 else 4)
    parser.add_argument("--steps", type=int, default=220)
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--schedule", default="1F1B")
    parser.add_argument("--plan-only", action="store_true")
    parser.add_argument("--device")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sample", type=int, default=200, metavar="BYTES", help="of text to write at the end")
    parser.add_argument("--log", metavar="FILE", help="one JSON line per step: step, loss, tokens, seconds")
    parser.add_argument("--save", metavar="FILE", default="gpt.pt")
    args = parser.parse_args()
    with torch.device("meta"):
        model, example, _ = build()
    plan = {"microbatches": args.microbatches, "schedule": args.schedule, "hardware": "cpu", "seed": args.seed}
    with fxpipe.compile(model, args.stages, example, {"target": example[0]}, loss_fn=loss_fn, **plan) as pipe:
        pipe.print_report()
        if not args.plan_only:
            train(args, pipe)


if __name__ == "__main__":
    main()
