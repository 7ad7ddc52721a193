"""Measure what giving a model its first values takes: processor time and memory, each in a process of its own.

    python -m tests.benchmarks weights [gpt2-medium llama-1.3b] [--stages 1 2 4 8] [--record] [--skip] [--load]
    python -m tests.benchmarks weights --page

For each model: an eager build; the stages of each number of stages as ``materialize`` fills them after
``fxpipe.deferred_init`` (peak memory above a rank that has captured and joined its group, against the bytes it owns;
processor seconds of one thread, against the eager build); and the middle stage of the largest number as DeepSpeed's
pipeline module does it, where each rank builds the layers it owns (with other numbers than an eager build).
``--record``: how long recording a Llama of 405 billion parameters takes against building it on fake tensors, side by
side, and what it keeps. ``--skip``: how long it takes to skip ever longer pieces of the random stream. ``--load``: four
ranks that each read their quarter of a sharded directory, against ``from_pretrained``, accelerate, and a rank that
builds its own layers and reads into them. ``--page``: everything, into its section of ``docs/benchmarks.md``.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import pathlib
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import psutil
import torch
from tabulate import tabulate
from torch import nn

from tests.benchmarks.sections import write_section

MIB = 2**20
ALLOWANCE = 64 * 10**6
"""Bytes above 1.05 times its own that a rank may need at its peak."""
SHARD = 400 * 10**6
"""Bytes of a file of the directory that is read."""
QUARTERS = 4


def gpt2_medium() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_layer=24, n_embd=1024, n_head=16, use_cache=False))


def _llama(**sizes: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**sizes, use_cache=False)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)


def llama_1b() -> nn.Module:
    heads = {"num_attention_heads": 16, "num_key_value_heads": 16}
    return _llama(hidden_size=2048, intermediate_size=5504, num_hidden_layers=24, vocab_size=32000, **heads)


def llama_405b() -> nn.Module:
    heads = {"num_attention_heads": 128, "num_key_value_heads": 8}
    return _llama(hidden_size=16384, intermediate_size=53248, num_hidden_layers=126, vocab_size=128256, **heads)


MODELS: dict[str, Callable[[], nn.Module]] = {"gpt2-medium": gpt2_medium, "llama-1.3b": llama_1b}


# --- what runs in a process of its own ----------------------------------------------------------------------------


@contextlib.contextmanager
def measured() -> Iterator[dict[str, float]]:
    """Give seconds of one processor, and the highest resident memory in bytes above what it was before."""
    gc.collect()
    found: dict[str, float] = {}
    before = psutil.Process().memory_info().rss
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the high-water mark starts again from here
    start = time.process_time()
    yield found
    found["seconds"] = time.process_time() - start
    with open("/proc/self/status") as file:
        mark = next(line for line in file if line.startswith("VmHWM"))
    found["peak"] = int(mark.split()[1]) * 1024 - before


def size_of(tensors: Sequence[torch.Tensor]) -> int:
    return sum({id(tensor): tensor.numel() * tensor.element_size() for tensor in tensors}.values())


def eager(name: str) -> dict[str, float]:
    import transformers  # noqa: F401

    torch.manual_seed(0)
    with measured() as found:
        model = MODELS[name]()
    return {**found, "own": size_of([*model.parameters(), *model.buffers()])}


def stages(name: str, number: int, wanted: Sequence[int]) -> list[dict[str, float]]:
    """Materialise some stages, one after another, as the rank of each does after capture."""
    import fxpipe
    from fxpipe.materialize import _build, _parts, layers_by_name

    ids = torch.zeros(4 * number, 64, dtype=torch.long)
    with measured() as recording, fxpipe.deferred_init(seed=0):
        model = MODELS[name]()
    example = {"input_ids": ids, "labels": ids}
    pipe = fxpipe.compile(model, number, example_kwargs=example, microbatches=1, schedule="GPipe")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1")
    torch.distributed.init_process_group("gloo")
    results = []
    for index in wanted:
        capture, layers = pipe._source.capture, layers_by_name(pipe.graph)
        with measured() as found:
            parts = [_parts(capture, pipe.plan, layers, pipe.plan.stages[index])]
            built, _ = _build(capture, parts, torch.device("cpu"), 0, None)
        own = size_of([*built[0].parameters(), *built[0].buffers()])
        results.append({**found, "own": own, "recording": recording["seconds"], "index": index})
        del built
    torch.distributed.destroy_process_group()
    return results


def own_layers(name: str, number: int, folder: str | None = None) -> dict[str, float]:
    """Build the blocks of a middle stage and nothing else, as ``deepspeed.pipe.PipelineModule`` does.

    Args:
        name: The model.
        number: Stages.
        folder: What is then read into them.
    """
    with torch.device("meta"):
        model = MODELS[name]()
    inner: Any = model.transformer if name.startswith("gpt2") else model.model
    start, blocks = ("transformer.h.", inner.h) if name.startswith("gpt2") else ("model.layers.", inner.layers)
    kind, config, count = type(blocks[0]), model.config, len(blocks) // number
    first = number // 2 * count
    torch.set_default_dtype(next(model.parameters()).dtype)
    with measured() as found:
        built = nn.ModuleList([kind(config, layer_idx=first + index) for index in range(count)])
        for module in built.modules():
            model._init_weights(module)
        if folder is not None:
            _read_into(built, {f"{start}{first + index}.": f"{index}." for index in range(count)}, folder)
    return {**found, "own": size_of([*built.parameters(), *built.buffers()])}


def _read_into(built: nn.Module, names: dict[str, str], folder: str) -> None:
    from safetensors import safe_open

    wanted = built.state_dict()
    for path in sorted(pathlib.Path(folder).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                for prefix, own in names.items():
                    if key.startswith(prefix):
                        wanted[own + key.removeprefix(prefix)].copy_(file.get_tensor(key))


def write(name: str, folder: str) -> int:
    """Write a sharded directory of random weights, a file at a time; gives its bytes."""
    from fxpipe.runtime.weights.disk.files import stored, write_file, write_json

    with torch.device("meta"):
        model = MODELS[name]()
    model.config.dtype = next(model.parameters()).dtype
    model.config.save_pretrained(folder)
    shards: list[dict[str, torch.Tensor]] = [{}]
    for fqn, tensor in model.named_parameters():
        if shards[-1] and size_of([*shards[-1].values(), tensor]) > SHARD:
            shards.append({})
        shards[-1][fqn] = tensor
    weight_map = {}
    for index, held in enumerate(shards):
        file = f"model-{index + 1:05}-of-{len(shards):05}.safetensors"
        values = (torch.empty_like(tensor, device="cpu").uniform_(-0.1, 0.1) for tensor in held.values())
        write_file(pathlib.Path(folder, file), [stored(fqn, tensor) for fqn, tensor in held.items()], values)
        weight_map.update(dict.fromkeys(held, file))
    write_json(pathlib.Path(folder, "model.safetensors.index.json"), {"metadata": {}, "weight_map": weight_map})
    return size_of(list(model.parameters()))


def read_quarter(name: str, folder: str) -> dict[str, float]:
    """Be one of four ranks that materialise from the directory."""
    from safetensors import safe_open

    import fxpipe
    from tests.weights.reads import counted_reads

    torch.distributed.init_process_group("gloo")
    ids = torch.zeros(QUARTERS, 64, dtype=torch.long)
    with torch.device("meta"):
        model = MODELS[name]()
    pipe = fxpipe.compile(model, QUARTERS, example_kwargs={"input_ids": ids, "labels": ids}, schedule="GPipe")
    torch.distributed.barrier()
    with counted_reads() as asked, measured() as found:
        pipe.materialize(init=folder)
    parameters = dict(pipe.named_parameters())
    for path in pathlib.Path(folder).glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                assert key not in parameters or torch.equal(parameters[key], file.get_tensor(key)), key
    own = size_of([*pipe.parameters(), *(buffer for _, buffer in pipe.named_buffers())])
    torch.distributed.barrier()
    pipe.close()
    return {**found, "own": own, "asked": sum(asked)}


def from_pretrained(name: str, folder: str) -> dict[str, float]:
    import transformers

    with measured() as found:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    return {**found, "own": size_of([*model.parameters(), *model.buffers()])}


def accelerated(name: str, folder: str) -> dict[str, float]:
    import accelerate
    import transformers  # noqa: F401

    with measured() as found:
        with accelerate.init_empty_weights():
            model = MODELS[name]()
        model.tie_weights()
        model = accelerate.load_checkpoint_and_dispatch(model, folder, device_map={"": "cpu"})
    return {**found, "own": size_of([*model.parameters(), *model.buffers()])}


def record() -> dict[str, float]:
    """Record a model of 405 billion parameters, and build it on fake tensors, in turns."""
    import fxpipe
    from fxpipe._torch import FakeTensorMode

    def plainly() -> float:
        with measured() as found, FakeTensorMode(allow_non_fake_inputs=True):
            llama_405b()
        return found["seconds"]

    def recorded() -> tuple[float, float, nn.Module]:
        with measured() as found, fxpipe.deferred_init(seed=0):
            model = llama_405b()
        return found["seconds"], found["peak"], model

    plainly()  # the first one imports and compiles
    first = recorded()
    ratios, times = [], []
    for _ in range(3):
        plain, (seconds, _, model) = plainly(), recorded()
        ratios.append(seconds / plain)
        times.append(seconds)
        del model
    return {"seconds": statistics.median(times), "ratio": statistics.median(ratios), "peak": first[1]}


def skip() -> list[list[float]]:
    """Skip pieces of the random stream."""
    from fxpipe.recipes import mersenne

    state = torch.Generator().manual_seed(1).get_state()
    rows = []
    for draws in (10**4, 10**6, 10**8, 10**10, 8 * 10**11, 10**15, 2**62):
        mersenne._power.cache_clear()
        start = time.process_time()
        mersenne.advance(state, draws)
        rows.append([draws, time.process_time() - start])
    return rows


TASKS: dict[str, Callable[..., Any]] = {
    each.__name__: each
    for each in (eager, stages, own_layers, record, skip, write, read_quarter, from_pretrained, accelerated)
}


# --- what asks for it ---------------------------------------------------------------------------------------------


def in_a_process(task: str, *arguments: Any) -> Any:
    return in_processes(1, task, *arguments)[0]


def in_processes(number: int, task: str, *arguments: Any) -> list[Any]:
    """Run a task in fresh processes at once; of several each is a rank."""
    command = [sys.executable, __file__, "--task", json.dumps([task, *arguments])]
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", **os.environ}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in (os.getcwd(), environment.get("PYTHONPATH")) if path)
    if number > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        environment.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE=str(number))
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} if number > 1 else {} for rank in range(number)]
    started = [
        subprocess.Popen(
            command, env={**environment, **rank}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in ranks
    ]
    said = [process.communicate() for process in started]
    for process, (_, errors) in zip(started, said, strict=True):
        if process.returncode:
            sys.exit(errors)
    return [json.loads(output.splitlines()[-1]) for output, _ in said]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks weights")
    parser.add_argument("models", nargs="*", choices=[[], *MODELS], help="default: all")
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--skip", action="store_true")
    parser.add_argument("--load", action="store_true")
    parser.add_argument("--page", action="store_true", help="everything, into its section of docs/benchmarks.md")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task:
        task, *arguments = json.loads(options.task)
        print(json.dumps(TASKS[task](*arguments)))
        return
    single = {"record": told_record, "skip": told_skip, "load": told_load}
    asked = [tell for name, tell in single.items() if options.page or getattr(options, name)]
    parts = []
    for name in MODELS if options.page else options.models or ([] if asked else MODELS):
        parts.append(told_model(name, options.stages))
        print(parts[-1], end="\n\n", flush=True)
    for tell in asked:
        parts.append(tell())
        print(parts[-1], end="\n\n", flush=True)
    if options.page:
        write_section("weights", SECTION.format(parts="\n\n".join(parts)))


SECTION = """## First values and loading

