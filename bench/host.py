"""What a call costs apart from device time: Python per eager call, and the first call of a process.

`python -m bench.host PROVIDER` times the first calls in this process and prints them as JSON; `first_calls` runs it, with bytecode
as installed packages have it, twice with one fresh cache folder: cold, then from the disk cache.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnres.inputs import Shape
from bench.ops import Case, make_inputs
from bench.providers import PROVIDERS, Unsupported
from bench.timing import OutOfTime, limit

_SMALL: dict[str, Any] = {"tokens": 16, "hidden_size": 2048, "sources": 5}  # the device is done before the host
SMALL_CASES = {
    "direct mix": Case("mix", Shape(**_SMALL, output_norm=False, delta=False)),
    "phase 1": Case("phase1", Shape(**_SMALL, queries=8, key_weight=False, output_norm=False, delta=False)),
    "phase 2": Case("phase2", Shape(**_SMALL, key_weight=False, output_norm=False, delta=False)),
    "serving step": Case("step", Shape(**_SMALL)),
}
WITH_GRADIENT = "direct mix, with autograd"
HOST_PROVIDERS = ("ours-cute", "ours-triton", "flash-attn-res", "fla-triton")
FIRST_CALL_PROVIDERS = ("ours-cute", "ours-triton", "fla-triton")
_CALLS = 200
_FIRST_CALL_TIMEOUT = 60.0


def host_costs(names: list[str]) -> dict[str, dict[str, float]]:
    """Microseconds of Python per eager forward call, by operation and provider."""
    found: dict[str, dict[str, float]] = {}
    for label, case in (*SMALL_CASES.items(), (WITH_GRADIENT, SMALL_CASES["direct mix"])):
        made = make_inputs(case, "cuda")
        if label == WITH_GRADIENT:
            made.arguments.update({name: _leaf(value) for name, value in made.arguments.items()})
        for name in names:
            # the cases have reported what cannot run
            with contextlib.suppress(Unsupported, Exception, OutOfTime), limit(_FIRST_CALL_TIMEOUT):
                found.setdefault(label, {})[name] = _host_microseconds(PROVIDERS[name].bind(case, made))
    return found


def _leaf(value: Any) -> Any:
    return value.detach().requires_grad_() if isinstance(value, Tensor) else value


def _host_microseconds(call: Callable[[], Any]) -> float:
    for _ in range(10):
        call()
    samples = []
    for _ in range(5):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        for _ in range(_CALLS):
            call()
        samples.append((time.perf_counter() - begun) / _CALLS * 1e6)
    return statistics.median(samples)


def first_calls(names: list[str]) -> dict[str, dict[str, dict[str, float] | str]]:
    """Seconds of the first call of each operation: {provider: {"cold": {operation: s}, "from disk": {...}}}."""
    found: dict[str, dict[str, dict[str, float] | str]] = {}
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            # bytecode too, which installed packages have and a machine that keeps none compiles anew: half of a call from disk
            environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
            environment |= {"PYTHONPYCACHEPREFIX": f"{folder}/bytecode", "FLA_CACHE_RESULTS": "1"}  # as a user has it
            runs = []
            for kernels in ("others", "own", "own"):  # the first one leaves bytecode alone
                caches = {f"{of}_CACHE_DIR": f"{folder}/{kernels}/{of}" for of in ("ATTNRES", "TRITON")}
                runs.append(_in_new_process(name, environment | caches))
            found[name] = {"cold": runs[1], "from disk": runs[2]}
    return found


def _in_new_process(name: str, environment: dict[str, str]) -> dict[str, float] | str:
    command = [sys.executable, "-m", "bench.host", name]
    try:
        done = subprocess.run(
            command,
            env=environment,
            cwd=Path(__file__).parent.parent,
            capture_output=True,
            text=True,
            timeout=_FIRST_CALL_TIMEOUT,
        )
    except subprocess.TimeoutExpired:
        return f"more than {_FIRST_CALL_TIMEOUT:.0f} s"
    if done.returncode:
        return "failed: " + (done.stderr.strip().splitlines() or ["no message"])[-1]
    return json.loads(done.stdout.splitlines()[-1])


def _time_first_calls(name: str) -> dict[str, float]:
    """In this order, in one process: the first one also loads what the others share (the CuTe DSL, the compiler)."""
    found = {}
    labels = SMALL_CASES if PROVIDERS[name].ours else ["direct mix"]  # an autotuning peer needs up to a minute for one
    for label in labels:
        case = SMALL_CASES[label]
        made = make_inputs(case, "cuda")
        with contextlib.suppress(Unsupported):
            call = PROVIDERS[name].bind(case, made)
            torch.cuda.synchronize()
            begun = time.perf_counter()
            call()
            torch.cuda.synchronize()
            found[label] = time.perf_counter() - begun
    return found


if __name__ == "__main__":
    print(json.dumps(_time_first_calls(sys.argv[1])))
