"""Starts the worker processes of a test, and makes sure that none stays.

Importing torch takes seconds, so that ranks are forked from one warm server that has it imported; it ends with the
process that runs the tests. Many cases share one launch: a worker runs its cases one after the other and prints a line
for each, and every case is a test of its own.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import json
import multiprocessing.forkserver
import os
import pathlib
import random
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

CASE_S = 240  # a case that takes longer hangs; the worker then says where
LIMIT_S = 900  # of a launch: not how long it takes, but when it is given up

DIED = "the end of rank"  # a case's name for what a rank says that ended in the middle of one

FILES = "FXPIPE_TEST_FILES"  # where ranks that a script forks write what they say

HERE = pathlib.Path(__file__).parent


def launch(
    script: str,
    ranks: int,
    *arguments: str,
    timeout_s: float = LIMIT_S,
    fresh: bool = False,
    devices: bool = False,
    prepares: bool = False,
) -> list[subprocess.CompletedProcess[str]]:
    """Run a script (its path from this folder) on several ranks, without accelerators unless asked.

    Fresh ones are interpreters of their own, which also end as such; the others are forked. A script that prepares runs
    once and forks the ranks itself, by ``fork_ranks``. Gives what each rank printed and its exit code.
    """
    port = free_port()
    common = {
        "PYTHONPATH": import_path(),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(ranks),
        "OMP_NUM_THREADS": "1",
        **({} if devices else {"CUDA_VISIBLE_DEVICES": ""}),
    }
    command = [str(HERE / script), *arguments]
    with tempfile.TemporaryDirectory() as folder:
        said = [[pathlib.Path(folder, f"{rank}.{kind}") for kind in ("out", "err")] for rank in range(ranks)]
        start = _spawned if fresh or devices else _forked
        if prepares:
            first = pathlib.Path(folder, "out"), pathlib.Path(folder, "err")
            code = _forked(command, {**common, FILES: folder}, *map(str, first))(timeout_s)
            assert code == 0, f"the script ended with {code}:\n" + "\n".join(path.read_text() for path in first)
            codes = json.loads(first[0].read_text().splitlines()[-1])
        else:
            processes = [
                start(command, {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, *map(str, said[rank]))
                for rank in range(ranks)
            ]
            end = time.monotonic() + timeout_s
            codes = [process(max(end - time.monotonic(), 0.1)) for process in processes]
        return [
            subprocess.CompletedProcess(command, code, *(path.read_text() for path in pair))
            for code, pair in zip(codes, said, strict=True)
        ]


def free_port() -> int:
    """Give a port that nobody listens on, of those that no connection gets by itself where there are such."""
    ports = pathlib.Path("/proc/sys/net/ipv4/ip_local_port_range")
    first = int(ports.read_text().split()[0]) if ports.exists() else 32768
    others = range(min(first // 2, 10000), first)
    for port in (*random.SystemRandom().sample(others, 100), 0):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return int(probe.getsockname()[1])
    raise OSError("no port is free")


def import_path() -> str:
    """Where a process of a test imports from."""
    return os.pathsep.join([str(HERE), str(HERE.parent), *(p for p in sys.path if p)])


@functools.cache
def warm_server() -> Any:
    """Start the process that ranks are forked from."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["warm"])
    before = dict(os.environ)
    os.environ["PYTHONPATH"] = import_path()
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context


def _spawned(command: list[str], env: dict[str, str], out: str, err: str) -> Callable[[float], int]:
    """Start an interpreter; gives what waits for its end, kills it if that takes too long, and says how it ended."""
    with open(out, "w") as output, open(err, "w") as errors:
        streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": errors}
        process = subprocess.Popen([sys.executable, *command], env={**os.environ, **env}, **streams)

    def ended(timeout_s: float) -> int:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout_s)
        process.kill()
        return process.wait()

    return ended