Written by `python -m tests.benchmarks weights --page`: each row is a process of its own, of one thread; seconds are its
processor time. *Peak* is the highest resident memory above what a rank has that captured the model and joined its
group. A rank may need 1.05 × its own bytes and 64 MB (*of allowed*), 1.15 × and one file where it reads files.
DeepSpeed's rows build the blocks of a middle stage as its `PipelineModule` does, without embeddings and head, and with
other numbers than one build of the whole model. What `from_pretrained` and accelerate give stays mapped from the files:
every rank has the whole model, of which no page is resident, nor read, before it is used.

{parts}"""


def told_model(name: str, numbers: Sequence[int]) -> str:
    """Build a model eagerly, in stages, and its blocks alone."""
    whole = in_a_process("eager", name)
    rows = [["eager", "", whole["own"] / MIB, whole["peak"] / MIB, None, whole["seconds"], 1.0]]
    for number in numbers:
        for index in range(number):
            (found,) = in_a_process("stages", name, number, [index])
            allowed = 1.05 * found["own"] + ALLOWANCE
            share = whole["seconds"] / found["seconds"]
            sizes = [found["own"] / MIB, found["peak"] / MIB, found["peak"] / allowed]
            rows.append([f"fxpipe, {number} stages", index, *sizes, found["seconds"], share])
    number = max(numbers)
    found = in_a_process("own_layers", name, number)
    times = [found["seconds"], whole["seconds"] / found["seconds"]]
    rows.append([f"DeepSpeed's way, 1/{number}", "", found["own"] / MIB, found["peak"] / MIB, None, *times])
    headers = [name, "stage", "own MiB", "peak MiB", "of allowed", "s", "times as fast"]
    return tabulate(rows, headers, "github", floatfmt=("", "", ".0f", ".0f", ".2f", ".2f", ".2f"), missingval="")


def told_record() -> str:
    found = in_a_process("record")
    return (
        f"Recording a Llama of 405 billion parameters: {found['seconds']:.2f} s, {found['ratio']:.2f} × a plain build "
        f"on fake\ntensors side by side (at most 1.5), {found['peak'] / 10**6:.0f} MB (at most 100)."
    )


def told_skip() -> str:
    rows = [[f"{draws:.1e}", 1e3 * seconds] for draws, seconds in in_a_process("skip")]
    return tabulate(rows, ["numbers skipped", "ms (at most 100)"], "github", floatfmt=("", ".1f"), disable_numparse=[0])


def told_load() -> str:
    """Read a sharded directory in quarters and whole."""
    name = "llama-1.3b"
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        in_a_process("write", name, folder)
        largest = max(file.stat().st_size for file in pathlib.Path(folder).glob("*.safetensors"))
        for index, found in enumerate(in_processes(QUARTERS, "read_quarter", name, folder)):
            allowed = 1.15 * found["own"] + largest
            sizes = [found["own"] / MIB, found["peak"] / MIB, found["peak"] / allowed, found["asked"] / found["own"]]
            rows.append([f"fxpipe, {QUARTERS} stages", index, *sizes, found["seconds"]])
        others = {"from_pretrained of transformers": "from_pretrained", "accelerate, dispatched": "accelerated"}
        for words, task in others.items():
            found = in_a_process(task, name, folder)
            rows.append([words, "", found["own"] / MIB, found["peak"] / MIB, None, None, found["seconds"]])
        found = in_a_process("own_layers", name, QUARTERS, folder)
        sizes = [found["own"] / MIB, found["peak"] / MIB, None, None]
        rows.append([f"DeepSpeed's way, 1/{QUARTERS}", "", *sizes, found["seconds"]])
    headers = [f"{name}, read", "stage", "own MiB", "peak MiB", "of allowed", "asked / own (at most 1.05)", "s"]
    formats = ("", "", ".0f", ".0f", ".2f", ".3f", ".2f")
    words = f"Files of {largest / MIB:.0f} MiB at most:"
    return f"{words}\n\n{tabulate(rows, headers, 'github', floatfmt=formats, missingval='')}"


if __name__ == "__main__":
    main()
