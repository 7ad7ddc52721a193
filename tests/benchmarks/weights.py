"""Measure what giving a model its first values takes: processor time and memory, each in a process of its own.

    python -m tests.benchmarks weights [gpt2-medium llama-1.3b] [--stages 1 2 4 8] [--record] [--skip]

For each model: an eager build; the stages of each number of stages as ``materialize`` fills them after
``fxpipe.deferred_init`` (peak memory above a rank that has captured and joined its group, against the bytes it owns;
processor seconds of one thread, against the eager build); and the middle stage of the largest number as DeepSpeed's
pipeline module does it, where each rank builds the layers it owns (with other numbers than an eager build).
``--record``: how long recording a Llama of 405 billion parameters takes against building it on fake tensors, side by
side, and what it keeps. ``--skip``: how long it takes to skip ever longer pieces of the random stream.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import psutil
import torch
from tabulate import tabulate
from torch import nn

MIB = 2**20
ALLOWANCE = 64 * 10**6
"""Bytes above 1.05 times its own that a rank may need at its peak."""


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
VOCABULARY = 32000


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
    from fxpipe.materialize import _build, _layers_by_name, _parts

    ids = torch.zeros(4 * number, 64, dtype=torch.long)
    with measured() as recording, fxpipe.deferred_init(seed=0):
        model = MODELS[name]()
    example = {"input_ids": ids, "labels": ids}
    pipe = fxpipe.compile(model, number, example_kwargs=example, microbatches=1, schedule="GPipe")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1")
    torch.distributed.init_process_group("gloo")
    results = []
    for index in wanted:
        capture, layers = pipe._source.capture, _layers_by_name(pipe.graph)
        with measured() as found:
            parts = [_parts(capture, pipe.plan, layers, pipe.plan.stages[index])]
            built, _ = _build(capture, parts, torch.device("cpu"), 0, None)
        own = size_of([*built[0].parameters(), *built[0].buffers()])
        results.append({**found, "own": own, "recording": recording["seconds"], "index": index})
        del built
    torch.distributed.destroy_process_group()
    return results


def own_layers(name: str, number: int) -> dict[str, float]:
    """Build the blocks of a middle stage and nothing else, as ``deepspeed.pipe.PipelineModule`` does."""
    with torch.device("meta"):
        model = MODELS[name]()
    inner: Any = model.transformer if name.startswith("gpt2") else model.model
    blocks = inner.h if name.startswith("gpt2") else inner.layers
    kind, config, count = type(blocks[0]), model.config, len(blocks) // number
    torch.set_default_dtype(next(model.parameters()).dtype)
    with measured() as found:
        built = nn.ModuleList([kind(config, layer_idx=index) for index in range(count)])
        for module in built.modules():
            model._init_weights(module)
    return {**found, "own": size_of([*built.parameters(), *built.buffers()])}


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
        start = time.perf_counter()
        mersenne.advance(state, draws)
        rows.append([draws, time.perf_counter() - start])
    return rows


TASKS: dict[str, Callable[..., Any]] = {each.__name__: each for each in (eager, stages, own_layers, record, skip)}


# --- what asks for it ---------------------------------------------------------------------------------------------


def in_a_process(task: str, *arguments: Any) -> Any:
    command = [sys.executable, __file__, "--task", json.dumps([task, *arguments])]
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", **os.environ}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in (os.getcwd(), environment.get("PYTHONPATH")) if path)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks weights")
    parser.add_argument("models", nargs="*", choices=[[], *MODELS], help="default: all")
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--skip", action="store_true")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task:
        task, *arguments = json.loads(options.task)
        print(json.dumps(TASKS[task](*arguments)))
        return
    for name in options.models or ([] if options.record or options.skip else MODELS):
        _report_model(name, options.stages)
    if options.record:
        found = in_a_process("record")
        print(f"recording 405 billion parameters: {found['seconds']:.2f} s, {found['ratio']:.2f} x a plain fake build")
        print(f"  (at most 1.5), {found['peak'] / 10**6:.0f} MB (at most 100)")
    if options.skip:
        rows = [[f"{draws:.1e}", 1e3 * seconds] for draws, seconds in in_a_process("skip")]
        print(tabulate(rows, headers=["draws skipped", "ms (at most 100)"], floatfmt=".1f"))


def _report_model(name: str, numbers: Sequence[int]) -> None:
    whole = in_a_process("eager", name)
    rows = [["eager", "", whole["own"] / MIB, whole["peak"] / MIB, "", whole["seconds"], 1.0]]
    for number in numbers:
        for index in range(number):
            (found,) = in_a_process("stages", name, number, [index])
            allowed = 1.05 * found["own"] + ALLOWANCE
            share = whole["seconds"] / found["seconds"]
            sizes = [found["own"] / MIB, found["peak"] / MIB, found["peak"] / allowed]
            rows.append([f"stage of {number}", index, *sizes, found["seconds"], share])
    found = in_a_process("own_layers", name, max(numbers))
    times = [found["seconds"], whole["seconds"] / found["seconds"]]
    rows.append([f"own layers, 1/{max(numbers)}", "", found["own"] / MIB, found["peak"] / MIB, "", *times])
    headers = [name, "stage", "own MiB", "peak MiB", "of allowed", "s", "x eager"]
    print(tabulate(rows, headers=headers, floatfmt=("", "", ".0f", ".0f", ".2f", ".2f", ".2f")), flush=True)
    print()


if __name__ == "__main__":
    main()