def _forked(command: list[str], env: dict[str, str], out: str, err: str) -> Callable[[float], int]:
    """Fork a rank from the warm server; else as ``_spawned``."""
    process = warm_server().Process(target=_run, args=(command, env, out, err))
    process.start()

    def ended(timeout_s: float) -> int:
        process.join(timeout_s)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with whatever it has started
        process.join()
        assert process.exitcode is not None
        return process.exitcode

    return ended


def _run(command: list[str], env: dict[str, str], out: str, err: str) -> None:
    """In a forked rank: run the script as if it had been started with these arguments."""
    os.setsid()
    os.environ.update(env)
    _say_to(out, err)
    if FILES in env:
        stay_of_one_thread()
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")


def _say_to(out: str, err: str) -> None:
    for path, number in ((out, 1), (err, 2)):
        with open(path, "w") as file:
            os.dup2(file.fileno(), number)


def stay_of_one_thread() -> None:
    """In a script that will fork its ranks: let autograd look for devices now, when there is none.

    It does so once. A torch that was built for CUDA finds one, on a machine without, as soon as there are fake tensors,
    and starts a thread for it: what is forked then refuses every backward.
    """
    import torch

    torch.ones(1, requires_grad=True).sum().backward()


def fork_ranks(main: Callable[[], None]) -> None:
    """In a script that prepares, at its end: run ``main`` on every rank, with all that was made until here."""
    context, folder = multiprocessing.get_context("fork"), os.environ[FILES]
    processes = [context.Process(target=_rank, args=(main, folder, r)) for r in range(int(os.environ["WORLD_SIZE"]))]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    print(json.dumps([process.exitcode for process in processes]))


def _rank(main: Callable[[], None], folder: str, rank: int) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    _say_to(f"{folder}/{rank}.out", f"{folder}/{rank}.err")
    main()


def check(results: list[subprocess.CompletedProcess[str]]) -> None:
    """Fail with everything the ranks said if one of them failed."""
    failed = [rank for rank, result in enumerate(results) if result.returncode]
    said = "\n".join(f"--- rank {rank}\n{result.stdout}{result.stderr[-4000:]}" for rank, result in enumerate(results))
    assert not failed, f"ranks {failed} failed\n{said}"


def run_cases(cases: dict[str, Callable[[], object]], dtype: Any = None) -> None:
    """In a worker: run every case and say how it went; stops at the first that fails."""
    import torch

    torch.set_num_threads(1)
    faulthandler.enable()  # what ends a rank without a word says where
    for name, case in cases.items():
        start = time.process_time()
        torch.manual_seed(0)
        torch.set_default_dtype(dtype or torch.float32)
        faulthandler.dump_traceback_later(CASE_S, exit=True)
        try:
            case()
        except BaseException:
            print(json.dumps({"case": name, "error": traceback.format_exc()}), flush=True)
            raise
        print(json.dumps({"case": name, "error": None, "seconds": time.process_time() - start}), flush=True)


def launch_cases(script: str, ranks: int, *arguments: str, **options: Any) -> dict[str, list[str | None]]:
    """Run a worker of cases on several ranks; gives for each case what every rank said of it."""
    results = launch(script, ranks, *arguments, **options)
    said: dict[str, list[str | None]] = {}
    for rank, result in enumerate(results):
        error = None
        for line in result.stdout.splitlines():
            found = json.loads(line)
            error = found["error"]
            said.setdefault(found["case"], []).append(error and f"rank {rank}: {error}")
        if result.returncode and not error:
            died = f"rank {rank} ended with {result.returncode}:\n{result.stderr[-8000:]}"
            said.setdefault(f"{DIED} {rank}", []).append(died)
    return said


def passed(said: dict[str, list[str | None]], case: str, ranks: int) -> None:
    """Fail with what the ranks said unless all of them passed the case."""
    errors = [error for error in said.get(case, []) if error]
    broken = [f"{name}: {error}" for name, errors in said.items() for error in errors if error]
    died = [error for name, errors in said.items() if name.startswith(DIED) for error in errors if error]
    assert not errors, "\n".join(errors + died)
    assert len(said.get(case, [])) == ranks, "not reached; before it failed:\n" + "\n".join(broken)
