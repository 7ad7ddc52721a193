"""One of four ranks that load a quarter each of a sharded directory: what it asks the files for, and its memory."""

from __future__ import annotations

import json
import pathlib
import re
import sys

import reads
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import fxpipe

OPTIONS = {
    "vocab_size": 1000,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "intermediate_size": 2048,
}
SHARD_BYTES = 30_000_000


def build() -> torch.nn.Module:
    import transformers

    with torch.device("meta"):
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**OPTIONS))


def most_resident() -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def main(folder: pathlib.Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    tokens = torch.zeros(4, 8, dtype=torch.long)
    pipe = fxpipe.compile(build(), 4, (), {"input_ids": tokens, "labels": tokens}, microbatches=4)
    dist.barrier()
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    base = most_resident()
    with reads.counted_reads() as asked:
        pipe.materialize(init=folder)
    peak = most_resident() - base
    own = sum(tensor.numel() * tensor.element_size() for tensor in pipe.state_dict().values())
    print(json.dumps({"own": own, "peak": peak, "asked": sum(asked)}), flush=True)
    if dist.get_rank() == 0:
        files = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
        for fqn, tensor in pipe.named_parameters():
            assert torch.equal(tensor, files[fqn]), fqn
    dist.barrier()
    dist.destroy_process_group()


def write(folder: pathlib.Path) -> None:
    """Make the directory, file by file."""
    from fxpipe.runtime.weights.disk.files import stored, write_file, write_json

    numbers = torch.Generator().manual_seed(0)
    files: list[dict[str, torch.Tensor]] = [{}]
    for name, tensor in build().state_dict().items():
        if sum(held.numel() * 4 for held in files[-1].values()) > SHARD_BYTES:
            files.append({})
        files[-1][name] = torch.randn(tensor.shape, generator=numbers)
    weight_map = {}
    for index, held in enumerate(files):
        name = f"model-{index + 1:05}-of-{len(files):05}.safetensors"
        write_file(folder / name, [stored(fqn, tensor) for fqn, tensor in held.items()], held.values())
        weight_map.update(dict.fromkeys(held, name))
    write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
