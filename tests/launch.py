"""Starts the worker processes of a test, and makes sure that none stays.

Starting torch on every rank takes seconds, so that many cases share one launch: a worker runs its cases one after the
other and prints a line for each, and every case is a test of its own.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

CASE_S = 120  # a case that takes longer hangs; the worker then says where

HERE = pathlib.Path(__file__).parent


def launch(
    script: str, ranks: int, *arguments: str, timeout_s: float = 240, devices: bool = False
) -> list[subprocess.CompletedProcess[str]]:
    """Run a script (its path from this folder) on several ranks, without accelerators unless asked.

    Gives what each one printed and its exit code.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    paths = [str(HERE), str(HERE.parent), *(p for p in sys.path if p)]
    common = {
        "PYTHONPATH": os.pathsep.join(paths),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(ranks),
        "OMP_NUM_THREADS": "1",
        **({} if devices else {"CUDA_VISIBLE_DEVICES": ""}),
    }
    command = [sys.executable, str(HERE / script), *arguments]
    with contextlib.ExitStack() as stack:
        files = [[stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(2)] for _ in range(ranks)]
        processes = []
        for rank, (out, err) in enumerate(files):
            env = {**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(subprocess.Popen(command, env=env, stdout=out, stderr=err))
        end = time.monotonic() + timeout_s
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(end - time.monotonic(), 0.1))
        for process in processes:
            process.kill()
            process.wait()
        for pair in files:
            for file in pair:
                file.seek(0)
        return [
            subprocess.CompletedProcess(command, process.returncode, out.read(), err.read())
            for process, (out, err) in zip(processes, files, strict=True)
        ]


def check(results: list[subprocess.CompletedProcess[str]]) -> None:
    """Fail with everything the ranks said if one of them failed."""
    failed = [rank for rank, result in enumerate(results) if result.returncode]
    said = "\n".join(f"--- rank {rank}\n{result.stdout}{result.stderr[-4000:]}" for rank, result in enumerate(results))
    assert not failed, f"ranks {failed} failed\n{said}"


def run_cases(cases: dict[str, Callable[[], object]], dtype: Any = None) -> None:
    """In a worker: run every case and say how it went; stops at the first that fails."""
    import torch

    torch.set_num_threads(1)
    for name, case in cases.items():
        start = time.perf_counter()
        torch.manual_seed(0)
        torch.set_default_dtype(dtype or torch.float32)
        faulthandler.dump_traceback_later(CASE_S, exit=True)
        try:
            case()
        except BaseException:
            print(json.dumps({"case": name, "error": traceback.format_exc()}), flush=True)
            raise
        print(json.dumps({"case": name, "error": None, "seconds": time.perf_counter() - start}), flush=True)


def launch_cases(script: str, ranks: int, *arguments: str, timeout_s: float = 240) -> dict[str, list[str | None]]:
    """Run a worker of cases on several ranks; gives for each case what every rank said of it."""
    results = launch(script, ranks, *arguments, timeout_s=timeout_s)
    said: dict[str, list[str | None]] = {}
    for rank, result in enumerate(results):
        for line in result.stdout.splitlines():
            found = json.loads(line)
            error = found["error"]
            said.setdefault(found["case"], []).append(error and f"rank {rank}: {error}")
    return said


def passed(said: dict[str, list[str | None]], case: str, ranks: int) -> None:
    """Fail with what the ranks said unless all of them passed the case."""
    errors = [error for error in said.get(case, []) if error]
    broken = [f"{name}: {error}" for name, errors in said.items() for error in errors if error]
    assert not errors, "\n".join(errors)
    assert len(said.get(case, [])) == ranks, "not reached; before it failed:\n" + "\n".join(broken)
