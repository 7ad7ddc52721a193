"""Fine-tune a Llama on bytes, whole or through LoRA adapters, as a pipeline with data-parallel replicas.

    python examples/finetune_llama.py --lora                                   # all stages in one process
    torchrun --nproc-per-node 4 examples/finetune_llama.py --lora --stages 2   # two stages by two replicas
    python examples/finetune_llama.py --weights DIR --save runs                # a directory of from_pretrained
    python examples/finetune_llama.py --weights DIR --save runs --resume       # goes on from the newest checkpoint

The model is transformers' own, unmodified; only ``main`` knows of fxpipe. Without ``--weights`` it is a small one.
"""

import argparse
import json
import os
import warnings
from pydoc_data.topics import topics

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers import LlamaConfig, LlamaForCausalLM

import fxpipe

CONTEXT, BATCH, MICROBATCHES = 64, 16, 4


def build(lora, weights=None):
    """A Llama of a directory's sizes, or a small one; with adapters in its attention if wanted: only they train."""
    small = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        use_cache=False,
    )
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(weights) if weights else small)
    if lora:
        from peft import LoraConfig, get_peft_model

        with warnings.catch_warnings(action="ignore"):
            model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    return model


def batches(seed=0):
    """Yield batches of text; every second sample is padded, so that samples have unequal numbers of targets."""
    text = torch.tensor(list("\n".join(topics.values()).encode()))
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(text) - CONTEXT - 1, (BATCH,), generator=generator)
        ids = torch.stack([text[start : start + CONTEXT] for start in starts])
        labels = ids.clone()
        labels[::2, CONTEXT // 2 :] = -100
        yield {"input_ids": ids, "labels": labels}


def main():
    """Train, and print a line per step on rank 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lora", action="store_true", help="train adapters instead of the weights")
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--weights", help="a directory with config.json and safetensors")
    parser.add_argument("--save", help="a directory for checkpoints; the last step is saved")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --save")
    parser.add_argument("--log", help="a file for a JSON line per step")
    options = parser.parse_args()

    mesh, replica, replicas = None, 0, 1
    if "RANK" in os.environ:
        kind = "cuda" if torch.cuda.is_available() else "cpu"
        replicas = int(os.environ["WORLD_SIZE"]) // options.stages
        mesh = init_device_mesh(kind, (options.stages, replicas), mesh_dim_names=("pp", "dp"))
        replica = mesh.get_local_rank("dp")

    with fxpipe.deferred_init(seed=0):  # no memory yet: each rank makes its own stage's weights, and the same ones
        model = build(options.lora, options.weights)
    rows = slice(replica * BATCH // replicas, (replica + 1) * BATCH // replicas)
    stream = batches()
    example = {name: value[rows] for name, value in next(stream).items()}
    pipe = fxpipe.compile(model, options.stages, (), example, microbatches=MICROBATCHES, mesh=mesh)
    pipe.print_report()
    pipe.materialize()
    if options.weights and not options.resume:
        pipe.load(options.weights)  # this rank's tensors; adapters, which no such directory holds, keep their start
    optimizer = pipe.optimizer(torch.optim.AdamW, lr=options.lr)  # also where a stage has nothing to train
    start = pipe.load(options.save, optimizer=optimizer)["steps"] if options.resume else 0
    for _ in range(start):
        next(stream)  # what was trained on already
    first = not dist.is_initialized() or dist.get_rank() == 0
    log = open(options.log, "w", encoding="utf-8") if options.log and first else None  # noqa: SIM115
    for step in range(start, start + options.steps):
        batch = {name: value[rows] for name, value in next(stream).items()}
        pipe.zero_grad()
        loss = pipe.step(**batch)  # of the whole batch, however its valid targets are spread over replicas
        pipe.clip_grad_norm_(1.0)
        optimizer.step()
        if first:
            print(f"step {step:3}  loss {loss:.4f}", flush=True)
        if log:
            log.write(json.dumps({"step": step, "loss": float(loss)}) + "\n")
    if options.save:
        steps = start + options.steps
        pipe.save(f"{options.save}/step-{steps}", optimizer=optimizer, extra={"steps": steps})
    pipe.close()


if __name__ == "__main__":
    main()
